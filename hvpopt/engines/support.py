"""What makes torch's operations twice differentiable.

Some fast kernels have neither forward-mode nor double-backward formulas. While a closure runs for
second-order products, attention goes through the math kernel, recurrent layers leave cuDNN and
oneDNN, and compiled modules run eagerly. The functions computed are the same.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_RECURRENT = frozenset(
    (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)  # what the fused layers call
)


class _UnfusedRecurrence(TorchFunctionMode):
    """While active, recurrent layers do without cuDNN and oneDNN."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _RECURRENT:
            return func(*args, **(kwargs or {}))
        with torch.backends.cudnn.flags(enabled=False), _without_mkldnn():
            return func(*args, **(kwargs or {}))


def differentiable_kernels() -> AbstractContextManager[None]:
    """While active, operations use kernels that have second derivatives; compiled modules too.

    Under ``torch.compile`` the compiler sees the operations themselves, so that attention is all
    that is left to choose.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.compiler.is_compiling() else _eager_kernels()


@contextmanager
def _eager_kernels() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_UnfusedRecurrence())
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before this is imported
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    # torch.backends.mkldnn.flags would also read TF32 settings, which warns on builds without
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def check_checkpointing(loss: Tensor) -> None:
    """Raises where a layer is checkpointed in the way that hides its parameters from autograd.

    Raises:
        RuntimeError: for ``torch.utils.checkpoint`` with ``use_reentrant=True``.
    """
    for node in graph_nodes([loss]):
        if node.name().startswith("CheckpointFunction"):
            raise RuntimeError(
                "The closure checkpoints a layer with use_reentrant=True, through which second "
                "derivatives do not reach the layer's parameters: use use_reentrant=False."
            )


def graph_nodes(roots: Iterable[Tensor | None]) -> Iterator[Any]:
    """Every node of the autograd graph behind some tensors, once."""
    waiting = [root.grad_fn for root in roots if root is not None and root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


@contextmanager
def without_hooks(params: Sequence[Tensor]) -> Iterator[None]:
    """While active, hooks on the parameters rest: a product is no gradient of theirs."""
    hooks = [h for h in (p._backward_hooks for p in params) if h]
    held = [dict(h) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, content in zip(hooks, held, strict=True):
            h.update(content)


def hooked(leaf: Tensor, grad: Tensor) -> Tensor:
    """What the hooks on a leaf make of its gradient."""
    for hook in list((leaf._backward_hooks or {}).values()):
        changed = hook(grad)
        grad = grad if changed is None else changed
    return grad


def announce_accumulated(leaf: Tensor) -> None:
    """Calls the hooks that wait for a leaf's ``.grad``."""
    hooks = getattr(leaf, "_post_accumulate_grad_hooks", None) or {}
    for hook in list(hooks.values()):
        hook(leaf)
