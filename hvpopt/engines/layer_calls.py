"""The calls of linear layers in a closure: which vectors met which weight, and where.

Where a function is linear in its weight, the weight's gradient is a sum of outer products over the
positions n at which the weight is used (examples, times steps of a sequence, pixels):

    ∂L/∂W = Σ_n r_n c_nᵀ

For y = W x, r = ∂L/∂y and c = x; for convolutions c are patches of the image; for an embedding r
picks a row. Uses inside of derivatives that the closure takes count, too
(`hvpopt.engines.derivative_calls`). Preconditioners build Kronecker factors from the second moments
of r and c. No module is registered: a function mode sees the calls, whichever module or function
they come from.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from hvpopt.engines.derivative_calls import derivative_calls
from hvpopt.engines.layer_readers import READERS, LayerCall, Places, bias_alone
from hvpopt.engines.recurrence import UNROLLED


class LayerCalls(TorchFunctionMode):
    """While active, records the calls whose weight or bias is one of the parameters.

    Those of ``F.linear``, matrix products, convolutions and transposed convolutions,
    ``F.embedding``, attention and recurrent layers, from modules and by hand; and the matrix
    products in the derivatives that ``torch.autograd.grad`` takes with ``create_graph=True``. A
    parameter may occur in one call, in several, or in none: behind a reparametrisation, in a
    scripted module, or in a function that is not known here. Inputs are kept as long as the
    recorder.

    Args:
        params: the parameters to look for.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self._places = Places(params)
        self._calls: list[LayerCall] = []
        self._in_derivatives: list[LayerCall] = []

    @property
    def calls(self) -> list[LayerCall]:
        """Those so far; a bias is with its weight if it always comes with it, else alone."""
        companions: dict[int, set[int | None]] = {}
        for call in self._calls:
            companions.setdefault(call.weight, set()).add(call.bias)
            if call.bias is not None:
                companions.setdefault(call.bias, set()).add(call.weight)
        calls = []
        for call in self._calls:
            if call.bias is None or len(companions[call.weight] | companions[call.bias]) == 2:
                calls.append(call)
            else:
                calls += [replace(call, bias=None), bias_alone(call)]
        return calls + self._in_derivatives

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if func in UNROLLED:
            with self:  # sees the linear maps inside
                result = UNROLLED[func](*args, **kwargs)
            if result is not None:
                return result
        out = func(*args, **kwargs)
        if func is torch.autograd.grad:
            outputs = args[0] if args else kwargs["outputs"]
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            self._in_derivatives += derivative_calls(self._places, outputs, out)
        if func not in READERS or not _is_recorded(out):
            return out
        if out._is_view():  # a change in place would put it elsewhere in the graph
            out = out.clone()
        self._calls += READERS[func](self._places, get_gradient_edge(out), *args, **kwargs)
        return out


def _is_recorded(out: Any) -> bool:
    """Whether it is a value of the closure's own graph, and not inside of ``torch.func``."""
    is_value = isinstance(out, Tensor) and out.requires_grad
    return is_value and not torch._C._functorch.is_functorch_wrapped_tensor(out)
