"""Damaged files for every reader: what each makes of them, in one process, from a seed.

A reader refuses a damaged file with an A3Error that names it. Files that users write themselves,
and that have no hash, may be another valid input; then what is recorded of them differs. Anything
else, another exception or what was read from a file that changed, is a fault. `benchmarks/fuzz.py`
runs many more cases than the tests do.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TAIL, run, tiny_results
from tokenizers import Tokenizer

from a3.artifacts.runs import read_runs
from a3.core.errors import A3Error
from a3.core.files import load_yaml, read_record, sha256
from a3.core.records import Record
from a3.experiments.config import complete
from a3.experiments.rows import read_experiments
from a3.models.arch import describe, load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.load import load_model
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS as FORMS
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.approx.assemble import gather
from a3.stages.collect.merge import merge_shards
from a3.stages.evaluate import items as harness
from a3.stages.inputs.model import convert_gguf
from a3.texts.reading import load_documents

ROOT = Path(__file__).parents[2]
SCHEMA = load_yaml(ROOT / "workflow/schemas/config.schema.yaml")
ROW = {"model": "tiny", "calibration": "short", "qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w"}
CONFIG = """
experiments: experiments.tsv
models:
  tiny: {source: {path: tiny}}
texts:
  learn: {source: {path: learn.txt}, format: text}
  score: {source: {path: score.jsonl}, exclude: [learn], split: {test: 0.5, harness: 0.5}}
calibrations:
  short: {text: learn, tokens: 512, block_length: 64}
perplexity:
  score: {text: score, tokens: 256, block_length: 64}
evaluate:
  perplexity: [score]
"""
TABLE = "model\tcalibration\tqk\tov\tmlp\tratio\n" + "".join(
    f"tiny\tshort\trxx-w-rxx\txkv\trxx-w\t{ratio}\n" for ratio in ("0.1", "0.25", "0.5")
)
HUGE = 2**62
VALUES = (None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x", [], {}, [[]], {"x": 1}, 2**31)


@dataclass(frozen=True)
class Reader:
    """`read` gives what is read of `folder / target`; `damages` spoil that file.

    `own` files are the users': another valid input is no fault. `hashed`, of what is read, is then
    what is recorded of the file's content; it has to differ.
    """

    target: str
    read: Callable[[Path], Any]
    damages: tuple[Callable[[Path, random.Random], None], ...]
    own: bool = False
    hashed: Callable[[Any], Any] | None = None


@dataclass
class Outcome:
    """How many damaged files a reader refused, and took for others; every fault in words."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


# --- damages ---


def put(path: Path, content: bytes) -> None:
    """Replace a file: what still has the old one mapped keeps it."""
    path.unlink()
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    put(path, content[: draw.randrange(len(content))])


def flip(path: Path, draw: random.Random) -> None:
    """One bit anywhere."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    put(path, content)


def flip_early(path: Path, draw: random.Random) -> None:
    """One bit of the header."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(min(len(content), 2000))] ^= 1 << draw.randrange(8)
    put(path, content)


def empty(path: Path, draw: random.Random) -> None:
    put(path, b"")


def noise(path: Path, draw: random.Random) -> None:
    put(path, draw.randbytes(draw.choice((1, 8, 100, 10_000))))


def noise_within(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.choice((1, 4, 64)))
    content[start:end] = draw.randbytes(end - start)
    put(path, content)


def append(path: Path, draw: random.Random) -> None:
    put(path, path.read_bytes() + draw.randbytes(draw.choice((1, 8, 1000))))


def cut_out(path: Path, draw: random.Random) -> None:
    """Bytes in the middle lost."""
    content = path.read_bytes()
    start = draw.randrange(len(content))
    put(path, content[:start] + content[start + draw.choice((1, 4, 64)) :])


def huge_number(path: Path, draw: random.Random) -> None:
    """A length or count of the header says far more than there is."""
    content = bytearray(path.read_bytes())
    start = draw.choice((0, 4, 8, 16, 24, *range(0, min(len(content) - 8, 2000), 8)))
    content[start : start + 8] = draw.choice((HUGE, 2**31, 2**24)).to_bytes(8, "little")
    put(path, content)


def of_tensors(change: Callable[[dict[str, torch.Tensor], str], None]) -> Any:
    """A damage of one tensor of a safetensors file, which is whole otherwise."""

    def damage(path: Path, draw: random.Random) -> None:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        change(tensors, draw.choice(sorted(tensors)))
        path.unlink()
        save_file(tensors, path, metadata)

    return damage


