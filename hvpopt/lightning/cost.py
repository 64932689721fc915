"""Time and peak memory of a piece of work. It imports torch alone, for benchmarks."""

import gc
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes", "timed"]

T = TypeVar("T")


def timed(task: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What the task returns, and the seconds that it takes; CUDA is waited for around it."""
    _wait(device)
    start = time.perf_counter()
    result = task()
    _wait(device)
    return result, time.perf_counter() - start


def peak_bytes(task: Callable[[], object], device: torch.device) -> int:
    """The most memory that torch's allocator held during ``task``, above what it held before.

    On CUDA it is the caching allocator's own statistic. On the CPU, where there is none, it is
    the highest running sum of the allocations and releases that the profiler records, one by
    one, in the order in which they happened. The process's resident size would be coarser: it
    contains what malloc keeps and depends on what ran before. Neither sees memory that a
    library such as oneDNN takes past torch's allocator. What the task releases of earlier
    allocations does not count.

    Raises:
        ValueError: For a device of another kind, whose memory nothing records.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Peak memory is known of the CPU and of CUDA, not of {device}.")
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
    return _highest(profiler)


def _highest(profiler: profile) -> int:
    """The highest running sum of what was allocated since the profile began."""
    recorded = getattr(profiler.profiler, "kineto_results", None)
    events = [] if recorded is None else [e for e in recorded.events() if e.name() == "[memory]"]
    held = highest = 0
    alive: Counter[int] = Counter()  # by size
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events):
        if size < 0 and not alive[-size]:
            continue  # allocated before the profile, if the record is of this profile at all
        alive[abs(size)] += 1 if size > 0 else -1
        held += size
        highest = max(highest, held)
    return highest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
