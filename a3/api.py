"""The Python interface: the stages of a3 for a model in memory, a folder or a name.

    small = a3.compress(model, tokenizer, texts, ratio=0.2, preset="a3-plus")
    small.save_pretrained("small")

In every function `model` is a loaded PreTrainedModel, whose `tokenizer` has to be given; or what
`a3 compress` takes: a folder, a .gguf file, a name of the catalogue, or owner/name@revision of the
hub, which have their own. `texts` are strings, a datasets.Dataset with the column `text`, or what
`a3 compress --text` takes. Modes are a `preset`, and `qk`, `ov`, `mlp` for components with another
one (docs/modes.md). Progress bars are shown unless `progress=False`, and nothing else is printed:
what a stage says goes to the logger "a3". Raises A3Error for whatever the caller can correct.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3.artifacts import targets
from a3.core.devices import require_device
from a3.core.errors import A3Error
from a3.core.extras import require_installed
from a3.core.files import read_record
from a3.given import (
    Model,
    Texts,
    Tokenizer,
    documents,
    kinds_of,
    loaded_as,
    model_entry,
    model_folder,
    name_of,
    plan_of,
    require_count,
    silent,
    text_entry,
    workplace,
)
from a3.models.load import load_tokenizer
from a3.models.readable import require_readable
from a3.pipeline import compress as compress_folder


def compress(
    model: Model,
    tokenizer: Tokenizer = None,
    texts: Texts = "wiki-articles",
    *,
    ratio: float | str | None = None,
    preset: str = "a3",
    qk: str | None = None,
    ov: str | None = None,
    mlp: str | None = None,
    tokens: int = 32768,
    block_length: int = 1024,
    bos: bool = True,
    seed: int = 0,
    multiple: int = 1,
    servable: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    progress: bool = True,
) -> PreTrainedModel:
    """Collect statistics on `texts` and return the compressed model.

    `ratio` is the share of each dimension to remove, in [0, 1). Calibration takes `tokens` tokens
    in blocks of `block_length`; `seed` orders the documents. The forward pass runs in `dtype` on
    `device`. The given model stays as it is; the compressed one has its dtype and device, or those
    of the folder on the CPU. Its `save_pretrained` writes the tokenizer, too.
    """
    plan = plan_of(ratio, preset, {"qk": qk, "ov": ov, "mlp": mlp}, multiple, servable)
    settings = {"tokens": tokens, "block_length": block_length, "bos": bos, "seed": seed}
    require_run(settings, dtype, device)
    settings |= {"dtype": dtype, "device": device}
    with workplace(progress) as work:
        source = model_entry(model, tokenizer, work)
        compress_folder(source, text_entry(texts, work), plan, work / "small", settings)
        return loaded_as(work / "small", model)


def collect(
    model: Model,
    tokenizer: Tokenizer = None,
    texts: Texts = "wiki-articles",
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
    device: str = "cpu",
    progress: bool = True,
) -> Path:
    """Write the statistics that the modes read to `<kind>.safetensors` in the folder `out`.

    `stream`: one layer at a time in memory (None: where all weights do not fit). Returns `out`.
    """
    from a3.stages.collect.collect import collect

    settings = {"tokens": tokens, "block_length": block_length, "bos": bos, "seed": seed}
    require_run(settings, dtype, device)
    out = Path(out)
    kinds = kinds_of(preset, {"qk": qk, "ov": ov, "mlp": mlp})
    with workplace(progress) as work:
        folder, docs = model_folder(model, tokenizer, work), documents(texts, work)
        outputs = {kind: out / f"{kind}.safetensors" for kind in kinds}
        for path in outputs.values():
            targets.check(targets.STATISTICS, {"model": folder, "text": docs, "out": path})
        collect(folder, docs, outputs, **settings, dtype=dtype, device=device, stream=stream)
    return out


def allocate(
    model: Model,
    tokenizer: Tokenizer = None,
    *,
    rxx: str | Path,
    out: str | Path,
    ratio: float | str,
    preset: str = "a3-plus",
    qk: str | None = None,
    ov: str | None = None,
    mlp: str | None = None,
    multiple: int = 1,
    uniform: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, list[int]]:
    """Write the ranks of each layer for modes with ~ to `out` (JSON), and return them.

    `rxx` is the folder that `collect` wrote; `uniform` components have one rank in all layers.
    """
    from a3.stages.approx.allocate import allocate

    plan = plan_of(ratio, preset, {"qk": qk, "ov": ov, "mlp": mlp}, multiple)
    rxx, out = Path(rxx), Path(out)
    with workplace(progress) as work:
        folder = model_folder(model, tokenizer, work)
        targets.check(targets.ALLOCATION, {"model": folder, "rxx": rxx, "out": out})
        allocate(folder, rxx, plan, out, uniform=tuple(uniform))
    return read_record(out)["ranks"]


def approximate(
    model: Model,
    tokenizer: Tokenizer = None,
    *,
    rxx: str | Path,
    ratio: float | str | None = None,
    preset: str = "a3",
    qk: str | None = None,
    ov: str | None = None,
    mlp: str | None = None,
    allocation: str | Path | None = None,
    multiple: int = 1,
    servable: bool = False,
    progress: bool = True,
) -> PreTrainedModel:
    """Return the model compressed with the statistics in the folder `rxx`.

    `allocation` is the file that `allocate` wrote, which modes with ~ need.
    """
    from a3.stages.approx.approximate import approximate

    plan = plan_of(ratio, preset, {"qk": qk, "ov": ov, "mlp": mlp}, multiple, servable)
    with workplace(progress) as work:
        folder = model_folder(model, tokenizer, work)
        ranks = None if allocation is None else Path(allocation)
        approximate(folder, Path(rxx), plan, work / "small", ranks)
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
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity on `texts`, or the scores of a `task` of lm-eval: the record of `a3 eval`.

    Perplexity scores `tokens` tokens ("all") in blocks of `block_length`. Of a task, `shots`
    examples are shown, chosen by `seed`, and the first `limit` items asked. Raises A3Error unless
    exactly one of `texts` and `task` is given.
    """
    if (texts is None) == (task is None):
        raise A3Error("evaluate: expected either texts (perplexity) or task (lm-eval's).")
    if task is not None:
        require_installed("lm_eval", "eval")
    sizes = {"tokens": tokens, "block_length": block_length, "bos": bos}
    require_run(sizes, dtype, device)
    with workplace(progress) as work:
        folder, out = model_folder(model, tokenizer, work), work / "result.json"
        if task is None:
            from a3.stages.evaluate.perplexity import perplexity

            scored = {"name": name_of(texts), "split": "all", "source": None, "join": "empty-line"}
            docs = documents(texts, work)
            perplexity(folder, docs, out, **scored, **sizes, dtype=dtype, device=device)
        else:
            from a3.stages.evaluate.harness import harness

            asked = {"shots": shots, "limit": limit, "seed": seed}
            local = {"items": None, "yaml": None, "metric": None}
            with silent(not progress):
                harness(folder, task, out, **asked, **local, dtype=dtype, device=device)
        return read_record(out)


def export(
    model: Model,
    out: str | Path,
    tokenizer: Tokenizer = None,
    *,
    type: str = "f16",
    progress: bool = True,
) -> Path:
    """Write the model to `out` for runtimes without a3: a .gguf file, or a Hugging Face folder.

    `type` is that of a GGUF file's matrices: f32, f16, bf16, q8_0 … Returns `out`.
    """
    out = Path(out)
    if out.suffix == ".gguf":
        require_installed("gguf", "export")
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
    """The model of a dense or compressed folder, in the dtype that is stored, and its tokenizer.

    Raises A3Error for a folder that transformers would read only in part.
    """
    path = Path(folder)
    require_readable(path)
    with workplace(progress=False):
        return loaded_as(path, path), load_tokenizer(path)


def require_run(sizes: dict[str, Any], dtype: str, device: str) -> None:
    """Raise A3Error for sizes that are no counts, and a device that is not there."""
    for name, least in (("tokens", 1), ("block_length", 2), ("seed", 0)):
        if name in sizes and sizes[name] != "all":
            require_count(name, sizes[name], least)
    require_device(device, dtype)
