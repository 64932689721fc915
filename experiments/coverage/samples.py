"""PyTorch's own samples of its modules and operations, as closures."""

import copy
import functools
import importlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass
class Sample:
    """One function with leaves to differentiate by; ``double`` is the same in float64."""

    name: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        """The module's parameters and the inputs that require gradients."""
        inputs = [
            x
            for x in pytree.tree_leaves((self.args, self.kwargs))
            if isinstance(x, Tensor) and x.requires_grad
        ]
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return list({id(p): p for p in [*parameters, *inputs]}.values())

    def loss(self) -> Tensor:
        """Σ (w o + o²/2) over the outputs o, with fixed w, so that linear modules curve too."""
        outputs = [
            torch.view_as_real(o) if o.is_complex() else o
            for o in pytree.tree_leaves(self.module(*self.args, **self.kwargs))
            if isinstance(o, Tensor) and o.requires_grad
        ]
        if not outputs:
            raise NoGradientError("no output depends on a leaf")
        total = outputs[0].new_zeros(())
        for o in outputs:
            w = torch.linspace(0.5, 1.5, max(o.numel(), 1), dtype=torch.float64)
            w = w[: o.numel()].to(o).view(o.shape)
            total = total + (w * o + 0.5 * o * o).sum()
        return total

    def closure(self) -> Callable[[], Tensor]:
        """What an optimizer would get."""
        leaves = self.leaves

        def closure() -> Tensor:
            for p in leaves:
                p.grad = None
            loss = self.loss()
            loss.backward()
            return loss

        return closure

    def double(self) -> "Sample":
        """The same values in float64."""
        module = copy.deepcopy(self.module).double()
        args, kwargs = pytree.tree_map_only(Tensor, _doubled, (self.args, self.kwargs))
        return Sample(self.name, module, args, kwargs)


class NoGradientError(Exception):
    """Raised for a sample without anything to differentiate."""


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _doubled(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().clone().double().requires_grad_(x.requires_grad)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """While active, torch's and NumPy's and Python's random numbers start at ``seed``."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        # torch.manual_seed formats a stack trace for each kind of device that has not started
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def module_samples(
    dtype: torch.dtype, *, training: bool, device: str = "cpu"
) -> Iterator[Callable[[], Sample]]:
    """What makes each sample of ``module_db``; importing that takes seconds."""
    module_db = _of_torch("common_modules").module_db
    for info in module_db:
        if dtype not in info.dtypes:
            continue
        with seeded():
            inputs = info.module_inputs_func(
                info, device=device, dtype=dtype, requires_grad=True, training=training
            )
        for number, given in enumerate(inputs):
            yield _maker(info, given, number, dtype, training, device)


def _of_torch(name: str) -> Any:
    """A module of torch's own tests; its import warns of what else they use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torch.testing._internal.{name}")


def _maker(
    info: Any, given: Any, number: int, dtype: torch.dtype, training: bool, device: str
) -> Callable[[], Sample]:
    def make() -> Sample:
        if given.forward_input is None:
            raise NoGradientError("no inputs")
        with seeded(1):
            construct = given.constructor_input
            module = info.module_cls(*construct.args, **construct.kwargs)
            module = module.to(device=device, dtype=dtype).train(training)
            args, kwargs = pytree.tree_map_only(
                Tensor, _leaf, (given.forward_input.args, given.forward_input.kwargs)
            )
            if info.is_lazy:
                with torch.no_grad():
                    module(*args, **kwargs)
        mode = "train" if training else "eval"
        name = f"{info.name} [{given.desc or number}] {mode} {str(dtype).removeprefix('torch.')}"
        return Sample(name, module, tuple(args), dict(kwargs))

    return make


class _Operation(torch.nn.Module):
    """An operation of ``op_db`` as a module."""

    def __init__(self, function: Callable[..., Any], after: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function, self.after = function, after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The operation's value on copies, which it may change in place."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.view_as(x), (args, kwargs))
        return self.after(self.function(*args, **kwargs))


def operation_samples(
    dtype: torch.dtype, *, per_operation: int, device: str = "cpu"
) -> Iterator[Callable[[], Sample]]:
    """What makes the first samples of each differentiable operation of ``op_db``."""
    op_db = _of_torch("common_methods_invocations").op_db
    for op in op_db:
        if not op.supports_autograd or dtype not in op.supported_dtypes(device):
            continue
        with seeded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how samples are made
            try:
                given = list(
                    itertools.islice(
                        op.sample_inputs(device, dtype, requires_grad=True), per_operation
                    )
                )
            except Exception:  # a sample that this build cannot make
                continue
        for number, sample in enumerate(given):
            yield _operation_maker(op, sample, number, dtype)


def _operation_maker(op: Any, given: Any, number: int, dtype: torch.dtype) -> Callable[[], Sample]:
    def make() -> Sample:
        inputs = (given.input, *given.args), given.kwargs
        args, kwargs = pytree.tree_map_only(Tensor, _leaf, inputs)
        variant = f".{op.variant_test_name}" if op.variant_test_name else ""
        if any(
            isinstance(x, Tensor) and x.layout != torch.strided for x in pytree.tree_leaves(args)
        ):
            raise NoGradientError("sparse")
        name = f"{op.name}{variant} [{number}] {str(dtype).removeprefix('torch.')}"
        function = functools.partial(op.gradcheck_wrapper, op.op)  # makes inputs symmetric, say
        return Sample(name, _Operation(function, given.output_process_fn_grad), args, dict(kwargs))

    return make
