"""The world around a training closure: what a run of it changes besides the gradients.

One optimizer step may run its closure several times. Every run must see the same function (one
dropout mask, the same buffers), and after the step the world must look as if the closure had run
once. A `World` finds the modules that the closure uses, remembers how they and the random number
generators stood before the first run, lets every further run start from there on copies, and
removes its traces.
"""

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from hvpopt.discovery import find_modules
from hvpopt.silence import silenced, trainer_of

# What nn.Module keeps for itself; parameters and submodules are no state of a run, buffers are.
_INTERNALS = frozenset(vars(nn.Module())) - {"training"}


def _copy(value: Any, depth: int = 4) -> Any:
    """A copy that changes of ``value``, or of containers in it, so many deep, do not reach."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.detach().clone()
    if isinstance(value, (list, dict, set, deque)):
        if depth == 0:
            return value
        duplicate: Any = copy.copy(value)  # keeps the type: AttributeDict, defaultdict
        if not isinstance(value, set):
            for key, content in value.items() if isinstance(value, dict) else enumerate(value):
                duplicate[key] = _copy(content, depth - 1)
        return duplicate
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if type(value).__module__ == "numpy" and hasattr(value, "copy"):
        return value.copy()
    return copy.deepcopy(value) if type(value).__name__ in _NUMPY_GENERATORS else value


_NUMPY_GENERATORS = ("Generator", "RandomState")


class _ModuleState:
    """A module's buffers and attributes as they stood at one moment.

    A further run works on copies that stand in for the module's own objects, which nobody
    touches: a graph that was recorded from them stays valid. What an attribute of another kind
    (an object of the user's own) does to itself is out of sight.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        spaces: list[dict[str, Any]] = []
        if isinstance(module._buffers, dict):  # else a scripted module
            spaces.append(module._buffers)
        if not type(module).__module__.startswith("torch."):
            spaces.append(vars(module))
        self._copies = [
            (space, {name: _copy(value) for name, value in space.items() if name not in _INTERNALS})
            for space in spaces
        ]
        self._scripted: dict[str, Tensor] = {}
        if isinstance(module, torch.jit.ScriptModule):
            self._scripted = {n: _copy(b) for n, b in module.named_buffers(recurse=False)}
        self._training = module.training

    def stand_in(self) -> Callable[[], None]:
        """Puts copies in the place of the module's objects; returns what undoes it."""
        held = [(space, dict(space)) for space, _ in self._copies]
        training = self.module.training
        scripted = {
            n: b for n, b in self.module.named_buffers(recurse=False) if n in self._scripted
        }
        for name in scripted:
            setattr(self.module, name, _copy(self._scripted[name]))
        for space, contents in self._copies:
            for name in [n for n in space if n not in contents and n not in _INTERNALS]:
                del space[name]  # came into being in the first run
            space.update((name, _copy(value)) for name, value in contents.items())
        self.module.training = self._training

        def undo() -> None:
            for space, contents in held:
                for name in [name for name in space if name not in contents]:
                    del space[name]
                space.update(contents)
            for name, buffer in scripted.items():
                setattr(self.module, name, buffer)
            self.module.training = training

        return undo


class _RandomState:
    """The state of every random number generator that a training step may draw from."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda"]
        self._mps = torch.mps.get_rng_state() if any(d.type == "mps" for d in devices) else None
        self._python = random.getstate()
        self._numpy_random = getattr(sys.modules.get("numpy"), "random", None)
        self._numpy = self._numpy_random.get_state() if self._numpy_random else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)
        random.setstate(self._python)
        if self._numpy_random is not None:
            self._numpy_random.set_state(self._numpy)


class World:
    """Makes the first run of a closure count and every further one leave no trace.

    Args:
        closure: the training closure; modules are looked for in what it refers to, and among the
            modules that it calls.
        params: the optimizer's parameters. Further runs leave the gradients of these, and of every
            other parameter of the modules found, alone.
    """

    def __init__(self, closure: Callable[[], object], params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._devices = list({p.device for p in params})
        # by identity: a torchmetrics metric hashes its state
        self._before: dict[int, _ModuleState] = {}
        self._random_before: _RandomState | None = None
        for module in find_modules(closure):
            self._meet(module)
        for module in self.modules:  # Lightning's closure does not refer to what it calls
            wrapper = getattr(getattr(trainer_of(module), "strategy", None), "model", None)
            if isinstance(wrapper, nn.Module):
                self._meet(wrapper)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules found so far, each with its submodules."""
        return [state.module for state in self._before.values()]

    def _meet(self, module: nn.Module) -> list[nn.Module]:
        """Remembers how a module and its submodules stand; returns those that are new."""
        if id(module) in self._before:
            return []
        new = [part for part in module.modules() if id(part) not in self._before]
        self._before.update((id(part), _ModuleState(part)) for part in new)
        return new

    def hold_random_numbers(self) -> None:
        """Lets further runs draw the random numbers that come next."""
        self._random_before = _RandomState(self._devices)

    def hold(self, leaves: Sequence[Tensor]) -> None:
        """Lets further runs leave the gradients of these alone, too."""
        self._params += leaves

    @contextmanager
    def first_run(self) -> Iterator[None]:
        """The run that counts: what it changes stays changed."""
        self.hold_random_numbers()
        with _before_each_call(self._meet):
            yield

    @contextmanager
    def further_run(self) -> Iterator[list[nn.Module]]:
        """A run that starts where the first one started, and whose traces are removed.

        Yields a list that the modules that are called gather in.
        """
        called: list[nn.Module] = []
        held = [p for module in self.modules for p in module._parameters.values()]
        grads = {p: p.grad for p in (*self._params, *held) if p is not None}
        with ExitStack() as stack:
            stack.callback(_put_back, grads)
            stack.callback(_RandomState(self._devices).restore)

            def isolate(module: nn.Module) -> None:
                stack.callback(self._before[id(module)].stand_in())
                if trainer_of(module) is not None:
                    stack.enter_context(silenced(module))
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())  # its gradients are thrown away

            def meet(module: nn.Module) -> None:
                called.append(module)
                for part in self._meet(module):
                    isolate(part)

            if self._random_before is None:  # a probe, before the first run
                self.hold_random_numbers()
            assert self._random_before is not None
            self._random_before.restore()
            for p in grads:
                p.grad = None
            for module in self.modules:
                isolate(module)
            with _before_each_call(meet):
                yield called

    @property
    def accumulation(self) -> int:
        """Over how many micro-batches a Lightning trainer divides the loss (else 1)."""
        counts = (getattr(t, "accumulate_grad_batches", 1) for t in map(trainer_of, self.modules))
        return max(counts, default=1)


def _put_back(grads: dict[Tensor, Tensor | None]) -> None:
    for p, grad in grads.items():
        p.grad = grad


@contextmanager
def _before_each_call(meet: Callable[[nn.Module], object]) -> Iterator[None]:
    """While active, hands each module to ``meet`` just before it is called."""

    def hook(module: nn.Module, args: object) -> None:
        meet(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        with warnings.catch_warnings():
            # compiled modules warn that the hook is called for them too, which is all right
            warnings.filterwarnings(
                "ignore", "Using `torch.compile\\(module\\)` when there are global"
            )
            yield
    finally:
        handle.remove()
