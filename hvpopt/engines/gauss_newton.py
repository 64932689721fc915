"""The middle of a Gauss-Newton or Fisher product Jᵀ(C (J v)): the matrix C at the outputs z.

For the GGN, C = ∇²_zz ℓ of the whole loss. For a Fisher matrix it is, for each call of a loss
function that is a negative log-likelihood, that likelihood's Fisher information in z times
∂L/∂(the call's value): what becomes of the value, its division by the micro-batches, say, scales
the matrix too. Independent likelihoods add up. What bypasses the loss functions is no part of a
Fisher matrix: a penalty on the weights belongs to a prior.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hvpopt.engines.base import reverse, unit_cotangent, vjp
from hvpopt.engines.losses import check_is_likelihood, terms_of
from hvpopt.engines.split import NO_SPLIT, LossCall, LossSplit, SplitNotFoundError
from hvpopt.engines.support import graph_nodes
from hvpopt.likelihoods import FisherKind, NoLikelihoodError, Terms

NO_LIKELIHOOD = (
    "A Fisher matrix needs to know the likelihood of the labels, and found no loss function of "
    "torch.nn.functional in the closure that is a negative log-likelihood of its input: compute "
    "the loss by F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss or "
    "F.poisson_nll_loss, outside of torch.func, or choose curvature='ggn' or 'hessian'."
)
NOT_A_SUM = (
    "The closure's loss is not a sum of the values of F.{name} with constant weights (it is a "
    "product or a nonlinear function of them), so that it is no negative log-likelihood and has no "
    "Fisher matrix: choose curvature='ggn' or 'hessian'."
)
NOT_CUT = (
    "The input of F.{name} is not seen to be an output of the network: it comes from another loss, "
    "or is log-probabilities that are not straight from log_softmax. Call F.cross_entropy with the "
    "logits for a Fisher matrix, or choose curvature='ggn' or 'hessian'."
)
OTHER_ARGUMENTS = (
    "The arguments of F.{name} that depend on the parameters are {names}, where a Fisher matrix "
    "needs one, the input: detach() the others, or choose curvature='ggn' or 'hessian'."
)
SOFTMAX_DIM = (
    "The log_softmax before F.nll_loss is along dimension {dim} of an output of shape {shape}, and "
    "not along the loss's classes: give it dim={expected}, or use F.cross_entropy."
)
NEGATIVE = (
    "The values of F.{name} enter the closure's loss with a negative weight, so that it is no "
    "negative log-likelihood and has no Fisher matrix: choose curvature='ggn' or 'hessian'."
)


@dataclass(frozen=True)
class Head:
    """A loss as a function of the network's outputs, linearised at them.

    Attributes:
        used: which of the split's cuts the loss depends on.
        outputs: z at each.
        slopes: ∂ℓ/∂z at each.
        rest: the gradient of what bypasses the cuts, for each input; None where nothing does.
        curve: u ↦ C u, from and to a tensor for each of ``outputs``.
        roots: the tensors that products differentiate once more.
        with_rest: whether the Hessian of what bypasses the cuts is a part of the matrix.
        terms: for a Fisher matrix, the terms of the likelihood at each of ``outputs``.
    """

    used: list[int]
    outputs: list[Tensor]
    slopes: list[Tensor]
    rest: Sequence[Tensor | None]
    curve: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]
    roots: Sequence[Tensor | None]
    with_rest: bool
    terms: Sequence[Terms] = ()


def head_of(loss: Tensor, split: LossSplit, inputs: Sequence[Tensor]) -> Head:
    """The head of a loss that was computed with a split; ``inputs`` may bypass it.

    Raises:
        SplitNotFoundError: for the GGN, if the loss depends on no cut.
        NoLikelihoodError: for a Fisher matrix, if the loss is no negative log-likelihood.
    """
    num_cuts, calls = len(split.cuts), split.calls if split.fisher_kind else []
    leaves = [cut.leaf for cut in split.cuts]
    bypass = _bypassing(loss, inputs)
    inside = [x for x, bypasses in zip(inputs, bypass, strict=True) if bypasses]
    places: list[Any] = [*leaves, *(call.value for call in calls), *inside]
    with split.severed():
        outer = reverse(
            [loss], places, [unit_cotangent(loss)], retain_graph=True, create_graph=True
        )
    used = [i for i in range(num_cuts) if outer[i] is not None]
    scales, slopes_inside = outer[num_cuts:][: len(calls)], iter(outer[num_cuts + len(calls) :])
    rest = [next(slopes_inside) if bypasses else None for bypasses in bypass]
    outputs = [split.cuts[i].output for i in used]
    slopes = [s for s in outer[:num_cuts] if s is not None]
    if split.fisher_kind:
        terms = _terms_of_outputs(split, used, scales)
        curve = _fisher(split, split.fisher_kind, terms)
        return Head(used, outputs, slopes, rest, curve, roots=[], with_rest=False, terms=terms)
    if not used:
        raise SplitNotFoundError(NO_SPLIT)

    def curve_by_loss(along: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return vjp(slopes, [leaves[i] for i in used], along)

    roots = [*slopes, *rest]
    return Head(used, outputs, slopes, rest, curve_by_loss, roots, with_rest=True)


def _bypassing(loss: Tensor, inputs: Sequence[Tensor]) -> list[bool]:
    """For each input, whether the loss depends on it by a way around the cuts.

    Derivatives are taken by those alone, so that none enters the network, whose hooks would be
    called with nothing.
    """
    nodes = graph_nodes([loss], through=lambda node: node.name() != "_CutBackward")
    around = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    return [not x.is_leaf or id(x) in around for x in inputs]


def _terms_of_outputs(
    split: LossSplit, used: Sequence[int], scales: Sequence[Tensor | None]
) -> list[Terms]:
    """The terms of the loss function that has each used cut for its input."""
    terms = {}
    for call, scale in zip(split.calls, scales, strict=True):
        if scale is not None:
            terms[call.cuts[0]] = _terms(split, call, scale)
    if not used or not terms.keys() >= set(used):
        raise NoLikelihoodError(NO_LIKELIHOOD)
    return [terms[i] for i in used]


def _fisher(
    split: LossSplit, kind: FisherKind, terms: Sequence[Terms]
) -> Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]:
    """u ↦ the Fisher information of the loss functions' inputs times u."""
    options: Any = {"num_samples": split.monte_carlo.num_samples, "generator": split.generator}
    maps = [t.fisher(kind, **options) for t in terms]

    def curve(along: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        pairs = zip(maps, along, strict=True)
        return [None if u is None else times(u) for times, u in pairs]

    return curve


def _terms(split: LossSplit, call: LossCall, scale: Tensor) -> Terms:
    """A call's terms, where it has a meaning as a negative log-likelihood."""
    name = call.func.__name__
    check_is_likelihood(call.func)
    if not call.cuts:
        raise NoLikelihoodError(NOT_CUT.format(name=name))
    if any(node.name() == "_CutBackward" for node in graph_nodes([scale])):
        raise NoLikelihoodError(NOT_A_SUM.format(name=name))
    bound = inspect.signature(call.func).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    arguments: dict[str, Any] = bound.arguments
    leaves = [split.cuts[i].leaf for i in call.cuts]
    names = [key for key, x in arguments.items() if any(x is leaf for leaf in leaves)]
    if names == ["target"] and call.func is F.mse_loss:  # which is symmetric
        arguments["input"], arguments["target"] = arguments["target"], arguments["input"]
    elif names != ["input"]:
        raise NoLikelihoodError(OTHER_ARGUMENTS.format(name=name, names=" and ".join(names)))
    if call.func is F.nll_loss:
        _check_softmax(arguments["input"], call.softmax_dim)
    terms = terms_of(call.func, arguments, scale)
    if bool((terms.weights < 0).any()):
        raise NoLikelihoodError(NEGATIVE.format(name=name))
    return terms


def _check_softmax(z: Tensor, dim: object) -> None:
    expected = min(1, z.dim() - 1)
    if dim not in (expected, expected - z.dim()):
        shape = tuple(z.shape)
        raise NoLikelihoodError(SOFTMAX_DIM.format(dim=dim, shape=shape, expected=expected))
