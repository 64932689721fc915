"""The weights' uses inside of derivatives that a closure takes: in ∂u/∂x of a residual, say.

Where a closure calls ``torch.autograd.grad(u, x, create_graph=True)`` and its loss depends on the
result, a weight W of a layer y = W x is used a second time, in the layer's backward pass
x̄ = Wᵀ ȳ. That use is linear in W, too, and adds

    ∂L/∂W = … + Σ_n ȳ_n s_nᵀ,      s_n = ∂L/∂x̄_n.

No function of Python runs there that a mode could see; the graph of the result has a node for it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hvpopt.engines.layer_readers import LayerCall, Places
from hvpopt.engines.patches import Pair, Pairs

_TRANSPOSES = ("TBackward0", "TransposeBackward0", "MtBackward0")


def derivative_calls(
    places: Places, outputs: Sequence[Tensor], derivatives: Sequence[Tensor | None]
) -> list[LayerCall]:
    """The products with a weight, or its transpose, that led from ``outputs`` to ``derivatives``.

    Args:
        places: the parameters.
        outputs: what was differentiated.
        derivatives: the results of ``torch.autograd.grad(outputs, …, create_graph=True)``.
    """
    before = set(_nodes(outputs))
    calls: list[LayerCall] = []
    for node in _nodes([d for d in derivatives if d is not None], without=before):
        if node.name() == "MmBackward0":
            calls += _products(places, node)
    return calls


def _nodes(values: Sequence[Tensor], without: set[Node] | None = None) -> Iterator[Node]:
    """The nodes of the graph that leads to the values, each once."""
    seen = set(without or ())
    stack = [value.grad_fn for value in values]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [before for before, _ in node.next_functions]


def _products(places: Places, node: Any) -> Iterator[LayerCall]:
    """The uses of parameters in Y = A B; two if both are parameters."""
    (left, _), (right, _) = node.next_functions
    output = GradientEdge(node, 0)
    use = _parameter(places, right)
    if use is not None:
        place, is_transposed = use
        yield LayerCall(place, None, output, _along(node._saved_self.detach(), is_transposed))
    use = _parameter(places, left)
    if use is not None:
        place, is_transposed = use
        across = _along(node._saved_mat2.detach().mT, not is_transposed)
        yield LayerCall(place, None, output, _of_transpose(across))


def _along(a: Tensor, is_transposed: bool) -> Pairs:
    """Y = A W has ∂L/∂W = Aᵀ Ȳ; Y = A Wᵀ has Ȳᵀ A."""

    def pairs(slope: Tensor) -> Iterator[Pair]:
        yield (slope[None], a[None]) if is_transposed else (a[None], slope[None])

    return pairs


def _of_transpose(pairs: Pairs) -> Pairs:
    """Y = W B is Yᵀ = Bᵀ Wᵀ."""
    return lambda slope: pairs(slope.mT)


def _parameter(places: Places, node: Any) -> tuple[int, bool] | None:
    """The parameter that stands behind a node, and whether as its transpose."""
    is_transposed = False
    while node is not None and node.name() in _TRANSPOSES:
        is_transposed = not is_transposed
        node = node.next_functions[0][0]
    if node is None or not isinstance(getattr(node, "variable", None), torch.Tensor):
        return None
    view = places.find(node.variable)
    return None if view is None or node.variable.dim() != 2 else (view.place, is_transposed)
