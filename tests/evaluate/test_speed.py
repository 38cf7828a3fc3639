"""Speed: what is counted, in what order it is timed, and that nothing is needed but a config.

Nothing here says what is faster: these models are tiny, and the machine may be busy.
"""

import json
import re

import pandas as pd
import pytest
import torch
from test_workflow import Project
from tiny import SIZES, TAIL, run, tiny_model, tiny_results
from transformers import AutoConfig

from a3.cli.main import main
from a3.core.files import read_record, write_record
from a3.jobs.forecast import Job, forecast
from a3.models.arch import sketch
from a3.models.cost import speed_cost
from a3.models.load import load_model
from a3.models.sizes import sizes
from a3.stages.evaluate import speed as stage
from a3.stages.evaluate.speed_models import of_folder
from a3.stages.evaluate.speed_summary import compared

SHORT = ["--prompt", "6", "--new-tokens", "3", "--batch", "2", "--repeats", "2"]
PLACE = dict(zip(("calibration", "qk", "ov", "mlp", "ratio"), (
    "short", "rxx-w-rxx", "xkv", "rxx-w", "0.25"), strict=True))  # fmt: skip
LLAMA_13B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "dtype": "float16",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with the speed of the compressed run."""
    made = tiny_results(tmp_path_factory.mktemp("speed"))
    folders = [made / "models/tiny", made / "checkpoints" / TAIL]
    run("eval", "speed", *folders, *SHORT, "-o", made / "eval" / TAIL / "speed/short.json")
    return made


@pytest.fixture
def record(results):
    return read_record(results / "eval" / TAIL / "speed/short.json")


def shapes_only(folder, **config):
    """A folder with nothing but a config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(*words):
    """What a command that has to fail says; it writes nothing."""
    assert main([str(word) for word in words]) == 1
    return words


def test_the_record_says_all_that_was_measured(record, results):
    dense, small = record["models"]
    assert (record["batch"], record["prompt"], record["new_tokens"]) == (2, 6, 3)
    assert record["attention"] == ["eager", "sdpa"]
    assert record["device_name"]
    assert record["weights"] == "loaded"
    assert record["layers"] is None
    for model in (dense, small):
        assert model["weights_bytes"] == 4 * model["size"]["parameters"] + buffers(model, results)
        for name in ("eager", "sdpa"):
            found = model["attention"][name]
            assert found["peak_memory_bytes"] is None  # of a CPU nothing is known
            assert "extrapolated" not in found
            for phase in ("prefill", "decode"):
                assert len(found[phase]["samples"]) == 2
                low, high = found[phase]["quartiles"]
                assert 0 < low <= found[phase]["median"] <= high
    said = read_record(results / "checkpoints" / TAIL / "approx.json")
    assert small["checkpoint_sha256"] == said["weights_sha256"]
    assert dense["checkpoint_sha256"] == said["base"]["weights_sha256"]
    assert small["size"] == said["size"]["compressed"]
    assert small["size"]["flops_per_token"] < dense["size"]["flops_per_token"]


def buffers(model, results):
    """Bytes that are no parameters: RoPE's frequencies and the kept pairs."""
    compressed = "/checkpoints/" in model["name"]
    folder = results / "checkpoints" / TAIL if compressed else results / "models/tiny"
    loaded = load_model(folder, "float32")
    return sum(buffer.nbytes for buffer in loaded.buffers())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_holds_what_was_counted(results, tmp_path, dtype):
    folders = [results / "models/tiny", results / "checkpoints" / TAIL]
    run("eval", "speed", *folders, *SHORT, "--dtype", dtype, "-o", tmp_path / "speed.json")
    for model in read_record(tmp_path / "speed.json")["models"]:
        assert model["cache_bytes"] == model["size"]["kv_bytes_per_token"] * 2 * (6 + 3)


def test_the_same_tokens_as_generate(results):
    """Prefill and steps are those of generation, with a cache of prompt and steps."""
    candidate = of_folder(results / "checkpoints" / TAIL, "float32", "cpu")
    subject = stage.Subject(candidate, stage.Clock("cpu"), ["sdpa"])
    ids, seen = torch.tensor([[0, 5, 9, 40]]), []
    hook = subject.model.register_forward_pre_hook(lambda _, args: seen.extend(args[0].tolist()))
    with torch.inference_mode():
        subject.run(ids, 3)
        hook.remove()
        expected = subject.model.generate(
            ids, max_new_tokens=3, do_sample=False, eos_token_id=None
        )[0, 4:]
    assert seen == [ids[0].tolist(), *([token] for token in expected.tolist())]


