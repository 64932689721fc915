"""The exact Fisher of closures against sums over enumerated labels and closed forms."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import KINDS, ONES, check, products, with_loss
from fisher_oracles import bits, classes, dense, outputs, rows, slope
from problems import EXACT, Problem, Recurrent, problem
from torch import Tensor


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


class Tagger(Recurrent):
    """Classifies every step."""

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


@pytest.mark.parametrize("engine", [*EXACT, "auto"])
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
        for engine in EXACT:
            ours, plain = (products(t, v, curvature, engine) for t in (scaled, whole))
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, 0.5 * b)
