"""What the bench compares the kernels with: three torch compositions, and published kernels if they are installed.

A connector takes (shape, features, layers) to z, a loss (shape, z, images) to the summed loss of all pairs.

    loop     one pair after the other, cross entropy on float32 logits
    padded   everything padded to the largest width, torch.bmm over all pairs
    strong   one product per text encoder for layer one, grouped products by image width for layer two, one logits
             product per image encoder; the bench puts it under torch.compile

Letters: P pairs, B batch, D width of a pair.
"""

import importlib

import torch
import torch.nn.functional as F

import kernels

HIDDEN, SCALE = 1024, 20.0


def symmetric_cross_entropy(logits):
    """logits [..., B, B] to the summed loss."""
    logits = logits.float().reshape(-1, *logits.shape[-2:])
    rows = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape[:2])
    return (F.cross_entropy(logits.mT, rows) + F.cross_entropy(logits, rows)) / 2 * len(logits)


def loop_loss(shape, z, images):
    blocks = z.split([shape.images[i] for i in shape.image_of], 1)
    return sum(symmetric_cross_entropy(SCALE * F.normalize(x, dim=1) @ images[i].T)
               for x, i in zip(blocks, shape.image_of))  # fmt: skip


def loop_connector(shape, features, layers):
    return kernels.connector_mlp(features, layers, impl="torch")[0]


def pad(matrix, rows, columns):
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def padded_connector(shape, features, layers):
    """z [P, B, widest]."""
    wide_in, wide_out = max(shape.texts), max(shape.images)
    x = torch.stack([pad(features[t], shape.batch, wide_in) for t in shape.text_of])
    (w1, b1, _), (w2, b2, _) = layers
    first = range(len(shape.pairs)) if shape.generator == "each" else shape.text_of
    second = range(len(shape.pairs)) if shape.generator == "each" else shape.image_of
    w1 = torch.stack([pad(w1[k], HIDDEN, wide_in) for k in first])
    w2 = torch.stack([pad(w2[k], wide_out, HIDDEN) for k in second])
    b2 = torch.stack([F.pad(b2[k], (0, wide_out - len(b2[k]))) for k in second])
    h = F.relu(torch.baddbmm(torch.stack([b1[k] for k in first])[:, None], x, w1.mT))
    return torch.baddbmm(b2[:, None], h, w2.mT)


def padded_loss(shape, z, images):
    if z.dim() == 2:
        blocks = z.split([shape.images[i] for i in shape.image_of], 1)
        z = torch.stack([pad(x, shape.batch, max(shape.images)) for x in blocks])
    y = torch.stack([pad(images[i], shape.batch, max(shape.images)) for i in shape.image_of])
    return symmetric_cross_entropy(SCALE * F.normalize(z, dim=2) @ y.mT)


def strong_connector(shape, features, layers):
    (w1, b1, wires), (w2, b2, wires2) = layers
    hidden = [None] * len(wires)
    for t, x in enumerate(features):  # one product for all first layers of a text encoder
        users = [o for o, (a, _) in enumerate(wires) if a == t]
        if users:
            weight, bias = (torch.cat([own[wires[o][1]] for o in users]) for own in (w1, b1))
            for o, h in zip(users, F.relu(F.linear(x, weight, bias)).split(HIDDEN, 1)):
                hidden[o] = h
    if hasattr(F, "grouped_mm") and shape.device == "cuda" and shape.dtype == torch.bfloat16:
        widths = torch.tensor([w2[k].shape[0] for _, k in wires2], dtype=torch.int32)
        ends = widths.cumsum(0, dtype=torch.int32).to(shape.device, non_blocking=True)
        stacked = torch.stack([hidden[a] for a, _ in wires2])  # [P, B, HIDDEN]
        weight = torch.cat([w2[k] for _, k in wires2]).T  # [HIDDEN, sum D]
        return F.grouped_mm(stacked, weight, offs=ends) + torch.cat([b2[k] for _, k in wires2])
    z = [None] * len(wires2)
    for width in sorted(set(shape.images)):
        users = [o for o, (_, k) in enumerate(wires2) if w2[k].shape[0] == width]
        if users:
            h, w, b = (torch.stack(s) for s in zip(*((hidden[a], w2[k], b2[k]) for a, k in (wires2[o] for o in users))))
            for o, y in zip(users, torch.baddbmm(b[:, None], h, w.mT)):
                z[o] = y
    return torch.cat(z, 1)


def strong_loss(shape, z, images):
    blocks, total = z.split([shape.images[i] for i in shape.image_of], 1), 0.0
    for i, y in enumerate(images):  # one logits product for all pairs of an image encoder
        users = [x for x, own in zip(blocks, shape.image_of) if own == i]
        if users:
            logits = SCALE * F.normalize(torch.cat(users), dim=1) @ y.T
            total = total + symmetric_cross_entropy(logits.view(len(users), shape.batch, shape.batch))
    return total


def published():
    """name: loss(u, y) of one normalised pair, for whichever published kernels are installed. Two compute less."""

    def load(module, build):
        try:
            return build(importlib.import_module(module))
        except Exception:  # not installed, or not for this torch: the bench goes on without it
            return None

    found = {
        "inf-cl": load("inf_cl", lambda m: lambda u, y: (m.cal_flash_loss(u, y, scale=SCALE).mean()
                                                        + m.cal_flash_loss(y, u, scale=SCALE).mean()) / 2),
        "memeff": load("memeff", lambda m: m.MemoryEfficientCLIPLoss(temperature=1 / SCALE)),
        "siglip-kernel (sigmoid)": load("siglip_kernel", lambda m: lambda u, y: m.fused_siglip_loss(
            u, y, torch.tensor(SCALE, device=u.device).log(), torch.tensor(-10.0, device=u.device))),
        "liger-kernel (one side)": load("liger_kernel.transformers", lambda m: lambda u, y, loss=None: (
            m.LigerFusedLinearCrossEntropyLoss()(y * SCALE, u, torch.arange(len(u), device=u.device)))),
    }  # fmt: skip
    return {name: rival for name, rival in found.items() if rival is not None}
