"""The two hypernetworks: what predicts the connector of every pair.

`FactoredHypernetwork` builds a pair's connector from parts that all pairs of an encoder share; `MlpHypernetwork` is the
paper's. `Hypernetwork` is the protocol that both follow: everything that train_hyma.py uses of them. To add one, write
its class and its entry in `HYPERNETWORKS`, at the end, the one place that knows them by the name of their flag.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hyma.closed_form import HELD_OUT_ROWS, TEXT_NOISE_ROWS, CentredRows, SharedSpace, image_map
from hyma.costs import connector_flops, connector_shapes, linear_flops
from hyma.pairs import images_of, texts_of
from hyma.projected_store import ProjectedStore
from hyma.training import Generator, separate_layers
from hyma.training_flags import hidden_layers_of
from kernels import Layer, padded_rows
from vlm import HIDDEN_DIM

TEXT_SCALE = 5.0  # on centred texts, whose coordinates are small: a first layer before a ReLU learns faster
CODE_DIM = 32  # of the paper's pair and layer codes


class Hypernetwork(Generator, Protocol):
    """A Generator whose connectors are predicted by one network. It is an nn.Module, and its best weights are a state_dict."""

    starts_from_closed_form: bool  # if so, the five members below are used, else they may be missing
    text_names: list[str]
    shared_width: int  # m, how many coordinates s the closed form's shared space has
    held_out_rows: int  # that the closed form is cross-validated on

    def initialise_from_closed_form(self, space: SharedSpace):
        """Sets all parts to a closed form through the shared space."""

    def initialise_added_encoder(self, name: str, space: SharedSpace):
        """Sets the part of an encoder that is added to trained ones."""

    def project_images(self, store, image_names, rows, dtype):
        """The store that losses and validation take image vectors from, in the space that `forward`'s layers end in: `store`
        itself, or one of `rows` alone with k coordinates for each image encoder's D. dtype: of the training steps."""

    def predict_projected(self, image: str, text: str) -> list[tuple[Tensor, Tensor]]:
        """The pair's connector as `predict` gives it, but ending in what `project_images` has of the image encoder."""

    def lift(self, image: str, layers) -> list[tuple[Tensor, Tensor]]:
        """Layers that end there, to ones that end in the image encoder's own space."""

    def outer_moments(self) -> list[Tensor]:
        """AdamW's two moments of a weight `head` whose gradient is never formed, zeros at first: [first, second]. [] where
        there is no such weight. Where there is, `head` holds it and, after each backward pass, `outer` the two factors
        (grad of the output, input) of its gradient, for `kernels.adamw_outer`."""


def fixed(tensor):
    """Saved and loaded with the model, never trained."""
    return nn.Parameter(tensor, requires_grad=False)


# ---------------------------------------------------------------------------------------------------- shared parts


