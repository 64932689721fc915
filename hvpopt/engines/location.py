"""Where in a closure an operation is: the module that called it, and that module's path."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hvpopt.engines.base import Runner
from hvpopt.engines.graph import GraphRecorder
from hvpopt.engines.interception import Interception
from hvpopt.engines.support import graph_nodes


@dataclass(frozen=True)
class Place:
    """Where an operation is called.

    Attributes:
        module: the innermost module whose call it was in; None in the closure itself.
        path: the module's name in the modules around it; empty for the outermost.
        node: what autograd calls the operation there; empty where that is not known.
        num_more: in how many other modules it is, too.
        is_found: whether the operation was found.
    """

    module: nn.Module | None = None
    path: str = ""
    node: str = ""
    num_more: int = 0
    is_found: bool = True

    def __str__(self) -> str:
        if self.module is None:
            return "the closure itself" if self.is_found else "the closure"
        kind = type(self.module).__name__
        name = f"module {self.path!r} ({kind})" if self.path else f"module {kind}"
        return f"{name} and {self.num_more} more" if self.num_more else name


def from_traceback(error: BaseException, modules: Sequence[nn.Module]) -> Place | None:
    """The place in the closure's forward pass that raised an error; None if it was not there."""
    module: nn.Module | None = None
    in_backward = False
    for frame in _frames(error):
        if frame.f_code is Interception.__torch_function__.__code__:
            in_backward |= frame.f_locals["func"] is torch.Tensor.backward
        elif frame.f_code is nn.Module._call_impl.__code__:
            module, in_backward = frame.f_locals["self"], False  # a checkpointed layer runs again
    if in_backward:
        return None
    return Place(module, path_of(module, modules))


def function_in_traceback(error: BaseException) -> type[Function] | None:
    """The custom Function whose application raised an error."""
    applied = [frame.f_locals.get("cls") for frame in _frames(error)]
    functions = [c for c in applied if isinstance(c, type) and issubclass(c, Function)]
    return functions[-1] if functions else None


def _frames(error: BaseException) -> list[FrameType]:
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames


def from_another_run(
    run: Runner, concerns: Callable[[Any], bool], modules: Callable[[], Sequence[nn.Module]]
) -> Place:
    """The first place whose operations' autograd nodes are of some kind.

    Args:
        run: runs the closure once more, for the gradient alone.
        concerns: whether a node is of the kind.
        modules: in which paths are looked for; called after the run.

    Raises:
        Exception: whatever the closure raises that is run for its gradient.
    """
    calls = _ModuleCalls()
    recorder = GraphRecorder(run, create_graph=False)
    names: dict[int, str] = {}

    def on_backward(loss: torch.Tensor, plain: Callable[..., None], /, **options: Any) -> None:
        nodes = filter(concerns, graph_nodes([loss]))
        names.update((node._sequence_nr(), node.name()) for node in nodes)
        recorder(loss, plain, **options)

    run(on_backward, around=calls)
    if not names:
        return Place(is_found=False)
    owners = {number: calls.around(number) for number in sorted(names)}
    first = next((n for n, owner in owners.items() if owner is not None), min(names))
    module = owners[first]
    others = {id(m) for m in owners.values() if m is not None and m is not module}
    return Place(module, path_of(module, modules()), names[first], len(others))


@dataclass
class _Call:
    module: nn.Module
    first: int
    end: int = sys.maxsize


class _ModuleCalls:
    """While active, records which modules are called, and which autograd nodes they make.

    Autograd numbers the nodes of a thread in the order in which they are made.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._open: list[_Call] = []

    def __enter__(self) -> "_ModuleCalls":
        self._handles = [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._finish, always_call=True),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: object) -> None:
        self._calls.append(_Call(module, torch.autograd._get_sequence_nr()))
        self._open.append(self._calls[-1])

    def _finish(self, module: nn.Module, args: object, output: object) -> None:
        while self._open:
            call = self._open.pop()
            call.end = torch.autograd._get_sequence_nr()
            if call.module is module:
                return

    def around(self, number: int) -> nn.Module | None:
        """The innermost module in whose call the node of this number was made."""
        within = [call.module for call in self._calls if call.first <= number < call.end]
        return within[-1] if within else None


def path_of(module: nn.Module | None, modules: Sequence[nn.Module]) -> str:
    """A module's longest name in some others, without what wrappers add to it."""
    paths = [
        (root, path)
        for root in modules
        for path, part in root.named_modules()
        if part is module and path
    ]
    return _without_wrappers(*max(paths, key=lambda pair: len(pair[1]))) if paths else ""


def _without_wrappers(root: nn.Module, path: str) -> str:
    """A path without the names by which ``torch.compile`` and data parallelism hold a module."""
    kept, owner = [], root
    for name in path.split("."):
        parallel = isinstance(owner, (DataParallel, DistributedDataParallel)) and name == "module"
        if not parallel and name != "_orig_mod":
            kept.append(name)
        owner = owner._modules[name]  # type: ignore[assignment]
    return ".".join(kept)


def check_checkpointing(loss: torch.Tensor, modules: Sequence[nn.Module]) -> None:
    """Raises where a layer is checkpointed in the way that hides its parameters from autograd.

    Raises:
        RuntimeError: for ``torch.utils.checkpoint`` with ``use_reentrant=True``.
    """
    for node in graph_nodes([loss]):
        if node.name().startswith("CheckpointFunction"):
            layer = getattr(node, "run_function", None)
            path = path_of(layer, modules) if isinstance(layer, nn.Module) else ""
            raise RuntimeError(
                f"The closure checkpoints {f'module {path!r}' if path else 'a layer'} with "
                "use_reentrant=True, through which second derivatives do not reach the layer's "
                "parameters: use use_reentrant=False."
            )
