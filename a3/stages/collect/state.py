"""The state of a collection on disk: hidden states, finished sums, and which steps are done."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import read_record, write_record
from a3.core.mapped import mapped

# In the folder: the settings of the collection, and how many of its steps are done.
STEPS = "steps.json"

Step = TypeVar("Step")


class State:
    """A folder of memory-mapped tensors and finished sums.

    With `settings`, a collection with the same settings goes on from this folder after a kill. A
    step (one layer in one direction) must not change the tensors that it reads. Raises A3Error if
    the folder belongs to a collection with other settings, or is none's.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.maps: list[np.memmap] = []
        # Steps asked for, and steps done, now or before.
        self.asked = self.done = 0
        self.start = time.perf_counter()
        if settings is None:
            return
        if (folder / STEPS).exists():
            self.go_on(read_record(folder / STEPS))
        elif found := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise A3Error(f"{folder}: holds {min(found)} and no {STEPS}. Name another folder.")
        self.write()

    def go_on(self, record: dict[str, Any]) -> None:
        """Take over the steps that are done."""
        begun = record["settings"]
        for key in sorted(begun.keys() | self.settings.keys()):
            if begun.get(key) != self.settings.get(key):
                raise A3Error(
                    f"{self.folder}: begun with {key} {begun.get(key)!r}, and now it is "
                    f"{self.settings.get(key)!r}. Delete the folder, or name another."
                )
        self.done = record["done"]
        self.start -= record["seconds"]

    @property
    def sums(self) -> Path | None:
        """The folder of finished sums; None without settings, as nothing will go on from them."""
        return None if self.settings is None else self.folder / "sums"

    @property
    def seconds(self) -> float:
        """Seconds since the start, and before it, of all steps done."""
        return time.perf_counter() - self.start

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in a file of this name, which is new or from before the kill."""
        value, content = mapped(self.folder / name, shape, dtype)
        self.maps.append(content)
        if self.settings is None:
            # The file goes with the process, even if that is killed.
            (self.folder / name).unlink()
        return value

    def todo(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Those of the next steps that are not done yet; one is when the next is asked for."""
        for step in steps:
            self.asked += 1
            if self.asked > self.done:
                yield step
                self.done = self.asked
                if self.settings is not None:
                    self.write()

    def write(self) -> None:
        """Note the steps that are done, when what they wrote is on the disk."""
        for content in self.maps:
            content.flush()
        record = {"settings": self.settings, "done": self.done, "seconds": self.seconds}
        write_record(self.folder / STEPS, record)


@contextmanager
def state_in(folder: Path | None, settings: dict[str, Any]) -> Iterator[State]:
    """The state of a collection; its folder (None: a temporary one) is removed at its end."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="a3-collect-") as name:
            yield State(Path(name), None)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield State(folder, settings)
        shutil.rmtree(folder)
