"""Curvature matrices as linear operators: products, arithmetic, blocks, dense and SciPy forms."""

from hvpopt.engines.reduction import UnknownReductionError
from hvpopt.operators.base import LinearOperator
from hvpopt.operators.curvature import CurvatureOperator, NonDeterministicError
from hvpopt.operators.data import split_batch
from hvpopt.operators.matrices import FisherOperator, GGNOperator, HessianOperator
from hvpopt.operators.wrap import from_product

__all__ = [
    "CurvatureOperator",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "LinearOperator",
    "NonDeterministicError",
    "UnknownReductionError",
    "from_product",
    "split_batch",
]
