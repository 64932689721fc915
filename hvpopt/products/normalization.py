"""Normalisation in elementary operations, for reverse over forward mode.

torch's forward-mode formulas of these functions read means, variances or factorisations that
the function's forward pass saved, and a reverse pass over such a formula takes them for constants:
reverse over forward mode is then wrong without an error (by 5 to 100% of the product; found by
comparing all of torch's operations with differences of gradients, torch 2.13).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hvpopt.engines.support import graph_nodes

_REFUSED: frozenset[Callable[..., Any]] = frozenset(
    (
        torch.layer_norm,
        torch.native_layer_norm,
        torch.batch_norm,
        torch.native_batch_norm,
        torch.instance_norm,
        *(torch.det, Tensor.det, torch.linalg.det),
        *(torch.logdet, Tensor.logdet, torch.slogdet, Tensor.slogdet, torch.linalg.slogdet),
        *(torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve),
        torch.linalg.householder_product,
    )
)

_WRONG = (
    "NativeLayerNormBackward",
    "LinalgDetBackward",
    "LinalgSlogdetBackward",
    "LinalgSolveExBackward",
    "LinalgHouseholderProductBackward",
)


class ElementaryNormalization(TorchFunctionMode):
    """While active, layer, batch and instance norm are computed step by step.

    Raises:
        RuntimeError: At a call of a function whose formula is wrong and that nothing replaces.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _REFUSED:
            raise RuntimeError(
                f"Reverse over forward mode is wrong through torch's {func.__name__}: choose "
                "mode='forward_over_reverse' or mode='reverse_over_reverse'."
            )
        return _STAND_INS.get(func, func)(*args, **(kwargs or {}))


def check_formulas(outputs: Iterable[Tensor]) -> None:
    """Lets outputs pass that no function with a wrong forward-mode formula led to.

    TorchScript and ``torch.ops`` call operations where `ElementaryNormalization` does not see
    them; the graph shows them all the same, except under ``torch.compile``, which has none.

    Raises:
        RuntimeError: At such a function.
    """
    if torch.compiler.is_compiling():
        return
    for node in graph_nodes(outputs):
        name = node.name()
        is_batch_norm = "BatchNormBackward" in name and not name.startswith("_")
        if name.startswith(_WRONG) or (is_batch_norm and getattr(node, "_saved_training", True)):
            raise RuntimeError(
                f"Reverse over forward mode is wrong through {name}, which is called from "
                "TorchScript or aten, where it cannot be replaced: choose "
                "mode='forward_over_reverse' or mode='reverse_over_reverse'."
            )


def _normalized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    reshaped = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _affine(x, *reshaped)


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    return _affine(_normalized(input, dims, eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    statistics = (running_mean, running_var)
    if not training:
        return F.batch_norm(input, *statistics, weight, bias, False, momentum, eps)
    if running_mean is not None:  # for its update
        F.batch_norm(input.detach(), *statistics, None, None, True, momentum, eps)
    dims = [d for d in range(input.dim()) if d != 1]
    return _by_channel(_normalized(input, dims, eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    statistics = (running_mean, running_var)
    if not use_input_stats:
        return F.instance_norm(input, *statistics, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.instance_norm(input.detach(), *statistics, None, None, True, momentum, eps)
    dims = list(range(2, input.dim()))
    return _by_channel(_normalized(input, dims, eps), weight, bias)


_STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
