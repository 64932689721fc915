"""Times and peak memories that can be compared with each other."""

import gc
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


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


def timed(task: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What the task returns, and the seconds that it takes."""
    _wait(device)
    start = time.perf_counter()
    result = task()
    _wait(device)
    return result, time.perf_counter() - start


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


def peak_bytes(task: Callable[[], object], device: torch.device) -> int:
    """The most memory that torch's allocator held during ``task``, above what it held before.

    On CUDA it is the caching allocator's own statistic. On the CPU, where there is none, it is
    the highest running sum of the allocations and releases that the profiler records, one by
    one, in the order in which they happened. The process's resident size would be coarser: it
    contains what malloc keeps and depends on what ran before. Neither sees memory that a
    library such as oneDNN takes past torch's allocator. What the task releases of earlier
    allocations does not count.
    """
    gc.collect()  # so that nothing older is released meanwhile
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else its start and stop go to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    records = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = highest = 0
    alive: Counter[int] = Counter()  # by size
    for _, size in records:
        if size < 0 and not alive[-size]:
            continue  # allocated before the profile, if the record is of this profile at all
        alive[abs(size)] += 1 if size > 0 else -1
        held += size
        highest = max(highest, held)
    return highest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
