"""Protocols of evaluation: what is scored, what a result says of it, and what is never mixed."""

import hashlib
import json
import math
import random
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.metrics import nanmean
from lm_eval.tasks import TaskManager
from test_text import Guess
from test_workflow import Project
from tiny import LINES, run, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from a3.artifacts.runs import read_runs
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import SEAL, load_yaml, read_record, write_record
from a3.experiments.config import CATALOGUE, complete, excluded, members_of, validate
from a3.experiments.rows import check_row, read_experiments
from a3.models.load import load_tokenizer
from a3.stages.evaluate.harness import find_task
from a3.stages.evaluate.items import task_config
from a3.stages.evaluate.scores import scores
from a3.stages.inputs.text import make_documents
from a3.texts.blocks import permuted, scored_blocks, token_blocks
from a3.texts.reading import Document, load_documents, write_documents

ROOT = Path(__file__).parents[2]
SCHEMA = load_yaml(ROOT / "workflow/schemas/config.schema.yaml")
REAL = ROOT / "results/models/smollm2-135m"
TEXTS = [
    "Zoë's café: 漢字 and 🙂🙃!\n",
    "",
    "  two  spaces\t",
    LINES[0],
    "naïve — “quotes”",
    LINES[1],
]
DOCUMENTS = [Document("", text) for text in TEXTS * 8]


def sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """As Llama's: spaces as ▁, one put before the text, unknown characters as bytes, BOS first."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, min_frequency=1, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    # The pieces of bytes are no special tokens, which decoders leave alone.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:2]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {"bytes": tiny_tokenizer(folder / "bytes"), "pieces": sentencepiece(folder)}
    if REAL.exists():
        found["real"] = load_tokenizer(REAL)
    return found


# --- what is scored -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "pieces", "real"])
@pytest.mark.parametrize("join", ["empty-line", "space", "nothing"])
@pytest.mark.parametrize("bos", [True, False, "once"])
def test_bytes_are_those_of_the_text(tokenizers, name, join, bos):
    """The sum over blocks is the text's, up to where the last block ends."""
    if name not in tokenizers:
        pytest.skip("SmolLM2 is not built: snakemake results/models/smollm2-135m/config.json")
    tokenizer = tokenizers[name]
    blocks, sizes = scored_blocks(DOCUMENTS, tokenizer, 16, "all", bos, join)
    assert blocks.shape == sizes.shape
    separator = {"empty-line": "\n\n", "space": " ", "nothing": ""}[join]
    whole = separator.join(TEXTS * 8).encode()
    ids = blocks[:, 1:] if bos is True else blocks
    # A character may be cut by the last block's end: its bytes count with its first token.
    decoded = tokenizer.decode(ids.flatten(), skip_special_tokens=True).encode()
    decoded = decoded.removesuffix("\N{REPLACEMENT CHARACTER}".encode())
    assert whole.startswith(decoded)
    assert 0 <= int(sizes.sum()) - len(decoded) <= 3
    few, sizes_of_few = scored_blocks(DOCUMENTS, tokenizer, 16, 48, bos, join)
    assert torch.equal(few, blocks[:3])
    assert torch.equal(sizes_of_few, sizes[:3])


