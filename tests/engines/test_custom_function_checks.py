"""Custom Functions whose derivatives would be wrong are refused, honest ones pass."""

import pytest
import torch
import torch.nn.functional as F
from cubes import Honest
from problems import closure_for
from torch import nn
from torch.autograd import Function

from hvpopt.closure import ClosureOracle
from hvpopt.engines.custom_functions import (
    HiddenDependenceError,
    check_applications,
    recorded_applications,
)
from hvpopt.engines.dual_level import check_modes_agree


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


def test_a_function_that_inherits_its_forward_is_judged_by_its_own_backward():
    class Child(Hidden):
        backward = Honest.backward

    x = torch.ones(3, requires_grad=True)
    with recorded_applications() as found:
        Child.apply(x)
    assert [a.function for a in found.values()] == [Child]
    check_applications(found, forward=False)


def test_trying_a_function_leaves_the_modules_that_it_changes_as_after_one_run():
    class Counts(Honest):
        @staticmethod
        def forward(x, counter):
            counter.calls += 1
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g, None

    class Layer(nn.Module):
        calls = 0

        def forward(self, x):
            return Counts.apply(x, self)

    layer, w = Layer(), nn.Parameter(torch.ones(2))
    layer.calls = 0
    with ClosureOracle(closure_for(lambda: layer(w).sum(), [w]), [w], engine="graph") as oracle:
        oracle.trace().product([torch.ones(2)])
    assert layer.calls == 1


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


def test_modes_that_disagree_raise():
    g, v = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]
    check_modes_agree(torch.tensor(1.0), g, v, rough=False)
    check_modes_agree(None, [torch.zeros(2)], v, rough=False)
    check_modes_agree(torch.tensor(5.0), [None], v, rough=False)
    with pytest.raises(RuntimeError, match=r"Forward and reverse mode disagree .*forward 2,"):
        check_modes_agree(torch.tensor(2.0), g, v, rough=False)
    with pytest.raises(RuntimeError, match="disagree"):
        check_modes_agree(None, g, v, rough=False)


def test_modes_are_compared_with_room_for_rounding_along_the_gradient():
    g = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)) * 1e4
    slope = (g.double() ** 2).sum().float() * (1 + 1e-5)
    check_modes_agree(slope, [g], [g], rough=False)
    check_modes_agree(torch.zeros(()), [torch.zeros(0)], [torch.zeros(0)], rough=False)
