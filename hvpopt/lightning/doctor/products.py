"""Whether exact products agree with differences of gradients, and with each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvpopt.lightning.doctor.report import EngineFinding, Finding

_AGREE = 1e-2
"""A relative difference that rounding in half precision may leave."""
_ROUGH = 0.1
"""Differences that are worse than this say nothing about a product."""


@dataclass(frozen=True)
class ProductCheck:
    """How products are checked by differences of gradients."""

    difference_error: float
    """The relative error that the differences have themselves."""
    errors_in_double: Mapping[str, float] | None = None
    """Where the differences are those of float64: each engine's error in float64."""
    refusal: str = ""
    """Why they are not, though those of the module's own precision are rough."""

    @property
    def is_rough(self) -> bool:
        """Whether they might let a wrong product pass."""
        return not self.difference_error <= _AGREE / 10

    @property
    def name(self) -> str:
        """What products are compared with."""
        in_double = "" if self.errors_in_double is None else " in float64"
        return f"differences of gradients{in_double}"


def examine_products(engines: Sequence[EngineFinding], check: ProductCheck) -> list[Finding]:
    """Whether exact products agree with differences, and with each other."""
    exact = [e for e in engines if e.engine != "finite_difference" and not math.isnan(e.error)]
    hessians, ggns = ([e for e in exact if e.curvature == name] for name in ("hessian", "ggn"))
    findings = []
    if hessians:
        findings.append(_hessians(hessians, check))
    if ggns:
        worst, other = max(ggns, key=lambda e: e.error), "those of the other engine"
        findings.append(_agreement(worst, other, 0.0) or _difference(worst, other))
    return findings


def _hessians(engines: Sequence[EngineFinding], check: ProductCheck) -> Finding:
    worst = max(engines, key=lambda e: e.error)
    in_double = check.errors_in_double or {}
    if check.difference_error > _ROUGH:
        return _unchecked(check)
    if found := _agreement(worst, check.name, 10 * check.difference_error):
        return found
    if in_double and max(in_double.values()) <= max(_AGREE, 10 * check.difference_error):
        text = (
            f"by engine {worst.engine} differ from {check.name} by {worst.error:.0e}, which is "
            f"rounding: in float64 they agree to {max(in_double.values()):.0e}"
        )
        return Finding("products, hessian", "note", text)
    return _difference(worst, check.name)


def _agreement(worst: EngineFinding, other: str, floor: float) -> Finding | None:
    if not worst.error <= max(_AGREE, floor):
        return None
    limit = "" if worst.error <= _AGREE else ", as well as those can tell"
    text = f"agree with {other} to {worst.error:.0e}{limit}"
    return Finding(f"products, {worst.curvature}", "ok", text)


def _difference(worst: EngineFinding, other: str) -> Finding:
    return Finding(
        f"products, {worst.curvature}",
        "warning",
        f"by engine {worst.engine} differ from {other} by {worst.error:.0e}",
        "Look for an operation with a wrong second derivative: a custom autograd Function, or "
        "values that are taken through .data, .item() or NumPy.",
    )


def _unchecked(check: ProductCheck) -> Finding:
    text = (
        f"not checked: {check.name} disagree with themselves by {check.difference_error:.0e}, as "
        "at the kinks of ReLU and max pooling, whose curvature the Hessian leaves out, or where "
        "there is hardly any"
    )
    if not check.refusal:
        return Finding("products, hessian", "note", text)
    return Finding(
        "products, hessian",
        "note",
        f"{text}, or by rounding, and the module does not run in float64: {check.refusal}",
        "Let the module take its dtype from its input or parameters, for the check in float64.",
    )