def test_models_and_implementations_take_turns(results, tmp_path, monkeypatch):
    order = []
    real = stage.Subject.run

    def noted(self, ids, new_tokens, way):
        order.append((self.model.config._attn_implementation, "checkpoints" in self.candidate.name))
        return real(self, ids, new_tokens, way)

    monkeypatch.setattr(stage.Subject, "run", noted)
    folders = [results / "models/tiny", results / "checkpoints" / TAIL]
    run("eval", "speed", *folders, *SHORT, "-o", tmp_path / "speed.json")
    one_round = [(name, small) for name in ("eager", "sdpa") for small in (False, True)]
    assert order == one_round * 3  # the first one warms up


def test_ratios_are_taken_within_a_repeat():
    def model(name, samples):
        rate = {"median": sorted(samples)[1], "quartiles": [0.0, 1.0], "samples": samples}
        size = {"parameters": 1, "kv_bytes_per_token": 1, "flops_per_token": 1}
        found = {"prefill": rate, "decode": rate, "peak_memory_bytes": None}
        counted = {"weights_bytes": 1, "cache_bytes": 1, "flops_per_token_paper": 1}
        return {"name": name, "size": size, "attention": {"sdpa": found}, **counted}

    # The machine slows down; the second model takes half as long throughout.
    models = [model("dense", [8.0, 4.0, 1.0]), model("small", [16.0, 8.0, 2.0])]
    dense, small = compared({"attention": ["sdpa"], "models": models})
    assert (dense["prefill_ratio"], dense["prefill_ratio_iqr"]) == (1, 0)
    assert (small["prefill_ratio"], small["prefill_ratio_iqr"]) == (2, 0)


def test_the_paper_count_of_flops(tmp_path):
    """Ratios for LLaMA-2-13B of the runtime table, and the peak memory that stands beside them."""
    arch = sketch(shapes_only(tmp_path, **LLAMA_13B))
    fields = arch.to_json()

    def counted(qk, ov, mlp):
        size = sizes(fields, [(qk, ov, mlp)] * 40, 0, "float16")
        return stage.paper_flops(fields | {"size": size}), size["kv_bytes_per_token"]

    published = {96: (0.8, 0.78, 28114), 64: (0.6, 0.56, 21336), 48: (0.4, 0.39, 16139)}
    dense, dense_cache = counted(128, 128, 13824)
    for rank, (kept, ratio, peak) in published.items():
        mlp = round(kept * 13824)
        flops, cache = counted(rank, rank, mlp)
        assert round(flops / dense, 2) == ratio
        linear = 40 * 5120 * (4 * 40 * (128 - rank) + 3 * (13824 - mlp)) * 2
        saved = (linear + 4 * 2048 * (dense_cache - cache)) / 2**20
        assert saved == pytest.approx(35004 - peak, rel=0.02)
    # Head sizes of the ratio itself give another figure.
    ours = {0.2: (102, 102, 11059), 0.4: (76, 77, 8294), 0.6: (52, 51, 5530)}
    for ratio, ranks in ours.items():
        assert round(counted(*ranks)[0] / dense, 2) == round(1 - ratio, 2)


def test_a_config_is_enough(tmp_path, capsys):
    config = AutoConfig.for_model("llama", **SIZES).to_dict()
    folder = shapes_only(tmp_path / "shapes", **config)
    command = ["eval", "speed", folder, "--ratio", "0.25", "0.5", *SHORT]
    run(*command, "-o", tmp_path / "all.json")
    made = read_record(tmp_path / "all.json")
    assert made["weights"] == "random"
    assert [model["name"] for model in made["models"]] == [
        "dense",
        "rxx-w-rxx+xkv+rxx-w/0.25",
        "rxx-w-rxx+xkv+rxx-w/0.5",
    ]
    assert made["models"][2]["ranks"] == {"qk": 8, "ov": 8, "mlp": 48}
    said = capsys.readouterr().out
    assert said.startswith("speed: 3 models in float32, about ")
    assert "decode ratio" in said
    more = ["--ratio", "0.3", "--beside", "svd", "--multiple", "1", "8"]
    run("eval", "speed", folder, *more, *SHORT, "-o", tmp_path / "more.json")
    _, plain, by_8, _, svd_by_8 = read_record(tmp_path / "more.json")["models"]
    assert plain["name"] == "rxx-w-rxx+xkv+rxx-w/0.3 by 1"
    assert (plain["ranks"], by_8["ranks"]) == (
        {"qk": 12, "ov": 11, "mlp": 67},
        {"qk": 8, "ov": 8, "mlp": 64},
    )
    assert svd_by_8["name"] == "svd+svd+svd/0.3 by 8"
    assert all(rank % 8 == 0 for rank in svd_by_8["factors"].values())


