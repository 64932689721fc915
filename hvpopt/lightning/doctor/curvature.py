"""Which curvature is there: the GGN's split, the likelihood, the automatic choice."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from hvpopt.engines.choice import EngineChoice
from hvpopt.engines.split import NO_SPLIT, CurvatureName, LossSplit
from hvpopt.lightning.doctor.looking import chosen_engines, messages, oracle_of, sentence
from hvpopt.lightning.doctor.report import Finding
from hvpopt.lightning.doctor.subject import Subject


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
