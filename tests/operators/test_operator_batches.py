"""Several batches weigh as the joined batch does, or are refused."""

import pytest
import torch
import torch.nn.functional as F
from operator_cases import OPERATORS, close, cross_entropy_of, ragged, ten_examples
from problems import flat, problem
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hvpopt.engines.reduction import UnknownReductionError
from hvpopt.operators import HessianOperator, split_batch


@pytest.fixture
def data():
    return ten_examples()


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("engine", ["dual", "graph"])
def test_ragged_batches_are_the_joined_batch(kind, engine, data):
    net = problem("mlp").net
    loss = cross_entropy_of(net)
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
    loss = cross_entropy_of(net)
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


def test_the_loss_over_several_batches_keeps_its_precision(data):
    w = torch.full((4,), 1 / 3, dtype=torch.bfloat16, requires_grad=True)
    batches = [x.float() for x, _ in ragged(data)]
    op = HessianOperator(lambda x: F.mse_loss(x @ w.float(), torch.zeros(len(x))), [w], batches)
    joined = torch.cat(batches) @ w.detach().float()
    assert op.loss().dtype == torch.float32
    close(op.loss(), joined.pow(2).mean(), rtol=1e-6)


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
