"""How a loss is reduced: a mean over how many terms, or a sum.

The mean over a dataset is the mean of its batches' means only if all have equally many terms. A
batch's terms are the entries that torch's loss function averages: examples for F.cross_entropy
(weighted by their classes' weights, without ignored ones), entries for F.mse_loss.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from hvpopt.engines.support import graph_nodes

_Denominator = Callable[[Mapping[str, Any]], float | Tensor]

REMEDY = (
    "give num_terms=, a function from a batch to how many terms its loss is a mean of, or "
    "num_terms='sum' where the losses of batches add up."
)


class UnknownReductionError(ValueError):
    """Raised where it cannot be told how the losses of several batches combine."""


@dataclass(frozen=True)
class TermCount:
    """What a batch's loss L(θ) = c ℓ(θ) + r(θ) says of its reduction; r is a penalty, say."""

    kind: Literal["mean", "sum"]
    """Whether ℓ, the value of torch's loss function, is a mean or a sum over terms."""
    number: float
    """What the sum over terms was divided by; 1 for a sum."""
    factors: tuple[float, ...] = (1.0,)
    """The factor c of each call of a loss function."""
    has_remainder: bool = False
    """Whether parameters enter r; looked for beside a sum alone."""

    def check_joins(self, other: "TermCount") -> None:
        """Lets two batches pass whose losses differ in the number of terms only.

        Raises:
            UnknownReductionError: if the kinds, or the factors c, differ, or something is added to
                a sum, of which it cannot be told whether it counts once.
        """
        if self.kind != other.kind:
            raise UnknownReductionError(
                f"The loss is a {self.kind} over terms in one batch and a {other.kind} in "
                f"another: use one reduction, or {REMEDY}"
            )
        if self.has_remainder or other.has_remainder:
            raise UnknownReductionError(
                "The loss adds something to a sum over terms, a penalty perhaps, which would count "
                "once for each batch: give num_terms='sum' if it should, or use reduction='mean', "
                "beside which it counts once."
            )
        same = len(self.factors) == len(other.factors) and all(
            math.isclose(a, b, rel_tol=1e-5)
            for a, b in zip(self.factors, other.factors, strict=True)
        )
        if not same:
            raise UnknownReductionError(
                "The value of torch's loss function enters the loss with the factors "
                f"{_shown(self.factors)} in one batch and {_shown(other.factors)} in another, so "
                f"that the loss is no mean over the terms that torch averages: {REMEDY}"
            )


@dataclass(frozen=True)
class _Call:
    """One call of a loss function."""

    func: Callable[..., Tensor]
    given: Mapping[str, Any]
    value: GradientEdge
    """Where its value stands in the graph, whatever is later done to it in place."""

    @property
    def name(self) -> str:
        return self.func.__name__

    @property
    def how(self) -> str:
        """The reduction's name."""
        legacy = self.given.get("size_average"), self.given.get("reduce")
        if legacy != (None, None):
            return _reduction.legacy_get_string(*legacy, emit_warning=False)
        return str(self.given["reduction"])

    def denominator(self) -> float:
        """By what the reduction divides the sum of the terms."""
        if self.how == "sum":
            return 1.0
        if self.how == "batchmean":  # of F.kl_div
            return float(self.given["input"].shape[0])
        return float(_DENOMINATORS[self.func](self.given))


