"""A ratio or rank for each component: spelling, what fits a model, what a checkpoint becomes."""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_model

import a3.pipeline as pipeline
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.experiments.rows import kinds_of, read_experiments
from a3.models.arch import describe, load_arch
from a3.solutions.modes import PRESETS, Choice, choose
from a3.solutions.plan import Plan, check_experiments

PAPER = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w", "ratio": "0.2"}
OWN = {"qk": "rxx-w-rxx@12", "ov": "xkv@0.3", "mlp": "rxx-w@0", "ratio": "-"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Heads of 16, rotated whole; intermediate size 96."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


# --- spelling ---


def test_what_a_ratio_leaves_is_rounded_to_multiples(llama):
    arch = describe(llama)
    row = PAPER | {"ratio": "0.2"}
    assert Plan(choose(row)).ranks(arch) == {"qk": 12, "ov": 13, "mlp": 77}
    assert Plan(choose(row), multiple=8).ranks(arch) == {"qk": 16, "ov": 16, "mlp": 80}
    assert Plan(choose(row), multiple=3).ranks(arch) == {"qk": 12, "ov": 12, "mlp": 78}
    # A rank that is named is kept; whole heads are the most that there is.
    named = Plan(choose(row | {"ov": "xkv@11"}), multiple=8)
    assert named.ranks(arch) == {"qk": 16, "ov": 11, "mlp": 80}
    assert Plan(choose(PAPER | {"ratio": "0.1"}), multiple=9).ranks(arch)["ov"] == 16
    factored = dict.fromkeys(PAPER, "svd") | {"ratio": "0.2"}
    found = (Plan(choose(factored), multiple=m).factors(arch) for m in (1, 8))
    plain, rounded = (list(ranks.values()) for ranks in found)
    assert rounded == [max(1, round(rank / 8)) * 8 for rank in plain]
    with pytest.raises(A3Error, match="multiple is 0; expected 1 or more"):
        Plan(choose(row), multiple=0)


def test_a_size_of_its_own_is_a_ratio_or_a_rank():
    assert choose(OWN) == {
        "qk": Choice("rxx-w-rxx", 12),
        "ov": Choice("xkv", Decimal("0.3")),
        "mlp": Choice("rxx-w", Decimal(0)),
    }
    assert kinds_of([OWN]) == kinds_of([PAPER])


def test_components_without_a_size_take_the_ratio_of_the_row():
    sizes = {
        component: choice.size for component, choice in choose(PAPER | {"ov": "xkv@7"}).items()
    }
    assert sizes == {"qk": Decimal("0.2"), "ov": 7, "mlp": Decimal("0.2")}


def test_dense_components_take_no_size():
    assert list(choose(OWN | {"qk": "dense"})) == ["ov", "mlp"]
    assert choose(dict.fromkeys(PAPER, "dense") | {"ratio": "-"}) == {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qk": "dense@0.2"}, r"qk is 'dense@0\.2'.*Write dense"),
        ({"ov": "axk@0.2"}, r"ov mode 'axk' is not known.*axkv"),
        ({"ov": "xkv@"}, r"ov mode 'xkv@': ratio '' is not a number.*A rank is an integer"),
        ({"ov": "xkv@048"}, r"'xkv@048': ratio is 048"),
        ({"ov": "xkv@-3"}, r"ratio is -3"),
        ({"ov": "xkv@48.0"}, r"ratio is 48\.0.*A rank is an integer"),
        ({"ov": "xkv@0.30"}, r"ratio is '0\.30'; spell it 0\.3\."),
        ({"ov": "xkv@0.3@4"}, r"ratio '0\.3@4'"),
        ({"ratio": "0.20"}, r"spell it 0\.2\."),
        ({"ratio": ".2"}, r"spell it 0\.2\."),
        ({"ratio": "2e-1"}, r"spell it 0\.2\."),
        ({"ratio": " 0.2"}, r"spell it 0\.2\."),
        ({"ratio": "0.0"}, r"spell it 0\."),
        ({"ratio": "-0"}, r"spell it 0\."),
        ({"ratio": "-"}, r"qk mode 'rxx-w-rxx' has no ratio or rank.*rxx-w-rxx@48"),
        (OWN | {"ratio": "0.2"}, r"ratio 0\.2 has no effect"),
    ],
)
def test_one_size_has_one_spelling(change, says):
    with pytest.raises(A3Error, match=says):
        choose(PAPER | change)


