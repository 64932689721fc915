"""Sophia: clipped steps, preconditioned by an occasional estimate of the curvature's diagonal."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineName
from hvpopt.optim.diagonal import DiagonalOptimizer, DiagonalReport, Moved, State
from hvpopt.optim.probes import gauss_newton_bartlett, hutchinson
from hvpopt.options import check_range
from hvpopt.trees import TensorList


@dataclass(frozen=True, kw_only=True)
class SophiaReport(DiagonalReport):
    """What Sophia did in a step.

    Attributes:
        fraction_unclipped: share of the entries whose step is shorter than ``lr``. The paper
            tunes γ so that it lies between .1 and .5.
        fraction_negative: share of the entries whose running curvature h is negative: there the
            step is ±lr along the running gradient.
    """

    progress_fields: ClassVar[tuple[str, ...]] = ("fraction_unclipped",)

    fraction_unclipped: float = math.nan
    fraction_negative: float = math.nan


class Sophia(DiagonalOptimizer):
    """The update that both estimators share."""

    report = SophiaReport
    usual_gamma: ClassVar[float]
    """γ where none is given, the source's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.96, 0.99),
        gamma: float | None = None,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        update_every: int = 10,
        seed: int = 0,
        engine: EngineName = "auto",
        max_consecutive_failures: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": self.usual_gamma if gamma is None else gamma,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(
            params,
            defaults,
            update_every=update_every,
            seed=seed,
            engine=engine,
            max_consecutive_failures=max_consecutive_failures,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_range("gamma", group["gamma"], 0.0)

    @abstractmethod
    def _estimate(
        self, oracle: ClosureOracle, params: TensorList, seed: int
    ) -> tuple[Tensor, TensorList]: ...

    def _moved(
        self, p: Tensor, grad: Tensor, diagonal: Tensor | None, group: dict[str, Any], state: State
    ) -> Moved:
        beta1, beta2 = group["betas"]
        zeros = torch.zeros_like(p, requires_grad=False)
        m = torch.lerp(state.get("momentum", zeros), grad, 1 - beta1)
        h = state.get("curvature", zeros)
        if diagonal is not None:
            h = torch.lerp(h, diagonal, 1 - beta2)
        # the least positive number keeps 0/0 out of dtypes in which eps is zero
        floor = max(group["eps"], torch.finfo(p.dtype).tiny)
        ratio = m / (group["gamma"] * h).clamp(min=floor)
        value = (1 - group["lr"] * group["weight_decay"]) * p - group["lr"] * ratio.clamp(-1, 1)
        figures = {
            "fraction_unclipped": (ratio.abs() < 1).sum(),
            "fraction_negative": (h < 0).sum(),
        }
        return Moved(value, {"momentum": m, "curvature": h}, h, figures)


class SophiaH(Sophia):
    """Sophia with Hutchinson's estimate of the Hessian's diagonal (Liu et al. 2023).

    With the gradient g of each step, and every k = ``update_every`` steps an estimate
    ĥ = z ⊙ H z with random signs z (the source takes normal z, with a larger variance):

        m ← β₁ m + (1 − β₁) g
        h ← β₂ h + (1 − β₂) ĥ                             (in the steps with an estimate)
        θ ← (1 − lr wd) θ − lr clip(m / max(γ h, ε), ±1)

    m and h start at zero. No entry moves by more than ``lr``, and where h is negative or small the
    step is ±lr, the sign of m. A step with an estimate costs one Hessian product more than a
    gradient, the others cost a gradient: the closure runs once and as it is, also compiled.

    Args:
        params: parameters, named parameters, or groups; ``lr``, ``betas``, ``gamma``, ``eps`` and
            ``weight_decay`` may differ from group to group.
        lr: learning rate, the greatest step of an entry.
        betas: β₁ and β₂.
        gamma: γ, of 1 over the loss's units, .01 by default; raise it where ``fraction_unclipped``
            of the reports is below .1, lower it where it is above .5.
        eps: ε, the least denominator.
        weight_decay: wd, decoupled from the loss; .2 in the source.
        update_every: k, steps from one estimate to the next.
        seed: of the probes.
        engine: see `hvpopt.closure.ClosureOracle`.
        max_consecutive_failures: so many failed steps in a row raise FloatingPointError.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for complex, integer or sparse parameters.

    Source: Liu, Li, Hall, Liang and Ma, "Sophia: a scalable stochastic second-order optimizer for
    language model pre-training" (2023), algorithms 1 and 3; its constants are the defaults.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SophiaH([w], lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        1.0
        >>> w.data
        tensor([0.9000, 0.9000])
    """

    usual_gamma = 0.01

    def _estimate(
        self, oracle: ClosureOracle, params: TensorList, seed: int
    ) -> tuple[Tensor, TensorList]:
        return hutchinson(oracle, params, seed)


class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimate of the GGN's diagonal (Liu et al. 2023).

    The steps are those of `SophiaH`, with ĥ = N ĝ⊙ĝ, where ĝ is the gradient of the mean loss over
    N terms at labels sampled from the network's outputs, so that h is never negative; see
    `hvpopt.optim.probes.gauss_newton_bartlett`, which takes sums and weighted losses too. A step
    with an estimate costs a gradient more than the others; no second derivatives are needed.

    The closure has to compute its loss by ``F.cross_entropy``, ``F.mse_loss`` or another negative
    log-likelihood of torch.nn.functional (or modules that call them).

    Args:
        params, lr, betas, eps, weight_decay, update_every: as of `SophiaH`.
        gamma: γ, .05 by default, the source's greater value for this estimate.
        seed: of the labels.
        engine: see `hvpopt.closure.ClosureOracle`.
        max_consecutive_failures: so many failed steps in a row raise FloatingPointError.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for complex, integer or sparse parameters.
        NoLikelihoodError: in a step, if the loss is no sum of known negative log-likelihoods.

    Source: Liu et al. (2023), algorithms 2 and 3; its constants are the defaults.
    """

    usual_gamma = 0.05

    def _estimate(
        self, oracle: ClosureOracle, params: TensorList, seed: int
    ) -> tuple[Tensor, TensorList]:
        loss, grad = oracle.gradient()
        if not (torch.isfinite(loss) and trees.all_finite(grad)):
            return loss, trees.zeros_like(params)  # no labels of such outputs; the step has failed
        return loss, gauss_newton_bartlett(oracle, params, seed)
