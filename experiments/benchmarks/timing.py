"""Times and peak memories that can be compared with each other."""

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hvpopt.lightning.cost import peak_bytes, timed

__all__ = ["Times", "free_bytes", "interleaved_times", "peak_bytes", "timed"]


@dataclass(frozen=True)
class Times:
    """Seconds of one task in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)

    def ratios_to(self, other: "Times") -> tuple[float, float, float]:
        """(median, least, largest) over the rounds of this time over the other's."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def interleaved_times(
    tasks: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    warmup: int = 1,
) -> dict[str, Times]:
    """The times of several tasks, taken in turns.

    Each round runs every task once, so that a machine that slows down slows all of them, and
    ratios within a round compare like with like. On CUDA the device is waited for before and
    after each task.

    Args:
        tasks: What to run, by name.
        repeats: Rounds that count.
        device: Where the tasks run.
        warmup: Rounds before that do not count.

    Raises:
        ValueError: For ``repeats`` < 1.
    """
    if repeats < 1:
        raise ValueError(f"interleaved_times needs repeats ≥ 1, got {repeats}.")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(-warmup, repeats):
        for name, task in tasks.items():
            taken = timed(task, device)[1]
            if round_ >= 0:
                seconds[name].append(taken)
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def free_bytes(device: torch.device) -> int:
    """The memory that an allocation could still take: the device's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