def test_rows_that_say_the_same_are_refused(tmp_path):
    config = {
        "models": {"m": {"source": {}}},
        "calibrations": {"c": {"text": "t"}},
        "texts": {"t": {"source": {"path": "t.txt"}}},
        "evaluate": {"perplexity": [], "harness": []},
    }
    table = tmp_path / "experiments.tsv"
    header, row = "model\tcalibration\tqk\tov\tmlp\tratio\n", "m\tc\trxx-w-rxx\txkv\tdense\t0.2\n"
    table.write_text(header + row + "m\tc\trxx-w-rxx\txkv@0.3\tdense\t0.2\n")
    assert [each["ov"] for each in read_experiments(table, config)] == ["xkv", "xkv@0.3"]
    table.write_text(header + row + "m\tc\trxx-w-rxx@0.2\txkv@0.2\tdense\t-\n")
    with pytest.raises(A3Error, match="row 2: means the same as row 1"):
        read_experiments(table, config)


# --- what fits a model ---


def test_ranks_come_from_both(llama):
    assert Plan(choose(OWN)).ranks(describe(llama)) == {"qk": 12, "ov": 11, "mlp": 96}


@pytest.mark.parametrize(
    ("component", "cell", "says"),
    [
        ("qk", "rxx-w-rxx@7", r"qk mode 'rxx-w-rxx': rank is 7; expected an even .* 2 to 16.* 6\."),
        ("qk", "rxx-w-rxx@1", r"even .* from 2 to 16. Take 2\."),
        ("qk", "rxx-w-rxx@18", r"even .* from 2 to 16. Take 16\."),
        ("qk", "rxx-w-rxx@0.95", r"ratio 0\.95 of 16 leaves no RoPE pair"),
        ("ov", "xkv@17", r"ov mode 'xkv': rank is 17; expected one from 1 to 16. Take 16\."),
        ("mlp", "rxx-w@97", r"mlp mode 'rxx-w': rank is 97; expected one from 1 to 96. Take 96\."),
        ("qk", "qk@4", r"qk mode 'qk' does not fit gqa-rope\. Modes that do: rxx-w-rxx, "),
    ],
)
def test_a_size_that_does_not_fit_says_which_do(llama, component, cell, says):
    with pytest.raises(A3Error, match=says):
        Plan(choose(PAPER | {component: cell})).ranks(describe(llama))


