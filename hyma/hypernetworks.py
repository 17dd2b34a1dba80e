"""The two hypernetworks: what predicts the connector of every pair.

`FactoredHyperNetwork` builds a pair's connector from parts that all pairs of an encoder share; `HyperNetwork` is the
paper's. Both keep the protocol of `hyma.training.Generator`. `build_hypernetwork` is the one place that knows them by
the name of their flag.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from hyma.closed_form import SHARED_RIDGE, Covariance, image_map
from hyma.costs import connector_flops
from hyma.embeddings import unique
from hyma.training import separate_layers
from kernels import Layer
from vlm import HIDDEN_DIM

TEXT_SCALE = 5.0  # on centred texts, whose coordinates are small: a first layer before a ReLU learns faster
CODE_DIM = 32  # of the paper's pair and layer codes


def build_hypernetwork(flags, image_dims, text_dims):
    """The hypernetwork of --generator. image_dims, text_dims: {encoder: width}."""
    hidden_layers = int(flags.connector[-1])
    if flags.generator == "factored":
        return FactoredHyperNetwork(image_dims, text_dims, hidden_layers, flags.rank)
    return HyperNetwork(image_dims, text_dims, hidden_layers, flags.width)


def fixed(tensor):
    """Saved and loaded with the model, never trained."""
    return nn.Parameter(tensor, requires_grad=False)


# ---------------------------------------------------------------------------------------------------- shared parts


class FactoredHyperNetwork(nn.Module):
    """A pair's connector from the parts of its two encoders: all but the last layer belong to the text encoder and
    lead into a hidden space that every pair shares, the last layer belongs to the image encoder.

    A part learns from every pair of its encoder, so each pair needs only its share of the steps, and a pair that was
    never drawn has a connector too. Without a hidden layer the two parts are multiplied into one linear map.

    The last layer ends in `rank` axes of the image encoder (orthonormal columns [D, k]), along which its pictures can be
    told from texts: y in them stands for axes @ y, whose cosine with a picture x is that of y with axes.T @ x, so nothing
    wider is computed. Texts are centred. Both are undone in `predict`, which gives an ordinary connector.
    """

    starts_from_closed_form = True

    def __init__(self, image_dims, text_dims, hidden_layers, rank):
        super().__init__()
        self.images, self.texts = list(image_dims), list(text_dims)
        self.hidden_layers = hidden_layers
        if hidden_layers:
            self.scale, wide = TEXT_SCALE, HIDDEN_DIM
            self.shared_width = wide // 2  # m: a ReLU takes two units to pass a number
        else:
            self.scale, wide = 1.0, HIDDEN_DIM // 4  # a linear map's shared space: no wider than its rank
            self.shared_width = wide
        self.text_parts = nn.ModuleList()
        for dim in text_dims.values():
            widths = [dim] + [wide] * max(1, hidden_layers)
            self.text_parts.append(nn.ModuleList(nn.Linear(*shape) for shape in zip(widths, widths[1:])))
        self.image_parts = nn.ModuleList(nn.Linear(wide, min(rank, dim)) for dim in image_dims.values())
        self.axes = nn.ParameterList(fixed(torch.eye(dim, min(rank, dim))) for dim in image_dims.values())
        self.means = nn.ParameterList(fixed(torch.zeros(dim)) for dim in text_dims.values())

    # ------------------------------------------------------------------------------ where training starts

    @torch.no_grad()
    def initialise_from_closed_form(self, axes):
        """Starts the parts from the maps of a SharedAxes with the coordinates s.

        A text part leads to s by ridge regression, an image part from s to the pictures by a whitened map, and a ReLU
        between is passed as relu(s) - relu(-s) = s.
        """
        for place, text in enumerate(self.texts):
            self.load_text_map(place, axes.covariances[text], self.both_signs(axes.product(text)))
            for layer in self.text_parts[place][1:]:
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
        for place, image in enumerate(self.images):
            self.load_image_map(place, axes.covariances[image], axes.shared, axes.product(image))

    @torch.no_grad()
    def initialise_added_encoder(self, name, axes):
        """Starts the part of an encoder that is added to trained ones in the same way, with their hidden space for s."""
        trained = [place for place, text in enumerate(self.texts) if text != name]
        texts = [self.scale * axes.covariances[self.texts[place]].rows for place in trained]  # each [n, D_t]
        added = axes.covariances[name]
        if name in self.texts:
            place = self.texts.index(name)
            outputs = sum(self.text_parts[k][0](x) for k, x in zip(trained, texts)) / len(trained)  # [n, out]
            mean = outputs.mean(0)
            self.load_text_map(place, added, added.rows.T @ (outputs - mean), mean)
            for layer, other in zip(self.text_parts[place][1:], self.text_parts[trained[0]][1:]):
                layer.load_state_dict(other.state_dict())
        else:
            hidden = sum(self.hidden(x, k) for k, x in zip(trained, texts)) / len(trained)  # [n, m]
            shared = Covariance(hidden, SHARED_RIDGE)
            self.load_image_map(self.images.index(name), added, shared, added.rows.T @ shared.rows)

    def load_text_map(self, place, texts, product, bias=0.0):
        """A text to its first layer's outputs, by ridge regression on their product with it [D_t, out], centred."""
        first = self.text_parts[place][0]
        first.weight.copy_(texts.solve(product).T / self.scale)
        first.bias.copy_(torch.as_tensor(bias))
        self.means[place].copy_(texts.mean)

    def load_image_map(self, place, pictures, shared, product):
        """s to an image encoder's pictures, by the whitened map of their product with it [D, m]."""
        found = image_map(product, shared, pictures, rank=self.axes[place].shape[1])
        self.axes[place].copy_(found.axes)
        self.image_parts[place].weight.copy_(self.both_signs(found.weight))
        self.image_parts[place].bias.copy_(found.bias)

    def both_signs(self, weight):
        """[D, m] to [D, 2 m], what goes with relu(s) and relu(-s); without a ReLU as it is."""
        return torch.cat([weight, -weight], dim=1) if self.hidden_layers else weight

    def hidden(self, x, place):
        """Centred texts [n, D_t] to s [n, m]: what the last layer takes, or relu(s) less relu(-s) of that."""
        for layer in self.text_parts[place]:
            x = F.relu(layer(x)) if self.hidden_layers else layer(x)
        if self.hidden_layers:
            positive, negative = x.chunk(2, dim=1)
            x = positive - negative
        return x

    # ------------------------------------------------------------------------------------------- training

    def forward(self, features, pairs):
        """features: {text: [B, D_t]}. Returns what `connector_mlp` takes: inputs, and the layers of these pairs, which
        end in their image encoders' axes."""
        texts = unique(text for _, text in pairs)
        images = unique(image for image, _ in pairs)
        places = [self.texts.index(text) for text in texts]
        inputs = [self.centred(features[text], place) for text, place in zip(texts, places)]  # each [B, D_t]
        parts = [self.text_parts[place] for place in places]
        layers = []
        if self.hidden_layers == 0:
            firsts = [part[0] for part in parts]
            inputs = [F.linear(x, f.weight.to(x), f.bias.to(x)) for x, f in zip(inputs, firsts)]  # each [B, m]
        for depth in range(self.hidden_layers):
            of_texts = [part[depth] for part in parts]
            layers.append(layer_of(of_texts, wiring=[(k, k) for k in range(len(texts))]))
        heads = [self.image_parts[self.images.index(image)] for image in images]
        layers.append(layer_of(heads, wiring=[(texts.index(text), images.index(image)) for image, text in pairs]))
        return inputs, layers

    def centred(self, x, place):
        return (x - self.means[place].to(x)) * self.scale

    def flops(self, batch_size, pairs):
        """Of one step without its logits: (what goes with the samples, what goes with the steps: nothing).

        A layer [out, in] costs 2 B out in forward, as much for its weight's gradient where it is trained, and as much for
        its input's where anything before it is trained. A text's layers are computed once for all its pairs.
        """
        per_sample = 0
        for text in unique(text for _, text in pairs):
            part = self.text_parts[self.texts.index(text)]
            for depth, layer in enumerate(part):
                trained = layer.weight.requires_grad
                products = 1 + trained + (trained and depth > 0)
                per_sample += 2 * products * layer.weight.numel()
        for image, text in pairs:
            head = self.image_parts[self.images.index(image)]
            text_trained = self.text_parts[self.texts.index(text)][0].weight.requires_grad
            products = 1 + head.weight.requires_grad + text_trained
            per_sample += 2 * products * head.weight.numel()
        return batch_size * per_sample, 0

    def targets(self, store, images, rows):
        """What the layers of `forward` are compared with: the pictures along this generator's axes."""
        axes = {image: self.axes[self.images.index(image)] for image in images}
        return AxesStore(store, axes, rows)

    @torch.no_grad()
    def predict(self, image, text):
        """The pair's connector: [(weight [out, in], bias [out])] per layer."""
        text_place, image_place = self.texts.index(text), self.images.index(image)
        linears = [*self.text_parts[text_place], self.image_parts[image_place]]
        layers = [(linear.weight, linear.bias) for linear in linears]

        weight, bias = layers[0]  # takes texts as they are, not centred and scaled
        layers[0] = self.scale * weight, bias - self.scale * (weight @ self.means[text_place])
        weight, bias = layers[-1]  # ends in the image encoder's space, not in its axes
        layers[-1] = self.axes[image_place] @ weight, self.axes[image_place] @ bias
        if self.hidden_layers == 0:
            (first, first_bias), (last, last_bias) = layers
            return [(last @ first, last @ first_bias + last_bias)]
        return layers


