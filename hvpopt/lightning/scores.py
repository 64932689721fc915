"""Example-averaged F1, at a threshold that is chosen on validation data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from hvpopt.options import check_count

__all__ = ["ExampleF1", "MultiLabelF1"]


class ExampleF1(Metric):
    """The F1 score of each example, averaged over the examples, at each threshold: `[K]`.

    A label is predicted where its soft value is above the threshold. F1 is 2 |p ∧ t| / (|p| + |t|)
    of predicted labels p and right ones t, and 1 where both are empty. (It is not the F1 of each
    label averaged over the labels, another number.)

    Args:
        thresholds: `[K]`.
    """

    full_state_update = False
    higher_is_better = True
    thresholds: Tensor
    totals: Tensor
    count: Tensor

    def __init__(self, thresholds: Tensor) -> None:
        super().__init__()
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.add_state("totals", torch.zeros(len(thresholds), dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), "sum")

    def update(self, y: Tensor, target: Tensor) -> None:
        """Counts soft labels y in [0, 1] and right labels of 0 and 1, both `[B, L]`."""
        positives = target.sum(1)
        scores = []
        for threshold in self.thresholds.to(y.dtype):
            predicted = (y > threshold).to(target.dtype)
            total = predicted.sum(1) + positives
            f1 = 2 * torch.linalg.vecdot(predicted, target) / total.clamp_min(1)
            scores.append(torch.where(total > 0, f1, 1.0).sum())
        self.totals = self.totals + torch.stack(scores)
        self.count = self.count + len(target)

    def compute(self) -> Tensor:
        """The averages `[K]`."""
        return self.totals / self.count


class MultiLabelF1(nn.Module):
    """The score `f1` of a multi-label task: the threshold that is best on the validation rows is
    kept (also in checkpoints), and used on the test rows.

    Args:
        num_thresholds: how many are tried, with evenly spaced logits between -6 and 6: where labels
            are rare, the best threshold is small.

    Raises:
        ValueError: if there is none.
    """

    threshold_index: Tensor
    main_figure = "f1"

    def __init__(self, num_thresholds: int = 121) -> None:
        super().__init__()
        count = check_count("num_thresholds", num_thresholds)
        thresholds = torch.linspace(-6, 6, count).sigmoid()
        self.val = ExampleF1(thresholds)
        self.test = ExampleF1(thresholds)
        self.register_buffer("threshold_index", torch.tensor(count // 2))

    @property
    def threshold(self) -> float:
        """Above which a label is predicted."""
        return float(self.val.thresholds[self.threshold_index])

    def update(self, stage: str, y: Tensor, target: Tensor) -> None:
        """Counts a batch of the stage "val" or "test"."""
        (self.val if stage == "val" else self.test).update(y, target)

    def figures(self, stage: str) -> dict[str, float]:
        """The scores of all rows of a stage, which are then forgotten; those of "val" set the
        threshold."""
        metric = self.val if stage == "val" else self.test
        f1 = metric.compute().reshape(-1)  # torchmetrics squeezes a single score
        metric.reset()
        if stage == "val":
            self.threshold_index.copy_(f1.argmax())
        return {"f1": float(f1[self.threshold_index]), "threshold": self.threshold}
