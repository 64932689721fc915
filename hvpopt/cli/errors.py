"""Errors of the command line as one sentence each."""

from __future__ import annotations

import difflib
import linecache
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from hydra.errors import InstantiationException

__all__ = ["UserError", "fail", "instantiation_sentence", "is_for_the_user", "nearest", "one_line"]


class UserError(Exception):
    """A mistake in the command line or the configuration; its text is one sentence."""


def fail(error: Exception, sentence: str | None = None) -> NoReturn:
    """Ends the command with one sentence on stderr, or with the trace under HYDRA_FULL_ERROR=1."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    sys.stderr.write(f"hvpopt: {one_line(sentence or str(error))}\n")
    raise SystemExit(1)


def nearest(name: str, options: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the option nearest to a name, or the list of all, or nothing."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Possible: {', '.join(options)}." if options else ""


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return re.sub(r"\s+", " ", text).strip()


def is_for_the_user(error: BaseException) -> bool:
    """Whether an exception's text is written for the user.

    It is when one of hvpopt's own `raise` statements raised it as the error of an input, or when
    it is Lightning's exception for a configuration. Anything else is a bug and keeps its trace.
    """
    if type(error).__name__ == "MisconfigurationException":
        return True
    if not isinstance(error, ValueError | TypeError | FileNotFoundError | RuntimeError):
        return False
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    return module.partition(".")[0] == "hvpopt" and line.lstrip().startswith("raise ")


def instantiation_sentence(error: InstantiationException, task: dict[str, Any]) -> str:
    """What Hydra's failed construction says, without the frame that Hydra adds.

    `task` is the unresolved task node; it tells that `task.module` is called `model` elsewhere.
    """
    match = re.search(r"full_key: (\S+)", str(error))
    reason = str(error.__cause__) if error.__cause__ is not None else str(error)
    if match is None:
        return reason
    parts = match[1].split(".")
    if parts[0] == "task" and len(parts) > 1:
        reference = re.fullmatch(r"\$\{([\w.]+)\}", str(task.get(parts[1])))
        parts = [reference[1], *parts[2:]] if reference else parts[1:]
    return f"{'.'.join(parts)}: {reason}"
