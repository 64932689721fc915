"""What becomes of a sample under each engine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt import ClosureOracle
from hvpopt.engines.choice import EngineChoice, EngineName

from .oracle import Differences, differences
from .samples import NoGradientError, Sample, seeded

TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-2}


@dataclass(frozen=True)
class Outcome:
    """One sample under one engine."""

    sample: str
    engine: str
    """As asked for."""
    served_by: str
    """The engine that served, or an empty string."""
    verdict: str
    """"correct", "wrong", "refused", "undecided" (the oracle failed), "no gradient"."""
    error: float
    """Relative to the oracle's product."""
    message: str


def oracle_of(sample: Sample, v: list[Tensor]) -> Differences:
    """Differences of the sample's gradient in float64; its state is put back between runs."""
    double = sample.double()
    leaves = double.leaves
    start = [p.detach().clone() for p in leaves]
    state = {k: b.detach().clone() for k, b in double.module.state_dict(keep_vars=True).items()}
    buffers = {name for name, _ in double.module.named_buffers()}

    def gradient(values: Iterable[Tensor]) -> Tensor:
        with torch.no_grad():
            for p, x in zip(leaves, values, strict=True):
                p.copy_(x)
            for name, b in double.module.named_buffers():
                if name in buffers and name in state:
                    b.copy_(state[name])
        with seeded(7):
            grads = torch.autograd.grad(double.loss(), leaves, allow_unused=True)
        return _joined(
            [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]
        )

    return differences(gradient, start, [x.double() for x in v])


def outcomes(sample: Sample, engines: Iterable[EngineName]) -> list[Outcome]:
    """The outcome under each engine."""
    leaves = sample.leaves
    generator = torch.Generator().manual_seed(11)
    v = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
        for p in leaves
    ]
    try:
        with seeded(7):
            sample.loss()
        truth = oracle_of(sample, v)
        if not truth.value.numel() or not bool(truth.value.isfinite().all()):
            raise NoGradientError("the gradient is empty or not finite")
    except Exception as error:  # of the plain function, without any engine
        return [Outcome(sample.name, e, "", "no gradient", math.nan, str(error)) for e in engines]
    return [_outcome(sample, leaves, v, truth, engine) for engine in engines]


def _outcome(
    sample: Sample, leaves: list[Tensor], v: list[Tensor], truth: Differences, engine: EngineName
) -> Outcome:
    choice = EngineChoice(engine)
    try:
        with seeded(7):
            with ClosureOracle(
                sample.closure(), leaves, engine=choice, leave_no_trace=True
            ) as oracle:
                product = _joined(oracle.trace("hessian").product(v))
    except Exception as error:  # whatever it is, it is in the table
        message = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        return Outcome(sample.name, engine, "", "refused", math.nan, message)
    served_by = next(iter(choice._chosen.values())).name
    off = truth.disagreement(product)
    tolerance = TOLERANCE[leaves[0].dtype] if served_by != "finite_difference" else 3e-2
    if math.isnan(off):
        verdict = "undecided" if bool(product.isfinite().all()) else "wrong"
    else:
        verdict = "correct" if off <= tolerance else "wrong"
    return Outcome(sample.name, engine, served_by, verdict, off, "")


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors])
