"""Each mistake ends with a non-zero status, one clear message, and no half-written file."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_model
from transformers import AutoConfig, MambaConfig

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import seal, write_record
from a3.experiments.rows import check_row
from a3.models.arch import describe, read_config
from a3.models.families import FAMILIES
from a3.rxx.container import Rxx, sum_hash
from a3.solutions.modes import check_fit, choose, kinds_needed

MODES = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w", "ratio": "0.2"}
BLOCK = ["--tokens", "256", "--block-length", "64"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A dense folder, text, and statistics of it."""
    folder = tmp_path_factory.mktemp("work")
    tiny_llama(folder / "dense")
    (folder / "text.txt").write_text("Dogs bark at the river, and the Moon looks on. " * 60)
    needed = kinds_needed(choose(MODES))
    kinds = [str(folder / "rxx" / f"{kind}.safetensors") for kind in needed]
    status = main(
        ["collect", str(folder / "dense"), "--text", str(folder / "text.txt"), *BLOCK, "-o", *kinds]
    )
    assert status == 0
    return folder


def fails(capsys, *arguments):
    """The message of a command that fails as it should: status 1, one line."""
    assert main([str(argument) for argument in arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a3: error:")]
    assert len(lines) == 1
    return lines[0]


def approx(work, out, *options):
    return ["approx", work / "dense", "--rxx", work / "rxx", "-o", out, *options]


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_a_mode_that_is_not_known_lists_those_that_are(work, tmp_path, capsys):
    message = fails(capsys, *approx(work, tmp_path / "o", "--ratio", "0.2", "--qk", "guess"))
    assert "'guess'" in message
    assert "rxx-w-rxx" in message
    assert not list(tmp_path.iterdir())


def test_a_mode_that_does_not_fit_says_which_do():
    with pytest.raises(A3Error, match=r"does not fit gqa.*Modes that do"):
        check_fit("qk", "rxx-w-rxx", "gqa")


@pytest.mark.parametrize("ratio", ["1", "-0.1", "1.5", "much", "nan"])
def test_a_ratio_outside_its_range(work, tmp_path, capsys, ratio):
    message = fails(capsys, *approx(work, tmp_path / "o", f"--ratio={ratio}"))
    assert ratio in message
    assert not list(tmp_path.iterdir())


def test_a_rank_that_leaves_no_rope_pair(work, tmp_path, capsys):
    message = fails(capsys, *approx(work, tmp_path / "o", "--ratio", "0.97"))
    assert "leaves no RoPE pair" in message


def test_a_rank_that_leaves_no_pair_of_a_partly_rotated_head(work, tmp_path, capsys):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    tiny_model(tmp_path / "dense", "gpt_neox", rope_parameters=rope)
    message = fails(
        capsys, "approx", tmp_path / "dense", "--rxx", work / "rxx", "--ratio", "0.95",
        "-o", tmp_path / "o",
    )  # fmt: skip
    assert "leaves no RoPE pair" in message


def test_nothing_to_do(work, tmp_path, capsys):
    options = ["--ratio", "0.2", "--qk", "dense", "--ov", "dense", "--mlp", "dense"]
    assert "nothing to do" in fails(capsys, *approx(work, tmp_path / "o", *options))


@pytest.mark.parametrize("command", ["collect", "ppl"])
def test_a_text_too_short_for_one_block(work, tmp_path, capsys, command):
    (tmp_path / "short.txt").write_text("Dogs bark.")
    out = tmp_path / "v_blocks.safetensors"
    head = ["collect"] if command == "collect" else ["eval", "ppl"]
    message = fails(
        capsys, *head, work / "dense", "--text", tmp_path / "short.txt", *BLOCK, "-o", out
    )
    assert "too short for one block" in message
    assert not out.exists()


def test_an_unknown_statistic_lists_those_known(work, tmp_path, capsys):
    out = tmp_path / "nonsense.safetensors"
    message = fails(capsys, "collect", work / "dense", "--text", work / "text.txt", "-o", out)
    assert "v_blocks" in message


def test_a_family_of_which_nothing_can_be_compressed(work, tmp_path, capsys):
    MambaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    message = fails(
        capsys, "collect", tmp_path / "mamba", "--text", work / "text.txt", *BLOCK,
        "-o", tmp_path / "v_blocks.safetensors",
    )  # fmt: skip
    assert "a3 has no adapter for 'mamba', and a probe confirmed none of its parts" in message


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bart", "an encoder-decoder: cross-attention"),
        ("t5", "an encoder-decoder: cross-attention"),
        ("quark", "which a3 does not know"),
    ],
)
def test_a_family_that_cannot_be_compressed_says_why(tmp_path, family, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(A3Error, match=f"'{family}', .*{reason}"):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("cohere", {"use_qk_norm": True}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("mpt", {"attn_config": {"clip_qkv": 8.0}}),
        ("olmo", {"clip_qkv": 8.0}),
        ("phi", {"qk_layernorm": True}),
    ],
)
def test_a_variant_that_would_come_out_wrong_is_named(tmp_path, family, variant):
    AutoConfig.for_model(family, **variant).save_pretrained(tmp_path)
    with pytest.raises(A3Error, match=f"{next(iter(variant))}.*not supported"):
        read_config(tmp_path, FAMILIES[family], tensors=1000)