class FactoredHypernetwork(nn.Module):
    """A pair's connector from the parts of its two encoders: all but the last layer belong to the text encoder and
    lead into a hidden space that every pair shares, the last layer belongs to the image encoder.

    Each part is trained by every pair of its encoder, so a pair needs only a share of the steps, and a pair that was never
    trained has a connector too. Without a hidden layer the two parts are multiplied into one linear map.

    The last layer ends in `rank` axes of the image encoder (orthonormal columns [D, k]), in which the
    connectors' outputs lie: its output y means the vector axes @ y, whose cosine with an image vector x is that of y with
    axes.T @ x, so nothing wider than k is computed. Texts are centred. Both are undone in `predict`, which gives an ordinary
    connector.
    """

    starts_from_closed_form = True

    def __init__(self, image_dims, text_dims, hidden_layers, rank):
        super().__init__()
        self.image_names, self.text_names = list(image_dims), list(text_dims)
        self.hidden_layers = hidden_layers
        if hidden_layers:
            self.scale, wide = TEXT_SCALE, HIDDEN_DIM
            self.shared_width = wide // 2  # m: a ReLU takes two units to pass a number
            self.held_out_rows = HELD_OUT_ROWS
        else:
            self.scale, wide = 1.0, HIDDEN_DIM // 2
            self.shared_width = wide
            self.held_out_rows = HELD_OUT_ROWS // 2  # as all else of a linear connector, it may cost half
        self.text_parts = nn.ModuleList()  # of each text encoder, its layers
        self.means = nn.ParameterList()  # of its texts, [D_t]
        for dim in text_dims.values():
            layers = nn.ModuleList([nn.Linear(dim, wide)])
            for _ in range(hidden_layers - 1):
                layers.append(nn.Linear(wide, wide))
            self.text_parts.append(layers)
            self.means.append(fixed(torch.zeros(dim)))
        self.image_parts = nn.ModuleList()  # of each image encoder, the last layer
        self.axes = nn.ParameterList()  # of its space, orthonormal columns [D, k]
        for dim in image_dims.values():
            k = min(rank, dim)
            self.image_parts.append(nn.Linear(wide, k))
            self.axes.append(fixed(torch.eye(dim, k)))

    def text_part(self, text):
        """The layers of a text encoder."""
        return self.text_parts[self.text_names.index(text)]

    def image_part(self, image):
        """The last layer of an image encoder."""
        return self.image_parts[self.image_names.index(image)]

    def axes_of(self, image):
        """The axes [D, k] of an image encoder."""
        return self.axes[self.image_names.index(image)]

    def mean_of(self, text):
        """The mean [D_t] of a text encoder's texts."""
        return self.means[self.text_names.index(text)]

    # ------------------------------------------------------------------------------ where training starts

    @torch.no_grad()
    def initialise_from_closed_form(self, space):
        """Starts the parts from the maps of a SharedSpace with the coordinates s.

        A text part maps to s by ridge regression, an image part maps s to image vectors by a whitened map, and s passes a
        ReLU between them as relu(s) - relu(-s) = s.
        """
        for text in self.text_names:
            self.load_text_map(text, space.encoders[text], self.both_signs(space.cross(text)))
            for layer in self.text_part(text)[1:]:
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
        for image in self.image_names:
            self.load_image_map(image, space.encoders[image], space.shared, space.cross(image))

    @torch.no_grad()
    def initialise_added_encoder(self, name, space):
        """Starts the part of an encoder that is added to trained ones in the same way, with s taken from their hidden space: the
        mean over the trained text encoders of what their layers give for the same rows."""
        trained = [text for text in self.text_names if text != name]
        added = space.encoders[name]
        total = 0
        if name in self.text_names:
            for text in trained:
                total = total + self.text_part(text)[0](self.scale * space.encoders[text].rows)
            outputs = total / len(trained)  # [n, out] of a first layer
            mean = outputs.mean(0)
            self.load_text_map(name, added, added.rows.T @ (outputs - mean), mean)
            for layer, trained_layer in zip(self.text_part(name)[1:], self.text_part(trained[0])[1:]):
                layer.load_state_dict(trained_layer.state_dict())
        else:
            for text in trained:
                total = total + self.hidden(self.scale * space.encoders[text].rows, text)
            shared = CentredRows(total / len(trained), TEXT_NOISE_ROWS)  # of s [n, m]
            self.load_image_map(name, added, shared, added.rows.T @ shared.rows)

    def load_text_map(self, text, rows, cross, bias=0.0):
        """Sets a text encoder's first layer by ridge regression. rows: the CentredRows of its texts. cross: texts.T @ outputs
        [D_t, out], both centred. bias: the outputs' mean [out]."""
        first = self.text_part(text)[0]
        first.weight.copy_(rows.solve(cross).T / self.scale)
        first.bias.copy_(torch.as_tensor(bias))
        self.mean_of(text).copy_(rows.mean)

    def load_image_map(self, image, pictures, shared, cross):
        """Sets an image encoder's axes and last layer by the whitened map from s. pictures, shared: the CentredRows of its
        vectors and of s. cross: pictures.T @ s [D, m]."""
        axes, last = self.axes_of(image), self.image_part(image)
        found = image_map(cross, shared, pictures, rank=axes.shape[1])
        axes.copy_(found.axes)
        last.weight.copy_(self.both_signs(found.weight))
        last.bias.copy_(found.bias)

    def both_signs(self, weight):
        """[D, m] to [D, 2 m], the weights of relu(s) and of relu(-s); without a ReLU as it is."""
        return torch.cat([weight, -weight], dim=1) if self.hidden_layers else weight

    def hidden(self, x, text):
        """Centred and scaled texts [n, D_t] to s [n, m]: what the last layer takes, or relu(s) minus relu(-s) of that."""
        for layer in self.text_part(text):
            x = F.relu(layer(x)) if self.hidden_layers else layer(x)
        if self.hidden_layers:
            positive, negative = x.chunk(2, dim=1)
            x = positive - negative
        return x

    # ------------------------------------------------------------------------------------------- training

    def forward(self, features, pairs):
        """Centred texts (of a linear connector, the shared coordinates of these, [B, m]), and the layers of these pairs, which
        end in coordinates along their image encoders' axes, [B, k]."""
        text_names, image_names = texts_of(pairs), images_of(pairs)
        inputs = []
        for text in text_names:
            x = self.centred(features[text], text)  # [B, D_t]
            if self.hidden_layers == 0:
                first = self.text_part(text)[0]
                x = F.linear(x, first.weight.to(x), first.bias.to(x))  # [B, m]
            inputs.append(x)

        layers = []
        wiring = [(k, k) for k in range(len(text_names))]  # a text encoder's layers take its own texts
        for depth in range(self.hidden_layers):
            layers.append(layer_of([self.text_part(text)[depth] for text in text_names], wiring))
        wiring = []
        for image, text in pairs:
            wiring.append((text_names.index(text), image_names.index(image)))
        layers.append(layer_of([self.image_part(image) for image in image_names], wiring))
        return inputs, layers

    def centred(self, x, text):
        """Texts [B, D_t] minus their encoder's mean, scaled."""
        return (x - self.mean_of(text).to(x)) * self.scale

    def flops(self, batch_size, pairs):
        """(of the connectors, 0: nothing is predicted apart from them). A text encoder's layers are computed once for all of its
        pairs."""
        total = 0
        for text in texts_of(pairs):
            for depth, layer in enumerate(self.text_part(text)):
                trained = layer.weight.requires_grad
                total += linear_flops(batch_size, layer.weight.shape, trained, trained and depth > 0)
        for image, text in pairs:
            last, first = self.image_part(image).weight, self.text_part(text)[0].weight
            total += linear_flops(batch_size, last.shape, last.requires_grad, first.requires_grad)
        return total, 0

    def project_images(self, store, image_names, rows, dtype):
        """The store with image vectors as coordinates along this generator's axes, [rows, k] instead of [rows, D]."""
        return ProjectedStore(store, {image: self.axes_of(image) for image in image_names}, rows, dtype)

    def outer_moments(self):
        """There are none, as autograd forms every gradient."""
        return []

    def predict(self, image, text):
        """The layers of both parts, taking texts as they are and ending in the image encoder's own space."""
        return self.lift(image, self.predict_projected(image, text))

    @torch.no_grad()
    def predict_projected(self, image, text):
        """The same, ending in coordinates along the image encoder's axes."""
        linears = [*self.text_part(text), self.image_part(image)]
        layers = [(linear.weight, linear.bias) for linear in linears]
        weight, bias = layers[0]  # W (scale (x - mean)) + b = (scale W) x + (b - scale W mean)
        layers[0] = self.scale * weight, bias - self.scale * (weight @ self.mean_of(text))
        if self.hidden_layers == 0:
            (first, first_bias), (last, last_bias) = layers
            return [(last @ first, last @ first_bias + last_bias)]
        return layers

    @torch.no_grad()
    def lift(self, image, layers):
        """Coordinates y [k] along the axes are the vector axes @ y [D]."""
        weight, bias = layers[-1]
        return [*layers[:-1], (self.axes_of(image) @ weight, self.axes_of(image) @ bias)]


