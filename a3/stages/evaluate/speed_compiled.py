"""Decoding with a static cache and torch.compile, as `generate` of transformers does it.

The prompt is read without compilation, since its length would be compiled in; each token after it
is one call of the compiled model. On a GPU the calls are CUDA graphs (mode "reduce-overhead"),
which launch a token's kernels at once. The cache has room for all tokens from the start, and stays
where it is: a graph would be recorded again for another one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from a3.core.errors import A3Error

# Said after an implementation of attention: its decoding was compiled.
COMPILED = ", compiled"

# By how much of the largest logit compiled and other logits may differ, in dtypes of 8 to 11 bits
# and in others. A cache that the family cannot use gives others altogether.
NEAR = {torch.bfloat16: 0.1, torch.float16: 0.1}
NEAR_OTHERWISE = 1e-3


@dataclass
class Compiled:
    """A model in memory whose decoding is compiled, for `length` tokens of prompt and answer."""

    model: PreTrainedModel
    name: str
    length: int
    mode: str | None
    cache: StaticCache = field(init=False)
    steps: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise A3Error(
                f"{self.name}: transformers has no static cache for {type(self.model).__name__} "
                f"({type(error).__name__}: {error}). Leave out --compile."
            ) from error

    def emptied(self) -> Cache:
        """The cache, without tokens, at the same address."""
        self.cache.reset()
        return self.cache

    def step(self, attention: str, ids: Tensor, **options: Any) -> Any:
        """The model's output for one token of each sequence, ids (B, 1)."""
        if attention not in self.steps:
            # All models share the code of one `forward`. Only isolated does each of them have
            # versions of its own, of which there may be few.
            self.steps[attention] = torch.compile(
                self.model.forward, mode=self.mode, isolate_recompiles=True
            )
        if self.mode is not None:
            # The output of the step before may be overwritten.
            torch.compiler.cudagraph_mark_step_begin()
        try:
            return self.steps[attention](ids, **options)
        except TorchDynamoException as error:
            raise A3Error(
                f"{self.name}: torch.compile cannot compile it ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}). It needs a C++ compiler (g++). Leave out "
                "--compile."
            ) from error

    def check(self, attention: str, ids: Tensor) -> None:
        """Raise A3Error unless the first token after ids (B, L) has the logits that it has without
        a static cache and compilation, up to rounding. Compiles the step.
        """
        options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        plain = self.model(ids, **options)
        token = plain.logits[:, -1:].argmax(-1)
        wanted = self.model(token, past_key_values=plain.past_key_values, **options).logits
        self.model(ids, past_key_values=self.emptied(), **options)
        found = self.step(attention, token, past_key_values=self.cache, **options).logits
        error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= NEAR.get(wanted.dtype, NEAR_OTHERWISE):
            raise A3Error(
                f"{self.name}: with a static cache and compiled, the logits of the next token "
                f"differ by {error:.2g} of the largest: this family cannot use such a cache. Leave "
                "out --compile."
            )
