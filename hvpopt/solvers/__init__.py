"""Iterative solvers that need an operator only through its products."""

from hvpopt.solvers.capped_cg import capped_cg
from hvpopt.solvers.cg import cg
from hvpopt.solvers.gltr import KrylovTrustRegion
from hvpopt.solvers.lanczos import Eigenpairs, Tridiagonal, lanczos, top_eigenpairs
from hvpopt.solvers.result import Iterate, Solution, Status, TrustRegionStep
from hvpopt.solvers.steihaug import steihaug
from hvpopt.solvers.stopping import (
    FirstOf,
    Progress,
    RelativeProgress,
    ResidualNorm,
    StoppingRule,
    Worthwhile,
)

__all__ = [
    "Eigenpairs",
    "FirstOf",
    "Iterate",
    "KrylovTrustRegion",
    "Progress",
    "RelativeProgress",
    "ResidualNorm",
    "Solution",
    "Status",
    "StoppingRule",
    "Tridiagonal",
    "TrustRegionStep",
    "Worthwhile",
    "capped_cg",
    "cg",
    "lanczos",
    "steihaug",
    "top_eigenpairs",
]
