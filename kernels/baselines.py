"""What the bench compares the kernels with: torch compositions, and published kernels if they are installed.

A connector takes (shape, features, layers) to z, a loss (shape, z, images) to the summed loss of all pairs. shape: a
`kernels.bench.Shape`.

    loop     one pair after the other, cross entropy on float32 logits
    padded   everything padded to the largest width, torch.bmm over all pairs
    dense    where layers belong to encoders: one product for each input of each layer (kernels/dense.py), and our loss
    strong   the same products, or where each pair has layers of its own one product per text encoder for layer one and
             grouped products for layer two; one logits product per image encoder. The bench puts it under torch.compile

Letters: P pairs, B batch, D width of a pair.
"""

import importlib

import torch
import torch.nn.functional as F

import kernels
from kernels import dense

HIDDEN, SCALE = 1024, 20.0


def symmetric_cross_entropy(logits):
    """logits [..., B, B] to the summed loss."""
    logits = logits.float().reshape(-1, *logits.shape[-2:])
    rows = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape[:2])
    return (F.cross_entropy(logits.mT, rows) + F.cross_entropy(logits, rows)) / 2 * len(logits)


def split_pairs(shape, z):
    """z [B, sum D] to [B, D] of each pair."""
    return z.split(shape.widths_out, 1)


# -------------------------------------------------------------------------------------------------------------- loop


def loop_connector(shape, features, layers):
    return kernels.connector_mlp(features, layers, impl="torch")[0]


def loop_loss(shape, z, images):
    total = 0.0
    for x, i in zip(split_pairs(shape, z), shape.image_of):
        total = total + symmetric_cross_entropy(SCALE * F.normalize(x, dim=1) @ images[i].T)
    return total


# ------------------------------------------------------------------------------------------------------------ padded


def pad(matrix, rows, columns):
    """The matrix with zeros below and beside it."""
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def stack_padded(matrices, chosen, rows, columns):
    """[P, rows, columns]: the chosen ones of the matrices, by their indices."""
    return torch.stack([pad(matrices[k], rows, columns) for k in chosen])


def padded_connector(shape, features, layers):
    """z [P, B, widest]."""
    wide_in, wide_out = max(shape.texts), max(shape.images)
    (w1, b1, _), (w2, b2, _) = layers
    if shape.generator == "each":
        first = second = range(len(shape.pairs))
    else:
        first, second = shape.text_of, shape.image_of
    x = stack_padded(features, shape.text_of, shape.batch, wide_in)  # [P, B, wide_in]
    weight_1 = stack_padded(w1, first, HIDDEN, wide_in)  # [P, HIDDEN, wide_in]
    weight_2 = stack_padded(w2, second, wide_out, HIDDEN)  # [P, wide_out, HIDDEN]
    biases_1 = []
    biases_2 = []
    for k, m in zip(first, second):
        biases_1.append(b1[k])
        biases_2.append(F.pad(b2[m], (0, wide_out - len(b2[m]))))
    h = F.relu(torch.baddbmm(torch.stack(biases_1)[:, None], x, weight_1.mT))
    return torch.baddbmm(torch.stack(biases_2)[:, None], h, weight_2.mT)


def padded_loss(shape, z, images):
    widest = max(shape.images)
    if z.dim() == 2:
        blocks = split_pairs(shape, z)
        z = stack_padded(blocks, range(len(blocks)), shape.batch, widest)
    y = stack_padded(images, shape.image_of, shape.batch, widest)
    return symmetric_cross_entropy(SCALE * F.normalize(z, dim=2) @ y.mT)


# ---------------------------------------------------------------------------------------------------- dense and strong


def dense_connector(shape, features, layers):
    return dense.connector_mlp(features, layers)[0]


def strong_connector(shape, features, layers):
    if dense.is_dense(features, layers):
        return dense_connector(shape, features, layers)
    first, second = layers
    hidden = strong_first_layer(features, first)
    if hasattr(F, "grouped_mm") and shape.device == "cuda" and shape.dtype == torch.bfloat16:
        return grouped_last_layer(shape, hidden, second)
    return strong_last_layer(shape, hidden, second)


