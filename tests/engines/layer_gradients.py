"""Gradients of linear layers, by autograd and from what is recorded of their calls."""

import torch
import torch.nn.functional as F
from torch import nn

from hvpopt.engines.layer_calls import LayerCalls


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(*shape):
    return nn.Parameter(randn(*shape, seed=len(shape) + sum(shape)))


X = randn(5, 4)


def explained(params, run):
    """The gradients of a random linear function of run(), and Σ r cᵀ of the recorded calls.

    None for parameters without calls.
    """
    recorder = LayerCalls(params)
    with recorder:
        out = run()
    grads = torch.autograd.grad(
        (out * randn(*out.shape, seed=9)).sum(),
        [*params, *(call.output for call in recorder.calls)],
        allow_unused=True,
    )
    sums = [None] * len(params)

    def add(i, g):
        sums[i] = g if sums[i] is None else sums[i] + g

    for call, slope in zip(recorder.calls, grads[len(params) :], strict=True):
        if slope is None:
            continue
        for r, c in call.pairs(slope):
            if r.dtype == torch.long:
                r = F.one_hot(r, len(params[call.weight])).to(c.dtype)[None]
            assert len(r) == len(c) == call.groups
            assert r.shape[1] == c.shape[1]
            assert not r.requires_grad
            assert not c.requires_grad
            r, c = r.to(params[0].dtype), c.to(params[0].dtype)
            add(call.weight, (r.mT @ c).reshape(params[call.weight].shape))
            if call.bias is not None:
                add(call.bias, r.sum(1).reshape(params[call.bias].shape))
    return grads[: len(params)], sums


def assert_explained(params, run):
    grads, sums = explained(params, run)
    assert all(s is not None for s in sums)
    torch.testing.assert_close(sums, list(grads))
