"""Converts arguments of the Python interface to the folders, files and plans that stages read."""

import io
import math
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from decimal import Decimal, InvalidOperation
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from a3.core.errors import A3Error
from a3.core.files import HIDDEN_SEAL, RECORDS, named
from a3.core.progress import LOG, bars
from a3.experiments.entries import find_entry
from a3.models.load import auto_in, loaded
from a3.models.quiet import quiet
from a3.models.readable import PROCESSORS, require_readable
from a3.models.tokenizer import tokenizer_files
from a3.models.wrappers import auto_class, wrapper_of
from a3.solutions.modes import COMPONENTS, NO_RATIO, PRESETS, choose, parse_amount
from a3.solutions.plan import Plan
from a3.solutions.runtime import runtime_named
from a3.solutions.target import Target
from a3.stages.inputs.catalogued import find_source, make_text
from a3.stages.inputs.model import is_gguf, resolve_model
from a3.texts.reading import Document, as_document, write_documents

Model: TypeAlias = PreTrainedModel | str | Path
Tokenizer: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin | None
Texts: TypeAlias = Iterable[Any] | str | Path

# One call at a time: libraries keep settings for all threads, such as the dtype of new tensors
# while a model loads. A thread may enter again: `texts` may be a generator that calls a3.
CALLS = threading.RLock()


@contextmanager
def workplace(progress: bool) -> Iterator[Path]:
    """Yield a temporary folder, inside a `call`.

    Error messages name files in it by the caller's own names.
    """
    with call(progress), tempfile.TemporaryDirectory(prefix="a3.") as name:
        work = Path(name)
        known = {work / "model": "model", work / "docs.jsonl": "texts", work / "small": "result"}
        known |= {work / "dev.jsonl": "dev_texts", work / "teacher/model": "teacher"}
        with named(known):
            yield work


@contextmanager
def call(progress: bool) -> Iterator[None]:
    """Inside the block only a3's progress bars are shown, if wanted, and other threads wait."""
    with CALLS, bars(progress), quiet():
        yield


@contextmanager
def silent(wanted: bool) -> Iterator[None]:
    """Discard printed output inside the block, for libraries that cannot be silenced otherwise."""
    with ExitStack() as stack:
        if wanted:
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


# --- models and texts -----------------------------------------------------------------------------
def model_entry(model: Model, tokenizer: Tokenizer, work: Path) -> dict[str, Any]:
    """A caller's name for a model, as a catalogue entry."""
    if isinstance(model, str | Path) and tokenizer is None:
        return find_entry(str(model), "models")
    return {"source": {"path": str(model_folder(model, tokenizer, work))}}


