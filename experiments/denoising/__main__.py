"""Prints what trained networks make of noise of other strength than they were trained with.

python -m hvpopt.experiments.denoising RUN [RUN ...] [--json PATH]
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .noise_levels import Run, answers


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates the runs, prints a table and, with ``--json``, writes its numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m hvpopt.experiments.denoising",
        description="PSNR at noise of other strength than that of the training.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder of a run",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    options = parser.parse_args(argv)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    try:
        rows = answers([Run.loaded(folder) for folder in options.runs])
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    width = max(len(row.what) for row in rows) + 2
    levels = list(rows[0].psnr)
    print("PSNR in decibels".ljust(width) + "".join(f"{f'σ = {s:g}':>10}" for s in levels))
    for row in rows:
        print(row.what.ljust(width) + "".join(f"{row.psnr[s]:>10.2f}" for s in levels))
    if options.json is not None:
        content = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
