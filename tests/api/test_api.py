"""The Python interface: models in memory, folders and names; texts of every kind; silence."""

import json
import logging
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import run, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3

SMALL = {"tokens": 256, "block_length": 32}
TEXTS = [
    f"Document {i} says that {i} rivers run to the sea, and {i + 1} come back." for i in range(60)
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("dense") / "m", "llama")


@pytest.fixture
def loaded(dense):
    return AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(5, 40)[None].to(model.device)).logits.float()


def test_import_costs_nothing():
    code = "import a3, sys; print({'torch', 'transformers', 'lm_eval'} & set(sys.modules), dir(a3))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("set()")
    assert said.stdout.endswith(f"{sorted(a3.__all__)}\n")


def test_editors_see_the_types():
    assert Path(a3.__file__).with_name("py.typed").is_file()


def test_compress_logs_the_loss_on_a_dev_text(dense, loaded, tmp_path, caplog):
    options = {"ratio": 0.25, "preset": "a3-plus", **SMALL, "progress": False}
    with caplog.at_level(logging.INFO, "a3"):
        a3.compress(*loaded, TEXTS, dev_texts=TEXTS[::-1] * 2, **options)
    assert re.search(
        r"loss over the dense model's, nats a token: predicted [\d.]+, calibration -?[\d.]+ ± "
        r"[\d.]+ \(4 blocks\), dev text -?[\d.]+ ± [\d.]+ \(4 blocks\)",
        caplog.text,
    )
    with pytest.raises(a3.A3Error, match="dev_texts"):
        a3.compress(*loaded, TEXTS, dev_texts=[""], **options)


