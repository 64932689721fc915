"""Iterative solvers that need an operator only through its products."""

from hvpopt.solvers.batched import BatchedSolution, batched_cg, batched_minres
from hvpopt.solvers.capped_cg import capped_cg
from hvpopt.solvers.cg import cg
from hvpopt.solvers.eigenpairs import (
    Eigenpairs,
    bottom_eigenpairs,
    extreme_eigenpairs,
    top_eigenpairs,
)
from hvpopt.solvers.gltr import KrylovTrustRegion
from hvpopt.solvers.lanczos import Tridiagonal, lanczos
from hvpopt.solvers.result import Iterate, Solution, Status, TrustRegionStep
from hvpopt.solvers.steihaug import steihaug
from hvpopt.solvers.stopping import (
    EisenstatWalker,
    FirstOf,
    ForcingTerm,
    Progress,
    RelativeProgress,
    ResidualNorm,
    SquareRoot,
    StoppingRule,
    Worthwhile,
)

__all__ = [
    "BatchedSolution",
    "Eigenpairs",
    "EisenstatWalker",
    "FirstOf",
    "ForcingTerm",
    "Iterate",
    "KrylovTrustRegion",
    "Progress",
    "RelativeProgress",
    "ResidualNorm",
    "Solution",
    "SquareRoot",
    "Status",
    "StoppingRule",
    "Tridiagonal",
    "TrustRegionStep",
    "Worthwhile",
    "batched_cg",
    "batched_minres",
    "bottom_eigenpairs",
    "capped_cg",
    "cg",
    "extreme_eigenpairs",
    "lanczos",
    "steihaug",
    "top_eigenpairs",
]
