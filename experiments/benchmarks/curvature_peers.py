"""Other libraries' ways to a curvature's figures, as their users write them.

Attention runs through the kernel that has second derivatives, without which they fail; PyHessian
calls torch.eig, which torch has no longer.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .models import Problem

Nodes = tuple[np.ndarray, np.ndarray]
"""Values and the weights that they have in a distribution."""

DENSITY_PROBES, DENSITY_STEPS = 2, 30


def _kernels() -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def _pyhessian(problem: Problem, seed: int) -> Iterator[Any]:
    from pyhessian import hessian

    torch.manual_seed(seed)
    with warnings.catch_warnings(), _kernels():
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        data = (problem.inputs, problem.targets)
        problem.module.zero_grad()
        on_cuda = problem.inputs.device.type == "cuda"
        yield hessian(problem.module, problem.criterion, data=data, cuda=on_cuda)
    problem.module.zero_grad()


def pyhessian_top(problem: Problem, seed: int, *, tol: float) -> np.ndarray:
    """The largest eigenvalue in absolute value, by power iteration."""
    with _pyhessian(problem, seed) as found:
        return np.array(found.eigenvalues(maxIter=200, tol=tol, top_n=1)[0])


def pyhessian_trace(problem: Problem, seed: int, *, count: int) -> float:
    """Hutchinson's estimate; no early stop."""
    with _pyhessian(problem, seed) as found:
        return float(np.mean(found.trace(maxIter=count, tol=-math.inf)))


def pyhessian_density(problem: Problem, seed: int) -> Nodes:
    """Nodes and weights of all probes."""

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return values[:, None], vectors

    with _pyhessian(problem, seed) as found, mock.patch.object(torch, "eig", eig, create=True):
        nodes, weights = found.density(iter=DENSITY_STEPS, n_v=DENSITY_PROBES)
    return np.ravel(nodes), np.ravel(weights) / DENSITY_PROBES


def _things(problem: Problem) -> Any:
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators import HessianOperator as Hessian

    batches = [(problem.inputs, problem.targets)]
    return Hessian(problem.module, batches, supervised_loss(problem.criterion))


def things_top(problem: Problem, seed: int, *, k: int, m: int) -> np.ndarray:
    """The k largest eigenvalues."""
    from hessian_eigenthings.algorithms.lanczos import lanczos

    with _kernels():
        found = lanczos(_things(problem), k=k, max_iter=m, which="LA", seed=seed)
    return found.eigenvalues.cpu().numpy()


def things_trace(problem: Problem, seed: int, *, method: Any, count: int) -> float:
    """The estimate of its trace."""
    from hessian_eigenthings.algorithms.trace import trace as estimate

    with _kernels():
        found = estimate(_things(problem), num_matvecs=count, method=method, seed=seed)
    return found.estimate


def things_density(problem: Problem, seed: int) -> Nodes:
    """Nodes and weights of all probes."""
    from hessian_eigenthings.algorithms.spectral_density import spectral_density as density

    with _kernels():
        found = density(
            _things(problem),
            num_runs=DENSITY_PROBES,
            lanczos_steps=DENSITY_STEPS,
            num_grid_points=1024,
            seed=1000 * seed,
        )
    nodes, weights = found.raw_eigenvalues.cpu().numpy(), found.raw_weights.cpu().numpy()
    return nodes.ravel(), weights.ravel() / DENSITY_PROBES


def _linops(problem: Problem, seed: int) -> Any:
    import curvlinops

    torch.manual_seed(seed)
    return curvlinops.HessianLinearOperator(
        problem.module,
        problem.criterion,
        list(problem.module.parameters()),
        [(problem.inputs, problem.targets)],
        check_deterministic=False,
    )


def linops_top(problem: Problem, seed: int, *, k: int, ncv: int, tol: float) -> np.ndarray:
    """The k largest eigenvalues, as its documentation has it."""
    from scipy.sparse.linalg import eigsh

    with _kernels():
        operator = _linops(problem, seed).to_scipy()
        start = torch.randn(
            operator.shape[0], generator=torch.Generator().manual_seed(seed)
        ).numpy()
        values = eigsh(
            operator, k=k, which="LA", ncv=ncv, tol=tol, v0=start, return_eigenvectors=False
        )
    return np.sort(values)[::-1]


def linops_trace(problem: Problem, seed: int, *, name: str, count: int) -> float:
    """The estimate of its trace."""
    import curvlinops

    with _kernels():
        return float(getattr(curvlinops, name)(_linops(problem, seed), count))


def linops_density(problem: Problem, seed: int) -> Nodes:
    """Its smoothed density on its grid."""
    from curvlinops import lanczos_approximate_spectrum

    with _kernels():
        grid, density = lanczos_approximate_spectrum(
            _linops(problem, seed), DENSITY_STEPS, num_repeats=DENSITY_PROBES
        )
    weights = density.cpu().numpy()
    return grid.cpu().numpy(), weights / weights.sum()
