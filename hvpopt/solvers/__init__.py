"""Iterative solvers that need an operator only through its products."""

from hvpopt.solvers.cg import cg
from hvpopt.solvers.lanczos import Eigenpairs, Tridiagonal, lanczos, top_eigenpairs
from hvpopt.solvers.result import Iterate, Solution, Status
from hvpopt.solvers.stopping import (
    FirstOf,
    Progress,
    RelativeProgress,
    ResidualNorm,
    StoppingRule,
)

__all__ = [
    "Eigenpairs",
    "FirstOf",
    "Iterate",
    "Progress",
    "RelativeProgress",
    "ResidualNorm",
    "Solution",
    "Status",
    "StoppingRule",
    "Tridiagonal",
    "cg",
    "lanczos",
    "top_eigenpairs",
]
