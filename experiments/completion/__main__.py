"""Trains the energy and its rivals, compares them and draws: see README.md.

python -m hvpopt.experiments.completion OUT.png [--seeds 0 1 2] [--runs FOLDER] [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .data import PartlyKnownDigits
from .exam import METHODS, Exam, Scores, mean_error
from .figure import write
from .questions import QUESTIONS
from .scores import Score


def table(scores: Scores) -> str:
    """Errors, means over the seeds and standard deviations, and what is read rightly, as text."""
    width = max(map(len, METHODS.values())) + 2
    lines = ["".ljust(width) + "".join(name.rjust(17) for name in QUESTIONS)]
    for method, title in METHODS.items():
        found = scores[method].values()
        lines.append(title.ljust(width) + "".join(_error(s).rjust(17) for s in found))
        lines.append("  read rightly".ljust(width) + "".join(_read(s).rjust(17) for s in found))
    return "\n".join(lines)


def _error(scores: Sequence[Score]) -> str:
    if not scores:
        return "–"
    spread = statistics.stdev(s.error for s in scores) if len(scores) > 1 else None
    return f"{mean_error(scores):.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _read(scores: Sequence[Score]) -> str:
    return f"{statistics.mean(s.accuracy for s in scores):.1f}%" if scores else "–"


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what has not been trained, prints the table, and writes the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m hvpopt.experiments.completion",
        description="Completion of digits by one energy and by feed-forward networks.",
    )
    parser.add_argument("out", type=Path, metavar="OUT.png", help="where to write the picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--runs", type=Path, metavar="FOLDER", help="keep the runs here, and use those that are"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here")
    parser.add_argument("--quick", action="store_true", help="a batch each: a check, no numbers")
    options = parser.parse_args(argv)
    for path in (options.out, options.json):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    quick = ["trainer.max_epochs=1", "+trainer.limit_train_batches=1", "logger=none"]
    exam = Exam(PartlyKnownDigits())
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.runs or Path(scratch)
        scores, answers = exam.scores(folder, options.seeds, quick if options.quick else [])
    print(f"root mean square error of hidden pixels, {len(options.seeds)} seed(s)")
    print(table(scores))
    print(f"of whole digits {exam.whole:.1f}% are read rightly")
    write(options.out, [exam.panel(name, answers, scores) for name in QUESTIONS])
    if options.json is not None:
        rows = {m: {q: [s._asdict() for s in f] for q, f in by.items()} for m, by in scores.items()}
        content = {"torch": torch.__version__, "quick": options.quick, "seeds": options.seeds}
        options.json.write_text(json.dumps({**content, "scores": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
