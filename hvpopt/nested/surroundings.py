"""What an energy's evaluation depends on besides its arguments: kernels, modes, random numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hvpopt.engines.substitutes import SUBSTITUTES

_BatchNorm = nn.modules.batchnorm._BatchNorm
_ATTENTION_AND_RECURRENCE = (
    F.scaled_dot_product_attention, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
)  # fmt: skip


class Watch(TorchFunctionMode):
    """Notes whether functions are called that need kernels or substitutes of ours.

    And the size of all results, of which an autograd graph holds about as much.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found, self.num_bytes = False, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            raise ValueError(COUPLED.format(name="a batch normalisation"))
        if func is not F.batch_norm:
            self.found |= func in SUBSTITUTES or func in _ATTENTION_AND_RECURRENCE
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self.num_bytes += result.nbytes
        return result


COUPLED = (
    "The energy of one example depends on the others through {name} by statistics of the batch: "
    "keep running statistics in an nn.BatchNorm inside of an energy that is an nn.Module (the "
    "inference uses them), or take LayerNorm or GroupNorm."
)


def batch_norms(energy: Any) -> list[nn.Module]:
    """The batch norms in training mode, which are to use their running statistics."""
    found: list[nn.Module] = []
    if not isinstance(energy, nn.Module):
        return found
    for name, module in energy.named_modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is None:
                raise ValueError(COUPLED.format(name=f"{name!r} ({type(module).__name__})"))
            if module.training:
                found.append(module)
    return found


@contextmanager
def eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While active, modules that are in training mode are not, each by itself."""
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def tensors_of(energy: Any) -> list[Tensor]:
    """The parameters and buffers of a module; none of another callable."""
    if not isinstance(energy, nn.Module):
        return []
    return [*energy.parameters(), *energy.buffers()]


def is_compiled(energy: Any) -> bool:
    """Whether a part of an energy was compiled or scripted."""
    modules = energy.modules() if isinstance(energy, nn.Module) else ()
    return any(
        isinstance(m, torch.jit.ScriptModule) or hasattr(m, "_orig_mod") for m in modules
    ) or hasattr(energy, "_torchdynamo_orig_callable")


def random_state(like: Tensor) -> list[Tensor]:
    """The states of torch's generators on the CPU and on a tensor's device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(like.device)] if like.is_cuda else states
