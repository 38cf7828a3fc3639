"""a3 compress: collect, allocate and approx in one go, keeping only the compressed folder.

What is finished is in a work folder beside the output until all is done. After a kill, the same
command goes on from there, and the result has the same bytes.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from a3.artifacts.card import record_loss
from a3.artifacts.fit import said_of as said_of_loss
from a3.artifacts.fit import warning_of
from a3.artifacts.targets import NEW
from a3.core.files import (
    HIDDEN_SEAL,
    RECORDS,
    named,
    read_record,
    replace_folder,
    require_replaceable,
    sha256,
    write_record,
)
from a3.core.progress import LOG
from a3.core.provenance import provenance
from a3.core.work import work_folder, work_of
from a3.experiments.entries import CATALOGUE
from a3.models.checkpoint import recorded_files
from a3.models.inputs import local_inputs, mark, marks
from a3.promise import allocate_within, check_kept, check_target, held_out
from a3.runnable import say_whole
from a3.solutions.modes import eliminating
from a3.solutions.plan import Plan
from a3.stages.approx.kept import is_whole, join, layer_paths, solve_missing
from a3.stages.approx.losses import losses
from a3.stages.collect.collect import collect
from a3.stages.evaluate.fit import BLOCKS, Few, few_blocks, increases, predicted_loss
from a3.stages.inputs.catalogued import find_source, known_as, make_text, require_apart
from a3.stages.inputs.model import resolve_model

# Files of the work folder: model and text, what is tried on the way (a3.promise), and what takes
# long.
INPUTS = ("*.whl", "trial.*", "docs.jsonl", "docs.json", "dev.jsonl", "dev.json")

# Which documents of a text of the catalogue a file has.
SPLITS = {"docs": "calibration", "dev": "dev"}

LONG = (
    *("collecting/*", "rxx/*.safetensors", "losses/*.safetensors", "allocation.json"),
    *("layers/*.safetensors", "result/approx.json"),
)

BESIDE = (
    *("collecting/*/*", "rxx/*.timing.json", "losses/*.timing.json", "allocation.timing.json"),
    "layers/*.json",
)

# Losses by rank are lost in a kill, if they are of a file that is not written yet.
LAYERS_A_FILE = 4

# The hash of the record of the folder `result`, which is then moved to the output.
FINISHED = "finished.json"


def compress(
    model: dict[str, Any],
    text: dict[str, Any],
    plan: Plan,
    out: Path,
    settings: dict[str, Any],
    *,
    dev_text: dict[str, Any] | None = None,
    fresh: bool = False,
    announce: Callable[[Path], None] | None = None,
) -> None:
    """Compress `model` ({"source": …}) with statistics of `text` (likewise) into the folder `out`.

    `settings` are the arguments of `collect`. The loss on a few blocks of `text` and of `dev_text`
    is measured, recorded in the folder and printed, with a warning if the model is overfitted.
    `announce` is called with the model's folder before the long work. A work folder that a killed
    call left is used, or, if `fresh`, emptied. Raises A3Error if `out` already exists, if the work
    folder is not of this call, and as the stages do.
    The work folder stays then if a long stage has finished something in it.
    """
    if not (work_of(out) / FINISHED).is_file():
        require_replaceable(out, NEW.seal)
    texts = {"docs": text} | ({} if dev_text is None else {"dev": dev_text})
    if dev_text is not None:
        require_apart(text, dev_text)
    made_for = purpose(model, texts, plan, settings)
    with work_folder(out, made_for, own, LONG, fresh) as work:
        known: dict[str, Path | str] = {"model": known_as(model), "result": out}
        known |= {f"{name}.jsonl": known_as(entry) for name, entry in texts.items()}
        with named({work / name: said for name, said in known.items()}):
            if moved(work, out):
                return
            require_replaceable(out, NEW.seal)
            prepare(model, texts, plan, work, settings)
            dev = {} if dev_text is None else {"dev": few_of(work, "dev", settings)}
            begun = [path for pattern in LONG for path in work.glob(pattern)]
            if begun:
                LOG.info(f"compress: goes on in {work}, which has {said_of(begun)}")
            elif announce is not None:
                announce(work / "model")
            solve(plan, work, settings)
            finish(plan, work, dev, settings)
            moved(work, out)


def purpose(
    model: dict[str, Any],
    texts: dict[str, dict[str, Any]],
    plan: Plan,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What decides the bytes of the result: a work folder serves one purpose only."""
    read = [("models", model["source"]), *(("texts", one["source"]) for one in texts.values())]
    files = marks(path for section, source in read for path in local_inputs(section, source))
    made = provenance("a3.pipeline")
    return {
        "model": model,
        "text": texts["docs"],
        "dev_text": texts.get("dev"),
        **{component: str(choice) for component, choice in plan.choices.items()},
        "servable": plan.servable,
        "multiple": plan.multiple,
        "runtime": plan.runtime,
        **settings,
        **{f"the content of {path}": mark for path, mark in files.items()},
        "the code of a3": made["code"],
        "the catalogue of a3": mark(CATALOGUE),
        **{f"the version of {name}": version for name, version in made["libraries"].items()},
    }


def own(work: Path) -> list[str]:
    """Patterns for all files that `compress` writes to the work folder."""
    beside = (*RECORDS, HIDDEN_SEAL, "source.json", "timing.json")
    folders = [work / name for name in ("model", "result") if (work / name).is_dir()]
    files = [
        f"{folder.name}/{name}" for folder in folders for name in (*recorded_files(folder), *beside)
    ]
    return [*INPUTS, *LONG, *BESIDE, FINISHED, *files]