def strong_first_layer(features, layer):
    """[B, HIDDEN] of each output: one product for all outputs of a text encoder."""
    hidden = [None] * len(layer.wiring)
    for t, x in enumerate(features):
        outputs = []
        weights = []
        biases = []
        for o, (a, k) in enumerate(layer.wiring):
            if a == t:
                outputs.append(o)
                weights.append(layer.weights[k])
                biases.append(layer.biases[k])
        if outputs:
            product = F.relu(F.linear(x, torch.cat(weights), torch.cat(biases)))
            for o, h in zip(outputs, product.split(HIDDEN, 1)):
                hidden[o] = h
    return hidden


def grouped_last_layer(shape, hidden, layer):
    """z [B, sum D] by one grouped product."""
    inputs = []
    weights = []
    biases = []
    for a, k in layer.wiring:
        inputs.append(hidden[a])
        weights.append(layer.weights[k])
        biases.append(layer.biases[k])
    weight = torch.cat(weights).T  # [HIDDEN, sum D]
    return F.grouped_mm(torch.stack(inputs), weight, offs=shape.ends) + torch.cat(biases)


def strong_last_layer(shape, hidden, layer):
    """z [B, sum D] by one batched product for all outputs of a width."""
    z = [None] * len(layer.wiring)
    for width in sorted(set(shape.images)):
        outputs = []
        inputs = []
        weights = []
        biases = []
        for o, (a, k) in enumerate(layer.wiring):
            if len(layer.biases[k]) == width:
                outputs.append(o)
                inputs.append(hidden[a])
                weights.append(layer.weights[k])
                biases.append(layer.biases[k])
        if outputs:
            products = torch.baddbmm(torch.stack(biases)[:, None], torch.stack(inputs), torch.stack(weights).mT)
            for o, y in zip(outputs, products):
                z[o] = y
    return torch.cat(z, 1)


def strong_loss(shape, z, images):
    """One logits product for all pairs of an image encoder."""
    blocks = split_pairs(shape, z)
    total = 0.0
    for i, y in enumerate(images):
        of_image = [x for x, own in zip(blocks, shape.image_of) if own == i]
        if of_image:
            logits = SCALE * F.normalize(torch.cat(of_image), dim=1) @ y.T
            total = total + symmetric_cross_entropy(logits.view(len(of_image), shape.batch, shape.batch))
    return total


# --------------------------------------------------------------------------------------------------- published kernels


def inf_cl(module):
    def loss(u, y):
        by_text = module.cal_flash_loss(u, y, scale=SCALE).mean()
        by_image = module.cal_flash_loss(y, u, scale=SCALE).mean()
        return (by_text + by_image) / 2

    return loss


def memeff(module):
    return module.MemoryEfficientCLIPLoss(temperature=1 / SCALE)


def siglip(module):
    def loss(u, y):
        log_scale = torch.tensor(SCALE, device=u.device).log()
        return module.fused_siglip_loss(u, y, log_scale, torch.tensor(-10.0, device=u.device))

    return loss


def liger(module):
    def loss(u, y):
        rows = torch.arange(len(u), device=u.device)
        return module.LigerFusedLinearCrossEntropyLoss()(y * SCALE, u, rows)

    return loss


PUBLISHED = {  # name: (module, what makes its loss). The last two compute less than ours.
    "inf-cl": ("inf_cl", inf_cl),
    "memeff": ("memeff", memeff),
    "siglip-kernel (sigmoid)": ("siglip_kernel", siglip),
    "liger-kernel (one direction)": ("liger_kernel.transformers", liger),
}


def published():
    """({name: loss(u, y) of one normalised pair} of the published kernels that are installed, {name: why not} of the others)."""
    found = {}
    missing = {}
    for name, (module, make_loss) in PUBLISHED.items():
        try:
            found[name] = make_loss(importlib.import_module(module))
        except Exception as error:  # not installed, or not for this torch: the bench goes on without it
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
