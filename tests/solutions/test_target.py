"""Targets in the user's units: how they are spelled, and what of them is refused."""

from decimal import Decimal

import pytest

from a3.core.dtypes import GGUF_BLOCKS
from a3.core.errors import A3Error
from a3.solutions.modes import PRESETS, choose
from a3.solutions.target import Target


def test_blocks_are_those_of_the_gguf_package():
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, sizes in GGUF_BLOCKS.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]] == sizes


@pytest.mark.parametrize(
    ("said", "text", "target"),
    [
        ({"fit": "300MB"}, "fit@300MB", Target(fit=300_000_000)),
        ({"fit": "1.5 GiB"}, "fit@1.610612736GB", Target(fit=3 * 2**29)),
        ({"fit": "80000kB:q8_0"}, "fit@80MB:q8_0", Target(fit=80_000_000, type="q8_0")),
        (
            {"fit": "0.3GB:bfloat16"},
            "fit@300MB:bfloat16",
            Target(fit=300_000_000, type="bfloat16"),
        ),
        ({"params": "100M"}, "params@100M", Target(params=100_000_000)),
        ({"params": "250000"}, "params@0.25M", Target(params=250_000)),
        ({"params": "1.50B"}, "params@1.5B", Target(params=1_500_000_000)),
        ({"max_loss": "0.050"}, "max-loss@0.05", Target(max_loss=Decimal("0.050"))),
        (
            {"flops": "0.70", "kv_cache": "0.5", "fit": "10MB"},
            "fit@10MB,kv-cache@0.5,flops@0.7",
            Target(fit=10**7, kv_cache=Decimal("0.5"), flops=Decimal("0.7")),
        ),
    ],
)
def test_targets_have_one_spelling(said, text, target):
    assert Target.of(said) == target
    assert str(target) == text
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fit@300", "expected a size with its unit"),
        ("fit@300mb", "expected a number above 0 such as 300MB"),
        ("fit@0MB", "expected a number above 0"),
        (
            "fit@300MB:q9",
            r"type is 'q9'; expected float32, bfloat16, float16 \(of the folder\), f32",
        ),
        ("fit@300000kB", "spell it 'fit@300MB'"),
        ("params@0.4", "expected a number above 0 such as 100M"),
        ("kv-cache@1", "a share of the dense model's, between 0 and 1"),
        ("kv-cache@0.50", "spell it 'kv-cache@0.5'"),
        ("flops@-0.5", "between 0 and 1"),
        ("max-loss@0", "expected nats above 0"),
        ("max-loss@nan", "expected nats above 0"),
        ("loss@0.1", "expected a ratio such as 0.2, or targets"),
        ("kv-cache@0.5,fit@10MB", "spell it 'fit@10MB,kv-cache@0.5'"),
        ("fit@10MB,fit@20MB", "spell it 'fit@20MB'"),
        ("fit@10MB,", "expected a ratio such as 0.2, or targets"),
    ],
)
def test_other_spellings_are_refused_in_a_line(text, says):
    with pytest.raises(A3Error, match=says) as caught:
        choose(PRESETS["a3-plus"] | {"ratio": text})
    assert "\n" not in str(caught.value)


def test_targets_are_of_modes_that_allocate():
    row = {"qk": "dense", "ov": "dense", "ratio": "fit@10MB"}
    assert choose(row | {"mlp": "obs~"})["mlp"].size == Target(fit=10**7)
    for mlp in ("obs", "obs@0.2", "svd"):
        with pytest.raises(A3Error, match=r"is for modes whose ranks are allocated. Take obs~"):
            choose(row | {"mlp": mlp})
