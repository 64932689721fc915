"""Which targets are instantiated, and which values their arguments accept."""

from pathlib import Path

import pytest
import torch

from hvpopt import cli
from hvpopt.cli.targets import argument_names, check_targets, resolve_target
from hvpopt.cli.types import accepts


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("os.system", "is not allowed"),
        ("hvpopt_evil.run", "is not allowed"),
        ("torch.optimism.Adam", "is not allowed"),
        ("torch.load", "is not allowed"),
        ("lightning.pytorch.trainer.trainer.os.system", r"not allowed \(it belongs to posix\)"),
        ("hvpopt.cli.sys.exit", r"not allowed \(it belongs to sys\)"),
        ("torch.optim", "is not allowed"),  # a module, not a callable
        (None, "is not allowed"),
        ("torch.optim.", "does not exist"),
        ("torch.optim.nothing.Adam", "does not exist"),
        ("hvpopt.no_such_module.x", "does not exist"),
    ],
)
def test_targets_that_are_refused(target, match):
    with pytest.raises(cli.UserError, match=match):
        resolve_target(target, "optimizer")


def test_targets_that_are_resolved(monkeypatch):
    assert resolve_target("torch.optim.AdamW", "optimizer") is torch.optim.AdamW
    with pytest.raises(cli.UserError, match="HVPOPT_ALLOWED_TARGETS=PACKAGE"):
        resolve_target("collections.OrderedDict", "x")
    monkeypatch.setenv("HVPOPT_ALLOWED_TARGETS", "fractions, collections")
    from collections import OrderedDict

    assert resolve_target("collections.OrderedDict", "x") is OrderedDict


def test_targets_inside_lists_are_checked():
    with pytest.raises(cli.UserError, match=r"a.b\[1\]._target_=os.getcwd is not allowed"):
        check_targets({"a": {"b": [1, {"_target_": "os.getcwd"}]}})


def test_argument_names():
    def named(a, *, b):
        pass

    def open_ended(a, **rest):
        pass

    assert argument_names(named) == {"a", "b"}
    assert argument_names(open_ended) is None


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (float, [1, 1.5], ["a", True, None]),
        (int, [1], [1.0, True, "1"]),
        (bool, [True], [1, "true"]),
        (str, ["a"], [1]),
        (float | None, [None, 2], ["a"]),
        (Path | str, ["a"], [1]),
        (torch.Tensor | float, [1.0, {"_target_": "x"}], ["a"]),
        (list[int], [[1, 2]], [["a"], 1]),
        (tuple[float, float], [[1, 2]], [[1], "ab"]),
        (tuple[int, ...], [[1, 2, 3]], [["a"]]),
        (object, ["anything", [1]], []),
    ],
)
def test_accepts(hint, good, bad):
    assert all(accepts(hint, value) for value in good)
    assert not any(accepts(hint, value) for value in bad)


def test_accepts_the_options_of_a_literal():
    from typing import Any, Literal

    assert accepts(Literal["a", "b"], "a")
    assert not accepts(Literal["a", "b"], "c")
    assert accepts(Any, [1])
