"""The Python interface: a3's stages as functions, for a model in memory, a folder or a name.

    small = a3.compress(model, tokenizer, texts, ratio=0.2, preset="a3-plus")
    small.save_pretrained("small")

Arguments that several functions have:

- `model`: a loaded PreTrainedModel, a folder, a .gguf file, a name from the catalogue, or
  owner/name@revision on the hub. A loaded model is first saved to a temporary folder (in TMPDIR).
- `tokenizer`: needed for a loaded dense model. Compressed models, folders and named models bring
  their own tokenizer.
- `texts`: strings, a datasets.Dataset with the column `text`, a file or folder, or a name from the
  catalogue (by default its mixture of many kinds, which is downloaded). All texts are read, because
  the seed shuffles the documents.
- `ratio`: share of each dimension to remove, in [0, 1). Not needed if each mode has its own.
- `fit`, `params`, `kv_cache`, `flops`, `max_loss`: what the model is to become, in place of a ratio
  and as the options of the command line say it: `fit="300MB"`, `kv_cache=0.5`, `max_loss=0.05`.
- `preset`: modes of all components, `"a3"` (the paper's, the default), `"a3-plus"` (most accurate;
  the default with a target) or `"a3-stock"` (for stock llama.cpp).
- `qk`, `ov`, `mlp`: another mode for one component, with its own ratio or rank if wanted: `"xkv"`,
  `"xkv@0.3"`, `"xkv@48"`, or `"dense"` to skip the component.
- `tokens`, `block_length`: number of tokens in all, and of those that the model sees at once.
- `bos`: whether each block starts with BOS.
- `seed`: determines the order of documents and the choice of a task's few-shot examples.
- `multiple`: ranks are rounded to a multiple of this number.
- `servable`: head sizes are rounded to those that serving runtimes support.
- `runtime`: `"llama.cpp"`, `"hf"` …: sizes and modes that it takes; all else is refused.
- `dtype`, `device`: of the forward pass; by default on the device of a loaded model, else the CPU.
- `progress`: whether to show progress bars. Nothing else is printed: messages go to the logger
  "a3".

Every function raises `a3.A3Error` for errors that the caller can correct. The message says what was
found, what was expected and what to do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3.artifacts import targets
from a3.core.devices import require_device
from a3.core.dtypes import GGUF_TYPES, HEAL_DTYPES, RUN_DTYPES
from a3.core.errors import A3Error
from a3.core.extras import require_installed
from a3.core.files import read_record
from a3.given import (
    Model,
    Texts,
    Tokenizer,
    call,
    count_of,
    device_of,
    documents,
    kinds_of,
    loaded_as,
    model_entry,
    model_folder,
    name_of,
    number_of,
    path_of,
    plan_of,
    preset_of,
    require_one_of,
    silent,
    size_of,
    text_entry,
    workplace,
)
from a3.models.load import load_tokenizer
from a3.models.readable import require_readable
from a3.pipeline import compress as compress_folder
from a3.solutions.modes import COMPONENTS, EXPERTS


class Sizes(TypedDict):
    """How a text is cut into blocks of tokens."""

    tokens: int
    block_length: int
    bos: bool
    seed: int


class ScoredSizes(TypedDict):
    """Like `Sizes`, for a text that is scored."""

    tokens: int | str
    block_length: int
    bos: bool | str


class Run(TypedDict):
    """How a forward pass is computed."""

    dtype: str
    device: str


def compress(
    model: Model,
    tokenizer: Tokenizer = None,
    texts: Texts = "mixture",
    *,
    ratio: float | str | None = None,
    fit: str | None = None,
    params: int | str | None = None,
    kv_cache: float | str | None = None,
    flops: float | str | None = None,
    max_loss: float | str | None = None,
    preset: str | None = None,
    qk: str | None = None,
    ov: str | None = None,
    mlp: str | None = None,
    tokens: int = 32768,
    block_length: int = 1024,
    bos: bool = True,
    seed: int = 0,
    multiple: int = 1,
    servable: bool = False,
    runtime: str | None = None,
    dev_texts: Texts | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Collect statistics on `texts` and return the compressed model, as `a3 compress` makes it.

    A loaded model is not changed, and the result has its device and, unless `fit` has one, its
    dtype. For a folder or name, it has the stored dtype and is on the CPU. `save_pretrained` of
    the result also writes the tokenizer. transformers loads that folder after `import a3`.

    The logger "a3" says the loss over the dense model's on a few blocks of `texts` and of
    `dev_texts`, which the calibration should not have seen, and warns if the model is overfitted.
    """
    said = {"fit": fit, "params": params, "kv_cache": kv_cache, "flops": flops}
    size, fitting = size_of(ratio, said | {"max_loss": max_loss})
    modes = {"qk": qk, "ov": ov, "mlp": mlp}
    plan = plan_of(size, preset_of(preset, runtime, fitting), modes, multiple, servable, runtime)
    sizes = sizes_of(tokens, block_length, bos, seed)
    settings = {**sizes, **run_of(dtype, device, model)}
    with workplace(progress) as work:
        source = model_entry(model, tokenizer, work)
        text = text_entry(texts, work)
        dev = None if dev_texts is None else text_entry(dev_texts, work, "dev")
        compress_folder(source, text, plan, work / "small", settings, dev_text=dev)
        return loaded_as(work / "small", model, plan.stored)


