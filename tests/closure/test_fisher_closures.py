"""Fishers of closures as people write them: penalties, hooks, several losses, autocast."""

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import KINDS, LABELS, ONES, products, with_loss
from plain_runs import as_after_one_plain_run
from problems import EXACT, flat, problem
from torch import Tensor

from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineChoice
from hvpopt.likelihoods import MonteCarlo, NoLikelihoodError


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("curvature", KINDS)
def test_a_penalty_is_in_the_gradient_and_not_in_the_fisher(curvature, engine):
    plain, task = problem("mlp"), problem("mlp")
    weight = task.params[0]
    task.loss = lambda z: F.cross_entropy(z, torch.arange(6) % 3) + (weight**4).sum()
    v = task.tangent()
    ours, without = (products(t, v, curvature, engine) for t in (task, plain))
    for a, b in zip(ours, without, strict=True):
        torch.testing.assert_close(a, b)
    task.closure()()
    expected = [p.grad.clone() for p in task.params]
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        point = oracle.trace(curvature)
    assert point.has_remainder
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        loss, grad, _ = oracle.trace_along(v, curvature)
    torch.testing.assert_close(loss, point.loss)
    torch.testing.assert_close(flat(point.grad), flat(expected))
    torch.testing.assert_close(flat(grad), flat(expected))
    with ClosureOracle(plain.closure(), plain.params, engine=engine) as oracle:
        assert not oracle.trace(curvature).has_remainder


@pytest.mark.parametrize("engine", [*EXACT, "auto"])
@pytest.mark.parametrize("curvature", [*KINDS, MonteCarlo(2, 3)])
@pytest.mark.parametrize("name", ["batchnorm", "dropout"])
def test_a_fisher_trace_leaves_the_world_as_one_plain_run_does(name, curvature, engine):
    with as_after_one_plain_run(name) as task:
        with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
            oracle.trace(curvature).product(task.tangent())


@pytest.mark.parametrize(
    ("engine", "curvature"),
    [("dual", "ggn"), ("dual", "fisher"), ("graph", "hessian"), ("graph", "ggn")],
)
def test_hooks_on_parameters_see_gradients_and_no_products(engine, curvature):
    plain, task = problem("mlp"), problem("mlp")
    v = task.tangent()
    expected = products(plain, v, curvature, engine)
    seen = []
    task.params[0].register_hook(lambda g: seen.append(g) or 3 * g)
    for ours, theirs in zip(products(task, v, curvature, engine), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(seen) == 2  # a trace each
    torch.testing.assert_close(task.params[0].grad, 3 * plain.params[0].grad)


def test_several_backward_calls_add_up():
    task = problem("mlp")
    labels = torch.arange(6) % 3

    def closure() -> Tensor:
        task.net.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for half in (slice(0, 3), slice(3, 6)):
            loss = F.cross_entropy(task.net(task.x[half]), labels[half]) / 2
            loss.backward()
            total += loss.detach()
        return total

    v = task.tangent()
    for curvature in ("fisher", "empirical_fisher"):
        for engine in ("graph", "auto"):
            with ClosureOracle(closure, task.params, engine=engine) as oracle:
                product = oracle.trace(curvature).product(v)
            expected = products(task, v, curvature, "graph")[0]
            torch.testing.assert_close(flat(product), expected)


def test_an_engine_is_chosen_once_for_all_seeds(caplog):
    task, choice = problem("mlp"), EngineChoice()
    with caplog.at_level("INFO", logger="hvpopt"):
        for seed in range(3):
            with ClosureOracle(task.closure(), task.params, engine=choice) as oracle:
                oracle.trace(MonteCarlo(seed=seed))
    assert len(caplog.records) == 1
    assert "Products of the fisher_mc by engine graph" in caplog.text


def test_autocast_changes_the_fisher_by_its_rounding_only():
    task = problem("mlp", torch.float32)
    plain = task.closure()

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain()

    v = task.tangent()
    expected = products(task, v, "fisher", "graph")[0]
    for engine in EXACT:
        with ClosureOracle(closure, task.params, engine=engine) as oracle:
            product = flat(oracle.trace("fisher").product(v))
        assert (product - expected).norm() < 0.03 * expected.norm()  # 8 bits, a few roundings


@pytest.mark.parametrize("engine", [*EXACT, "auto"])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z: (z**2).sum(), "needs to know the likelihood of the labels"),
        (lambda z: F.huber_loss(z, ONES), r"calls F.huber_loss, whose Fisher matrix is not known"),
        (
            lambda z: F.cross_entropy(z, LABELS) + F.kl_div(z.log_softmax(1), ONES),
            "calls F.kl_div, whose Fisher",
        ),
        (lambda z: F.cross_entropy(z, LABELS) ** 2, "not a sum of the values of F.cross_entropy"),
        (lambda z: -F.cross_entropy(z, LABELS), "cross_entropy enter .* with a negative weight"),
        (lambda z: F.nll_loss(z * 1, LABELS), "input of F.nll_loss is not seen to be an output"),
        (
            lambda z: F.nll_loss(z.log_softmax(0), LABELS),
            r"along dimension 0 of an output of shape \(6, 3\).* give it dim=1",
        ),
        (lambda z: F.mse_loss(z, z.sin()), "of F.mse_loss .* are input and target, where a"),
        (lambda z: F.cross_entropy(z.detach(), z.softmax(1)), "F.cross_entropy .* are target,"),
        (lambda z: F.mse_loss(z[:, :1], ONES[:, :1].T), r"shape \(1, 6\), its input \(6, 1\)"),
        (lambda z: F.poisson_nll_loss(z.exp(), ONES, log_input=False), "use log_input=True"),
        (
            lambda z: F.mse_loss(F.mse_loss(z, ONES, reduction="none"), ONES),
            "not a sum of the values of F.mse_loss",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction.*batchmean")
def test_a_loss_without_a_fisher_matrix_is_refused(loss, message, engine):
    task = with_loss(problem("mlp"), loss)
    for curvature in ("fisher", "empirical_fisher"):
        with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
            with pytest.raises(NoLikelihoodError, match=message):
                oracle.trace(curvature)
        with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
            with pytest.raises(NoLikelihoodError, match=message):
                oracle.trace_along(task.tangent(), curvature)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_reductions_and_finite_differences_are_refused():
    task = with_loss(problem("mlp"), lambda z: F.cross_entropy(z, LABELS, size_average=False))
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(NoLikelihoodError, match="called with size_average or reduce"):
            oracle.trace("fisher")
    with ClosureOracle(task.closure(), task.params, engine="finite_difference") as oracle:
        with pytest.raises(ValueError, match="Hessian, not the GGN or a Fisher"):
            oracle.trace("fisher")
