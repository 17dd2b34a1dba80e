"""Trains one hypernetwork that predicts the connector of every encoder pair, ranks the pairs, writes the connectors.

    python train_hyma.py --pairs all                                  # the embedded sample, about a minute on a CPU
    python train_hyma.py --pairs all --data embeddings/my             # your embeddings, made by embed.py
    python train_hyma.py --pairs "vit_*:mpnet" deit_b16:roberta --data embeddings/my --out runs/few
    python train_hyma.py --rows 1000 --data embeddings/my             # a first choice from a few rows
    python train_hyma.py --add-encoder vit_l16 --from runs/few        # fits only the new encoder's part
    python train_hyma.py --resume                                     # the newest run, after an interruption

Every step draws a mini-batch of rows and a few pairs of one text encoder, lets the generator predict those pairs'
connectors, and descends their mean symmetric InfoNCE loss (arXiv 2507.10015, section 3). Two generators: `factored`
(default) predicts a pair's weights from parts shared by all pairs of its text encoder and of its image encoder; `mlp`
is the paper's, an MLP from a pair code and a layer code to that layer's weights. `factored` starts from a closed form,
which also tells the pairs apart on training rows that it has not seen; ranks come from these and the validation rows.
Writes runs/<name>/: connectors/, ranking.csv, ledger.json, metrics.jsonl, config.json, checkpoint.pt.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import vlm
from hyma.closed_form import PICTURE_RIDGE, Covariance, cross_validate, fold_rows, leading_axes, regularised, whitened
from hyma.costs import connector_flops, flop_counter, logit_flops
from hyma.embeddings import RowStore, choose_pairs, random_of, unique
from hyma.files import peak_bytes, run_script, save_tensors, write_jsonl
from hyma.metrics import Retrieval, expected, rank_pairs
from hyma.runs import create_run, find_run, resume_flags, write_results
from hyma.training import (
    add_training_flags,
    check_training_flags,
    draw_rows,
    learning_rate,
    open_data,
    own_layers,
    pair_losses,
    print_results,
    settle_training_flags,
    split_for_training,
    validate,
)
from kernels import Layer, adamw_outer, outer_grad_norm_sq
from vlm import HIDDEN_DIM, BadInput

LEARNING_RATE = {"factored": 1e-4, "mlp": 1e-3}  # factored starts from a closed form, and only refines it
TEXT_SCALE = 5.0  # on centred texts, whose coordinates are small: a first layer before a ReLU learns faster
TEXT_RIDGE = SHARED_RIDGE = 0.3  # regularisation of the start, in mean eigenvalues


def parse_flags():
    """The flags, and the run folder's configuration if an interrupted run is to be resumed (else None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_training_flags(parser, "hyma")
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
    add("--rank", type=int, help="axes of each image encoder's space that factored works in (default: 256)")
    add("--pairs-per-step", type=int, help="pairs a step, of one text encoder (default: a third of them; mlp: all)")
    add("--lr", type=float, help="peak learning rate (default: factored 1e-4, mlp 1e-3)")
    add("--add-encoder", metavar="NAME", help="fit only this encoder's part, against the finished run in --from")
    add("--from", metavar="RUN", help="the run that --add-encoder adds to; its flags are kept")
    add("--seed", type=int, default=0, help="of weights, batches and pair draws (default: %(default)s)")
    flags = parser.parse_args()
    if bool(flags.add_encoder) != bool(getattr(flags, "from")):
        raise BadInput("--add-encoder NAME and --from RUN go together")
    if not flags.resume and flags.add_encoder:
        earlier = vlm.read_json(Path(getattr(flags, "from")) / "config.json")
        if earlier.get("script") != "train_hyma.py" or earlier["flags"]["generator"] != "factored":
            raise BadInput(f"--from {getattr(flags, 'from')}: no run of train_hyma.py with --generator factored")
        own = ("out", "resume", "pairs", "predict", "add_encoder", "from", "pairs_per_step")
        parser.set_defaults(**{name: value for name, value in earlier["flags"].items() if name not in own})
        flags = parser.parse_args()
        flags.data = Path(flags.data)
    if not flags.resume:
        check_training_flags(flags, "width", "rank", "pairs_per_step")
        for name, owner in (("width", "mlp"), ("rank", "factored")):
            if getattr(flags, name) is not None and flags.generator != owner:
                raise BadInput(
                    f"--{name} {getattr(flags, name)}: contradicts --generator {flags.generator}, which has none"
                )
        return flags, None
    return resume_flags(parser, find_run(flags.out))