def layer_of(linears, wiring):
    """A kernels' Layer of several nn.Linear."""
    return Layer([linear.weight for linear in linears], [linear.bias for linear in linears], wiring)


class AxesStore:
    """A RowStore whose pictures are coordinates [rows, k] along axes, made once, of the rows that a run uses."""

    def __init__(self, store, axes, rows):
        """axes: {image encoder: [D, k]}. rows: numbers of the rows that are used."""
        self.store, self.device = store, store.device
        self.dims = dict(store.dims)
        self.pictures = {}
        for image, columns in axes.items():
            self.dims[image] = columns.shape[1]
            coordinates = torch.zeros(len(store.tensors[image]), columns.shape[1], device=store.device)
            for part in rows.split(65536):
                coordinates[part.to(store.device)] = store.take(image, part) @ columns
            self.pictures[image] = coordinates

    def take(self, name, rows):
        """[len(rows), k or D_t], float32, on the device; a picture's length is at most 1."""
        if name in self.pictures:
            return self.pictures[name][rows.to(self.device)]
        return self.store.take(name, rows)


# ------------------------------------------------------------------------------------------------- the paper's


class HyperNetwork(nn.Module):
    """The paper's hypernetwork: a pair code and a layer code in, that layer's weights and bias out, each cut from one
    output as long as the largest layer.

    The pair code joins a code of the image encoder and one of the text encoder, so that any pair has one. The output is
    scaled by 1 / sqrt(3 in), which gives every predicted layer the spread torch gives a fresh nn.Linear.
    """

    starts_from_closed_form = False

    def __init__(self, image_dims, text_dims, hidden_layers, width):
        super().__init__()
        self.image_dims, self.text_dims = image_dims, text_dims
        self.hidden_layers = hidden_layers
        self.image_codes = nn.Embedding(len(image_dims), CODE_DIM)
        self.text_codes = nn.Embedding(len(text_dims), CODE_DIM)
        self.layer_codes = nn.Embedding(hidden_layers + 1, CODE_DIM)
        self.trunk = nn.Sequential(
            nn.Linear(3 * CODE_DIM, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()
        )
        shapes = [shape for image in image_dims for text in text_dims for shape in self.shapes(image, text)]
        self.size = max(out * (into + 1) for out, into in shapes)
        # [size, width + 1], the last column being the bias: no Parameter, because its gradient, an outer product of a
        # few rows, is never formed (adamw_outer)
        self.register_buffer("head", torch.randn(self.size, width + 1) / width**0.5)
        self.head[:, -1] = 0
        self.outer = None  # (grad of the output [rows, size], input [rows, width + 1]) of the last backward pass

    def shapes(self, image, text):
        """[(out, in)] of the pair's layers."""
        dims = [self.text_dims[text]] + [HIDDEN_DIM] * self.hidden_layers + [self.image_dims[image]]
        return list(zip(dims[1:], dims))

    def weights(self, pairs):
        """[[(weight, bias)] per layer] per pair."""
        images, texts = list(self.image_dims), list(self.text_dims)
        device, depth = self.head.device, self.hidden_layers + 1
        image_numbers = torch.tensor([images.index(image) for image, _ in pairs], device=device)
        text_numbers = torch.tensor([texts.index(text) for _, text in pairs], device=device)
        pair_codes = torch.cat([self.image_codes(image_numbers), self.text_codes(text_numbers)], dim=1)  # [P, 2 code]
        pair_codes = pair_codes.repeat_interleave(depth, dim=0)  # [P * depth, 2 code]
        layer_codes = self.layer_codes.weight.repeat(len(pairs), 1)  # [P * depth, code]
        hidden = self.trunk(torch.cat([pair_codes, layer_codes], dim=1))  # [P * depth, width]
        raw = OuterLinear.apply(F.pad(hidden, (0, 1), value=1.0), self.head, self)  # [P * depth, size]
        predicted = []
        for pair, rows in zip(pairs, raw.split(depth)):
            shapes = self.shapes(*pair)
            predicted.append([cut_layer(row, out, into) for row, (out, into) in zip(rows.unbind(0), shapes)])
        return predicted

    def forward(self, features, pairs):
        """features: {text: [B, D_t]}. Returns what `connector_mlp` takes: inputs, and the layers of these pairs."""
        return separate_layers(features, pairs, self.weights(pairs))

    def flops(self, batch_size, pairs):
        """Of one step without its logits: (of the connectors, which goes with the samples; of predicting them, 6 for each
        weight of trunk and head and predicted layer, which goes with the steps)."""
        connectors = sum(connector_flops(batch_size, self.shapes(*pair)) for pair in pairs)
        weights = self.head.numel() + sum(
            linear.weight.numel() for linear in self.trunk if isinstance(linear, nn.Linear)
        )
        return connectors, 6 * len(pairs) * (self.hidden_layers + 1) * weights

    def targets(self, store, images, rows):
        """What the layers of `forward` are compared with: the pictures as they are."""
        return store

    @torch.no_grad()
    def predict(self, image, text):
        """The pair's connector: [(weight [out, in], bias [out])] per layer."""
        return self.weights([(image, text)])[0]


def cut_layer(row, out, into):
    """(weight [out, into], bias [out]) from the front of an output [size]."""
    cut = row[: out * (into + 1)] * (3 * into) ** -0.5
    return cut[: out * into].view(out, into), cut[out * into :]


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
