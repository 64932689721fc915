"""How the methods on classical functions fared, as a table and as pictures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Count:
    """How a method fared on a function.

    Attributes:
        function, method: names.
        iterations: as the library counts them.
        to_accuracy: iterations after which f was within ``accuracy`` of a minimum's value, None
            where it never was.
        excess: f at the end less the value of the nearest minimum, at least 0.
        success: what the library says.
        is_true: whether success is said exactly where f is within ``tolerance`` of a known
            minimum's, or the point is a local minimum by its gradient and Hessian.
        evaluations: of f.
        seconds: of a run without a record.
        message: the library's.
        values: f after each iteration.
    """

    function: str
    method: str
    iterations: int | None = None
    to_accuracy: int | None = None
    excess: float = math.inf
    success: bool = False
    is_true: bool = False
    evaluations: int | None = None
    seconds: float | None = None
    message: str = ""
    values: tuple[float, ...] = ()


def title(about: Mapping[str, Any]) -> str:
    """What was counted, and what the columns mean."""
    versions = about["versions"]
    interrupted = " Interrupted before its end." if about["interrupted"] else ""
    return (
        f"Classical functions from their usual starts, float64. Arrived: f is within "
        f"{about['accuracy']:g} of a known minimum. A method is right if it says success exactly "
        f"where f is within {about['tolerance']:g} of a known minimum, or where gradient and "
        f"Hessian tell of another. {about['machine']}, torch "
        f"{versions['torch']}, pytorch-minimize {versions['pytorch-minimize']}.{interrupted}"
    )


def table_of(counts: Sequence[Count], accuracy: float) -> list[list[str]]:
    """The table's cells, heads first."""
    heads = ["function", "method", f"iterations to {accuracy:g}", "iterations", "f − minimum"]
    table = [[*heads, "evaluations of f", "milliseconds", "says", "right", "message"]]
    for c in counts:
        ran = c.iterations is not None
        table.append(
            [
                c.function,
                c.method,
                "–" if c.to_accuracy is None else str(c.to_accuracy),
                str(c.iterations) if ran else "–",
                f"{c.excess:.1e}" if ran else "–",
                str(c.evaluations) if ran else "–",
                "–" if c.seconds is None else f"{1e3 * c.seconds:.0f}",
                ("success" if c.success else "no success") if ran else "–",
                ("yes" if c.is_true else "no") if ran else "–",
                c.message,
            ]
        )
    return table


def draw(folder: Path, counts: Sequence[Count]) -> None:
    """Writes race.png, f above the least value that any method found against iterations, and
    TensorBoard's files."""
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    names = list(dict.fromkeys(count.function for count in counts))
    methods = list(dict.fromkeys(count.method for count in counts))
    if not names:
        return
    num_columns = min(4, len(names))
    num_rows = -(-len(names) // num_columns)
    canvas = Figure(figsize=(4 * num_columns, 3 * num_rows + 0.6), layout="constrained")
    axes = list(canvas.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        group = [count for count in counts if count.function == name]
        least = min((min(count.values) for count in group if count.values), default=0.0)
        for count in group:
            heights = [max(value - least, 1e-20) for value in count.values]
            if heights:
                axis.plot(
                    range(1, len(heights) + 1),
                    heights,
                    label=count.method,
                    color=f"C{methods.index(count.method)}",
                )
                axis.set_yscale("log")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("iterations")
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    handles = {}
    for axis in canvas.axes:
        handles.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    if handles:
        canvas.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    canvas.savefig(folder / "race.png", dpi=110)
    for count in counts:
        slug = count.function.replace(" ", "_").replace(",", "").replace("=", "")
        with SummaryWriter(folder / "tensorboard" / slug / count.method) as writer:
            for i, value in enumerate(count.values, 1):
                writer.add_scalar("f", value, i)