def test_bytes_of_each_token_are_those_of_its_piece(tokenizers):
    """Where a token stands for whole characters, they are what it decodes to."""
    ids, sizes = scored_blocks(
        [Document("", LINES[0])], tokenizers["bytes"], 4, "all", False, "space"
    )
    for token, size in zip(ids.flatten(), sizes.flatten(), strict=True):
        assert len(tokenizers["bytes"].decode(token)) == size


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_bos_once_is_as_the_tokenizer_does_it(tokenizers, name):
    """The published snippet: all of the text tokenised at once and cut, the rest dropped."""
    tokenizer = tokenizers[name]
    ids = tokenizer("\n\n".join(TEXTS * 8))["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == (name == "pieces")
    rows = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    blocks, sizes = scored_blocks(DOCUMENTS, tokenizer, 16, "all", "once", "empty-line")
    assert blocks.tolist() == rows
    assert (sizes[0, 0] == 0) == (name == "pieces")


def test_scored_blocks_are_those_of_calibration_too(tokenizers):
    for bos in (True, False):
        blocks, _ = scored_blocks(DOCUMENTS, tokenizers["bytes"], 16, 64, bos, "empty-line")
        assert torch.equal(blocks, token_blocks(DOCUMENTS, tokenizers["bytes"], 16, 64, None, bos))


def test_what_cannot_be_cut_is_refused(tokenizers):
    with pytest.raises(A3Error, match="too short for one block"):
        scored_blocks([Document("", "ab")], tokenizers["bytes"], 32, "all", True, "space")
    with pytest.raises(A3Error, match="at least one block"):
        scored_blocks(DOCUMENTS, tokenizers["bytes"], 32, 16, True, "space")


# --- perplexity -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, another one, texts of two revisions; `ppl` scores one as the dense or other row."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_llama(folder / "dense")
    tiny_llama(folder / "other", seed=1)
    write_documents(folder / "docs.jsonl", DOCUMENTS)
    for revision in "ab":
        source = f"who/text@{revision * 40}, split test"
        write_record(folder / f"{revision}.json", {"source": source})
    return folder


def ppl(folder, out, *words, model="dense", source="a"):
    scoring = ["--text", folder / "docs.jsonl", "--source", folder / f"{source}.json"]
    run("eval", "ppl", folder / model, *scoring, "-o", out, "--block-length", 32, *words)
    return read_record(out)


def test_a_result_says_what_was_scored(folder, tmp_path):
    """Bits a byte, bytes and hashes from a forward pass of its own."""
    found = ppl(folder, tmp_path / "a.json", "--tokens", "all", "--bos-once", "--join", "space")
    text = " ".join(TEXTS * 8)
    tokenizer = load_tokenizer(folder / "dense")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    with torch.inference_mode():
        losses = torch.nn.functional.cross_entropy(
            model(blocks).logits[:, :-1].transpose(1, 2), blocks[:, 1:], reduction="sum"
        ).item()
    count = sum(len(tokenizer.decode(row).encode()) for row in blocks[:, 1:])
    # A character that two blocks share decodes to one mark of three bytes in each.
    assert found["bytes_scored"] == pytest.approx(count, abs=3 * len(blocks))
    # Of a block's first token, which is not scored, no bytes count.
    _, sizes = scored_blocks(DOCUMENTS, tokenizer, 32, "all", "once", "space")
    assert found["bytes_scored"] == sizes[:, 1:].sum() < sizes.sum()
    bits = losses / math.log(2) / found["bytes_scored"]
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["nll"] * found["tokens_scored"] == pytest.approx(losses, rel=1e-5)
    assert found["token_ids_sha256"] == hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
    assert found["source"] == f"who/text@{'a' * 40}, split test"
    assert (found["bos"], found["join"], found["stride"]) == ("once", "space", 32)


def results(folder, tmp_path, dense: dict, other: dict) -> Path:
    """Two rows of a table whose texts were scored as said."""
    places = {"dense": (dense, "m/dense"), "other": (other, "m/c/xkv+xkv+rxx-w/0.1")}
    for model, (how, place) in places.items():
        words = [str(word) for word in how.get("words", ())]
        out = tmp_path / "eval" / place / "ppl/text.json"
        done = ppl(folder, out, "--tokens", 64, *words, model=model, source=how.get("source", "a"))
        weights = {"weights_sha256": done["checkpoint_sha256"]}
        if model == "dense":
            base = weights
            write_record(tmp_path / "models/m/arch.json", weights)
        else:
            made = weights | {"base": base}
            write_record(tmp_path / "checkpoints" / place / "approx.json", made)
    return tmp_path


ROWS = [dict(model="m", calibration="c", qk="xkv", ov="xkv", mlp="rxx-w", ratio="0.1")]


def mixed(folder, tmp_path, key: str, dense: dict, other: dict) -> str:
    """The refusal to put two results in a table, which names both files and what differs."""
    made = results(folder, tmp_path, dense, other)
    with pytest.raises(A3Error, match="different protocols") as error:
        read_runs(made, ROWS, ["text"], [])
    said = str(error.value)
    assert f"{made}/eval/m/dense/ppl/text.json" in said
    assert f"{made}/eval/m/c/xkv+xkv+rxx-w/0.1/ppl/text.json" in said
    assert f" {key} is " in said
    return said


def test_equal_protocols_are_not_refused(folder, tmp_path):
    read_runs(results(folder, tmp_path, {}, {}), ROWS, ["text"], [])


def test_another_block_length_is_caught(folder, tmp_path):
    said = mixed(folder, tmp_path, "block_length", {}, {"words": ["--block-length", 16]})
    assert "block_length is 16 here and 32 there" in said


def test_another_tokenizer_is_caught(folder, tmp_path):
    """Its merges undone: as many blocks, of the same vocabulary, of other tokens."""
    path = folder / "other/tokenizer.json"
    before = path.read_text()
    state = json.loads(before)
    state["model"]["merges"] = state["model"]["merges"][:4]
    path.write_text(json.dumps(state))
    try:
        said = mixed(folder, tmp_path, "token_ids_sha256", {}, {})
    finally:
        path.write_text(before)
    assert "text_sha256" not in said
    assert "blocks" not in said


def test_another_revision_of_the_data_set_is_caught(folder, tmp_path):
    said = mixed(folder, tmp_path, "source", {}, {"source": "b"})
    assert f"who/text@{'b' * 40}" in said
    assert f"who/text@{'a' * 40}" in said


def test_another_bos_is_caught(folder, tmp_path):
    mixed(folder, tmp_path, "bos", {}, {"words": ["--no-bos"]})


def test_other_code_is_caught(folder, tmp_path):
    made = results(folder, tmp_path, {}, {})
    path = made / "eval/m/dense/ppl/text.json"
    record = {key: value for key, value in read_record(path).items() if key != SEAL}
    write_record(path, record | {"provenance": record["provenance"] | {"code": "0" * 16}})
    with pytest.raises(A3Error, match=r"provenance\.code is .* here and '0000000000000000' there"):
        read_runs(made, ROWS, ["text"], [])


# --- harness --------------------------------------------------------------------------------------


def items(count: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    words = ["river", "dog", "moon", "lake", "fox", "ocean", "water"]
    return [
        {
            "query": f"{i} {draw.choice(words)} is",
            "choices": draw.sample(words, 4),
            "gold": draw.randrange(4),
        }
        for i in range(count)
    ]


@pytest.fixture
def local(tmp_path):
    """A local task, its YAML and data files of JSON and CSV."""
    test, shown = items(6), items(3, seed=1)
    (tmp_path / "test.json").write_text("".join(json.dumps(item) + "\n" for item in test))
    (tmp_path / "shown.json").write_text("".join(json.dumps(item) + "\n" for item in shown))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {
                "test": str(tmp_path / "test.json"),
                "validation": [str(tmp_path / "shown.json")],
            }
        },
        "test_split": "test",
        "fewshot_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 3},
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def harness(folder, out, *words):
    run("eval", "harness", folder / "dense", *words, "-o", out)
    return read_record(out)


def test_a_local_yaml_runs_with_its_shots(folder, local):
    """Items' scores in order; the metric chosen; the YAML's zero shots are not the last word."""
    task = ["--task", "mine", "--yaml", local / "task.yaml"]
    none = harness(folder, local / "none.json", *task)
    two = harness(folder, local / "two.json", *task, "--shots", 2, "--metric", "acc_norm")
    assert (none["shots"], none["metric"], none["version"]) == (0, "acc", 3)
    assert (two["shots"], two["metric"]) == (2, "acc_norm")
    assert none["task_hash"] != two["task_hash"]
    for result in (none, two):
        assert len(result["item_scores"]) == result["items"] == 6
        assert set(result["item_scores"]) <= {0.0, 1.0}
        assert sum(result["item_scores"]) / 6 == pytest.approx(result["value"])
        assert result["metrics"][result["metric"]] == result["value"]
        assert result["stderr"] > 0 or result["value"] in (0, 1)
        names = {Path(name).name for name in result["task_files"]}
        assert names == {"task.yaml", "test.json", "shown.json"}


def test_a_local_csv(folder, local):
    rows = [f"{i},the {word},{i % 2}" for i, word in enumerate(["river", "moon", "fox"])]
    (local / "test.csv").write_text("\n".join(["number,query,gold", *rows]) + "\n")
    task = yaml.safe_load((local / "task.yaml").read_text()) | {
        "dataset_path": "csv",
        "dataset_kwargs": {"data_files": {"test": str(local / "test.csv")}},
        "fewshot_split": None,
        "doc_to_choice": ["no", "yes"],
    }
    (local / "csv.yaml").write_text(yaml.safe_dump(task))
    found = harness(folder, local / "csv.json", "--task", "mine", "--yaml", local / "csv.yaml")
    assert found["items"] == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dataset_path": "who/repository"}, "expected one of csv, json, parquet"),
        ({"dataset_kwargs": {}}, "dataset_kwargs.data_files"),
        ({"include": "other.yaml"}, "include is not supported"),
        ({"use_prompt": "other.yaml:short"}, "use_prompt is not supported"),
        ({"metric_list": [{"metric": "./mine.py"}]}, "is a script, which a3 does not run"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "is a script"),
        ({"task": None}, "its name under task"),
        ({"dataset_kwargs": {"data_files": "gone.json"}}, "no file gone.json"),
    ],
)
def test_a_wrong_yaml_is_refused(local, change, says):
    path = local / "task.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(A3Error, match=says):
        find_task("mine", None, path, None, "cache")


