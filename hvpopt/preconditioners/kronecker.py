"""Kronecker-factored curvature of the layers, as a preconditioner."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hvpopt import trees
from hvpopt.closure.oracle import ClosureOracle
from hvpopt.closure.slopes import sampled_slopes
from hvpopt.engines.base import vjp
from hvpopt.engines.layer_calls import LayerCalls
from hvpopt.engines.layer_readers import LayerCall
from hvpopt.likelihoods import wide
from hvpopt.options import check_count, check_range
from hvpopt.preconditioners.base import CurvaturePoint, Preconditioner, State
from hvpopt.preconditioners.factors import Factors, combined, factors_of, floored
from hvpopt.trees import TensorList

_KEY = "kronecker"
_NAMES = ((), ("diagonal",), ("rows", "columns"))


@dataclass(frozen=True, kw_only=True)
class Kronecker(Preconditioner):
    """M ≈ R ⊗ C + D for each layer, with Kronecker factors of its block of the Fisher matrix.

    A layer y = W x + b used at N positions (examples, times steps or pixels) has

        C = mean [x; 1][x; 1]ᵀ,      R = Σ ∂y ∂yᵀ,

    with slopes ∂y of the loss under labels sampled from the model, so that R ⊗ C approximates the
    generalised Gauss-Newton matrix of the loss, in its units (K-FAC: Martens and Grosse 2015;
    convolutions: Grosse and Martens 2016). M⁻¹ is taken factor by factor, with D split between
    them (`hvpopt.preconditioners.factors.Factors.inverse`): two matrix products, which cost
    (inputs + outputs)/4N of a product with the curvature, and two inverses a step.

    Layers are seen in a further run of the closure, whichever module or function they come from:
    linear maps, convolutions, embeddings, attention, recurrent layers
    (`hvpopt.engines.layer_calls`). A weight used several times has the sum of its uses, also of
    those inside of derivatives by the inputs, as in the residuals of physics-informed networks
    (Dangel, Müller and Zeinhofer 2024 have another decomposition of the same products). Where a
    weight and its bias differ in D, the weight's is taken for both. Parameters that no known
    function uses (scales of normalisation, reparametrised weights) have a diagonal instead,
    halfway between the squared gradient under sampled labels, whose mean is the Fisher's diagonal,
    and its mean over the parameter.

    In the states, under "kronecker": the factors as "rows" and "columns", or a "diagonal";
    "partner", how many parameters on the bias of a weight is, or the weight of a bias;
    "num_refreshes".

    Args:
        every: steps from one refresh to the next; a refresh costs a run of the closure, a backward
            pass, and a matrix product for each factor.
        decay: the most that the factors known so far weigh against new ones; the first refreshes
            are averaged evenly. With 0 the noise of the sampled labels stays.
        num_samples: how many labels are sampled for each example.
        max_size: a factor with more rows is replaced by its diagonal. Inverses take time with the
            third power of the size: on a CPU core 0.02 s at 1,000 in float32, 0.2 s at 2,000.

    Raises:
        ValueError: for an option out of range.

    Examples:
        >>> import hvpopt
        >>> net = torch.nn.Linear(3, 2)
        >>> optimizer = hvpopt.NewtonCG(net.parameters(), preconditioner=Kronecker(every=5))
    """

    every: int = 2
    decay: float = 0.7
    num_samples: int = 1
    max_size: int = 2048

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_range("decay", self.decay, 0.0, 0.999)
        check_count("num_samples", self.num_samples)
        check_count("max_size", self.max_size)

    def is_ready(self, states: Sequence[State]) -> bool:
        """Whether every parameter's curvature is known, and every bias still has its weight."""
        partners = [s[_KEY]["partner"] if _KEY in s else None for s in states]
        for i, step in enumerate(partners):
            if step is None or not 0 <= i + step < len(partners):
                return False
            if partners[i + step] != -step:
                return False
            if states[i + step][_KEY]["pair"] != states[i][_KEY]["pair"]:
                return False
        return True

    @torch.no_grad()
    def refresh(self, point: CurvaturePoint, states: Sequence[State]) -> None:
        """Runs the closure once more, without a trace, and updates the factors.

        Factors that are not finite leave those known so far.

        Raises:
            NoLikelihoodError: if the loss is no sum of negative log-likelihoods that are known.
        """
        matrices, partners = self._measure(point)
        if not all(trees.all_finite(own) for own in matrices):
            return
        each = zip(states, matrices, partners, strict=True)
        for i, (state, fresh, partner) in enumerate(each):
            old = state.get(_KEY, {})
            last = _read(old)
            same = [f.shape for f in last] == [f.shape for f in fresh]
            is_known = same and old.get("partner") == partner
            count = old["num_refreshes"] + 1 if is_known else 1
            known: State = {"partner": partner, "pair": min(i, i + partner)}
            known["num_refreshes"] = count
            weight = min(1 - 1 / count, self.decay)
            for k, name in enumerate(_NAMES[len(fresh)]):
                known[name] = fresh[k].lerp(last[k], weight) if is_known else fresh[k]
            state[_KEY] = known

    def solve(self, r: TensorList, states: Sequence[State], shift: Sequence[float]) -> TensorList:
        """M⁻¹ r; see `Preconditioner.solve`."""
        return self.inverse(states, shift)(r)

    def inverse(
        self, states: Sequence[State], shift: Sequence[float]
    ) -> Callable[[TensorList], TensorList]:
        """r ↦ M⁻¹ r, for many r."""
        partners = [i + state[_KEY]["partner"] for i, state in enumerate(states)]
        inverses: list[Factors | Tensor | None] = []
        for state, d in zip(states, shift, strict=True):
            known = _read(state[_KEY])
            if len(known) == 2:
                inverses.append(Factors(*known).inverse(d))
            else:
                inverses.append(1 / (floored(known[0]) + d) if known else None)

        def inverse(r: TensorList) -> TensorList:
            solved: list[Tensor | None] = [None] * len(r)
            for i, (v, j, by) in enumerate(zip(r, partners, inverses, strict=True)):
                if isinstance(by, Tensor):
                    solved[i] = v * by.to(v.dtype)
                elif by is not None:
                    x = wide(v).reshape(*by.rows.shape[:2], -1)
                    if j != i:
                        x = torch.cat([x, wide(r[j]).reshape(*by.rows.shape[:2], 1)], -1)
                    x = by @ x
                    if j != i:
                        solved[j] = x[..., -1].reshape(r[j].shape).to(r[j].dtype)
                        x = x[..., :-1]
                    solved[i] = x.reshape(v.shape).to(v.dtype)
            return [v for v in solved if v is not None]

        return inverse

    def _measure(self, point: CurvaturePoint) -> tuple[list[TensorList], list[int]]:
        """For each parameter [R, C], a diagonal, or nothing; and the steps to its partner."""
        params = point.params
        calls, slopes, squares = self._watch(point)
        parts: list[list[Factors]] = [[] for _ in params]
        partners = [0] * len(params)
        for call in calls:
            num_rows = params[call.weight].shape[0]
            sizes = {"num_samples": self.num_samples, "max_size": self.max_size}
            found = factors_of(call, slopes.get(call.output, []), num_rows, **sizes)
            if found is None:
                continue
            parts[call.weight].append(found)
            if call.bias is not None:
                partners[call.weight] = call.bias - call.weight
                partners[call.bias] = call.weight - call.bias
        matrices: list[TensorList] = [[] for _ in params]
        agreed = _agreed(point.oracle, params, [bool(p) for p in parts], partners)
        for i, square in enumerate(squares):
            if not agreed[i]:
                partners[i] = 0
            if agreed[i] and parts[i]:
                factors = combined(parts[i])
                matrices[i] = [factors.rows, factors.columns]
            elif partners[i] == 0:
                matrices[i] = [(square + square.mean()) / 2]
        return _averaged(point.oracle, matrices), partners

    def _watch(
        self, point: CurvaturePoint
    ) -> tuple[list[LayerCall], dict[GradientEdge, TensorList], TensorList]:
        """The calls, the slopes by their values for each sample, and squared gradients.

        The squares are those of parameters without calls, averaged over samples.
        """
        params, seen = point.params, LayerCalls(point.params)
        slopes: dict[GradientEdge, TensorList] = {}
        squares = [torch.zeros_like(wide(p), requires_grad=False) for p in params]

        def then(z: TensorList, u: TensorList) -> None:
            edges = list(dict.fromkeys(call.output for call in seen.calls))
            used = {i for call in seen.calls for i in (call.weight, call.bias)}
            others = [i for i in range(len(params)) if i not in used]
            wanted: list[Any] = [*edges, *(params[i] for i in others)]
            grads = vjp(z, wanted, u)
            for edge, g in zip(edges, grads, strict=False):
                if g is not None:
                    slopes.setdefault(edge, []).append(g)
            for i, g in zip(others, grads[len(edges) :], strict=True):
                if g is not None:
                    squares[i] += wide(g) ** 2 / self.num_samples

        sampled_slopes(
            point.oracle,
            "monte_carlo",
            seed=point.seed,
            then=then,
            num_samples=self.num_samples,
            around=seen,
        )
        return seen.calls, slopes, squares


def _agreed(
    oracle: ClosureOracle, params: TensorList, are_covered: list[bool], partners: list[int]
) -> list[bool]:
    """For each parameter, whether all ranks know its curvature in the same form."""
    forms = [2 * step + covered for step, covered in zip(partners, are_covered, strict=True)]
    form = torch.tensor(forms, dtype=torch.float32, device=params[0].device)
    (mean,) = oracle.average([form])
    (share_of_others,) = oracle.average([(form != mean.round()).float()])
    same = (share_of_others == 0).tolist()
    return [same[i] and same[i + step] for i, step in enumerate(partners)]


def _averaged(oracle: ClosureOracle, matrices: list[TensorList]) -> list[TensorList]:
    """The mean over ranks, by one collective."""
    means = iter(oracle.average([m for own in matrices for m in own]))
    return [[next(means) for _ in own] for own in matrices]


def _read(known: State) -> TensorList:
    """What a state holds: of rows and of columns, a diagonal, or nothing."""
    return [wide(known[name]) for name in ("diagonal", "rows", "columns") if name in known]
