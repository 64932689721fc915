"""Stochastic meta-descent: a gain for each weight, learned through Hessian-vector products."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineName
from hvpopt.engines.split import Curvature
from hvpopt.optim.base import ClosureOptimizer
from hvpopt.optim.checks import check_flag
from hvpopt.optim.gains import GainRule, figures
from hvpopt.optim.report import Outcome, StepReport
from hvpopt.options import check_range
from hvpopt.trees import TensorList

Gain = Literal["parameter", "tensor", "group"]


@dataclass(frozen=True, kw_only=True)
class SMDReport(StepReport):
    """What SMD did in a step.

    Attributes:
        log_gain_min, log_gain_max: of ln(gain) over the parameters.
        log_gain_mean, log_gain_low, log_gain_median, log_gain_high: the mean and the 5%, 50% and
            95% quantiles of ln(gain); of at most 10,000 evenly spaced gains.
        fraction_floored: share of gains that shrank by the full factor ρ.
        fraction_at_bounds: share of gains at one of their bounds.
        trace_norm: ‖v‖, v = −∂θ/∂ln p accumulated over time.
        trace_alignment: the cosine of v and the gradient.
        trace_curvature: vᵀC v / ‖v‖² at the step's beginning.
        overshoot: dᵀC d / dᵀg for the step d, where the guard is on; above 1 the step was cut.
    """

    progress_fields: ClassVar[tuple[str, ...]] = ("log_gain_mean",)

    log_gain_min: float = float("nan")
    log_gain_mean: float = float("nan")
    log_gain_max: float = float("nan")
    log_gain_low: float = float("nan")
    log_gain_median: float = float("nan")
    log_gain_high: float = float("nan")
    fraction_floored: float = float("nan")
    fraction_at_bounds: float = float("nan")
    trace_norm: float = float("nan")
    trace_alignment: float = float("nan")
    trace_curvature: float = float("nan")
    overshoot: float = float("nan")


class SMD(ClosureOptimizer):
    """Stochastic meta-descent (Schraudolph 1999, 2002), normalised, bounded and guarded.

    With the gradient g and a product C v from one run of the closure, in this order:

        s ← β s + (1 − β) (v⊙g)²,     u = v⊙g / √ŝ        (normalization=None: u = v⊙g)
        p ← p ⊙ max(ρ, 1 + μ u)                           (within gain_bounds; p = lr · gain)
        p ← p / q  where  q = dᵀC d / dᵀg > 1,  d = p⊙g    (the guard)
        θ ← θ − p⊙g
        v ← λ v + p⊙(g − λ C v)

    ŝ is s with Adam's correction of its start at zero. Gains start at 1, so ``lr`` is the first
    step's learning rate, and learning-rate schedulers multiply. With μ = 0 and the guard off this
    is SGD. v sums ∂θ/∂ln p over all gains: exact for one gain, an approximation for one gain a
    weight. Elementwise gains help where the ill-conditioning follows the axes and where the
    problem drifts; on a rotated quadratic they cannot beat a tuned learning rate.

    Args:
        params: parameters, named parameters, or groups; ``lr`` and ``weight_decay`` may differ
            from group to group.
        lr: initial learning rate p₀.
        mu: the gains' own learning rate; in units of 1/loss with ``normalization=None``.
        lam: decay of v in [0, 1]; its horizon is 1/(1 − λ) steps.
        weight_decay: coefficient of ½‖θ‖², in the loss's units; part of g and of C.
        curvature: "ggn" (positive semi-definite where the loss is convex in the network's
            outputs) or "hessian".
        normalization: "rms", which makes the rule invariant to the loss's scale, or None.
        overshoot_guard: cuts a step that passes the minimum of the model along it. One product
            more a step.
        gain: one gain a "parameter" (each weight), a "tensor", or a parameter "group".
        rho: a gain shrinks at most by this factor a step.
        gain_bounds: the gains stay between these multiples of ``lr``.
        beta: decay of the running mean square s.
        engine: see `hvpopt.closure.ClosureOracle`.
        max_consecutive_failures: so many failed steps in a row raise FloatingPointError.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for complex, integer or sparse parameters.

    Source: Schraudolph, "Local gain adaptation in stochastic gradient descent" (1999), and
    "Fast curvature matrix-vector products for second-order gradient descent" (2002), section 4.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SMD([w], lr=0.1, curvature="hessian")
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

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        mu: float = 0.05,
        lam: float = 0.99,
        weight_decay: float = 0.0,
        *,
        curvature: Curvature = "ggn",
        normalization: Literal["rms"] | None = "rms",
        overshoot_guard: bool = True,
        gain: Gain = "parameter",
        rho: float = 0.5,
        gain_bounds: Sequence[float] = (1e-3, 1e3),
        beta: float = 0.99,
        engine: EngineName = "auto",
        max_consecutive_failures: int = 5,
    ) -> None:
        if curvature not in ("ggn", "hessian"):
            raise ValueError(f"curvature={curvature!r} is unknown: choose 'ggn' or 'hessian'.")
        if normalization not in ("rms", None):
            raise ValueError(f"normalization={normalization!r} is unknown: choose 'rms' or None.")
        if gain not in get_args(Gain):
            raise ValueError(f"gain={gain!r} is unknown: choose one of {get_args(Gain)}.")
        if not isinstance(gain_bounds, Sequence) or len(gain_bounds) != 2:
            raise ValueError(f"gain_bounds={gain_bounds!r}: expected two numbers, (low, high).")
        low, high = (check_range("gain_bounds", bound, 0.0) for bound in gain_bounds)
        if not 0 < low <= 1 <= high:
            raise ValueError(f"gain_bounds={gain_bounds!r}: expected 0 < low <= 1 <= high.")
        self._curvature: Curvature = curvature
        self._guard = check_flag("overshoot_guard", overshoot_guard)
        self._gain: Gain = gain
        self._rule = GainRule(
            normalization=normalization,
            rho=check_range("rho", rho, 0.0, 1.0),
            bounds=(float(low), float(high)),
            beta=check_range("beta", beta, 0.0, 0.9999999),
        )
        defaults = {"lr": lr, "mu": mu, "lam": lam, "weight_decay": weight_decay}
        super().__init__(
            params, defaults, engine=engine, max_consecutive_failures=max_consecutive_failures
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_range("mu", group["mu"], 0.0)
        check_range("lam", group["lam"], 0.0, 1.0)
        check_range("weight_decay", group["weight_decay"], 0.0)

    def _advance(self, oracle: ClosureOracle, params: TensorList, start: TensorList) -> StepReport:
        v = [self._state(p)["trace"] for p in params]
        if self._guard:
            point = oracle.trace(self._curvature)
            loss, grad, product = point.loss, point.grad, point.product
            curved = product(v)
        else:
            loss, grad, curved = oracle.trace_along(v, self._curvature)
        self._check_gradients(oracle, params)
        decay = self._decay_of_used(params)
        if failure := _failure(loss, grad, curved):
            return self._report(oracle, failure, loss)
        grad = _plus_decay(grad, decay, start)
        curved = _plus_decay(curved, decay, v)

        gains, squares, floored = self._adapted_gains(params, v, grad)
        applied, steps = gains, self._times_lr(gains)
        numbers = {}
        if self._guard:
            d = list(torch._foreach_mul(steps, grad))
            descent = float(trees.dot(d, grad))
            q = float(trees.dot(d, _plus_decay(product(d), decay, d))) / descent if descent else 0.0
            if math.isnan(q):
                return self._report(oracle, Outcome.NONFINITE_PRODUCT, loss)
            if q > 1:
                applied, steps = trees.scale(gains, 1 / q), trees.scale(steps, 1 / q)
                gains = [gain.clamp(*self._rule.bounds) for gain in applied]
            numbers["overshoot"] = q

        lam = self._per_parameter("lam")
        traces = [
            torch.addcmul(lam_i * v_i, step, g.sub(c, alpha=lam_i))
            for lam_i, v_i, step, g, c in zip(lam, v, steps, grad, curved, strict=True)
        ]
        numbers |= figures(self._rule, gains, floored, (v, curved), (traces, grad))
        for p, gain, g, lr in zip(params, applied, grad, self._per_parameter("lr"), strict=True):
            p.add_(gain * g, alpha=-lr)  # in this order: without meta-learning, SGD to the bit
        for p, gain, square, trace in zip(params, gains, squares, traces, strict=True):
            self.state[p].update(gain=gain, square=square, trace=trace)
            self.state[p]["num_updates"] += 1
        return self._report(oracle, Outcome.STEPPED, loss, **numbers)

    def _report(
        self, oracle: ClosureOracle, outcome: Outcome, loss: Tensor, **numbers: Any
    ) -> SMDReport:
        return replace(
            SMDReport(
                outcome=outcome,
                loss=float(loss),
                num_closure_runs=oracle.num_runs,
                num_products=oracle.num_products,
            ),
            **numbers,
        )

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            like = p.detach() if self._gain == "parameter" else p.detach().new_empty(())
            state.update(
                gain=torch.ones_like(like),
                square=torch.zeros_like(like),
                trace=torch.zeros_like(p, requires_grad=False),
                num_updates=0,
            )
        return state

    def _times_lr(self, gains: TensorList) -> TensorList:
        return trees.scale_each(self._per_parameter("lr"), gains)

    def _adapted_gains(
        self, params: TensorList, v: TensorList, grad: TensorList
    ) -> tuple[TensorList, TensorList, TensorList]:
        """The new gains, the new mean squares, and which gains fell by the full factor."""
        signals = self._shared(list(torch._foreach_mul(v, grad)))
        mus, states = self._per_parameter("mu"), [self.state[p] for p in params]
        adapted = [
            self._rule(state["gain"], state["square"], signal, mu=mu, age=state["num_updates"])
            for state, signal, mu in zip(states, signals, mus, strict=True)
        ]
        gains, squares, floored = map(list, zip(*adapted, strict=True))
        return gains, squares, floored

    def _shared(self, products: TensorList) -> TensorList:
        """v⊙g, summed over what shares a gain."""
        if self._gain == "parameter":
            return products
        sums = [product.sum() for product in products]
        if self._gain == "tensor":
            return sums
        totals: TensorList = []
        for group in self.param_groups:
            size = sum(p.requires_grad for p in group["params"])
            of_group = sums[len(totals) : len(totals) + size]
            total = sum(float(x) for x in of_group)
            totals += [torch.full_like(x, total) for x in of_group]
        return totals


def _failure(loss: Tensor, grad: TensorList, curved: TensorList) -> Outcome | None:
    if not torch.isfinite(loss):
        return Outcome.NONFINITE_LOSS
    if not trees.all_finite(grad):
        return Outcome.NONFINITE_GRADIENT
    return None if trees.all_finite(curved) else Outcome.NONFINITE_PRODUCT


def _plus_decay(xs: TensorList, decay: list[float], ys: TensorList) -> TensorList:
    if not any(decay):
        return xs
    return [x.add(y, alpha=w) for x, w, y in zip(xs, decay, ys, strict=True)]
