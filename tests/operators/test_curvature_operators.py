"""Curvature operators of whole datasets against dense matrices of the joined batch."""

import copy
import gc
import random
import weakref

import lightning
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from problems import PROBLEMS, flat, problem
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hvpopt.engines.reduction import UnknownReductionError
from hvpopt.operators import (
    FisherOperator,
    GGNOperator,
    HessianOperator,
    NonDeterministicError,
    split_batch,
)

OPERATORS = {"hessian": HessianOperator, "ggn": GGNOperator}


def of_problem(task, kind="hessian", **options):
    """The operator of a problem's only batch, and its dense oracle."""
    torch.manual_seed(0)  # the oracle's dropout masks
    op = OPERATORS[kind](lambda x: task.loss(task.net(x)), task.params, [task.x], **options)
    return op, task.dense_hessian() if kind == "hessian" else task.dense_ggn()


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.fixture
def data():
    """Ten examples with classes, whose loss is far from constant over them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.2, 3, 10).double()[:, None], torch.arange(10) % 3


def ragged(data, sizes=(4, 1, 5)):
    return list(zip(*(t.split(sizes) for t in data), strict=True))


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_an_operator_is_the_dense_matrix(name, kind):
    task = problem(name)
    op, dense = of_problem(task, kind)
    close(op.to_dense(), dense)
    v = flat(task.tangent())
    close(op @ v, dense @ v)


@pytest.mark.parametrize("engine", ["dual", "graph", "finite_difference"])
def test_every_engine_is_available(engine):
    op, dense = of_problem(problem("dropout"), engine=engine)
    v = flat(problem("dropout").tangent())
    tolerance = 1e-7 if engine == "finite_difference" else 1e-9
    for _ in range(2):
        close(op @ v, dense @ v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("engine", ["dual", "graph"])
def test_ragged_batches_are_the_joined_batch(kind, engine, data):
    net = problem("mlp").net
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
    whole = OPERATORS[kind](loss, net.parameters(), [data])
    parts = OPERATORS[kind](loss, net.parameters(), ragged(data), engine=engine)
    kept = OPERATORS[kind](loss, net.parameters(), ragged(data), retain_graphs=True)
    micro = OPERATORS[kind](loss, net.parameters(), [data], micro_batch_size=3)
    v = flat(problem("mlp").tangent())
    for op in (parts, kept, micro):
        for _ in range(2):
            close(op @ v, whole @ v)
            close(flat(op.gradient()), flat(whole.gradient()))
            close(op.loss(), whole.loss())
    vs = torch.stack([v, v.flip(0)], dim=1)
    close(parts @ vs, whole @ vs)
    close(whole.loss(), loss(data).detach())
    close(flat(whole.gradient()), flat(torch.autograd.grad(loss(data), list(net.parameters()))))


LOSSES = {
    "ignored targets": lambda z, y: F.cross_entropy(z, torch.where(y == 1, -100, y)),
    "class weights": lambda z, y: F.cross_entropy(
        z, y, weight=torch.tensor([1.0, 5.0, 0.1]).double()
    ),
    "smoothed, weighted and ignored": lambda z, y: F.cross_entropy(
        z, y, torch.tensor([1.0, 5.0, 0.1]).double(), ignore_index=2, label_smoothing=0.2
    ),
    "weight decay": lambda z, y: 0.5 * F.cross_entropy(z, y),
    "class probabilities": lambda z, y: F.cross_entropy(z, F.one_hot(y, 3).double() * 0.9 + 0.03),
    "negative log-likelihood": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double()),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double()),
    "divergence": lambda z, y: F.kl_div(
        F.log_softmax(z, 1), F.one_hot(y, 3).double() * 0.9 + 0.03, reduction="batchmean"
    ),
    "two losses over the same terms": lambda z, y: (
        F.mse_loss(z, F.one_hot(y, 3).double()) + 2 * F.huber_loss(z, F.one_hot(y, 3).double())
    ),
}


@pytest.mark.parametrize("engine", ["dual", "graph"])
@pytest.mark.parametrize("name", LOSSES)
def test_batches_weigh_as_their_loss_function_does(name, engine, data):
    net = problem("mlp").net

    def loss(batch):
        value = LOSSES[name](net(batch[0]), batch[1])
        if name == "weight decay":
            value += 0.1 * sum((p**2).sum() for p in net.parameters())
        return value

    whole = HessianOperator(loss, net.parameters(), [data])
    parts = HessianOperator(loss, net.parameters(), ragged(data), engine=engine)
    v = flat(problem("mlp").tangent())
    close(parts @ v, whole @ v)
    close(parts.loss(), whole.loss())
    close(flat(parts.gradient()), flat(whole.gradient()))


def test_a_batch_without_terms_counts_for_nothing(data):
    net, (x, y) = problem("mlp").net, data
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
    y[4] = -100
    whole = HessianOperator(loss, net.parameters(), [(x, y)])
    v = flat(problem("mlp").tangent())
    for order in ([0, 1, 2], [1, 0, 2]):
        parts = HessianOperator(loss, net.parameters(), [ragged((x, y))[i] for i in order])
        close(parts @ v, whole @ v)
    empty = HessianOperator(loss, net.parameters(), [(x, y * 0 - 100)] * 2)
    with pytest.raises(ValueError, match="holds no term to take the loss's mean over"):
        empty.loss()


def test_the_number_of_terms_of_a_loss_by_hand_can_be_given(data):
    net = problem("mlp").net
    y = F.one_hot(data[1], 3).double()

    def mean(batch):
        return ((net(batch[0]) - batch[1]) ** 2).mean()

    def total(batch):
        return ((net(batch[0]) - batch[1]) ** 2).sum()

    v = flat(problem("mlp").tangent())
    for loss, num_terms in ((mean, lambda b: len(b[0])), (total, "sum")):
        whole = HessianOperator(loss, net.parameters(), [(data[0], y)])
        parts = HessianOperator(loss, net.parameters(), ragged((data[0], y)), num_terms=num_terms)
        close(parts @ v, whole @ v)
        refused = HessianOperator(loss, net.parameters(), ragged((data[0], y)))
        with pytest.raises(ValueError, match=r"no loss function of torch.nn.functional.*num_terms"):
            refused.matvec(problem("mlp").tangent())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, y: F.cross_entropy(z, y, reduction="none").mean(), "with reduction='none'"),
        (lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y), "with the factors 0.25;"),
        (lambda z, y: F.cross_entropy(z, y) * len(y), "factors 4 in one batch and 1 in another"),
        (lambda z, y: F.cross_entropy(z, y).sqrt(), "enters the loss with the factors"),
        (
            lambda z, y: F.cross_entropy(z, y) + F.mse_loss(z, z.detach() + 1),
            r"F.cross_entropy \(mean over 4\), F.mse_loss \(mean over 12\)",
        ),
        (
            lambda z, y: F.cross_entropy(z, y, reduction="sum" if len(y) == 1 else "mean"),
            "a mean over terms in one batch and a sum in another",
        ),
    ],
)
def test_what_cannot_be_weighted_is_refused(loss, message, data):
    net = problem("mlp").net
    parts = HessianOperator(lambda b: loss(net(b[0]), b[1]), net.parameters(), ragged(data))
    with pytest.raises(ValueError, match=message + ".*num_terms=|" + message):
        parts.gradient()
    whole = HessianOperator(lambda b: loss(net(b[0]), b[1]), net.parameters(), [data])
    assert torch.isfinite(whole.loss())  # a single batch needs no weight


def test_a_loss_in_place_is_no_disguise(data):
    net = problem("mlp").net

    def loss(batch):
        value = F.cross_entropy(net(batch[0]), batch[1], reduction="sum")
        value /= len(batch[0])
        return value

    parts = HessianOperator(loss, net.parameters(), ragged(data))
    with pytest.raises(ValueError, match="whether they make it a mean cannot be told"):
        parts.loss()


def test_losses_that_do_not_enter_the_loss_do_not_count(data):
    net = problem("mlp").net

    def loss(batch):
        z = net(batch[0])
        F.mse_loss(z, z.detach() + 1)
        F.l1_loss(z.detach(), z.detach() + 1)
        return {"loss": F.cross_entropy(z, batch[1])}

    whole = HessianOperator(loss, net.parameters(), [data])
    parts = HessianOperator(loss, net.parameters(), ragged(data))
    close(parts.loss(), whole.loss())


def test_a_single_batch_is_traced_once(data):
    net, calls = problem("mlp").net, []

    def loss(batch):
        calls.append(1)
        return F.cross_entropy(net(batch[0]), batch[1])

    op = HessianOperator(loss, net.parameters(), [data], engine="graph")
    v = problem("mlp").tangent()
    for _ in range(3):
        op @ v
    op.loss(), op.gradient(), op.to_dense()
    assert len(calls) == 1
    op.close()
    op @ v
    assert len(calls) == 2
    kept = HessianOperator(loss, net.parameters(), ragged(data), engine="graph", retain_graphs=True)
    calls.clear()
    for _ in range(3):
        kept @ v
    assert len(calls) == 3
    several = HessianOperator(loss, net.parameters(), ragged(data), engine="graph")
    calls.clear()
    several.to_dense()  # 64 vectors, one run a batch
    assert len(calls) == 3


def test_what_changes_is_traced_anew(data):
    task = problem("batchnorm")
    net, x, y = task.net, task.x.clone(), torch.arange(6) % 3
    batches = [(x, y)]
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
    op = HessianOperator(loss, net.parameters(), batches)
    v = task.tangent()

    def check():
        close(flat(op @ v), flat(HessianOperator(loss, net.parameters(), list(batches)) @ v))
        return flat(op @ v)

    seen = [check()]
    with torch.no_grad():
        net[0].weight.add_(0.1)
    seen.append(check())
    x[0].mul_(2)
    seen.append(check())
    batches[0] = (x.flip(0), y)
    seen.append(check())
    net.eval()
    seen.append(check())
    net[1].running_var.mul_(3)
    seen.append(check())
    net[0].bias.data = net[0].bias.data + 1
    seen.append(check())
    for i, product in enumerate(seen):
        for other in seen[:i]:
            assert not torch.allclose(product, other)


@pytest.mark.parametrize("name", ["batchnorm", "dropout", "lstm"])
def test_an_operator_leaves_no_trace(name):
    task = problem(name)
    y = torch.arange(len(task.x)) % 3
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(task.x, y), batch_size=4, shuffle=True, generator=generator)
    for p in task.params:
        p.grad = torch.ones_like(p)
    held = [p.grad for p in task.params]
    state = copy.deepcopy(task.net.state_dict())
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)

    def draws():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    before, expected = generator.get_state(), (draws(), draws())
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    assert draws() == expected[0]
    op = GGNOperator(lambda b: F.cross_entropy(task.net(b[0]), b[1]), task.params, loader)
    op @ task.tangent()
    op.matmat([torch.stack([x, x]) for x in task.tangent()])
    op.loss(), op.gradient(), op.check_deterministic()
    assert draws() == expected[1]
    assert torch.equal(generator.get_state(), before)
    assert all(
        p.grad is g and torch.equal(g, torch.ones_like(g))
        for p, g in zip(task.params, held, strict=True)
    )
    for key, value in task.net.state_dict().items():
        assert torch.equal(value, state[key])


def test_the_world_is_the_same_after_an_error():
    task = problem("batchnorm")
    state = copy.deepcopy(task.net.state_dict())

    def loss(x):
        value = task.loss(task.net(x))
        if len(x) == 2:
            raise KeyError("broken")
        return value

    op = HessianOperator(loss, task.params, [task.x, task.x[:2]], retain_graphs=True)
    random_state = torch.get_rng_state()
    with pytest.raises(KeyError, match="broken"):
        op.loss()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in task.params)
    for key, value in task.net.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_shuffling_loader_yields_the_same_batches_in_each_pass():
    task = problem("batchnorm")
    y = torch.arange(6) % 3
    seen = []

    def loss(batch):
        seen.append(batch[1].tolist())
        return F.cross_entropy(task.net(batch[0]), batch[1])

    loader = DataLoader(TensorDataset(task.x, y), batch_size=3, shuffle=True)
    op = HessianOperator(loss, task.params, loader)
    first, second = op.loss(), op.loss()
    assert seen[:2] == seen[2:4]
    assert torch.equal(first, second)


def test_dropout_masks_are_fixed_and_differ_between_batches():
    masks = []
    w = nn.Parameter(torch.ones(64))

    def loss(x):
        masks.append(F.dropout(torch.ones(64)))
        return F.mse_loss(w * masks[-1], x)

    op = HessianOperator(loss, [w], [torch.zeros(64)] * 2)
    op.loss()
    torch.rand(3)
    op.gradient()
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


def test_a_loss_that_changes_is_found_out():
    w, generator = nn.Parameter(torch.ones(3)), torch.Generator()

    def loss(x):
        return F.mse_loss(w * torch.rand(3, generator=generator), x)

    with pytest.raises(NonDeterministicError, match=r"gave losses that differ by .* generators"):
        HessianOperator(loss, [w], [torch.zeros(3)]).check_deterministic()
    HessianOperator(lambda x: F.mse_loss(w**2, x), [w], [torch.zeros(3)]).check_deterministic()


def test_a_block_is_the_dense_block_and_differentiates_by_it_alone():
    task = problem("mlp")
    op, dense = of_problem(task)
    close(op.block(task.net[2]).to_dense(), dense[25:49, 25:49])
    close(op.block([0, 1]).to_dense(), dense[:25, :25])
    assert op.block(slice(0, 2)).params == task.params[:2]
    close(op.block(1).gradient()[0], op.gradient()[1])


def test_operators_of_one_model_add_up():
    task = problem("mlp")
    H, hessian = of_problem(task)
    G, ggn = of_problem(task, "ggn")
    v = flat(task.tangent())
    close((0.9 * G + 0.1 * H).damped(0.5) @ v, 0.9 * ggn @ v + 0.1 * hessian @ v + 0.5 * v)


def test_scipy_finds_the_dense_eigenvalues():
    op, dense = of_problem(problem("batchnorm"))
    found = scipy.sparse.linalg.eigsh(op.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), torch.linalg.eigvalsh(dense)[-3:].numpy())


@pytest.mark.parametrize("retain_graphs", [False, True])
def test_the_exact_fisher_is_the_ggn(data, retain_graphs):
    net = problem("mlp").net
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
    ggn = GGNOperator(loss, net.parameters(), [data]).to_dense()
    op = FisherOperator(loss, net.parameters(), ragged(data), retain_graphs=retain_graphs)
    close(op.to_dense(), ggn)


def test_the_empirical_fisher_is_the_mean_of_outer_products(data):
    net = problem("mlp").net
    params = list(net.parameters())
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
    grads = torch.stack(
        [flat(torch.autograd.grad(loss(b), params)) for b in ragged(data, [1] * 10)]
    )
    op = FisherOperator(loss, params, ragged(data), kind="empirical")
    close(op.to_dense(), grads.T @ grads / 10)


def test_the_sampled_fisher_tends_to_the_exact_one_and_stays_the_same(data):
    net = problem("mlp").net
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
    params = list(net[-1].parameters())
    exact = FisherOperator(loss, params, ragged(data)).to_dense()
    op = FisherOperator(loss, params, ragged(data), kind="monte_carlo", num_samples=1000)
    sampled = op.to_dense()
    # standard errors of 1/√1000 a term
    assert (sampled - exact).norm() < 0.1 * exact.norm()
    close(op.to_dense(), sampled)
    other = FisherOperator(loss, params, ragged(data), kind="monte_carlo", num_samples=1000, seed=1)
    assert not torch.allclose(other.to_dense(), sampled)


def test_batches_sample_labels_independently(data):
    net = problem("mlp").net
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
    one, params = (data[0][:1], data[1][:1]), list(net[-1].parameters())
    alone = FisherOperator(loss, params, [one], kind="monte_carlo")
    many = FisherOperator(loss, params, [one] * 20, kind="monte_carlo")
    assert torch.linalg.matrix_rank(alone.to_dense()) == 1
    assert torch.linalg.matrix_rank(many.to_dense(), rtol=1e-9) > 1


def test_an_operator_works_inside_no_grad_and_inference_mode():
    op, dense = of_problem(problem("lstm"))
    v = flat(problem("lstm").tangent())
    with torch.no_grad():
        close(op @ v, dense @ v)
    op.close()
    task = problem("lstm")
    with torch.inference_mode():
        batch = task.x.clone()
        other = HessianOperator(lambda x: task.loss(task.net(x)), task.params, [batch])
        product = other @ v.clone()
        close(product, dense @ v)
        close(other @ v, dense @ v)


def test_graphs_go_with_the_operator(data):
    net = problem("mlp").net
    held = []

    def loss(batch):
        z = net(batch[0])
        held.append(weakref.ref(z))
        return F.cross_entropy(z, batch[1])

    gc.collect()
    gc.disable()
    try:
        with HessianOperator(loss, net.parameters(), [data], engine="graph") as op:
            op @ problem("mlp").tangent()
        op @ problem("mlp").tangent()
        del op
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def test_progress_shows_the_batches(data, capsys):
    net = problem("mlp").net
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
    HessianOperator(loss, net.parameters(), ragged(data)).loss()
    assert capsys.readouterr().err == ""
    HessianOperator(loss, net.parameters(), ragged(data), progress=True).matvec(
        problem("mlp").tangent()
    )
    assert "hessian products:" in capsys.readouterr().err


def test_products_of_frozen_and_unused_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    net[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2).double())
    params = [p for p in net.parameters() if p.requires_grad] + [unused]
    op = HessianOperator(lambda x: net(x).square().mean(), params, [torch.eye(2).double()])
    dense = op.to_dense()
    assert torch.equal(dense[-2:], torch.zeros(2, 7).double())
    assert float(dense[:5, :5].norm()) > 0


def test_batches_are_split_along_their_examples():
    batch = {"x": torch.arange(5), "pair": (torch.ones(5, 2), "name"), "scale": torch.tensor(2.0)}
    chunks = split_batch(batch, 2)
    assert [len(c["x"]) for c in chunks] == [2, 2, 1]
    assert [c["pair"][0].shape[0] for c in chunks] == [2, 2, 1]
    assert all(c["pair"][1] == "name" and float(c["scale"]) == 2.0 for c in chunks)
    with pytest.raises(ValueError, match="at least one example, got size = 0"):
        split_batch(batch, 0)
    with pytest.raises(ValueError, match="tensors of 2, 3 rows"):
        split_batch((torch.ones(2), torch.ones(3)), 1)
    with pytest.raises(TypeError, match="a str, holds no tensor"):
        split_batch("batch", 1)


X = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, r"data is a Tensor; expected an iterable of batches: .* data=\[batch\]"),
        ({"x": X}, r"data is a dict"),
        ((X, X), r"tuple of tensors, which may be one batch"),
        (3, r"data is a int; expected an iterable"),
        (iter([X]), r"can be read only once, .* give list\(data\)"),
        ((x for x in [X]), r"data is a generator, which can be read only once"),
    ],
)
def test_data_that_are_no_batches_are_refused(data, message):
    net = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=message):
        HessianOperator(lambda x: net(x).mean(), net.parameters(), data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": []}, ValueError, "params hold no tensor"),
        ({"params": X}, TypeError, "params is one tensor"),
        ({"params": [X]}, ValueError, r"params\[0\], of shape \(2, 2\), is no leaf"),
        ({"params": [3]}, TypeError, r"params\[0\] is a int"),
        ({"engine": "magic"}, ValueError, "engine='magic' is unknown"),
        ({"num_terms": "mean"}, TypeError, "num_terms='mean'; expected a function"),
        ({"micro_batch_size": 0}, ValueError, "micro_batch_size needs to be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named_at_once(change, error, message):
    net = nn.Linear(2, 1)
    options = {"params": net.parameters(), "data": [X], **change}
    with pytest.raises(error, match=message):
        HessianOperator(lambda x: net(x).mean(), **options)


def test_a_parameter_is_taken_once_and_kinds_are_known():
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="a parameter twice"):
        HessianOperator(lambda x: net(x).mean(), [net.weight, net.weight], [X])
    with pytest.raises(ValueError, match="kind='true' is unknown: choose one of 'exact'"):
        FisherOperator(lambda x: net(x).mean(), net.parameters(), [X], kind="true")


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda z: z, TypeError, r"returned a tensor of shape \(2, 1\) and dtype torch.float32"),
        (lambda z: 3, TypeError, "returned a int; expected a real scalar"),
        (lambda z: z.mean().detach(), ValueError, "requires no gradient"),
    ],
)
def test_a_loss_that_is_no_scalar_is_named(loss, error, message):
    net = nn.Linear(2, 1)
    with pytest.raises(error, match=message):
        HessianOperator(lambda x: loss(net(x)), net.parameters(), [X]).loss()


def test_data_without_a_batch_and_wrong_numbers_of_terms_are_named():
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="holds no batch; expected at least one"):
        HessianOperator(lambda x: net(x).mean(), net.parameters(), []).loss()
    op = HessianOperator(lambda x: net(x).mean(), net.parameters(), [X, X], num_terms=lambda x: -1)
    with pytest.raises(ValueError, match=r"num_terms returned -1\.0; expected how many terms"):
        op.loss()


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = problem("batchnorm").net

    def training_step(self, batch, batch_idx):
        value = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", value, on_epoch=True)
        return {"loss": value}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_epoch_end(self):
        x = problem("batchnorm").x
        before = dict(self.trainer.callback_metrics), torch.get_rng_state()
        self.operator = GGNOperator(
            lambda b: self.training_step(b, 0), self.parameters(), [(x, torch.arange(6) % 3)]
        )
        self.product = flat(self.operator @ problem("batchnorm").tangent())
        assert self.trainer.callback_metrics == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


def test_a_training_step_is_a_loss_in_its_own_scale(tmp_path):
    task, module = problem("batchnorm"), Classifier()
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        accelerator="cpu",
    )
    rows = TensorDataset(task.x, torch.arange(6) % 3)
    trainer.fit(module, DataLoader(rows, batch_size=3, num_workers=0))
    task.net.load_state_dict(module.net.state_dict())
    dense = task.dense_ggn()
    close(module.product, dense @ flat(task.tangent()))
    close(flat(module.operator @ task.tangent()), dense @ flat(task.tangent()))


def test_the_labels_of_batches_are_sampled_apart_from_those_of_neighbouring_seeds(data):
    net = nn.Linear(4, 3).double()
    batch = (data[0][:1], data[1][:1])

    def sampled(seed, number):
        loss = lambda b: F.cross_entropy(net(b[0]), b[1])  # noqa: E731
        op = FisherOperator(loss, net.parameters(), [batch] * number, kind="monte_carlo", seed=seed)
        return op.to_dense() * number

    # the second batch of seed s is not the first of seed s + 1
    pairs = [(sampled(s, 2) - sampled(s, 1), sampled(s + 1, 1)) for s in range(12)]
    assert not all(torch.allclose(second, first) for second, first in pairs)


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


def test_a_loader_over_an_iterable_dataset_is_data(data):
    net, (x, _) = nn.Linear(4, 2).double(), data
    loss = lambda x: F.mse_loss(net(x), torch.ones(len(x), 2).double())  # noqa: E731
    streamed = HessianOperator(loss, net.parameters(), DataLoader(Stream(x), batch_size=4))
    close(streamed.to_dense(), HessianOperator(loss, net.parameters(), [x]).to_dense())


def test_a_complex_vector_of_scipy_keeps_its_imaginary_part(data):
    net, (x, _) = nn.Linear(4, 2).double(), data
    op = HessianOperator(lambda x: net(x).pow(4).mean(), net.parameters(), [x])
    a, b = np.arange(10.0), np.ones(10)
    found = op.to_scipy() @ (a + 1j * b)
    dense = op.to_dense().numpy()
    np.testing.assert_allclose(found, dense @ a + 1j * (dense @ b))


def test_the_loss_over_several_batches_keeps_its_precision(data):
    w = torch.full((4,), 1 / 3, dtype=torch.bfloat16, requires_grad=True)
    batches = [x.float() for x, _ in ragged(data)]
    op = HessianOperator(lambda x: F.mse_loss(x @ w.float(), torch.zeros(len(x))), [w], batches)
    joined = torch.cat(batches) @ w.detach().float()
    assert op.loss().dtype == torch.float32
    close(op.loss(), joined.pow(2).mean(), rtol=1e-6)


def test_a_penalty_beside_a_sum_is_refused_for_several_batches(data):
    net, (x, _) = nn.Linear(4, 2).double(), data

    def loss(x):
        error = F.mse_loss(net(x), torch.zeros(len(x), 2).double(), reduction="sum")
        return error + net.weight.pow(2).sum()

    params = list(net.parameters())
    close(HessianOperator(loss, params, [x]).loss(), loss(x).detach())
    for options in ({"data": [x, x]}, {"data": [x], "micro_batch_size": 5}):
        with pytest.raises(
            UnknownReductionError, match=r"adds something to a sum .*num_terms='sum'"
        ):
            HessianOperator(loss, params, **options).loss()
    twice = HessianOperator(loss, params, [x, x], num_terms="sum").loss()
    close(twice, 2 * loss(x).detach())
