"""Estimates of the blocks that layers have on an operator's diagonal."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from hvpopt.curvature.bands import mean_estimate
from hvpopt.curvature.reading import as_operator
from hvpopt.curvature.trace import TraceEstimate, check_method
from hvpopt.operators import LinearOperator
from hvpopt.operators.vectors import Block, Space
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.rows import Rows

Blocks = Mapping[str, Block]
"""What each block is to be called, and what `LinearOperator.block` takes for it."""

Result = TypeVar("Result")


def named_blocks(
    module: nn.Module, params: Sequence[Tensor] | None = None
) -> dict[str, list[Tensor]]:
    """The parameters by the module that holds them, in the order and by the names of its modules.

    A parameter that several modules share is the first one's.

    Args:
        module: such as a network or a LightningModule.
        params: those that count; all that require gradients by default.

    Raises:
        ValueError: If none is left.

    Examples:
        >>> list(named_blocks(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['0', '2']
    """
    wanted = {id(p) for p in (module.parameters() if params is None else params) if p.requires_grad}
    blocks: dict[str, list[Tensor]] = {}
    for name, owner in module.named_modules():
        for p in owner.parameters(recurse=False):
            if id(p) in wanted:
                wanted.remove(id(p))
                blocks.setdefault(name or type(module).__name__, []).append(p)
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} holds none of the parameters that require gradients."
        )
    return blocks


def layerwise(
    estimate: Callable[[LinearOperator], Result],
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    blocks: Blocks | None = None,
) -> dict[str, Result]:
    """An estimate of each block on the diagonal of A, by the blocks' names.

    Each block is an operator of its own (`LinearOperator.block`), whose products are cheaper than
    those of A where A is a `CurvatureOperator`; else each costs one of A. For traces there is
    `layerwise_trace`, which needs no more products than one trace does.

    Args:
        estimate: such as ``top_eigenpairs``, or a `functools.partial` of it with options.
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices.
        blocks: By default one for each tensor, by its index as a string. `named_blocks` gives
            those of a module.

    Raises:
        ValueError: If a block is empty or holds what the operator does not, or there is none.
        TypeError: As `LinearOperator.block`.

    Examples:
        >>> from functools import partial
        >>> from hvpopt.curvature import top_eigenpairs
        >>> d = [torch.tensor([1.0, 5.0]), torch.tensor([3.0])]
        >>> tops = layerwise(top_eigenpairs, lambda v: [x * y for x, y in zip(d, v)], d)
        >>> {name: round(pairs.values[0], 4) for name, pairs in tops.items()}
        {'0': 5.0, '1': 3.0}
    """
    whole = as_operator(operator, like)
    return {name: estimate(whole.block(block)) for name, block in _checked(blocks, whole).items()}


def layerwise_trace(
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    blocks: Blocks | None = None,
    num_probes: int = 10,
    generator: torch.Generator | None = None,
) -> dict[str, TraceEstimate]:
    """The traces of all blocks on the diagonal of A, from the same k products with A.

    With independent signs z, z_bᵀ (A z)_b = z_bᵀ A_bb z_b + Σ_c z_bᵀ A_bc z_c has the mean
    tr A_bb (Hutchinson). The second sum is noise that products with the blocks alone would spare,
    of variance ‖A_bc‖²_F each.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices.
        blocks: By default one for each tensor, by its index as a string.
        num_probes: k.
        generator: For the probes (a CPU generator).

    Returns:
        An estimate a block; ``num_products`` is k, of all together.

    Raises:
        ValueError: For ``num_probes`` < 1, and as `layerwise`.
        TypeError: As `LinearOperator.block`.

    Examples:
        >>> d = [torch.tensor([1.0, 5.0]), torch.tensor([3.0])]
        >>> found = layerwise_trace(lambda v: [x * y for x, y in zip(d, v)], d)
        >>> {name: estimate.value for name, estimate in found.items()}
        {'0': 6.0, '1': 3.0}
    """
    check_method("layerwise_trace", "hutchinson", ("hutchinson",), num_probes)
    whole = as_operator(operator, like)
    rows, space = Rows(whole), Space(whole.like)
    places = {name: space.chosen(block) for name, block in _checked(blocks, whole).items()}
    terms = []
    for first in range(0, num_probes, rows.at_once):
        probes = rows.signs(min(rows.at_once, num_probes - first), generator)
        entries = probes.mul_(rows.products(probes))
        terms.append(torch.stack([part.sum(1) for part in entries.split(space.sizes, 1)], dim=1))
    each = torch.cat(terms).cpu().double()  # (k, tensors)
    return {
        name: mean_estimate(each[:, indices].sum(1), rows.num_products, TraceEstimate)
        for name, indices in places.items()
    }


def _checked(blocks: Blocks | None, operator: LinearOperator) -> Blocks:
    if blocks is None:
        return {str(i): i for i in range(len(operator.like))}
    if not blocks:
        raise ValueError("blocks is empty; give at least one, or leave it out.")
    return blocks
