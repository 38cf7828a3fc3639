"""The ranks of every layer, allocated under a budget: the file that approx reads."""

from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models.shape import Arch
from a3.solutions.plan import Plan


def read_allocation(
    path: Path | None, arch: Arch, plan: Plan
) -> dict[str, list[int] | list[list[int]]]:
    """Ranks of each component with an allocated ratio, one a layer; of experts a list a layer.

    Raises A3Error if there is no such file, or it was made for another model, other modes or
    another ratio.
    """
    asked = {component: str(choice) for component, choice in plan.shared.items()}
    if path is None:
        raise A3Error(
            f"{', '.join(asked.values())}: modes marked ~ need a file of allocated "
            "ranks. Make it with a3 allocate, and name it with --allocation."
        )
    record: dict[str, Any] = read_record(path)
    expected = {"modes": asked, "weights_sha256": arch.weights_sha256}
    for key, value in expected.items():
        if record.get(key) != value:
            raise A3Error(
                f"{path}: {key} is {record.get(key)!r}, expected {value!r}. Allocate again for "
                "this model, these modes and this ratio."
            )
    return record["ranks"]
