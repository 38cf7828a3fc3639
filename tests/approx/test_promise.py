"""What a target asks is what the written model has, and the loss that it allows is measured."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_plus import collected, gradient_model
from tiny import run, tiny_model
from transformers import AutoModelForCausalLM

from a3 import promise
from a3.core.errors import A3Error
from a3.core.files import SEAL, read_json, read_record, write_record
from a3.models.arch import describe, load_arch
from a3.models.compressed import own_sizes
from a3.models.load import load_tokenizer, load_whole
from a3.models.packing import in_dtype
from a3.solutions.modes import PRESETS, choose
from a3.solutions.plan import Plan
from a3.solutions.target import Target
from a3.stages.approx import limits
from a3.stages.approx.allocator import Allocator
from a3.stages.approx.approximate import approximate, approximate_shard
from a3.stages.evaluate.perplexity import block_losses
from a3.stages.export.gguf import gguf_bytes
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

PLUS, STOCK = PRESETS["a3-plus"], PRESETS["a3-stock"]


def plan_of(ratio, row=PLUS):
    return Plan(choose(row | {"ratio": ratio}))


@pytest.fixture(scope="module", params=["llama-biased", "qwen3", "olmo2", "gemma3", "mixtral"])
def calibrated(request, tmp_path_factory):
    """A model and all statistics of a3-plus: biases, gains of heads and of layers, experts."""
    folder = tmp_path_factory.mktemp(request.param)
    gradient_model(folder, request.param)
    collected(folder, "rxx", plan_of("0.3").kinds())
    return folder


def made(folder, ratio, out, row=PLUS, **options):
    """A model of a target, and the allocator's amounts of it."""
    path = out.with_suffix(".json")
    plan = plan_of(ratio, row)
    promise.allocate_within(
        folder / "dense", folder / "rxx", plan, None, path, losses=[], device="cpu", **options
    )
    approximate(folder / "dense", folder / "rxx", plan, out, path)
    return plan, read_record(path)


def spelled(folder, **shares):
    """The target of these shares of a model, as tables write it."""
    arch = load_arch(folder / "dense")
    dense = limits.dense_amounts(arch, None)
    words = {key: str(share) for key, share in shares.items()}
    if "params" in shares:
        words["params"] = str(int(shares["params"] * arch.size["parameters"]))
    if "fit" in shares:
        words["fit"] = f"{int(shares['fit'] * dense[limits.BYTES])}B"
    return str(Target.of(words))


def check_counted(folder, ratio, tmp_path):
    """That a written model has what was counted, and keeps to what was asked; what it has."""
    plan, record = made(folder, ratio, tmp_path / "small")
    found = promise.measured_amounts(plan.target, load_arch(folder / "dense"), tmp_path / "small")
    allocator = Allocator(folder / "dense", folder / "rxx", plan)
    counted = allocator.amounts(allocator.least_loss(allocator.asked()))
    for key in (limits.PARAMETERS, limits.CACHED):
        assert counted[key] == pytest.approx(found[key]), key
    assert counted[limits.FLOPS] == pytest.approx(found[limits.FLOPS], rel=1e-6, abs=2)
    # Room for names and shapes is counted with a file.
    assert found[limits.BYTES] <= counted[limits.BYTES]
    assert len(promise.check_kept(folder / "dense", tmp_path / "small")) == len(
        limits.asked(plan.target, allocator.dense)
    )
    assert record["predicted_nll"] > 0
    return found, limits.asked(plan.target, allocator.dense)


def test_what_is_counted_is_what_is_written(calibrated, tmp_path):
    shares = {"fit": 0.9, "params": 0.9, "kv_cache": 0.6, "flops": 0.9}
    check_counted(calibrated, spelled(calibrated, **shares), tmp_path)


@pytest.mark.parametrize("asked", ["fit", "params", "kv_cache", "flops"])
@pytest.mark.parametrize("calibrated", ["llama-biased"], indirect=True)
def test_each_target_is_met_and_nearly_used(calibrated, tmp_path, asked):
    found, limited = check_counted(calibrated, spelled(calibrated, **{asked: 0.8}), tmp_path)
    ((key, limit),) = limited.items()
    # Of a tiny model one rank is much, and so are the names of tensors in its file.
    assert 0.8 * limit <= found[key] <= limit


