"""A static cache holds each layer's own keys and values: the tokens are those of a dynamic one."""

import pytest
import torch
from tiny import small_model
from transformers import StaticCache

from a3.models.load import load_model

PLUS = ["--preset", "a3-plus"]
WINDOWS = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
# RoPE pairs by group; windows and normed heads; the family's own attention code.
FEW = {
    "llama": ({}, PLUS),
    "gemma3_text": (WINDOWS, PLUS),
    "hunyuan_v1_dense": ({"head_dim": 16}, []),
}
PROMPT, NEW = 11, 14


@pytest.fixture(scope="module", params=FEW)
def model(request, tmp_path_factory):
    """A compressed model; with ranks by layer, QK and OV of other sizes."""
    folder = tmp_path_factory.mktemp(request.param)
    return load_model(small_model(folder, request.param, *FEW[request.param]), "float32")


def generated(model, **options):
    """Greedy tokens after two prompts."""
    ids = torch.randint(2, 300, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": NEW}
    return model.generate(ids, **plain, **options)


def test_the_tokens_are_those_of_a_dynamic_cache(model):
    expected, cache = generated(model), StaticCache(model.config, max_cache_len=PROMPT + NEW)
    found = generated(model, past_key_values=cache, disable_compile=True)
    torch.testing.assert_close(found, expected)
    a3 = model.config.a3
    assert [layer.keys.shape[-1] for layer in cache.layers] == a3["qk_ranks"]
    assert [layer.values.shape[-1] for layer in cache.layers] == a3["ov_ranks"]
    # The cache is made before anything is known of the first keys.
    static = {"cache_implementation": "static", "disable_compile": True}
    found = generated(model, prefill_chunk_size=4, **static)
    torch.testing.assert_close(found, expected)


def test_compiled_steps_give_the_same_tokens(model):
    torch._dynamo.reset()
    ids = torch.randint(2, 300, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    cache, found = StaticCache(model.config, max_cache_len=PROMPT + NEW), [ids]
    # The same graph without the code generator, in one piece.
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache).logits
        for _ in range(NEW):
            found.append(logits[:, -1:].argmax(-1))
            logits = step(found[-1], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat(found, 1), generated(model))