def layer_of(linears, wiring):
    """A kernels' Layer of several nn.Linear."""
    return Layer([linear.weight for linear in linears], [linear.bias for linear in linears], wiring)


# ------------------------------------------------------------------------------------------------- the paper's


class MlpHypernetwork(nn.Module):
    """The paper's hypernetwork: its inputs are a pair code and a layer code, its output is as long as the largest layer, and
    the front of the output is that layer's weights and bias (arXiv 2507.10015, section 3).

    The pair code concatenates a code of the image encoder and one of the text encoder, so that any pair has one. The
    output is scaled by 1 / sqrt(3 in), which gives every predicted layer the variance that torch gives a new nn.Linear.
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
        self.size = 0  # of the largest layer of any pair, weights and bias
        for image in image_dims:
            for text in text_dims:
                for out, into in self.shapes(image, text):
                    self.size = max(self.size, out * (into + 1))
        # [size, width + 1], the last column being the bias: no Parameter, because its gradient, an outer product of a
        # few rows, is never formed (adamw_outer)
        self.register_buffer("head", torch.randn(self.size, width + 1) / width**0.5)
        self.head[:, -1] = 0
        self.outer = None  # (grad of the output [rows, size], input [rows, width + 1]) of the last backward pass
        self.indices = {}  # of sets of pairs, see `encoder_indices`

    def shapes(self, image, text):
        """[(out, in)] of the pair's layers."""
        return connector_shapes(self.text_dims[text], self.hidden_layers, self.image_dims[image])

    def weights(self, pairs):
        """The connectors of P pairs: of each pair, (weight [out, in], bias [out]) of each layer."""
        depth = self.hidden_layers + 1
        image_indices, text_indices = self.encoder_indices(tuple(pairs))  # [P] each
        pair_codes = torch.cat([self.image_codes(image_indices), self.text_codes(text_indices)], dim=1)  # [P, 2 code]
        pair_codes = pair_codes.repeat_interleave(depth, dim=0)  # [P * depth, 2 code]
        layer_codes = self.layer_codes.weight.repeat(len(pairs), 1)  # [P * depth, code]
        hidden = self.trunk(torch.cat([pair_codes, layer_codes], dim=1))  # [P * depth, width]
        hidden = F.pad(hidden, (0, 1), value=1.0)  # [P * depth, width + 1], for the bias of the head
        outputs = OuterLinear.apply(hidden, self.head, self)  # [P * depth, size]
        connectors = []
        for pair, rows in zip(pairs, outputs.split(depth)):
            layers = []
            for row, (out, into) in zip(rows.unbind(0), self.shapes(*pair)):
                layers.append(cut_layer(row, out, into))
            connectors.append(layers)
        return connectors

    def encoder_indices(self, pairs):
        """The places of the pairs' encoders among all of their kind, [P] of images and [P] of texts: copied to the
        device once."""
        if pairs not in self.indices:
            image_names, text_names = list(self.image_dims), list(self.text_dims)
            images = [image_names.index(image) for image, _ in pairs]
            texts = [text_names.index(text) for _, text in pairs]
            self.indices[pairs] = torch.tensor([images, texts], device=self.head.device).unbind()
        return self.indices[pairs]

    def forward(self, features, pairs):
        """The texts [B, D_t] as they are, and the predicted layers of each pair."""
        return separate_layers(features, pairs, self.weights(pairs))

    def flops(self, batch_size, pairs):
        """(of the connectors; of predicting their weights by trunk and head, which take a row for each layer of each pair)."""
        of_connectors = 0
        for pair in pairs:
            of_connectors += connector_flops(batch_size, self.shapes(*pair))
        rows = len(pairs) * (self.hidden_layers + 1)
        of_predicting = linear_flops(rows, self.head.shape)
        for layer in self.trunk:
            if isinstance(layer, nn.Linear):
                of_predicting += linear_flops(rows, layer.weight.shape)
        return of_connectors, of_predicting

    def project_images(self, store, image_names, rows, dtype):
        """The store itself: its connectors end in the image encoders' own spaces."""
        return store

    def outer_moments(self):
        """Two zero tensors like the head, which `adamw_outer` trains: on a GPU all three in padded rows, which it reads
        fastest."""
        if self.head.device.type == "cpu":
            return [torch.zeros_like(self.head), torch.zeros_like(self.head)]
        self.head = padded_rows(self.head)
        return [padded_rows(torch.zeros_like(self.head)), padded_rows(torch.zeros_like(self.head))]

    @torch.no_grad()
    def predict(self, image, text):
        """The pair's predicted layers."""
        return self.weights([(image, text)])[0]

    def predict_projected(self, image, text):
        """The same: nothing is projected."""
        return self.predict(image, text)

    def lift(self, image, layers):
        """The layers as they are."""
        return layers


