"""Each library's way to a curvature's figures, from a network to numbers, as its users write it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from hvpopt.curvature import spectral_density, top_eigenpairs, trace
from hvpopt.operators import HessianOperator

from . import curvature_peers as peers
from .curvature_peers import DENSITY_PROBES, DENSITY_STEPS, Nodes
from .models import Problem

Figure = Literal["largest eigenvalue", "five largest eigenvalues", "trace", "spectral density"]


@dataclass(frozen=True)
class Contestant:
    """A library's estimate at one setting."""

    library: str
    """Whose."""
    method: str
    """Which algorithm."""
    setting: str
    """What was chosen."""
    run: Callable[[Problem, int], Any]
    """From a network and a seed to eigenvalues (k,), a trace, or `Nodes`."""


def hessian(problem: Problem) -> HessianOperator:
    """hvpopt's Hessian of the problem's loss on its batch."""
    return HessianOperator(
        lambda batch: problem.loss(problem.module(batch)),
        problem.module.parameters(),
        [problem.inputs],
        engine="graph",
    )


def ladders(figure: Figure, num_probes: int) -> list[list[Contestant]]:
    """For each way to a figure the settings to try, the cheapest first.

    Those of traces and densities have one: all take as many probes, and as many steps.
    """
    if figure == "trace":
        return [[x] for x in _traces(num_probes)]
    if figure == "spectral density":
        return [[x] for x in _densities()]
    k = 1 if figure == "largest eigenvalue" else 5
    steps = [m for m in (3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 80) if m >= 2 * k]
    ours = [
        Contestant("hvpopt", "Lanczos", f"max_steps={m}", partial(_hvpopt_top, k=k, max_steps=m))
        for m in steps
    ]
    by_itself = [
        Contestant("hvpopt", "Lanczos", f"rtol={rtol:g}", partial(_hvpopt_top, k=k, rtol=rtol))
        for rtol in (0.1, 0.03, 0.01, 0.003, 0.001)
    ]
    eigenthings = [
        Contestant(
            "hessian-eigenthings", "Lanczos", f"max_iter={m}", partial(peers.things_top, k=k, m=m)
        )
        for m in steps
    ]
    arpack = [
        Contestant(
            "curvlinops",
            "SciPy eigsh",
            f"ncv={ncv}, tol={tol:g}",
            partial(peers.linops_top, k=k, ncv=ncv, tol=tol),
        )
        for tol in (1e-1, 1e-2, 1e-3)
        for ncv in (2 * k + 6, 2 * k + 18)
    ]
    band = [
        Contestant(
            "hvpopt",
            f"band Lanczos of {k}",
            f"max_steps={m}",
            partial(_hvpopt_top, k=k, max_steps=m, block_size=k),
        )
        for m in (20, 30, 40, 60, 80)
    ]
    lobpcg = [
        Contestant("hvpopt's operator", "SciPy lobpcg", f"{m} steps", partial(_lobpcg, k=k, m=m))
        for m in (3, 6, 10, 15, 20)
    ]
    powers = [
        Contestant(
            "PyHessian", "power iteration", f"tol={tol:g}", partial(peers.pyhessian_top, tol=tol)
        )
        for tol in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
    ]
    if k == 1:
        return [ours, by_itself, powers, eigenthings, arpack]
    return [ours, by_itself, band, lobpcg, eigenthings, arpack]


def _traces(count: int) -> list[Contestant]:
    """Hutchinson's estimate with as many probes everywhere, others with as many products."""
    thirds, halves = 3 * max(count // 3, 2), 2 * max(count // 2, 2)
    return [
        Contestant(
            "hvpopt", "hutchinson", f"{count} products", partial(_hvpopt_trace, count=count)
        ),
        Contestant(
            "hvpopt",
            "hutch++",
            f"{thirds} products",
            partial(_hvpopt_trace, method="hutch++", count=2 * thirds // 3),
        ),
        Contestant(
            "hvpopt",
            "xtrace",
            f"{halves} products",
            partial(_hvpopt_trace, method="xtrace", count=halves // 2),
        ),
        Contestant(
            "PyHessian",
            "hutchinson",
            f"{count} products",
            partial(peers.pyhessian_trace, count=count),
        ),
        *(
            Contestant(
                "hessian-eigenthings",
                method,
                f"{number} products",
                partial(peers.things_trace, method=method, count=number),
            )
            for method, number in (("hutchinson", count), ("hutch++", thirds))
        ),
        *(
            Contestant(
                "curvlinops",
                method,
                f"{number} products",
                partial(peers.linops_trace, name=name, count=number),
            )
            for method, name, number in (
                ("hutchinson", "hutchinson_trace", count),
                ("hutch++", "hutchpp_trace", thirds),
                ("xtrace", "xtrace", halves),
            )
        ),
    ]


def _densities() -> list[Contestant]:
    setting = f"{DENSITY_PROBES} × {DENSITY_STEPS} products"
    return [
        Contestant("hvpopt", "SLQ", setting, _hvpopt_density),
        Contestant(
            "hvpopt",
            "SLQ, three terms",
            setting,
            partial(_hvpopt_density, reorthogonalize=False),
        ),
        Contestant("PyHessian", "SLQ", f"{setting}, torch.eig put back", peers.pyhessian_density),
        Contestant("hessian-eigenthings", "SLQ", setting, peers.things_density),
        Contestant("curvlinops", "SLQ", f"{setting}, and those for the ends", peers.linops_density),
    ]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hvpopt_top(
    problem: Problem,
    seed: int,
    *,
    k: int,
    rtol: float = 1e-6,
    max_steps: int = 100,
    block_size: int = 1,
) -> np.ndarray:
    with hessian(problem) as operator:
        found = top_eigenpairs(
            operator,
            k=k,
            rtol=rtol,
            max_steps=max_steps,
            converge="values",
            block_size=block_size,
            generator=_seeded(seed),
        )
    return np.array(found.values)


def _lobpcg(problem: Problem, seed: int, *, k: int, m: int) -> np.ndarray:
    from scipy.sparse.linalg import lobpcg

    with hessian(problem) as operator, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged, and to what
        start = torch.randn(operator.shape[0], k, generator=_seeded(seed)).numpy()
        values = lobpcg(operator.to_scipy(), start, tol=1e-9, maxiter=m, largest=True)[0]
    return np.sort(values)[::-1]


def _hvpopt_trace(problem: Problem, seed: int, *, count: int, method: Any = "hutchinson") -> float:
    with hessian(problem) as operator:
        return trace(operator, method=method, num_probes=count, generator=_seeded(seed)).value


def _hvpopt_density(problem: Problem, seed: int, *, reorthogonalize: bool = True) -> Nodes:
    with hessian(problem) as operator:
        density = spectral_density(
            operator,
            num_probes=DENSITY_PROBES,
            num_steps=DENSITY_STEPS,
            reorthogonalize=reorthogonalize,
            generator=_seeded(seed),
        )
    return density.nodes.numpy().ravel(), density.weights.numpy().ravel() / DENSITY_PROBES
