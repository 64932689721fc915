"""A race's curves: a picture, and TensorBoard's scalars."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .problem import Figure, Task
from .results import Result, at_time, ranked

NUM_TIMES = 200
"""Points of a curve."""


def curve(
    result: Result, figure: Figure, seconds: float
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Times, medians over the seeds, least and largest; at each time what was known then. A run
    that ended keeps its last figure. Left out are times at which nothing finite is known."""
    rows = []
    for i in range(NUM_TIMES + 1):
        time = seconds * i / NUM_TIMES
        until = time if i < NUM_TIMES else math.inf  # the last step may end after the time
        known = [at_time(run.records, until) for run in result.runs.values()]
        values = [e.of(figure) for e in known if e is not None and math.isfinite(e.of(figure))]
        if values:
            rows.append((time, statistics.median(values), min(values), max(values)))
    times, medians, least, most = (
        (list(column) for column in zip(*rows, strict=True))
        if rows
        else (
            [],
            [],
            [],
            [],
        )
    )
    return times, medians, least, most


def picture(task: Task, results: Sequence[Result], seconds: float) -> Any:
    """A figure of matplotlib: the loss against the seconds of each contestant's own clock, and
    beside it the metric; lines are medians over the seeds, bands reach from least to largest."""
    import numpy
    from matplotlib import colormaps
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(13, 5.5), layout="constrained")
    axes = canvas.subplots(1, 2)
    palettes = {True: colormaps["tab10"], False: colormaps["Set2"]}
    shown: tuple[tuple[Figure, str, bool], ...] = (
        ("loss", task.loss_name, True),
        ("metric", task.metric_name, task.is_metric_logarithmic),
    )
    ran = [result for result in ranked(results, task.target) if result.has_run]
    sides = {ours: [r for r in results if r.contestant.is_ours is ours] for ours in palettes}
    for axis, (figure, label, is_logarithmic) in zip(axes, shown, strict=True):
        for result in ran:
            name = result.contestant.name
            times, medians, least, most = curve(result, figure, seconds)
            if is_logarithmic:  # a loss of exactly zero has no place there
                least, most, medians = (
                    [x if x > 0 else math.nan for x in xs] for xs in (least, most, medians)
                )
            ours = result.contestant.is_ours
            colour = palettes[ours](sides[ours].index(result) % palettes[ours].N)
            axis.plot(
                times,
                numpy.asarray(medians, dtype=float),
                color=colour,
                label=name,
                linewidth=2.4 if ours else 1.3,
                linestyle="-" if ours else "--",
                zorder=3 if ours else 2,
            )
            axis.fill_between(times, least, most, color=colour, alpha=0.1, linewidth=0)
        if is_logarithmic and any((line.get_ydata() > 0).any() for line in axis.lines):
            axis.set_yscale("log")
        recorded = [run for r in ran for run in r.runs.values() if run.records]  # if interrupted
        starts = [run.records[0].evaluation.of(figure) for run in recorded]
        highest = max((x for x in starts if math.isfinite(x)), default=0.0)
        if highest > 0 and axis.get_ylim()[1] > 3 * highest:  # one that diverges hides the others
            axis.set_ylim(top=3 * highest)
        axis.set_xlabel("seconds")
        axis.set_ylabel(label)
        axis.set_xlim(0, seconds)
        axis.grid(alpha=0.3)
    canvas.suptitle(task.describe(), fontsize=10, wrap=True)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside right upper", title="best first", fontsize=9)
    return canvas


def write(folder: Path, task: Task, results: Sequence[Result], seconds: float) -> None:
    """Writes race.png, and a TensorBoard run for each contestant and seed.

    TensorBoard's step is the milliseconds of the contestant's clock, and its wall time the
    seconds, so that both of its axes compare at equal time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from torch.utils.tensorboard import SummaryWriter

    canvas = picture(task, results, seconds)
    canvas.savefig(folder / "race.png", dpi=130)
    drawn = FigureCanvasAgg(canvas)
    drawn.draw()
    pixels = torch.frombuffer(bytearray(drawn.buffer_rgba()), dtype=torch.uint8)
    width, height = drawn.get_width_height()
    image = pixels.view(height, width, 4)[:, :, :3]
    logs = folder / "tensorboard"
    with SummaryWriter(logs) as writer:
        writer.add_image("race", image, dataformats="HWC")
    for result in results:
        for seed, run in result.runs.items():
            with SummaryWriter(logs / result.contestant.name / f"seed{seed}") as writer:
                for record in run.records:
                    step = round(1e3 * record.seconds)
                    for tag, figure in ((task.loss_name, "loss"), (task.metric_name, "metric")):
                        value = record.evaluation.of(figure)  # type: ignore[arg-type]
                        if math.isfinite(value):
                            writer.add_scalar(
                                tag.replace(" ", "_"), value, step, walltime=record.seconds
                            )
