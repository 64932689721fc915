"""Numbers of terms against the ratio of each loss function's own sum to its mean."""

import pytest
import torch
import torch.nn.functional as F

from hvpopt.engines import reduction as module
from hvpopt.engines.reduction import Reduction, TermCount, UnknownReductionError

CLASSES = torch.tensor([0, 2, 1, -100, 2, 0])
CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


Z = normal(6, 3).requires_grad_()
T = normal(6, 3, seed=1)
P = T.softmax(1)
SIGNS = torch.where(T > 0, 1.0, -1.0).double()
IMAGE = normal(2, 3, 4, 5).requires_grad_()
PIXELS = torch.randint(-1, 3, (2, 4, 5), generator=torch.Generator().manual_seed(0))

CASES = {
    "cross_entropy": lambda **r: F.cross_entropy(Z, CLASSES, **r),
    "cross_entropy, class weights": lambda **r: F.cross_entropy(Z, CLASSES, CLASS_WEIGHTS, **r),
    "cross_entropy, smoothed": lambda **r: F.cross_entropy(
        Z, CLASSES, CLASS_WEIGHTS, ignore_index=-100, label_smoothing=0.3, **r
    ),
    "cross_entropy, pixels": lambda **r: F.cross_entropy(IMAGE, PIXELS, ignore_index=-1, **r),
    "cross_entropy, probabilities": lambda **r: F.cross_entropy(Z, P, CLASS_WEIGHTS, **r),
    "cross_entropy, pixels' probabilities": lambda **r: F.cross_entropy(
        IMAGE, normal(2, 3, 4, 5).softmax(1), **r
    ),
    "cross_entropy, one example": lambda **r: F.cross_entropy(Z[0], torch.tensor(1), **r),
    "cross_entropy, one example's probabilities": lambda **r: F.cross_entropy(Z[0], P[0], **r),
    "nll_loss": lambda **r: F.nll_loss(Z.log_softmax(1), CLASSES, CLASS_WEIGHTS, **r),
    "mse_loss": lambda **r: F.mse_loss(Z, T, **r),
    "mse_loss, weighted": lambda **r: F.mse_loss(Z, T, weight=P, **r),
    "l1_loss": lambda **r: F.l1_loss(Z, T, **r),
    "smooth_l1_loss": lambda **r: F.smooth_l1_loss(Z, T, **r),
    "huber_loss": lambda **r: F.huber_loss(Z, T, **r),
    "huber_loss, weighted": lambda **r: F.huber_loss(Z, T, weight=P, **r),
    "binary_cross_entropy": lambda **r: F.binary_cross_entropy(Z.sigmoid(), P, **r),
    "binary_cross_entropy, weighted": lambda **r: F.binary_cross_entropy(
        Z.sigmoid(), P, weight=CLASS_WEIGHTS, **r
    ),
    "binary_cross_entropy_with_logits": lambda **r: F.binary_cross_entropy_with_logits(
        Z, P, weight=P, pos_weight=CLASS_WEIGHTS, **r
    ),
    "kl_div": lambda **r: F.kl_div(Z.log_softmax(1), P, **r),
    "poisson_nll_loss": lambda **r: F.poisson_nll_loss(Z, P, **r),
    "gaussian_nll_loss": lambda **r: F.gaussian_nll_loss(Z, T, P[:, :1], **r),
    "soft_margin_loss": lambda **r: F.soft_margin_loss(Z, SIGNS, **r),
    "hinge_embedding_loss": lambda **r: F.hinge_embedding_loss(Z, SIGNS, **r),
    "margin_ranking_loss": lambda **r: F.margin_ranking_loss(Z, T, SIGNS, **r),
    "cosine_embedding_loss": lambda **r: F.cosine_embedding_loss(Z, T, SIGNS[:, 0], **r),
    "multilabel_soft_margin_loss": lambda **r: F.multilabel_soft_margin_loss(Z, P.round(), **r),
    "multi_margin_loss": lambda **r: F.multi_margin_loss(Z, CLASSES.clamp(0), **r),
    "multilabel_margin_loss": lambda **r: F.multilabel_margin_loss(
        Z, torch.tensor([[0, 1, -1]] * 6), **r
    ),
    "triplet_margin_loss": lambda **r: F.triplet_margin_loss(Z, T, P, **r),
}
if hasattr(F, "linear_cross_entropy"):
    CASES["linear_cross_entropy"] = lambda **r: F.linear_cross_entropy(
        Z, normal(3, 3), CLASSES, weight=CLASS_WEIGHTS, **r
    )


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides the total loss")
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_terms_is_the_ratio_of_sum_to_mean(name):
    with Reduction() as reduction:
        mean = CASES[name]()
        total = CASES[name](reduction="sum")
    counted = reduction.terms(mean)
    assert counted.kind == "mean"
    assert counted.number == pytest.approx(float((total / mean).detach()), rel=1e-9)
    assert reduction.terms(total) == TermCount("sum", 1.0)


def test_every_loss_function_that_is_known_has_a_case():
    names = {f.__name__ for f in module._DENOMINATORS}
    assert names - {name.partition(",")[0] for name in CASES} == {"ctc_loss"}


def test_a_connectionist_loss_counts_sequences():
    z = normal(7, 4, 5).log_softmax(-1).requires_grad_()
    targets = torch.tensor([[1, 2], [3, 4], [2, 1], [1, 1]])
    for lengths, sizes in (([7] * 4, [2] * 4), (torch.full((4,), 7), torch.full((4,), 2))):
        with Reduction() as reduction:
            loss = F.ctc_loss(z, targets, lengths, sizes)
        assert reduction.terms(loss).number == 4


def test_a_batchmean_counts_rows():
    with Reduction() as reduction:
        loss = F.kl_div(Z.log_softmax(1), P, reduction="batchmean")
    assert reduction.terms(loss) == TermCount("mean", 6.0)


def test_deprecated_options_count(recwarn):
    with Reduction() as reduction:
        mean = F.mse_loss(Z, T, size_average=True)
        total = F.mse_loss(Z, T, size_average=False)
        values = F.mse_loss(Z, T, reduce=False)
    assert reduction.terms(mean) == TermCount("mean", 18.0)
    assert reduction.terms(total) == TermCount("sum", 1.0)
    with pytest.raises(UnknownReductionError, match=r"F\.mse_loss with reduction='none'"):
        reduction.terms(values.mean())


def test_the_factor_of_each_call_is_that_of_the_chain_rule():
    with Reduction() as reduction:
        loss = 0.25 * F.mse_loss(Z, T) + F.mse_loss(Z, T).square() + Z.sum()
    expected = (0.25, 2 * float(F.mse_loss(Z, T).detach()))
    assert reduction.terms(loss).factors == pytest.approx(expected)


def test_losses_inside_transforms_are_not_taken_for_the_loss():
    with Reduction() as reduction:
        values = torch.func.vmap(F.mse_loss)(Z, T)
        slopes = torch.func.grad(lambda w: F.mse_loss(w * Z, T))(torch.ones(3).double())
    with pytest.raises(UnknownReductionError, match="depends on no loss function"):
        reduction.terms(values.mean() + slopes.sum())


def test_modules_of_losses_are_seen():
    with Reduction() as reduction:
        loss = torch.nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)(Z, CLASSES)
    assert reduction.terms(loss).number == pytest.approx(5.4)