# ------------------------------------------------------------------------------------------------- generators


class Factored(nn.Module):
    """A pair's connector from the parts of its two encoders: all but the last layer belong to the text encoder and
    lead into a hidden space that every pair shares, the last layer belongs to the image encoder.

    A part learns from every pair of its encoder, so each pair needs only its share of the steps, and a pair that was
    never drawn has a connector too. Without a hidden layer the two parts are multiplied into one linear map.

    The last layer ends in `rank` axes of the image encoder (orthonormal columns [D, k]), along which its pictures can be
    told from texts: y in them stands for axes @ y, whose cosine with a picture x is that of y with axes.T @ x, so nothing
    wider is computed. Texts are centred. Both are undone in `predict`, which gives an ordinary connector.
    """

    def __init__(self, image_dims, text_dims, hidden_layers, rank):
        super().__init__()
        self.images, self.texts, self.hidden_layers = list(image_dims), list(text_dims), hidden_layers
        self.scale = TEXT_SCALE if hidden_layers else 1.0
        wide = HIDDEN_DIM if hidden_layers else HIDDEN_DIM // 4  # a linear map's shared space: no wider than its rank
        self.shared = wide // 2 if hidden_layers else wide  # m: a ReLU takes two units to pass a number
        self.text_parts = nn.ModuleList(
            nn.ModuleList(nn.Linear(dim if depth == 0 else wide, wide) for depth in range(max(1, hidden_layers)))
            for dim in text_dims.values()
        )
        self.image_parts = nn.ModuleList(nn.Linear(wide, min(rank, dim)) for dim in image_dims.values())
        self.axes = nn.ParameterList(fixed(torch.eye(dim, min(rank, dim))) for dim in image_dims.values())
        self.means = nn.ParameterList(fixed(torch.zeros(dim)) for dim in text_dims.values())

    def prepare(self, sides, shared, products):
        """Starts the parts from a closed form on training rows, {encoder: Covariance}.

        shared: the Covariance of the texts' `leading_axes` s [n, m]. products: {encoder: rows.T @ s [D, m]}. A text part
        leads to s by ridge regression, an image part from s to the pictures by `whitened`, and a ReLU between is passed as
        relu(s) - relu(-s) = s.
        """
        for place, text in enumerate(self.texts):
            self.start_text(place, sides[text], self.halves(products[text]))
            for layer in self.text_parts[place][1:]:
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
        for place, image in enumerate(self.images):
            self.start_image(place, sides[image], shared, products[image])

    def join(self, name, sides):
        """Starts the part of an encoder that joins trained ones in the same way, with their hidden space for s."""
        old = [place for place, text in enumerate(self.texts) if text != name]
        texts = [self.scale * sides[self.texts[place]].rows for place in old]  # [n, D_t]
        if name in self.texts:
            place, side = self.texts.index(name), sides[name]
            first = sum(self.text_parts[k][0](x) for k, x in zip(old, texts)) / len(old)  # [n, out]
            self.start_text(place, side, side.rows.T @ (first - first.mean(0)), first.mean(0))
            for layer, theirs in zip(self.text_parts[place][1:], self.text_parts[old[0]][1:]):
                layer.load_state_dict(theirs.state_dict())
        else:
            hidden = Covariance(sum(self.hidden(x, k) for k, x in zip(old, texts)) / len(old), SHARED_RIDGE)  # [n, m]
            self.start_image(self.images.index(name), sides[name], hidden, sides[name].rows.T @ hidden.rows)

    def start_text(self, place, side, product, mean=0.0):
        """A text to its first layer's outputs, from their product with it [D_t, out], centred, and their mean."""
        self.text_parts[place][0].weight.copy_(side.solve(product).T / self.scale)
        self.text_parts[place][0].bias.copy_(torch.as_tensor(mean))
        self.means[place].copy_(side.mean)

    def start_image(self, place, side, shared, product):
        """s to the image encoder's pictures, from their product with it [D, m]."""
        part, axes = self.image_parts[place], self.axes[place]
        weight, kept = whitened(product, shared, side), axes.shape[1]  # [D, m]
        if min(weight.shape) > kept:  # the leading directions of the outputs
            spread = torch.linalg.cholesky(regularised(shared.gram, 1e-4))
            axes.copy_(torch.svd_lowrank(weight @ spread, kept, niter=2)[0])
        else:  # any basis of all of them, and more where there are fewer than k
            axes.copy_(torch.linalg.qr(torch.cat([weight, torch.eye(*axes.shape).to(weight)], dim=1)[:, :kept]).Q)
        weight = axes.T @ weight
        weight /= (shared.rows @ weight.T).norm(dim=1).mean()
        part.weight.copy_(self.halves(weight))
        part.bias.copy_(-weight @ shared.mean)

    def halves(self, weight):
        """[D, m] to [D, 2 m], what goes with relu(s) and relu(-s)."""
        return torch.cat([weight, -weight], dim=1) if self.hidden_layers else weight

    def hidden(self, x, place):
        """Centred texts [n, D_t] to s [n, m]: what the last layer takes, or, of the two halves of that, the difference."""
        for layer in self.text_parts[place]:
            x = nn.functional.relu(layer(x)) if self.hidden_layers else layer(x)
        if self.hidden_layers:
            positive, negative = x.chunk(2, dim=1)
            x = positive - negative
        return x

    def centred(self, x, place):
        return (x - self.means[place].to(x)) * self.scale

    def forward(self, features, pairs):
        """features: {text: [B, D_t]}. Returns what `connector_mlp` takes: inputs, and the layers of these pairs, which
        end in their image encoders' axes."""
        texts, images = unique(text for _, text in pairs), unique(image for image, _ in pairs)
        places = [self.texts.index(text) for text in texts]
        inputs = [self.centred(features[text], place) for text, place in zip(texts, places)]
        parts, each = [self.text_parts[place] for place in places], [(k, k) for k in range(len(texts))]
        heads = [self.image_parts[self.images.index(image)] for image in images]
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
        """Of the connectors' matrix products in one step, forward and backward, 2 a multiply-add. A layer has a product
        forward, one for its gradient where it is trained, and one for its input's where anything before it is."""
        total, parts = 0, {text: self.text_parts[self.texts.index(text)] for text in unique(text for _, text in pairs)}
        for part in parts.values():
            trained = part[0].weight.requires_grad
            total += sum(
                (2 + 2 * trained + 2 * (trained and layer is not part[0])) * layer.weight.numel() for layer in part
            )
        for image, text in pairs:
            weight = self.image_parts[self.images.index(image)].weight
            total += (2 + 2 * weight.requires_grad + 2 * parts[text][0].weight.requires_grad) * weight.numel()
        return batch_size * total

    @torch.no_grad()
    def predict(self, image, text):
        """The pair's connector: [(weight [out, in], bias [out])] per layer."""
        i, t = self.images.index(image), self.texts.index(text)
        layers = [(layer.weight, layer.bias) for layer in [*self.text_parts[t], self.image_parts[i]]]
        weight, bias = layers[0]
        layers[0] = self.scale * weight, bias - self.scale * (weight @ self.means[t])
        weight, bias = layers[-1]
        layers[-1] = self.axes[i] @ weight, self.axes[i] @ bias
        if self.hidden_layers == 0:
            (first, shift), (last, bias) = layers
            return [(last @ first, last @ shift + bias)]
        return layers


