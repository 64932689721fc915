"""The automatic choice of a way: what decides, what is measured, what is remembered."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import normal
from jacobian_cases import COLUMNS, HESSIANS, ROWS, close
from torch import Tensor, nn

from hvpopt.jacobians import jacobian, which_mode
from hvpopt.jacobians.functions import Problem


def test_the_shapes_decide_between_rows_and_columns():
    wide, tall = normal(2, 400), normal(400, 2)
    assert which_mode(lambda x: torch.tanh(wide @ x), normal(400)).mode in ROWS
    chosen = which_mode(lambda x: torch.tanh(tall @ x), normal(2))
    assert chosen.mode in COLUMNS
    assert chosen.reason.startswith("400 × 2, fewer columns; ")
    assert which_mode(lambda x: x.sin().sum(), normal(50)).mode == "vjp_loop"
    assert which_mode(lambda x: x.sin().expand(50), normal()).mode == "dual_loop"
    # of one example: 3 × 40, not 150 × 2000
    w = normal(3, 40)
    batched = which_mode(lambda x: x @ w.T, normal(50, 40), batched=True)
    assert batched.reason.startswith("3 × 40, fewer rows; ")
    assert batched.mode in ROWS


def test_a_choice_is_measured_once_remembered_and_logged(caplog):
    caplog.set_level(logging.INFO, "hvpopt")
    calls = []
    w = normal(6, 5)

    def make() -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            calls.append(1)
            return torch.tanh(w @ x)

        return f

    jacobian(make(), normal(5))
    first = len(calls)
    jacobian(make(), normal(5, seed=1))  # the same code, made again
    assert len(calls) - first <= 5
    jacobian(make(), normal(5))
    chosen = which_mode(make(), normal(5))
    assert chosen.reason.startswith("6 × 5; ")
    assert " ms" in chosen.reason
    assert [r.getMessage() for r in caplog.records] == [
        f"Derivatives by {chosen.mode} ({chosen.reason})."
    ]
    which_mode(make(), normal(5).float().double()[None].squeeze(0))
    assert len(caplog.records) == 1


def test_functions_are_remembered_whatever_they_capture():
    def g(x: Tensor, n: int = 2) -> Tensor:
        return x if n == 0 else g(x.sin(), n - 1)

    class Scaled:
        scale = 2.0

        def value(self, x: Tensor) -> Tensor:
            return later(x) if self.scale == 0 else self.scale * x

    partly = functools.partial(torch.mul, normal())
    for f in (g, Scaled().value, Scaled().value, partly, torch.sin, nn.Tanh(), lambda x: g(x)):
        x = normal(3, seed=1)
        close(jacobian(f, x), torch.diag(torch.func.vmap(torch.func.grad(f))(x)))
    later = torch.cos  # until here an empty cell


def test_functions_that_differ_in_options_are_told_apart():
    def made(power: int, default: str) -> Callable[[Tensor], Tensor]:
        return lambda x, kind=default: (x**power).sin() if kind == "sin" else x**power

    x = normal(3)
    keys = {Problem(made(*o), (x,), 0, scalar=False).key for o in [(2, "a"), (3, "a"), (2, "sin")]}
    assert len(keys) == 3
    same = Problem(made(2, "a"), (x,), 0, scalar=False).key
    assert same in keys


def test_hessians_are_chosen_too():
    chosen = which_mode(lambda x: x.sin().prod(), normal(4), of="hessian")
    assert chosen.mode in HESSIANS
    assert all(name in chosen.reason for name in HESSIANS)


class NoForward(torch.autograd.Function):
    """exp, of reverse mode alone, and without vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("n", [1, 3])
def test_what_an_operation_does_not_support_is_not_chosen(n):
    w, x = normal(40, n), normal(n, seed=1)

    def f(x: Tensor) -> Tensor:
        return NoForward.apply(w @ x)

    close(jacobian(f, x), (w @ x).exp()[:, None] * w)
    chosen = which_mode(f, x)
    assert chosen.mode == "vjp_loop"
    assert "dual_loop failed: " in chosen.reason


def test_a_function_that_fails_in_every_way_raises_its_own_error():
    def f(x: Tensor) -> Tensor:
        raise RuntimeError("of my own")

    with pytest.raises(RuntimeError, match="of my own"):
        jacobian(f, normal(3))


def test_a_memory_of_another_function_does_no_harm():
    """The code is the same, and what it captures looks the same, but its value has grown."""
    sizes = {"m": 2}
    w = normal(400, 4)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(w[: sizes["m"]] @ x)

    x = normal(4, seed=1)
    for m in (2, 400, 3):
        sizes["m"] = m
        for mode in ("auto", "jacfwd", "vjp_vmap"):
            assert jacobian(f, x, mode=mode).shape == (m, 4)
    assert which_mode(f, x).reason.startswith("3 × 4")
