"""The compressed model end to end on tiny Llamas: identity, emulation, cache, saving."""

import json
import random
import shutil
from copy import deepcopy
from functools import lru_cache

import pytest
import reference
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from a3.core.errors import A3Error
from a3.models.arch import load_arch
from a3.models.attention_a3 import scores_in_float32
from a3.models.checkpoint import Checkpoint
from a3.models.families import FAMILIES, REFUSED
from a3.models.family import Family
from a3.rxx.kinds import EXPERT_KINDS, KINDS
from a3.solutions import qk
from a3.solutions.modes import MODES as ALL
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.collect.collect import collect
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

MODES = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w"}
# Every family, and the variants of attention and biases that one family can have.
BIASED = {"attention_bias": True}
# GELU, since a quarter of a random ReLU layer never fires: dropping it would show nothing.
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "activation_function": "gelu"}
PARTIAL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
}
QUARTER = {"rope_parameters": PARTIAL["rope_parameters"] | {"partial_rotary_factor": 0.25}}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 40,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
ALIBI = {"alibi": True, "bias": True}
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biased": ("llama", BIASED | {"mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 24}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "bloom": ("bloom", {}),
    "cohere": ("cohere", BIASED),
    "cohere2": ("cohere2", WINDOWS),
    "falcon": ("falcon", {"multi_query": True}),
    "falcon-alibi": ("falcon", ALIBI | {"multi_query": False, "parallel_attn": False}),
    "falcon-gqa": ("falcon", GROUPED),
    "falcon-gqa-alibi": ("falcon", GROUPED | ALIBI),
    "gemma2": ("gemma2", BIASED | {"head_dim": 16, "query_pre_attn_scalar": 40}),
    "gemma3": ("gemma3_text", BIASED | GEMMA3),
    "glm": ("glm", BIASED | {"head_dim": 16}),
    "glm4": ("glm4", BIASED | {"head_dim": 16}),
    "gpt2": ("gpt2", {"n_inner": 96}),
    "gpt_neox": ("gpt_neox", PARTIAL),
    "gpt_neox-quarter": ("gpt_neox", QUARTER),
    "gpt_bigcode": ("gpt_bigcode", {"n_inner": 96}),
    "gpt_bigcode-mha": ("gpt_bigcode", {"n_inner": 96, "multi_query": False}),
    "gpt_neo": ("gpt_neo", {"window_size": 16, "attention_types": [[["global", "local"], 1]]}),
    "gptj": ("gptj", {"rotary_dim": 8, "n_inner": 96}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 16}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "olmo": ("olmo", BIASED),
    "olmo2": ("olmo2", BIASED),
    "opt": ("opt", OPT),
    "opt-post-norm": ("opt", OPT | {"do_layer_norm_before": False}),
    "mixtral": ("mixtral", MOE | {"num_local_experts": 16}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "phi": ("phi", PARTIAL),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", BIASED | {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", MOE | BIASED | {"head_dim": 16, "num_experts": 16}),
    "stablelm": ("stablelm", PARTIAL | {"use_qkv_bias": True}),
    "smollm3": ("smollm3", BIASED | {"no_rope_layers": [1, 0]}),
}
# Scalings of RoPE, for a context of ORIGINAL tokens that is exceeded.
ORIGINAL = 16
LIMIT = {"original_max_position_embeddings": ORIGINAL}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Rotates three quarters of a head, as Phi-4-mini.
LONGROPE = {
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
SCALINGS = {
    "linear": ("llama", {"factor": 4.0}, {}),
    "dynamic": ("llama", {"factor": 4.0}, {"max_position_embeddings": ORIGINAL}),
    "llama3": ("llama", LLAMA3 | LIMIT, {}),
    "yarn": ("llama", {"factor": 4.0} | LIMIT, {}),
    "longrope": ("phi3", LONGROPE, LIMIT),
}
# Characters at random: statistics of full rank, so that the solution is unique.
TEXT = "".join(random.Random(0).choices("".join(map(chr, range(32, 500))), k=3000))
SETTINGS = {
    "tokens": 2048, "block_length": 64, "seed": 0, "bos": True, "dtype": "float32", "device": "cpu",
}  # fmt: skip
FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv")
PAPER_KINDS = ("q_blocks", "k_blocks", "v_blocks", "o_proj_blocks", "down_diagonal")


def redraw(folder, seed=0):
    """Give biases a spread of 0.5 and norm gains a spread around 1: fresh ones hide mistakes.

    Matrices get a spread of 0.1 at least, so that nothing in the model is without effect.
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
    model_type, config = MODELS[request.param]
    needs(model_type)
    folder = tmp_path_factory.mktemp(request.param)
    prepare(folder, model_type, config)
    return folder


def needs(model_type):
    """Skip the tests of a family that this version of transformers does not have."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")


