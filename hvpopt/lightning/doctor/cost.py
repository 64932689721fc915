"""Times of several pieces of work, taken in turns."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from hvpopt.lightning.cost import timed

Task = Callable[[], object]


def medians(
    tasks: Mapping[str, Task], *, device: torch.device, seconds: float, min_rounds: int = 3
) -> dict[str, float]:
    """The median seconds of each task, taken in turns, after one round that does not count.

    Args:
        tasks: what to run, by name.
        device: is waited for around each.
        seconds: no new round is begun after so many.
        min_rounds: but for these.
    """
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    end = time.perf_counter() + seconds
    num_rounds = -1
    while num_rounds < min_rounds or time.perf_counter() < end:
        for name, task in tasks.items():
            duration = timed(task, device)[1]
            if num_rounds >= 0:
                taken[name].append(duration)
        num_rounds += 1
    return {name: statistics.median(each) for name, each in taken.items()}
