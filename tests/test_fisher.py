"""Fisher products against dense Jacobians and sums of outer products over enumerated labels."""

import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, flat, problem
from torch import Tensor, nn

from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineChoice
from hvpopt.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    MonteCarlo,
    NoLikelihoodError,
    Poisson,
)
from hvpopt.products.fisher import fisher_vp

ENGINES = ["dual", "graph"]
KINDS = ["fisher", "fisher_mc", "empirical_fisher"]
Block = tuple[float, Tensor, Iterable[tuple[float, Tensor]]]


def with_loss(task: Problem, loss: Callable[[Tensor], Tensor]) -> Problem:
    task.loss = loss
    return task


def outputs(task: Problem) -> tuple[Tensor, Tensor]:
    """The network's output and its dense Jacobian, one row an entry of z."""
    output, theta = task._flat()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(output, theta)
    return output(theta).detach(), jacobian.reshape(-1, theta.numel())


def dense(jacobian: Tensor, blocks: Iterable[Block]) -> Tensor:
    """Σ weight Σ chance (Jᵀu)(Jᵀu)ᵀ over blocks (weight, entries of z, [(chance, u)])."""
    total = jacobian.new_zeros(jacobian.shape[1], jacobian.shape[1])
    for weight, rows, labels in blocks:
        for chance, u in labels:
            g = jacobian[rows].T @ u
            total += weight * chance * torch.outer(g, g)
    return total


def slope(nll: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.func.grad(nll)(z)


def classes(z: Tensor) -> list[tuple[float, Tensor]]:
    """Every class of one row of logits with its probability and the gradient of its loss."""
    p = z.softmax(0)
    labels = range(len(z))
    return [(float(p[k]), slope(lambda s, k=k: -F.log_softmax(s, 0)[k], z)) for k in labels]


def bits(z: Tensor) -> list[tuple[float, Tensor]]:
    """Every binary vector with its probability and the gradient of its loss."""
    pairs = []
    for label in itertools.product((0.0, 1.0), repeat=len(z)):
        y = z.new_tensor(label)

        def nll(s: Tensor, y: Tensor = y) -> Tensor:
            return F.binary_cross_entropy_with_logits(s, y, reduction="sum")

        pairs.append((math.exp(-float(nll(z))), slope(nll, z)))
    return pairs


def rows(z: Tensor) -> Tensor:
    """The positions of z's entries in a row of the Jacobian, one row an example."""
    return torch.arange(z.numel()).reshape(len(z), -1)


def products(task: Problem, v: list[Tensor], curvature, engine: str) -> list[Tensor]:
    """The product from `trace` and from `trace_along`."""
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product(v)
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        along = oracle.trace_along(v, curvature)[2]
    return [flat(product), flat(along)]


def check(task: Problem, matrix: Tensor, curvature, engines=ENGINES) -> None:
    v = task.tangent()
    for engine in engines:
        for product in products(task, v, curvature, engine):
            torch.testing.assert_close(product, matrix @ flat(v), rtol=1e-9, atol=1e-11)


# -- the exact Fisher -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "dropout", "transformer", "lstm"])
def test_the_fisher_of_a_classifier_is_the_sum_over_all_classes(name):
    task = problem(name)
    z, jacobian = outputs(task)
    blocks = [(1 / len(z), r, classes(s)) for r, s in zip(rows(z), z, strict=True)]
    check(task, dense(jacobian, blocks), "fisher")


def test_class_weights_and_ignored_classes_weigh_the_terms():
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 0, 2, 0])
    used = weight[y] * (y != 1)
    for reduction in ("mean", "sum"):
        options = {"weight": weight, "ignore_index": 1, "reduction": reduction}
        task = with_loss(problem("mlp"), lambda z, o=options: F.cross_entropy(z, y, **o))
        z, jacobian = outputs(task)
        scaled = used / used.sum() if reduction == "mean" else used
        triples = zip(scaled.tolist(), rows(z), z, strict=True)
        check(task, dense(jacobian, [(c, r, classes(s)) for c, r, s in triples]), "fisher")


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def tagger(loss: Callable[[Tensor], Tensor]) -> Problem:
    torch.manual_seed(3)
    return Problem(Tagger().double(), torch.randn(2, 3, 3, dtype=torch.float64), loss)


