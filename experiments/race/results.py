"""What a race found, and its order."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .contestants import Contestant
from .problem import Evaluation, Figure, Target
from .turns import AT_TARGET, NO_BATCHES, Record, Run


@dataclass(frozen=True)
class Trial:
    """A candidate of the tuning: the figure that decides, at its end, and its time and steps."""

    options: dict[str, Any]
    figure: float
    seconds: float
    num_steps: int
    note: str | None


@dataclass
class Result:
    """One contestant: what it was tuned to, and its runs by seed.

    Attributes:
        contestant: who.
        options: with which it ran.
        trials: all candidates of its tuning, none where there was nothing to tune.
        runs: by seed.
        absent: the package that is not installed, where it did not run.
    """

    contestant: Contestant
    options: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)
    absent: str | None = None

    @property
    def has_run(self) -> bool:
        """Whether there is a figure to report: a run that has made a step."""
        return any(run.num_steps for run in self.runs.values())

    @property
    def is_partial(self) -> bool:
        """Whether a run saw a part of its stream only: its mean is then of other batches."""
        return any(run.is_partial for run in self.runs.values())

    @property
    def at_edge(self) -> list[str]:
        """Tuned options at an end of their grid, where the best may lie beyond."""
        return self.contestant.at_edge(self.options) if self.trials else []

    def finals(self, figure: Figure) -> list[float]:
        """The figure at the end of each run; infinite where the loss is not finite."""
        last = [run.records[-1].evaluation for run in self.runs.values() if run.records]
        return [e.of(figure) if math.isfinite(e.loss) else math.inf for e in last]

    def median(self, figure: Figure) -> float:
        """The median of the figure over the seeds; infinite where there is none."""
        return statistics.median(self.finals(figure) or [math.inf])

    def seconds_to(self, target: Target) -> float:
        """The median over the seeds of the time to the target; infinite where the median run did
        not get there."""
        times = [first_time(run.records, target) for run in self.runs.values()]
        return statistics.median(times or [math.inf])

    def notes(self) -> list[str]:
        """Why runs ended before their time, and what else a reader should know, once each."""
        if self.absent is not None:
            return [f"not installed (pip install {self.absent})"]
        notes: dict[str, list[int]] = {}
        for seed, run in self.runs.items():
            if run.is_partial and not run.has_failed:
                notes.setdefault("saw a part of the stream", []).append(seed)
            if run.note not in (None, AT_TARGET, NO_BATCHES):
                notes.setdefault(str(run.note), []).append(seed)
        few = [
            note if len(seeds) == len(self.runs) else f"seed {', '.join(map(str, seeds))}: {note}"
            for note, seeds in notes.items()
        ]
        return few + [f"{name} at the end of its grid" for name in self.at_edge]


def first_time(records: Sequence[Record], target: Target) -> float:
    """The clock at the first record that reaches the target; infinite where none does."""
    times = (r.seconds for r in records if target.is_reached(r.evaluation))
    return next(times, math.inf)


def at_time(records: Sequence[Record], seconds: float) -> Evaluation | None:
    """The evaluation that was known at a time of the run's clock."""
    known = [record for record in records if record.seconds <= seconds]
    return known[-1].evaluation if known else None


def ranked(results: Sequence[Result], target: Target | None) -> list[Result]:
    """The results, best first: by the time to the target where there is one, then by the loss;
    then those that saw a part of their stream, and at last those that made no step."""

    def key(result: Result) -> tuple[bool, bool, float, float]:
        seconds = math.inf if target is None else result.seconds_to(target)
        figure: Figure = "loss" if target is None else target.figure
        median = result.median(figure)
        median = median if not math.isnan(median) else math.inf
        return not result.has_run, result.is_partial, seconds, median

    return sorted(results, key=key)


def times_the_best(results: Sequence[Result], target: Target | None) -> dict[str, float]:
    """Each median as a multiple of the least: of the times to the target where any got there, of
    the losses else."""
    ran = [result for result in results if result.has_run]
    values = {}
    if target is not None:
        values = {result.contestant.name: result.seconds_to(target) for result in ran}
    if not any(map(math.isfinite, values.values())):
        figure: Figure = "loss" if target is None else target.figure
        values = {result.contestant.name: result.median(figure) for result in ran}
    whole = [values[result.contestant.name] for result in ran if not result.is_partial]
    least = min(whole or values.values(), default=math.inf)
    if not 0 < least < math.inf:
        return {}
    return {name: value / least for name, value in values.items()}
