"""A connector of its own for each pair: what grid search trains. Nothing is shared and nothing is predicted."""

import torch
import torch.nn as nn

from hyma import ranks
from hyma.costs import connector_flops, connector_shapes
from hyma.pair_names import pair_name
from hyma.seeds import seeded_generator
from hyma.starting_run import read_starting_connector
from hyma.training import load_moments, losses_on_ranks, moments_of, separate_layers, update_weights


class FreeConnectors(nn.Module):
    """The connectors of pairs (the protocol of `hyma.training.Generator`), started from random weights, which depend on the
    seed and the pair's name alone, or from those of the run folder `source`. dims: {encoder: width}."""

    def __init__(self, pairs, dims, hidden_layers, seed, source=None):
        super().__init__()
        self.pairs = list(pairs)
        self.dims, self.hidden_layers = dims, hidden_layers
        self.layers = nn.ModuleList()  # of each pair
        for image, text in pairs:
            connector = nn.ModuleList()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeded_generator("weights", seed, image, text).initial_seed())
                for out, into in self.shapes(image, text):
                    connector.append(nn.Linear(into, out))
            if source:
                tensors = read_starting_connector(source, image, text, hidden_layers)
                for parameter, tensor in zip(connector.parameters(), tensors):
                    parameter.data.copy_(tensor)
            self.layers.append(connector)

    def shapes(self, image, text):
        """[(out, in)] of a pair's layers; the pair may be another rank's."""
        return connector_shapes(self.dims[text], self.hidden_layers, self.dims[image])

    @torch.no_grad()
    def load(self, pair, layers):
        """Sets a pair's layers: (weight [out, in], bias [out]) of each."""
        for linear, (weight, bias) in zip(self.layers[self.pairs.index(pair)], layers):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)

    def predict(self, image, text):
        """The pair's own layers: (weight [out, in], bias [out]) of each."""
        layers = []
        for linear in self.layers[self.pairs.index((image, text))]:
            layers.append((linear.weight, linear.bias))
        return layers

    def forward(self, features, pairs):
        """The texts [B, D_t] as they are, and each pair's own layers."""
        connectors = []
        for pair in pairs:
            connectors.append(self.predict(*pair))
        return separate_layers(features, pairs, connectors)

    def flops(self, batch_size, pairs):
        """(of the connectors, 0: nothing is predicted)."""
        total = 0
        for pair in pairs:
            total += connector_flops(batch_size, self.shapes(*pair))
        return total, 0

    def clip_each(self, pairs, clip_norm):
        """Bounds the gradient norm of each pair by itself, so that no pair depends on the others."""
        for pair in pairs:
            connector = self.layers[self.pairs.index(pair)]
            nn.utils.clip_grad_norm_(connector.parameters(), clip_norm)

    def tensors(self, optimizer):
        """{pair's name: all that its training has changed, its weights and AdamW's moments}, as a checkpoint has it."""
        states = moments_of(optimizer)["state"]  # of each parameter, by its number; none before its first update
        found, number = {}, 0
        for pair, connector in zip(self.pairs, self.layers):
            weights = [parameter.detach() for parameter in connector.parameters()]
            moments = [states.get(number + k) for k in range(len(weights))]
            found[pair_name(pair)] = {"weights": weights, "moments": moments}
            number += len(weights)
        return found

    @torch.no_grad()
    def load_tensors(self, optimizer, found):
        """Sets all pairs and the optimizer to what `tensors` gave, for these pairs or for more."""
        states, number = {}, 0
        for pair, connector in zip(self.pairs, self.layers):
            of_pair = found[pair_name(pair)]
            for parameter, weight, moments in zip(connector.parameters(), of_pair["weights"], of_pair["moments"]):
                parameter.copy_(weight)
                if moments:
                    states[number] = moments
                number += 1
        load_moments(optimizer, {"state": states})


def train_step(connectors, optimizer, store, dtype, flags, pairs, rows, numbers):
    """One step of these pairs on a batch of rows [B], each with its own loss and its own gradient norm. Returns their losses [P].
    A CUDA graph can record it (`hyma.graphs`). numbers [5]: of the step (`Schedule`)."""
    mine = [pair for pair in pairs if pair in connectors.pairs]
    losses = losses_on_ranks(connectors, store, rows, pairs, mine, dtype, flags)
    if mine:
        losses.sum().backward()  # the sum, so that each pair has its own gradient
    if flags.split == "rows":
        ranks.sum_gradients(list(connectors.parameters()))
    connectors.clip_each(mine, flags.clip_norm)
    update_weights(optimizer, numbers)  # a pair that is not in the step has no gradient, and AdamW skips it
    return losses.detach()