TAGS = torch.tensor([[0, 2, -100], [1, -100, 1]])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z.transpose(1, 2), TAGS),
        lambda z: F.cross_entropy(z.reshape(-1, 3), TAGS.reshape(-1)),
        lambda z: F.nll_loss(F.log_softmax(z.transpose(1, 2), dim=1), TAGS),
        lambda z: F.nll_loss(input=z.reshape(-1, 3).log_softmax(-1), target=TAGS.reshape(-1)),
        lambda z: F.cross_entropy(z.transpose(1, 2), TAGS, reduction="none").sum() / 4,
    ],
    ids=["permuted", "reshaped", "nll", "nll by keywords", "reduced by hand"],
)
def test_each_position_of_a_sequence_is_a_term(loss):
    task = tagger(loss)
    z, jacobian = outputs(task)
    places = zip(rows(z.reshape(-1, 3)), z.reshape(-1, 3), TAGS.reshape(-1), strict=True)
    kept = [(r, s, y) for r, s, y in places if y != -100]
    check(task, dense(jacobian, [(1 / 4, r, classes(s)) for r, s, _ in kept]), "fisher")
    given = [
        (1 / 4, r, [(1.0, slope(lambda q, y=y: F.cross_entropy(q, y), s))]) for r, s, y in kept
    ]
    check(task, dense(jacobian, given), "empirical_fisher")


def test_the_fisher_of_binary_labels_is_the_sum_over_all_binary_vectors():
    y = (torch.arange(18).reshape(6, 3) % 2).double()
    task = with_loss(problem("mlp"), lambda z: F.binary_cross_entropy_with_logits(z, y))
    z, jacobian = outputs(task)
    blocks = [(1 / z.numel(), r, bits(s)) for r, s in zip(rows(z), z, strict=True)]
    check(task, dense(jacobian, blocks), "fisher")


def test_the_fishers_of_normal_labels_and_of_counts_have_their_closed_forms():
    y = torch.ones(6, 3, dtype=torch.float64)
    task = with_loss(problem("mlp"), lambda z: F.mse_loss(y, z))  # symmetric
    z, jacobian = outputs(task)
    check(task, 2 / z.numel() * jacobian.T @ jacobian, "fisher")
    task = with_loss(problem("mlp"), lambda z: F.poisson_nll_loss(z, y, reduction="sum"))
    check(task, jacobian.T @ torch.diag(z.reshape(-1).exp()) @ jacobian, "fisher")


ONES = torch.ones(6, 3, dtype=torch.float64)
LOSSES = {
    "cross entropy": lambda z: F.cross_entropy(z, z.detach().softmax(1), label_smoothing=0.1),
    "nll": lambda z: F.nll_loss(torch.log_softmax(z, 1), torch.arange(6) % 3),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, 0.3 * ONES, pos_weight=2 * ONES),
    "squares": lambda z: F.mse_loss(z, ONES, reduction="none").mean(0).sum(),
    "counts": lambda z: F.poisson_nll_loss(z, ONES, full=True),
    "several": lambda z: (
        0.5 * F.cross_entropy(z, torch.arange(6) % 3)
        + F.mse_loss(z[:, 0], ONES[:, 0], reduction="sum")
    ),
}


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "batchnorm"])
def test_the_exact_fisher_is_the_ggn(name, loss, engine):
    task = with_loss(problem(name), LOSSES[loss])
    v = task.tangent()
    for ggn, fisher in zip(
        products(task, v, "ggn", engine), products(task, v, "fisher", engine), strict=True
    ):
        torch.testing.assert_close(fisher, ggn, rtol=1e-9, atol=1e-11)


def test_what_becomes_of_a_loss_scales_its_matrix_also_in_place():
    def loss(z: Tensor) -> Tensor:
        value = F.cross_entropy(z, torch.arange(6) % 3)
        value /= 4
        value += 1
        return value * 2

    whole, scaled = problem("mlp"), with_loss(problem("mlp"), loss)
    v = whole.tangent()
    for curvature in KINDS:
        for engine in ENGINES:
            ours, plain = (products(t, v, curvature, engine) for t in (scaled, whole))
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, 0.5 * b)


# -- sampled and empirical ---------------------------------------------------------------------