def model_folder(model: Model, tokenizer: Tokenizer, work: Path) -> Path:
    """The Hugging Face folder of a model: the caller's own, or a new one in `work`.

    Raises A3Error if the argument is neither a PreTrainedModel nor a model's name, if it has no
    head that predicts tokens, or if there is no tokenizer.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase | ProcessorMixin | None):
        raise A3Error(
            f"tokenizer: found {type(tokenizer).__name__}, expected a tokenizer or a "
            "processor of transformers."
        )
    if isinstance(model, str | Path):
        folder = named_folder(str(model), work)
        return folder if tokenizer is None else with_tokenizer(folder, tokenizer, work / "model")
    if not isinstance(model, PreTrainedModel):
        raise A3Error(
            f"model: found {type(model).__name__}, expected a PreTrainedModel of transformers, a "
            "folder or a name. Adapters of peft: call merge_and_unload() first."
        )
    if model.get_output_embeddings() is None:
        raise A3Error(
            f"model: found {type(model).__name__}, which does not predict tokens. Load the model "
            f"with {auto_class(wrapper_of(model.config)).__name__}."
        )
    beside = getattr(model, "beside", {})
    if tokenizer is None and not beside:
        raise A3Error(
            "tokenizer: found none, and a loaded model has none in it. Pass the tokenizer as well."
        )
    if wrapper_of(model.config) and tokenizer and not isinstance(tokenizer, ProcessorMixin):
        LOG.warning(
            "tokenizer: a tokenizer alone; what is saved will have no processor of images. Pass "
            "that of AutoProcessor in its place."
        )
    model.save_pretrained(work / "model")
    if tokenizer is not None:
        tokenizer.save_pretrained(work / "model")
    require_readable(work / "model")
    return work / "model"


def named_folder(name: str, work: Path) -> Path:
    """The folder for a name: the folder of that name, or a new one in `work`."""
    entry = find_entry(name, "models")
    path = Path(entry["source"].get("path", ""))
    if "path" in entry["source"] and not is_gguf(path):
        require_readable(path)
        return path
    find_source(entry, work)
    resolve_model(entry["source"], work / "named", work, entry.get("licence"))
    return work / "named"


def with_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, out: Path
) -> Path:
    """The folder `out`: links to the files of `folder`, another tokenizer, and no records."""
    left_out = {*tokenizer_files(folder), *RECORDS, HIDDEN_SEAL}
    if isinstance(tokenizer, ProcessorMixin):
        left_out |= set(PROCESSORS)
    out.mkdir()
    for path in folder.iterdir():
        if path.name not in left_out:
            (out / path.name).symlink_to(path.resolve())
    tokenizer.save_pretrained(out)
    return out


def text_entry(texts: Texts, work: Path, name: str = "docs") -> dict[str, Any]:
    """A caller's texts, as a catalogue entry; strings are written to the file `name` in `work`."""
    if isinstance(texts, str | Path):
        try:
            return find_entry(str(texts), "texts")
        except A3Error as error:
            raise A3Error(f"{error} Text itself is given as a list of strings.") from None
    path = work / f"{name}.jsonl"
    write_documents(path, rows(texts))
    return {"source": {"path": str(path)}, "min_chars": 0}


def documents(texts: Texts, work: Path, split: str) -> Path:
    """The file or folder with the documents: the caller's own, or a new one in `work`.

    Of a text of the catalogue only those that may serve as `split`: calibration, dev or test.
    """
    entry = text_entry(texts, work)
    if "path" in entry["source"]:
        return Path(entry["source"]["path"])
    make_text(entry, work, work / "docs.jsonl", split)
    return work / "docs.jsonl"


def rows(texts: Iterable[Any]) -> Iterator[Document]:
    """Strings, or rows with the column text; None is an empty text.

    Raises A3Error for others, with their number.
    """
    # Iterating over a table gives its columns, and over bytes numbers.
    table = isinstance(texts, Mapping | bytes) or hasattr(texts, "columns")
    if table or not isinstance(texts, Iterable):
        raise A3Error(
            f"texts: found {type(texts).__name__}, expected strings, a datasets.Dataset with the "
            "column text, or a path. Of a DatasetDict, give one split; of a table, one column."
        )
    for number, row in enumerate(texts):
        where = f"texts[{number}]"
        fields = dict(row) if isinstance(row, Mapping) else {"text": row}
        if "text" not in fields:
            raise A3Error(
                f"{where}: found {sorted(map(str, fields))}, expected a row with the column text. "
                "Give the column that has the text: dataset['name']."
            )
        yield as_document(fields, "text", where)


def name_of(texts: Texts) -> str:
    """The name of the texts in a result: the file's name, or "texts"."""
    return Path(texts).stem if isinstance(texts, str | Path) else "texts"


def device_of(model: Model) -> str:
    """Where a model is: a loaded one's device, else the CPU."""
    return str(model.device) if isinstance(model, PreTrainedModel) else "cpu"


# --- plans ----------------------------------------------------------------------------------------
def plan_of(
    ratio: float | str | None,
    preset: str,
    modes: Mapping[str, str | None],
    multiple: int = 1,
    servable: bool = False,
    runtime: str | None = None,
) -> Plan:
    """The plan of a preset and a ratio, with other `modes` for some components.

    Raises A3Error for unknown modes, presets and runtimes, like the command line.
    """
    row = cells(preset, modes) | {"ratio": NO_RATIO if ratio is None else spelled(ratio)}
    return Plan(choose(row), servable, count_of("multiple", multiple), runtime)


