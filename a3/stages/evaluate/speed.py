"""Stage eval speed: prefill and decode tokens/s of several models, interleaved in one process.

A comparison is fair only if other load on the machine affects all models equally. So every repeat
runs each attention implementation on each model in turn, after a warm-up round, and ratios are
taken within a repeat. Timings depend on the machine and are not reproducible, so a speed record is
never part of results.csv.
"""

import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.files import write_record
from a3.core.memory import GIB, require_memory
from a3.core.progress import LOG, Bar
from a3.core.provenance import provenance
from a3.models.cost import speed_cost
from a3.models.families import family_of
from a3.models.load import require_positions
from a3.models.sizes import kv_bytes
from a3.stages.evaluate.speed_compiled import COMPILED, Compiled
from a3.stages.evaluate.speed_models import Candidate, candidates_of
from a3.stages.evaluate.speed_summary import PHASES, summary


def speed(
    folders: Sequence[Path],
    out: Path,
    *,
    rows: Sequence[dict[str, str]] = (),
    multiples: Sequence[int] = (1,),
    layers: int | None = None,
    batch: int,
    prompt: int,
    new_tokens: int,
    repeats: int,
    attention: Sequence[str],
    dtype: str,
    device: str,
    compile: bool = False,
) -> None:
    """Time models, write the record `out` (JSON) and print a summary; ratios are to the first one.

    Args:
        folders: dense and compressed Hugging Face folders; with `rows` one, dense, of which no more
            than config.json has to be there.
        rows: what compressed models to make up beside the dense one, all with random weights, as
            {"qk", "ov", "mlp", "ratio"}.
        multiples: with `rows`, each of them once with ranks that are multiples of each of these.
        layers: with `rows`, run only so many layers, and extrapolate to all of them: time inside of
            layers is multiplied, the rest stays.
        prompt: tokens of each of the `batch` sequences that one forward pass puts into the cache;
            like `generate` it makes the last token's logits only.
        new_tokens: greedy steps after it, one token a sequence each.
        attention: transformers' implementations, "eager" and "sdpa".
        compile: time decoding also with a static cache and compiled, with each of them.

    Raises:
        A3Error: numbers below one, a family without one of the implementations or with too few
        positions, models that do not fit the memory; as load_model, Plan.ranks and Compiled do.
    """
    settings = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens, "repeats": repeats}
    check(folders, rows, layers, compile, settings)
    attention = list(dict.fromkeys(attention))
    ways = [*attention, *(f"{name}{COMPILED}" for name in attention if compile)]
    candidates = candidates_of(folders, rows, multiples, layers, dtype, device)
    announce(candidates, ways, dtype, device, settings)
    subjects = [Subject(candidate, Clock(device), ways) for candidate in candidates]
    ids = some_ids(candidates, batch, prompt).to(device)
    measure(subjects, ids, new_tokens, repeats, ways)
    record = {
        **settings,
        "attention": attention,
        "compiled": ways[len(attention) :],
        "dtype": dtype,
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "weights": "random" if rows else "loaded",
        "layers": {"timed": layers, "of": candidates[0].shapes["layers"]} if layers else None,
        "models": [subject.record(batch, prompt, new_tokens, dtype) for subject in subjects],
        "provenance": provenance(__name__),
    }
    write_record(out, record)
    LOG.info(summary(record))


def check(
    folders: Sequence[Path],
    rows: Sequence[dict[str, str]],
    layers: int | None,
    compile: bool,
    settings: dict[str, int],
) -> None:
    """Raise A3Error for numbers below one, too few positions, and what random weights alone can."""
    for name, value in settings.items():
        if value < 1:
            raise A3Error(f"speed: {name} is {value}; expected 1 or more.")
    if rows and len(folders) > 1:
        raise A3Error(
            f"speed: {len(folders)} folders and a ratio: with a ratio, models with random weights "
            "get the shapes of one folder. Name one folder, or remove the ratio."
        )
    if layers is not None and not rows:
        raise A3Error(
            "speed: layers without a ratio: only models with random weights can be run in part. "
            "Name a ratio, or remove layers."
        )
    if layers is not None and compile:
        raise A3Error(
            "speed: layers with compile: inside of a compiled model no layer can be timed. Remove "
            "one of them."
        )
    for folder in folders:
        length = settings["prompt"] + settings["new_tokens"]
        require_positions(folder, length, "prompt + new_tokens")


