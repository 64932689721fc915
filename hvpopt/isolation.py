"""The world around a training closure: what a run of it changes besides the gradients.

One optimizer step may run its closure several times. Every run must see the same function (one
dropout mask, the same buffers), and after the step the world must look as if the closure had run
once. A `World` finds the modules that the closure uses, remembers how they and the random number
generators stood before the first run, lets every further run start from there on copies, and
removes its traces.
"""

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from hvpopt.discovery import find_modules

_INTERNALS = frozenset(vars(nn.Module()))


def _copy(value: Any) -> Any:
    """A copy that in-place changes of ``value`` do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, (list, dict, set)) else value


class _ModuleState:
    """Copies of a module's buffers and plain attributes, as they stood at one moment.

    A further run works on copies that stand in for the module's own objects, which nobody
    touches: a graph that was recorded from them stays valid.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        buffers, attributes = module._buffers, vars(module)
        names = [(buffers, name) for name, buffer in buffers.items() if buffer is not None]
        if not type(module).__module__.startswith("torch."):
            names += [(attributes, name) for name in attributes if name not in _INTERNALS]
        self._copies = [
            (space, name, _copy(space[name])) for space, name in names if _is_state(space[name])
        ]

    def stand_in(self) -> Callable[[], None]:
        """Puts copies in the place of the module's objects; returns what undoes it."""
        held = [(space, name, space.get(name)) for space, name, _ in self._copies]
        for space, name, content in self._copies:
            space[name] = _copy(content)

        def undo() -> None:
            for space, name, value in held:
                space[name] = value

        return undo


def _is_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.requires_grad
    return value is None or isinstance(value, (bool, int, float, str, tuple, list, dict, set))


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


class _Silent:
    """Takes every attribute, call and item, and does nothing: a logger for repeated runs."""

    def __getattr__(self, name: str) -> "_Silent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> "_Silent":
        return self


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
        self._random_before = _RandomState(self._devices)
        for module in find_modules(closure):
            self._meet(module)

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

    @contextmanager
    def first_run(self) -> Iterator[None]:
        """The run that counts: what it changes stays changed."""
        with _before_each_call(self._meet):
            yield

    @contextmanager
    def further_run(self) -> Iterator[None]:
        """A run that starts where the first one started, and whose traces are removed."""
        held = [p for module in self.modules for p in module._parameters.values()]
        grads = {p: p.grad for p in (*self._params, *held) if p is not None}
        with ExitStack() as stack:
            stack.callback(_put_back, grads)
            stack.callback(_RandomState(self._devices).restore)

            def isolate(module: nn.Module) -> None:
                stack.callback(self._before[id(module)].stand_in())
                if _trainer(module) is not None:
                    stack.enter_context(_silence(module))
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())  # its gradients are thrown away

            def meet(module: nn.Module) -> None:
                for part in self._meet(module):
                    isolate(part)

            self._random_before.restore()
            for p in grads:
                p.grad = None
            for module in self.modules:
                isolate(module)
            with _before_each_call(meet):
                yield

    @property
    def accumulation(self) -> int:
        """Over how many micro-batches a Lightning trainer divides the loss (else 1)."""
        counts = (getattr(t, "accumulate_grad_batches", 1) for t in map(_trainer, self.modules))
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


def _trainer(module: nn.Module) -> Any:
    return vars(module).get("_trainer")


@contextmanager
def _silence(module: nn.Module) -> Iterator[None]:
    """While active, a LightningModule logs nothing and its trainer calls nobody back."""
    trainer = _trainer(module)
    if not hasattr(trainer, "loggers") or "log" in vars(module):
        yield
        return
    loggers, callbacks = trainer.loggers, trainer.callbacks
    vars(module).update(log=_Silent(), log_dict=_Silent())
    trainer.loggers, trainer.callbacks = [_Silent()] if loggers else [], []
    try:
        yield
    finally:
        trainer.loggers, trainer.callbacks = loggers, callbacks
        del vars(module)["log"], vars(module)["log_dict"]
