"""The automatic choice of a way: by the shapes, and where they do not decide, measured once."""

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hvpopt.jacobians.ways import Axis, Opened

logger = logging.getLogger("hvpopt")

_ROUNDS = 12
DECISIVE = 8
"""So many times more rows than columns decide for columns, and the other way round.

A vmapped forward and a vmapped reverse line cost within a few times of each other."""


@dataclass(frozen=True)
class ModeChoice:
    """A way to a Jacobian or Hessian, and why it was taken."""

    mode: str
    """Its name, as ``mode=`` takes it."""
    reason: str
    """Shapes, or measured times, in words."""


@dataclass(frozen=True)
class Candidate:
    """A way that may be taken."""

    axis: Axis
    open: Callable[[], Opened]
    count: int
    """How many rows, or columns, there are."""
    chunk_size: int | None
    """How many of them are computed together, at most; None: all."""
    vmapped: bool

    @property
    def sample(self) -> int:
        """How many to time."""
        most = 256 if self.vmapped else 8
        return min(self.count, self.chunk_size or self.count, most)

    @property
    def share(self) -> float:
        """The sample's share of all."""
        return self.sample / self.count


def choose(candidates: Mapping[str, Candidate], device: torch.device) -> ModeChoice:
    """The way that is, or promises to be, the fastest.

    1. An axis with `DECISIVE` times fewer lines than the other is taken.
    2. Of an axis with a single line it is taken by the loop: it needs no vmap.
    3. The ways that are left are timed on a sample of lines, once. One that raises, because an
       operation of the function has no forward-mode formula, or no rule for vmap, is out; where
       all of an axis are, the other axis's are timed.

    Raises:
        RuntimeError: The first way's error, where every way fails.
    """
    counts = {c.axis: c.count for c in candidates.values()}
    least = min(counts.values())
    axes = {axis for axis, count in counts.items() if count < DECISIVE * least}
    by_shape = len(axes) < len(counts)
    shape = " × ".join(str(counts[a]) for a in ("rows", "columns") if a in counts)
    turns = [
        {name: c for name, c in candidates.items() if c.axis in some}
        for some in (axes, counts.keys() - axes)
    ]
    if by_shape and least == 1:
        turns.insert(0, {name: c for name, c in turns[0].items() if not c.vmapped})
    failures: dict[str, Exception] = {}
    seconds: dict[str, float] = {}
    for racing in turns:
        seconds = _seconds(racing, failures, device)
        if seconds:
            break
    if not seconds:
        raise next(iter(failures.values()))
    parts = [f"{shape}, fewer {axes.pop()}" if by_shape else shape]
    parts += [f"{name} failed: {_line(error)}" for name, error in failures.items()]
    ranked = sorted(seconds, key=seconds.__getitem__)
    parts += [f"{name} {1e3 * seconds[name]:.3g} ms" for name in ranked]
    failures.clear()  # their tracebacks hold this frame, and with it what failed
    return _logged(ModeChoice(ranked[0], "; ".join(parts)))


def _seconds(
    candidates: Mapping[str, Candidate], failures: dict[str, Exception], device: torch.device
) -> dict[str, float]:
    """The least time of all lines that each candidate shows in some rounds.

    They take turns, so that a machine that is busy for a moment is so for all of them. What is
    slow, or three times slower than another, has one turn. Errors go to ``failures``.
    """
    seconds: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # vmap's: it shows
        for name, candidate in candidates.items():
            try:
                _time(candidate, min(2, candidate.count), device)  # what only a first run costs
                seconds[name] = _time(candidate, candidate.sample, device)
            except torch.OutOfMemoryError:
                raise  # says nothing about the function
            except (RuntimeError, NotImplementedError) as error:
                failures[name] = error
        begin = time.perf_counter()
        for round_ in range(_ROUNDS if len(seconds) > 1 else 0):
            if round_ >= 4 and time.perf_counter() - begin > 0.1:
                break
            for name in [n for n, s in seconds.items() if s < 3 * min(seconds.values())]:
                if seconds[name] * candidates[name].share < 0.1:
                    again = _time(candidates[name], candidates[name].sample, device)
                    seconds[name] = min(seconds[name], again)
    return seconds


def _time(candidate: Candidate, sample: int, device: torch.device) -> float:
    """The time of all lines, from a sample of them."""
    start = _now(device)
    opened = candidate.open()
    middle = _now(device)
    opened.lines(0, sample)
    return middle - start + (_now(device) - middle) * candidate.count / sample


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _logged(choice: ModeChoice) -> ModeChoice:
    logger.info("Derivatives by %s (%s).", choice.mode, choice.reason)
    return choice


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
