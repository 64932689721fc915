"""Preconditioners for conjugate gradients on curvature matrices."""

from hvpopt.preconditioners.base import CurvaturePoint, Preconditioner
from hvpopt.preconditioners.diagonal import Diagonal, EmpiricalFisherDiagonal, Jacobi
from hvpopt.preconditioners.kronecker import Kronecker
from hvpopt.preconditioners.nystrom import Nystrom

__all__ = [
    "CurvaturePoint",
    "Diagonal",
    "EmpiricalFisherDiagonal",
    "Jacobi",
    "Kronecker",
    "Nystrom",
    "Preconditioner",
]
