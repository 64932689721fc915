"""Keeps a LightningModule and its trainer quiet while their closure runs again."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from torch import nn


class _Silent:
    """Takes every attribute, call and item, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> "_Silent":
        return self

    def __getitem__(self, key: object) -> "_Silent":
        return self

    def __setitem__(self, key: object, value: object) -> None: ...

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *exc: object) -> None: ...


class _SilentLogger(_Silent):
    """A logger for repeated runs: it says where it logs, and logs nothing."""

    def __init__(self, logger: object) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._logger, name)
        return value if value is None or isinstance(value, (str, int, PathLike)) else _Silent()


def trainer_of(module: nn.Module) -> Any:
    """The trainer that a LightningModule is attached to; None for other modules."""
    return vars(module).get("_trainer")


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """While active, a LightningModule logs nothing and its trainer calls nobody back."""
    trainer = trainer_of(module)
    if not hasattr(trainer, "loggers") or "log" in vars(module):
        yield
        return
    loggers, callbacks = trainer.loggers, trainer.callbacks
    vars(module).update(log=_Silent(), log_dict=_Silent())
    trainer.loggers, trainer.callbacks = [_SilentLogger(logger) for logger in loggers], []
    try:
        yield
    finally:
        trainer.loggers, trainer.callbacks = loggers, callbacks
        del vars(module)["log"], vars(module)["log_dict"]
