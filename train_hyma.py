"""Trains one hypernetwork that predicts the connector of every encoder pair, ranks the pairs, writes the connectors.

    python train_hyma.py --pairs all                                  # the embedded sample, about a minute on a CPU
    python train_hyma.py --pairs all --data embeddings/my             # your embeddings, made by embed.py
    python train_hyma.py --pairs "vit_*:mpnet" deit_b16:roberta --data embeddings/my --out runs/few
    python train_hyma.py --resume                                     # the newest run, after an interruption

Every step draws a mini-batch of rows and a mini-batch of pairs, lets the generator predict those pairs' connectors,
and descends their mean symmetric InfoNCE loss (arXiv 2507.10015, section 3). Two generators: `factored` (default)
predicts a pair's weights from parts shared by all pairs of its text encoder and of its image encoder; `mlp` is the
paper's, an MLP from a pair code and a layer code to that layer's weights. Writes runs/<name>/: connectors/,
ranking.csv, ledger.json, metrics.jsonl, config.json, checkpoint.pt.
"""

import argparse
import math
import time

import torch
import torch.nn as nn
from tqdm import tqdm

import vlm
from kernels import Layer, adamw_outer, outer_grad_norm_sq
from vlm import HIDDEN_DIM, BadInput, draw_rows, learning_rate, pair_losses, unique, validate

LEARNING_RATE = {"factored": 3e-3, "mlp": 1e-3}


def parse_flags():
    """The flags, and the run folder's configuration if an interrupted run is to be resumed (else None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    vlm.add_training_flags(parser, "hyma")
    add("--predict", nargs="+", default=[], metavar="IMAGE:TEXT", help="pairs to predict, score and export untrained")
    add(
        "--generator",
        choices=["factored", "mlp"],
        default="factored",
        help="how weights are predicted (default: %(default)s)",
    )
    add(
        "--width",
        type=int,
        help="hidden width of the mlp generator; the paper's is 512 (default: 128)",
    )
    add("--pairs-per-step", type=int, help="pairs a step (default: enough for every encoder to be in each step)")
    add("--lr", type=float, help="peak learning rate (default: 3e-3 factored, 1e-3 mlp)")
    add("--seed", type=int, default=0, help="of weights, batches and pair draws (default: %(default)s)")
    flags = parser.parse_args()
    if not flags.resume:
        vlm.check_training_flags(flags, "width", "pairs_per_step")
        if flags.width is not None and flags.generator != "mlp":
            raise BadInput(f"--width {flags.width}: contradicts --generator {flags.generator}; only mlp has a width")
        return flags, None
    return vlm.resume_flags(parser, vlm.find_run(flags.out))


# ------------------------------------------------------------------------------------------------- generators


class Factored(nn.Module):
    """A pair's connector from the parts of its two encoders: all but the last layer belong to the text encoder and
    lead into a hidden space that every pair shares, the last layer belongs to the image encoder.

    A part learns from every pair of its encoder, so each pair needs only its share of the steps, and a pair that was
    never drawn has a connector too. Without a hidden layer the two parts are multiplied into one linear map.
    """

    def __init__(self, image_dims, text_dims, hidden_layers, width=None):
        super().__init__()
        self.images, self.texts, self.hidden_layers = list(image_dims), list(text_dims), hidden_layers
        self.text_parts = nn.ModuleList(
            nn.ModuleList(
                nn.Linear(dim if depth == 0 else HIDDEN_DIM, HIDDEN_DIM) for depth in range(max(1, hidden_layers))
            )
            for dim in text_dims.values()
        )
        self.image_parts = nn.ModuleList(nn.Linear(HIDDEN_DIM, dim) for dim in image_dims.values())

    def forward(self, features, pairs):
        """features: {text: [B, D_t]}. Returns what `connector_mlp` takes: inputs, and the layers of these pairs."""
        texts, images = unique(text for _, text in pairs), unique(image for image, _ in pairs)
        parts = [self.text_parts[self.texts.index(text)] for text in texts]
        heads = [self.image_parts[self.images.index(image)] for image in images]
        inputs, each = [features[text] for text in texts], [(k, k) for k in range(len(texts))]
        layers = [
            Layer([part[depth].weight for part in parts], [part[depth].bias for part in parts], each)
            for depth in range(self.hidden_layers)
        ]
        if self.hidden_layers == 0:
            inputs = [nn.functional.linear(x, p[0].weight.to(x), p[0].bias.to(x)) for x, p in zip(inputs, parts)]
        wiring = [(texts.index(text), images.index(image)) for image, text in pairs]
        layers.append(Layer([head.weight for head in heads], [head.bias for head in heads], wiring))
        return inputs, layers

    def flops(self, batch_size, pairs):
        """Of the connectors' matrix products in one step, forward and backward, 2 a multiply-add."""
        texts = [self.text_parts[self.texts.index(text)] for text in unique(text for _, text in pairs)]
        first = sum(4 * part[0].weight.numel() for part in texts)  # no gradient with respect to the embeddings
        middle = sum(6 * layer.weight.numel() for part in texts for layer in part[1:])
        last = sum(6 * self.image_parts[self.images.index(image)].weight.numel() for image, _ in pairs)
        return batch_size * (first + middle + last)

    @torch.no_grad()
    def predict(self, image, text):
        """The pair's connector: [(weight [out, in], bias [out])] per layer."""
        layers = [*self.text_parts[self.texts.index(text)], self.image_parts[self.images.index(image)]]
        if self.hidden_layers == 0:
            first, last = layers
            return [(last.weight @ first.weight, last.weight @ first.bias + last.bias)]
        return [(layer.weight, layer.bias) for layer in layers]