def test_python_in_a_yaml_is_not_run(local):
    (local / "utils.py").write_text("raise SystemExit('run')")
    path = local / "task.yaml"
    path.write_text(path.read_text() + "process_docs: !function utils.process\n")
    with pytest.raises(A3Error, match="!function"):
        find_task("mine", None, path, None, "cache")


def test_local_items_take_shots(folder, local):
    """The examples shown are other items."""
    task = ["--task", "titles", "--items", local / "test.json"]
    found = [harness(folder, local / f"{n}.json", *task, "--shots", n) for n in (0, 2)]
    assert [each["shots"] for each in found] == [0, 2]
    shown = lm_eval.simple_evaluate(
        model=Guess(),
        tasks=[task_config(local / "test.json", "titles")],
        num_fewshot=2,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )["samples"]["titles"]
    for sample in shown:
        prompt = sample["arguments"][0][0]
        assert prompt.count(" is") == 3
        assert prompt.endswith(sample["doc"]["query"])
        assert prompt.count(sample["doc"]["query"]) == 1


def test_a_group_is_its_aggregate(local):
    """Tasks of four and two items: the group's value is that of all items, with its error."""
    (local / "group").mkdir()
    task = yaml.safe_load((local / "task.yaml").read_text()) | {"fewshot_split": None}
    for name, some in (("a", items(4, seed=2)), ("b", items(2, seed=3))):
        path = local / f"{name}.json"
        path.write_text("".join(json.dumps(item) + "\n" for item in some))
        files = {"data_files": {"test": str(path)}, "cache_dir": str(local / "cache")}
        made = task | {"task": name, "dataset_kwargs": files}
        (local / "group" / f"{name}.yaml").write_text(yaml.safe_dump(made))
    group = {
        "group": "both",
        "task": ["a", "b"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (local / "group/both.yaml").write_text(yaml.safe_dump(group))
    manager = TaskManager(include_path=str(local / "group"), include_defaults=False)
    found = lm_eval.simple_evaluate(model=Guess(), tasks=["both"], task_manager=manager)
    tasks = manager.load(["both"])["tasks"]
    means = {name: one.aggregation() for name, one in tasks.items()}
    record = scores("both", found, means)
    assert (record["items"], record["shots"], record["metric"]) == (6, 0, "acc")
    assert len(record["item_scores"]) == 6
    assert record["value"] == pytest.approx(sum(record["item_scores"]) / 6)
    assert record["stderr"] == found["results"]["both"]["acc_stderr,none"]
    one = scores("a", {**found, "samples": {"a": found["samples"]["a"]}}, means)
    assert record["item_scores"][:4] == one["item_scores"]
    with pytest.raises(A3Error, match="metric is acc_norm, expected acc"):
        scores("both", found, means, "acc_norm")


def test_scores_of_a_filter_and_of_no_number():
    """Strict matches only, in the documents' order; a value that is no number is null."""
    means = {"gsm8k": {"exact_match": nanmean}}
    strict = [
        {"doc_id": i, "filter": "strict-match", "exact_match": float(i > 1)} for i in range(5)
    ]
    loose = [{"doc_id": i, "filter": "flexible-extract", "exact_match": 1.0} for i in range(4)]
    strict[3]["exact_match"], strict[4]["exact_match"] = (1.0, 2), np.nan
    strict[2]["exact_match"] = np.bool_(True)
    keys = {"doc_hash": "d", "prompt_hash": "p", "target_hash": "t", "arguments": [("p", "t")]}
    found = {
        "results": {
            "gsm8k": {
                "alias": "gsm8k",
                "exact_match,strict-match": 1 / 3,
                "exact_match_stderr,strict-match": 0.1,
                "exact_match,flexible-extract": 1.0,
                "exact_match_stderr,flexible-extract": 0.0,
            }
        },
        "samples": {"gsm8k": [sample | keys for sample in (*strict[::-1], *loose)]},
        "n-shot": {"gsm8k": 5},
        "n-samples": {"gsm8k": {"effective": 4}},
        "versions": {"gsm8k": 3.0},
        "higher_is_better": {"gsm8k": {"exact_match": True}},
    }
    record = scores("gsm8k", found, means, "exact_match,strict-match")
    assert record["item_scores"] == [0.0, 0.0, 1.0, None, None]
    assert record["item_measure"] == "exact_match,strict-match"
    assert (record["value"], record["stderr"]) == (1 / 3, 0.1)
    loose_record = scores("gsm8k", found, means, "exact_match,flexible-extract")
    assert loose_record["item_scores"] == [1.0] * 4


def test_named_tasks_are_lm_evals(monkeypatch):
    """Every named task or group is one that lm-eval has; tags, which have no score, are not."""
    manager = TaskManager()
    monkeypatch.setattr("a3.stages.evaluate.harness.TaskManager", lambda **_: manager)
    for name, entry in load_yaml(CATALOGUE)["harness"].items():
        # Of a task with other shots than the paper's, the name says how many.
        named = name.removesuffix(f"-{entry['shots']}")
        assert find_task(entry["task"], None, None, entry["shots"], "")[0] == named
    assert "mmlu" in manager.all_groups
    with pytest.raises(A3Error, match="no such task or group"):
        find_task("ai2_arc", None, None, None, "")


# --- the catalogue's names ------------------------------------------------------------------------

CONFIG = {
    "experiments": "experiments.tsv",
    "calibrations": {"wiki": {"text": "wiki-articles", "tokens": 1024}},
}
ROW = dict(model="smollm2-135m", calibration="wiki", qk="dense", ov="xkv", mlp="dense", ratio="0.1")


def test_the_catalogue_is_what_the_schema_says():
    validate(CONFIG | load_yaml(CATALOGUE), SCHEMA)


def test_named_protocols_need_no_definition():
    chosen = {"perplexity": ["wikitext-2-2048", "c4-2048"], "harness": ["gsm8k", "mmlu"]}
    config = complete(CONFIG | {"evaluate": chosen}, SCHEMA)
    check_row(ROW, config, "row 1")
    assert config["perplexity"]["c4-2048"] == {
        "text": "c4-validation",
        "split": "all",
        "tokens": "all",
        "block_length": 2048,
        "bos": "once",
        "join": "empty-line",
        "dtype": "float32",
    }
    assert config["harness"]["arc_challenge"]["shots"] == 25
    own = complete(CONFIG | {"harness": {"mmlu": {"task": "mmlu", "shots": 0}}}, SCHEMA)
    assert own["harness"]["mmlu"]["shots"] == 0


def test_all_of_a_text_is_not_scored_where_it_was_calibrated_on():
    calibrations = {"wiki": {"text": "wikitext-2", "tokens": 1024}}
    chosen = {"calibrations": calibrations, "evaluate": {"perplexity": ["wikitext-2-2048"]}}
    with pytest.raises(A3Error, match="is scored on all of it"):
        check_row(ROW, complete(CONFIG | chosen, SCHEMA), "row 1")


# --- mixtures -------------------------------------------------------------------------------------


@pytest.fixture
def members(tmp_path):
    """Long and short documents, in texts/."""
    draw = random.Random(0)
    for name, length, count in (("long", 900, 60), ("short", 40, 2000)):
        made = [Document("", "x" * draw.randrange(1, 2 * length)) for _ in range(count)]
        write_documents(tmp_path / "texts" / name / "docs.jsonl", made)
    return tmp_path


def test_any_prefix_of_a_mixture_has_its_shares(members):
    spec = {"source": {"mix": {"long": 0.25, "short": 0.75}}}
    out = members / "texts/mixed/docs.jsonl"
    found = [members / f"texts/{name}/docs.jsonl" for name in ("long", "short")]
    words = ["--members", *found, "-o", out]
    run("text", json.dumps(spec), *words)
    first = out.read_bytes()
    run("text", json.dumps(spec), *words)
    assert out.read_bytes() == first
    mixed_ = load_documents(out)
    # A permutation keeps to what the shares came to, since documents are whole.
    lengths = {
        member: sum(len(d.text) for d in mixed_ if d.member == member)
        for member in ("long", "short")
    }
    assert sum(lengths.values()) > 50_000
    reached = lengths["long"] / sum(lengths.values())
    orders = ((mixed_, 0.25), (permuted(mixed_, 0), reached), (permuted(mixed_, 1), reached))
    for documents, share in orders:
        used = {"long": 0, "short": 0}
        for document in documents:
            used[document.member] += len(document.text)
            # No document is longer than 1800 characters.
            assert abs(used["long"] - share * sum(used.values())) <= 1800
    assert {d.text for d in permuted(mixed_, 1)} == {d.text for d in mixed_}
    assert permuted(mixed_, 0) != permuted(mixed_, 1)
    record = read_record(out.with_suffix(".json"))
    assert record["source"] == "0.25 long + 0.75 short"
    assert set(record["provenance"]["inputs"]) == {"long/docs.jsonl", "short/docs.jsonl"}


def test_verify_sees_a_changed_member_of_a_mixture(members, capsys):
    spec = {"source": {"mix": {"long": 0.5, "short": 0.5}}}
    found = [members / f"texts/{name}/docs.jsonl" for name in ("long", "short")]
    make_documents(spec, None, found, members / "texts/mixed/docs.jsonl")
    run("verify", members)
    write_documents(members / "texts/long/docs.jsonl", [Document("", "other")])
    assert main(["verify", str(members)]) == 1
    assert "inputs long/docs.jsonl is" in capsys.readouterr().err


def test_a_mixture_without_its_members_is_refused(members):
    spec = {"source": {"mix": {"long": 0.5, "gone": 0.5}}}
    found = [members / f"texts/{name}/docs.jsonl" for name in ("gone", "long")]
    with pytest.raises(A3Error, match=r"gone/docs\.jsonl: no such file"):
        make_documents(spec, None, found, members / "docs.jsonl")
    with pytest.raises(A3Error, match="mixture of gone, long: found 1 files"):
        make_documents(spec, None, found[1:], members / "docs.jsonl")


def test_what_a_mixture_is_of_is_excluded():
    texts = {
        "half": {"source": {"mix": {"wiki-articles": 0.5, "c4": 0.5}}},
        "deep": {"source": {"mix": {"half": 0.9, "c4-train": 0.1}}},
        "mine": {"source": {"path": "x.txt"}, "format": "text", "exclude": ["half"]},
    }
    calibrations = {"wiki": {"text": "deep", "tokens": 1024}}
    base = CONFIG | {"texts": texts, "calibrations": calibrations}
    base |= {"perplexity": {"mine": {"text": "mine"}}, "evaluate": {"perplexity": ["mine"]}}
    config = complete(base, SCHEMA)
    assert members_of("deep", config["texts"]) == ["wiki-articles", "c4", "c4-train"]
    assert excluded("mine", config["texts"]) == ["wiki-articles", "c4"]
    with pytest.raises(A3Error, match=r"Add 'c4-train' to texts\.mine\.exclude"):
        check_row(ROW, config, "row 1")
    texts["mine"]["exclude"].append("c4-train")
    check_row(ROW, complete(base, SCHEMA), "row 1")


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ({"c4": 0.5, "sotu": 0.4}, "the shares' sum is 0.9"),
        ({"c4": 0.5, "none": 0.5}, "names the text 'none', which is not defined"),
        ({"c4": 0.5, "m": 0.5}, "names 'm', which is itself a mixture of it"),
        ({"c4": 0.5, "n": 0.5}, "texts.n.source.mix names 'm', which is itself a mixture of it"),
        ({"c4": 1}, "texts.m.source.mix"),
        ({"c4": 0, "sotu": 1}, "texts.m.source.mix.c4"),
    ],
)
def test_wrong_mixtures_are_named(mix, says):
    other = {"source": {"mix": {"m": 0.5, "c4": 0.5}}}
    with pytest.raises(A3Error, match=says):
        complete(CONFIG | {"texts": {"m": {"source": {"mix": mix}}, "n": other}}, SCHEMA)


