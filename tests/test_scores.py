"""The example-averaged F1 and its threshold."""

import math

import pytest
import torch
from sklearn.metrics import f1_score
from torchmetrics.functional.classification import multilabel_f1_score

from hvpopt.lightning.scores import ExampleF1, MultiLabelF1


def soft_and_right(count=60, num_labels=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(count, num_labels, generator=generator)
    target = (torch.rand(count, num_labels, generator=generator) < y).float()
    return y, target


def test_each_threshold_has_scikit_learns_score_averaged_over_examples():
    y, target = soft_and_right()
    thresholds = torch.tensor([0.2, 0.5, 0.8])
    metric = ExampleF1(thresholds)
    for part in (slice(0, 25), slice(25, 60)):
        metric.update(y[part], target[part])
    expected = [
        f1_score(target, y > threshold, average="samples", zero_division=1.0)
        for threshold in thresholds
    ]
    torch.testing.assert_close(metric.compute(), torch.tensor(expected, dtype=torch.float64))


def test_torchmetrics_gives_the_same_example_by_example():
    y, target = soft_and_right()
    metric = ExampleF1(torch.tensor([0.4]))
    metric.update(y, target)
    each = [
        multilabel_f1_score(
            y[i : i + 1], target[i : i + 1].long(), 7, threshold=0.4, average="micro"
        )
        for i in range(len(y))
    ]
    torch.testing.assert_close(metric.compute(), torch.stack(each).mean().double())


def test_an_example_without_labels_counts_one_where_nothing_is_predicted_and_else_zero():
    metric = ExampleF1(torch.tensor([0.5]))
    metric.update(torch.tensor([[0.1, 0.2], [0.1, 0.9]]), torch.zeros(2, 2))
    assert metric.compute() == 0.5


def test_the_threshold_is_the_best_of_the_validation_rows_and_serves_the_test_rows():
    scores = MultiLabelF1(num_thresholds=13)
    # the threshold σ(1) = 0.73 alone is right everywhere
    y = torch.tensor([[0.62, 0.8, 0.1], [0.78, 0.64, 0.61]])
    target = torch.tensor([[0.0, 1, 0], [1, 0, 0]])
    scores.update("val", y, target)
    by_hand = {}
    for logit in range(-6, 7):
        threshold = 1 / (1 + math.exp(-logit))
        p = (y > threshold).float()
        f1 = 2 * (p * target).sum(1) / (p.sum(1) + target.sum(1))
        by_hand[threshold] = float(f1.mean())
    figures = scores.figures("val")
    assert figures == {"f1": 1.0, "threshold": pytest.approx(1 / (1 + math.exp(-1)))}
    assert [threshold for threshold, f1 in by_hand.items() if f1 == 1] == pytest.approx(
        [figures["threshold"]]
    )
    scores.update("test", y + 0.1, target)
    p = (y + 0.1 > scores.threshold).float()
    expected = (2 * (p * target).sum(1) / (p.sum(1) + target.sum(1))).mean()
    assert scores.figures("test") == {
        "f1": pytest.approx(float(expected)),
        "threshold": scores.threshold,
    }


def test_figures_forget_the_rows_that_they_are_of():
    y, target = soft_and_right()
    scores = MultiLabelF1()
    scores.update("val", y, target)
    first = scores.figures("val")
    scores.update("val", y, target)
    assert scores.figures("val") == first


def test_the_threshold_travels_in_the_state():
    y, target = soft_and_right()
    scores, other = MultiLabelF1(), MultiLabelF1()
    scores.update("val", y, target)
    scores.figures("val")
    assert scores.threshold != other.threshold
    other.load_state_dict(scores.state_dict())
    assert scores.threshold == other.threshold


def test_no_threshold_is_refused():
    with pytest.raises(ValueError, match="num_thresholds=0 is out of range"):
        MultiLabelF1(0)
