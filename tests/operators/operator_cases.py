"""Operators of problems with their dense oracles, and data in ragged batches."""

import torch
import torch.nn.functional as F

from hvpopt.operators import GGNOperator, HessianOperator

OPERATORS = {"hessian": HessianOperator, "ggn": GGNOperator}


def of_problem(task, kind="hessian", **options):
    """The operator of a problem's only batch, and its dense oracle."""
    torch.manual_seed(0)  # the oracle's dropout masks
    op = OPERATORS[kind](lambda x: task.loss(task.net(x)), task.params, [task.x], **options)
    return op, task.dense_hessian() if kind == "hessian" else task.dense_ggn()


def cross_entropy_of(net):
    """The loss of a batch (inputs, classes)."""
    return lambda batch: F.cross_entropy(net(batch[0]), batch[1])


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def ten_examples():
    """Ten examples with classes, whose loss is far from constant over them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.2, 3, 10).double()[:, None], torch.arange(10) % 3


def ragged(data, sizes=(4, 1, 5)):
    """The examples in batches of these sizes."""
    return list(zip(*(t.split(sizes) for t in data), strict=True))