def test_the_calibration_study_is_whole():
    study = load_yaml(ROOT / "config/studies/calibration/config.yaml")
    config = load_yaml(ROOT / "config/config.yaml") | study
    rows = read_experiments(ROOT / config["experiments"], complete(config, SCHEMA))
    assert [row["calibration"] for row in rows] == list(config["calibrations"])


def test_the_workflow_takes_names_mixtures_and_local_tasks(local, tmp_path):
    """A mixture and a local task built for real; what is named in the catalogue as a dry run."""
    project = Project(tmp_path / "project")
    project.edit(
        "config/config.yaml",
        "  learn: {",
        "  half: {source: {mix: {learn: 0.5, score: 0.5}}}\n  learn: {",
    )
    project.edit(
        "config/config.yaml", "harness:\n", f"harness:\n  mine: {{yaml: {local}/task.yaml}}\n"
    )
    project.edit("config/config.yaml", "[score]", "[score, wikitext-2-2048]")
    project.edit("config/config.yaml", "[titles]", "[titles, mine, mmlu]")
    made = ["results/texts/half/docs.jsonl", "results/eval/tiny/dense/harness/mine.json"]
    rules, _ = project.snakemake(*made)
    assert rules == ["eval_harness", "model", "text", "text", "text"]
    assert len(read_record(project.folder / made[1])["item_scores"]) == 6
    assert project.snakemake("-n", *made)[0] == []
    (local / "shown.json").write_text((local / "test.json").read_text())
    assert project.snakemake("-n", *made)[0] == ["eval_harness"]
    rules, output = project.snakemake("-n", "--printshellcmds")
    assert (rules.count("eval_ppl"), rules.count("eval_harness")) == (4, 6)
    for words in ("--tokens all --block-length 2048 --bos-once --join empty-line", "--shots 5"):
        assert words in output
    # Another prompt is another result.
    chat = "apply_chat_template: tool, fewshot_as_multiturn: true, system_instruction: '-a b'"
    project.edit("config/config.yaml", "task.yaml}", f"task.yaml, {chat}}}")
    rules, output = project.snakemake("-n", "--printshellcmds", made[1])
    assert rules == ["eval_harness"]
    options = "--apply-chat-template=tool --fewshot-as-multiturn '--system-instruction=-a b'"
    assert options in output