def fixed(tensor):
    """Saved and loaded with the model, never trained."""
    return nn.Parameter(tensor, requires_grad=False)


@torch.no_grad()
def start(generator, store, folds, data, pairs, joins=None):
    """Starts the parts of all encoders, or of the one that joins, and cross-validates the pairs: an encoder that joins is
    judged along the same axes as those before it."""
    images, sides = unique(image for image, _ in pairs), {}
    for name in tqdm(images + generator.texts, desc="start", unit="encoder"):
        strength = PICTURE_RIDGE if name in images else TEXT_RIDGE
        sides[name] = Covariance(store.take(name, torch.cat(folds)), strength)
    first = [sides[text].rows for text in generator.texts if text != joins]  # [n, D_t]
    shared, sizes = Covariance(leading_axes(first, generator.shared), SHARED_RIDGE), [len(fold) for fold in folds]
    products = {}
    for name, side in sides.items():
        by_fold = zip(side.rows.split(sizes), shared.rows.split(sizes))
        products[name] = torch.stack([x.T @ s for x, s in by_fold])  # [folds, D, m]
    if joins:
        generator.join(joins, sides)
    else:
        generator.prepare(sides, shared, {name: parts.sum(0) for name, parts in products.items()})
    return cross_validate(sides, shared, products, folds, data, pairs)


