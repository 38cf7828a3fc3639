"""Stage heal: trains the layers of a compressed model towards its dense model (distillation).

Nothing else in a3 trains a compressed model, so that its results are shown apart from all others.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from a3.artifacts.card import write_card
from a3.artifacts.targets import HEALED
from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.files import (
    RECORDS,
    read_json,
    require_replaceable,
    sha256,
    whole_folder,
    write_record,
)
from a3.core.memory import require_memory
from a3.core.progress import LOG
from a3.core.provenance import provenance
from a3.core.work import work_folder
from a3.models.arch import is_compressed, load_arch, modules_of
from a3.models.checkpoint import CARD, Checkpoint, combined, hash_files
from a3.models.compressed import compressed_arch, compressed_record
from a3.models.folders import write_index
from a3.models.layerwise import layerwise
from a3.models.load import count_parameters, load_config, load_tokenizer, require_positions
from a3.models.packing import bring_code
from a3.models.shape import Arch
from a3.models.tokenizer import require_rows
from a3.models.travel import bring
from a3.stages.heal.distil import Distillation
from a3.stages.heal.fresh import HELD_OUT, FreshText, fresh_text
from a3.stages.heal.training import STATE, Budget, Training
from a3.texts.reading import text_sha256

# Keys of the compressed model's record that also hold for the trained one.
KEPT = ("base", "base_card", "dtype", "modes", "ranks", "layers", "size")

# The budget in minutes if none is given.
MINUTES = 10.0

# In float32: weights, gradients and Adam's two moments, and copies of all but the gradients while
# they are saved.
COPIES = 7


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Until `minutes` of steps have passed or `tokens` were used, whichever comes first (both None:
    MINUTES). `batch_size` blocks of `block_length` tokens are a step, `learning_rate` is the
    largest, and `dtype` that of the products.
    """

    minutes: float | None
    tokens: int | None
    learning_rate: float
    batch_size: int
    block_length: int
    bos: bool
    dtype: str


def heal(
    model_folder: Path,
    teacher_folder: Path,
    text: Path,
    out: Path,
    settings: Settings,
    *,
    device: str,
    fresh: bool = False,
) -> None:
    """Train the compressed model of a folder on a text, and write it to the folder `out`.

    The loss is KL(dense ‖ compressed) per token on blocks that the calibration has not seen. All
    weights of the layers are trained by Adam, in float32; embeddings, final norm and head stay.
    Shapes and config do not change. After a kill, the same call goes on from the work folder beside
    `out`, unless `fresh`. Raises A3Error for models that cannot be trained or taught, a text too
    short, and a loss that is not finite.
    """
    if settings.minutes is None and settings.tokens is None:
        settings = replace(settings, minutes=MINUTES)
    record = require_trainable(model_folder)
    require_teacher(model_folder, teacher_folder)
    require_positions(model_folder, settings.block_length)
    require_replaceable(out, HEALED.seal)
    arch, teacher = compressed_arch(model_folder), load_arch(teacher_folder)
    require_same_base(record, teacher, teacher_folder)
    require_room(model_folder, teacher_folder, settings.dtype, device)
    source = unseen(model_folder, record, text, settings)
    said = provenance(
        __name__,
        *modules_of(model_folder),
        weights_sha256=arch.weights_sha256,
        teacher_sha256=teacher.weights_sha256,
        text=text.name,
        text_sha256=text_sha256(text),
        seed=source.seed,
        skipped_blocks=source.skipped,
        **asdict(settings),
    )
    with work_folder(out, said | {"device": device}, lambda _: [STATE], [STATE], fresh) as work:
        student = layerwise(model_folder, arch, "float32", device, stream=False)
        dense = layerwise(teacher_folder, teacher, settings.dtype, device, stream=False)
        distillation = Distillation(student, dense, settings.learning_rate, settings.dtype)
        budget = Budget(settings.minutes, settings.tokens)
        training = Training(distillation, source, budget, settings.batch_size, work)
        training.run()
        weights = stored(distillation, Checkpoint(model_folder))
        kept = {key: record[key] for key in KEPT if key in record}
        kept |= {"approx": record.get("provenance"), "healed": result(training)}
        kept |= {"provenance": said | {"statistics": statistics_of(record)}}
        with whole_folder(out, HEALED.seal, [model_folder, teacher_folder]) as folder:
            write(folder, model_folder, weights, kept)
            seconds = sum(training.progress.seconds)
            write_record(folder / "timing.json", {"seconds": seconds, "layers": []})


def statistics_of(record: dict[str, Any]) -> dict[str, Any]:
    """Records of the statistics of a calibration; none for a model that was saved again."""
    return (record.get("provenance") or {}).get("statistics", {})


