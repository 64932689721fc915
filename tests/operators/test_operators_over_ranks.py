"""Operators in two processes with different numbers of batches, against one process."""

import functools

import pytest
import torch
import torch.nn.functional as F
from problems import flat, problem
from ranks import in_two_processes
from torch import nn

from hvpopt.operators import GGNOperator, HessianOperator

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator}
X = torch.randn(10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(10) % 3
ROWS = [[slice(0, 4), slice(4, 5), slice(5, 8)], [slice(8, 10)]]


def _of(rank):
    return [(X[rows], Y[rows]) for rows in ROWS[rank]]


def _loss(net, reduction="mean"):
    return lambda b: F.cross_entropy(net(b[0]), b[1], reduction=reduction)


def _results(operator):
    v = [x.to(p) for x, p in zip(problem("mlp").tangent(), operator.params, strict=True)]
    twice = [torch.stack([x, 2 * x]) for x in v]
    return {
        "loss": operator.loss(),
        "gradient": flat(operator.gradient()),
        "product": flat(operator @ v),
        "again": flat(operator @ v),
        "products": flat(operator.matmat(twice)),
    }


def _message(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _work(rank):
    results = {}
    net = problem("mlp").net
    params = list(net.parameters())
    for name, kind in KINDS.items():
        results[name] = _results(kind(_loss(net), params, _of(rank)))
    results["wrapped"] = _results(
        HessianOperator(_loss(nn.parallel.DistributedDataParallel(net)), params, _of(rank))
    )
    results["sum"] = _results(HessianOperator(_loss(net, "sum"), params, _of(rank)))
    everything = [] if rank == 0 else [*_of(0), *_of(1)]
    results["one rank has it all"] = _results(HessianOperator(_loss(net), params, everything))
    alone = HessianOperator(_loss(net), params, _of(0), over_ranks=False)
    results["alone"] = _results(alone) if rank == 0 else None

    whole = HessianOperator(_loss(net), params, _of(rank))
    count = torch.distributed.all_reduce
    made = []

    @functools.wraps(count)
    def counted(*args, **kwargs):
        made.append(1)
        return count(*args, **kwargs)

    torch.distributed.all_reduce = counted
    whole @ problem("mlp").tangent()
    torch.distributed.all_reduce = count
    results["collectives"] = len(made)

    def broken(b):
        if len(b[0]) == 2:  # on rank 1
            raise KeyError("broken")
        return _loss(net)(b)

    if rank == 0:
        results["error"] = _message(HessianOperator(broken, params, _of(rank)).loss)
    else:
        with pytest.raises(KeyError, match="broken"):
            HessianOperator(broken, params, _of(rank)).loss()
    for name, loss in {
        "mixed": _loss(net, "mean" if rank else "sum"),
        "factors": lambda b: _loss(net)(b) * len(b[0]) if rank else _loss(net)(b),
        "by hand": lambda b: net(b[0]).square().mean(),
    }.items():
        results[name] = _message(HessianOperator(loss, params, _of(rank)[:1]).loss)
    results["empty"] = _message(HessianOperator(_loss(net), params, []).loss)
    return results


def test_results_are_those_of_all_batches(tmp_path):
    got = in_two_processes(_work, tmp_path)
    net = problem("mlp").net
    params = list(net.parameters())
    whole = [(X, Y)]
    expected = {
        "hessian": HessianOperator(_loss(net), params, whole),
        "ggn": GGNOperator(_loss(net), params, whole),
        "wrapped": HessianOperator(_loss(net), params, whole),
        "sum": HessianOperator(_loss(net, "sum"), params, whole),
        "one rank has it all": HessianOperator(_loss(net), params, whole),
        "alone": HessianOperator(_loss(net), params, [(X[:8], Y[:8])]),
    }
    for name, operator in expected.items():
        for what, value in _results(operator).items():
            torch.testing.assert_close(got[name][what], value, msg=lambda m, n=name: f"{n}: {m}")
    assert got["collectives"] == 1
    assert "RuntimeError: The loss could not be evaluated on another rank" in got["error"]
    assert "a mean on some ranks and a sum on others" in got["mixed"]
    assert "different factors on different ranks" in got["factors"]
    assert "no loss function of torch.nn.functional" in got["by hand"]
    assert "The data of no rank holds a batch" in got["empty"]
