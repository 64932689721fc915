"""Time and peak memory of a piece of work."""

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

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
            _wait(device)
            start = time.perf_counter()
            task()
            _wait(device)
            if num_rounds >= 0:
                taken[name].append(time.perf_counter() - start)
        num_rounds += 1
    return {name: statistics.median(each) for name, each in taken.items()}


def peak_bytes(task: Task, device: torch.device) -> float:
    """The most memory that torch held while a task ran, above what it held before.

    On CUDA the allocator's own figure; on the CPU the highest sum of the allocations and releases
    that torch's profiler records. NaN on other devices. What a library takes past torch's
    allocator is not seen.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        _wait(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu":
        task()
        return float("nan")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    return float(_highest(profiler))


def _highest(profiler: profile) -> int:
    """The highest running sum of what was allocated since the profile began."""
    recorded = getattr(profiler.profiler, "kineto_results", None)
    events = [] if recorded is None else [e for e in recorded.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    own: dict[int, int] = {}  # how many blocks of a size are alive that were allocated here
    held = highest = 0
    for size in sizes:
        if size < 0 and own.get(-size, 0) == 0:
            continue  # of what was there before
        own[abs(size)] = own.get(abs(size), 0) + (1 if size > 0 else -1)
        held += size
        highest = max(highest, held)
    return highest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
