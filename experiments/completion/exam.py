"""The questions about the test images, and how well each method answers them."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hvpopt.lightning.spen import SPENModule

from .answers import Gaussian, completed
from .data import PartlyKnownDigits
from .figure import Panel
from .questions import QUESTIONS, QuestionName
from .runs import CONTESTANTS, SPECIALISTS, trained
from .scores import Reader, Score

METHODS = {
    "energy": "energy",
    "feedforward": "feed-forward network",
    "gaussian": "Gaussian (a quadratic energy)",
    "specialist": "feed-forward network trained on these measurements",
}
SHOWN = {"feed-forward\nnetwork": "feedforward", "energy": "energy"}
"""The rows of the picture, and their methods."""
NOISES = (3e-4, 1e-3, 3e-3)
"""Among which the Gaussian's is chosen, on the validation images with scattered pixels known."""
NUM_SHOWN = 3

Scores = dict[str, dict[QuestionName, list[Score]]]
"""By method and question, one for each seed."""


class Exam:
    """All questions about the test images, the same for all.

    Args:
        data: The digits.
    """

    def __init__(self, data: PartlyKnownDigits) -> None:
        train, val = data.images("train"), data.images("val")
        self.reader = Reader(train, data.labels("train"))
        self.images, self.labels = data.images("test"), data.labels("test")
        self.views = {name: _view(name, self.images) for name in QUESTIONS}
        self.gaussian = _best_gaussian(train, val)
        self.whole = self.reader.accuracy(self.images, self.labels)

    def answer(self, name: QuestionName, module: SPENModule) -> Tensor:
        """A trained module's images, (count, 1, 8, 8)."""
        return completed(
            module.energy, module.minimizer, QUESTIONS[name], self.images, self.views[name]
        )

    def score(self, name: QuestionName, answer: Tensor) -> Score:
        """How good completed images are."""
        return self.reader.score(answer, self.images, self.views[name], self.labels)

    def scores(
        self, folder: Path, seeds: Sequence[int], overrides: Sequence[str] = ()
    ) -> tuple[Scores, dict[str, dict[QuestionName, Tensor]]]:
        """The scores of all methods, and the answers of those that the picture shows, of the first
        seed. The specialists have the first seed alone.

        Args:
            folder: Where trained runs are, or go.
            seeds: Of the trainings.
            overrides: Of their configuration.
        """
        scores: Scores = {method: {name: [] for name in QUESTIONS} for method in METHODS}
        shown: dict[str, dict[QuestionName, Tensor]] = {}
        for seed in seeds:
            for method in CONTESTANTS:
                module = trained(folder, method, seed, overrides)
                answers = {name: self.answer(name, module) for name in QUESTIONS}
                for name, answer in answers.items():
                    scores[method][name].append(self.score(name, answer))
                shown.setdefault(method, answers)
        for name, question in QUESTIONS.items():
            answer = self.gaussian.completed(question, self.images, self.views[name])
            scores["gaussian"][name].append(self.score(name, answer))
        for name in SPECIALISTS:
            module = trained(folder, f"specialist_{name}", seeds[0], overrides)
            scores["specialist"][name].append(self.score(name, self.answer(name, module)))
        return scores, shown

    def panel(
        self,
        name: QuestionName,
        answers: Mapping[str, Mapping[QuestionName, Tensor]],
        scores: Scores,
    ) -> Panel:
        """What the picture shows of a question, given the answers by method."""
        return Panel(
            QUESTIONS[name],
            self.images[:NUM_SHOWN],
            self.views[name][:NUM_SHOWN],
            {row: answers[m][name][:NUM_SHOWN] for row, m in SHOWN.items()},
            {row: f"error {mean_error(scores[m][name]):.3f}" for row, m in SHOWN.items()},
            "as in training" if name == "pixels" else "never in training",
        )


def mean_error(scores: Sequence[Score]) -> float:
    """The mean over the seeds."""
    return statistics.mean(score.error for score in scores)


def _view(name: QuestionName, images: Tensor) -> Tensor:
    return QUESTIONS[name].view(images, torch.Generator().manual_seed(0))


def _best_gaussian(train: Tensor, val: Tensor) -> Gaussian:
    view = _view("pixels", val)

    def error(noise: float) -> float:
        answer = Gaussian(train, noise).completed(QUESTIONS["pixels"], val, view)
        return float((answer - val).square().sum())

    return Gaussian(train, min(NOISES, key=error))