def test_a_partly_rotated_head_keeps_a_pair_and_may_be_odd(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    arch = describe(tiny_model(tmp_path, "gpt_neox", rope_parameters=rope))
    assert Plan(choose(PAPER | {"qk": "rxx-w-rxx@3"})).ranks(arch)["qk"] == 3
    with pytest.raises(A3Error, match=r"rank is 1; expected one from 2 to 16. Take 2\."):
        Plan(choose(PAPER | {"qk": "rxx-w-rxx@1"})).ranks(arch)


def test_experiments_that_do_not_fit_are_refused_before_collecting(llama, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A river moves towards an ocean, or a lake. " * 60)
    out = tmp_path / "rxx" / "v_blocks.safetensors"
    words = ["collect", str(llama), "--text", str(tmp_path / "text.txt"), "-o", str(out)]
    words += ["--tokens", "256", "--block-length", "64", "--experiments"]
    bad = {"model": "m"} | PAPER | {"qk": "k-only@4"}
    assert main([*words, json.dumps([PAPER, bad])]) == 1
    said = capsys.readouterr()
    assert "experiment model m, qk k-only@4, ov xkv, mlp rxx-w, ratio 0.2: qk mode" in said.err
    assert (
        "Modes that do: rxx-w-rxx, rxx-w-rxx-uniform, uniform-global, uniform-contiguous, "
        in said.err
    )
    assert "tokens" not in said.out
    assert not out.parent.exists()
    assert main([*words, json.dumps([PAPER, OWN])]) == 0
    assert out.exists()


PLUS = {"qk": "fisher~", "ov": "joint~", "mlp": "obs~", "ratio": "0.2"}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
NO_SHARING = {
    "in part": ("stablelm", {"rope_parameters": HALF}, [], "8 of 16 dimensions of a head are rot"),
    "in some layers": ("smollm3", {"no_rope_layers": [1, 0]}, [], "layer 1 has no RoPE"),
    "in windows": ("cohere2", WINDOWS, [], "layer 1 has no RoPE"),
    "experts": (
        "mixtral",
        {"num_local_experts": 2},
        ["--mlp", "svd"],
        "mlp mode 'svd' does not fit experts",
    ),
    "little room": ("llama", {}, ["--ratio", "0.9"], "10 of 96, and no layer gets less than 12"),
}


@pytest.mark.parametrize("case", NO_SHARING)
def test_what_cannot_share_out_a_ratio_is_refused_before_collecting(
    tmp_path, monkeypatch, capsys, case
):
    """By the command line before the text is read, and by the workflow's own check of its rows."""
    model_type, config, words, says = NO_SHARING[case]
    folder = tiny_model(tmp_path / "m", model_type, **config)
    monkeypatch.setattr(pipeline, "make_text", lambda *_: pytest.fail("the text was read"))
    given = ["compress", str(folder), "--text", str(folder), "--preset", "a3-plus"]
    assert main([*given, "--ratio", "0.2", *words, "-o", str(tmp_path / "small")]) == 1
    (line,) = re.findall(r"a3: error: .*", capsys.readouterr().err)
    assert re.search(says, line)
    if not words:
        with pytest.raises(A3Error, match=f"experiment .*: .*{says}"):
            check_experiments(folder, [PAPER | {"mlp": "dense"}, PLUS])
        if "RoPE" in line:
            check_experiments(folder, [PLUS | {"qk": "fisher@0.2"}])


# --- on the command line ---


def test_each_component_has_a_size_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "dense", head_dim=64, num_hidden_layers=1)
    Path("text.txt").write_text("A river moves towards an ocean, or a lake. " * 60)
    words = ["compress", "dense", "--qk", "rxx-w-rxx@48", "--ov", "xkv@0.3", "--mlp", "dense"]
    text = ["--text", "text.txt", "--tokens", "256", "--block-length", "64"]
    assert main([*words, *text, "-o", "small"]) == 0
    record = json.loads(Path("small/approx.json").read_text())
    assert record["modes"] == {"qk": "rxx-w-rxx@48", "ov": "xkv@0.3", "mlp": "dense"}
    assert record["ranks"] == {"qk": 48, "ov": 45}
    assert {component: said["rank"] for component, said in record["layers"][0].items()} == record[
        "ranks"
    ]
    config = json.loads(Path("small/config.json").read_text())["a3"]
    assert (config["qk_ranks"], config["ov_ranks"], config["mlp_ranks"]) == ([48], [45], [96])
    tensors = load_file("small/model.safetensors")
    shapes = {name.split(".")[-2]: tuple(W.shape) for name, W in tensors.items() if "proj" in name}
    assert shapes["k_proj"] == (2 * 48, 64)
    assert shapes["v_proj"] == (2 * 45, 64)
    assert shapes["up_proj"] == (96, 64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "qk mode 'rxx-w-rxx' has no ratio or rank"),
        (["--qk", "rxx-w-rxx@7", "--ratio", "0.2"], "Take 6."),
        (["--mlp", "rxx-w@0.20", "--ratio", "0.2"], "spell it 0.2."),
    ],
)
def test_wrong_sizes_are_refused_before_anything_is_read(llama, tmp_path, capsys, options, says):
    out = tmp_path / "small"
    assert main(["compress", str(llama), "--text", __file__, "-o", str(out), *options]) == 1
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_presets_are_listed_and_fit_a_llama(tmp_path, capsys):
    arch = load_arch(tiny_model(tmp_path / "m", "llama"))
    for preset, modes in PRESETS.items():
        assert Plan(choose(modes | {"ratio": "0.25"})).ranks(arch), preset
    with pytest.raises(SystemExit) as left:
        main(["compress", "m", "--preset"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert "the most accurate: elimination by predicted loss" in lines[1]
