"""The compressed model end to end on tiny Llamas: identity, emulation, cache, saving."""

import json
import random

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from a3.errors import A3Error
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.families import FAMILIES, Family
from a3.solutions import qk
from a3.solutions.modes import choose
from a3.stages.approximate import approximate
from a3.stages.collect import collect
from a3.stages.plan import Plan

MODES = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w"}
# Every family, and the variants of attention and biases that one family can have.
BIASED = {"attention_bias": True}
# GELU, since a quarter of a random ReLU layer never fires: dropping it would show nothing.
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "activation_function": "gelu"}
PARTIAL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
}
QUARTER = {"rope_parameters": PARTIAL["rope_parameters"] | {"partial_rotary_factor": 0.25}}
MODELS = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biased": ("llama", BIASED | {"mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 24}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "bloom": ("bloom", {}),
    "gemma2": ("gemma2", BIASED | {"head_dim": 16, "query_pre_attn_scalar": 40}),
    "gpt2": ("gpt2", {"n_inner": 96}),
    "gpt_neox": ("gpt_neox", PARTIAL),
    "gpt_neox-quarter": ("gpt_neox", QUARTER),
    "gpt_bigcode": ("gpt_bigcode", {"n_inner": 96}),
    "gpt_bigcode-mha": ("gpt_bigcode", {"n_inner": 96, "multi_query": False}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 16}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "olmo": ("olmo", BIASED),
    "opt": ("opt", OPT),
    "opt-post-norm": ("opt", OPT | {"do_layer_norm_before": False}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "phi": ("phi", PARTIAL),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", BIASED | {"head_dim": 16}),
    "stablelm": ("stablelm", PARTIAL | {"use_qkv_bias": True}),
    "smollm3": ("smollm3", BIASED | {"no_rope_layers": [1, 0]}),
}
# Characters at random: statistics of full rank, so that the solution is unique.
TEXT = "".join(random.Random(0).choices("".join(map(chr, range(32, 500))), k=3000))
SETTINGS = {
    "tokens": 2048, "block_length": 64, "seed": 0, "bos": True, "dtype": "float32", "device": "cpu",
}  # fmt: skip
FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv")
ALL_KINDS = ("attn_input", "o_proj_blocks", "down_diagonal")


