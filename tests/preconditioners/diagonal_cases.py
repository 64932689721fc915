"""Points with a dense matrix for their curvature, and states of diagonal preconditioners."""

import torch
from problems import flat

from hvpopt import trees
from hvpopt.preconditioners import CurvaturePoint

SHAPES = [(3, 2), (), (4,)]
SIZES = [6, 1, 4]


def split(vector):
    return [x.reshape(s) for x, s in zip(vector.split(SIZES), SHAPES, strict=True)]


def point_of(matrix, seed=0, oracle=None):
    params = split(torch.zeros(11, dtype=matrix.dtype))
    return CurvaturePoint(
        params=params,
        grad=trees.zeros_like(params),
        product=lambda v: split(matrix @ flat(v)),
        oracle=oracle,
        seed=seed,
    )


def symmetric(seed=0, n=11):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return root @ root.T / n


def states_of(preconditioner, *points):
    states = [{} for _ in SHAPES]
    for step, point in enumerate(points):
        preconditioner.prepare(point, states, step * preconditioner.every)
    return states


def diagonal(states):
    return flat([s["diagonal"] for s in states])


def random_vector(seed):
    generator = torch.Generator().manual_seed(seed)
    return split(torch.randn(11, generator=generator, dtype=torch.float64))
