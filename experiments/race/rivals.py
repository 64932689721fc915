"""Methods of other libraries in the race's interface."""

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .problem import Problem


class MuonWithAdamW:
    """torch's Muon for matrices and AdamW for all else, with one learning rate: Muon's update is
    scaled to the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``)."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        matrices = [p for p in params if p.ndim == 2]
        others = [p for p in params if p.ndim != 2]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay))

    def zero_grad(self) -> None:
        """Clears the gradients."""
        for part in self._parts:
            part.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of both."""
        loss = closure()
        for part in self._parts:
            part.step()
        return loss


class _LossModule(nn.Module):
    """A problem's loss as a module's output, for `functional_call`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.module = problem.module
        self._loss = problem.loss

    def forward(self) -> Tensor:
        return self._loss()


class _Stopped(Exception):
    """Ends a call that waits in its callback."""


def torchmin_steps(problem: Problem, method: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Iterations of ``torchmin.minimize`` on the problem's full batch, from its present weights.

    The library runs to its end in one call. Here the call runs in a thread that waits in the
    callback after each iteration until the next is asked for.
    """
    torchmin = importlib.import_module("torchmin")

    params = dict(problem.module.named_parameters())
    wrapped = _LossModule(problem)
    sizes = [p.numel() for p in params.values()]

    def unflattened(x: Tensor) -> dict[str, Tensor]:
        return {
            f"module.{name}": part.view_as(p)
            for (name, p), part in zip(params.items(), x.split(sizes), strict=True)
        }

    def fun(x: Tensor) -> Tensor:
        return functional_call(wrapped, unflattened(x), ())

    start = torch.cat([p.detach().flatten() for p in params.values()])

    def call(after_iteration: Callable[[Tensor], None]) -> None:
        torchmin.minimize(
            fun,
            start,
            method=method,
            max_iter=10**9,
            options=dict(options),
            callback=after_iteration,
        )

    for x in _paused(call):
        with torch.no_grad():
            for p, part in zip(params.values(), x.split(sizes), strict=True):
                p.copy_(part.view_as(p))
        yield


def _paused(call: Callable[[Callable[[Tensor], None]], None]) -> Iterator[Tensor]:
    """What a function hands to its callback, one at a time; meanwhile the function waits."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    handed: list[Tensor] = []
    errors: list[BaseException] = []
    is_stopped = False

    def callback(x: Tensor) -> None:
        handed.append(x.detach().clone())
        done.release()
        go.acquire()
        if is_stopped:
            raise _Stopped

    def run() -> None:
        go.acquire()
        try:
            if not is_stopped:
                call(callback)
        except _Stopped:
            pass
        except BaseException as error:  # raised again where the next step is asked for
            errors.append(error)
        finally:
            done.release()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            go.release()
            done.acquire()
            if errors:
                raise errors[0]
            if not handed:
                return
            yield handed.pop()
    finally:
        is_stopped = True
        go.release()
        thread.join(timeout=60)


def scikit_learn_newton_cg(problem: Any) -> Iterator[None]:
    """Newton iterations of scikit-learn's LogisticRegression(solver="newton-cg").

    The class runs to its end in one call. Here it is called with growing ``max_iter``, each time
    from the last call's coefficients: the solver keeps nothing else between its iterations.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    inputs, labels = problem.inputs.cpu().numpy(), problem.labels.cpu().numpy()
    layer = problem.module
    model = LogisticRegression(
        solver="newton-cg",
        C=1 / (problem.penalty * len(inputs)),
        tol=1e-10,
        warm_start=True,
    )
    iterations = 1
    while True:
        model.max_iter = iterations
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(inputs, labels)
        with torch.no_grad():
            layer.weight.copy_(torch.as_tensor(model.coef_))
            layer.bias.copy_(torch.as_tensor(model.intercept_))
        yield
        if model.n_iter_[0] < iterations:
            return
        iterations = min(2 * iterations, 8)