def redraw(folder, seed=0):
    """Give biases a spread of 0.5 and norm gains a spread around 1: fresh ones hide mistakes.

    Matrices get a spread of 0.1 at least, so that no part of the model is without effect.
    """
    torch.manual_seed(seed)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in sorted(tensors.items()):
        if name.endswith("bias"):
            tensors[name] = torch.randn_like(value) * 0.5
        elif "norm" in name or "ln_" in name:
            tensors[name] = 1 + 0.3 * torch.randn_like(value)
        elif value.std() < 0.1:
            tensors[name] = value * (0.1 / value.std())
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module", params=MODELS)
def dense(request, tmp_path_factory):
    """A dense folder with its statistics in `rxx`."""
    folder = tmp_path_factory.mktemp(request.param)
    model_type, config = MODELS[request.param]
    tiny_model(folder / "dense", model_type, **config)
    redraw(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    outputs = {kind: folder / "rxx" / f"{kind}.safetensors" for kind in ALL_KINDS}
    collect(folder / "dense", folder / "text.txt", outputs, **SETTINGS)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def tokens(folder, count=48, batch=2):
    torch.manual_seed(5)
    return torch.randint(2, 300, (batch, count))


@torch.inference_mode()
def logits(model, ids):
    return model(ids).logits


def modes_of(arch):
    """The paper's modes for a model."""
    return MODES if arch.rope_layout else MODES | {"qk": "qk"}


def compress(dense, out, ratio, **modes):
    """Compress by the paper's modes, or those given; scores of normed queries stay dense."""
    arch = load_arch(dense / "dense")
    modes = modes_of(arch) | modes
    if arch.qk_norm:
        modes["qk"] = "dense"
    plan = Plan(choose(modes | {"ratio": ratio}))
    approximate(dense / "dense", dense / "rxx", plan, out)
    return load(out)


def test_ratio_zero_reproduces_the_dense_logits(dense, tmp_path):
    small = compress(dense, tmp_path / "small", "0")
    ids = tokens(dense)
    expected = logits(load(dense / "dense"), ids)
    torch.testing.assert_close(logits(small, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("ratio", ["0.25", "0.5"])
@pytest.mark.parametrize("parts", [("qk",), ("ov",), ("mlp",), ("qk", "ov", "mlp")])
def test_cut_model_equals_its_emulation_in_the_dense_shapes(dense, tmp_path, ratio, parts):
    arch = load_arch(dense / "dense")
    modes = {part: mode if part in parts else "dense" for part, mode in modes_of(arch).items()}
    if arch.qk_norm and "qk" in parts:
        plan = Plan(choose(modes | {"ratio": ratio}))
        with pytest.raises(A3Error, match="normed"):
            approximate(dense / "dense", dense / "rxx", plan, tmp_path / "small")
        return
    small = compress(dense, tmp_path / "small", ratio, **modes)
    emulated = load(dense / "dense")
    emulate(emulated, dense, ratio, parts)
    ids = tokens(dense)
    expected = logits(emulated, ids)
    assert (expected - logits(load(dense / "dense"), ids)).abs().max() > 5e-4
    torch.testing.assert_close(logits(small, ids), expected, rtol=0, atol=1e-4)


def emulate(model, dense, ratio, parts):
    """Put the reference's solution, in the original shapes, into a dense model."""
    arch = load_arch(dense / "dense")
    rxx = load_file(dense / "rxx" / "attn_input.safetensors")
    down = load_file(dense / "rxx" / "down_diagonal.safetensors")
    count = SETTINGS["tokens"]
    keep = 1 - float(ratio)
    step = 2 if arch.rope_dims == arch.head_dim else 1
    rank = step * round(keep * arch.head_dim / step)
    for i in range(arch.layers):
        R, mean = rxx[f"layers.{i}.rxx"] / count, rxx[f"layers.{i}.sum"] / count
        if arch.qkv_bias:
            row = torch.cat((mean, mean.new_ones(1)))
            R = torch.cat((torch.cat((R, mean[:, None]), dim=1), row[None]))
        attention = model.get_submodule(arch.adapter.attention_module(i))
        heads = split_heads(attention, arch)
        if "qk" in parts and arch.has_rope(i) and arch.rope_dims < arch.head_dim:
            zero_pairs_and_project(heads, arch, R, rank)
        elif "qk" in parts and arch.has_rope(i):
            zero_pairs(heads, arch.head_dim, R, rank)
        elif "qk" in parts:
            half = reference.root(R)[0]
            partners = (rows(*heads["q"]).mT @ half).unflatten(0, (arch.kv_heads, -1))
            project(heads["k"], partners, R, rank)
        if "ov" in parts:
            o = output(model.base_model.get_submodule(arch.adapter.module(i, "o")))
            partners = o.unflatten(0, (arch.kv_heads, -1, arch.head_dim))
            project(heads["v"], partners, R, round(keep * arch.head_dim))
        if "mlp" in parts:
            linear = model.base_model.get_submodule(arch.adapter.module(i, "down"))
            score = down[f"layers.{i}.rxx"] * output(linear).square().sum(1)
            kept = score.argsort(descending=True)[: round(keep * len(score))]
            mask = torch.zeros_like(score).index_fill(0, kept, 1)
            output(linear).mul_(mask[:, None])


def output(linear):
    """The weight of a projection as x W, a view."""
    return linear.weight.data if isinstance(linear, Conv1D) else linear.weight.data.T


def split_heads(attention, arch):
    """Views of q, k and v by head, weight (heads, h, d) and bias (heads, h) or None."""
    h, counts = arch.head_dim, (arch.heads, arch.kv_heads, arch.kv_heads)
    fused = next((m for m in map(attention.__dict__["_modules"].get, FUSED) if m), None)
    if fused is None:
        linears = [getattr(attention, f"{part}_proj") for part in "qkv"]
        weights, biases = [m.weight.data for m in linears], [m.bias for m in linears]
    elif arch.family in ("bloom", "gpt_neox") or (
        arch.family == "gpt_bigcode" and arch.kv_heads == arch.heads
    ):
        weights = fused.weight.data.view(arch.heads, 3, h, -1).unbind(1)
        biases = fused.bias.data.view(arch.heads, 3, h).unbind(1)
    else:
        sizes = [count * h for count in counts]
        weights = output(fused).T.split(sizes)
        biases = [None] * 3 if fused.bias is None else fused.bias.data.split(sizes)
    shaped = [w if w.ndim == 3 else w.unflatten(0, (-1, h)) for w in weights]
    flat = [b if b is None else b.detach() for b in biases]
    split = [b if b is None or b.ndim == 2 else b.unflatten(0, (-1, h)) for b in flat]
    return dict(zip("qkv", zip(shaped, split, strict=True), strict=True))


def rows(weight, bias):
    """x̂ Ŵ form of each head: (heads, d̂, h)."""
    return weight.mT if bias is None else torch.cat((weight.mT, bias[:, None]), dim=1)


def zero_pairs_and_project(heads, arch, R, rank):
    """Partial RoPE: try every split of the rank between pairs and the rest, take the best."""
    d, rest = arch.rope_dims, arch.head_dim - arch.rope_dims
    half = reference.root(R)[0]
    best = None
    for pairs in range(max(1, -(-(rank - rest) // 2)), min(d, rank) // 2 + 1):
        tried = clone(heads)
        zero_pairs(part_of(tried, slice(0, d)), d, R, 2 * pairs)
        others = part_of(tried, slice(d, None))
        partners = (rows(*others["q"]).mT @ half).unflatten(0, (arch.kv_heads, -1))
        project(others["k"], partners, R, rank - 2 * pairs)
        lost = score_error(heads, tried, half)
        if best is None or lost < best[0]:
            best = (lost, tried)
    for part in "qk":
        for old, new in zip(heads[part], best[1][part], strict=True):
            if old is not None:
                old.copy_(new)


def part_of(heads, dims):
    """Views of some dimensions of each head."""
    return {part: (w[:, dims], None if b is None else b[:, dims]) for part, (w, b) in heads.items()}


def clone(heads):
    return {part: (w.clone(), None if b is None else b.clone()) for part, (w, b) in heads.items()}


def score_error(old, new, half):
    """Σᵢ ‖R^½ (W_q,i W_kᵀ − M_i) R^½‖²."""

    def scores(heads):
        q, k = rows(*heads["q"]), rows(*heads["k"])
        q = q.unflatten(0, (len(k), -1))
        return half @ q @ k[:, None].mT @ half

    return (scores(old) - scores(new)).square().sum()


def zero_pairs(heads, h, R, rank):
    groups = len(heads["k"][0])
    Wq = rows(*heads["q"]).unflatten(0, (groups, -1))
    kept = reference.rope_pairs(R, R, Wq, rows(*heads["k"]), rank)
    for part in "qk":
        weight, bias = heads[part]
        for head in range(len(weight)):
            pairs = kept[head * groups // len(weight)]
            dropped = [f for f in range(h // 2) if f not in pairs]
            columns = dropped + [f + h // 2 for f in dropped]
            weight[head, columns] = 0
            if bias is not None:
                bias[head, columns] = 0


def project(shared, partners, R, rank):
    """W becomes P W with P = R^-½ U_r U_rᵀ R^½, the paper's joint solution, d × d."""
    weight, bias = shared
    half, inverse = reference.root(R)
    W = rows(weight, bias)
    for group in range(len(W)):
        target = half @ W[group] @ torch.cat(list(partners[group]), dim=1)
        U = torch.linalg.svd(target, full_matrices=False)[0][:, :rank]
        new = inverse @ U @ U.T @ half @ W[group]
        if bias is not None:
            bias[group], new = new[-1], new[:-1]
        weight[group] = new.T


def test_sizes_and_cache_are_what_the_ranks_say(dense, tmp_path):
    small = compress(dense, tmp_path / "small", "0.4")
    record = json.loads((tmp_path / "small" / "approx.json").read_text())
    arch = load_arch(dense / "dense")
    for kind, model in (("dense", load(dense / "dense").float()), ("compressed", small.float())):
        said = record["size"][kind]
        assert sum(p.numel() for p in model.parameters()) == said["parameters"]
        ids = tokens(dense, count=7, batch=1)
        cache = model(ids, use_cache=True).past_key_values
        live = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert live == 7 * said["kv_bytes_per_token"]
    assert record["size"]["compressed"]["parameters"] < record["size"]["dense"]["parameters"]
    shape = Checkpoint(tmp_path / "small").shape
    ranks = {part: record["layers"][0][part]["rank"] for part in ("ov", "mlp")}
    name = arch.adapter.packed_name(0, "v")
    assert shape(name) == (arch.kv_heads * ranks["ov"], 64)
    assert ranks["mlp"] in shape(arch.adapter.name(0, "down"))


def test_generate_with_cache_equals_without(dense, tmp_path):
    small = compress(dense, tmp_path / "small", "0.25")
    ids = tokens(dense, count=9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    torch.testing.assert_close(
        small.generate(ids, use_cache=True, **options),
        small.generate(ids, use_cache=False, **options),
    )


def test_eager_equals_sdpa_and_left_padding_changes_nothing(dense, tmp_path):
    small = compress(dense, tmp_path / "small", "0.25")
    ids = tokens(dense, count=20, batch=1)
    expected = logits(small, ids)
    eager = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.float64, attn_implementation="eager"
    )
    # Eager attention takes its softmax in float32.
    torch.testing.assert_close(logits(eager, ids), expected, rtol=0, atol=1e-5)
    padded = torch.cat((torch.ones(1, 5, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 5), torch.ones(1, 20)), dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # In float32: transformers' own masks of float64 models turn padding into NaN (Gemma 2).
    found = small.float()(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)


def test_save_pretrained_round_trips(dense, tmp_path):
    small = compress(dense, tmp_path / "small", "0.4")
    small.float().save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids = tokens(dense)
    torch.testing.assert_close(logits(again, ids), logits(load(tmp_path / "small"), ids))
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("dog").input_ids
    assert again.generation_config.eos_token_id == 1


@pytest.mark.parametrize(
    ("part", "mode"),
    [("qk", "rxx-w-rxx-uniform"), ("ov", "axkv"), ("ov", "identity"), ("mlp", "rxx")],
)
def test_other_modes_load_and_reproduce_at_full_rank(dense, tmp_path, part, mode):
    arch = load_arch(dense / "dense")
    if part == "qk" and (arch.qk_norm or not arch.rope_layout):
        pytest.skip("the mode does not fit this model")
    ids = tokens(dense)
    only = dict.fromkeys(MODES, "dense") | {part: mode}
    full = compress(dense, tmp_path / "full", "0", **only)
    torch.testing.assert_close(
        logits(full, ids), logits(load(dense / "dense"), ids), rtol=0, atol=2e-5
    )
    assert torch.isfinite(logits(compress(dense, tmp_path / "small", "0.5", **only), ids)).all()


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "small"
    tiny_llama(dense)
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(dense)
    (tmp_path / "text.txt").write_text(TEXT)
    outputs = {kind: tmp_path / "rxx" / f"{kind}.safetensors" for kind in ALL_KINDS}
    collect(dense, tmp_path / "text.txt", outputs, **SETTINGS)
    plan = Plan(choose(MODES | {"ratio": "0.2"}))
    approximate(dense, tmp_path / "rxx", plan, small)
    assert load_arch(dense).dtype == "bfloat16"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert Checkpoint(small).dtype(name) == "bfloat16"


def drop_bias(monkeypatch):
    whole = Family._rows

    def rows_without(self, checkpoint, layer, part, fields):
        W = whole(self, checkpoint, layer, part, fields)
        if part in "qkv" and self.has_bias(part, fields):
            W = torch.cat((W[:-1], torch.zeros_like(W[-1:])))
        return W

    monkeypatch.setattr(Family, "_rows", rows_without)


def swap_layout(monkeypatch):
    """Take neighbours (2j, 2j + 1) for a pair where the family has halves (j, j + h / 2)."""

    def neighbours(Gq, Gk, pairs, rotated, rank):
        rest = torch.arange(2 * rotated, Gk.shape[-1]).expand(len(pairs), -1)
        columns = torch.cat((2 * pairs, 2 * pairs + 1, rest), dim=-1)
        kept = torch.eye(Gk.shape[-1], dtype=Gk.dtype)[columns]
        return kept.mT, kept

    monkeypatch.setattr(qk, "_pairs_and_rest", neighbours)


def wrong_scale(monkeypatch):
    """All families ask their adapter for the scale."""
    for family in {type(family) for family in FAMILIES.values()}:
        right = family.scaling
        wrong = lambda self, config, h, right=right: 1.1 * right(self, config, h)  # noqa: E731
        monkeypatch.setattr(family, "scaling", wrong)


@pytest.mark.parametrize("mutate", [drop_bias, swap_layout, wrong_scale])
def test_a_mistake_in_an_adapter_would_be_seen(dense, tmp_path, monkeypatch, mutate):
    arch = load_arch(dense / "dense")
    if mutate is drop_bias and not arch.qkv_bias:
        pytest.skip("no biases to drop")
    if mutate is swap_layout and (not arch.rope_layout or arch.qk_norm):
        pytest.skip("no pairs to choose")
    mutate(monkeypatch)
    small = compress(dense, tmp_path / "small", "0")
    ids = tokens(dense)
    difference = (logits(small, ids) - logits(load(dense / "dense"), ids)).abs().max()
    assert difference > 1e-3, "the identity at ratio 0 would not have shown this"