def test_the_empirical_fisher_is_the_mean_of_per_example_gradients():
    y = torch.tensor([0, 2, 1, 0, 2, 0])
    target = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)
    losses: list[tuple[Callable, Tensor, int]] = [
        (F.cross_entropy, y, 6),
        (F.mse_loss, target, 18),
        (F.binary_cross_entropy_with_logits, target, 18),
        (F.poisson_nll_loss, target, 18),
    ]
    for func, labels, count in losses:
        task = with_loss(problem("mlp"), lambda z, f=func, t=labels: f(z, t))
        matrix = 0.0
        for n in range(6):
            one = func(task.net(task.x[n : n + 1]), labels[n : n + 1], reduction="sum")
            g = flat(list(torch.autograd.grad(one, task.params)))
            matrix = matrix + torch.outer(g, g) / count
        check(task, matrix, "empirical_fisher")


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(), Poisson()], ids=str)
def test_the_sampled_fisher_is_the_dense_one_of_its_labels(likelihood):
    func, mean = {
        "Categorical": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), 1 / 6),
        "Bernoulli": (lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"), 1),
        "Gaussian": (lambda z, y: F.mse_loss(z, y, reduction="sum"), 1),
        "Poisson": (lambda z, y: F.poisson_nll_loss(z, y, reduction="sum"), 1),
    }[type(likelihood).__name__]
    y = torch.arange(6) % 3 if mean != 1 else ONES
    task = with_loss(problem("mlp"), lambda z: mean * func(z, y))
    z, jacobian = outputs(task)
    sampling = MonteCarlo(num_samples=3, seed=7)
    generator = sampling.generator()
    labels = [likelihood.sample(z, generator) for _ in range(3)]
    blocks = [
        (
            mean / 3,
            rows(z)[n],
            [(1.0, slope(lambda s, n=n, k=k: func(s[None], k[n : n + 1]), z[n]))],
        )
        for n in range(6)
        for k in labels
    ]
    check(task, dense(jacobian, blocks), sampling)


def test_labels_are_the_same_for_all_products_of_a_trace_and_differ_between_seeds():
    task = problem("mlp")
    u, v = task.tangent(1), task.tangent(2)
    for engine in ENGINES:
        with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
            product = oracle.trace("fisher_mc").product
            first = flat(product(v))
            torch.testing.assert_close(flat(u) @ first, flat(v) @ flat(product(u)))
            assert torch.equal(flat(product(v)), first)
        default = products(task, v, MonteCarlo(num_samples=1, seed=0), engine)[0]
        torch.testing.assert_close(default, first)
        assert not torch.allclose(products(task, v, MonteCarlo(seed=1), engine)[0], first)


def test_the_sampled_fisher_is_unbiased():
    task = problem("mlp")
    v = flat(task.tangent())
    z, jacobian = outputs(task)
    exact = dense(jacobian, [(1 / 6, r, classes(s)) for r, s in zip(rows(z), z, strict=True)])
    along = (jacobian @ v).reshape(6, 3)
    generator = torch.Generator().manual_seed(0)

    def forms(num_samples: int) -> float:  # vᵀ F v of the model z itself
        product = fisher_vp(
            lambda p: p,
            "categorical",
            z,
            along,
            kind="monte_carlo",
            num_samples=num_samples,
            generator=generator,
        )
        return float((along * product).sum())

    samples = torch.tensor([forms(10) for _ in range(300)], dtype=torch.float64)
    error = (samples.mean() - v @ exact @ v) / (samples.std() / math.sqrt(len(samples)))
    assert abs(error) < 4  # standard errors


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_fisher_is_symmetric_and_positive_semidefinite(engine, curvature):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    task = Problem(net, x, lambda z: F.cross_entropy(z, torch.arange(4) % 3))
    basis = torch.eye(sum(p.numel() for p in task.params), dtype=torch.float64)
    sizes = [p.numel() for p in task.params]
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product
        columns = []
        for e in basis:
            parts = zip(e.split(sizes), task.params, strict=True)
            columns.append(flat(product([q.view_as(p) for q, p in parts])))
    matrix = torch.stack(columns)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12
    assert torch.linalg.eigvalsh(matrix).max() > 1e-3


