"""What the benchmarks' commands have in common: options, the head of a report, its file."""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .hvp_cost import machine


@dataclass(frozen=True)
class Options:
    """What a command was asked for."""

    devices: tuple[torch.device, ...]
    """Where to measure: both, where both are there and none is named."""
    repeats: int
    """Rounds of timing."""
    quick: bool
    """Whether tiny sizes only check that it runs."""
    json: Path | None
    """Where the numbers are written."""

    def head(self) -> dict[str, Any]:
        """What the numbers were measured with."""
        return {
            "machines": {d.type: machine(d) for d in self.devices},
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "hvpopt": version("hvpopt"),
            },
            "repeats": self.repeats,
            "quick": self.quick,
        }

    def title(self) -> str:
        """The same in one line."""
        names = [machine(d) for d in self.devices]
        if self.devices[0].type == "cpu":
            names[0] += f", {torch.get_num_threads()} threads"
        return f"{'; '.join(names)}; torch {torch.__version__}, float32."

    def write(self, content: dict[str, Any]) -> None:
        """Writes head and content to the file that was asked for, if any."""
        if self.json is not None:
            text = json.dumps({**self.head(), **content}, indent=2, ensure_ascii=False)
            self.json.write_text(text + "\n")


def parse(name: str, description: str, argv: Sequence[str] | None) -> Options:
    """The options of ``python -m hvpopt.experiments.benchmarks.{name}``; exits on bad ones."""
    parser = argparse.ArgumentParser(
        prog=f"python -m hvpopt.experiments.benchmarks.{name}", description=description
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to measure (default: wherever possible)"
    )
    parser.add_argument("--repeats", type=int, help="rounds of timing (default: 20; quick: 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check, no numbers")
    given = parser.parse_args(argv)
    repeats = given.repeats if given.repeats is not None else (2 if given.quick else 20)
    if repeats < 1:
        parser.error(f"--repeats must be at least 1, got {repeats}")
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"--json: there is no folder {given.json.parent}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; choose cpu")
    there = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    names = (given.device,) if given.device else there
    return Options(tuple(map(torch.device, names)), repeats, given.quick, given.json)
