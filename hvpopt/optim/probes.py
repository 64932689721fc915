"""Random estimates of the diagonal of a closure's curvature, from one or two runs of it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.closure.slopes import sampled_slopes
from hvpopt.engines.base import fill, vjp
from hvpopt.likelihoods import NoLikelihoodError
from hvpopt.trees import TensorList

NO_LABELS = (
    "The Gauss-Newton-Bartlett estimator samples labels from the network's outputs, which it "
    "cannot do here: hvpopt.SophiaH does without labels. {reason}"
)


def seed_of_step(seed: int, step: int) -> int:
    """The seed for the random numbers of a step, below 2³²: unrelated for other seeds and steps.

    torch's generator on the CPU looks at these 32 bits alone, hence the hash.
    """
    digest = hashlib.blake2b(f"{seed},{step}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def rademacher(like: Sequence[Tensor], seed: int) -> TensorList:
    """Probes with independent entries ±1, the same for a seed on every device and every rank.

    torch's global generators are left alone.

    Examples:
        >>> rademacher([torch.zeros(4)], seed=0)
        [tensor([-1.,  1.,  1., -1.])]
    """
    return trees.rademacher_like(like, torch.Generator().manual_seed(seed))


def hutchinson(
    oracle: ClosureOracle, params: Sequence[Tensor], seed: int
) -> tuple[Tensor, TensorList]:
    """The loss, and z ⊙ H z for a Rademacher probe z; the gradient is left in ``p.grad``.

    E[z ⊙ H z] = diag H, and the variance of entry i is Σ_{j≠i} H_ij²: a diagonal Hessian is exact.
    One run and one product.

    Args:
        oracle: the closure, not run before.
        params: the oracle's parameters.
        seed: of the probe.

    Source: Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007).
    """
    z = rademacher(params, seed)
    loss, _, product = oracle.trace_along(z, "hessian")
    return loss, list(torch._foreach_mul(z, product))


def gauss_newton_bartlett(oracle: ClosureOracle, params: Sequence[Tensor], seed: int) -> TensorList:
    """(Jᵀu)² for slopes u of the loss at labels that are sampled from the network's outputs z.

    A loss Σ_n c_n ℓ(z_n, y_n) of terms that are negative log-likelihoods has the slopes
    u_n = √c_n ∂ℓ(z_n, ŷ_n)/∂z_n at labels ŷ_n ~ p(· | z_n). They are independent and, by Bartlett's
    first identity, have mean zero, so that in the square of Σ_n J_nᵀu_n the mixed terms vanish on
    average, and by his second, E[ℓ'ℓ'ᵀ] = E[ℓ''] = ℓ'',

        E[(Jᵀu)²] = Σ_n c_n diag(J_nᵀ ℓ''_n J_n) = diag GGN.

    For a mean over N terms, c_n = 1/N, this is N ĝ², with ĝ = (1/N) Σ_n J_nᵀ ∂ℓ(z_n, ŷ_n)/∂z_n the
    gradient of the loss at the sampled labels: the form in which the source has it.

    One further run of the closure, which leaves no trace. Ranks draw labels of their own, and
    their squares are averaged.

    Args:
        oracle: the closure, after its run that counts.
        params: the oracle's parameters.
        seed: of the labels.

    Raises:
        NoLikelihoodError: if the loss is no sum of negative log-likelihoods that are known.

    Source: Liu, Li, Hall, Liang and Ma, "Sophia: a scalable stochastic second-order optimizer for
    language model pre-training" (2023), section 2.3 and algorithm 2.
    """
    total = trees.zeros_like(params)

    def add_square(outputs: TensorList, slopes: TensorList) -> None:
        pulled = fill(vjp(outputs, params, slopes), params)
        torch._foreach_addcmul_(total, pulled, pulled)

    try:
        sampled_slopes(oracle, "monte_carlo", seed=seed, then=add_square)
    except NoLikelihoodError as error:
        raise NoLikelihoodError(NO_LABELS.format(reason=error.__cause__ or error)) from error
    return oracle.average(total)
