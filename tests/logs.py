"""Keeps what Hydra and Lightning do to logging inside a test."""

import logging
from contextlib import contextmanager


@contextmanager
def own_logging():
    """While active, loggers may be configured; afterwards they are as they were."""
    loggers = [logging.getLogger(name) for name in (None, "hvpopt", "hydra", "lightning")]
    states = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in states:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
