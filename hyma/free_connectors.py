"""A connector of its own for each pair: what grid search trains. Nothing is shared and nothing is predicted."""

import torch
import torch.nn as nn

from hyma.costs import connector_flops, connector_shapes
from hyma.seeds import seeded_generator
from hyma.starting_run import read_starting_connector
from hyma.training import separate_layers


class FreeConnectors(nn.Module):
    """The connectors of pairs (the protocol of `hyma.training.Generator`), started from random weights, which depend on the
    seed and the pair's name alone, or from those of the run folder `source`. dims: {encoder: width}."""

    def __init__(self, pairs, dims, hidden_layers, seed, source=None):
        super().__init__()
        self.pairs = list(pairs)
        self.layers = nn.ModuleList()  # of each pair
        for image, text in pairs:
            connector = nn.ModuleList()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeded_generator("weights", seed, image, text).initial_seed())
                for out, into in connector_shapes(dims[text], hidden_layers, dims[image]):
                    connector.append(nn.Linear(into, out))
            if source:
                tensors = read_starting_connector(source, image, text, hidden_layers)
                for parameter, tensor in zip(connector.parameters(), tensors):
                    parameter.data.copy_(tensor)
            self.layers.append(connector)

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
            shapes = [weight.shape for weight, _ in self.predict(*pair)]
            total += connector_flops(batch_size, shapes)
        return total, 0

    def clip_each(self, pairs, clip_norm):
        """Bounds the gradient norm of each pair by itself, so that no pair depends on the others."""
        for pair in pairs:
            connector = self.layers[self.pairs.index(pair)]
            nn.utils.clip_grad_norm_(connector.parameters(), clip_norm)
