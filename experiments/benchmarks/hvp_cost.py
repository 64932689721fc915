"""Cost of second-order products in gradients: ``python -m hvpopt.experiments.benchmarks.hvp_cost``.

For each network and each engine: the time of a product and its peak memory, as ratios to one
gradient measured in the same run, beside the bound from counted floating-point operations.
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import models
from .bounds import flop_bound
from .models import Problem
from .tasks import Task, tasks
from .timing import interleaved_times, peak_bytes

FULL: dict[str, Callable[[torch.device], Problem]] = {
    "mlp": models.mlp,
    "cnn": models.cnn,
    "gpt": models.gpt,
}
QUICK: dict[str, Callable[[torch.device], Problem]] = {
    "mlp": partial(models.mlp, batch=64, width=64),
    "cnn": partial(models.cnn, batch=8, width=8),
    "gpt": partial(models.gpt, batch=2, length=16, layers=2, width=32),
}


@dataclass(frozen=True)
class Row:
    """One engine at one product; ratios are to one gradient."""

    what: str
    engine: str
    time_ratio: float
    time_ratio_min: float
    time_ratio_max: float
    memory_ratio: float
    flop_bound: float


@dataclass(frozen=True)
class Report:
    """One network."""

    model: str
    num_parameters: int
    gradient_seconds: float
    gradient_peak_mib: float
    gradient_flops: int
    rows: list[Row]


def measure(problem: Problem, device: torch.device, *, repeats: int) -> Report:
    """Times and memories of all tasks of one network."""

    def peak(task: Callable[[], object]) -> int:
        problem.module.zero_grad()
        return peak_bytes(task, device)

    bound = flop_bound(problem)
    problem.closure()
    gradient_peak = peak(problem.closure)
    with tasks(problem, bound) as entries:
        runs: dict[str, Callable[[], object]] = {"gradient": problem.closure}
        runs.update({_key(task): task.run for task in entries})
        times = interleaved_times(runs, repeats=repeats, device=device)
    with tasks(problem, bound) as entries:
        rows = [
            Row(
                task.what,
                task.engine,
                *times[_key(task)].ratios_to(times["gradient"]),
                peak(task.whole) / gradient_peak,
                task.bound,
            )
            for task in entries
        ]
    return Report(
        model=problem.name,
        num_parameters=sum(p.numel() for p in problem.module.parameters()),
        gradient_seconds=times["gradient"].median,
        gradient_peak_mib=gradient_peak / 2**20,
        gradient_flops=bound.forward + bound.backward,
        rows=rows,
    )


def table(report: Report) -> str:
    """The report as text."""
    lines = [
        f"{report.model}: {report.num_parameters:,} parameters; one gradient takes "
        f"{1e3 * report.gradient_seconds:.2f} ms, {report.gradient_peak_mib:.1f} MiB and "
        f"{report.gradient_flops / 1e9:.2f} GFLOP",
        f"  {'engine':<24}{'time':>7}{'least':>8}{'most':>8}{'bound':>8}{'memory':>9}",
    ]
    what = ""
    for row in report.rows:
        if row.what != what:
            what = row.what
            lines.append(f"  {what}")
        lines.append(
            f"    {row.engine:<22}{row.time_ratio:>7.2f}{row.time_ratio_min:>8.2f}"
            f"{row.time_ratio_max:>8.2f}{row.flop_bound:>8.2f}{row.memory_ratio:>9.2f}"
        )
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """The accelerator's or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and, with ``--json``, writes them to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m hvpopt.experiments.benchmarks.hvp_cost",
        description="Cost of second-order products in gradients, with the bound from counted "
        "floating-point operations.",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--repeats", type=int, help="rounds of timing (default: 20; quick: 2)")
    parser.add_argument(
        "--models", nargs="+", choices=list(FULL), default=list(FULL), help="which networks"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="tiny networks: a check, no numbers")
    options = parser.parse_args(argv)
    repeats = options.repeats if options.repeats is not None else (2 if options.quick else 20)
    if repeats < 1:
        parser.error(f"--repeats must be at least 1, got {repeats}")
    device = _device(options.device, parser.error)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")

    head: dict[str, Any] = {
        "machine": machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hvpopt": version("hvpopt"),
        },
        "repeats": repeats,
        "quick": options.quick,
    }
    threads = f", {head['threads']} threads" if device.type == "cpu" else ""
    print(
        f"{head['machine']}{threads}, torch {torch.__version__}, float32. Ratios to one gradient "
        f"in the same run:\nmedian, least and largest of {repeats} rounds; memory is the peak "
        "above the model's."
    )
    reports = []
    for name in options.models:
        problem = (QUICK if options.quick else FULL)[name](device)
        reports.append(measure(problem, device, repeats=repeats))
        print("\n" + table(reports[-1]), flush=True)
    if options.json is not None:
        content = {**head, "models": [asdict(report) for report in reports]}
        options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _key(task: Task) -> str:
    return f"{task.what}: {task.engine}"


def _device(name: str, refuse: Callable[[str], Any]) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        refuse(f"--device {name}: choose cpu or cuda")
    if device.type not in ("cpu", "cuda"):
        refuse(f"--device {name}: choose cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        refuse(f"--device {name}: torch sees no CUDA device here; choose cpu")
    return device


if __name__ == "__main__":
    main()