def unseen(folder: Path, record: dict[str, Any], text: Path, settings: Settings) -> FreshText:
    """The blocks of a text that the calibration has not seen; A3Error if the model has no rows."""
    tokenizer = load_tokenizer(folder)
    cut = (settings.block_length, settings.bos)
    source = fresh_text(text, statistics_of(record), tokenizer, *cut)
    require_rows(folder, tokenizer, source.held_out())
    return source


def require_trainable(folder: Path) -> dict[str, Any]:
    """The record of a compressed folder; raises A3Error for one that cannot be trained."""
    if not is_compressed(folder):
        raise A3Error(f"{folder}: a dense model. Name a folder that a3 compress or approx wrote.")
    if "quantised" in load_config(folder).a3:
        raise A3Error(
            f"{folder}: quantised, and training would undo the rounding. Heal the model that it "
            "was made of, and quantise the result."
        )
    record = compressed_record(folder)
    if "healed" in record:
        raise A3Error(
            f"{folder}: trained already (a3 heal). Heal the model that it was made of, with a "
            "larger budget."
        )
    return record


def require_teacher(student: Path, teacher: Path) -> None:
    """Raise A3Error unless a teacher is dense, and its predictions are of the same tokens."""
    if is_compressed(teacher):
        raise A3Error(f"{teacher}: compressed by a3; the teacher is the dense model. Name that.")
    own, other = (load_tokenizer(folder).get_vocab() for folder in (student, teacher))
    if own != other:
        token = min(own.items() ^ other.items(), key=lambda one: (one[1], one[0]))[0]
        raise A3Error(
            f"{teacher}: another vocabulary than {student}: {token!r} is token {other.get(token)}, "
            f"and {own.get(token)} there. Name the dense model that {student} was made from."
        )
    rows, expected = (
        load_config(folder).get_text_config().vocab_size for folder in (teacher, student)
    )
    if rows != expected:
        raise A3Error(
            f"{teacher}: predicts {rows} tokens, {student} {expected}. Name the dense model that "
            f"{student} was made from."
        )


def require_same_base(record: dict[str, Any], teacher: Arch, folder: Path) -> None:
    """Warn if the teacher is not the model that was compressed."""
    base = record["base"]["weights_sha256"]
    if base not in (None, teacher.weights_sha256):
        LOG.warning(
            f"heal: warning: {folder} has other weights (sha256 {teacher.weights_sha256}) than the "
            f"model that was compressed ({base}). Name that one, unless this is meant."
        )


def require_room(student: Path, teacher: Path, dtype: str, device: str) -> None:
    """Raise A3Error if both models, gradients and Adam's moments do not fit in the memory."""
    if device == "cpu":
        needed = WIDTHS[dtype] * count_parameters(teacher)
        needed += COPIES * WIDTHS["float32"] * count_parameters(student)
        require_memory(needed, f"heal: training {student}", "Take a smaller model")


def stored(distillation: Distillation, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The trained weights in the checkpoint's dtypes; the model itself gets the same values."""
    found = {}
    with torch.no_grad():
        for name, weight in distillation.weights.items():
            found[name] = weight.to(getattr(torch, checkpoint.dtype(name))).cpu().contiguous()
            weight.copy_(found[name])
    return found


def result(training: Training) -> dict[str, Any]:
    """What training did, for the record; losses are in nats a token."""
    progress, weights = training.progress, training.distillation.weights.values()
    after = training.distillation.measure(training.text.held_out())
    LOG.info(
        f"heal: {progress.done} steps in {sum(progress.seconds):.0f} s; KL(dense ‖ compressed) of "
        f"held-out blocks {progress.loss_before:.4f} before, {after:.4f} after, nats a token"
    )
    return {
        "text": training.text.path.name,
        "text_sha256": text_sha256(training.text.path),
        "steps": progress.done,
        "tokens": progress.done * training.tokens,
        "weights": sum(weight.numel() for weight in weights),
        "held_out_blocks": HELD_OUT,
        "loss_before": progress.loss_before,
        "loss_after": after,
        "losses": progress.losses,
    }


def write(folder: Path, source: Path, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write the files of `source` with new weights in place of those of the same names."""
    checkpoint = Checkpoint(source)
    files = list(checkpoint.files())
    for file in files:
        names = checkpoint.names_in(file)
        tensors = {n: weights[n] if n in weights else checkpoint.tensor(n) for n in names}
        save_file(dict(sorted(tensors.items())), folder / file, {"format": "pt"})
    if len(files) > 1:
        write_index(folder, files)
    bring(source, folder, CARD, *RECORDS, "timing.json")
    if "auto_map" in read_json(source / "config.json"):
        bring_code(folder)
    hashes = {file: sha256(folder / file) for file in files}
    record["weights_sha256"] = combined(list(hashes.values()))
    write_card(folder, record)
    write_record(folder / "approx.json", record | {"files": hash_files(folder, hashes)})
