"""Runs in turns: a machine that slows down slows all of them."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..benchmarks.timing import timed  # noqa: TID252
from .problem import Evaluation, Problem, Target

AT_TARGET = "reached the target"
NO_BATCHES = "saw all batches"


@dataclass(frozen=True)
class Record:
    """A run at one moment: seconds of its own clock, steps, and how good the weights are."""

    seconds: float
    num_steps: int
    evaluation: Evaluation


class Run:
    """One contestant on one problem.

    Its clock counts its own steps only: neither other runs, nor evaluations. It has its own state
    of torch's global random numbers.

    Attributes:
        clock: seconds of its steps.
        num_steps: how many.
        records: one after each turn.
        note: why it ended before its time; None where it did not.
        has_failed: whether the end was an error or a loss that is not finite.
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        steps: Iterator[None],
        *,
        seed: int,
        device: torch.device,
        target: Target | None = None,
    ) -> None:
        self.name = name
        self.clock = 0.0
        self.num_steps = 0
        self.records: list[Record] = []
        self.note: str | None = None
        self.has_failed = False
        self._problem, self._steps, self._device = problem, steps, device
        self._target = target
        with _global_random_numbers(device):
            torch.manual_seed(seed)
            self._random_state = _random_state(device)

    @property
    def is_partial(self) -> bool:
        """Whether there were more batches, on which its figure would have depended."""
        return self._problem.has_end and not self._problem.is_over

    @property
    def is_over(self) -> bool:
        """Whether there is no further step."""
        return self.note is not None

    def turn(self, until: float) -> None:
        """Makes steps until the clock is there, at least one where it is not, and records."""
        if self.is_over or self.clock >= until:
            return
        with _global_random_numbers(self._device), warnings.catch_warnings():
            # torch warns of a cycle that the next zero_grad breaks
            warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
            _set_random_state(self._random_state, self._device)
            while not self.is_over and self.clock < until:
                self._step()
            self._random_state = _random_state(self._device)
        self.record()

    def _step(self) -> None:
        try:
            ended, seconds = timed(self._ends, self._device)
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            self._end(f"{type(error).__name__}: {line}", has_failed=True)
            return
        self.clock += seconds
        if ended:
            self._end(NO_BATCHES if self._problem.is_over else "ended by itself")
        else:
            self.num_steps += 1

    def _ends(self) -> bool:
        return next(self._steps, _END) is _END

    def record(self) -> None:
        """Evaluates the weights; a figure that is not finite, or the target, ends the run."""
        evaluation = self._problem.evaluate()
        self.records.append(Record(self.clock, self.num_steps, evaluation))
        if self.num_steps == 0 or self.has_failed:
            return
        if not math.isfinite(evaluation.loss):
            self._end(f"the loss became {evaluation.loss}", has_failed=True)
        elif self._target is not None and self._target.is_reached(evaluation):
            self._end(AT_TARGET)

    def _end(self, note: str, has_failed: bool = False) -> None:
        self.note, self.has_failed = note, has_failed
        self.close()

    def close(self) -> None:
        """Releases what the steps hold."""
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()


_END = object()


def run_in_turns(runs: Sequence[Run], seconds: float, num_slices: int) -> None:
    """Lets all runs advance by ``seconds`` of their own clocks, a slice of it at a time.

    The slices grow, so that the fast beginning has more records than the slow end: the k-th of n
    ends at (k/n)² of the time. A run whose step is longer than a slice waits until the others'
    clocks have come as far: no two clocks differ by more than a slice and a step. The last step
    may end after the time.
    """
    try:
        for run in runs:
            run.record()
        for k in range(1, num_slices + 1):
            for run in runs:
                run.turn(seconds * (k / num_slices) ** 2)
    finally:
        for run in runs:
            run.close()


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _global_random_numbers(device: torch.device) -> Iterator[None]:
    """Afterwards torch's global generators are as before."""
    states = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(states, device)