@pytest.mark.parametrize("preset", ["a3", "a3-plus", "a3-stock"])
def test_compress_gives_what_the_command_line_writes(dense, loaded, tmp_path, preset):
    text = tmp_path / "docs.jsonl"
    text.write_text("".join(json.dumps({"title": "", "text": one}) + "\n" for one in TEXTS))
    small = a3.compress(*loaded, TEXTS, ratio=0.25, preset=preset, **SMALL, progress=False)
    small.save_pretrained(tmp_path / "small")
    sizes = ["--tokens", "256", "--block-length", "32"]
    run(
        "compress",
        dense,
        "--preset",
        preset,
        "--ratio",
        "0.25",
        "--text",
        text,
        *sizes,
        "-o",
        tmp_path / "cli",
    )
    model, tokenizer = a3.load(tmp_path / "cli")
    assert torch.equal(logits(small), logits(model))
    again, same = a3.load(tmp_path / "small")
    assert torch.equal(logits(again), logits(model))
    assert (
        same(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids == loaded[1](TEXTS[0]).input_ids
    )
    run("eval", "ppl", tmp_path / "small", "--text", text, *sizes, "-o", tmp_path / "ppl.json")


def test_texts_of_every_kind_are_the_same(loaded, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    rows = Dataset.from_dict({"text": TEXTS})
    kinds = (TEXTS, iter(TEXTS), rows, rows.to_iterable_dataset(), rows["text"], path, str(path))
    found = [a3.evaluate(*loaded, texts, **SMALL, progress=False)["nll"] for texts in kinds]
    assert len(set(found)) == 1


def test_names_folders_and_models_are_the_same(dense, loaded):
    options = {"texts": TEXTS, "ratio": 0.25, **SMALL, "progress": False}
    one = logits(a3.compress(*loaded, **options))
    assert torch.equal(one, logits(a3.compress(dense, **options)))
    assert torch.equal(one, logits(a3.compress(str(dense), loaded[1], **options)))


def test_stages_one_by_one(dense, loaded, tmp_path):
    options = {"preset": "a3-plus", "progress": False}
    small = a3.compress(*loaded, TEXTS, ratio=0.25, **SMALL, **options)
    rxx = a3.collect(*loaded, TEXTS, out=tmp_path / "rxx", **SMALL, **options)
    ranks = a3.allocate(*loaded, rxx=rxx, out=tmp_path / "ranks.json", ratio=0.25, progress=False)
    assert {len(one) for one in ranks.values()} == {small.config.num_hidden_layers}
    again = a3.approximate(
        dense, rxx=rxx, allocation=tmp_path / "ranks.json", ratio=0.25, **options
    )
    assert torch.equal(logits(small), logits(again))


def test_a_target_takes_the_place_of_a_ratio(loaded, tmp_path, caplog):
    caplog.set_level("INFO", logger="a3")
    options = SMALL | {"tokens": 128, "progress": False}
    small = a3.compress(*loaded, TEXTS, kv_cache=0.7, max_loss=9, **options)
    sizes = {(layer.self_attn.q_proj.out_features) for layer in small.model.layers}
    assert max(sizes) < loaded[0].model.layers[0].self_attn.q_proj.out_features
    said = [record.message for record in caplog.records]
    assert any("held-out blocks" in one for one in said)
    assert "compress: kv-cache 0.700 asked, kv-cache 0." in "\n".join(said)
    for wrong, says in (
        ({"ratio": 0.2}, "a target takes the place of a ratio"),
        ({"fit": 300}, "expected a size with its unit"),
        ({"flops": True}, "flops: found True"),
        ({"preset": "a3"}, "is for modes whose ranks are allocated"),
    ):
        with pytest.raises(a3.A3Error, match=says):
            a3.compress(*loaded, TEXTS, **{"kv_cache": "0.7"} | wrong, **options)


def test_compressed_models_evaluate_and_export_from_memory(loaded, tmp_path):
    options = {"qk": "uniform-global", "ratio": 0.25, **SMALL, "progress": False}
    small = a3.compress(*loaded, TEXTS, **options)
    found = a3.evaluate(small, texts=TEXTS, **SMALL, progress=False)
    assert found["perplexity"] > 1
    a3.export(small, tmp_path / "stock", progress=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert torch.allclose(logits(stock), logits(small), atol=1e-4)
    assert a3.export(small, tmp_path / "x.gguf", type="f32", progress=False).is_file()


def test_dtype_is_the_models(loaded):
    model = loaded[0].to(torch.bfloat16)
    small = a3.compress(model, loaded[1], TEXTS, ratio=0.25, **SMALL, progress=False)
    assert small.dtype == model.dtype
    assert not small.training


def test_nothing_is_printed(loaded, capfd, caplog):
    with caplog.at_level(logging.INFO, "a3"):
        a3.compress(*loaded, TEXTS, ratio=0.25, **SMALL, progress=False)
    assert capfd.readouterr() == ("", "")
    assert any("collect:" in record.getMessage() for record in caplog.records)
    a3.compress(*loaded, TEXTS, ratio=0.25, **SMALL)
    out, err = capfd.readouterr()
    assert out == ""
    assert "collect" in err
    assert "Loading" not in err


WRONG = {
    "ratio": ({"ratio": 1.5}, "ratio is 1.5; expected 0"),
    "no ratio": ({"ratio": None}, "has no ratio or rank"),
    "no number": ({"ratio": "a fifth"}, "not a number"),
    "preset": ({"preset": "best"}, "preset: found 'best', expected one of a3, a3-plus"),
    "mode": ({"qk": "nothing"}, "qk mode 'nothing' is not known"),
    "tokens": ({"tokens": 0}, "tokens: found 0"),
    "all tokens": ({"tokens": "all"}, "tokens: found 'all'"),
    "bos": ({"bos": "once"}, "bos: found 'once'"),
    "block": ({"block_length": 1.5}, "block_length: found 1.5"),
    "device": ({"device": "abacus"}, "device 'abacus'"),
    "dtype": ({"dtype": torch.bfloat16}, "dtype: found torch.bfloat16, expected one of float32"),
    "tokenizer": ({"tokenizer": "my-llama"}, "tokenizer: found str"),
    "mode's type": ({"qk": 3}, "qk: found 3, expected a mode"),
    "rows": (
        {"texts": Dataset.from_dict({"words": ["a"]})},
        "texts[0]: found ['words'], expected a",
    ),
    "table": ({"texts": pd.DataFrame({"text": TEXTS})}, "texts: found DataFrame"),
    "bytes": ({"texts": b"A river."}, "texts: found bytes"),
    "number's type": ({"tokens": True}, "tokens: found True"),
    "numbers": ({"texts": [1, 2]}, "texts[0]: text is 1 (int), expected a string"),
    "splits": ({"texts": DatasetDict({"train": Dataset.from_dict({"text": ["a"]})})}, "one split"),
    "few": ({"texts": ["a"]}, "text too short"),
    "empty": ({"texts": []}, "texts"),
    "text": ({"texts": "no such file"}, "'no such file'"),
    "text itself": ({"texts": "A river runs. " * 99}, "given as a list of strings"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(loaded, name):
    options, said = WRONG[name]
    given = {"texts": TEXTS, "ratio": 0.25, **SMALL, "progress": False}
    with pytest.raises(a3.A3Error) as error:
        a3.compress(loaded[0], **({"tokenizer": loaded[1]} | given | options))
    assert said in str(error.value)
    assert "/tmp" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_model_needs_its_tokenizer(loaded):
    with pytest.raises(a3.A3Error, match="tokenizer"):
        a3.compress(loaded[0], None, TEXTS, ratio=0.25)
    with pytest.raises(a3.A3Error, match="found Linear, expected a PreTrainedModel"):
        a3.compress(torch.nn.Linear(2, 2), loaded[1], TEXTS, ratio=0.25)


def test_a_model_without_a_head_is_refused(loaded):
    with pytest.raises(a3.A3Error, match="found LlamaModel, which does not predict tokens"):
        a3.compress(loaded[0].model, loaded[1], TEXTS, ratio=0.25)


def test_numbers_of_numpy_are_numbers(loaded):
    sizes = {"tokens": np.int64(256), "block_length": np.int32(32), "seed": np.uint8(0)}
    options = {"texts": TEXTS, "progress": False}
    small = a3.compress(*loaded, ratio=np.float32(0.25), **sizes, multiple=np.int64(1), **options)
    same = a3.compress(*loaded, ratio=0.25, **SMALL, **options)
    assert torch.equal(logits(small), logits(same))


def test_none_among_texts_is_an_empty_text(loaded):
    given = ([*TEXTS, None], Dataset.from_dict({"text": [*TEXTS, None]}), [*TEXTS, ""])
    found = [a3.evaluate(*loaded, texts, **SMALL, progress=False)["nll"] for texts in given]
    assert len(set(found)) == 1


def test_threads_compress_one_after_the_other(loaded):
    def compressed(ratio):
        return logits(a3.compress(*loaded, TEXTS, ratio=ratio, **SMALL, progress=False))

    ratios = (0.25, 0.5, 0.25)
    alone = [compressed(ratio) for ratio in ratios]
    with ThreadPoolExecutor(len(ratios)) as threads:
        together = list(threads.map(compressed, ratios))
    assert all(map(torch.equal, alone, together))


def test_texts_may_come_from_a3_itself(dense, loaded):
    def texts():
        assert a3.load(dense)
        yield from TEXTS

    assert a3.evaluate(*loaded, texts(), **SMALL, progress=False)["perplexity"] > 1


def test_nothing_of_the_users_is_written_over(dense, loaded, tmp_path):
    (tmp_path / "ranks.json").write_text("mine")
    rxx = a3.collect(dense, texts=TEXTS, out=tmp_path / "rxx", preset="a3-plus", **SMALL)
    with pytest.raises(a3.A3Error, match="exists already"):
        a3.allocate(dense, rxx=rxx, out=tmp_path / "ranks.json", ratio=0.25)
    with pytest.raises(a3.A3Error, match="is an input"):
        a3.export(dense, dense)
    with pytest.raises(a3.A3Error, match="type: found 'f3', expected one of f32"):
        a3.export(loaded[0], tmp_path / "x.gguf", loaded[1], type="f3")
    with pytest.raises(a3.A3Error, match="uniform: found 'q', expected one of qk, ov, mlp"):
        a3.allocate(dense, rxx=rxx, out=tmp_path / "new.json", ratio=0.25, uniform="qk")
    with pytest.raises(a3.A3Error, match="rxx: found None, expected a path"):
        a3.approximate(dense, rxx=None, ratio=0.25)
    with pytest.raises(a3.A3Error, match="folder: found None, expected a path"):
        a3.load(None)
    with pytest.raises(a3.A3Error, match="no such folder"):
        a3.load(tmp_path / "nothing")
    with pytest.raises(a3.A3Error, match="either texts"):
        a3.evaluate(*loaded)
    with pytest.raises(a3.A3Error, match="either texts"):
        a3.evaluate(*loaded, TEXTS, task="piqa")
