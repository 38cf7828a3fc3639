"""Progress bars and messages of stages; a caller in Python can turn both off.

A stage shows progress with `Bar` and sends all messages to `LOG`. The command line
shows both; in Python bars are shown unless `progress=False`, and messages go to the logger "a3",
which prints nothing unless the program configures it.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

LOG = logging.getLogger("a3")
LOG.addHandler(logging.NullHandler())

_shown: ContextVar[bool] = ContextVar("shown", default=True)


class Bar(tqdm):
    """A progress bar on stderr, which `bars(False)` turns off."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, disable=not _shown.get(), **options)


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Show progress bars inside the block, or do not."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


class Terminal(logging.Handler):
    """Writes messages between progress bars: warnings to stderr, all else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message to the current sys.stdout or sys.stderr, which tests replace."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        Bar.write(record.getMessage(), file=stream)
        stream.flush()


@contextmanager
def on_terminal() -> Iterator[None]:
    """Print the messages of stages inside the block, as the command line does."""
    handler, level, propagate = Terminal(), LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = propagate


@contextmanager
def warnings_only() -> Iterator[None]:
    """Of the messages inside the block, send only warnings: a caller prints its own result."""
    level = LOG.level
    LOG.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOG.setLevel(level)
