"""A race: tuning, then the runs of each seed in turns, then its files."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import plots, report
from .classical import ClassicalRace
from .contestants import Contestant
from .problem import Figure, Task
from .results import Result, Trial, first_time, ranked
from .turns import Run, run_in_turns

log = logging.getLogger(__name__)

TUNING_SEED = 1_000_003
"""Learning rates are chosen on the problem of this seed, which must be none of the race's."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """Which task, who runs, and for how long.

    Args:
        task: what is trained.
        contestants: by name; see `hvpopt.experiments.race.contestants.Contestant.of`.
        seconds: each run's time, by its own clock.
        seeds: of the problems.
        tuning_seconds: of each candidate of each tuned contestant; None for a quarter of
            ``seconds``.
        num_slices: a run's time is cut into so many turns, and each is recorded.
        only: the names of those who run; None for all.
        device: where.

    Raises:
        ValueError: for a number out of range, a name in ``only`` that no contestant has, or a
            contestant that cannot be understood.
    """

    task: Task
    contestants: Mapping[str, Mapping[str, Any]]
    seconds: float = 60.0
    seeds: Sequence[int] = (0, 1, 2)
    tuning_seconds: float | None = None
    num_slices: int = 60
    only: Sequence[str] | None = None
    device: str = "cpu"
    entries: list[Contestant] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("seconds", "tuning_seconds", "num_slices"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"race.{name}={value} is out of range: expected more than 0.")
        if not self.seeds or TUNING_SEED in self.seeds:
            raise ValueError(
                f"race.seeds={list(self.seeds)}: expected at least one seed, and not "
                f"{TUNING_SEED}, on which options are tuned."
            )
        unknown = sorted(set(self.only or ()) - set(self.contestants))
        if unknown:
            raise ValueError(
                f"race.only names {unknown[0]!r}, who does not run here: choose of "
                f"{', '.join(self.contestants)}."
            )
        names = self.contestants if self.only is None else self.only
        entries = [Contestant.of(name, self.contestants[name]) for name in names]
        object.__setattr__(self, "entries", entries)

    def run(self, output_dir: str | Path) -> dict[str, Any]:
        """Runs the race; writes race.json, race.md, race.png and TensorBoard's files; returns what
        is in the first.

        Interrupted, it writes what there is and exits with 130.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        device = torch.device(self.device)
        about = {
            **report.head(device),
            "seconds": self.seconds,
            "seeds": list(self.seeds),
            "tuning_seconds": self._tuning_seconds,
            "tuning_seed": TUNING_SEED,
            "num_slices": self.num_slices,
            "interrupted": False,
        }
        results = [Result(entry, absent=entry.missing_package) for entry in self.entries]
        log.info("%s", report.title(self.task, about))
        try:
            self._run(folder, about, results, device)
        except KeyboardInterrupt:
            about["interrupted"] = True
        table = report.write(folder, self.task, about, results)
        plots.write(folder, self.task, results, self.seconds)
        log.info("\n%s\n\n%s", report.text(table), f"outputs: {folder}")
        if about["interrupted"]:
            raise SystemExit(130)
        return report.as_json(self.task, about, results)

    @property
    def _tuning_seconds(self) -> float:
        return self.seconds / 4 if self.tuning_seconds is None else self.tuning_seconds

    def _run(
        self, folder: Path, about: dict[str, Any], results: list[Result], device: torch.device
    ) -> None:
        running = [result for result in results if result.absent is None]
        self.task.build(TUNING_SEED, device)  # an error of the data is none of a contestant
        for result in running:
            result.options = result.contestant.candidates()[0]
            warm_up(self.task, result, device)
        for result in running:
            tune(self.task, result, self._tuning_seconds, device, self.num_slices)
        for seed in self.seeds:
            runs = []
            for result in running:
                run = self._start(result, seed, device)
                result.runs[seed] = run
                runs.append(run)
            run_in_turns(runs, self.seconds, self.num_slices)
            report.write(folder, self.task, about, results)
            first = ranked(running, self.task.target)[0]
            log.info("Seed %d has run; ahead is %s.", seed, first.contestant.name)

    def _start(self, result: Result, seed: int, device: torch.device) -> Run:
        return start(self.task, result.contestant, result.options, seed, device)


def start(
    task: Task,
    contestant: Contestant,
    options: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Run:
    """A run of the contestant on the seed's problem, before its first step."""
    problem = task.build(seed, device)
    steps = contestant.start(problem, options)
    return Run(contestant.name, problem, steps, seed=seed, device=device, target=task.target)


def warm_up(task: Task, result: Result, device: torch.device) -> None:
    """Makes one step that does not count: a library's first use takes longer."""
    run = start(task, result.contestant, result.options, TUNING_SEED, device)
    run.turn(math.ulp(0.0))
    run.close()


def tune(
    task: Task, result: Result, seconds: float, device: torch.device, num_slices: int = 20
) -> None:
    """Sets the result's options to the candidate whose run ends with the least loss; where the
    task has a target, to the one that is there first, or comes nearest."""
    candidates = result.contestant.candidates()
    if len(candidates) == 1:
        return
    target = task.target
    figure: Figure = "loss" if target is None else target.figure
    runs = [start(task, result.contestant, c, TUNING_SEED, device) for c in candidates]
    run_in_turns(runs, seconds, num_slices)
    orders = []
    for options, run in zip(candidates, runs, strict=True):
        tuned = {name: options[name] for name in result.contestant.grid}
        value = run.records[-1].evaluation.of(figure)
        is_bad = run.has_failed or not math.isfinite(value)
        value = math.inf if is_bad else value
        arrival = math.inf if target is None else first_time(run.records, target)
        orders.append((arrival, value))
        result.trials.append(Trial(tuned, value, run.clock, run.num_steps, run.note))
    result.options = candidates[orders.index(min(orders))]
    names = result.contestant.grid
    log.info(
        "%s is tuned to %s.",
        result.contestant.name,
        ", ".join(f"{name} {result.options[name]}" for name in names),
    )


def run(race: Race | ClassicalRace, output_dir: str | Path = ".") -> dict[str, Any]:
    """The task `race`: what the race found."""
    return race.run(output_dir)
