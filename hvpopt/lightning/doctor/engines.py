"""What each engine can do with a closure: support, correctness, cost."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from hvpopt import trees
from hvpopt.engines.blame import line
from hvpopt.engines.choice import EngineChoice, EngineName
from hvpopt.engines.split import CurvatureName
from hvpopt.lightning.cost import peak_bytes
from hvpopt.lightning.doctor.cost import Task, medians
from hvpopt.lightning.doctor.looking import messages, oracle_of, sentence
from hvpopt.lightning.doctor.report import EngineFinding
from hvpopt.lightning.doctor.subject import Subject, distance
from hvpopt.trees import TensorList

_PAIRS: tuple[tuple[EngineName, CurvatureName], ...] = (
    ("graph", "hessian"),
    ("dual", "hessian"),
    ("finite_difference", "hessian"),
    ("graph", "ggn"),
    ("dual", "ggn"),
)
_OUT_OF_MEMORY = (
    "The device's memory was too small for a product: take a smaller batch, or checkpoint layers "
    "(torch.utils.checkpoint with use_reentrant=False)."
)
_UNBOUNDED = (
    "look for an operation whose second derivative is unbounded, such as a root or norm near zero."
)


@dataclass(frozen=True)
class Engines:
    """What was found of all engines.

    Attributes:
        findings: one for each engine and matrix.
        gradient_seconds: of one closure run.
        gradient_bytes: its peak memory.
    """

    findings: tuple[EngineFinding, ...]
    gradient_seconds: float
    gradient_bytes: float


def examine_engines(
    subject: Subject, v: TensorList, reference: TensorList, *, seconds: float
) -> Engines:
    """Support, correctness and cost of each engine and matrix.

    Args:
        subject: the closure.
        v: the direction of the products that are compared.
        reference: H v by differences of gradients.
        seconds: that the timing of one engine and matrix may take.
    """
    gradient_bytes = _gradient_bytes(subject)
    findings: list[EngineFinding] = []
    products: dict[tuple[str, str], list[TensorList]] = {}
    taken: list[float] = []
    for name, curvature in _PAIRS:
        choice = EngineChoice(name)
        finding, found = _support(subject, choice, name, curvature, v)
        if found:
            products[name, curvature] = found
            cost = _cost(subject, choice, curvature, v, seconds)
            taken.append(cost["gradient"])
            finding = replace(
                finding,
                first_cost=cost["first"] / cost["gradient"],
                further_cost=cost["further"] / cost["gradient"],
                memory=cost["bytes"] / gradient_bytes if gradient_bytes else math.nan,
            )
        findings.append(finding)
    compared = [_compared(finding, products, reference) for finding in findings]
    return Engines(tuple(compared), min(taken, default=math.nan), gradient_bytes)


def _support(
    subject: Subject,
    choice: EngineChoice,
    name: EngineName,
    curvature: CurvatureName,
    v: TensorList,
) -> tuple[EngineFinding, list[TensorList]]:
    """Whether an engine has products; if so that of one run, and that of a trace."""
    with messages():
        try:
            with oracle_of(subject, choice) as oracle:
                product = oracle.trace_along(v, curvature)[2]
            with oracle_of(subject, choice) as oracle:
                again = oracle.trace(curvature).product(v)
        except torch.OutOfMemoryError:
            return EngineFinding(name, curvature, False, "out of memory", _OUT_OF_MEMORY), []
        except Exception as error:  # whatever an engine or the user's own derivatives raise
            return EngineFinding(name, curvature, False, line(error), sentence(error)), []
    if not trees.all_finite([*product, *again]):
        reason = "the product is not finite, though loss and gradient are"
        return EngineFinding(name, curvature, False, reason, f"{reason}: {_UNBOUNDED}"), []
    return EngineFinding(name, curvature, True), [product, again]


def _cost(
    subject: Subject,
    choice: EngineChoice,
    curvature: CurvatureName,
    v: TensorList,
    seconds: float,
) -> dict[str, float]:
    """Seconds of a gradient, a first and a further product; bytes of the first."""

    def first() -> None:
        with oracle_of(subject, choice) as oracle:
            oracle.trace_along(v, curvature)

    with messages():
        peak = _peak(first, subject.device)
        with oracle_of(subject, choice) as oracle:
            further = partial(oracle.trace(curvature).product, v)
            gradient = partial(_in_isolation, subject, subject.closure)
            tasks: dict[str, Task] = {"gradient": gradient, "first": first, "further": further}
            taken = medians(tasks, device=subject.device, seconds=seconds)
    return {**taken, "bytes": peak}


def _gradient_bytes(subject: Subject) -> float:
    """The peak memory of a gradient, isolated as products are."""

    def gradient() -> None:
        with oracle_of(subject, EngineChoice("graph")) as oracle:
            oracle.gradient()

    return _peak(gradient, subject.device)


def _peak(task: Task, device: torch.device) -> float:
    """The peak memory; NaN on devices where it is not recorded."""
    return float(peak_bytes(task, device)) if device.type in ("cpu", "cuda") else math.nan


def _in_isolation(subject: Subject, task: Task) -> object:
    with subject.world.further_run(), torch.enable_grad():
        return task()


def _compared(
    finding: EngineFinding,
    products: dict[tuple[str, str], list[TensorList]],
    reference: TensorList,
) -> EngineFinding:
    """The finding with the larger error of its two products."""
    ours = products.get((finding.engine, finding.curvature), [])
    other = {"graph": "dual", "dual": "graph"}.get(finding.engine, "")
    others = [reference] if finding.curvature == "hessian" else products.get((other, "ggn"), [])
    if not ours or not others:
        return finding
    return replace(finding, error=max(distance(product, others[0]) for product in ours))