@pytest.mark.parametrize(("family", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_model_has_a_layer(tmp_path, family, key):
    for count in (0, -1):
        AutoConfig.for_model(family, **{key: count}).save_pretrained(tmp_path)
        with pytest.raises(A3Error, match=f"{key} is {count}, expected 1 or more"):
            read_config(tmp_path, FAMILIES[family], tensors=1000)


def test_projections_in_slices_are_refused_by_their_keys(tmp_path):
    """BLOOM's own code passes their modules by, and there would be no statistics of them."""
    for variant in ({"slow_but_exact": True}, {"pretraining_tp": 2}):
        AutoConfig.for_model("bloom", n_layer=1, **variant).save_pretrained(tmp_path)
        assert read_config(tmp_path, FAMILIES["bloom"], tensors=1000)[0]["family"] == "bloom"
    variant = {"slow_but_exact": True, "pretraining_tp": 2}
    AutoConfig.for_model("bloom", n_layer=1, **variant).save_pretrained(tmp_path)
    with pytest.raises(A3Error, match="slow_but_exact is true, and pretraining_tp 2;"):
        read_config(tmp_path, FAMILIES["bloom"], tensors=1000)


def test_no_such_model_folder(work, tmp_path, capsys):
    message = fails(capsys, "eval", "ppl", tmp_path / "no", "--text", work / "text.txt", "-o", "x")
    assert "no such folder" in message


def damaged(work, tmp_path, damage):
    """A copy of the dense folder whose weights were changed by `damage(path)`."""
    tiny_llama(tmp_path / "dense")
    damage(tmp_path / "dense" / "model.safetensors")
    return tmp_path / "dense"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil_header(path):
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def lose_a_tensor(path):
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def reshape_a_tensor(path):
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [truncate, spoil_header, lose_a_tensor, reshape_a_tensor])
def test_damaged_weights_are_named(work, tmp_path, capsys, damage):
    dense = damaged(work, tmp_path, damage)
    message = fails(
        capsys, "collect", dense, "--text", work / "text.txt", *BLOCK,
        "-o", tmp_path / "rxx" / "v_blocks.safetensors",
    )  # fmt: skip
    assert str(dense) in message
    assert not (tmp_path / "rxx").exists()


def test_weights_with_nan_name_the_layer(work, tmp_path, capsys):
    def poison(path):
        tensors = load_file(path)
        tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
        save_file(tensors, path, {"format": "pt"})

    dense = damaged(work, tmp_path, poison)
    # A mode that reads the weights alone; with others, collect has found it already.
    modes = ["--qk", "dense", "--ov", "identity", "--mlp", "dense"]
    options = ["--ratio", "0.2", *modes, "-o", tmp_path / "o"]
    message = fails(capsys, "approx", dense, "--rxx", tmp_path / "rxx", *options)
    assert "layer 1, v" in message
    assert not (tmp_path / "o").exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rxx_that_is_not_finite(work, tmp_path, capsys, value):
    copy_rxx(work, tmp_path, spoil=value)
    message = fails(
        capsys, "approx", work / "dense", "--rxx", tmp_path, "--ratio", "0.2", "-o", tmp_path / "o"
    )
    assert "layers.1" in message
    assert "NaN or Inf" in message
    assert not (tmp_path / "o").exists()
    assert not leftovers(tmp_path)


def copy_rxx(work, target, spoil=None, **record):
    """Copy the statistics, sealed, with one value replaced or other metadata."""
    for path in (work / "rxx").glob("*.safetensors"):
        tensors = load_file(path)
        if spoil is not None and path.stem == "v_blocks":
            tensors["layers.1"][1, 2, 3] = spoil
        sums = {key: sum_hash(value) for key, value in tensors.items()}
        metadata = seal(Rxx(path, path.stem).settings | record | {"sums": sums})
        save_file(tensors, target / path.name, {"a3": json.dumps(metadata)})


def test_rxx_of_another_model(work, tmp_path, capsys):
    tiny_llama(tmp_path / "other", seed=1)
    message = fails(
        capsys, "approx", tmp_path / "other", "--rxx", work / "rxx", "--ratio", "0.2",
        "-o", tmp_path / "o",
    )  # fmt: skip
    assert "another model" in message


@pytest.mark.parametrize("damage", [truncate, spoil_header])
def test_damaged_rxx(work, tmp_path, capsys, damage):
    copy_rxx(work, tmp_path)
    damage(tmp_path / "v_blocks.safetensors")
    message = fails(
        capsys, "approx", work / "dense", "--rxx", tmp_path, "--ratio", "0.2", "-o", tmp_path / "o"
    )
    assert "v_blocks.safetensors" in message


def test_rxx_of_another_config(work, tmp_path, capsys):
    """The same weights, read otherwise: 1 of 4 dimensions turns at another speed."""
    shutil.copytree(work / "dense", tmp_path / "dense")
    config = tmp_path / "dense/config.json"
    said = json.loads(config.read_text())
    said["rope_parameters"]["rope_theta"] *= 2
    config.write_text(json.dumps(said))
    message = fails(
        capsys, "approx", tmp_path / "dense", "--rxx", work / "rxx", "--ratio", "0.2",
        "-o", tmp_path / "o",
    )  # fmt: skip
    assert "config_sha256" in message


def test_one_changed_sum_of_rxx(work, tmp_path, capsys):
    """Finite and of the right shape: only its hash tells."""
    copy_rxx(work, tmp_path)
    path = tmp_path / "v_blocks.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["layers.1"][0, 0, 0] *= 2
    save_file(tensors, path, metadata)
    message = fails(
        capsys, "approx", work / "dense", "--rxx", tmp_path, "--ratio", "0.2", "-o", tmp_path / "o"
    )
    assert f"{path}: tensor 'layers.1' changed since it was written" in message


@pytest.fixture(scope="module")
def shards(work):
    """Both shards of a compressed model."""
    for i in range(2):
        out = work / f"shards/{i}of2.safetensors"
        options = ["--ratio", "0.2", "--shard", f"{i}of2"]
        assert main([str(word) for word in approx(work, out, *options)]) == 0
    return work / "shards"


def lose_the_json(folder):
    (folder / "1of2.json").unlink()


def lose_the_file(folder):
    (folder / "1of2.safetensors").unlink()


def write_other_json(folder):
    (folder / "1of2.json").write_text('{"seconds": 3}')


def write_other_record(folder):
    write_record(folder / "1of2.json", {"seconds": 3})


def change_the_file(folder):
    truncate(folder / "1of2.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_the_json, "1of2.json: no such file"),
        (lose_the_file, "1of2.safetensors: no such file"),
        (write_other_json, "1of2.json: found no sha256"),
        (
            write_other_record,
            "1of2.json: holds the keys ['seconds'], which are not those of a shard",
        ),
        (change_the_file, "1of2.safetensors: truncated or damaged"),
    ],
)
def test_shards_that_are_not_whole_are_named_as_given(work, shards, tmp_path, capsys, damage, says):
    shutil.copytree(shards, tmp_path / "shards")
    damage(tmp_path / "shards")
    paths = [tmp_path / f"shards/{i}of2.safetensors" for i in range(2)]
    message = fails(capsys, "gather", work / "dense", *paths, "-o", tmp_path / "o")
    assert f"{tmp_path}/shards/{says}" in message
    assert not (tmp_path / "o").exists()
    assert not leftovers(tmp_path)


