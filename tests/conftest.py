"""What tests of several folders share."""

import sys

import pytest
from logs import own_logging


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