def preset_of(preset: str | None, runtime: str | None, otherwise: str) -> str:
    """The preset that is named, or that of a runtime, or another; A3Error for a wrong runtime."""
    return preset or (otherwise if runtime is None else runtime_named(runtime).preset)


def size_of(
    ratio: float | str | None, said: Mapping[str, float | str | None]
) -> tuple[float | str | None, str]:
    """The ratio, or the text of the target that is `said` in its place, and the preset for it.

    Raises A3Error for both, and for a wrong target.
    """
    words = {}
    for name, value in said.items():
        if isinstance(value, bool) or not isinstance(value, str | Real | Decimal | None):
            raise A3Error(f"{name}: found {value!r}, expected a number or its text.")
        words[name] = value if isinstance(value, str | None) else f"{Decimal(str(value)):f}"
    if all(word is None for word in words.values()):
        return ratio, "a3"
    if ratio is not None:
        raise A3Error("ratio: a target takes the place of a ratio. Give one of them.")
    target = Target.of(words)
    return str(target), target.preset


def kinds_of(preset: str, modes: Mapping[str, str | None]) -> list[str]:
    """The statistics that the modes read; they do not depend on the ratio."""
    found = cells(preset, modes)
    sized = all("@" in cell or cell == "dense" for cell in found.values())
    return Plan(choose(found | {"ratio": NO_RATIO if sized else "0.5"})).kinds()


def cells(preset: str, modes: Mapping[str, str | None]) -> dict[str, str]:
    """The mode of each component; raises A3Error for a preset that is not known."""
    require_one_of("preset", preset, tuple(PRESETS))
    for one, mode in modes.items():
        if not isinstance(mode, str | None):
            raise A3Error(
                f"{one}: found {mode!r}, expected a mode, such as {PRESETS['a3'][one]!r}."
            )
    return {one: modes.get(one) or PRESETS[preset][one] for one in COMPONENTS}


def spelled(ratio: float | str) -> str:
    """A ratio as text for tables: 0.2 becomes "0.2"; raises A3Error outside [0, 1).

    Text may also be of targets.
    """
    try:
        text = ratio if isinstance(ratio, str) else f"{Decimal(str(ratio)).normalize():f}"
    except InvalidOperation:
        raise A3Error(f"ratio: found {ratio!r}, expected a number in [0, 1).") from None
    parse_amount(text)
    return text


def require_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise A3Error unless an argument is one of `choices`."""
    if value not in choices:
        raise A3Error(f"{name}: found {value!r}, expected one of {', '.join(choices)}.")


def path_of(name: str, value: Any) -> Path:
    """An argument that names a file or folder; raises A3Error for one of another type."""
    if not isinstance(value, str | Path):
        raise A3Error(f"{name}: found {value!r}, expected a path.")
    return Path(value)


def count_of(name: str, value: Any, least: int = 1) -> int:
    """An argument that counts, numpy's integers among them.

    Raises A3Error unless it is an integer from `least` on.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise A3Error(f"{name}: found {value!r}, expected an integer from {least} on.")
    return int(value)


def number_of(name: str, value: Any) -> float:
    """An argument above 0; raises A3Error for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise A3Error(f"{name}: found {value!r}, expected a number above 0.")
    return float(value)


# --- results --------------------------------------------------------------------------------------
def loaded_as(folder: Path, like: Model, stored: str | None = None) -> PreTrainedModel:
    """The model in a folder, with the dtype and device of another that was given in memory, or in
    the dtype `stored`, which was asked for.
    """
    given = like if isinstance(like, PreTrainedModel) else None
    dtype = "auto" if given is None or stored else given.dtype
    model = loaded(auto_in(folder), folder, dtype=dtype, use_safetensors=True)
    # Small files that save_pretrained writes beside the weights (a3.models.modeling_a3).
    if hasattr(model, "beside"):
        names = [*tokenizer_files(folder), *(n for n in PROCESSORS if (folder / n).is_file())]
        model.beside = {name: (folder / name).read_bytes() for name in names}
    return model if given is None else model.to(given.device)