def collect(
    model: Model,
    tokenizer: Tokenizer = None,
    texts: Texts = "mixture",
    *,
    out: str | Path,
    preset: str = "a3",
    qk: str | None = None,
    ov: str | None = None,
    mlp: str | None = None,
    tokens: int = 32768,
    block_length: int = 1024,
    bos: bool = True,
    seed: int = 0,
    stream: bool | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> Path:
    """Write the statistics that the modes read to `<kind>.safetensors` in the folder `out`.

    The statistics do not depend on the ratio. `stream` keeps only one layer at a time in memory
    (None: only if the weights do not fit). Returns `out`.
    """
    from a3.stages.collect.collect import collect

    sizes = sizes_of(tokens, block_length, bos, seed)
    run = run_of(dtype, device, model)
    out = path_of("out", out)
    kinds = kinds_of(preset, {"qk": qk, "ov": ov, "mlp": mlp})
    with workplace(progress) as work:
        folder, docs = model_folder(model, tokenizer, work), documents(texts, work, "calibration")
        outputs = {kind: out / f"{kind}.safetensors" for kind in kinds}
        for path in outputs.values():
            targets.check(targets.STATISTICS, {"model": folder, "text": docs, "out": path})
        collect(folder, docs, outputs, **sizes, **run, stream=stream)
    return out


def allocate(
    model: Model,
    tokenizer: Tokenizer = None,
    *,
    rxx: str | Path,
    out: str | Path,
    ratio: float | str,
    preset: str | None = None,
    qk: str | None = None,
    ov: str | None = None,
    mlp: str | None = None,
    multiple: int = 1,
    runtime: str | None = None,
    uniform: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, list[int] | list[list[int]]]:
    """Write the ranks of each layer for modes with ~ to `out` (JSON), and return them.

    Of a mixture's MLP there is a list a layer, of its experts' ranks. `rxx` is the folder that
    `collect` wrote; components listed in `uniform` get the same rank in all layers, and with
    "experts" in it, all experts of a layer get the same.
    """
    from a3.promise import allocate_within

    preset, modes = preset_of(preset, runtime, "a3-plus"), {"qk": qk, "ov": ov, "mlp": mlp}
    plan = plan_of(ratio, preset, modes, multiple, runtime=runtime)
    rxx, out = path_of("rxx", rxx), path_of("out", out)
    for one in uniform:
        require_one_of("uniform", one, (*COMPONENTS, EXPERTS))
    with workplace(progress) as work:
        folder = model_folder(model, tokenizer, work)
        targets.check(targets.ALLOCATION, {"model": folder, "rxx": rxx, "out": out})
        own: dict[str, Any] = {"losses": [], "device": "cpu", "uniform": tuple(uniform)}
        allocate_within(folder, rxx, plan, None, out, **own)
    return read_record(out)["ranks"]


def approximate(
    model: Model,
    tokenizer: Tokenizer = None,
    *,
    rxx: str | Path,
    ratio: float | str | None = None,
    preset: str | None = None,
    qk: str | None = None,
    ov: str | None = None,
    mlp: str | None = None,
    allocation: str | Path | None = None,
    multiple: int = 1,
    servable: bool = False,
    runtime: str | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Return the model compressed with the statistics in the folder `rxx`.

    `allocation` is the file that `allocate` wrote, which modes with ~ need.
    """
    from a3.runnable import check_runtime
    from a3.stages.approx.approximate import approximate

    preset, modes = preset_of(preset, runtime, "a3"), {"qk": qk, "ov": ov, "mlp": mlp}
    plan = plan_of(ratio, preset, modes, multiple, servable, runtime)
    rxx = path_of("rxx", rxx)
    ranks = None if allocation is None else path_of("allocation", allocation)
    with workplace(progress) as work:
        folder = model_folder(model, tokenizer, work)
        check_runtime(plan, folder, ranks)
        approximate(folder, rxx, plan, work / "small", ranks)
        return loaded_as(work / "small", model, plan.stored)


def heal(
    model: Model,
    teacher: Model,
    tokenizer: Tokenizer = None,
    texts: Texts = "mixture",
    *,
    minutes: float | None = None,
    tokens: int | None = None,
    learning_rate: float = 3e-4,
    batch_size: int = 1,
    block_length: int = 1024,
    bos: bool = True,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Train a compressed model towards its dense model `teacher`; returns the trained model.

    The loss is KL(dense ‖ compressed) on blocks of `texts` that the calibration has not seen, as
    far as the folder `model` says which those are. Training ends after `minutes` or `tokens`,
    whichever comes first (both None: 10 minutes). `learning_rate` is the largest one of Adam,
    `batch_size` the number of blocks of a step. Shapes do not change, nor does `model` itself.
    """
    from a3.stages.heal.heal import Settings, heal

    sizes = sizes_of(block_length if tokens is None else tokens, block_length, bos, 0)
    require_one_of("dtype", dtype, HEAL_DTYPES)
    run = run_of(dtype, device, model)
    settings = Settings(
        minutes=None if minutes is None else number_of("minutes", minutes),
        tokens=None if tokens is None else sizes["tokens"],
        learning_rate=number_of("learning_rate", learning_rate),
        batch_size=count_of("batch_size", batch_size),
        block_length=sizes["block_length"],
        bos=sizes["bos"],
        dtype=dtype,
    )
    with workplace(progress) as work:
        own = None if isinstance(model, str | Path) or hasattr(model, "beside") else tokenizer
        folder = model_folder(model, own, work)
        dense = model_folder(teacher, tokenizer, work / "teacher")
        docs, out = documents(texts, work, "calibration"), work / "small"
        heal(folder, dense, docs, out, settings, device=run["device"])
        return loaded_as(work / "small", model)


def evaluate(
    model: Model,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    *,
    task: str | None = None,
    tokens: int | str = 16384,
    block_length: int = 1024,
    bos: bool | str = True,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Return perplexity on `texts`, or the scores of a `task` of lm-eval: the record of `a3 eval`.

    The results are `perplexity` and `perplexity_stderr`, or `value` and `stderr`; the other keys
    say how they were obtained. `tokens` may be "all", and `bos` "once" puts BOS only before the
    whole text. For a task, `shots` is the number of few-shot examples (None: the task's own
    number), and only the first `limit` items are scored (None: all). Raises A3Error unless exactly
    one of `texts` and `task` is given.
    """
    if (texts is None) == (task is None):
        raise A3Error("evaluate: expected either texts (perplexity) or task (lm-eval's).")
    if task is not None:
        require_installed("lm_eval", "eval")
    shots = None if shots is None else count_of("shots", shots, 0)
    limit = None if limit is None else count_of("limit", limit)
    seed = count_of("seed", seed, 0)
    sizes = scored_sizes_of(tokens, block_length, bos)
    run = run_of(dtype, device, model)
    with workplace(progress) as work:
        folder, out = model_folder(model, tokenizer, work), work / "result.json"
        if texts is not None:
            score(folder, documents(texts, work, "test"), name_of(texts), out, sizes, run)
        elif task is not None:
            from a3.stages.evaluate.harness import harness

            with silent(not progress):
                harness(
                    folder,
                    task,
                    out,
                    items=None,
                    yaml=None,
                    metric=None,
                    shots=shots,
                    limit=limit,
                    seed=seed,
                    **run,
                )
        return read_record(out)


def score(folder: Path, docs: Path, name: str, out: Path, sizes: ScoredSizes, run: Run) -> None:
    """Write the perplexity on documents, which the record calls `name`."""
    from a3.stages.evaluate.perplexity import Scored, perplexity

    perplexity(
        folder,
        [Scored(name, docs)],
        out,
        split="all",
        join="empty-line",
        **sizes,
        **run,
    )


def export(
    model: Model,
    out: str | Path,
    tokenizer: Tokenizer = None,
    *,
    type: str = "f16",
    progress: bool = True,
) -> Path:
    """Write the model to `out` for runtimes without a3: a .gguf file, or a Hugging Face folder.

    `type` is the type of a GGUF file's matrices: f32, f16, bf16, q8_0 … Returns `out`.
    """
    out = path_of("out", out)
    if out.suffix == ".gguf":
        require_installed("gguf", "export")
        require_one_of("type", type, GGUF_TYPES)
    with workplace(progress) as work:
        folder = model_folder(model, tokenizer, work)
        if out.suffix == ".gguf":
            from a3.stages.export.gguf import export_gguf

            targets.check(targets.PLAIN, {"model": folder, "out": out})
            export_gguf(folder, out, type)
        else:
            from a3.stages.export.hf import export_hf

            targets.check(targets.EXPORTED, {"model": folder, "out": out})
            export_hf(folder, out)
    return out


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a dense or compressed folder, in its stored dtype, and its tokenizer.

    Raises A3Error for a folder that transformers would read only in part.
    """
    path = path_of("folder", folder)
    if not path.is_dir():
        raise A3Error(f"{path}: no such folder. Name that of a dense or compressed model.")
    require_readable(path)
    with call(progress=False):
        return loaded_as(path, path), load_tokenizer(path)


def sizes_of(tokens: int, block_length: int, bos: bool, seed: int) -> Sizes:
    """Raises A3Error for sizes that are not counts."""
    if not isinstance(bos, bool):
        raise A3Error(f"bos: found {bos!r}, expected True or False.")
    return {
        "tokens": count_of("tokens", tokens),
        "block_length": count_of("block_length", block_length, 2),
        "bos": bos,
        "seed": count_of("seed", seed, 0),
    }


def scored_sizes_of(tokens: int | str, block_length: int, bos: bool | str) -> ScoredSizes:
    """As `sizes_of`; all tokens, and BOS once, can only be scored."""
    if not isinstance(bos, bool) and bos != "once":
        raise A3Error(f"bos: found {bos!r}, expected True, False or once.")
    return {
        "tokens": tokens if tokens == "all" else count_of("tokens", tokens),
        "block_length": count_of("block_length", block_length, 2),
        "bos": bos,
    }


def run_of(dtype: str, device: str | None, model: Model) -> Run:
    """The dtype and device of the forward pass; raises A3Error for those that are not there."""
    require_one_of("dtype", dtype, RUN_DTYPES)
    device = device or device_of(model)
    require_device(device, dtype)
    return {"dtype": dtype, "device": device}
