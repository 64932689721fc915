"""Data, parameters, losses and options that cannot work are named."""

import pytest
import torch
from torch import nn

from hvpopt.operators import FisherOperator, HessianOperator

X = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, r"data is a Tensor; expected an iterable of batches: .* data=\[batch\]"),
        ({"x": X}, r"data is a dict"),
        ((X, X), r"tuple of tensors, which may be one batch"),
        (3, r"data is a int; expected an iterable"),
        (iter([X]), r"can be read only once, .* give list\(data\)"),
        ((x for x in [X]), r"data is a generator, which can be read only once"),
    ],
)
def test_data_that_are_no_batches_are_refused(data, message):
    net = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=message):
        HessianOperator(lambda x: net(x).mean(), net.parameters(), data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": []}, ValueError, "params hold no tensor"),
        ({"params": X}, TypeError, "params is one tensor"),
        ({"params": [X]}, ValueError, r"params\[0\], of shape \(2, 2\), is no leaf"),
        ({"params": [3]}, TypeError, r"params\[0\] is a int"),
        ({"engine": "magic"}, ValueError, "engine='magic' is unknown"),
        ({"num_terms": "mean"}, TypeError, "num_terms='mean'; expected a function"),
        ({"micro_batch_size": 0}, ValueError, "micro_batch_size needs to be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named_at_once(change, error, message):
    net = nn.Linear(2, 1)
    options = {"params": net.parameters(), "data": [X], **change}
    with pytest.raises(error, match=message):
        HessianOperator(lambda x: net(x).mean(), **options)


def test_a_parameter_is_taken_once_and_kinds_are_known():
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="a parameter twice"):
        HessianOperator(lambda x: net(x).mean(), [net.weight, net.weight], [X])
    with pytest.raises(ValueError, match="kind='true' is unknown: choose one of 'exact'"):
        FisherOperator(lambda x: net(x).mean(), net.parameters(), [X], kind="true")


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda z: z, TypeError, r"returned a tensor of shape \(2, 1\) and dtype torch.float32"),
        (lambda z: 3, TypeError, "returned a int; expected a real scalar"),
        (lambda z: z.mean().detach(), ValueError, "requires no gradient"),
    ],
)
def test_a_loss_that_is_no_scalar_is_named(loss, error, message):
    net = nn.Linear(2, 1)
    with pytest.raises(error, match=message):
        HessianOperator(lambda x: loss(net(x)), net.parameters(), [X]).loss()


def test_data_without_a_batch_and_wrong_numbers_of_terms_are_named():
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="holds no batch; expected at least one"):
        HessianOperator(lambda x: net(x).mean(), net.parameters(), []).loss()
    op = HessianOperator(lambda x: net(x).mean(), net.parameters(), [X, X], num_terms=lambda x: -1)
    with pytest.raises(ValueError, match=r"num_terms returned -1\.0; expected how many terms"):
        op.loss()
