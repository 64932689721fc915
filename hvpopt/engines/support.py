"""What makes torch's operations twice differentiable.

Some fast kernels have neither forward-mode nor double-backward formulas. While a closure runs for
second-order products, attention goes through the math kernel, recurrent layers leave cuDNN and
oneDNN, compiled modules run eagerly, and what still lacks formulas is written in other operations
(`hvpopt.engines.substitutes`). The functions computed are the same.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hvpopt.engines.substitutes import substituted

_RECURRENT = frozenset(
    (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)  # what the fused layers call
)


class _Substitution(TorchFunctionMode):
    """While active, functions with missing or wrong derivatives are computed by others.

    Attributes:
        checkpoints: whether a part of what ran was checkpointed, and will run again in products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.checkpoints and saved_tensor_hooks().startswith("_checkpoint_hook."):
            self.checkpoints = True
        if func in _RECURRENT:
            with torch.backends.cudnn.flags(enabled=False), _without_mkldnn():
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            with sdpa_kernel(SDPBackend.MATH):  # whatever the closure itself has chosen
                return func(*args, **kwargs)
        result = substituted(func, args, kwargs)
        return func(*args, **kwargs) if result is None else result


class _OrdinaryTensors(TorchFunctionMode):
    """While active, functions get copies of inference tensors, which autograd can save."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _ordinary(self, x: Tensor) -> Tensor:
        if not x.is_inference():
            return x
        if id(x) not in self._copies:
            self._copies[id(x)] = (x, x.clone())
        return self._copies[id(x)][1]


def differentiable_kernels() -> AbstractContextManager[Any]:
    """While active, operations use kernels that have second derivatives; compiled modules too.

    What the context yields says in ``checkpoints`` whether a part of what ran was checkpointed.
    Under ``torch.compile`` the compiler sees the operations themselves, so that attention is all
    that is left to choose.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.compiler.is_compiling() else _eager_kernels()


@contextmanager
def _eager_kernels() -> Iterator[_Substitution]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # as in trainer.validate
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(_OrdinaryTensors())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        kernels = stack.enter_context(_Substitution())
        stack.enter_context(_without_autocast_cache())
        stack.enter_context(torch.jit.optimized_execution(False))
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before this is imported
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield kernels


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    # torch.backends.mkldnn.flags would also read TF32 settings, which warns on builds without
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """While active, autocast casts weights anew: those that it keeps would be old, or constants."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def saved_tensor_hooks() -> str:
    """The name of the hooks that pack what autograd saves, by which checkpointing shows itself."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return "" if hooks is None else getattr(hooks[0], "__qualname__", "")


def graph_nodes(
    roots: Iterable[Tensor | None], through: Callable[[Any], bool] = lambda node: True
) -> Iterator[Any]:
    """Every node of the autograd graph behind some tensors, once; behind nodes only ``through``."""
    waiting = [root.grad_fn for root in roots if root is not None and root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions if through(node) else ():
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def reaches_dead_end(roots: Iterable[Tensor | None]) -> bool:
    """Whether a graph contains what ``once_differentiable`` leaves in place of a formula.

    Such a node has no way to the parameters: double backward would take what comes before it for
    a constant.
    """
    return any(node.name().endswith("Error") for node in graph_nodes(roots))


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
