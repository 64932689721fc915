import copy

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS, flat, problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvpopt.closure import ClosureOracle, NoBackwardError
from hvpopt.engines.choice import EngineChoice
from hvpopt.engines.ranks import ShardedModuleError
from hvpopt.engines.split import SplitNotFoundError

EXACT = ["dual", "graph"]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_of_both_engines_are_those_of_the_dense_matrix(name, engine, curvature):
    task = problem(name)
    dense = task.dense_hessian() if curvature == "hessian" else task.dense_ggn()
    v = task.tangent()
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        point = oracle.trace(curvature)
        product = point.product(v)
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        loss, grad, along = oracle.trace_along(v, curvature)
    torch.testing.assert_close(flat(product), dense @ flat(v), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(flat(along), dense @ flat(v), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, point.loss)
    torch.testing.assert_close(flat(grad), flat(point.grad))


@pytest.mark.parametrize("name", PROBLEMS)
def test_finite_differences_approximate_the_dense_hessian(name):
    task = problem(name)
    v = task.tangent()
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine="finite_difference") as oracle:
        product = oracle.trace().product(v)
    expected = task.dense_hessian() @ flat(v)
    # error of order h² with h = eps^(1/3) = 6e-6
    torch.testing.assert_close(flat(product), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("engine", [*EXACT, "finite_difference"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_trace_leaves_the_world_as_one_plain_run_does(name, engine):
    plain, task = problem(name), problem(name)
    torch.manual_seed(5)
    plain.closure()()
    expected_random = torch.rand(3)

    torch.manual_seed(5)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        point = oracle.trace()
        point.product(task.tangent())
        torch.testing.assert_close(oracle.evaluate(), point.loss, rtol=0, atol=0)
        point.product(task.tangent(2))
    assert torch.equal(torch.rand(3), expected_random)
    for ours, theirs in zip(task.params, plain.params, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
        assert not ours.grad.requires_grad
    for ours, theirs in zip(task.net.buffers(), plain.net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_evaluations_elsewhere_see_the_same_dropout_mask():
    task = problem("dropout")
    with ClosureOracle(task.closure(), task.params) as oracle:
        point = oracle.trace()
        values = [float(oracle.evaluate()) for _ in range(3)]
        with torch.no_grad():
            task.params[0].add_(0.1)
        moved = float(oracle.evaluate())
    assert values == [float(point.loss)] * 3
    assert moved != values[0]


def test_the_graph_outlives_evaluations_of_a_network_with_buffers():
    task = problem("batchnorm")
    v = task.tangent()
    with ClosureOracle(task.closure(), task.params, engine="graph") as oracle:
        point = oracle.trace()
        before = point.product(v)
        oracle.evaluate()
        assert torch.equal(flat(point.product(v)), flat(before))


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "transformer"])
def test_the_hessian_is_symmetric_in_float32(name):
    task = problem(name, torch.float32)
    u, v = task.tangent(1), task.tangent(2)
    with ClosureOracle(task.closure(), task.params) as oracle:
        product = oracle.trace().product
        left, right = flat(u) @ flat(product(v)), flat(v) @ flat(product(u))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize(
    ("engine", "curvature"),
    [("dual", "hessian"), ("graph", "hessian"), ("graph", "ggn"), ("auto", "ggn")],
)
def test_activation_checkpointing_changes_no_product(engine, curvature):
    task, checked = problem("mlp"), problem("mlp")
    checked.net = Checkpointed(checked.net)
    products = []
    for each in (task, checked):
        with ClosureOracle(each.closure(), each.params, engine=engine) as oracle:
            products.append(flat(oracle.trace_along(task.tangent(), curvature)[2]))
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("engine", EXACT)
def test_several_backward_calls_in_a_closure_add_up(engine):
    task = problem("mlp")
    halves = task.x[:3], task.x[3:]
    targets = (torch.arange(6) % 3).split(3)

    def closure() -> None:
        task.net.zero_grad()
        for x, y in zip(halves, targets, strict=True):
            (F.cross_entropy(task.net(x), y) / 2).backward()

    v = task.tangent()
    with ClosureOracle(closure, task.params, engine=engine) as oracle:
        point = oracle.trace()
        product, value = point.product(v), oracle.evaluate()
    torch.testing.assert_close(flat(product), task.dense_hessian() @ flat(v))
    torch.testing.assert_close(value, point.loss)
    with ClosureOracle(closure, task.params, engine="graph") as oracle:
        product = oracle.trace("ggn").product(v)
    torch.testing.assert_close(flat(product), task.dense_ggn() @ flat(v))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
        lambda z, y: nn.NLLLoss()(z.log_softmax(dim=-1), y),
        lambda z, y: nn.CrossEntropyLoss()(z, y),
        lambda z, y: F.cross_entropy(input=z, target=y, reduction="sum") / len(y),
        lambda z, y: F.cross_entropy(z, y, reduction="none").mean(),
        lambda z, y: F.kl_div(F.log_softmax(z, 1), F.one_hot(y, 3).double(), reduction="batchmean"),
    ],
)
@pytest.mark.parametrize("engine", EXACT)
def test_every_spelling_of_cross_entropy_gives_its_ggn(engine, loss):
    task = problem("mlp")
    expected = task.dense_ggn() @ flat(task.tangent())
    task.loss = lambda z: loss(z, torch.arange(6) % 3)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        product = oracle.trace_along(task.tangent(), "ggn")[2]
    torch.testing.assert_close(flat(product), expected)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_penalty_in_the_closure_adds_its_hessian(curvature):
    task = problem("mlp")
    plain = task.dense_ggn() if curvature == "ggn" else task.dense_hessian()

    def closure() -> Tensor:
        task.net.zero_grad()
        penalty = sum(p.square().sum() for p in task.params)
        loss = task.loss(task.net(task.x)) + 0.3 * penalty
        loss.backward()
        return loss

    v = task.tangent()
    with ClosureOracle(closure, task.params, engine="auto") as oracle:
        point = oracle.trace(curvature)
        product = point.product(v)
    torch.testing.assert_close(flat(product), plain @ flat(v) + 0.6 * flat(v))
    assert point.has_remainder == (curvature == "ggn")
    with ClosureOracle(closure, task.params) as oracle:  # the dual engine gives way to the graph
        torch.testing.assert_close(
            flat(oracle.trace_along(v, curvature)[2]), plain @ flat(v) + 0.6 * flat(v)
        )


def test_the_ggn_of_a_loss_of_two_outputs_keeps_their_cross_terms():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def closure() -> Tensor:
        w.grad = None
        loss = F.mse_loss(w.sin(), w.cos(), reduction="sum")
        loss.backward()
        return loss

    v = torch.randn(3, dtype=torch.float64)
    with ClosureOracle(closure, [w]) as oracle:
        (product,) = oracle.trace("ggn").product([v])
    slope = w.cos() + w.sin()  # of the residual sin w − cos w
    torch.testing.assert_close(product, (2 * slope**2 * v).detach())


def test_a_ggn_without_a_loss_function_names_the_remedy():
    task = problem("mlp")
    task.loss = lambda z: (z**2).mean()
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(SplitNotFoundError, match=r"F\.mse_loss.*curvature='hessian'"):
            oracle.trace("ggn")


def test_the_engine_is_chosen_once_by_need_and_logged(caplog):
    caplog.set_level("INFO", "hvpopt")
    task, choice = problem("mlp"), EngineChoice()
    for _ in range(2):
        with ClosureOracle(task.closure(), task.params, engine=choice) as oracle:
            oracle.trace("ggn")
        with ClosureOracle(task.closure(), task.params, engine=choice) as oracle:
            oracle.trace_along(task.tangent(), "ggn")
            assert oracle.num_runs in (1, 2)  # the probe comes before the first run only
        with ClosureOracle(task.closure(), task.params, engine=choice) as oracle:
            oracle.trace_along(task.tangent(), "hessian")
    assert [r.message for r in caplog.records] == [
        "Products of the ggn by engine graph (best for many products).",
        "Products of the ggn by engine dual (best for one product).",
        "Products of the hessian by engine graph (best for one product).",
    ]


def test_the_dual_engine_becomes_thorough_where_it_must(caplog):
    caplog.set_level("INFO", "hvpopt")
    task = problem("mlp")  # SiLU's backward kernel has no forward-mode formula
    with ClosureOracle(task.closure(), task.params, engine="dual") as oracle:
        oracle.trace_along(task.tangent())
    assert "(dual failed: no forward mode of silu_backward in module '3' (SiLU))" in caplog.text
    assert "engine dual (thorough)" in caplog.text


def test_what_torch_cannot_differentiate_twice_falls_to_finite_differences(caplog):
    caplog.set_level("INFO", "hvpopt")

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def closure() -> Tensor:
        w.grad = None
        loss = Cube.apply(w).sum()
        loss.backward()
        return loss

    v = torch.ones(2, dtype=torch.float64)
    with ClosureOracle(closure, [w]) as oracle:
        (product,) = oracle.trace().product([v])
    torch.testing.assert_close(product, 6 * w.detach(), rtol=1e-8, atol=0)
    assert "engine finite_difference (graph failed" in caplog.text


def test_an_error_in_the_closure_is_the_closures_own():
    task = problem("mlp")
    task.x = task.x[:, :3]
    before = copy.deepcopy(task.net.state_dict())
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            oracle.trace()
    assert all(torch.equal(before[k], v) for k, v in task.net.state_dict().items())


@pytest.mark.parametrize("engine", ["dual", "graph", "finite_difference", "auto"])
def test_a_closure_without_backward_is_named(engine):
    task = problem("mlp")
    with ClosureOracle(lambda: task.loss(task.net(task.x)), task.params, engine=engine) as oracle:
        with pytest.raises(NoBackwardError, match=r"never called loss\.backward\(\)"):
            oracle.trace()


def test_a_loss_that_is_no_scalar_is_named():
    task = problem("mlp")
    task.loss = lambda z: z
    closure = task.closure()
    with ClosureOracle(closure, task.params) as oracle:
        with pytest.raises(ValueError, match=r"shape \(6, 3\).*real scalar loss"):
            oracle.trace()


def test_unknown_names_are_refused():
    task = problem("mlp")
    with pytest.raises(ValueError, match="engine='fast' is unknown: choose one of 'auto'"):
        ClosureOracle(task.closure(), task.params, engine="fast")
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(ValueError, match="curvature='kfac' is unknown"):
            oracle.trace("kfac")
    with pytest.raises(ValueError, match=r"Finite differences.* not the GGN"):
        with ClosureOracle(task.closure(), task.params, engine="finite_difference") as oracle:
            oracle.trace("ggn")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, r"no parameters: .* list\(model\.parameters\(\)\)"),
        ([{"params": []}], TypeError, "number 0 is a dict, where a tensor is expected"),
        ([nn.Parameter(torch.ones(1)), 2.0], TypeError, "number 1 is a float"),
        (
            [nn.Parameter(torch.ones(2, 3), requires_grad=False)],
            ValueError,
            r"number 0 \(shape \(2, 3\)\) has requires_grad=False: leave it out, or unfreeze",
        ),
    ],
)
def test_parameters_that_cannot_be_differentiated_by_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        ClosureOracle(lambda: None, params)