def prepare(folder, model_type, config):
    """Make a tiny model in `dense` and its statistics in `rxx`."""
    tiny_model(folder / "dense", model_type, **config)
    redraw(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    kinds = kinds_of(load_arch(folder / "dense"))
    outputs = {kind: folder / "rxx" / f"{kind}.safetensors" for kind in kinds}
    collect(folder / "dense", folder / "text.txt", outputs, **SETTINGS)
    save_file(reference_statistics(folder), folder / "reference.safetensors")


def kinds_of(arch):
    """Statistics that a model has: of experts, few; without RoPE, none of pairs."""
    sites = ("mlp", "mlp_input", "down", "down_input") if arch.experts else ("experts", "router")
    lacks = {kind for kind in KINDS if KINDS[kind].site in sites}
    lacks -= set(EXPERT_KINDS) if arch.experts else set()
    lacks |= set() if arch.rope_layout else {"pair_gradient"}
    return [kind for kind in KINDS if kind not in lacks]


def test_one_layer_at_a_time_gives_the_same_bytes(dense, tmp_path):
    arch = load_arch(dense / "dense")
    outputs = {kind: tmp_path / f"{kind}.safetensors" for kind in kinds_of(arch)}
    collect(dense / "dense", dense / "text.txt", outputs, **SETTINGS, stream=True)
    for kind, path in outputs.items():
        assert path.read_bytes() == (dense / "rxx" / path.name).read_bytes(), kind


def reference_statistics(folder):
    """The paper's statistics, by hooks of the test's own: R of [x, 1], d̂ × d̂, and that of down.

    For normed q and k, the mean squares of each dimension after the norm: q (H, h), k (G, h).
    """
    arch = load_arch(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    sums = {}

    def add(name, value):
        sums[name] = sums.get(name, 0) + value / SETTINGS["tokens"]

    def on_input(name):
        def hook(_, inputs):
            x = inputs[0].flatten(0, -2).double()
            if name.startswith("x") and arch.qkv_bias:
                x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
            add(name, x.T @ x)

        return hook

    def on_norm(name, heads):
        def hook(_, __, out):
            # Heads come before or after the tokens, or not apart at all.
            out = out.transpose(1, 2) if out.ndim == 4 and out.shape[1] == heads else out
            add(name, out.reshape(-1, heads, arch.head_dim).double().square().sum(0))

        return hook

    def on_experts(name):
        def hook(experts, inputs):
            for x, chosen, weights in zip(*inputs, strict=True):
                for expert, weight in zip(chosen.tolist(), weights, strict=True):
                    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
                    a = weight.double() * (experts.act_fn(gate) * up).double()
                    add(f"{name}.{expert}", a.square())
                    add(f"{name}.{expert}.count", torch.ones(1))

        return hook

    for i in range(arch.layers):
        attended = model.base_model.get_submodule(arch.adapter.module(i, "q"))
        attended.register_forward_pre_hook(on_input(f"x.{i}"))
        if arch.experts:
            experts = model.get_submodule(arch.adapter.experts_module(i))
            experts.register_forward_pre_hook(on_experts(f"down.{i}"))
        else:
            down = model.base_model.get_submodule(arch.adapter.module(i, "down"))
            down.register_forward_pre_hook(on_input(f"down.{i}"))
        if arch.qk_norm:
            attention = model.get_submodule(arch.adapter.attention_module(i))
            attention.q_norm.register_forward_hook(on_norm(f"q.{i}", arch.heads))
            attention.k_norm.register_forward_hook(on_norm(f"k.{i}", arch.kv_heads))
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    cut = {key: SETTINGS[key] for key in ("tokens", "block_length", "seed", "bos")}
    for block in token_blocks(load_documents(folder / "text.txt"), tokenizer, **cut):
        logits(model, block[None])
    return sums


def test_every_family_is_in_this_suite():
    assert {model_type for model_type, _ in MODELS.values()} == set(FAMILIES)
    assert not set(FAMILIES) & set(REFUSED)


def test_a_family_that_transformers_lacks_is_skipped_with_the_reason():
    with pytest.raises(pytest.skip.Exception, match=r"transformers .* has no quark"):
        needs("quark")


def load(folder):
    # transformers' faster experts do not know float64.
    mixture = "moe" in (folder / "config.json").read_text() or "mixtral" in str(folder)
    options = {"experts_implementation": "eager"} if mixture else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()


@lru_cache(maxsize=1)
def dense_model(folder):
    """The dense model of a folder that `prepare` made; callers leave it as it is."""
    return load(folder / "dense")


@lru_cache(maxsize=1)
def dense_logits(folder):
    """Its logits of `tokens(folder)`."""
    return logits(dense_model(folder), tokens(folder))


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
    """Compress by the paper's modes, or those given."""
    modes = modes_of(load_arch(dense / "dense")) | modes
    plan = Plan(choose(modes | {"ratio": ratio}))
    approximate(dense / "dense", dense / "rxx", plan, out)
    return load(out)


def test_ratio_zero_reproduces_the_dense_logits(dense, tmp_path):
    small = compress(dense, tmp_path / "small", "0")
    found = logits(small, tokens(dense))
    torch.testing.assert_close(found, dense_logits(dense), rtol=0, atol=2e-5)


@pytest.mark.parametrize("ratio", ["0.25", "0.5"])
@pytest.mark.parametrize("components", [("qk",), ("ov",), ("mlp",), ("qk", "ov", "mlp")])
def test_cut_model_equals_its_emulation_in_the_dense_shapes(dense, tmp_path, ratio, components):
    arch = load_arch(dense / "dense")
    modes = {
        component: mode if component in components else "dense"
        for component, mode in modes_of(arch).items()
    }
    small = compress(dense, tmp_path / "small", ratio, **modes)
    emulated = deepcopy(dense_model(dense))
    emulate(emulated, dense, ratio, components)
    ids = tokens(dense)
    expected = logits(emulated, ids)
    assert (expected - dense_logits(dense)).abs().max() > 5e-4
    torch.testing.assert_close(logits(small, ids), expected, rtol=0, atol=1e-4)


def emulate(model, dense, ratio, components):
    """Put the reference's solution, in the original shapes, into a dense model."""
    arch = load_arch(dense / "dense")
    statistics = load_file(dense / "reference.safetensors")
    keep = 1 - float(ratio)
    step = 2 if arch.rope_dims == arch.head_dim else 1
    rank = step * round(keep * arch.head_dim / step)
    for i in range(arch.layers):
        R = statistics[f"x.{i}"]
        attention = model.get_submodule(arch.adapter.attention_module(i))
        heads = split_heads(attention, arch)
        if "qk" in components and arch.qk_norm:
            norm_kept_pairs(attention, arch, statistics[f"q.{i}"], statistics[f"k.{i}"], rank)
        elif "qk" in components and arch.has_rope(i) and arch.rope_dims < arch.head_dim:
            zero_pairs_and_project(heads, arch, R, rank)
        elif "qk" in components and arch.has_rope(i):
            zero_pairs(heads, arch.head_dim, R, rank)
        elif "qk" in components:
            half = reference.root(R)[0]
            partners = (rows(*heads["q"]).mT @ half).unflatten(0, (arch.kv_heads, -1))
            project(heads["k"], partners, R, rank)
        if "ov" in components:
            o = output(model.base_model.get_submodule(arch.adapter.module(i, "o")))
            partners = o.unflatten(0, (arch.kv_heads, -1, arch.head_dim))
            project(heads["v"], partners, R, round(keep * arch.head_dim))
        join_heads(attention, arch, heads)
        if "mlp" in components and arch.experts:
            mask_experts(model.get_submodule(arch.adapter.experts_module(i)), statistics, i, keep)
        elif "mlp" in components:
            linear = model.base_model.get_submodule(arch.adapter.module(i, "down"))
            score = statistics[f"down.{i}"].diagonal() * output(linear).square().sum(1)
            kept = score.argsort(descending=True)[: round(keep * len(score))]
            mask = torch.zeros_like(score).index_fill(0, kept, 1)
            output(linear).mul_(mask[:, None])


def mask_experts(experts, statistics, layer, keep):
    """Zero channels of each expert; one more token has the mean square of all experts' channels."""
    names = [f"down.{layer}.{expert}" for expert in range(experts.num_experts)]
    power = [statistics.get(name, torch.zeros(96)) for name in names]
    count = sum(statistics.get(f"{name}.count", 0) for name in names) * SETTINGS["tokens"]
    for down, own in zip(experts.down_proj.data, power, strict=True):
        more = sum(other.mean() for other in power) / count
        score = (own + more) * down.square().sum(0)
        down[:, score.argsort()[: len(score) - round(keep * len(score))]] = 0


def output(linear):
    """The weight of a projection as x W, a view."""
    return linear.weight.data if isinstance(linear, Conv1D) else linear.weight.data.T


INTERLEAVED = ("bloom", "falcon", "gpt_neox")


def places(attention, arch):
    """Where the heads of q, k and v are: the module, and the rows (heads, h) of its weight.

    RoPE pairs are in halves.
    """
    h, H, G = arch.head_dim, arch.heads, arch.kv_heads
    fused = next((m for m in map(attention.__dict__["_modules"].get, FUSED) if m), None)
    if fused is None:
        modules = [getattr(attention, f"{projection}_proj") for projection in "qkv"]
        places = [torch.arange(count * h).view(-1, h) for count in (H, G, G)]
    else:
        modules = [fused] * 3
        each = torch.arange((H + 2 * G) * h).view(-1, h)
        if arch.family in INTERLEAVED or (arch.family == "gpt_bigcode" and G == H):
            groups = each.view(G, -1, h)
            places = [groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]]
        else:
            places = list(each.split((H, G, G)))
    if arch.rope_layout == "neighbours":
        d = arch.rope_dims
        order = [*range(0, d, 2), *range(1, d, 2), *range(d, h)]
        places[:2] = [place[:, order] for place in places[:2]]
    return dict(zip("qkv", zip(modules, places, strict=True), strict=True))


def split_heads(attention, arch):
    """Copies of q, k and v by head, weight (heads, h, d) and bias (heads, h) or None."""
    return {
        projection: (
            output(module).T[place],
            None if module.bias is None else module.bias.data[place],
        )
        for projection, (module, place) in places(attention, arch).items()
    }


def join_heads(attention, arch, heads):
    """Put the heads back into the dense model."""
    for projection, (module, place) in places(attention, arch).items():
        weight, bias = heads[projection]
        output(module).T[place] = weight
        if bias is not None:
            module.bias.data[place] = bias


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
        zero_pairs(projection_of(tried, slice(0, d)), d, R, 2 * pairs)
        others = projection_of(tried, slice(d, None))
        partners = (rows(*others["q"]).mT @ half).unflatten(0, (arch.kv_heads, -1))
        project(others["k"], partners, R, rank - 2 * pairs)
        lost = score_error(heads, tried, half)
        if best is None or lost < best[0]:
            best = (lost, tried)
    for projection in "qk":
        for old, new in zip(heads[projection], best[1][projection], strict=True):
            if old is not None:
                old.copy_(new)


def norm_kept_pairs(attention, arch, mq, mk, rank):
    """Normed q, k: norms over the kept dimensions, times the least-squares scalar of each head."""
    h, groups = arch.head_dim, arch.kv_heads
    score = mq.unflatten(0, (groups, -1)).sum(1) * mk
    pairs = score.unflatten(-1, (2, -1)).sum(-2).argsort(descending=True)[:, : rank // 2]
    mask = torch.zeros(groups, h).double()
    mask.scatter_(1, torch.cat((pairs, pairs + h // 2), dim=1), 1.0)
    for name, power in (("q_norm", mq), ("k_norm", mk)):
        of_head = mask.repeat_interleave(len(power) // groups, dim=0)
        dense = getattr(attention, name)
        setattr(attention, name, KeptNorm(dense, of_head, power, arch))


class KeptNorm(torch.nn.Module):
    """A family's norm over some dimensions of each head only."""

    def __init__(self, dense, mask, power, arch):
        super().__init__()
        gain = dense.weight.data.double() + (1 if arch.family == "gemma3_text" else 0)
        self.gain = gain.view(mask.shape) if arch.qk_norm == "layer" else gain.expand(mask.shape)
        self.mask, self.eps = mask, arch_eps(dense)
        self.dims = (-2, -1) if arch.qk_norm == "layer" else (-1,)
        normed = power / self.gain**2
        kept = (normed * mask).sum(self.dims, keepdim=True) / mask.sum(self.dims, keepdim=True)
        self.scalar = (kept / normed.mean(self.dims, keepdim=True)).sqrt()

    def forward(self, x):
        last = x.ndim == 4 and x.shape[1] == len(self.mask)
        heads = (x.transpose(1, 2) if last else x).reshape(*x.shape[:1], -1, *self.mask.shape)
        count = self.mask.sum(self.dims, keepdim=True)
        power = (heads * self.mask).square().sum(self.dims, keepdim=True) / count
        out = heads * self.mask * (power + self.eps).rsqrt() * self.gain * self.scalar
        return out.transpose(1, 2) if last else out.reshape(x.shape)


def arch_eps(norm):
    """Llama's norms call it variance_epsilon, Gemma's eps."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def projection_of(heads, dims):
    """Views of some dimensions of each head."""
    return {
        projection: (w[:, dims], None if b is None else b[:, dims])
        for projection, (w, b) in heads.items()
    }


def clone(heads):
    return {
        projection: (w.clone(), None if b is None else b.clone())
        for projection, (w, b) in heads.items()
    }


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
    for projection in "qk":
        weight, bias = heads[projection]
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
        # Falcon's new decoder caches its key and value heads once for each query head.
        new = kind == "dense" and getattr(model.config, "new_decoder_architecture", False)
        copies = arch.heads // arch.kv_heads if new else 1
        assert live == 7 * said["kv_bytes_per_token"] * copies
    assert record["size"]["compressed"]["parameters"] < record["size"]["dense"]["parameters"]
    shape = Checkpoint(tmp_path / "small").shape
    ranks = {component: record["layers"][0][component]["rank"] for component in ("ov", "mlp")}
    name = arch.adapter.packed_name(0, "v")
    assert shape(name) == (arch.kv_heads * ranks["ov"], 64)
    if not arch.experts:
        assert ranks["mlp"] in shape(arch.adapter.name(0, "down"))


def test_all_experts_are_compressed_and_their_tokens_reported(dense, tmp_path, caplog):
    arch = load_arch(dense / "dense")
    if not arch.experts:
        pytest.skip("no experts")
    with caplog.at_level("INFO", logger="a3"):
        compress(dense, tmp_path / "small", "0.5")
    record = json.loads((tmp_path / "small" / "approx.json").read_text())
    few = 0
    for layer, report in enumerate(record["layers"]):
        said = report["mlp"]
        assert sum(said["expert_tokens"]) == SETTINGS["tokens"] * arch.experts_per_token
        for expert in range(arch.experts):
            name = arch.adapter.packed_name(layer, "down", "weight", expert)
            assert Checkpoint(tmp_path / "small").shape(name) == (64, 48)
        assert said["expert_ranks"] == [48] * arch.experts
        own = sum(count < 256 for count in said["expert_tokens"])
        assert said["expert_shrinkage"] == [
            pytest.approx(1 / (count + 1), abs=1e-6) for count in said["expert_tokens"]
        ]
        few += own
        says = f"layer {layer}: fewer than 256 calibration tokens reached {own} of 16 experts"
        assert (says in caplog.text) == bool(own)
    assert 0 < few < arch.experts * arch.layers


def test_generate_with_cache_equals_without(dense, tmp_path):
    small = compress(dense, tmp_path / "small", "0.25")
    ids = tokens(dense, count=9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    expected = small.generate(ids, use_cache=False, **options)
    # Dense models of these have no static cache either: transformers takes it to be as long as the
    # prompt for Falcon's ALiBi, and its end for the present in GPT-Neo's local layers.
    alibi = small.config.a3["family"] == "falcon" and small.config.alibi
    static = () if alibi or small.config.a3["family"] == "gpt_neo" else ("static",)
    for cache in ("dynamic", *static):
        found = small.generate(ids, cache_implementation=cache, disable_compile=True, **options)
        torch.testing.assert_close(found, expected)
    # A shorter prompt beside a longer one, padded on the left, goes on as it does alone.
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = ids.masked_fill(mask == 0, options["pad_token_id"])
    alone = small.float().generate(ids[1:, 3:], **options)
    both = small.generate(padded, attention_mask=mask, **options)
    torch.testing.assert_close(both[1:, 3:], alone)
    # OLMo's tables of RoPE are float32 in any dtype.
    assert small.bfloat16().generate(ids, **options).shape == expected.shape


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
    ("component", "mode"),
    [("qk", "rxx-w-rxx-uniform"), ("ov", "axkv"), ("ov", "identity"), ("mlp", "rxx")],
)
def test_other_modes_load_and_reproduce_at_full_rank(dense, tmp_path, component, mode):
    arch = load_arch(dense / "dense")
    if component == "qk" and not arch.rope_layout:
        pytest.skip("the mode does not fit this model")
    ids = tokens(dense)
    only = dict.fromkeys(MODES, "dense") | {component: mode}
    full = compress(dense, tmp_path / "full", "0", **only)
    torch.testing.assert_close(logits(full, ids), dense_logits(dense), rtol=0, atol=2e-5)
    assert torch.isfinite(logits(compress(dense, tmp_path / "small", "0.5", **only), ids)).all()


@pytest.mark.parametrize("plus", [{"qk": "fisher", "ov": "joint", "mlp": "obs"}, {"mlp": "ls"}])
def test_modes_past_the_paper_reproduce_at_full_rank(dense, tmp_path, plus):
    """All that fit at once; at half the rank they are finite."""
    arch = load_arch(dense / "dense")
    kinds = {
        "qk": arch.attention,
        "ov": arch.attention,
        "mlp": "experts" if arch.experts else arch.mlp,
    }
    fitting = {
        component: mode
        for component, mode in plus.items()
        if kinds[component] in ALL[component][mode].fits
    }
    if not fitting:
        pytest.skip("the mode does not fit this model")
    only = dict.fromkeys(MODES, "dense") | fitting
    ids = tokens(dense)
    full = compress(dense, tmp_path / "full", "0", **only)
    torch.testing.assert_close(logits(full, ids), dense_logits(dense), rtol=0, atol=2e-5)
    small = logits(compress(dense, tmp_path / "small", "0.5", **only), ids)
    assert torch.isfinite(small).all()


@pytest.mark.parametrize("rope_type", SCALINGS)
def test_scaled_rope_beyond_the_original_context(tmp_path, rope_type):
    model_type, values, config = SCALINGS[rope_type]
    rope = {"rope_theta": 1e4, "rope_type": rope_type} | values
    prepare(tmp_path, model_type, config | {"rope_parameters": rope})
    ids, dense = tokens(tmp_path), tmp_path / "dense"
    expected = logits(load(dense), ids)
    default = rope | {"rope_type": "default"}
    plain = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float64, rope_parameters=default
    )
    assert (logits(plain, ids) - expected).abs().max() > 1e-3

    full = compress(tmp_path, tmp_path / "full", "0")
    torch.testing.assert_close(logits(full, ids), expected, rtol=0, atol=2e-5)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    start = ids[:, : ORIGINAL - 4]
    torch.testing.assert_close(
        compress(tmp_path, tmp_path / "again", "0").generate(start, **options),
        load(dense).generate(start, **options),
    )

    small = compress(tmp_path, tmp_path / "small", "0.5", ov="dense", mlp="dense")
    emulated = load(dense)
    emulate(emulated, tmp_path, "0.5", ("qk",))
    torch.testing.assert_close(logits(small, ids), logits(emulated, ids), rtol=0, atol=1e-4)


def test_scores_in_float32_do_not_overflow_in_half_precision():
    module = torch.nn.Module()
    module.num_key_value_groups = 1
    q = torch.full((1, 1, 2, 8), 200.0, dtype=torch.float16)
    v = torch.ones(1, 1, 2, 4, dtype=torch.float16)
    out, _ = scores_in_float32(module, q, q, v, None, scaling=1.0)
    assert (q @ q.mT).isinf().all()
    torch.testing.assert_close(out, torch.ones_like(out))


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "small"
    tiny_llama(dense)
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(dense)
    (tmp_path / "text.txt").write_text(TEXT)
    outputs = {kind: tmp_path / "rxx" / f"{kind}.safetensors" for kind in PAPER_KINDS}
    collect(dense, tmp_path / "text.txt", outputs, **SETTINGS)
    plan = Plan(choose(MODES | {"ratio": "0.2"}))
    approximate(dense, tmp_path / "rxx", plan, small)
    assert load_arch(dense).dtype == "bfloat16"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert Checkpoint(small).dtype(name) == "bfloat16"


def drop_bias(monkeypatch):
    whole = Family._rows

    def rows_without(self, checkpoint, layer, projection, fields, expert=None):
        W = whole(self, checkpoint, layer, projection, fields, expert)
        if projection in "qkv" and self.has_bias(projection, fields):
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


def keep_layout(monkeypatch):
    """Leave pairs that are neighbours as they are."""
    monkeypatch.setattr(Family, "in_halves", lambda self, rows, fields: rows)


def wrong_scale(monkeypatch):
    """All families ask their adapter for the scale."""
    for family in {type(family) for family in FAMILIES.values()}:
        right = family.scaling
        wrong = lambda self, config, h, right=right: 1.1 * right(self, config, h)  # noqa: E731
        monkeypatch.setattr(family, "scaling", wrong)


@pytest.mark.parametrize("mutate", [drop_bias, swap_layout, keep_layout, wrong_scale])
def test_a_mistake_in_an_adapter_would_be_seen(dense, tmp_path, monkeypatch, mutate):
    arch = load_arch(dense / "dense")
    if mutate is drop_bias and not arch.qkv_bias:
        pytest.skip("no biases to drop")
    if mutate is swap_layout and not arch.rope_layout:
        pytest.skip("no pairs to choose")
    if mutate is keep_layout and arch.rope_layout != "neighbours":
        pytest.skip("pairs are in halves")
    expected = dense_logits(dense)
    copy = shutil.copytree(dense, tmp_path / "copy")  # which is described anew
    mutate(monkeypatch)
    try:
        small = compress(copy, tmp_path / "small", "0")
    except A3Error:
        return  # the description is held to the modules that transformers builds
    difference = (logits(small, tokens(dense)) - expected).abs().max()
    assert difference > 1e-3, "the identity at ratio 0 would not have shown this"
