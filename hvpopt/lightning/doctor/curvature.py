"""Which curvature is there: products that are right, the GGN's split, the automatic choice."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from hvpopt.engines.choice import EngineChoice
from hvpopt.engines.split import NO_SPLIT, CurvatureName, LossSplit
from hvpopt.lightning.doctor.looking import chosen_engines, messages, oracle_of, sentence
from hvpopt.lightning.doctor.report import EngineFinding, Finding
from hvpopt.lightning.doctor.subject import Subject

_AGREE = 1e-2
"""A relative difference that rounding in half precision may leave."""
_ROUGH = 0.1
"""Differences that are worse than this say nothing about a product."""


def examine_products(engines: Sequence[EngineFinding], difference_error: float) -> list[Finding]:
    """Whether exact products agree with differences, and with each other."""
    exact = [e for e in engines if e.engine != "finite_difference" and not math.isnan(e.error)]
    findings = []
    for curvature, other, floor in (
        ("hessian", "differences of gradients", 10 * difference_error),
        ("ggn", "those of the other engine", 0.0),
    ):
        compared = [e for e in exact if e.curvature == curvature]
        if not compared:
            continue
        title, worst = f"products, {curvature}", max(compared, key=lambda e: e.error)
        if curvature == "hessian" and difference_error > _ROUGH:
            findings.append(
                Finding(
                    title,
                    "note",
                    "not checked: differences of gradients disagree with themselves by "
                    f"{difference_error:.0e}, as at the kinks of ReLU and max pooling, whose "
                    "curvature the Hessian leaves out, or where there is hardly any",
                )
            )
        elif worst.error <= max(_AGREE, floor):
            limit = "" if worst.error <= _AGREE else ", as well as those can tell"
            text = f"agree with {other} to {worst.error:.0e}{limit}"
            findings.append(Finding(title, "ok", text))
        else:
            findings.append(
                Finding(
                    title,
                    "warning",
                    f"by engine {worst.engine} differ from {other} by {worst.error:.0e}",
                    "Look for an operation with a wrong second derivative: a custom autograd "
                    "Function, or values that are taken through .data, .item() or NumPy.",
                )
            )
    return findings


def automatic_choice(subject: Subject, curvature: CurvatureName) -> Finding:
    """The engine that ``engine="auto"`` takes for many products, with its reason."""
    title = f"engine='auto', {curvature}"
    with messages() as heard:
        try:
            with oracle_of(subject, EngineChoice("auto")) as oracle:
                oracle.trace(curvature)
        except Exception as error:  # of all engines
            return Finding(title, "warning", "none", sentence(error))
    return Finding(title, "ok", chosen_engines(heard))


def examine_split(subject: Subject) -> Finding:
    """Whether the loss was seen to be a convex function of the network's outputs, and which."""
    title, split = "GGN split", LossSplit("ggn")
    has_remainder = False
    with messages(), oracle_of(subject, EngineChoice("auto")) as oracle:
        oracle.run_again(_plain, split=split)
        if not split.calls:
            return Finding(title, "warning", "not found", NO_SPLIT)
        with suppress(Exception):  # which the engines' findings tell of
            has_remainder = oracle.trace("ggn").has_remainder
    names = sorted({f"F.{call.func.__name__}" for call in split.calls})
    shapes = ", ".join(str(tuple(cut.output.shape)) for cut in split.cuts)
    found = f"found at {', '.join(names)} of outputs {shapes}"
    if has_remainder:
        found += "; what bypasses it, a penalty say, counts with its Hessian"
    return Finding(title, "ok", found)


def examine_likelihood(subject: Subject) -> Finding:
    """Whether the loss is seen to be a negative log-likelihood, which Fisher matrices need."""
    with messages():
        try:
            with oracle_of(subject, EngineChoice("graph")) as oracle:
                oracle.trace("fisher")
        except Exception as error:
            return Finding("likelihood", "note", "no Fisher matrix", sentence(error))
    return Finding("likelihood", "ok", "the loss is a negative log-likelihood: it has a Fisher")


def _plain(loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
    plain(loss, **options)