def test_random_weights_have_the_shapes_of_a_checkpoint(results, tmp_path, record):
    """Sizes as of the model that was really compressed; a part of its layers is extrapolated."""
    folder = results / "models/tiny"
    run("eval", "speed", folder, "--ratio", "0.25", *SHORT, "-o", tmp_path / "all.json")
    made = read_record(tmp_path / "all.json")["models"]
    assert [model["size"] for model in made] == [model["size"] for model in record["models"]]
    assert [m["cache_bytes"] for m in made] == [m["cache_bytes"] for m in record["models"]]
    cut = ["--ratio", "0.25", "--layers", "1"]
    run("eval", "speed", folder, *cut, *SHORT, "-o", tmp_path / "one.json")
    one = read_record(tmp_path / "one.json")
    assert one["layers"] == {"timed": 1, "of": 2}
    for model, whole in zip(one["models"], made, strict=True):
        assert model["size"] == whole["size"]
        assert model["cache_bytes"] == whole["cache_bytes"] / 2
        for found in model["attention"].values():
            for phase in ("prefill", "decode"):
                samples = zip(
                    found[phase]["samples"], found["extrapolated"][phase]["samples"], strict=True
                )
                # Twice the layers: slower, but not by two, since the head is there once.
                assert all(cut / 2 < whole < cut for cut, whole in samples)


def test_extrapolation_multiplies_what_is_inside_of_layers():
    seconds = stage.Seconds(whole=5.0, layers=2.0)
    assert seconds.extrapolated(1) == 5
    assert seconds.extrapolated(40) == 3 + 40 * 2
    samples = [{"prefill": seconds, "decode": stage.Seconds(10.0, 0.0)}]
    found = stage.rates(samples, {"prefill": 166, "decode": 20}, 40)
    assert (found["prefill"]["median"], found["decode"]["median"]) == (2, 2)


@pytest.mark.parametrize(
    ("family", "config", "attention"),
    [
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                          "partial_rotary_factor": 0.25}}, ["eager", "sdpa"]),
        ("qwen3", {"head_dim": 16}, ["eager", "sdpa"]),
        ("bloom", {"qk": "qk"}, ["eager"]),
        ("mixtral", {"num_local_experts": 3}, ["sdpa"]),
    ],
)  # fmt: skip
def test_other_families_from_a_config(tmp_path, family, config, attention):
    qk = ["--qk", config.pop("qk")] if "qk" in config else []
    folder = shapes_only(
        tmp_path / family, **AutoConfig.for_model(family, **SIZES | config).to_dict()
    )
    out = tmp_path / "speed.json"
    words = ["--ratio", "0.25", *qk, "--layers", "1", "--attention", *attention]
    run("eval", "speed", folder, *words, *SHORT, "-o", out)
    for model in read_record(out)["models"]:
        # The same heads in every layer, so half of the cache in one of two.
        assert model["cache_bytes"] * 2 == model["size"]["kv_bytes_per_token"] * 2 * (6 + 3)


def test_a_family_without_sdpa_is_refused(tmp_path, capsys):
    folder = tiny_model(tmp_path / "bloom", "bloom")
    refused("eval", "speed", folder, *SHORT, "-o", tmp_path / "speed.json")
    assert "BloomForCausalLM of transformers does not support sdpa" in capsys.readouterr().err
    assert not (tmp_path / "speed.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--repeats", "0"], "--repeats: expected an integer from 1"),
        (["--new-tokens", "-1"], "--new-tokens: expected an integer from 1"),
        (["--layers", "1"], "layers without a ratio"),
        (["--ratio", "0.25", "--layers", "3"], "layers is 3; expected 1 to 2"),
        (["--ratio", "1.5"], "ratio is 1.5"),
        (["--ratio", "0.25", "--layers", "1", "--compile"], "layers with compile"),
        (["--ratio", "0.25", "--qk", "qk"], "does not fit gqa-rope"),
        (["{folder}", "--ratio", "0.25"], "2 folders and a ratio"),
        (["--ratio", "0.25", "--batch", "1000000000"], "available. Time fewer models"),
    ],
)
def test_wrong_input_is_named(results, tmp_path, capsys, words, says):
    folder = str(results / "models/tiny")
    words = [word.format(folder=folder) for word in words]
    refused("eval", "speed", folder, *words, "-o", tmp_path / "speed.json")
    assert says in capsys.readouterr().err
    assert not (tmp_path / "speed.json").exists()


def test_more_tokens_than_positions(tmp_path, capsys):
    folder = tiny_model(tmp_path / "gpt2", "gpt2", max_position_embeddings=32)
    refused("eval", "speed", folder, "--prompt", "30", "-o", tmp_path / "speed.json")
    assert "and prompt + new_tokens is 62" in capsys.readouterr().err


