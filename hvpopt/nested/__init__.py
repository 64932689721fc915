"""Nested optimization: inner minimisations, and derivatives through them."""

from hvpopt.nested.adjoints import (
    ADJOINTS,
    Adjoint,
    AdjointReport,
    BackOptimization,
    Checkpointed,
    ForwardMode,
    Implicit,
    Neumann,
    Truncated,
    Unrolled,
    adjoint_named,
)
from hvpopt.nested.domains import Box, Domain, Simplex, Unconstrained
from hvpopt.nested.energy import Energy, relu_like
from hvpopt.nested.hypergradients import Hypergradient, hypergradient
from hvpopt.nested.inference import Inference, minimize_energy
from hvpopt.nested.line_search import Backtracking
from hvpopt.nested.logits import Logits, SoftmaxLogits
from hvpopt.nested.methods import GradientDescent, HeavyBall, Method, MirrorDescent
from hvpopt.nested.newton import NewtonDescent
from hvpopt.nested.status import DivergenceError, InferenceStatus
from hvpopt.nested.unrolled_hypergradients import UnrolledHypergradient, unrolled_hypergradient

__all__ = [
    "ADJOINTS",
    "Adjoint",
    "AdjointReport",
    "BackOptimization",
    "Backtracking",
    "Box",
    "Checkpointed",
    "DivergenceError",
    "Domain",
    "Energy",
    "ForwardMode",
    "GradientDescent",
    "HeavyBall",
    "Hypergradient",
    "Implicit",
    "Inference",
    "InferenceStatus",
    "Logits",
    "Method",
    "MirrorDescent",
    "Neumann",
    "NewtonDescent",
    "Simplex",
    "SoftmaxLogits",
    "Truncated",
    "Unconstrained",
    "Unrolled",
    "UnrolledHypergradient",
    "adjoint_named",
    "hypergradient",
    "minimize_energy",
    "relu_like",
    "unrolled_hypergradient",
]