def test_an_oracle_works_inside_its_context_only():
    task = problem("mlp")
    oracle = ClosureOracle(task.closure(), task.params)
    with pytest.raises(RuntimeError, match="context manager"):
        oracle.trace()
    with oracle:
        point = oracle.trace()
    with pytest.raises(RuntimeError, match="released"):
        point.product(task.tangent())


def test_sharded_modules_are_refused():
    class FullyShardedDataParallel(nn.Linear):
        pass

    torch.manual_seed(0)
    net = FullyShardedDataParallel(2, 2)

    def closure() -> Tensor:
        loss = net(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    with ClosureOracle(closure, list(net.parameters())) as oracle:
        with pytest.raises(ShardedModuleError, match="strategy='ddp'"):
            oracle.trace()


@pytest.mark.parametrize("engine", ["dual", "graph"])
def test_products_in_a_compiled_module_are_right(engine):
    task = problem("mlp")
    expected = task.dense_hessian() @ flat(task.tangent())
    compiled = torch.compile(task.net, backend="aot_eager")

    def closure() -> Tensor:
        task.net.zero_grad()
        loss = task.loss(compiled(task.x))
        loss.backward()
        return loss

    with ClosureOracle(closure, task.params, engine=engine) as oracle:
        product = oracle.trace().product(task.tangent())
    torch.testing.assert_close(flat(product), expected)


def test_bf16_autocast_products_are_within_its_precision():
    task = problem("mlp", torch.float32)
    exact = task.dense_hessian() @ flat(task.tangent())

    def closure() -> Tensor:
        task.net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(task.net(task.x))
        loss.backward()
        return loss

    for engine in EXACT:
        with ClosureOracle(closure, task.params, engine=engine) as oracle:
            product = flat(oracle.trace().product(task.tangent()))
        assert product.dtype == torch.float32
        assert (product - exact).norm() < 0.03 * exact.norm()


def test_the_ggn_is_the_graph_engines_for_many_products_and_the_dual_engines_for_one(caplog):
    caplog.set_level("INFO", "hvpopt")
    task = problem("batchnorm")
    with ClosureOracle(task.closure(), task.params) as oracle:
        product = oracle.trace("ggn").product(task.tangent())
        along = oracle.trace_along(task.tangent(), "ggn")[2]
    expected = task.dense_ggn() @ flat(task.tangent())
    torch.testing.assert_close(flat(product), expected)
    torch.testing.assert_close(flat(along), expected)
    assert "ggn by engine graph (best for many products)" in caplog.text
    assert "ggn by engine dual (best for one product)" in caplog.text


def test_tangents_leave_the_graphs_of_others_valid():
    task = problem("mlp")
    v = task.tangent()
    loss = task.loss(task.net(task.x))
    grads = torch.autograd.grad(loss, task.params, create_graph=True)
    with ClosureOracle(task.closure(), task.params, engine="dual") as oracle:
        oracle.trace_along(v, "ggn")
    product = torch.autograd.grad(grads, task.params, v)
    torch.testing.assert_close(flat(product), task.dense_hessian() @ flat(v))