def cut_layer(row, out, into):
    """(weight [out, into], bias [out]) from the front of an output [size]."""
    cut = row[: out * (into + 1)] * (3 * into) ** -0.5
    return cut[: out * into].view(out, into), cut[out * into :]


class OuterLinear(torch.autograd.Function):
    """inputs [R, K] @ weight.T [K, O]. Its backward pass stores the two factors of the weight's gradient as `owner.outer`."""

    @staticmethod
    def forward(ctx, inputs, weight, owner):
        ctx.save_for_backward(inputs, weight)
        ctx.owner = owner
        return inputs @ weight.T

    @staticmethod
    def backward(ctx, grad_out):
        inputs, weight = ctx.saved_tensors
        ctx.owner.outer = grad_out.contiguous(), inputs.detach()  # or the step's graph of gradients would outlive it
        return grad_out @ weight, None, None


# ------------------------------------------------------------------------------------------- by the name of the flag


def rate_of(row_count):
    """The peak learning rate of factored: in proportion to the square root of the training rows, at most 2e-3."""
    return 1e-3 * min(2, math.sqrt(row_count / 16384))


def rank_of(row_count):
    """How many axes of an image encoder's space factored has: an eighth of the training rows, from 256 to 384; from 16,384 rows
    on 512, all that the closed form reaches."""
    return 512 if row_count >= 16384 else min(384, max(256, row_count // 8))


def share_of_epochs(row_count, hidden_layers):
    """Of a grid search's epochs, those of factored: all from 16,384 training rows on, below that fewer, to a half. The fewer
    rows, the less training adds to the closed form. To a linear connector, which the closed form is already, it adds least:
    half of them."""
    return min(1, max(0.5, math.sqrt(row_count / 16384))) * (1 if hidden_layers else 0.5)


def share_of_images(row_count):
    """Of the image encoders, those in each step of factored: it starts from a closed form, so a third of them is enough; with
    more rows, training adds more."""
    return Fraction(1, 3) if row_count < 32768 else Fraction(1, 2)


class GeneratorKind(NamedTuple):
    """A value of --generator."""

    hypernetwork: type  # (image_dims, text_dims, hidden_layers, its size) -> Hypernetwork
    size: str  # the flag that sets its size
    defaults: dict  # of its flags: a number, or a function of how many training rows there are
    share_of_epochs: Callable  # of a grid search's epochs, by how many training rows and hidden layers there are
    share_of_images: Callable  # of the image encoders, that are in each step, by the training rows
    takes_encoders: bool  # whether --add-encoder can add to it


HYPERNETWORKS = {
    "factored": GeneratorKind(
        FactoredHypernetwork,
        "rank",
        {"lr": rate_of, "rank": rank_of},
        share_of_epochs,
        share_of_images,
        takes_encoders=True,
    ),
    "mlp": GeneratorKind(
        MlpHypernetwork,
        "width",
        {"lr": 1e-3, "width": 128},
        lambda row_count, hidden_layers: 1,
        lambda row_count: Fraction(1),
        takes_encoders=False,
    ),
}


def build_hypernetwork(flags, image_dims, text_dims) -> Hypernetwork:
    """The hypernetwork of --generator. image_dims, text_dims: {encoder: width}."""
    kind = HYPERNETWORKS[flags.generator]
    return kind.hypernetwork(image_dims, text_dims, hidden_layers_of(flags), getattr(flags, kind.size))