def fill_with_nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    value = tensors[name]
    fill = float("nan") if value.is_floating_point() else 0
    tensors[name] = torch.full_like(value, fill)


def shorten(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


def turn(tensors: dict[str, torch.Tensor], name: str) -> None:
    """The same bytes in another shape."""
    tensors[name] = tensors[name].reshape((*reversed(tensors[name].shape), 1))


def lose(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def gain(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}x"] = tensors.pop(name)


def narrow(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.float16)


def add_one(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Finite, of the right shape, and wrong."""
    tensors[name].view(-1)[0] += 1


def wrong_type(path: Path, draw: random.Random) -> None:
    """A value of another type at some key of JSON or YAML."""
    as_json = path.suffix == ".json"
    content = json.loads(path.read_text()) if as_json else yaml.safe_load(path.read_text())
    places = list(walk(content))
    holder, key = draw.choice(places)
    holder[key] = draw.choice(VALUES)
    put(path, (json.dumps(content) if as_json else yaml.safe_dump(content)).encode())


def wrong_key(path: Path, draw: random.Random) -> None:
    """A key lost, or another one in its place."""
    as_json = path.suffix == ".json"
    content = json.loads(path.read_text()) if as_json else yaml.safe_load(path.read_text())
    holder, key = draw.choice([(h, k) for h, k in walk(content) if isinstance(h, dict)])
    value = holder.pop(key)
    if other := draw.choice((None, "x", 1, "sha256")):
        holder[other] = value
    put(path, (json.dumps(content) if as_json else yaml.safe_dump(content)).encode())


def walk(value: Any) -> Any:
    """Every (dictionary or list, key) at any depth."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from walk(value[key])


def nest(path: Path, draw: random.Random) -> None:
    put(path, b"[" * 100_000)


def many_digits(path: Path, draw: random.Random) -> None:
    """The first digit, or else all of the file, becomes a number of 5000."""
    content = path.read_bytes()
    places = [i for i, byte in enumerate(content) if 48 <= byte < 58] or [0]
    place = draw.choice(places)
    put(path, content[:place] + b"7" * 5000 + content[place + 1 :])


def not_text(path: Path, draw: random.Random) -> None:
    """Bytes that are not UTF-8, NUL, half a surrogate pair, other separators and digits."""
    content = path.read_bytes()
    place = draw.randrange(len(content))
    odd = (b"\xff\xfe", b"\0", b"\\ud800", b'"', b"\r", "\u2028".encode(), "\u0663".encode(), b"\t")
    put(path, content[:place] + draw.choice(odd) + content[place:])


def swap_lines(path: Path, draw: random.Random) -> None:
    """A line lost, doubled or halved."""
    lines = path.read_bytes().splitlines(keepends=True)
    number = draw.randrange(len(lines))
    line = lines[number]
    lines[number : number + 1] = draw.choice(([], [line, line], [line[: len(line) // 2]]))
    put(path, b"".join(lines))


BYTES = (truncate, flip, flip, empty, noise, noise_within, append, cut_out)
CHANGES = (fill_with_nan, shorten, turn, lose, gain, narrow, add_one)
TENSORS = (*BYTES, flip_early, huge_number, *map(of_tensors, CHANGES))
JSON = (*BYTES, wrong_type, wrong_type, wrong_key, nest, many_digits, not_text)
TEXT = (*BYTES, not_text, not_text, swap_lines, many_digits, nest)


# --- readers ---


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors in a form that compares."""
    return {
        name: (tuple(value.shape), str(value.dtype), value.float().sum().item(), hash_of(value))
        for name, value in tensors.items()
    }


def hash_of(value: torch.Tensor) -> int:
    return hash(value.contiguous().view(torch.uint8).numpy().tobytes())


def read_rxx(file: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        arch, path = load_arch(folder / "results/models/tiny"), folder / file
        rxx, shape = Rxx(path, path.stem), arch.statistic_shape(FORMS[path.stem])
        return rxx.record, digest({str(i): rxx.R(i, shape) for i in range(arch.layers)})

    return read


def read_dense(folder: Path) -> Any:
    """As approx does: the arch, then one tensor after the other."""
    dense = folder / "results/models/tiny"
    arch = load_arch(dense)
    checkpoint = Checkpoint(dense, arch.adapter.prefix)
    for name, shape in arch.adapter.shapes(vars(arch)).items():
        checkpoint.expect(name, shape)
    return arch, digest({name: checkpoint.tensor(name) for name in checkpoint.names()})


def read_own(folder: Path) -> Any:
    """A folder of the user's, without a record: from the weights to a compressed model."""
    out = folder / "made"
    plan = Plan(choose({"qk": "dense", "ov": "identity", "mlp": "dense", "ratio": "0.5"}))
    try:
        approximate(folder / "tiny", folder, plan, out)
        return digest(dict(load_model(out, "float32").named_parameters())), sha_of(folder / "tiny")
    finally:
        shutil.rmtree(out, ignore_errors=True)


def sha_of(folder: Path) -> str:
    return describe(folder).weights_sha256


def read_own_config(folder: Path) -> Any:
    return describe(folder / "tiny"), sha256(folder / "tiny/config.json")


def read_compressed(folder: Path) -> Any:
    """As eval does."""
    made = folder / "results/checkpoints" / TAIL
    model = load_model(made, "float32")
    record = Record.read(made / "approx.json")
    return record.data, record["weights_sha256"], digest(dict(model.named_parameters()))


def read_checkpoint_shards(folder: Path) -> Any:
    out = folder / "approx-shards/gathered"
    try:
        gather(
            folder / "results/models/tiny",
            [folder / f"approx-shards/{i}of2.safetensors" for i in range(2)],
            out,
        )
        # gather believes what is said of the weights; who reads them does not.
        Checkpoint(out).verify_all()
        record = read_record(out / "approx.json")
        seconds = read_record(out / "timing.json")
        return record, seconds, [sha256(path) for path in sorted(out.glob("*.safetensors"))]
    finally:
        shutil.rmtree(out, ignore_errors=True)


def read_shards(kind: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        out = folder / f"{kind}.safetensors"
        merge_shards([folder / f"shards/{i}of2/{kind}.safetensors" for i in range(2)], out)
        return sha256(out), Record.read(out.with_suffix(".timing.json")).data

    return read


def read_results(folder: Path) -> Any:
    """As tables and figures do."""
    groups = read_runs(folder / "results", [ROW | {"ratio": "0.25"}], ["score"], [])
    runs = [run for dense, others in groups for run in (dense, *others)]
    return [(run.weights.data, run.perplexity["score"].data) for run in runs]


def read_config(folder: Path) -> Any:
    return complete(load_yaml(folder / "config.yaml"), SCHEMA)


def read_table(folder: Path) -> Any:
    config = complete(load_yaml(folder / "safe.yaml"), SCHEMA)
    return read_experiments(folder / "experiments.tsv", config)


def read_text(name: str) -> Callable[[Path], Any]:
    return lambda folder: (load_documents(folder / name), sha256(folder / name))


def read_items(folder: Path) -> Any:
    path = folder / "results/items/titles/items.jsonl"
    return harness.load_items(str(path))["test"].to_list(), sha256(path)


def read_gguf(folder: Path) -> Any:
    out = folder / "unpacked"
    out.mkdir()
    try:
        convert_gguf(folder / "tiny.gguf", out)
        describe(out)
        return {path.name: sha256(path) for path in sorted(out.iterdir())}
    finally:
        shutil.rmtree(out)


def second(value: Any) -> Any:
    return value[1]


CHECKPOINT = f"results/checkpoints/{TAIL}"
BLOCKS_FILE = "results/rxx/tiny/short/v_blocks.safetensors"
PACKED_FILE = "shards/1of2/o_proj_input.safetensors"
READERS = {
    "Rxx": Reader(BLOCKS_FILE, read_rxx(BLOCKS_FILE), TENSORS),
    "packed Rxx": Reader(PACKED_FILE, read_rxx(PACKED_FILE), TENSORS),
    "dense weights": Reader("results/models/tiny/model.safetensors", read_dense, TENSORS),
    "dense weights, no record": Reader("tiny/model.safetensors", read_own, TENSORS, True, second),
    "config.json, no record": Reader("tiny/config.json", read_own_config, JSON, True, second),
    "tokenizer.json": Reader("results/models/tiny/tokenizer.json", read_dense, JSON),
    "arch.json": Reader("results/models/tiny/arch.json", read_dense, JSON),
    "compressed weights": Reader(f"{CHECKPOINT}/model.safetensors", read_compressed, TENSORS),
    "compressed config.json": Reader(f"{CHECKPOINT}/config.json", read_compressed, JSON),
    "approx.json": Reader(f"{CHECKPOINT}/approx.json", read_compressed, JSON),
    "checkpoint shard": Reader("approx-shards/1of2.safetensors", read_checkpoint_shards, TENSORS),
    "checkpoint shard's JSON": Reader("approx-shards/1of2.json", read_checkpoint_shards, JSON),
    "shard": Reader("shards/1of2/v_blocks.safetensors", read_shards("v_blocks"), TENSORS),
    "packed shard": Reader(PACKED_FILE, read_shards("o_proj_input"), TENSORS),
    "shard's seconds": Reader("shards/1of2/v_blocks.timing.json", read_shards("v_blocks"), JSON),
    "result": Reader(f"results/eval/{TAIL}/ppl/score.json", read_results, JSON),
    "config": Reader("config.yaml", read_config, (*TEXT, wrong_type, wrong_type, wrong_key), True),
    "experiments": Reader("experiments.tsv", read_table, TEXT, True),
    ".txt": Reader("learn.txt", read_text("learn.txt"), TEXT, True, second),
    ".jsonl": Reader("score.jsonl", read_text("score.jsonl"), TEXT, True, second),
    "items": Reader("results/items/titles/items.jsonl", read_items, TEXT, True, second),
    "GGUF": Reader("tiny.gguf", read_gguf, (*BYTES, flip_early, flip_early, huge_number), True),
}


def prepare(folder: Path) -> None:
    """Make every file that is read."""
    results = tiny_results(folder)
    model, text = results / "models/tiny", results / "texts/learn/docs.jsonl"
    # Weights of a folder are links; here the file itself is damaged.
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    put(weights, content)
    for i in range(2):
        solving = ["--rxx", results / "rxx/tiny/short", "--ratio", "0.25", "--shard", f"{i}of2"]
        run("approx", model, *solving, "-o", folder / f"approx-shards/{i}of2.safetensors")
        collecting = ["--text", text, "--tokens", "256", "--block-length", "64"]
        kinds = ("v_blocks", "o_proj_input")
        outputs = [folder / f"shards/{i}of2/{kind}.safetensors" for kind in kinds]
        run("collect", model, *collecting, "--shard", f"{i}of2", "-o", *outputs)
    for name, said in (("config.yaml", CONFIG), ("safe.yaml", CONFIG), ("experiments.tsv", TABLE)):
        (folder / name).write_text(said)
    write_gguf(folder / "tiny", folder / "tiny.gguf")


def write_gguf(dense: Path, out: Path) -> None:
    """The tiny Llama as a GGUF file; its heads' order does not matter here."""
    arch, tensors = load_arch(dense), load_file(dense / "model.safetensors")
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("tiny")
    writer.add_block_count(arch.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.kv_heads)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(arch.vocab_size)
    tokenizer = json.loads(Tokenizer.from_file(str(dense / "tokenizer.json")).to_str())
    vocabulary = tokenizer["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "embed_tokens": "token_embd", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
        "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    }  # fmt: skip
    for name, value in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name.removeprefix("model."), value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- cases ---


def fuzz(folder: Path, reader: Reader, cases: int, seed: int) -> Outcome:
    """Damage the reader's file `cases` times, from `seed` on, and read it each time."""
    path = folder / reader.target
    whole, outcome = path.read_bytes(), Outcome()
    expected = reader.read(folder)
    for number in range(seed, seed + cases):
        draw = random.Random(number)
        damage = reader.damages[number % len(reader.damages)]
        damage(path, draw)
        if path.read_bytes() != whole:
            how = judge(folder, reader, expected)
            outcome.counts[how.split(":")[0]] += 1
            if how.startswith("fault"):
                outcome.faults.append(f"seed {number}, {getattr(damage, '__name__', '')}: {how}")
        put(path, whole)
    os.utime(path)
    return outcome


def judge(folder: Path, reader: Reader, expected: Any) -> str:
    """refused, same, other, or fault: what became of one damaged file."""
    path = folder / reader.target
    try:
        found = reader.read(folder)
    except A3Error as error:
        # A config comes from Snakemake, without its path.
        names = (path.name, str(path.parent) if path.parent != folder else "config:")
        named = any(name in str(error) for name in names)
        return "refused" if named else f"fault: the file is not named in {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"fault: {type(error).__name__}: {error}"
    if found == expected or repr(found) == repr(expected):
        return "same"
    if not reader.own:
        return "fault: silent"
    if reader.hashed and reader.hashed(found) == reader.hashed(expected):
        return "fault: another input under the hash of this one"
    return "other"
