"""Matrices that come block by block, and within a budget of memory."""

import pytest
import torch
from functional import normal, on_joined, params_of
from hvpopt.experiments.benchmarks.timing import peak_bytes
from jacobian_cases import ROWS, SIX, close, every_hessian, network, output_at
from torch import Tensor

from hvpopt.jacobians import Block, hessian, hessian_blocks, jacobian, jacobian_blocks


@pytest.mark.parametrize("mode", SIX)
def test_blocks_are_consecutive_parts_of_the_matrix(mode):
    w, tree = normal(7, 5), {"a": normal(2), "b": normal(3, 1)}

    def f(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = torch.tanh(w @ torch.cat([p["a"], p["b"][:, 0]]))
        return y[:4].reshape(2, 2), y[4:]

    g, flat = on_joined(lambda p: torch.cat([y.flatten() for y in f(p)]), tree)
    whole = torch.autograd.functional.jacobian(g, flat)
    blocks = list(jacobian_blocks(f, tree, mode=mode, chunk_size=3))
    assert all(isinstance(b, Block) for b in blocks)
    axis = "rows" if mode in ROWS else "columns"
    assert {b.axis for b in blocks} == {axis}
    count = 7 if axis == "rows" else 5
    assert [b.start for b in blocks] == list(range(0, count, 3))
    assert [b.stop for b in blocks] == [min(b.start + 3, count) for b in blocks]
    close(torch.cat([b.value for b in blocks], 0 if axis == "rows" else 1), whole)


@every_hessian
def test_blocks_of_a_hessian_are_its_rows(mode):
    net, x = network("tanh")
    f, params = output_at(net, x), params_of(net)
    g, flat = on_joined(lambda p: f(p).square().sum(), params)
    blocks = list(hessian_blocks(lambda p: f(p).square().sum(), params, mode=mode, chunk_size=8))
    close(torch.cat([b.value for b in blocks]), torch.autograd.functional.hessian(g, flat))
    assert {b.axis for b in blocks} == {"rows"}


def test_blocks_are_computed_when_they_are_asked_for():
    runs = []

    def f(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin()

    blocks = jacobian_blocks(f, normal(100), mode="jvp_loop", chunk_size=10)
    before = len(runs)
    next(blocks)
    assert len(runs) == before + 10
    assert torch.is_grad_enabled()
    assert list(jacobian_blocks(torch.sin, normal(0))) == []


@pytest.mark.parametrize("function", [jacobian, hessian])
def test_a_result_larger_than_the_budget_is_refused_with_its_size(function):
    x = torch.zeros(1000)
    value = torch.sin if function is jacobian else (lambda x: x.sin().sum())
    name = function.__name__
    message = (
        rf"The {name.title()} of shape 1,000 × 1,000 needs 3\.8 MiB; the memory budget is "
        rf"976\.6 KiB\. .*{name}_blocks"
    )
    with pytest.raises(ValueError, match=message):
        function(value, x, memory_budget=10**6)


def test_the_default_budget_refuses_what_no_machine_holds():
    x = torch.zeros(10**6)
    with pytest.raises(ValueError, match=r"needs 3\.6 TiB; the memory budget is"):
        hessian(lambda x: x.square().sum(), x)
    assert next(iter(hessian_blocks(lambda x: x.square().sum(), x, chunk_size=2))).value.shape == (
        2,
        10**6,
    )


@pytest.mark.parametrize("mode", ["vjp_vmap", "jacrev", "jacfwd"])
@pytest.mark.parametrize("name", ["convolution", "attention"])
def test_a_vmapped_way_stays_within_the_budget(name, mode):
    net, x = network(name)
    f, params = output_at(net, x.repeat(40, 1, 1)), params_of(net)

    results: dict[int | None, dict[str, Tensor]] = {}

    def peak(budget: int | None) -> int:
        def task() -> None:
            results[budget] = jacobian(f, params, mode=mode, memory_budget=budget)

        return peak_bytes(task, torch.device("cpu"))

    unlimited = peak(None)
    size = sum(b.nbytes for b in results[None].values())
    assert size < 0.8 * unlimited
    budget = size + (unlimited - size) // 2
    assert size < peak(budget) < budget
    for key, found in results[budget].items():
        close(found, results[None][key])


def test_blocks_stay_within_the_budget():
    w = normal(500, 500)
    budget = 2**19

    def task() -> None:
        for block in jacobian_blocks(
            lambda x: torch.tanh(w @ x), w[0], mode="vjp_vmap", memory_budget=budget
        ):
            assert 1 < block.value.shape[0] < 500

    assert peak_bytes(task, torch.device("cpu")) < budget