def test_a_files_bytes_are_those_of_its_own_tensors(tmp_path):
    """A stored copy of a tied head is written again, and so are other dtypes outside layers."""
    dense = tiny_model(tmp_path / "dense", "llama", tie_word_embeddings=True)
    path = dense / "model.safetensors"
    tensors = {name: one.bfloat16() for name, one in load_file(path).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, path, {"format": "pt"})
    whole = sum(one.numel() * one.element_size() for one in tensors.values())
    arch = describe(dense)
    assert limits.folder_bytes(dense, arch) == whole


@pytest.mark.parametrize("calibrated", ["llama-biased", "gemma3", "mixtral"], indirect=True)
def test_a_folder_in_another_dtype_is_no_larger_than_asked(calibrated, tmp_path):
    """The same ranks as in its own dtype at twice the size, every number rounded once."""
    dense, same = calibrated / "dense", plan_of("0.3")
    whole = limits.dense_amounts(load_arch(dense), limits.folder_bytes(dense, load_arch(dense)))
    fit = int(0.4 * whole[limits.BYTES])
    plan, record = made(calibrated, f"fit@{fit / 1e6}MB:bfloat16,kv-cache@0.9", tmp_path / "small")
    tensors = load_file(tmp_path / "small/model.safetensors")
    assert {one.dtype for one in tensors.values()} <= {torch.bfloat16, torch.int64}
    said = read_json(tmp_path / "small/config.json")
    assert said["dtype"] == "bfloat16"
    assert "torch_dtype" not in said
    found = promise.measured_amounts(plan.target, load_arch(dense), tmp_path / "small")
    assert 0.8 * fit <= found[limits.BYTES] <= fit
    assert found[limits.CACHED] <= 0.9 * whole[limits.CACHED]
    assert len(promise.check_kept(dense, tmp_path / "small")) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16
    told = read_record(tmp_path / "small/approx.json")
    shares = [told["size"][of]["kv_bytes_per_token"] for of in ("compressed", "dense")]
    assert shares[0] / shares[1] == pytest.approx(found[limits.CACHED] / whole[limits.CACHED])
    assert own_sizes(told)["compressed"]["kv_bytes_per_token"] == 2 * found[limits.CACHED]
    modes = {component: str(choice) for component, choice in same.shared.items()}
    content = {key: value for key, value in record.items() if key != SEAL}
    write_record(tmp_path / "own.json", content | {"modes": modes})
    approximate(dense, calibrated / "rxx", same, tmp_path / "own", tmp_path / "own.json")
    shards = [tmp_path / f"{i}of2.safetensors" for i in range(2)]
    for path in shards:
        rxx, ranks = calibrated / "rxx", tmp_path / "small.json"
        approximate_shard(dense, rxx, plan, path.stem, path, ranks)
    run("gather", dense, *shards, "-o", tmp_path / "joined")
    joined = load_whole(tmp_path / "joined").state_dict()
    for name, own in load_whole(tmp_path / "small").state_dict().items():
        assert torch.equal(joined[name], own), name
    for name, own in load_file(tmp_path / "own/model.safetensors").items():
        assert torch.equal(tensors[name], own.to(tensors[name].dtype)), name


def test_a_dtype_that_cannot_hold_a_weight_is_refused():
    with pytest.raises(A3Error, match=r"'w' in float16 holds .*expected numbers that it can hold"):
        in_dtype({"w": torch.tensor([7e4])}, "float16")


@pytest.mark.parametrize("calibrated", ["llama-biased"], indirect=True)
def test_a_gguf_file_is_no_larger_than_asked(calibrated, tmp_path):
    collected(calibrated, "rxx", plan_of("0.3", STOCK).kinds())
    whole = gguf_bytes(calibrated / "dense", "q8_0")
    _, record = made(
        calibrated, str(Target(fit=int(0.9 * whole), type="q8_0")), tmp_path / "small", STOCK
    )
    (said,) = promise.check_kept(calibrated / "dense", tmp_path / "small")
    assert "asked" in said
    assert any(rank < 96 for rank in record["ranks"]["mlp"])
    with pytest.raises(A3Error, match=r"llama.cpp wants one. Take --preset a3-stock"):
        made(calibrated, "fit@0.1MB:q8_0", tmp_path / "plus")


