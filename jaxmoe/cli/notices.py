"""Notices: a command's messages besides its result and its progress, sent through the logger `jaxmoe`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from jaxmoe.cli.progress import print_line
from jaxmoe.errors import printable

LOGGER = "jaxmoe"


class _Handler(logging.Handler):
    """Prints the bare message. The stream is looked up each time, because a progress bar or a test may replace it."""

    def __init__(self, on_stderr: bool) -> None:
        super().__init__()
        self._on_stderr = on_stderr

    def emit(self, record: logging.LogRecord) -> None:
        print_line(printable(self.format(record)), on_stderr=self._on_stderr)


@contextmanager
def shown_notices(*, on_stderr: bool = False) -> Iterator[None]:
    """Shows notices of level INFO and above as plain lines: on standard error if `on_stderr`, else on standard output.

    If the program has already given the logger a handler, that handler stays and nothing is shown here.
    """
    logger = logging.getLogger(LOGGER)
    if logger.handlers:
        yield
        return
    handler, level, propagate = _Handler(on_stderr), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # handlers of the root logger would show each notice again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