def test_shards_of_another_model(shards, tmp_path, capsys):
    tiny_llama(tmp_path / "other", seed=1)
    paths = [shards / f"{i}of2.safetensors" for i in range(2)]
    message = fails(capsys, "gather", tmp_path / "other", *paths, "-o", tmp_path / "o")
    assert "0of2.safetensors: made of a model whose weights_sha256 is" in message


def test_a_merge_of_what_is_no_shard(work, tmp_path, capsys):
    path = work / "rxx/v_blocks.safetensors"
    message = fails(capsys, "merge", path, "-o", tmp_path / "v_blocks.safetensors")
    assert f"{path}: the statistics of a whole calibration, expected those of a shard" in message
    assert not list(tmp_path.iterdir())


def test_weights_that_lack_a_norm(tmp_path):
    """transformers would make it up, with a warning."""
    tiny_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(A3Error, match=r"no tensor of the expected shape for model\.norm\.weight"):
        describe(tmp_path)


def test_missing_rxx_says_what_to_collect(work, tmp_path, capsys):
    message = fails(
        capsys, "approx", work / "dense", "--rxx", tmp_path, "--ratio", "0.2", "-o", tmp_path / "o"
    )
    assert "a3 collect" in message


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))


@pytest.mark.parametrize("command", ["collect", "approx"])
def test_a_full_disk_leaves_nothing(work, tmp_path, command):
    """A limit on the size of files stands for a full disk: the same path, another errno."""
    out = tmp_path / "out" / "v_blocks.safetensors"
    arguments = {
        "collect": ["collect", work / "dense", "--text", work / "text.txt", *BLOCK, "-o", out],
        "approx": approx(work, tmp_path / "out" / "small", "--ratio", "0.2"),
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", "a3", *map(str, arguments)],
        capture_output=True, text=True, preexec_fn=limit_files,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path != tmp_path / "out"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(work, tmp_path, sign):
    (tmp_path / "long.txt").write_text((work / "text.txt").read_text() * 400)
    out = tmp_path / "out" / "v_blocks.safetensors"
    arguments = ["collect", work / "dense", "--text", tmp_path / "long.txt"]
    arguments += ["--tokens", "200000", "--block-length", "16", "-o", out]
    with subprocess.Popen(
        [sys.executable, "-m", "a3", *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # A shell starts what it runs in the background with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        process.stdout.readline()  # what it will cost
        time.sleep(2)
        process.send_signal(sign)
        _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    assert b"Traceback" not in errors
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_text_of_calibration_is_not_scored_unnoticed():
    config = {
        "models": {"m": {"source": {}}},
        "calibrations": {"c": {"text": "seen"}},
        "texts": {"seen": {"source": {}}, "other": {"source": {}}},
        "perplexity": {"p": {"text": "other"}},
        "harness": {},
        "evaluate": {"perplexity": ["p"], "harness": []},
    }
    row = {"model": "m", "calibration": "c", "qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w"}
    with pytest.raises(A3Error, match=r"texts\.other\.exclude"):
        check_row(row | {"ratio": "0.1"}, config, "row 1")
    config["texts"]["other"] = {"exclude": ["seen"]}
    check_row(row | {"ratio": "0.1"}, config, "row 1")


def test_statistics_in_two_files_are_the_sum(work):
    """Files hold sums: this is what makes merging shards an addition."""
    tensors = load_file(work / "rxx" / "v_blocks.safetensors")
    assert all(value.dtype == torch.float64 for value in tensors.values())


def test_a_shard_that_changed_is_found_by_who_reads_its_weights(work, shards, tmp_path, capsys):
    """gather takes over the hash that the shard's own job said, and does not read it all again."""
    shutil.copytree(shards, tmp_path / "shards")
    paths = [tmp_path / f"shards/{i}of2.safetensors" for i in range(2)]
    content = bytearray(paths[1].read_bytes())
    content[-1] ^= 1
    paths[1].write_bytes(content)
    assert main(["gather", *map(str, (work / "dense", *paths)), "-o", str(tmp_path / "o")]) == 0
    text = ["--text", work / "text.txt", *BLOCK]
    message = fails(capsys, "eval", "ppl", tmp_path / "o", *text, "-o", tmp_path / "p.json")
    assert "o/model-00002-of-00003.safetensors: changed since it was written" in message
