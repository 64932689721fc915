"""The picture: digits, what is known of them, and how they are completed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .questions import QUESTIONS, SIDE, Question

HIDDEN = torch.tensor([0.72, 0.83, 1.0])
"""The colour of what is not known."""
FOOTNOTE = (
    "Blue is hidden; at its right and below are the sums. Error: root mean square of the hidden "
    "pixels (0 is white, 1 black) of all test digits."
)


@dataclass(frozen=True)
class Panel:
    """What is shown of a question: a few images beside each other."""

    question: Question
    images: Tensor
    """(count, 1, 8, 8)."""
    view: Tensor
    """(count, 2, 8, 8)."""
    answers: Mapping[str, Tensor]
    """(count, 1, 8, 8) each, by the names of their rows."""
    captions: Mapping[str, str]
    """What stands below the rows of answers, by their names."""
    remark: str
    """What stands below the title."""


def grey(image: Tensor) -> Tensor:
    """Ink as black on white, (height, width, 3), of (height, width) in [0, 1]."""
    return (1 - image.clamp(0, 1)).unsqueeze(-1).expand(-1, -1, 3)


def known(question: Question, image: Tensor, view: Tensor) -> Tensor:
    """A picture (height, width, 3) of what is known of an image (1, 8, 8), of view (2, 8, 8).

    Pixels and means are shown in their places; sums to the right of the hidden image and below it,
    in proportion to the largest.
    """
    if question.matrix is None:
        return torch.where(view[1].unsqueeze(-1) == 1, grey(view[0]), HIDDEN)
    if question is not QUESTIONS["sums"]:
        return grey(view[0])
    sums = question.matrix @ image.flatten()
    rows, columns = grey((sums / sums.max()).unsqueeze(0))[0].split(SIDE)
    drawn = torch.ones(SIDE + 2, SIDE + 2, 3)
    drawn[:SIDE, :SIDE] = HIDDEN
    drawn[:SIDE, -1] = rows
    drawn[-1, :SIDE] = columns
    return drawn


def picture(panels: Sequence[Panel]) -> Any:
    """A figure of matplotlib: a panel for each question, its digits in columns."""
    from matplotlib.figure import Figure

    rows = ["the digit", "what is known", *panels[0].answers]
    figure = Figure(figsize=(2.3 * len(panels) + 1.5, 0.98 * len(rows) + 1.0))
    grid = figure.add_gridspec(
        len(rows), len(panels), left=0.115, right=0.995, top=0.86, bottom=0.095, wspace=0.09
    )
    for column, panel in enumerate(panels):
        for row, name in enumerate(rows):
            line = figure.add_subplot(grid[row, column], frame_on=False, xticks=[], yticks=[])
            line.set_xlabel(panel.captions.get(name, " "), size=10, labelpad=3)
            if row == 0:
                line.set_title(f"{panel.question.title}\n", size=11, weight="bold")
                line.text(0.5, 1.07, panel.remark, ha="center", size=10, color="0.35")
            if column == 0:
                line.set_ylabel(name, rotation=0, ha="right", va="center", size=11, labelpad=8)
            for i in range(len(panel.images)):
                share = 1 / len(panel.images)
                axes = line.inset_axes((i * share, 0, 0.93 * share, 1))
                axes.imshow(_drawn(panel, name, i).numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_color("0.8")
    figure.text(0.5, 0.02, FOOTNOTE, ha="center", size=10, color="0.35")
    return figure


def _drawn(panel: Panel, name: str, i: int) -> Tensor:
    if name == "the digit":
        return grey(panel.images[i, 0])
    if name == "what is known":
        return known(panel.question, panel.images[i], panel.view[i])
    return grey(panel.answers[name][i, 0])


def write(path: Path, panels: Sequence[Panel]) -> None:
    """Writes the picture as PNG."""
    picture(panels).savefig(path, dpi=110)