class InAxes:
    """A RowStore whose pictures are coordinates [rows, k] along the generator's axes, made once, of the rows that a run
    uses."""

    def __init__(self, store, generator, images, rows):
        self.store, self.device, self.pictures = store, store.device, {}
        self.dims = dict(store.dims)
        for image in images:
            axes = generator.axes[generator.images.index(image)]  # [D, k]
            self.dims[image] = axes.shape[1]
            self.pictures[image] = torch.zeros(len(store.tensors[image]), axes.shape[1], device=store.device)
            for part in rows.split(65536):
                self.pictures[image][part.to(store.device)] = store.take(image, part) @ axes

    def take(self, name, rows):
        """[len(rows), k or D_t], float32, on the device; a picture's length is at most 1."""
        return self.pictures[name][rows.to(self.device)] if name in self.pictures else self.store.take(name, rows)


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
        return own_layers(features, pairs, self.weights(pairs))

    def flops(self, batch_size, pairs):
        connectors = sum(connector_flops(batch_size, self.shapes(*pair)) for pair in pairs)
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

    Each round deals every pair out once, the pairs of a step all with the same text encoder, whose part of the
    connectors is then computed once for all of them.
    """
    by_text = [[pair for pair in pairs if pair[1] == text] for text in unique(text for _, text in pairs)]
    steps_per_round = sum(math.ceil(len(group) / pairs_per_step) for group in by_text)
    turn, place = divmod(step, steps_per_round)
    random = random_of("pairs", seed, turn)
    dealt = []
    for group in by_text:
        group = [group[k] for k in torch.randperm(len(group), generator=random)]
        dealt += [group[start : start + pairs_per_step] for start in range(0, len(group), pairs_per_step)]
    return dealt[torch.randperm(len(dealt), generator=random)[place]]


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


def settle(flags, device, row_count, images, pairs):
    """Puts numbers in the place of those flags whose default depends on the data, so that config.json holds them."""
    settle_training_flags(flags, "hyma", device, row_count)
    few = math.ceil(len(images) / 3) if flags.generator == "factored" else len(images)
    flags.pairs_per_step = min(flags.pairs_per_step or few, len(pairs))
    flags.width = flags.width or (128 if flags.generator == "mlp" else None)
    flags.rank = None if flags.generator == "mlp" else min(flags.rank or 256, row_count)
    flags.lr = flags.lr or LEARNING_RATE[flags.generator]
    return flags


# ------------------------------------------------------------------------------------------ an encoder joins a run


def column(flags, data):
    """The pairs of --add-encoder with the encoders of --from, that run's state, and its pairs."""
    name, run = flags.add_encoder, Path(getattr(flags, "from"))
    if not (run / "ledger.json").is_file():
        raise BadInput(f"--from {run}: is not finished; finish it with: python train_hyma.py --resume --out {run}")
    earlier = vlm.load_tensors(run / "checkpoint.pt")["state"]
    old = [tuple(pair.split(":")) for pair in earlier["best"]["recalls"]]
    if name not in data.encoders:
        raise BadInput(f"--add-encoder {name}: not in {data.folder}; embed it with: python embed.py --encoder {name}")
    if any(name in pair for pair in old):
        raise BadInput(f"--add-encoder {name}: is in {run} already")
    names = unique(part for pair in old for part in pair)
    if data.fingerprint(names) != {part: vlm.read_json(run / "config.json")["embeddings"][part] for part in names}:
        raise BadInput(f"--from {run}: its embeddings in {data.folder} have changed since")
    if data.encoders[name].kind == "image":
        new = [(name, text) for text in unique(text for _, text in old)]
    else:
        new = [(image, name) for image in unique(image for image, _ in old)]
    return new, earlier, old