def announce(
    candidates: list[Candidate],
    ways: list[str],
    dtype: str,
    device: str,
    settings: dict[str, int],
) -> None:
    """Print what the timing takes; raises A3Error if the models do not fit the memory."""
    shapes = [candidate.timed for candidate in candidates]
    cost = speed_cost(shapes, len(ways), dtype=dtype, **settings)
    LOG.info(
        f"speed: {len(shapes)} models in {dtype}, about {cost.memory / GIB:.1f} GiB of memory and "
        f"{cost.flops / 1e12:.3g} TFLOPs",
    )
    tokens = settings["batch"] * (settings["prompt"] + settings["new_tokens"])
    needed = sum(WIDTHS[dtype] * shape["size"]["parameters"] for shape in shapes)
    caches = [tokens * kv_bytes(shape["size"], shape["dtype"], dtype) for shape in shapes]
    # Static caches stay.
    needed += sum(caches) if any(way.endswith(COMPILED) for way in ways) else max(caches)
    what = f"speed: {len(shapes)} models and a KV cache of {tokens} tokens in {dtype}"
    if torch.device(device).type != "cuda":
        require_memory(needed, what, "Time fewer models or layers, or take a dtype of fewer bytes")
    elif needed > (free := torch.cuda.mem_get_info(device)[0]):
        raise A3Error(
            f"{what} need at least {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB of {device} "
            "are free. Time fewer models or layers, or take a dtype of fewer bytes."
        )


def some_ids(candidates: list[Candidate], batch: int, prompt: int) -> Tensor:
    """Tokens that every model has, (batch, prompt): the same ones each time."""
    vocabulary = min(candidate.shapes["vocab_size"] for candidate in candidates)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, prompt), generator=generator)


# --- timing ---
class Clock:
    """Reads the time after the device has finished all submitted work."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.device = device

    def read(self) -> float:
        """Seconds."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Seconds:
    """Of one phase: all of them, and those inside of layers (0 where that is not asked for)."""

    whole: float
    layers: float

    def extrapolated(self, times: float) -> float:
        """The seconds with this many times the layers."""
        return self.whole + (times - 1) * self.layers


@dataclass
class Subject:
    """A model in memory, and what was measured of it: by attention implementation, in order, and
    with compiled decoding.
    """

    candidate: Candidate
    clock: Clock
    ways: list[str]
    model: PreTrainedModel = field(init=False)
    samples: dict[str, list[dict[str, Seconds]]] = field(init=False)
    peaks: dict[str, list[int]] = field(init=False)
    compiled: Compiled | None = None
    cache_bytes: int = 0
    # Inside of layers; counted only where some are left out.
    layer_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.model = self.candidate.build()
        self.samples = {way: [] for way in self.ways}
        self.peaks = {way: [] for way in self.ways}
        for name in dict.fromkeys(way.removesuffix(COMPILED) for way in self.ways):
            set_attention(self.model, name, self.candidate.name)
        if self.candidate.timed["layers"] < self.candidate.shapes["layers"]:
            self.time_layers()

    def time_layers(self) -> None:
        """Add up the time from the first layer's start to the last one's end."""
        shapes = self.candidate.shapes
        family = family_of(shapes["family"], shapes["structure"], shapes.get("wrapper"))
        layers = self.model.get_submodule(f"{family.prefix}.{family.layer_path}")

        def start(*_: Any) -> None:
            self.layer_seconds -= self.clock.read()

        def stop(*_: Any) -> None:
            self.layer_seconds += self.clock.read()

        layers[0].register_forward_pre_hook(start)
        layers[-1].register_forward_hook(stop)

    def compile(self, ids: Tensor, new_tokens: int) -> None:
        """Compile what is to be, for prompts ids (B, L); raises A3Error as Compiled does."""
        length = ids.shape[1] + new_tokens
        mode = "reduce-overhead" if self.clock.on_gpu else None
        for way in self.ways:
            if way.endswith(COMPILED):
                if self.compiled is None:
                    self.compiled = Compiled(self.model, self.candidate.name, length, mode)
                set_attention(self.model, way.removesuffix(COMPILED), self.candidate.name)
                self.compiled.check(way, ids)

    def run(self, ids: Tensor, new_tokens: int, way: str = "") -> dict[str, Seconds]:
        """Prefill ids (B, L) and generate: seconds of each phase; the cache is counted."""
        seconds = {}
        options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        step: Callable[..., Any] = self.model
        if self.compiled is not None and way.endswith(COMPILED):
            step = partial(self.compiled.step, way)
            options["past_key_values"] = self.compiled.emptied()
        for phase, steps in zip(PHASES, (1, new_tokens), strict=True):
            self.layer_seconds, start = 0.0, self.clock.read()
            for _ in range(steps):
                output = (self.model if phase == PHASES[0] else step)(ids, **options)
                options["past_key_values"] = output.past_key_values
                ids = output.logits[:, -1:].argmax(-1)
            seconds[phase] = Seconds(self.clock.read() - start, self.layer_seconds)
        self.cache_bytes = held_bytes(output.past_key_values)
        return seconds

    def run_and_keep(self, way: str, ids: Tensor, new_tokens: int) -> None:
        """One sample with one attention implementation, compiled or not."""
        set_attention(self.model, way.removesuffix(COMPILED), self.candidate.name)
        if not self.clock.on_gpu or way.endswith(COMPILED):
            # What CUDA graphs and static caches hold, they held before.
            self.samples[way].append(self.run(ids, new_tokens, way))
            return
        # All models are in memory: of the peak, what was there before is taken off, and this
        # model's weights are put back.
        device = self.clock.device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.samples[way].append(self.run(ids, new_tokens, way))
        peak = torch.cuda.max_memory_allocated(device) - before
        self.peaks[way].append(peak + self.weights_bytes)

    @property
    def weights_bytes(self) -> int:
        """Of parameters and buffers."""
        return sum(w.nbytes for w in (*self.model.parameters(), *self.model.buffers()))

    def record(self, batch: int, prompt: int, new_tokens: int, dtype: str) -> dict[str, Any]:
        """The entry of this model in the record."""
        shapes, timed = self.candidate.shapes, self.candidate.timed
        size = shapes["size"]
        tokens = {"prefill": batch * prompt, "decode": batch * new_tokens}
        times = shapes["layers"] / timed["layers"]
        return {
            "name": self.candidate.name,
            **self.candidate.said,
            "size": size | {"kv_bytes_per_token": kv_bytes(size, shapes["dtype"], dtype)},
            "flops_per_token_paper": paper_flops(shapes),
            # What was in memory: of the layers that were timed.
            "weights_bytes": self.weights_bytes,
            "cache_bytes": self.cache_bytes,
            "attention": {
                way: rates(samples, tokens)
                | ({"extrapolated": rates(samples, tokens, times)} if times != 1 else {})
                | {"peak_memory_bytes": max(self.peaks[way], default=None)}
                for way, samples in self.samples.items()
            },
        }


