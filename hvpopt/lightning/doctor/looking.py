"""Oracles of a subject that leave no trace, and what is said meanwhile."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineChoice
from hvpopt.lightning.doctor.subject import Subject


def oracle_of(subject: Subject, choice: EngineChoice) -> ClosureOracle:
    """An oracle of the subject's closure that only looks."""
    return ClosureOracle(subject.closure, subject.params, engine=choice, leave_no_trace=True)


@contextmanager
def messages() -> Iterator[list[str]]:
    """While active, what hvpopt would log is gathered instead."""
    heard: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        heard.append(record.getMessage())
        return False

    logger = logging.getLogger("hvpopt")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(keep)
    try:
        yield heard
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


def chosen_engines(heard: Sequence[str]) -> str:
    """What `hvpopt.engines.choice` said of its choices: engines, each with its reason."""
    texts = [m.partition("by engine ")[2].rstrip(".") for m in heard if m.startswith("Products of")]
    return "; ".join(dict.fromkeys(texts))


def one_line(error: Exception) -> str:
    """An error's text."""
    return " ".join(str(error).split())


def sentence(error: Exception) -> str:
    """An error's text, with its type where it is not written for the user."""
    kind = type(error)
    is_ours = kind is RuntimeError or kind.__module__.startswith("hvpopt.")
    return one_line(error) if is_ours else f"{kind.__name__}: {one_line(error)}"
