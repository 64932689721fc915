"""The console's log handler."""

from __future__ import annotations

import logging

from tqdm import tqdm

__all__ = ["ConsoleHandler"]


class ConsoleHandler(logging.StreamHandler):
    """Prints messages above an open progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message."""
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # as all handlers of `logging` do: a message never ends the program
            self.handleError(record)
