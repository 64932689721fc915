"""What tests of several folders share."""

import gc
import os
import sys

import pytest
import torch
from logs import own_logging

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a core each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

FROZEN = pytest.StashKey[tuple]()


def pytest_runtest_setup(item):
    """Keeps the half a million objects that imports leave out of the tests' garbage collections.

    A full collection takes a quarter of a second with them, and hundreds are asked for: peaks of
    memory begin with one. Looked at from file to file: what is imported late is frozen then, as
    is what a test has thawed.
    """
    path, num_modules = item.config.stash.get(FROZEN, (None, 0))
    if item.path != path:
        if len(sys.modules) > num_modules + 200 or gc.get_freeze_count() == 0:
            gc.collect()
            gc.freeze()
            num_modules = len(sys.modules)
        item.config.stash[FROZEN] = item.path, num_modules


@pytest.fixture
def hvpopt(monkeypatch, tmp_path, capsys):
    """Runs the command in this process in an empty folder; its exit code, stdout and stderr."""
    from hvpopt import cli  # and with it Hydra, which few tests need

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hvpopt", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    with own_logging():
        yield run