def test_cost_and_plan(results):
    arch = sketch(results / "models/tiny").to_json()
    counts = {"batch": 2, "prompt": 6, "new_tokens": 3, "repeats": 2, "dtype": "float32"}
    one, two = (speed_cost([arch] * n, 2, **counts) for n in (1, 2))
    assert two.flops == 2 * one.flops
    assert two.memory - one.memory == 4 * arch["size"]["parameters"]
    # Two implementations, three rounds; a step counts as 16 sequences at least.
    assert one.flops == 2 * 3 * (2 * 6 + 3 * 16) * arch["size"]["flops_per_token"]
    row = {key: PLACE[key] for key in ("qk", "ov", "mlp", "ratio")}
    settings = counts | {"attention": ["sdpa"], "threads": 1, "device": "cpu", "row": row}
    (estimate,) = forecast([Job(str(results / "models/tiny"), "speed", settings)])
    assert estimate.seconds > 0
    assert estimate.flops < speed_cost([arch, arch], 1, **counts).flops


def table(results, out):
    rows = json.dumps([PLACE | {"model": "tiny"}])
    return ["speed-table", "--results", results, "--experiments", rows, "--speed", "short",
            "-o", out]  # fmt: skip


def test_the_table(results, record, tmp_path):
    run(*table(results, tmp_path))
    frame = pd.read_csv(tmp_path / "speed.csv")
    assert frame["attention"].tolist() == ["eager", "sdpa"]
    dense, small = record["models"]
    assert frame["decode"].tolist() == [
        small["attention"][name]["decode"]["median"] for name in record["attention"]
    ]
    assert frame["dense_prefill"].tolist() == [
        dense["attention"][name]["prefill"]["median"] for name in record["attention"]
    ]
    share = small["size"]["kv_bytes_per_token"] / dense["size"]["kv_bytes_per_token"]
    assert frame["kv_bytes_per_token_ratio"].tolist() == [share, share]
    lines = (tmp_path / "speed.md").read_text().splitlines()
    assert lines[0].count("|") == lines[2].count("|") == 17
    assert "short: 2 × (6 + 3)" in lines[2]


def test_a_table_of_no_speeds_is_refused(results, tmp_path, capsys):
    """No compressed row, no results at all, an entry that was not timed."""
    words = [str(word) for word in table(results, tmp_path / "out")]
    for option, value, says in (
        ("--experiments", '[{"model": "tiny"}]', "no compressed row among the experiments (tiny)"),
        ("--results", str(tmp_path / "nope"), "short.json: no such file"),
        ("--speed", "other", "other.json: no such file"),
    ):
        changed = list(words)
        changed[words.index(option) + 1] = value
        assert main(changed) == 1
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verify_and_table_refuse_the_speed_of_other_weights(results, record, tmp_path, capsys):
    assert main(["verify", str(results)]) == 0
    assert "1 speeds" in capsys.readouterr().out
    path = results / "eval" / TAIL / "speed/short.json"
    before = path.read_bytes()
    changed = {key: value for key, value in record.items() if key != "sha256"}
    changed["models"][0]["checkpoint_sha256"] = "0" * 64
    write_record(path, changed)
    for command in (["verify", str(results)], [str(word) for word in table(results, tmp_path)]):
        assert main(command) == 1
        assert "the speed is of other weights" in capsys.readouterr().err
    path.write_bytes(before)


def test_the_rule(tmp_path):
    """A dry run: one job a compressed row, its command complete, all cores its own."""
    project = Project(tmp_path)
    project.edit("config/config.yaml", "evaluate:", "speed:\n  quick: {prompt: 6}\nevaluate:")
    project.edit("config/config.yaml", "harness: [titles]", "harness: [titles]\n  speed: [quick]")
    rules, output = project.snakemake("-n", "-p")
    assert rules.count("eval_speed") == rules.count("speed_table") == 1
    (command,) = re.findall(r"^Shell command: (a3 eval speed .*)$", output, re.MULTILINE)
    assert command == (
        "a3 eval speed results/models/tiny "
        f"results/checkpoints/{TAIL} --batch 1 --prompt 6 --new-tokens 32 --repeats 5 "
        "--dtype float32 --attention eager sdpa --threads 1 --device cpu "
        f"-o results/eval/{TAIL}/speed/quick.json &> "
        f"results/logs/eval/{TAIL}/speed/quick.log"
    )
    project.edit("config/config.yaml", "speed: [quick]", "speed: [quik]")
    _, output = project.snakemake("-n", status=1)
    assert "evaluate.speed names the speed 'quik'" in output