def measure(
    subjects: Sequence[Subject], ids: Tensor, new_tokens: int, repeats: int, ways: list[str]
) -> None:
    """Every model with every attention implementation, and compiled, in turn, `repeats` times after
    a warm-up.
    """
    total = (repeats + 1) * len(ways) * len(subjects)
    with torch.inference_mode(), Bar(total=total, unit="run", desc="speed") as bar:
        for subject in subjects:
            subject.compile(ids, new_tokens)
        for repeat in range(repeats + 1):
            for way in ways:
                for subject in subjects:
                    subject.run_and_keep(way, ids, new_tokens)
                    bar.update()
            if repeat == 0:
                forget(subjects)


def forget(subjects: Sequence[Subject]) -> None:
    """Drop the samples of the round that warmed up."""
    for subject in subjects:
        for samples in subject.samples.values():
            samples.clear()
        for peaks in subject.peaks.values():
            peaks.clear()


def set_attention(model: PreTrainedModel, name: str, said: str) -> None:
    """Choose transformers' attention implementation; raises A3Error if the family has it not.

    Some families cannot change it after loading, and keep the one that they come with.
    """
    has = name != "sdpa" or model._supports_sdpa
    if has and model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    found = model.config._attn_implementation
    if found != name:
        raise A3Error(
            f"{said}: {type(model).__name__} of transformers does not support {name} attention, "
            f"only {found}. Time it with --attention {found}."
        )


def held_bytes(cache: Cache) -> int:
    """Bytes of all keys and values in a cache."""
    held = [layer for layer in cache.layers if layer.is_initialized]
    return sum(tensor.nbytes for layer in held for tensor in (layer.keys, layer.values))


def rates(
    samples: list[dict[str, Seconds]], tokens: dict[str, int], times: float = 1.0
) -> dict[str, Any]:
    """Tokens/s of each phase: median, quartiles, and every repeat's, in order."""
    found = {}
    for phase in PHASES:
        each = [tokens[phase] / sample[phase].extrapolated(times) for sample in samples]
        low, median, high = np.quantile(each, (0.25, 0.5, 0.75)).tolist()
        found[phase] = {"median": median, "quartiles": [low, high], "samples": each}
    return found


def device_name(device: str) -> str:
    """The name of the hardware, without which timings mean nothing."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


# --- what is counted and compared ---
def paper_flops(shapes: dict[str, Any]) -> int:
    """FLOPs a token as arXiv 2505.12942 counts them, from the fields of Arch and a model's size.

    The paper states ratios for LLaMA-2-13B (0.78, 0.56, 0.39 at 0.2, 0.4, 0.6) and no formula. What
    gives all three: a layer's linear maps and attention products against 1024 keys, the mean of a
    causal sequence of 2048, without embeddings and LM head; head sizes of 96, 64 and 48, which are
    (1 − c) · 128 rounded down to a multiple of 16, and intermediate sizes of (1 − c) · 13824. The
    peak memory in the same table fits these head sizes (within 2%, taking the cache for one of 4 ×
    2048 tokens) and not those of c itself. With ours (102, 76 or 77, 51 or 52) the formula says
    0.80, 0.60, 0.40. It is our exact count without the LM head.
    """
    head = 2 * shapes["hidden_size"] * shapes["vocab_size"]
    return shapes["size"]["flops_per_token"] - head
