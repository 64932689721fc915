"""Deterministic minimisation of functions of tensors by second-order products."""

from hvpopt.minimization.minimize import minimize
from hvpopt.minimization.result import MinimizeResult

__all__ = ["MinimizeResult", "minimize"]
