"""a3 compare: models side by side, held to what transformers itself computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import document, run, tiny_llama
from transformers import AutoModelForCausalLM

import a3  # noqa: F401
from a3.cli.main import main
from a3.core.files import read_record
from a3.models.load import load_tokenizer
from a3.stages.evaluate.compare import names_of
from a3.texts.blocks import scored_blocks
from a3.texts.reading import load_documents

BLOCKS = ["--tokens", "512", "--block-length", "64"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A dense model, a smaller one made of it, and a text of neither."""
    work = tmp_path_factory.mktemp("compare")
    tiny_llama(work / "dense")
    (work / "text.jsonl").write_text("".join(map(document, range(40))))
    (work / "other.jsonl").write_text("".join(map(document, range(40, 80))))
    words = ["--text", work / "text.jsonl", *BLOCKS, "--ratio", "0.5"]
    run("compress", work / "dense", *words, "-o", work / "small")
    return work


def compared(work, capsys, *words):
    """What a3 compare prints."""
    capsys.readouterr()
    folders = [str(work / "dense"), str(work / "small")]
    text = ["--text", str(work / "other.jsonl")]
    assert main(["compare", *folders, *text, *BLOCKS, *words]) == 0
    return capsys.readouterr().out


def test_scores_and_disagreement_are_those_of_the_whole_models(work, capsys):
    dense, small = json.loads(compared(work, capsys, "--json"))["models"]
    tokenizer = load_tokenizer(work / "dense")
    documents = load_documents(work / "other.jsonl")
    blocks, _ = scored_blocks(documents, tokenizer, 64, 512, True, "empty-line")
    logits = []
    for name in ("dense", "small"):
        model = AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(blocks).logits[:, :-1].double().log_softmax(-1))
    one, other = logits
    nll = [-x.gather(-1, blocks[:, 1:, None])[..., 0].mean(1) for x in logits]
    kl = (one.exp() * (one - other)).sum(-1).mean()
    same = (one.argmax(-1) == other.argmax(-1)).double().mean()
    (own,) = small["texts"]
    assert dense["texts"][0]["block_nll"] == pytest.approx(nll[0].tolist(), rel=1e-5)
    assert own["block_nll"] == pytest.approx(nll[1].tolist(), rel=1e-5)
    assert own["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert own["same_top"] == pytest.approx(same.item(), abs=2e-3)
    more = nll[1] - nll[0]
    assert own["increase"] == pytest.approx(more.mean().item(), rel=1e-3)
    assert own["increase_stderr"] == pytest.approx(more.std().item() / len(more) ** 0.5, rel=1e-3)
    assert dense["texts"][0]["kl"] == pytest.approx(0, abs=1e-6)


def test_scores_are_those_of_eval_ppl(work, capsys):
    _, small = json.loads(compared(work, capsys, "--json"))["models"]
    text = ["--text", work / "other.jsonl", *BLOCKS]
    run("eval", "ppl", work / "small", *text, "-o", work / "ppl.json")
    expected = read_record(work / "ppl.json")
    (own,) = small["texts"]
    for key in ("perplexity", "perplexity_stderr", "bits_per_byte"):
        assert own[key] == pytest.approx(expected[key], rel=1e-6)
    assert own["token_ids_sha256"] == expected["token_ids_sha256"]


def test_a_table_and_the_continuations_are_printed(work, capsys):
    short = ["--prompt", "a b", "--new-tokens", "3"]
    run("eval", "generation", work / "small", *short, "-o", work / "g.json")
    said = compared(work, capsys, *short, "--speed")
    lines = said.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:4]] == ["dense", "small"]
    titles = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert titles[2:] == [
        *("parameters", "weights, MB", "KV cache, bytes a token", "MFLOPs a token"),
        *("other: perplexity", "other: bits a byte", "other: increase, nats a token"),
        *("other: KL", "other: same next token", "prefill, tokens/s", "decode, tokens/s"),
    ]
    text = " ".join(read_record(work / "g.json")["text"].split())
    assert "**a b** …\n- dense: " in said
    assert f"- small: {text}" in said


def test_sizes_are_those_of_the_record(work, capsys):
    dense, small = json.loads(compared(work, capsys, "--json"))["models"]
    size = read_record(work / "small/approx.json")["size"]
    for key in ("parameters", "kv_bytes_per_token", "flops_per_token"):
        assert (dense[key], small[key]) == (size["dense"][key], size["compressed"][key])
    assert small["file_bytes"] == (work / "small/model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dense"], "found 1 model, expected two or more"),
        (["dense", "dense"], "is named twice"),
        (["dense", "small", "--items", "x.jsonl"], "items of which task"),
        (["dense", "none"], "no such folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(work, capsys, words, said):
    folders = [str(work / word) if word in ("dense", "small", "none") else word for word in words]
    assert main(["compare", *folders]) == 1
    assert said in capsys.readouterr().err


def test_models_of_the_same_weights_are_told_apart(work, capsys, tmp_path):
    """Hashes of weights are equal, configs are not."""
    shutil.copytree(work / "dense", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10.0
    config["rope_theta"] = 10.0
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    text = ["--text", str(work / "other.jsonl"), *BLOCKS, "--json", "--prompt"]
    folders = [str(work / "dense"), str(tmp_path / "other"), str(work / "small")]
    capsys.readouterr()
    assert main(["compare", *folders, *text]) == 0
    _, other, small = json.loads(capsys.readouterr().out)["models"]
    assert other["texts"][0]["kl"] > 0
    again = json.loads(compared(work, capsys, "--json"))["models"][1]
    assert small["texts"][0]["kl"] == pytest.approx(again["texts"][0]["kl"], rel=1e-6)


def test_columns_are_called_by_what_tells_their_folders_apart():
    assert names_of([Path("a/dense"), Path("b/small")]) == ["dense", "small"]
    found = names_of([Path("a/dense"), Path("x/one/0.2"), Path("x/two/0.2")])
    assert found == ["a/dense", "one/0.2", "two/0.2"]
