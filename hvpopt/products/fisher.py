"""Products with Fisher information matrices of functions on pytrees, like ``torch.func``."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hvpopt.likelihoods import (
    Bernoulli,
    Categorical,
    FisherKind,
    Gaussian,
    Likelihood,
    Poisson,
    Terms,
    check_num_samples,
    wide,
)
from hvpopt.products.gauss_newton import forward_and_back
from hvpopt.pytrees import Tree, check_like, check_params

LikelihoodName = Literal["categorical", "bernoulli", "gaussian", "poisson"]
Reduction = Literal["mean", "sum"]

_LIKELIHOODS: dict[LikelihoodName, Likelihood] = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "poisson": Poisson(),
}
_IGNORED = -100  # as in F.cross_entropy


def fisher_vp(
    model: Callable[..., Tensor],
    likelihood: LikelihoodName | Likelihood,
    params: Tree,
    v: Tree,
    *args: Any,
    kind: FisherKind = "exact",
    targets: Tensor | None = None,
    reduction: Reduction = "mean",
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tree:
    """The Fisher product F v = c Σ_n J_nᵀ E[u_n u_nᵀ] J_n v, with J_n = ∂z_n/∂params.

    u_n is the gradient of −log p(y | z_n) by the network's output z_n, and the expectation is over
    labels y ~ p(· | z_n), in closed form, over samples of them, or is left out in favour of the
    given labels: see `hvpopt.likelihoods`. J v by forward mode and Jᵀ by reverse mode over one run
    of the model: about 5/3 gradients. The matrix is positive semidefinite; the exact one is the
    generalised Gauss-Newton matrix of the torch loss function of that likelihood.

    Composes as the functions of `hvpopt.products` do; sampled labels need
    ``torch.vmap(..., randomness="same")`` and are constants where it is differentiated.

    Args:
        model: ``model(params, *args)``, the output z, a real floating-point tensor: logits with
            the classes along the second dimension ("categorical"), logits ("bernoulli"), means
            ("gaussian", of variance ½ as in ``F.mse_loss``) or logarithms of rates ("poisson").
        likelihood: A name, or a `hvpopt.likelihoods.Likelihood`.
        params: Real floating-point tensors.
        v: A direction, of the structure, shapes and dtypes of ``params``.
        *args: Passed on to ``model``, not differentiated.
        kind: "exact", "monte_carlo" or "empirical".
        targets: The labels, for "empirical": of z's shape; or class indices, of z's shape without
            the classes. Terms with class −100 are left out, whatever the kind.
        reduction: c as in torch's loss functions: 1 for "sum"; for "mean" one over the number of
            rows of logits that are not left out ("categorical"), or of entries of z.
        num_samples: Labels for each term, for "monte_carlo".
        generator: What samples them; the default generator, where None. One on the CPU gives the
            same labels on every device.

    Returns:
        The product in the structure and shapes of ``params``.

    Raises:
        TypeError: If parameters or the model's output are not real floating-point tensors, or the
            likelihood is neither a name nor a `Likelihood`.
        ValueError: If ``v`` does not match ``params``, these hold no tensor, targets are missing or
            of another shape, or an option is unknown.

    Source: Martens, New insights and perspectives on the natural gradient method (JMLR 2020).

    Examples:
        >>> model = lambda p, x: x * p  # one logit for each example
        >>> x, p, v = torch.tensor([1.0, 2.0]), torch.tensor([0.0]), torch.tensor([1.0])
        >>> fisher_vp(model, "bernoulli", p, v, x)  # the mean of x² σ(0) (1 − σ(0))
        tensor([0.6250])
        >>> fisher_vp(model, "bernoulli", p, v, x, kind="empirical", targets=torch.ones(2))
        tensor([0.6250])
    """
    check_params(params, "params")
    check_like(v, params, "v", "params")
    _check_option("kind", kind, FisherKind)
    _check_option("reduction", reduction, Reduction)
    check_num_samples(num_samples)
    if isinstance(likelihood, str):
        _check_option("likelihood", likelihood, LikelihoodName)
        likelihood = _LIKELIHOODS[likelihood]
    if not isinstance(likelihood, Likelihood):
        is_class = isinstance(likelihood, type)
        given = f"the class {likelihood.__name__}" if is_class else f"a {type(likelihood).__name__}"
        raise TypeError(f"likelihood is {given}; expected a name, or an instance: Gaussian().")
    if kind == "empirical" and targets is None:
        raise ValueError("kind='empirical' needs the labels: pass targets=...")

    z, tangent, pullback = forward_and_back(lambda p: model(p, *args), params, v)
    if not isinstance(z, Tensor):
        raise TypeError(
            f"the model returned a {type(z).__name__}; expected one tensor, the likelihood's "
            "parameters."
        )
    terms = _terms(likelihood, z, targets, reduction)
    curve = terms.fisher(kind, num_samples=num_samples, generator=generator)
    return pullback(curve(tangent))[0]


def _terms(
    likelihood: Likelihood, z: Tensor, targets: Tensor | None, reduction: Reduction
) -> Terms:
    """The terms of the likelihood's loss function with a reduction."""
    shape, dim = list(z.shape), None
    if isinstance(likelihood, Categorical):
        (dim,) = likelihood.dims(z)
        shape[dim] = 1
    weights = wide(z).new_ones(shape)
    if targets is not None:
        is_index = dim is not None and not targets.is_floating_point()
        expected = weights.squeeze(dim).shape if is_index and dim is not None else z.shape
        if targets.shape != expected:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}; expected {tuple(expected)} for an "
                f"output of shape {tuple(z.shape)}."
            )
        if is_index and dim is not None:
            kept = targets != _IGNORED
            weights, targets = kept.unsqueeze(dim).to(weights.dtype), targets.where(kept, 0)
    if reduction == "mean":
        weights = weights / weights.sum()
    return Terms(likelihood, z, targets, weights)


def _check_option(name: str, given: object, options: Any) -> None:
    if given not in get_args(options):
        known = ", ".join(map(repr, get_args(options)))
        raise ValueError(f"{name}={given!r} is unknown: choose one of {known}.")
