"""The layers of a step's connectors in another dtype."""

import itertools

import torch

from kernels import Layer


def cast_layers(layers, dtype):
    """The layers with their weights and biases in this dtype."""
    tensors = [tensor for layer in layers for tensor in (*layer.weights, *layer.biases)]
    if tensors[0].dtype == dtype:
        return layers
    left = iter(CastTogether.apply(dtype, *tensors))
    cast = []
    for layer in layers:
        weights = list(itertools.islice(left, len(layer.weights)))
        biases = list(itertools.islice(left, len(layer.biases)))
        cast.append(Layer(weights, biases, layer.wiring))
    return cast


class CastTogether(torch.autograd.Function):
    """Tensors of one dtype in another, by one launch on a GPU; then their gradients likewise."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)  # a weight that was not used has no gradient, and AdamW skips it
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(cast, tensors)
        is_frozen = [not needed for needed in ctx.needs_input_grad[1:]]
        ctx.mark_non_differentiable(*itertools.compress(cast, is_frozen))
        return tuple(cast)

    @staticmethod
    def backward(ctx, *grads):
        given = [grad for grad in grads if grad is not None]
        cast = [torch.empty_like(grad, dtype=ctx.dtype) for grad in given]
        torch._foreach_copy_(cast, given)
        left = iter(cast)
        return None, *(None if grad is None else next(left) for grad in grads)
