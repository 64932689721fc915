"""Engines refuse what they would get wrong."""

import gc

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

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


def closure_for(loss, params):
    def closure():
        for p in params:
            p.grad = None
        value = loss()
        value.backward()
        return value

    return closure


def products(loss, params, v, engine, curvature="hessian"):
    closure = closure_for(loss, params)
    with ClosureOracle(closure, params, engine=engine, leave_no_trace=True) as oracle:
        return oracle.trace(curvature).product(v)


def test_batch_norm_of_the_wrong_size_raises_torchs_error():
    net = nn.Sequential(nn.Linear(4, 30), nn.BatchNorm1d(2))
    x, params = torch.randn(8, 4), list(net.parameters())
    with pytest.raises(RuntimeError, match="should contain 30 elements not 2"):
        products(lambda: net(x).square().mean(), params, [p.data for p in params], "graph")


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", ["graph", "dual"])
def test_a_trace_holds_no_graph_in_a_cycle(engine, curvature):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, params = torch.randn(4, 3), list(net.parameters())
    v = [torch.ones_like(p) for p in params]

    def step():
        products(lambda: F.mse_loss(net(x), torch.ones(4, 2)), params, v, engine, curvature)

    def count():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        before = count()
        for _ in range(3):
            step()
        assert count() == before
    finally:
        gc.enable()


def test_what_a_checkpointed_layer_computes_without_gradients_is_a_constant_there_too():
    torch.manual_seed(0)
    w, x = nn.Parameter(torch.randn(4, 4, dtype=torch.float64)), torch.randn(5, 4).double()

    def layer(h):
        h = h @ w
        with torch.no_grad():
            size = h.abs().amax()
        return (h / size).tanh()

    v = [torch.ones_like(w)]
    plain = products(lambda: layer(x).square().mean(), [w], v, "graph")

    def checkpointed():
        return checkpoint(layer, x, use_reentrant=False).square().mean()

    for engine in ("graph", "dual"):
        torch.testing.assert_close(products(checkpointed, [w], v, engine), plain)


def test_a_checkpointed_function_without_modules_serves_many_products():
    q = nn.Parameter(torch.randn(3).double())

    def loss():
        return checkpoint(lambda: F.huber_loss(q, torch.zeros_like(q)), use_reentrant=False)

    with ClosureOracle(closure_for(loss, [q]), [q], engine="graph") as oracle:
        point, v = oracle.trace(), [torch.ones_like(q)]
        torch.testing.assert_close(point.product(v), point.product(v))


@pytest.mark.parametrize("engine", ["auto", "graph", "dual"])
def test_a_penalty_without_a_gradient_at_the_point_is_not_dropped(engine):
    """At zero weights a quadratic penalty has a Hessian alone."""
    net = nn.Linear(3, 2).double()
    nn.init.zeros_(net.weight)
    x, params = torch.randn(4, 3).double(), list(net.parameters())
    v = [torch.ones_like(p) for p in params]

    def loss():
        return F.cross_entropy(net(x), torch.tensor([0, 1, 1, 0])) + 5 * net.weight.square().sum()

    expected = products(loss, params, v, "graph", "ggn")  # 10 v for the penalty
    closure = closure_for(loss, params)
    with ClosureOracle(closure, params, engine=engine, leave_no_trace=True) as oracle:
        if engine == "dual":
            with pytest.raises(ValueError, match="does not go through a loss function"):
                oracle.trace_along(v, "ggn")
        else:
            torch.testing.assert_close(oracle.trace_along(v, "ggn")[2], expected)
    assert (expected[0] - 10).abs().max() < 1


def test_buffers_of_scripted_modules_advance_once():
    net = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    x, params = torch.randn(5, 4), list(net.parameters())
    loss = closure_for(lambda: net(x).square().sum(), params)
    with ClosureOracle(loss, params, engine="graph") as oracle:
        oracle.trace().product([torch.ones_like(p) for p in params])
        oracle.evaluate()
    assert dict(net.named_buffers())["1.num_batches_tracked"] == 1


def test_numbers_drawn_before_the_first_run_do_not_change_what_later_runs_see():
    w = nn.Parameter(torch.ones(100))
    closure = closure_for(lambda: F.dropout(w, 0.5).sum(), [w])
    with ClosureOracle(closure, [w], engine="graph") as oracle:
        torch.randn(7)
        point = oracle.trace()
        assert oracle.evaluate() == point.loss


def test_modes_are_compared_with_room_for_rounding_along_the_gradient():
    g = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)) * 1e4
    slope = (g.double() ** 2).sum().float() * (1 + 1e-5)
    check_modes_agree(slope, [g], [g], rough=False)
    check_modes_agree(torch.zeros(()), [torch.zeros(0)], [torch.zeros(0)], rough=False)


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


def test_mean_squares_from_integer_labels_have_products_by_every_engine():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = lambda: F.mse_loss(w**2, torch.tensor([1, 3]))  # noqa: E731
    expected = products(loss, [w], [torch.ones(2)], "graph")
    torch.testing.assert_close(products(loss, [w], [torch.ones(2)], "dual"), expected)


def test_strides_of_numpy_and_words_for_padding_are_taken_as_torch_takes_them():
    w = nn.Parameter(torch.randn(2, 1, 3))
    x, v = torch.randn(1, 1, 8), [torch.ones_like(w)]
    products(lambda: F.conv1d(x, w, stride=numpy.int64(2)).square().sum(), [w], v, "graph")
    for padding in ("same", "foo"):
        with pytest.raises((RuntimeError, ValueError), match=r"padding|Invalid"):
            products(lambda p=padding: F.conv1d(x, w, stride=2, padding=p).sum(), [w], v, "graph")


def test_gradients_of_channels_last_weights_keep_their_layout():
    net = nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last)
    x, params = torch.randn(2, 4, 5, 5), list(net.parameters())
    with ClosureOracle(
        closure_for(lambda: net(x).square().sum(), params), params, engine="graph"
    ) as oracle:
        oracle.trace()
    assert net.weight.grad.stride() == net.weight.stride()
