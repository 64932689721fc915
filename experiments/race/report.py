"""A race's table, on the console and in Markdown, and its file of results."""

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..benchmarks.hvp_cost import machine  # noqa: TID252
from .problem import Task
from .results import Result, ranked, times_the_best

_PACKAGES = ("hvpopt", "pytorch-optimizer", "pytorch-minimize", "scikit-learn")


def head(device: torch.device) -> dict[str, Any]:
    """What the race was run on and with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "machine": machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def rows(task: Task, results: Sequence[Result]) -> list[list[str]]:
    """The table's cells, heads first, best contestant first."""
    target = task.target
    multiples = times_the_best(results, target)
    heads = ["contestant", "tuned to", task.loss_name, "least – most", task.metric_name]
    if target is not None:
        heads.append("seconds to target")
    table = [[*heads, "× best", "steps", "seconds", "notes"]]
    for result in ranked(results, target):
        names = [name for name in result.contestant.grid if name in result.options]
        tuned = ", ".join(f"{name} {result.options[name]}" for name in names)
        row = [result.contestant.name, tuned]
        if result.has_run:
            losses = result.finals("loss")
            row += [
                _number(result.median("loss")),
                f"{_number(min(losses))} – {_number(max(losses))}",
                _number(result.median("metric")),
            ]
        else:
            row += ["–"] * 3
        if target is not None:
            row.append(_short(result.seconds_to(target)) if result.has_run else "–")
        multiple = multiples.get(result.contestant.name, math.inf)
        runs = [run for run in result.runs.values() if run.records]
        table.append(
            [
                *row,
                f"{multiple:.3g}" if math.isfinite(multiple) else "–",
                _range([run.num_steps for run in runs], "{:,}"),
                _range([run.clock for run in runs], "{:.1f}"),
                "; ".join(result.notes()),
            ]
        )
    return table


def text(table: Sequence[Sequence[str]]) -> str:
    """The table in columns."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )
    return "\n".join(lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    heads, *lines = ([cell.replace("|", "\\|") for cell in line] for line in table)
    rule = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))


def title(task: Task, about: Mapping[str, Any]) -> str:
    """What raced, where, and for how long."""
    threads = f", {about['threads']} threads" if about["device"] == "cpu" else ""
    interrupted = " Interrupted before its end." if about["interrupted"] else ""
    sentence = task.describe()
    return (
        f"{sentence[0].upper()}{sentence[1:]}. {about['seconds']:g} s each, seeds "
        f"{', '.join(map(str, about['seeds']))}; medians over the seeds. Tuned options had "
        f"{about['tuning_seconds']:g} s a candidate, on a seed of their own; what has no "
        f"grid, hvpopt's optimizers among them, is not tuned. {about['machine']}{threads}, torch "
        f"{about['versions']['torch']}.{interrupted}"
    )


def as_json(task: Task, about: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """All that was found. A record is [seconds, steps, loss, metric]; what is not finite is a
    string."""
    options: dict[str, Any] = dataclasses.asdict(task) if dataclasses.is_dataclass(task) else {}
    target = task.target
    return {
        **about,
        "task": {
            "class": type(task).__name__,
            "options": options,
            "description": task.describe(),
            "loss": task.loss_name,
            "metric": task.metric_name,
            "target": None if target is None else dataclasses.asdict(target),
        },
        "contestants": [_entry(result) for result in ranked(results, target)],
    }


def _entry(result: Result) -> dict[str, Any]:
    contestant = result.contestant
    return {
        "name": contestant.name,
        contestant.kind: contestant.method,
        "options": result.options,
        "grid": contestant.grid,
        "tuning": [dataclasses.asdict(trial) for trial in result.trials],
        "at_end_of_grid": result.at_edge,
        "notes": result.notes(),
        "runs": [
            {
                "seed": seed,
                "seconds": run.clock,
                "steps": run.num_steps,
                "note": run.note,
                "failed": run.has_failed,
                "records": [
                    [r.seconds, r.num_steps, r.evaluation.loss, r.evaluation.metric]
                    for r in run.records
                ],
            }
            for seed, run in result.runs.items()
        ],
    }


def write(
    folder: Path, task: Task, about: Mapping[str, Any], results: Sequence[Result]
) -> list[list[str]]:
    """Writes race.json and race.md; returns the table."""
    table = rows(task, results)
    content = plain(as_json(task, about, results))
    (folder / "race.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / "race.md").write_text(f"{title(task, about)}\n\n{markdown(table)}\n")
    return table


def plain(value: Any) -> Any:
    """The value in JSON's types; numbers that are not finite, which JSON lacks, as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if math.isfinite(seconds) else "not reached"


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    least, most = (form.format(value) for value in (min(values), max(values)))
    return least if least == most else f"{least} – {most}"
