"""Turns off what transformers itself prints, where a3 shows its own progress or none."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block transformers prints errors only, and no progress bars."""
    verbosity = transformers_logging.get_verbosity()
    drawn = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if drawn:
            transformers_logging.enable_progress_bar()