def prepare(
    model: dict[str, Any],
    texts: dict[str, dict[str, Any]],
    plan: Plan,
    work: Path,
    settings: dict[str, Any],
) -> None:
    """Make the model's folder and the documents, and check modes, sizes and targets before the long
    work.
    """
    if not (work / "model").is_dir():
        find_source(model, work)
        resolve_model(model["source"], work / "model", work, model.get("licence"))
    check_target(plan, work / "model")
    plan.check(work / "model")
    say_whole(plan, work / "model")
    for name, text in texts.items():
        if not (work / f"{name}.json").is_file():
            make_text(text, work, work / f"{name}.jsonl", SPLITS[name])
    if plan.target is not None and plan.target.max_loss is not None:
        held_out(work / "model", work / "docs.jsonl", settings)


def few_of(work: Path, name: str, settings: dict[str, Any], tokens: int | None = None) -> Few:
    """A few blocks of a text in the work folder, cut as those of the calibration."""
    cut = {key: settings[key] for key in ("block_length", "seed", "bos")}
    return few_blocks(work / "model", work / f"{name}.jsonl", BLOCKS, tokens=tokens, **cut)


def solve(plan: Plan, work: Path, settings: dict[str, Any]) -> None:
    """Collect, allocate and solve what is not there yet: one file a layer."""
    layers = layer_paths(work / "model", work / "layers")
    if missing := [path for path in layers if not is_whole(path)]:
        files = {kind: work / "rxx" / f"{kind}.safetensors" for kind in plan.kinds()}
        if not all(path.is_file() for path in files.values()):
            state = work / "collecting"
            collect(work / "model", work / "docs.jsonl", files, **settings, state=state)
        solving: dict[str, Any] = {"device": settings["device"]}
        allocation = None
        if plan.shared:
            solving["losses"] = all_losses(plan, work, len(layers), settings["device"])
            allocation = work / "allocation.json"
            if not allocation.is_file():
                text = work / "docs.jsonl"
                allocate_within(work / "model", work / "rxx", plan, text, allocation, **solving)
        solve_missing(work / "model", work / "rxx", plan, missing, allocation, **solving)
    # Statistics are used up, and may be larger than the model.
    for name in ("rxx", "losses"):
        if (work / name).is_dir():
            shutil.rmtree(work / name)


def finish(plan: Plan, work: Path, dev: dict[str, Few], settings: dict[str, Any]) -> None:
    """Make the folder `result` of all layers, and record and print its loss on a few blocks."""
    result = work / "result"
    if result.is_dir():
        shutil.rmtree(result)  # of a killed call, which may have recorded half
    join(work / "model", layer_paths(work / "model", work / "layers"), result)
    for line in check_kept(work / "model", result):
        LOG.info(f"compress: {line}")
    # Modes that read no statistics are not fitted to the text.
    texts = (
        {"calibration": few_of(work, "docs", settings, settings["tokens"])} if plan.kinds() else {}
    )
    if texts | dev:
        run = {key: settings[key] for key in ("dtype", "device")}
        loss = increases(work / "model", result, texts | dev, **run)
        allocation = work / "allocation.json" if plan.shared else None
        predicted = predicted_loss(allocation, read_record(result / "approx.json"))
        said = {"calibration": None, "dev": None} | loss | {"predicted": predicted}
        said |= read_held_out(allocation)
        record_loss(result, said)
        announce_loss(said)
    write_record(work / FINISHED, {"approx_sha256": sha256(result / "approx.json")})


def read_held_out(allocation: Path | None) -> dict[str, Any]:
    """The loss on held-out text by which ranks were chosen, if they were."""
    record = {} if allocation is None else read_record(allocation)
    return {"held_out": record["held_out"]} if "held_out" in record else {}


def announce_loss(loss: dict[str, Any]) -> None:
    """Print the loss over the dense model's, and a warning if the model is overfitted."""
    LOG.info(f"compress: loss over the dense model's, nats a token: {said_of_loss(loss)}")
    if loss["dev"] is None:
        LOG.info("compress: how much unseen text loses is not known; --dev-text TEXT measures it")
    if warning := warning_of(loss):
        LOG.warning(f"compress: warning: {warning}")


def all_losses(plan: Plan, work: Path, layers: int, device: str) -> list[Path]:
    """Files of the losses by rank, a few layers each; those that are missing are computed."""
    modes = {component: choice.mode for component, choice in plan.choices.items()}
    if not eliminating(modes):
        return []
    count = -(-layers // LAYERS_A_FILE)
    paths = [work / "losses" / f"{number}of{count}.safetensors" for number in range(count)]
    for path in paths:
        if not path.is_file():
            losses(work / "model", work / "rxx", modes, path, shard=path.stem, device=device)
    return paths


def moved(work: Path, out: Path) -> bool:
    """Move a finished result to `out`; whether the result is there, now or since a killed call."""
    if not (work / FINISHED).is_file():
        return False
    if (work / "result").is_dir():
        require_replaceable(out, NEW.seal)
        replace_folder(work / "result", out)
    found, record = out / "approx.json", read_record(work / FINISHED)
    return found.is_file() and sha256(found) == record["approx_sha256"]


def said_of(paths: list[Path]) -> str:
    """How many statistics and layers there are."""
    counts = {"statistics": "rxx", "layers": "layers"}
    return ", ".join(
        f"{sum(path.parent.name == folder for path in paths)} {what}"
        for what, folder in counts.items()
    )
