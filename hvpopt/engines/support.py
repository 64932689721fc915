"""What makes torch's operations twice differentiable.

Some fast kernels have neither forward-mode nor double-backward formulas. While a closure runs for
second-order products, attention goes through the math kernel, recurrent layers leave cuDNN and
oneDNN, and compiled modules run eagerly. The functions computed are the same.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_RECURRENT = frozenset(
    (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)  # what the fused layers call
)


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """While active, attention is the math kernel's, and compiled modules run eagerly."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before this is imported
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def is_recurrent(func: Callable[..., Any]) -> bool:
    """Whether ``func`` is the fused call of a recurrent layer."""
    return func in _RECURRENT


def call_without_fused_kernel(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func(*args, **kwargs)`` outside cuDNN and oneDNN."""
    with torch.backends.cudnn.flags(enabled=False), _without_mkldnn():
        return func(*args, **kwargs)


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    # torch.backends.mkldnn.flags would also read TF32 settings, which warns on builds without
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
