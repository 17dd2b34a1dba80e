"""Connectors of few inputs, as torch's own matrix products: one for each input of each layer.

The layers of the factored hypernetwork belong to encoders, so a layer has no more inputs than there are text encoders,
and the same holds of a single pair. The weights of all outputs of one input then stand one below the other as one dense
weight, and one product of torch's takes the input through all of them. No kernel for ragged products is as fast as that.
Where each pair has layers of its own, kernels/connector.py takes all pairs in one launch.
"""

import torch
import torch.nn.functional as F


def is_dense(features, layers):
    """Whether no layer takes more inputs than there are features, so that there are few products and none is small."""
    for layer in layers:
        inputs = {a for a, _ in layer.wiring}
        if len(inputs) > len(features):
            return False
    return True


def connector_mlp(features, layers):
    """As `kernels.connector_mlp`. Autograd makes the backward pass."""
    outputs = features
    for depth, layer in enumerate(layers):
        products = layer_products(outputs, layer, relu=depth < len(layers) - 1)
        outputs = outputs_of(products, len(layer.wiring))  # [B, N] each
    z = products[0][1] if len(products) == 1 else torch.cat(outputs, dim=1)  # [B, sum D_p]
    return z, None


def layer_products(inputs, layer, relu):
    """For each input that is used: (its outputs, those side by side [B, sum N], the width of each)."""
    products = []
    for source, x in enumerate(inputs):
        outputs = []
        weights = []
        biases = []
        for output, (a, k) in enumerate(layer.wiring):
            if a == source:
                outputs.append(output)
                weights.append(layer.weights[k])
                biases.append(layer.biases[k])
        if outputs:
            y = F.linear(x, one_below_the_other(weights), one_below_the_other(biases))
            products.append((outputs, F.relu(y) if relu else y, [len(bias) for bias in biases]))
    return products


def one_below_the_other(tensors):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def outputs_of(products, count):
    """[B, N] of each output, in the order of the wiring."""
    found = [None] * count
    for outputs, y, widths in products:
        for output, part in zip(outputs, y.split(widths, dim=1)):
            found[output] = part
    return found
