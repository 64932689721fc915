"""The Hessian, GGN and Fisher matrix of a loss over a dataset, for any module."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from hvpopt.engines.choice import EngineName
from hvpopt.engines.split import Curvature
from hvpopt.likelihoods import FisherKind, MonteCarlo
from hvpopt.operators.curvature import CurvatureOperator
from hvpopt.operators.points import NumTerms


class HessianOperator(CurvatureOperator):
    """The Hessian ∇²L of the mean loss; the arguments are those of `CurvatureOperator`.

    Examples:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.eye(2), torch.zeros(2, 1))
        >>> H = HessianOperator(
        ...     lambda b: torch.nn.functional.mse_loss(net(b[0]), b[1]), net.parameters(), [batch]
        ... )
        >>> H.to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """

    _curvature: Curvature = "hessian"


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix of the mean loss, Jᵀ ∇²ℓ J.

    J is the derivative of the network's output, which is the input of torch's loss function ℓ;
    parts of the loss that bypass ℓ, such as a penalty, count with their Hessian. The arguments
    are those of `CurvatureOperator`.

    Evaluations raise:
        SplitNotFoundError: If the loss calls no loss function of torch.nn.functional.
    """

    _curvature: Curvature = "ggn"


class FisherOperator(CurvatureOperator):
    """The Fisher information matrix of a loss that is a negative log-likelihood.

    What the kinds are: `hvpopt.likelihoods`. The exact one is the GGN of that loss.

    Args:
        loss: as in `CurvatureOperator`, as are all other arguments not named here.
        params: as there.
        data: as there.
        kind: "exact", "monte_carlo" (labels are sampled from the model's own distribution) or
            "empirical" (the given labels).
        num_samples: labels for each term, for "monte_carlo".
        seed: which labels, for "monte_carlo"; the same at every product, others in each batch.
        engine: as there.
        num_terms: as there.
        micro_batch_size: as there.
        retain_graphs: as there.
        over_ranks: as there.
        progress: as there.

    Raises:
        TypeError: As `CurvatureOperator`.
        ValueError: As `CurvatureOperator`, and for an unknown kind.

    Evaluations raise:
        NoLikelihoodError: If the loss is no negative log-likelihood of torch.nn.functional.

    Source: Martens, New insights and perspectives on the natural gradient method (JMLR 2020).
    """

    def __init__(
        self,
        loss: Callable[[Any], Any],
        params: Iterable[Tensor],
        data: Iterable[Any],
        *,
        kind: FisherKind = "exact",
        num_samples: int = 1,
        seed: int = 0,
        engine: EngineName = "auto",
        num_terms: NumTerms = None,
        micro_batch_size: int | None = None,
        retain_graphs: bool = False,
        over_ranks: bool = True,
        progress: bool = False,
    ) -> None:
        curvatures: dict[str, Curvature] = {
            "exact": "fisher",
            "monte_carlo": MonteCarlo(num_samples, seed),
            "empirical": "empirical_fisher",
        }
        if kind not in curvatures:
            raise ValueError(
                f"kind={kind!r} is unknown: choose one of {', '.join(map(repr, curvatures))}."
            )
        self._curvature = curvatures[kind]
        super().__init__(
            loss,
            params,
            data,
            engine=engine,
            num_terms=num_terms,
            micro_batch_size=micro_batch_size,
            retain_graphs=retain_graphs,
            over_ranks=over_ranks,
            progress=progress,
        )