# -------------------------------------------------------------------------------------------------------- main


def main():
    flags, config = parse_flags()
    device = vlm.pick_device(flags.device)
    data, pairs = open_data(flags)
    earlier, untrained = None, []
    if flags.add_encoder:
        pairs, earlier, untrained = column(flags, data)
    elif flags.predict:
        untrained = [pair for pair in choose_pairs(data, flags.predict) if pair not in pairs]
    # encoders that joined later come last, so that the parts of the earlier ones keep their places
    images, texts = (unique(pair[side] for pair in (untrained if earlier else []) + pairs) for side in (0, 1))
    for image, text in untrained:
        if image not in images or text not in texts:
            name = text if image in images else image
            raise BadInput(f"--predict {image}:{text}: {name} must be in a pair that is trained")
    train_rows, val_rows = split_for_training(data, flags.seed, flags.rows)
    if earlier and not flags.pairs_per_step:  # one column's share of the run's
        flags.pairs_per_step = max(1, len(images) * len(pairs) // (3 * len(pairs + untrained)))
    flags = settle(flags, device, len(train_rows), images, pairs)
    print(f"pairs: {len(pairs)} of {len(images)} image and {len(texts)} text encoders, {flags.pairs_per_step} a step")
    store = RowStore(data, images + texts, device)
    identity = {"pairs": [":".join(pair) for pair in pairs], "embeddings": data.fingerprint(images + texts)}
    lock = create_run(flags, config, identity, device)  # noqa: F841  held until the process ends
    retrieval = Retrieval(data, val_rows, device)
    scored = pairs if earlier else pairs + untrained  # at every look and by the folds

    torch.manual_seed(flags.seed)
    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
    build = {"factored": Factored, "mlp": PaperMLP}[flags.generator]
    widths = [{name: store.dims[name] for name in names} for names in (images, texts)]
    generator = build(*widths, int(flags.connector[-1]), flags.width or flags.rank).to(device)
    if earlier:
        missing = generator.load_state_dict(earlier["best"]["weights"], strict=False).missing_keys
        for name, parameter in generator.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in missing)
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=flags.weight_decay, fused=True)
    moments = [torch.zeros_like(generator.head) for _ in range(2)] if flags.generator == "mlp" else []

    steps = flags.epochs * (len(train_rows) // flags.batch_size)
    # Four looks, each with a checkpoint: one validates every pair, which costs as much as several steps of a few.
    period = math.ceil(flags.epochs / 4) * (steps // flags.epochs)
    # All that the loop changes beside the tensors: a checkpoint holds just this.
    state = {
        "step": 0,
        "flops": 0,
        "logit_flops": 0,
        "seconds": 0.0,
        "updates": {":".join(pair): 0 for pair in untrained + pairs},
        "judged": {},
        "fold_rows": 0,
        "metrics": [],
        "best": None,
    }
    started, counter = time.perf_counter(), flop_counter()
    if config is not None and (flags.out / "checkpoint.pt").is_file():
        saved = vlm.load_tensors(flags.out / "checkpoint.pt")
        generator.load_state_dict(saved["generator"])
        optimizer.load_state_dict(saved["optimizer"])
        moments = [moment.to(device) for moment in saved["moments"]]
        state |= saved["state"]
        print(f"resumed: {flags.out} at step {state['step']} of {steps}")
    elif flags.generator == "factored":
        folds = fold_rows(data, train_rows, val_rows, flags.seed)
        with counter:
            state["judged"] = start(generator, store, folds, data, scored, flags.add_encoder)
        state["judged"] |= earlier.get("judged", {}) if earlier else {}
        state["flops"], state["fold_rows"] = counter.get_total_flops(), len(folds[0])
    if flags.generator == "factored":
        with counter:
            seen = unique(image for image, _ in scored)
            store = InAxes(store, generator, seen, torch.cat([train_rows, val_rows]))
        state["flops"] += 0 if state["step"] else counter.get_total_flops()
    started -= state["seconds"]
    torch.set_float32_matmul_precision("high" if flags.precision == "tf32" else "highest")  # the start needs every bit

    epoch_losses = []
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
            logits = logit_flops(flags.batch_size, [store.dims[image] for image, _ in chosen])
            state["flops"], state["logit_flops"] = state["flops"] + logits, state["logit_flops"] + logits
            progress.update()
            if (step + 1) % period and step + 1 < steps:
                continue

            # earlier pairs are as they were
            recalls = dict(earlier["best"]["recalls"]) if earlier else {}
            recalls |= validate(generator, store, retrieval, scored)
            trained = [recalls[":".join(pair)] for pair in pairs]
            score = sum(six[2] + six[5] for six in trained) / (2 * len(pairs))  # R@10, both directions
            epoch = round((step + 1) / steps * flags.epochs)
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
            save_tensors(tensors | {"state": state}, flags.out / "checkpoint.pt")
            write_jsonl(flags.out / "metrics.jsonl", state["metrics"])

    export(flags, data, generator, state, retrieval, device)


def export(flags, data, generator, state, retrieval, device):
    """Writes the best state's connectors, ranking.csv and ledger.json, and prints the ranking."""
    best, updates = state["best"], state["updates"]
    generator.load_state_dict(best["weights"])
    about = {"generator": flags.generator, "logit_scale": flags.logit_scale, "seed": flags.seed, "epoch": best["epoch"]}

    def connector_of(pair):
        return generator.predict(*pair.split(":")), about | {"updates": updates[pair]}

    trained = [tensor for tensor in generator.parameters() if tensor.requires_grad] + list(generator.buffers())
    state["trainable_parameters"] = sum(tensor.numel() for tensor in trained)
    state["peak_bytes"] = peak_bytes(device)
    expectation = expected(best["recalls"], state["judged"], state["fold_rows"] / len(retrieval.rows))
    ranked = rank_pairs(best["recalls"], expectation)
    for row in ranked if expectation else []:
        row["expected_recall10"] = expectation[f"{row['image']}:{row['text']}"]
    paths = write_results(flags.out, data, ranked, connector_of, flags.batch_size, state)
    made = f"{flags.generator} {flags.connector}, epoch {best['epoch']} of {flags.epochs}"
    print_results(ranked, best["recalls"], retrieval, made, state, paths[0])


if __name__ == "__main__":
    run_script(main)