@pytest.mark.parametrize("calibrated", ["llama-biased"], indirect=True)
def test_what_cannot_be_met_is_said_with_the_nearest(calibrated, tmp_path):
    for ratio, says in (
        ("kv-cache@0.1", r"kv-cache 0.100 asked, kv-cache 0.125 is the least"),
        ("params@0.001M", "params 0.001M asked, params .*M is the least"),
        ("params@0.001M,kv-cache@0.1", "params .* is the least; kv-cache .* is the least"),
        ("params@1B", "the dense model keeps to it"),
        ("max-loss@0.05", "Name the calibration's with --text"),
    ):
        with pytest.raises(A3Error, match=says):
            made(calibrated, ratio, tmp_path / "small")
        assert not (tmp_path / "small.json").exists()


# --- a largest loss -------------------------------------------------------------------------------


class Made:
    """Ranks that are numbers, and a measured loss that is any function of the predicted one."""

    def __init__(self, most, loss):
        self.allocator, self.measured = self, loss
        self.plan = plan_of(f"max-loss@{most}")
        self.tried = []

    def whole(self):
        return [0.0]

    def within_loss(self, bound):
        return [min(bound, 3.0)]

    def loss(self, chosen):
        self.tried.append(chosen[0])
        increase, error = self.measured(chosen[0])
        return {"predicted": chosen[0], "increase": increase, "stderr": error, "blocks": 16}


@pytest.mark.parametrize(
    ("loss", "least"),
    [
        (lambda p: (p, 0.0), 0.94),  # as predicted
        (lambda p: (1.8 * p**1.2, 0.1 * p), 0.94),
        (lambda p: (0.3 * p**0.7, 0.01), 0.94),
        (lambda p: (5 * p**2, None), 0.94),
        (lambda p: (p - 0.02, 0.005), 0.5),  # it can be negative
        (lambda p: (0.01, 0.001), 0.0),  # the smallest ranks lose less
    ],
)
@pytest.mark.parametrize("most", ["0.05", "0.5"])
def test_a_loss_is_kept_and_nearly_used(loss, least, most):
    trials = Made(most, loss)
    chosen, said = promise.keep_loss(trials)
    found = trials.loss(chosen)
    assert said["held_out"] == found
    assert least * float(most) <= promise.upper(found) <= float(most)
    assert len(said["tries"]) <= 6


def test_a_loss_that_is_not_kept_is_an_error():
    with pytest.raises(A3Error, match=r"max-loss@0.05: not kept: .* measured 0.2000 ± 0.0100"):
        promise.keep_loss(Made("0.05", lambda p: (0.2, 0.01)))


@pytest.mark.parametrize("calibrated", ["llama-biased"], indirect=True)
def test_a_loss_is_measured_on_blocks_that_were_not_used(calibrated, tmp_path):
    text, dense = calibrated / "text.txt", calibrated / "dense"
    used = {"tokens": 160, "block_length": 16, "seed": 0, "bos": True}
    found = promise.held_out(dense, text, used)
    cut = (16, 16 * (11 + len(found)), 0, True)
    whole = token_blocks(load_documents(text), load_tokenizer(dense), *cut)
    assert torch.equal(found, whole[11:])
    with pytest.raises(A3Error, match="leaves 0 blocks of 16; a loss is measured on 4 or more"):
        promise.held_out(dense, text, used | {"tokens": 10**6})
    words = ("--preset", "a3-plus", "--ratio", "max-loss@0.02", "--text", text)
    out = tmp_path / "ranks.json"
    run("allocate", dense, "--rxx", calibrated / "rxx", *words, "-o", out)
    record = read_record(out)
    approximate(dense, calibrated / "rxx", plan_of("max-loss@0.02"), tmp_path / "small", out)
    losses = [
        block_losses(AutoModelForCausalLM.from_pretrained(folder), found)
        for folder in (dense, tmp_path / "small")
    ]
    increase = (losses[1] - losses[0]).mean().item()
    assert record["held_out"]["increase"] == pytest.approx(increase, abs=1e-6)
    assert promise.upper(record["held_out"]) <= 0.02
