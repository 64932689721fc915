"""Engines refuse what they would get wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from hvpopt.closure import ClosureOracle
from hvpopt.engines.custom_functions import (
    HiddenDependenceError,
    check_applications,
    recorded_applications,
)
from hvpopt.engines.dual_level import check_modes_agree


class Honest(Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.saved_tensors[0] ** 2 * t


class Hidden(Honest):
    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * g


class Kink(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


class StraightThrough(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


bound_early = Hidden.apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forward", [False, True])
def test_a_backward_that_hides_its_input_is_refused_by_name(forward, dtype):
    x = torch.linspace(-1, 2, 40, dtype=dtype, requires_grad=True)
    with recorded_applications() as found:
        bound_early(x)
    with pytest.raises(HiddenDependenceError, match="custom autograd Function Hidden hides"):
        check_applications(found, forward=forward)


@pytest.mark.parametrize("function", [Honest, Kink, StraightThrough])
def test_honest_functions_kinks_and_straight_through_pass(function):
    x = torch.linspace(-1, 2, 1000, requires_grad=True)
    with recorded_applications() as found:
        function.apply(x)
    assert [a.function for a in found.values()] == [function]
    check_applications(found, forward=False)


def test_recording_leaves_the_classes_as_they_were():
    before = {c: dict(vars(c)) for c in (Honest, Hidden, Kink)}
    with pytest.raises(KeyError), recorded_applications():
        raise KeyError
    assert before == {c: dict(vars(c)) for c in (Honest, Hidden, Kink)}


def test_a_trial_leaves_random_numbers_alone():
    x = torch.ones(3, requires_grad=True)
    with recorded_applications() as found:
        Honest.apply(x)
    state = torch.get_rng_state()
    check_applications(found, forward=False)
    assert torch.equal(state, torch.get_rng_state())


def test_modes_that_disagree_raise():
    g, v = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]
    check_modes_agree(torch.tensor(1.0), g, v, rough=False)
    check_modes_agree(None, [torch.zeros(2)], v, rough=False)
    check_modes_agree(torch.tensor(5.0), [None], v, rough=False)
    with pytest.raises(RuntimeError, match=r"Forward and reverse mode disagree .*forward 2,"):
        check_modes_agree(torch.tensor(2.0), g, v, rough=False)
    with pytest.raises(RuntimeError, match="disagree"):
        check_modes_agree(None, g, v, rough=False)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_function_whose_jvp_contradicts_its_backward_is_refused_by_the_dual_engine(curvature):
    class Contradictory(Honest):
        @staticmethod
        def jvp(ctx, t):
            return t

    w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def closure():
        w.grad = None
        loss = F.mse_loss(Contradictory.apply(w), torch.ones(2))
        loss.backward()
        return loss

    with ClosureOracle(closure, [w], engine="dual") as oracle:
        with pytest.raises(RuntimeError, match=r"Forward and reverse mode disagree"):
            oracle.trace_along([torch.ones(2)], curvature)
