"""The slopes of a loss by the network's outputs, whose outer products are a Fisher matrix.

Where the loss is Σ_n c_n (−log p(y_n | z_n)), with J_n = ∂z_n/∂θ,

    F = Σ_n J_nᵀ E[u_n u_nᵀ] J_n,      u_n = √c_n ∂(−log p(y_n | z_n))/∂z_n

at labels sampled from p(· | z_n), or at the given ones for the empirical Fisher
(`hvpopt.likelihoods`). With independent random signs ε_n, or without them at sampled labels, whose
slopes have mean zero, Jᵀu has F for its second moment: E[(Σ_n J_nᵀ ε_n u_n)²] = diag F.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.closure.oracle import ClosureOracle
from hvpopt.engines.gauss_newton import head_of
from hvpopt.engines.split import LossSplit
from hvpopt.engines.support import without_hooks
from hvpopt.likelihoods import MonteCarlo, NoLikelihoodError, SlopeKind, Terms
from hvpopt.trees import TensorList

NO_SLOPES = (
    "A preconditioner that is made from a Fisher matrix does not know the slopes of this loss: "
    "hvpopt.preconditioners.Jacobi and Nystrom do without them. {reason}"
)


def sampled_slopes(
    oracle: ClosureOracle,
    kind: SlopeKind,
    *,
    seed: int,
    then: Callable[[TensorList, TensorList], None],
    num_samples: int = 1,
    random_signs: bool = False,
    around: AbstractContextManager[object] | None = None,
) -> None:
    """Runs the closure once more and hands the network's outputs and slopes to ``then``.

    ``then(z, u)`` is called while the graph from the parameters to the outputs is alive, so that
    `hvpopt.engines.base.vjp` gives Jᵀu; ``num_samples`` times at each ``backward`` of the closure,
    with new labels or signs each time. Each call is a sample by itself: its u has the whole Fisher
    of that loss for its second moment, and samples are to be averaged, losses to be summed. That
    Fisher is this rank's own, of the loss as hvpopt reports it (without Lightning's division by
    the micro-batches); ranks draw different labels and signs, and their matrices are to be averaged
    (`ClosureOracle.average`). The run leaves no trace.

    Args:
        oracle: the closure.
        kind: "monte_carlo" for labels sampled from the model, "empirical" for the given ones.
        seed: of labels and signs.
        then: takes the outputs z, tensors of the graph, one for each call of a loss function, and
            for each its u, detached, of z's shape, in float32 or wider.
        num_samples: how often it is called for each ``backward``.
        random_signs: multiplies the slopes of each term with an independent ±1.
        around: is entered for the run, a function mode that sees the layers, say.

    Raises:
        NoLikelihoodError: if the loss is no sum of negative log-likelihoods that are known.
        NoBackwardError: if the closure returns a loss without calling ``backward``.
    """
    split = LossSplit("fisher")
    generator = MonteCarlo(seed=seed).generator()

    def on_backward(loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
        scale = math.sqrt(oracle.loss_scale)
        with torch.autocast(loss.device.type, enabled=False), without_hooks(oracle.params):
            try:
                head = head_of(loss, split, oracle.params)
            except NoLikelihoodError as error:
                raise NoLikelihoodError(NO_SLOPES.format(reason=error)) from error
            for _ in range(num_samples):
                slopes = [scale * t.slopes(kind, generator=generator)[0] for t in head.terms]
                if random_signs:
                    signs = [_signs(t, generator) for t in head.terms]
                    slopes = [s * u for s, u in zip(signs, slopes, strict=True)]
                then(list(head.outputs), [u.detach() for u in slopes])

    oracle.run_again(on_backward, split=split, around=around)


def _signs(terms: Terms, generator: torch.Generator) -> Tensor:
    """±1 for each term, in a shape that broadcasts to the outputs."""
    shape = list(terms.outputs.shape)
    for dim in terms.likelihood.dims(terms.outputs):
        shape[dim] = 1
    return trees.rademacher_like([terms.weights.new_empty(shape)], generator)[0]
