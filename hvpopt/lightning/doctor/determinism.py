"""Whether the loss is the same function at every evaluation."""

import math
import random
import sys

import torch

from hvpopt.lightning.doctor.report import Finding
from hvpopt.lightning.doctor.subject import Subject, distance

_ROUNDING = 1e-4


def examine_determinism(subject: Subject) -> list[Finding]:
    """Two runs from one random state, which must agree, and two from different ones."""
    (loss, grad), (again, grad_again) = subject.gradient(), subject.gradient()
    gap = max(_relative(again, loss), distance(grad_again, grad))
    other, _ = subject.gradient(before=lambda: _draw(subject))
    if gap == 0:
        same = Finding("determinism", "ok", "two runs from one random state agree exactly")
    elif gap <= _ROUNDING:
        same = Finding(
            "determinism",
            "note",
            f"two runs from one random state differ by a relative {gap:.0e}: kernels that round "
            "differently from run to run",
            "torch.use_deterministic_algorithms(True) makes runs repeatable.",
        )
    else:
        same = Finding(
            "determinism",
            "warning",
            f"two runs from one random state differ by a relative {gap:.0e}: the loss changes from "
            "call to call, and products of one step belong to different functions",
            "Look for generators of your own, counters and files; dropout and torch's, NumPy's and "
            "Python's global random numbers are taken care of.",
        )
    change = _relative(other, loss)
    if change <= max(gap, torch.finfo(torch.float32).eps):
        return [same, Finding("randomness", "ok", "none: other random states give the same loss")]
    return [
        same,
        Finding(
            "randomness",
            "note",
            f"another random state changes the loss by a relative {change:.0e} (dropout, noise); "
            "within a step all runs draw the same",
        ),
    ]


def _draw(subject: Subject) -> None:
    """Moves every generator on that a training step may draw from."""
    torch.rand(997)
    torch.rand(997, device=subject.device)
    random.random()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.rand(997)


def _relative(a: float, b: float) -> float:
    if a == b:
        return 0.0
    return abs(a - b) / abs(b) if b and math.isfinite(b) else math.inf
