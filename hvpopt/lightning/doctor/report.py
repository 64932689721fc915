"""What the doctor returns, and how it is shown."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hvpopt.engines.split import CurvatureName

Verdict = Literal["ok", "note", "warning", "failure"]
"""A note asks nothing of the user, a warning asks to look, with a failure it cannot train."""

_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    """What it is."""
    verdict: Verdict
    """How it stands."""
    text: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty where there is nothing to do."""


@dataclass(frozen=True)
class EngineFinding:
    """What one engine can do with the closure, for one matrix."""

    engine: str
    """"graph", "dual" or "finite_difference"."""
    curvature: CurvatureName
    """"hessian" or "ggn"."""
    is_supported: bool
    """Whether it has products."""
    reason: str = ""
    """Why not: the module and operation that stand in the way."""
    remedy: str = ""
    """The whole sentence, with what to do."""
    error: float = math.nan
    """‖Cv − reference‖ / ‖reference‖ of a product with a random v. The reference of the Hessian is
    a central difference of gradients; of the GGN, the other exact engine's product."""
    first_cost: float = math.nan
    """Time of loss, gradient and one product, over that of one gradient."""
    further_cost: float = math.nan
    """Time of each further product at the same point, over that of one gradient."""
    memory: float = math.nan
    """Peak memory of loss, gradient and one product, over that of one gradient."""


@dataclass(frozen=True)
class DoctorReport:
    """What will and will not work when a module trains on batches like this one."""

    module: str
    """The module's class."""
    num_params: int
    """Trained entries."""
    dtypes: tuple[str, ...]
    """Of the trained parameters."""
    device: str
    """Where it was examined."""
    optimizer: str
    """The optimizer's class; empty where none is known."""
    loss: float
    """Of the batch."""
    grad_norm: float
    """Of the loss's gradient."""
    gradient_seconds: float
    """Of one closure run: forward and backward."""
    gradient_bytes: float
    """Its peak memory above what was held before."""
    difference_error: float
    """The relative error that the central difference has itself, estimated from two step sizes."""
    engines: tuple[EngineFinding, ...]
    """Each engine and matrix."""
    findings: tuple[Finding, ...]
    """Everything else."""

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What prevents training."""
        return tuple(f for f in self.findings if f.verdict == "failure")

    @property
    def can_train(self) -> bool:
        """Whether nothing was found that prevents training."""
        return not self.failures

    def engine(self, name: str, curvature: CurvatureName) -> EngineFinding:
        """What was found of one engine and matrix.

        Raises:
            KeyError: if it was not looked at.
        """
        for finding in self.engines:
            if (finding.engine, finding.curvature) == (name, curvature):
                return finding
        raise KeyError(f"{name!r} was not examined for the {curvature!r}.")

    def finding(self, subject: str) -> Finding:
        """What was found of a subject.

        Raises:
            KeyError: if there is no such finding.
        """
        for finding in self.findings:
            if finding.subject == subject:
                return finding
        raise KeyError(f"There is no finding of {subject!r}.")

    def __str__(self) -> str:
        """The table."""
        parts, shown = [self._head()], dict[str, str]()
        if self.engines:
            parts.append(_engine_table(self.engines, self.difference_error, shown))
        parts.append(_findings_table(self.findings, shown))
        if self.can_train:
            parts.append("It can train.")
        else:
            subjects = ", ".join(f.subject for f in self.failures)
            parts.append(f"It cannot train: see {subjects}.")
        return "\n\n".join(parts)

    def _head(self) -> str:
        optimizer = f" with {self.optimizer}" if self.optimizer else ""
        head = (
            f"{self.module}{optimizer}: {self.num_params:,} trained parameters, "
            f"{', '.join(self.dtypes)}, on {self.device}"
        )
        if math.isnan(self.gradient_seconds):
            return head
        memory = "" if math.isnan(self.gradient_bytes) else f" and {_bytes(self.gradient_bytes)}"
        return f"{head}\none gradient takes {_seconds(self.gradient_seconds)}{memory}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _engine_table(
    engines: Sequence[EngineFinding], difference_error: float, shown: dict[str, str]
) -> str:
    """The engines, then why some do not work; ``shown`` gathers which remedy stands where."""
    rows = [["engine", "matrix", "works", "error", "1st product", "further", "memory"]]
    for e in engines:
        costs = [_times(x) for x in (e.first_cost, e.further_cost, e.memory)]
        works = "yes" if e.is_supported else "no"
        error = "–" if math.isnan(e.error) else f"{e.error:.0e}"
        rows.append([e.engine.replace("_", " "), e.curvature, works, error, *costs])
    lines = [columns(rows)]
    for e in engines:
        if not e.is_supported:
            name = f"{e.engine.replace('_', ' ')}, {e.curvature}"
            lines.append(_wrapped(f"{name}: ", _once(e.remedy or e.reason, name, shown)))
    own = "" if math.isnan(difference_error) else f", good to {difference_error:.0e} themselves"
    lines.append(
        _wrapped(
            "",
            "Times and peak memory in gradients. The Hessian's error is against differences of "
            f"gradients{own}, the GGN's against the other engine.",
        )
    )
    return "\n".join(lines)


def _findings_table(findings: Sequence[Finding], shown: dict[str, str]) -> str:
    width = max((len(f.subject) for f in findings), default=0) + 2
    lines = []
    for f in findings:
        head = f"{f.subject:<{width}}{f.verdict:<9}"
        lines.append(_wrapped(head, f.text, " " * len(head)))
        if f.remedy:
            remedy = _once(f.remedy, f.subject, shown)
            lines.append(_wrapped(" " * len(head) + "→ ", remedy, " " * (len(head) + 2)))
    return "\n".join(lines)


def _once(remedy: str, where: str, shown: dict[str, str]) -> str:
    """A remedy, or where it already stands."""
    return f"see {shown[remedy]}" if shown.setdefault(remedy, where) != where else remedy


def _wrapped(head: str, text: str, indent: str = "  ") -> str:
    return textwrap.fill(
        head + text,
        _WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _times(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.1f}×"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"
