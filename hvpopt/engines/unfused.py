"""Second derivatives of functions: what `support` does for closures, as one context."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hvpopt.engines import support


class _UnfusedRecurrence(TorchFunctionMode):
    """While active, recurrent layers do without fused kernels."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if support.is_recurrent(func):
            return support.call_without_fused_kernel(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def twice_differentiable() -> AbstractContextManager[None]:
    """While active, operations use kernels that have second derivatives.

    Under ``torch.compile`` the compiler sees the operations themselves, so that attention is all
    that is left to choose.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.compiler.is_compiling() else _eager()


@contextmanager
def _eager() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(support.differentiable_kernels())
        stack.enter_context(_UnfusedRecurrence())
        yield