# -- closures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
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


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("curvature", [*KINDS, MonteCarlo(2, 3)])
@pytest.mark.parametrize("name", ["batchnorm", "dropout"])
def test_a_fisher_trace_leaves_the_world_as_one_plain_run_does(name, curvature, engine):
    plain, task = problem(name), problem(name)
    torch.manual_seed(5)
    plain.closure()()
    expected = torch.rand(3)
    torch.manual_seed(5)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        point = oracle.trace(curvature)
        point.product(task.tangent())
    assert torch.equal(torch.rand(3), expected)
    for ours, theirs in zip(task.params, plain.params, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(task.net.buffers(), plain.net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


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
    for engine in ENGINES:
        with ClosureOracle(closure, task.params, engine=engine) as oracle:
            product = flat(oracle.trace("fisher").product(v))
        assert (product - expected).norm() < 0.03 * expected.norm()  # 8 bits, a few roundings


LABELS = torch.arange(6) % 3


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
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
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(
            ValueError, match=r"curvature='kfac' is unknown.* 'empirical_fisher', or"
        ):
            oracle.trace("kfac")


# -- functional --------------------------------------------------------------------------------


def mlp() -> tuple[Callable, dict[str, Tensor], dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = {"first": normal(2, 4), "bias": normal(4), "second": normal(4, 3)}
    v = {key: normal(*p.shape) for key, p in params.items()}

    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ p["first"] + p["bias"]) @ p["second"]

    return model, params, v, normal(5, 2)


def jacobian_of(model, params, x) -> tuple[Tensor, Tensor]:
    parts = torch.func.jacrev(model)(params, x)
    z = model(params, x)
    return z, torch.cat([parts[key].reshape(z.numel(), -1) for key in params], 1)


def values(tree: dict[str, Tensor]) -> Tensor:
    return flat(list(tree.values()))


def test_the_functional_fishers_are_the_dense_ones():
    model, params, v, x = mlp()
    z, jacobian = jacobian_of(model, params, x)
    for reduction, count in (("mean", 5), ("sum", 1)):
        blocks = [(1 / count, r, classes(s)) for r, s in zip(rows(z), z, strict=True)]
        product = fisher_vp(model, "categorical", params, v, x, reduction=reduction)
        expected = dense(jacobian, blocks) @ values(v)
        torch.testing.assert_close(values(product), expected, rtol=1e-9, atol=1e-11)
    for reduction, count in (("mean", 15), ("sum", 1)):
        blocks = [(1 / count, r, bits(s)) for r, s in zip(rows(z), z, strict=True)]
        product = fisher_vp(model, "bernoulli", params, v, x, reduction=reduction)
        expected = dense(jacobian, blocks) @ values(v)
        torch.testing.assert_close(values(product), expected, rtol=1e-9, atol=1e-11)
    for likelihood, inner in (
        ("gaussian", 2 * torch.ones_like(z)),
        (Gaussian(variance=4.0), 0.25 * torch.ones_like(z)),
        ("poisson", z.exp()),
    ):
        product = fisher_vp(model, likelihood, params, v, x, reduction="sum")
        expected = jacobian.T @ (inner.reshape(-1) * (jacobian @ values(v)))
        torch.testing.assert_close(values(product), expected, rtol=1e-9, atol=1e-11)


def test_the_functional_empirical_fisher_takes_the_given_labels():
    model, params, v, x = mlp()
    z, jacobian = jacobian_of(model, params, x)
    y = torch.tensor([0, 2, -100, 1, 2])
    kept = [n for n in range(5) if n != 2]
    given = [
        (1 / 4, rows(z)[n], [(1.0, slope(lambda s, n=n: F.cross_entropy(s, y[n]), z[n]))])
        for n in kept
    ]
    product = fisher_vp(model, "categorical", params, v, x, kind="empirical", targets=y)
    torch.testing.assert_close(values(product), dense(jacobian, given) @ values(v))
    exact = dense(jacobian, [(1 / 4, rows(z)[n], classes(z[n])) for n in kept])
    product = fisher_vp(model, "categorical", params, v, x, targets=y)
    torch.testing.assert_close(values(product), exact @ values(v))
    soft = F.one_hot(y.clamp(0), 3).double()
    whole = torch.tensor([0, 2, 0, 1, 2])
    hard, alike = (
        fisher_vp(model, "categorical", params, v, x, kind="empirical", targets=t)
        for t in (whole, soft)
    )
    torch.testing.assert_close(values(alike), values(hard))


def test_the_functional_sampled_fisher_is_the_dense_one_of_its_labels():
    model, params, v, x = mlp()
    z, jacobian = jacobian_of(model, params, x)
    generator = torch.Generator().manual_seed(4)
    labels = [Categorical().sample(z, generator) for _ in range(2)]
    blocks = [
        (1 / 10, rows(z)[n], [(1.0, slope(lambda s, n=n, k=k: F.cross_entropy(s, k[n]), z[n]))])
        for n in range(5)
        for k in labels
    ]
    options = {"kind": "monte_carlo", "num_samples": 2, "generator": generator.manual_seed(4)}
    product = fisher_vp(model, "categorical", params, v, x, **options)
    torch.testing.assert_close(values(product), dense(jacobian, blocks) @ values(v))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian", "poisson"])
@pytest.mark.parametrize("kind", ["exact", "monte_carlo", "empirical"])
def test_products_compose_with_vmap_over_directions(likelihood, kind):
    model, params, v, x = mlp()
    y = torch.arange(5) % 3 if likelihood == "categorical" else torch.ones(5, 3).double()

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return fisher_vp(model, likelihood, params, v, x, kind=kind, targets=y, generator=generator)

    several = {key: torch.stack([t, 2 * t, t.sin()]) for key, t in v.items()}
    batched = torch.vmap(product, randomness="same")(several)
    for i in range(3):
        one = product({key: t[i] for key, t in several.items()})
        torch.testing.assert_close(values({k: t[i] for k, t in batched.items()}), values(one))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_products_can_be_differentiated(kind):
    model, params, v, x = mlp()
    y = torch.arange(5) % 3

    def form(t: Tensor) -> Tensor:
        moved = {key: p + t * v[key] for key, p in params.items()}
        product = fisher_vp(model, "categorical", moved, v, x, kind=kind, targets=y)
        return sum((v[key] * product[key]).sum() for key in v)

    zero, h = torch.zeros((), dtype=torch.float64), 1e-5
    expected = (form(zero + h) - form(zero - h)) / (2 * h)  # error of order h²
    torch.testing.assert_close(torch.func.grad(form)(zero), expected, rtol=1e-7, atol=1e-8)


def test_products_of_an_ensemble_by_vmap_over_parameters():
    model, params, v, x = mlp()
    several = {key: torch.stack([p, 2 * p]) for key, p in params.items()}
    batched = torch.vmap(lambda p: fisher_vp(model, "categorical", p, v, x))(several)
    for i in range(2):
        one = fisher_vp(model, "categorical", {k: p[i] for k, p in several.items()}, v, x)
        torch.testing.assert_close(values({k: t[i] for k, t in batched.items()}), values(one))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "mc"}, ValueError, "kind='mc' is unknown: choose one of 'exact', 'monte_carlo'"),
        ({"reduction": "none"}, ValueError, "reduction='none' is unknown: choose one of 'mean'"),
        ({"likelihood": Gaussian}, TypeError, r"likelihood is the class Gaussian; expected a name"),
        ({"likelihood": "beta"}, ValueError, "likelihood='beta' is unknown: .* 'gaussian'"),
        ({"kind": "empirical"}, ValueError, "kind='empirical' needs the labels: pass targets="),
        ({"num_samples": 0}, ValueError, "num_samples=0; expected a positive integer"),
        ({"targets": torch.ones(4, dtype=torch.long)}, ValueError, r"\(4,\); expected \(5,\)"),
        ({"targets": torch.ones(5, 2)}, ValueError, r"\(5, 2\); expected \(5, 3\) for an output"),
        ({"v": {"first": torch.ones(2)}}, ValueError, "expected the same structure"),
        ({"model": lambda p, x: [p["bias"]]}, TypeError, "returned a list; expected one tensor"),
        ({"model": lambda p, x: x > 0}, TypeError, "the model's output is torch.bool"),
    ],
)
def test_a_bad_argument_of_fisher_vp_is_named(options, error, message):
    model, params, v, x = mlp()
    given = {"model": model, "likelihood": "categorical", "v": v, **options}
    rest = {k: o for k, o in given.items() if k not in ("model", "likelihood", "v")}
    with pytest.raises(error, match=message):
        fisher_vp(given["model"], given["likelihood"], params, given["v"], x, **rest)
