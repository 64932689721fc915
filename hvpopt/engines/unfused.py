"""Second derivatives of functions: what `support` does for closures, as one context."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

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


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """While active, operations use kernels that have second derivatives."""
    with ExitStack() as stack:
        stack.enter_context(support.differentiable_kernels())
        stack.enter_context(_UnfusedRecurrence())
        yield
