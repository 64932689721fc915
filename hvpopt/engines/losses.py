"""The loss functions of ``torch.nn.functional`` that are negative log-likelihoods of their input.

Weights say how often a term counts. ``weight`` of every loss, class weights and ``pos_weight`` are
such weights, and so is the total of targets that do not sum to one; label smoothing changes the
targets. A term that ``ignore_index`` leaves out has none.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hvpopt.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    NoLikelihoodError,
    Poisson,
    Terms,
    wide,
)


def check_is_likelihood(func: Callable[..., Tensor]) -> None:
    """Lets the loss functions pass whose Fisher matrix is known.

    Raises:
        NoLikelihoodError: For others.
    """
    if func not in _TERMS:
        known = ", ".join(sorted(f"F.{f.__name__}" for f in _TERMS))
        raise NoLikelihoodError(
            f"The closure calls F.{func.__name__}, whose Fisher matrix is not known (it is for "
            f"{known}): compute the loss by one of these, or choose curvature='ggn' or 'hessian'."
        )


def terms_of(func: Callable[..., Tensor], arguments: Mapping[str, Any], scale: Tensor) -> Terms:
    """What a call of a loss function adds to the loss, as terms of a likelihood.

    Args:
        func: The loss function.
        arguments: All its arguments by name; of ``F.nll_loss``, ``input`` are the logits.
        scale: ∂L/∂(the function's value), in that value's shape.

    Raises:
        NoLikelihoodError: If the call is no negative log-likelihood of its input with a Fisher
            matrix known here.
    """
    check_is_likelihood(func)
    if arguments["size_average"] is not None or arguments["reduce"] is not None:
        raise NoLikelihoodError(
            f"F.{func.__name__} is called with size_average or reduce, which torch deprecated: "
            "give reduction='mean', 'sum' or 'none' for a Fisher matrix."
        )
    held = {k: x.detach() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    return _TERMS[func](held, scale.detach())


def _categorical(a: Mapping[str, Any], scale: Tensor) -> Terms:
    likelihood = Categorical()
    z, y, smoothing = a["input"], a["target"], a.get("label_smoothing", 0.0)
    (dim,) = likelihood.dims(z)
    num_classes = z.shape[dim]
    weight = wide(z).new_ones(num_classes) if a["weight"] is None else a["weight"]
    by_class = weight.reshape([-1] + [1] * (-1 - dim))
    if y.is_floating_point():
        soft, kept = y, y.new_ones(()).expand_as(y.narrow(dim, 0, 1))
        num_terms = kept.sum()
    else:
        is_kept = y != a["ignore_index"]
        y = y.where(is_kept, 0)
        kept = is_kept.unsqueeze(dim).to(weight.dtype)
        times = weight[y].unsqueeze(dim) * kept
        num_terms = times.sum()
        soft = F.one_hot(y, num_classes).movedim(-1, dim) if smoothing else None
    if soft is not None:
        # −Σ_k w_k t_k log p_k is a term with the targets w t / T that counts T = Σ_k w_k t_k times
        soft = by_class * ((1 - smoothing) * soft + smoothing / num_classes)
        total = soft.sum(dim, keepdim=True)
        y, times = soft / total.where(total != 0, 1), total * kept
    weights = times * (scale.unsqueeze(dim) if scale.dim() else scale)
    return Terms(likelihood, z, y, weights / num_terms if a["reduction"] == "mean" else weights)


def _bernoulli(a: Mapping[str, Any], scale: Tensor) -> Terms:
    y, pos_weight = a["target"], a["pos_weight"]
    if pos_weight is None:
        return _elementwise(Bernoulli(), a, y, scale)
    # −w y log σ(z) − (1 − y) log σ(−z) is a term with the target w y / T, T times
    total = pos_weight * y + (1 - y)
    y = pos_weight * y / total.where(total != 0, 1)
    return _elementwise(Bernoulli(), a, y, scale * total)


def _gaussian(a: Mapping[str, Any], scale: Tensor) -> Terms:
    weight = a.get("weight")
    if weight is not None and a["reduction"] == "mean":
        # unlike the other losses, this one divides by the sum of the weights
        return _elementwise(Gaussian(), a, a["target"], scale * weight.numel() / weight.sum())
    return _elementwise(Gaussian(), a, a["target"], scale)


def _poisson(a: Mapping[str, Any], scale: Tensor) -> Terms:
    if not a["log_input"]:
        raise NoLikelihoodError(
            "F.poisson_nll_loss is called with log_input=False; the Fisher matrix is known for "
            "the logarithm of the rate: use log_input=True, or choose curvature='ggn'."
        )
    return _elementwise(Poisson(), a, a["target"], scale)


def _elementwise(likelihood: Likelihood, a: Mapping[str, Any], y: Tensor, scale: Tensor) -> Terms:
    z = a["input"]
    if y.shape != z.shape:
        raise NoLikelihoodError(
            f"The loss function's target has shape {tuple(y.shape)}, its input {tuple(z.shape)}; "
            "a Fisher matrix needs one label for each output: give both the same shape."
        )
    weights = scale if a.get("weight") is None else scale * a["weight"]
    return Terms(likelihood, z, y, weights / z.numel() if a["reduction"] == "mean" else weights)


_TERMS: dict[Callable[..., Tensor], Callable[[Mapping[str, Any], Tensor], Terms]] = {
    F.binary_cross_entropy_with_logits: _bernoulli,
    F.cross_entropy: _categorical,
    F.mse_loss: _gaussian,
    F.nll_loss: _categorical,
    F.poisson_nll_loss: _poisson,
}
