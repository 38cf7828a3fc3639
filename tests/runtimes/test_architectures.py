"""Which of llama.cpp's architectures take MLPs of other sizes by layer: tiny random models.

A model whose second MLP lacks channels is compared with the one in which they are zeros. An
architecture that takes one size only refuses the file.
"""

import numpy as np
import pytest
from asking import ask
from gguf import GGUFReader
from gguf_files import changed, tiny_gguf

TOKENS = list(range(5, 45))
# Heads, groups, size of a head, hidden and intermediate size, and what the cut MLP keeps.
HEADS, GROUPS, SIZE, HIDDEN, WIDE, KEPT = 4, 2, 16, 64, 96, 32
WINDOWS = {
    "attention.sliding_window": 16,
    "attention.sliding_window_pattern": [True, False, True],
    "rope.freq_base_swa": 1e4,
}
# Sliding and full layers of one head size, and no further inputs of a layer.
OF_GEMMA4 = {
    "embedding_length_per_layer_input": 0,
    "attention.key_length_swa": SIZE,
    "attention.value_length_swa": SIZE,
    "rope.dimension_count_swa": SIZE,
}
OF_MAMBA = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 1,
    "attention.head_count_kv": [0, GROUPS, 0, 0],
    "attention.layer_norm_epsilon": 1e-5,
}
KEYS = {
    "gemma2": WINDOWS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": WINDOWS,
    "gemma3n": WINDOWS,
    "gemma4": WINDOWS | OF_GEMMA4,
    "nemotron_h": OF_MAMBA,
    "phi3": {"rope.scaling.original_context_length": 512},
    "granite": {"logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0}
    | {"attention.scale": 0.25},
}
TAKES = ("deci", "openelm", "gemma4", "nemotron_h")
REFUSES = ("llama", "mistral3", "qwen2", "qwen3", "phi3", "granite", "smollm3", "olmo2", "gemma2")
REFUSES += ("gemma3", "gemma3n")

RANDOM = np.random.default_rng(0)


def drawn(*shape):
    """Random weights."""
    return (RANDOM.standard_normal(shape) * 0.1).astype(np.float32)


def ones(size):
    """Gains of a norm."""
    return np.ones(size, np.float32)


def tensors_of(arch, plain, layers):
    """The tensors of a tiny model of an architecture, made of Llama's, `plain`."""
    tensors = dict(plain)
    for i in range(layers):
        block = f"blk.{i}."
        if arch in ("qwen3", "openelm", "gemma3", "gemma3n", "gemma4"):
            tensors |= {f"{block}attn_{one}_norm.weight": ones(SIZE) for one in "qk"}
        if arch.startswith("gemma") or arch == "olmo2":
            names = ("post_attention_norm", "post_ffw_norm")
            tensors |= {f"{block}{name}.weight": ones(HIDDEN) for name in names}
        if arch == "olmo2":
            for name in ("attn_norm", "ffn_norm"):
                del tensors[f"{block}{name}.weight"]
            tensors[f"{block}attn_q_norm.weight"] = ones(HEADS * SIZE)
            tensors[f"{block}attn_k_norm.weight"] = ones(GROUPS * SIZE)
        if arch in ("openelm", "phi3"):
            parts = [tensors.pop(f"{block}attn_{one}.weight") for one in "qkv"]
            tensors[f"{block}attn_qkv.weight"] = np.concatenate(parts)
        if arch == "phi3":
            parts = [tensors.pop(f"{block}ffn_{one}.weight") for one in ("gate", "up")]
            tensors[f"{block}ffn_up.weight"] = np.concatenate(parts)
        if arch == "gemma3n":
            tensors |= altup(block)
        if arch == "nemotron_h":
            one_of_three(tensors, block, i)
    if arch in ("openelm", "gemma2", "gemma3", "gemma3n", "gemma4"):
        del tensors["output.weight"]
    if arch == "gemma4":
        tensors["rope_freqs.weight"] = ones(SIZE // 2)
    if arch == "gemma3n":
        tensors |= {
            "altup_proj.weight": drawn(3, HIDDEN, HIDDEN),
            "altup_unembd_proj.weight": drawn(3, HIDDEN, HIDDEN),
            "per_layer_token_embd.weight": drawn(300, 256 * layers),
            "per_layer_model_proj.weight": drawn(256 * layers, HIDDEN),
            "per_layer_proj_norm.weight": ones(256),
        }
    return tensors


def altup(block):
    """What a layer of Gemma 3n has besides Gemma 3's."""
    shapes = {
        "inp_gate": (256, HIDDEN),
        "proj": (HIDDEN, 256),
        "altup_correct_coef": (4, 4),
        "altup_predict_coef": (16, 4),
        "altup_router": (4, HIDDEN),
        "laurel_l": (64, HIDDEN),
        "laurel_r": (HIDDEN, 64),
    }
    gains = ("post_norm", "altup_correct_scale", "altup_router_norm", "laurel_post_norm")
    found = {f"{block}{name}.weight": drawn(*shape) for name, shape in shapes.items()}
    return found | {f"{block}{name}.weight": ones(HIDDEN) for name in gains}


def one_of_three(tensors, block, layer):
    """Leave of a layer what Nemotron-H has of it: a Mamba first, then attention, then MLPs."""
    lost = ["ffn_gate", "ffn_norm", *(["ffn_up", "ffn_down"] if layer < 2 else [])]
    lost += [] if layer == 1 else ["attn_q", "attn_k", "attn_v", "attn_output"]
    for name in lost:
        del tensors[f"{block}{name}.weight"]
    if layer == 0:
        shapes = {"ssm_in.weight": (164, HIDDEN), "ssm_conv1d.weight": (96, 4)}
        shapes |= {"ssm_conv1d.bias": (96,), "ssm_dt.bias": (4,), "ssm_d": (4, 1)}
        shapes |= {"ssm_out.weight": (HIDDEN, 64)}
        tensors |= {f"{block}{name}": drawn(*shape) for name, shape in shapes.items()}
        tensors[f"{block}ssm_a"] = -np.abs(drawn(4, 1))
        tensors[f"{block}ssm_norm.weight"] = np.ones((1, 64), np.float32)


def cut(tensors, layer, zeros):
    """The tensors with fewer channels of a layer's MLP, or with zeros in their place."""
    found = dict(tensors)
    for name in ("gate", "up"):
        key = f"blk.{layer}.ffn_{name}.weight"
        if key in found:
            parts = np.split(found[key], len(found[key]) // WIDE)
            kept = [np.where(np.arange(WIDE)[:, None] < KEPT, one, 0) for one in parts]
            found[key] = np.concatenate([one if zeros else one[:KEPT] for one in kept])
    key = f"blk.{layer}.ffn_down.weight"
    down = np.where(np.arange(WIDE) < KEPT, found[key], 0)
    found[key] = down if zeros else down[:, :KEPT]
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A function: a tiny Llama's file of so many layers, its tensors and keys."""

    def make(layers):
        folder = tmp_path_factory.mktemp("llama")
        path = tiny_gguf(folder, "llama", num_hidden_layers=layers)
        reader = GGUFReader(path)
        fields = reader.fields.items()
        own = {name: field.contents() for name, field in fields if name.startswith("llama.")}
        return path, {one.name: np.array(one.data) for one in reader.tensors}, own

    return make


@pytest.mark.parametrize("arch", [*TAKES, *REFUSES])
def test_sizes_by_layer(llama, tmp_path, arch):
    layers = 4 if arch == "nemotron_h" else 3
    path, plain, own = llama(layers)
    tensors = tensors_of(arch, plain, layers)
    wide = [0, 0, WIDE, WIDE] if arch == "nemotron_h" else [WIDE] * layers
    last = layers - 1
    named = own | {f"llama.{key}": value for key, value in KEYS.get(arch, {}).items()}
    named |= {"llama.attention.key_length": SIZE, "llama.attention.value_length": SIZE}
    keys = {f"{arch}{name.removeprefix('llama')}": value for name, value in named.items()}
    keys |= {"general.architecture": arch}

    def logits(name, tensors, sizes):
        sizes = sizes[0] if len(set(sizes)) == 1 else sizes
        said = keys | {f"{arch}.feed_forward_length": sizes}
        without = [*own, *(one for one in plain if one not in tensors)]
        changed(path, tmp_path / name, keys=said, tensors=tensors, without=without)
        return ask(tmp_path / name, {"tokens": TOKENS, "caches": ["f32"], "texts": []})[
            "logits_f32"
        ]

    zeros = logits("zeros.gguf", cut(tensors, last, zeros=True), wide)
    smaller = cut(tensors, last, zeros=False), [*wide[:-1], KEPT]
    if arch in REFUSES:
        with pytest.raises(AssertionError, match=r"llama\.cpp does not load"):
            logits("smaller.gguf", *smaller)
        return
    found = logits("smaller.gguf", *smaller)
    print(f"{arch}: largest difference {np.abs(found - zeros).max():.2g}")
    assert np.abs(logits("whole.gguf", tensors, wide) - zeros).max() > 0.1
    np.testing.assert_allclose(found, zeros, atol=2e-5)
