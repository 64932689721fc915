"""Several directions at once: in chunks, within a budget, and one by one."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cubes import Cube
from functional import Tree, joined, normal
from product_problems import EXACT, MODES, each, exact_hvp, problem, stacked
from torch import Tensor

from hvpopt.products import ggnvp, grad_and_hvp, hvp, jvp, linearize
from hvpopt.products.directions import log_fall_back


@pytest.mark.parametrize("name", ["mlp", "silu", "group norm", "batch norm", "attention", "lstm"])
@pytest.mark.parametrize("mode", MODES)
def test_several_directions_give_the_products_of_each(name, mode):
    f, params, x = problem(name)
    vs = stacked(params)
    loss, grad, hvs = grad_and_hvp(f, params, vs, x, mode=mode)
    for i in range(3):
        torch.testing.assert_close(
            joined(each(hvs, i)), exact_hvp(name, each(vs, i)), rtol=1e-6, atol=1e-8
        )
    torch.testing.assert_close(loss, f(params, x))
    torch.testing.assert_close(joined(grad), joined(torch.func.grad(f)(params, x)))


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 1}, {"chunk_size": 2}, {"memory_budget": 1}]
)
def test_chunks_change_no_result(options):
    f, params, x = problem("attention")
    vs = stacked(params, 5)
    point = linearize(f, params, x)
    found = {
        "linearize": (point.hvp(vs, **options), point.hvp),
        "hvp": (hvp(f, params, vs, x, **options), lambda v: hvp(f, params, v, x)),
        "forward": (
            hvp(f, params, vs, x, mode="forward_over_reverse", **options),
            lambda v: hvp(f, params, v, x),
        ),
        "ggnvp": (
            ggnvp(f, torch.exp, params, vs, x, **options),
            lambda v: ggnvp(f, torch.exp, params, v, x),
        ),
        "double ggnvp": (
            ggnvp(f, torch.exp, params, vs, x, mode="double_reverse", **options),
            lambda v: ggnvp(f, torch.exp, params, v, x),
        ),
        "jvp": (jvp(f, params, vs, x, **options)[1], lambda v: jvp(f, params, v, x)[1]),
        "double jvp": (
            jvp(f, params, vs, x, mode="double_reverse", **options)[1],
            lambda v: jvp(f, params, v, x)[1],
        ),
    }
    for together, alone in found.values():
        for i in range(5):
            torch.testing.assert_close(joined(each(together, i)), joined(alone(each(vs, i))))


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes, plain = [], torch.vmap

    def counting(function: Callable[..., Any], **options: Any) -> Callable[[Tree], Any]:
        def run(piece: Tree) -> Any:
            sizes.append(len(next(iter(piece.values()))))
            return plain(function, **options)(piece)

        return run

    monkeypatch.setattr(torch, "vmap", counting)
    return sizes


def linearize_and_apply(f, params, vs, x, **options):
    return linearize(f, params, x).hvp(vs, **options)


def forward_over_reverse(f, params, vs, x, **options):
    return hvp(f, params, vs, x, mode="forward_over_reverse", **options)


def test_a_budget_of_memory_limits_how_many_directions_go_at_once(monkeypatch):
    """A direction takes as much as the function's own values do: 5 + 5 + 1 numbers of 8 bytes."""
    params = {"w": normal(5)}
    vs = stacked(params, 6)
    sizes = count_batches(monkeypatch)

    def f(p: Tree, scale: float) -> Tensor:
        return (p["w"].sin() * scale).sum()

    for product in (hvp, linearize_and_apply, forward_over_reverse, jvp):
        sizes.clear()
        product(f, params, vs, 2.0)
        assert sizes == [6]
        sizes.clear()
        product(f, params, vs, 2.0, memory_budget=1)
        assert sizes == []
        product(f, params, vs, 2.0, memory_budget=4 * 8 * 11)
        assert sizes == [4, 2]
        sizes.clear()
        product(f, params, vs, 2.0, memory_budget=4 * 8 * 11 - 1)
        assert sizes == [3, 3]


def test_functions_of_the_old_style_and_buffers_take_several_directions_at_once(caplog):
    log_fall_back.cache_clear()
    p, vs = normal(4), normal(3, 4, seed=1)

    def f(q: Tensor) -> Tensor:
        return Cube.apply(q).sum()

    with caplog.at_level(logging.WARNING, logger="hvpopt"):
        torch.testing.assert_close(hvp(f, p, vs), 6 * p * vs)
        torch.testing.assert_close(linearize(f, p).hvp(vs), 6 * p * vs)

    def counting(q: Tensor) -> Tensor:
        buffer = torch.zeros((), dtype=torch.float64)
        buffer += q.detach().sum()
        return (q**3).sum() + 0 * buffer

    with caplog.at_level(logging.WARNING, logger="hvpopt"):
        for mode in EXACT:
            torch.testing.assert_close(hvp(counting, p, vs, mode=mode), 6 * p * vs)
        jvps = jvp(lambda q: bool(q.detach().sum() > 9) * q**3 + q**3, p, vs)[1]
    torch.testing.assert_close(jvps, 3 * p**2 * vs)
    assert not caplog.records


class Asks(Cube):
    """p³, whose backward looks at the numbers that it is given."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Cube.backward(ctx, grad) if bool(grad.any()) else torch.zeros_like(grad)


def test_what_vmap_cannot_do_goes_one_by_one_and_is_logged_once(caplog):
    log_fall_back.cache_clear()
    p, vs = normal(4), normal(3, 4, seed=1)

    def f(q: Tensor) -> Tensor:
        return Asks.apply(q).square().sum()

    with caplog.at_level(logging.WARNING, logger="hvpopt"):
        for products in (hvp(f, p, vs), linearize(f, p).hvp(vs)):
            torch.testing.assert_close(products, 30 * p**4 * vs)
    (record,) = caplog.records
    assert "go one by one, as vmap failed: vmap: It looks like" in record.getMessage()


def test_several_directions_go_at_once_by_reverse_over_forward(caplog):
    p, vs = normal(4), normal(3, 4, seed=1)
    runs = []

    def f(p: Tensor) -> Tensor:
        runs.append(1)
        return (p**3).sum()

    with caplog.at_level(logging.WARNING, "hvpopt"):
        found = hvp(f, p, vs, mode="reverse_over_forward", chunk_size=3)
    torch.testing.assert_close(found, 6 * p * vs)
    assert len(runs) == 1
    assert not caplog.records