class PaperMLP(nn.Module):
    """The paper's hypernetwork: a pair code and a layer code in, that layer's weights and bias out, each cut from one
    output as long as the largest layer.

    The pair code joins a code of the image encoder and one of the text encoder, so that any pair has one. The output is
    scaled by 1 / sqrt(3 in), which gives every predicted layer the spread torch gives a fresh nn.Linear.
    """

    def __init__(self, image_dims, text_dims, hidden_layers, width):
        super().__init__()
        self.image_dims, self.text_dims, self.hidden_layers = image_dims, text_dims, hidden_layers
        code_dim = 32
        self.image_codes = nn.Embedding(len(image_dims), code_dim)
        self.text_codes = nn.Embedding(len(text_dims), code_dim)
        self.layer_codes = nn.Embedding(hidden_layers + 1, code_dim)
        self.trunk = nn.Sequential(
            nn.Linear(3 * code_dim, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()
        )
        self.size = max(out * (into + 1) for i in image_dims for t in text_dims for out, into in self.shapes(i, t))
        # [size, width + 1], the last column being the bias: no Parameter, because its gradient, an outer product of a
        # few rows, is never formed (adamw_outer)
        self.register_buffer("head", torch.randn(self.size, width + 1) / width**0.5)
        self.head[:, -1] = 0
        self.outer = None  # (grad of the output [rows, size], input [rows, width + 1]) of the last backward pass

    def shapes(self, image, text):
        dims = [self.text_dims[text]] + [HIDDEN_DIM] * self.hidden_layers + [self.image_dims[image]]
        return list(zip(dims[1:], dims))

    def weights(self, pairs):
        """[[(weight, bias)] per layer] per pair."""
        images, texts = list(self.image_dims), list(self.text_dims)
        device, depth = self.head.device, self.hidden_layers + 1
        image = self.image_codes(torch.tensor([images.index(image) for image, _ in pairs], device=device))  # [P, code]
        text = self.text_codes(torch.tensor([texts.index(text) for _, text in pairs], device=device))
        pair = torch.cat([image, text], dim=1).repeat_interleave(depth, dim=0)  # [P * depth, 2 code]
        hidden = self.trunk(torch.cat([pair, self.layer_codes.weight.repeat(len(pairs), 1)], dim=1))
        raw = OuterLinear.apply(nn.functional.pad(hidden, (0, 1), value=1.0), self.head, self).unbind(0)
        predicted = []
        for p, (image, text) in enumerate(pairs):
            shapes, rows = self.shapes(image, text), raw[p * depth : (p + 1) * depth]
            cut = [row[: out * (into + 1)] * (3 * into) ** -0.5 for row, (out, into) in zip(rows, shapes)]
            predicted.append(
                [(c[: out * into].view(out, into), c[out * into :]) for c, (out, into) in zip(cut, shapes)]
            )
        return predicted

    def forward(self, features, pairs):
        return vlm.own_layers(features, pairs, self.weights(pairs))

    def flops(self, batch_size, pairs):
        connectors = sum(vlm.connector_flops(batch_size, self.shapes(*pair)) for pair in pairs)
        rows = len(pairs) * (self.hidden_layers + 1)
        trunk = sum(6 * layer.weight.numel() for layer in self.trunk if isinstance(layer, nn.Linear))
        return connectors + rows * (6 * self.head.numel() + trunk)

    @torch.no_grad()
    def predict(self, image, text):
        return self.weights([(image, text)])[0]


class OuterLinear(torch.autograd.Function):
    """inputs [R, K] @ weight.T [K, O], which hands its owner the two factors of the weight's gradient."""

    @staticmethod
    def forward(ctx, inputs, weight, owner):
        ctx.save_for_backward(inputs, weight)
        ctx.owner = owner
        return inputs @ weight.T

    @staticmethod
    def backward(ctx, grad_out):
        inputs, weight = ctx.saved_tensors
        ctx.owner.outer = grad_out.contiguous(), inputs
        return grad_out @ weight, None, None


# ------------------------------------------------------------------------------------- batches of rows and of pairs


def draw_pairs(step, seed, pairs, pairs_per_step):
    """The pairs of a step, a pure function of (seed, step).

    Each round deals every pair out once. It walks the image x text table along shuffled diagonals, so that the pairs
    of one step spread over as many encoders as there can be.
    """
    steps_per_round = math.ceil(len(pairs) / pairs_per_step)
    turn, place = divmod(step, steps_per_round)
    random = torch.Generator().manual_seed((seed << 32) + (1 << 31) + turn)
    shuffled = []
    for names in (unique(image for image, _ in pairs), unique(text for _, text in pairs)):
        shuffled.append([names[i] for i in torch.randperm(len(names), generator=random)])
    images, texts = shuffled
    if len(images) < len(texts):
        diagonals = [(images[(t + d) % len(images)], text) for d in range(len(images)) for t, text in enumerate(texts)]
    else:
        diagonals = [(image, texts[(i + d) % len(texts)]) for d in range(len(texts)) for i, image in enumerate(images)]
    wanted = set(pairs)
    order = [pair for pair in diagonals if pair in wanted]
    return order[place * pairs_per_step : (place + 1) * pairs_per_step]


# ------------------------------------------------------------------------------------------------ a step, a look


def update(generator, optimizer, moments, count, lr, flags):
    """One AdamW step under one global gradient norm, the never-formed gradient of the `mlp` head included."""
    parameters = [p for p in generator.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if moments:
        grad_out, inputs = generator.outer
        norm = (norm.double() ** 2 + outer_grad_norm_sq(grad_out, inputs)).sqrt().float()
    nn.utils.clip_grads_with_norm_(parameters, flags.clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    if moments:
        clip = (flags.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        decay = flags.weight_decay
        adamw_outer(generator.head, *moments, grad_out, inputs, step=count, lr=lr, weight_decay=decay, clip=clip)


def settle(flags, device, row_count, images, texts, pairs):
    """Puts numbers in the place of those flags whose default depends on the data, so that config.json holds them."""
    vlm.settle_training_flags(flags, "hyma", device, row_count)
    flags.pairs_per_step = min(flags.pairs_per_step or max(len(images), len(texts)), len(pairs))
    flags.width = flags.width or (128 if flags.generator == "mlp" else None)
    flags.lr = flags.lr or LEARNING_RATE[flags.generator]
    return flags


# -------------------------------------------------------------------------------------------------------- main


def main():
    flags, config = parse_flags()
    device = vlm.pick_device(flags.device)
    data, pairs = vlm.open_data(flags)
    images, texts = unique(image for image, _ in pairs), unique(text for _, text in pairs)
    untrained = [pair for pair in vlm.choose_pairs(data, flags.predict) if pair not in pairs] if flags.predict else []
    for image, text in untrained:
        if image not in images or text not in texts:
            name = text if image in images else image
            raise BadInput(f"--predict {image}:{text}: {name} must be in a pair that is trained")
    train_rows, val_rows = vlm.split_for_training(data, flags.seed, flags.rows)
    flags = settle(flags, device, len(train_rows), images, texts, pairs)
    print(f"pairs: {len(pairs)} of {len(images)} image and {len(texts)} text encoders, {flags.pairs_per_step} a step")
    store = vlm.RowStore(data, images + texts, device)
    identity = {"pairs": [":".join(pair) for pair in pairs], "embeddings": data.fingerprint(images + texts)}
    lock = vlm.open_run(flags, config, identity, device)  # noqa: F841  held until the process ends
    retrieval = vlm.Retrieval(data, val_rows, device)

    torch.manual_seed(flags.seed)
    torch.set_float32_matmul_precision("high" if flags.precision == "tf32" else "highest")
    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
    build = {"factored": Factored, "mlp": PaperMLP}[flags.generator]
    widths = [{name: store.dims[name] for name in names} for names in (images, texts)]
    generator = build(*widths, int(flags.connector[-1]), flags.width).to(device)
    optimizer = torch.optim.AdamW(generator.parameters(), weight_decay=flags.weight_decay, fused=True)
    moments = [torch.zeros_like(generator.head) for _ in range(2)] if flags.generator == "mlp" else []

    steps_per_epoch = len(train_rows) // flags.batch_size
    steps = flags.epochs * steps_per_epoch
    period = steps_per_epoch * max(1, flags.epochs // 20)  # steps between two validations, each with a checkpoint
    # All that the loop changes beside the tensors: a checkpoint holds just this.
    state = {
        "step": 0,
        "flops": 0,
        "seconds": 0.0,
        "updates": {":".join(pair): 0 for pair in pairs + untrained},
        "metrics": [],
        "best": None,
    }
    if config is not None and (flags.out / "checkpoint.pt").is_file():
        saved = vlm.load_tensors(flags.out / "checkpoint.pt")
        generator.load_state_dict(saved["generator"])
        optimizer.load_state_dict(saved["optimizer"])
        moments = [moment.to(device) for moment in saved["moments"]]
        state = saved["state"]
        print(f"resumed: {flags.out} at step {state['step']} of {steps}")

    started, epoch_losses = time.perf_counter() - state["seconds"], []
    with tqdm(total=steps, initial=state["step"], desc="train", unit="step") as progress:
        for step in range(state["step"], steps):
            rows = draw_rows(step, flags.seed, train_rows, flags.batch_size)  # [B]
            chosen = draw_pairs(step, flags.seed, pairs, flags.pairs_per_step)
            losses = pair_losses(generator, store, rows, chosen, dtype, flags.logit_scale)  # [P]
            loss = losses.mean()
            epoch_losses.append(loss.item())
            if not math.isfinite(epoch_losses[-1]):
                bad = ":".join(chosen[losses.isfinite().long().argmin().item()])
                raise BadInput(
                    f"step {step}: the loss of {bad} is {epoch_losses[-1]}; stopped before the update; try a lower --lr"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            lr = learning_rate(step, steps, flags.lr, flags.warmup_steps)
            update(generator, optimizer, moments, step + 1, lr, flags)
            for pair in chosen:
                state["updates"][":".join(pair)] += 1
            state["flops"] += generator.flops(flags.batch_size, chosen)
            state["flops"] += sum(4 * flags.batch_size**2 * store.dims[image] for image, _ in chosen)  # the logits
            progress.update()
            if (step + 1) % period and step + 1 < steps:
                continue

            recalls = validate(generator, store, retrieval, pairs + untrained)
            trained = [recalls[":".join(pair)] for pair in pairs]
            score = sum(six[2] + six[5] for six in trained) / (2 * len(pairs))  # R@10, both directions
            epoch = (step + 1) // steps_per_epoch
            if state["best"] is None or score > state["best"]["score"]:
                weights = {name: tensor.cpu().clone() for name, tensor in generator.state_dict().items()}
                state["best"] = {"score": score, "epoch": epoch, "recalls": recalls, "weights": weights}
            elif score < 2 * retrieval.chance[2] < state["best"]["score"]:
                progress.write(
                    f"epoch {epoch}: collapsed to chance, R@10 {score:.1%}; epoch {state['best']['epoch']} is kept"
                )
            state["step"], state["seconds"] = step + 1, time.perf_counter() - started
            line = {"epoch": epoch, "step": step + 1, "loss": sum(epoch_losses) / len(epoch_losses), "lr": lr}
            line |= {"val_recall10": score, "seconds": state["seconds"], "recalls": recalls}
            state["metrics"].append(line)
            epoch_losses = []
            progress.set_postfix(loss=f"{line['loss']:.3f}", val_R10=f"{score:.1%}")
            tensors = {"generator": generator.state_dict(), "optimizer": optimizer.state_dict(), "moments": moments}
            vlm.save_tensors(tensors | {"state": state}, flags.out / "checkpoint.pt")
            vlm.write_jsonl(flags.out / "metrics.jsonl", state["metrics"])

    export(flags, data, generator, state, retrieval, device)


def export(flags, data, generator, state, retrieval, device):
    """Writes the best state's connectors, ranking.csv and ledger.json, and prints the ranking."""
    best, updates = state["best"], state["updates"]
    generator.load_state_dict(best["weights"])
    about = {"generator": flags.generator, "logit_scale": flags.logit_scale, "seed": flags.seed, "epoch": best["epoch"]}

    def connector_of(pair):
        return generator.predict(*pair.split(":")), about | {"updates": updates[pair]}

    state["trainable_parameters"] = sum(tensor.numel() for tensor in generator.state_dict().values())
    state["peak_bytes"] = vlm.peak_bytes(device)
    ranked = vlm.rank_pairs(best["recalls"])
    paths = vlm.write_results(flags.out, data, ranked, connector_of, flags.batch_size, state)
    made = f"{flags.generator} {flags.connector}, epoch {best['epoch']} of {flags.epochs}"
    vlm.print_results(ranked, best["recalls"], retrieval, made, state, paths[0])


if __name__ == "__main__":
    vlm.run_script(main)