class Reduction(TorchFunctionMode):
    """While active, watches calls of the loss functions of torch.nn.functional.

    Examples:
        >>> z = torch.zeros(3, 2, requires_grad=True)
        >>> with Reduction() as reduction:
        ...     loss = F.cross_entropy(z, torch.tensor([0, 1, -100]))
        >>> reduction.terms(loss).number
        2.0
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        out = func(*args, **(kwargs or {}))
        if func in _DENOMINATORS and out.requires_grad and not _is_transformed(out):
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self._calls.append(_Call(func, bound.arguments, get_gradient_edge(out)))
        return out

    def terms(self, loss: Tensor) -> TermCount:
        """The reduction of ``loss``, which was computed while this was active.

        Only calls that it depends on count. The graph behind it is kept.

        Raises:
            UnknownReductionError: if there is no such call, or several with different reductions
                or denominators, or one with ``reduction="none"``, or if a sum enters the loss with
                a factor, which may divide it by the number of terms.
        """
        found: dict[tuple[str, float], str] = {}
        factors, values = [], set()
        for call in self._calls:
            factor = _slope(loss, call.value)
            if factor is None:
                continue
            if call.how == "none":
                raise UnknownReductionError(
                    f"The loss is computed by F.{call.name} with reduction='none', and how its "
                    f"values are reduced is out of sight: use reduction='mean' or 'sum', or "
                    f"{REMEDY}"
                )
            found["sum" if call.how == "sum" else "mean", call.denominator()] = call.name
            factors.append(factor)
            values.add(call.value.node)
        if not found:
            raise UnknownReductionError(
                "The loss depends on no loss function of torch.nn.functional, so that it cannot be "
                f"told how the losses of several batches combine: use one, or {REMEDY}"
            )
        if len(found) > 1:
            calls = ", ".join(f"F.{n} ({kind} over {d:g})" for (kind, d), n in found.items())
            raise UnknownReductionError(
                f"The loss has parts with different numbers of terms, {calls}, so that the losses "
                f"of several batches do not combine by one weight: {REMEDY}"
            )
        ((kind, number),) = found
        if kind == "sum" and any(not math.isclose(c, 1.0, rel_tol=1e-6) for c in factors):
            raise UnknownReductionError(
                f"A sum over terms enters the loss with the factors {_shown(factors)}; whether "
                f"they make it a mean cannot be told: use reduction='mean', or {REMEDY}"
            )
        if kind != "sum":
            return TermCount("mean", number, tuple(factors))
        beside = graph_nodes([loss], lambda node: node not in values)
        has_remainder = any(hasattr(node, "variable") for node in beside)
        return TermCount("sum", number, tuple(factors), has_remainder)


def _slope(loss: Tensor, value: GradientEdge) -> float | None:
    """∂loss/∂value, for several values any; None where the loss does not depend on it."""
    if loss.grad_fn is value.node:
        return 1.0
    (slope,) = torch.autograd.grad(loss, value, retain_graph=True, allow_unused=True)
    return None if slope is None else float(slope.reshape(-1)[0])


def _is_transformed(value: Tensor) -> bool:
    """Whether the loss itself is differentiating or batching here by ``torch.func``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def _shown(factors: Any) -> str:
    return ", ".join(f"{c:.6g}" for c in factors)


def _labels(given: Mapping[str, Any]) -> float | Tensor:
    """Σ weight[target] over the targets that are not ignored; positions for probabilities."""
    target, weight = given["target"], given["weight"]
    if target.is_floating_point():
        return target.numel() / target.shape[min(1, target.dim() - 1)]
    ignored = given["ignore_index"]
    kept = target != (-100 if ignored is None else ignored)
    return kept.sum() if weight is None else _total(weight[target[kept]])


def _total(weights: Tensor) -> Tensor:
    return weights.sum(dtype=torch.promote_types(weights.dtype, torch.float32))


def _entries(*names: str) -> _Denominator:
    """The number of entries of some arguments after broadcasting."""
    return lambda given: torch.broadcast_shapes(*(given[n].shape for n in names)).numel()


def _weighted_entries(given: Mapping[str, Any]) -> float | Tensor:
    weight = given.get("weight")
    return _entries("input", "target")(given) if weight is None else _total(weight)


def _rows(name: str) -> _Denominator:
    """The number of entries without the last dimension."""
    return lambda given: given[name].shape[:-1].numel()


_DENOMINATORS: dict[Callable[..., Tensor], _Denominator] = {
    F.binary_cross_entropy: _entries("input", "target"),
    F.binary_cross_entropy_with_logits: _entries("input", "target"),
    F.cosine_embedding_loss: _entries("target"),
    F.cross_entropy: _labels,
    F.ctc_loss: lambda given: torch.as_tensor(given["target_lengths"]).numel(),
    F.gaussian_nll_loss: _entries("input", "target"),
    F.hinge_embedding_loss: _entries("input", "target"),
    F.huber_loss: _entries("input", "target"),
    F.kl_div: _entries("input", "target"),
    F.l1_loss: _weighted_entries,
    F.margin_ranking_loss: _entries("input1", "input2", "target"),
    F.mse_loss: _weighted_entries,
    F.multi_margin_loss: _rows("input"),
    F.multilabel_margin_loss: _rows("input"),
    F.multilabel_soft_margin_loss: _rows("input"),
    F.nll_loss: _labels,
    F.poisson_nll_loss: _entries("input", "target"),
    F.smooth_l1_loss: _entries("input", "target"),
    F.soft_margin_loss: _entries("input", "target"),
    F.triplet_margin_loss: _rows("anchor"),
}
if hasattr(F, "linear_cross_entropy"):
    _DENOMINATORS[F.linear_cross_entropy] = _labels
