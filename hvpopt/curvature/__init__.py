"""Estimates of what a curvature operator looks like, from products alone."""

from hvpopt.curvature.trace import TraceEstimate, trace

__all__ = ["TraceEstimate", "trace"]
