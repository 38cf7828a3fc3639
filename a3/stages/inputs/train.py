"""Stage train: trains a small model of any architecture from scratch in minutes.

This is for attention types without a small published model. The result writes poor text, but it
predicts its text far better than token frequencies alone do, so compression can damage it
measurably.
"""

import difflib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from a3.artifacts.targets import TRAINED
from a3.core.errors import A3Error
from a3.core.files import whole_folder, write_record
from a3.core.progress import LOG, Bar
from a3.core.provenance import provenance
from a3.models.checkpoint import hash_files
from a3.models.load import load_tokenizer
from a3.models.tokenizer import differences
from a3.texts.blocks import token_blocks
from a3.texts.reading import Document, load_documents, text_sha256

BOS, EOS = "<s>", "</s>"

# Shares of the steps: the learning rate rises in the first; the loss is told of the last.
WARMUP = FINAL = 0.1


@dataclass(frozen=True)
class Recipe:
    """The `train` of a model's source; `workflow/schemas/config.schema.yaml` describes its keys."""

    config: dict[str, Any]
    text: str
    vocab_size: int
    steps: int
    batch_size: int
    block_length: int
    learning_rate: float
    seed: int


def read_recipe(source: dict[str, Any]) -> Recipe:
    """The recipe of a model's source; raises A3Error for another source and other keys."""
    given = source.get("train")
    expected = {field.name for field in fields(Recipe)}
    if (
        not isinstance(given, dict)
        or given.keys() != expected
        or "model_type" not in given["config"]
    ):
        raise A3Error(
            f"source {source}: expected train with the keys {', '.join(sorted(expected))}, and "
            "model_type in config. Correct it."
        )
    return Recipe(**given)


def train(recipe: Recipe, text: Path, out: Path) -> None:
    """Train tokenizer and model on the documents `text`; write the Hugging Face folder `out`.

    train.json in it has the recipe, each step's loss and what unigram statistics alone would give.
    The same recipe, text and number of threads give the same bytes. Raises A3Error for a config
    that transformers does not know, a text too short, and a loss that is not finite.
    """
    documents = load_documents(text)
    tokenizer = train_tokenizer(documents, recipe.vocab_size)
    model = new_model(recipe, tokenizer)
    tokenizer = as_read(tokenizer, model.config)
    wanted = recipe.steps * recipe.batch_size * recipe.block_length
    blocks = token_blocks(
        documents, tokenizer, recipe.block_length, max(wanted, 1), recipe.seed, bos=True
    )
    parameters = sum(weight.numel() for weight in model.parameters())
    LOG.info(
        f"train: {recipe.config['model_type']} of {parameters / 1e6:.1f} M parameters, "
        f"{recipe.steps} steps of {recipe.batch_size} blocks of {recipe.block_length}: {wanted} "
        f"tokens, {wanted / blocks.numel():.1f} times over {blocks.numel()} of the text; "
        f"{6 * parameters * wanted / 1e12:.1f} TFLOPs",
    )
    start = time.perf_counter()
    losses = fit(model, recipe, blocks)
    if hasattr(model.config, "output_router_logits"):
        # Their loss, which keeps all experts in use, is of training only.
        model.config.output_router_logits = False
    loss, unigrams = final(losses), unigram_loss(blocks[:, 1:])
    LOG.info(
        f"train: {time.perf_counter() - start:.0f} s; loss {loss:.3f} nats a token at the end, "
        f"unigram statistics alone {unigrams:.3f}"
    )
    record = provenance(__name__, recipe=asdict(recipe), text_sha256=text_sha256(text))
    with whole_folder(out, TRAINED.seal) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report = {"loss": loss, "unigram_loss": unigrams, "losses": losses}
        made = {"files": hash_files(folder), "provenance": record}
        write_record(folder / "train.json", report | made)


def train_tokenizer(documents: Sequence[Document], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` entries, <s> and </s> among them; A3Error for too little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    if tokenizer.get_vocab_size() != size:
        raise A3Error(
            f"vocab_size: the text gives a vocabulary of {tokenizer.get_vocab_size()}, expected "
            f"{size}. Take more text, or that size."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )


def as_read(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer as AutoTokenizer reads it beside a config: some families have other rules."""
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        tokenizer.save_pretrained(name)
        read = load_tokenizer(Path(name))
    return read if differences(tokenizer, read) else tokenizer


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random float32 model of the recipe's config and seed.

    Raises A3Error for a model_type or key that transformers does not know, values that it refuses,
    and fewer positions than a block has.
    """
    try:
        config = model_config(recipe, tokenizer)
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    except (StrictDataclassError, ValueError) as error:
        raise A3Error(f"train.config: {error}. Correct config.") from error
    positions = getattr(config, "max_position_embeddings", recipe.block_length)
    if positions < recipe.block_length:
        raise A3Error(
            f"train: block_length is {recipe.block_length}, and the config has {positions} "
            "positions. Lower block_length, or raise the positions."
        )
    return model


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The recipe's config as transformers has it, with what the tokenizer decides.

    Raises A3Error for keys that the model_type has not, ValueError or StrictDataclassError for
    what transformers itself refuses.
    """
    family = recipe.config["model_type"]
    given = {key: value for key, value in recipe.config.items() if key != "model_type"}
    default = AutoConfig.for_model(family)
    known = sorted({*default.to_dict(), *default.attribute_map})
    # transformers keeps a misspelt key and does not use it.
    if unknown := sorted(set(given) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise A3Error(f"train.config: {family} has no key {unknown[0]!r}.{hint} Correct config.")
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    decided = {name: getattr(tokenizer, name) for name in special}
    return AutoConfig.for_model(family, **given | decided | {"vocab_size": recipe.vocab_size})


def fit(model: PreTrainedModel, recipe: Recipe, blocks: Tensor) -> list[float]:
    """Train in place on blocks (N, L), all of them once before any again; each step's loss.

    AdamW with the customary betas (0.9, 0.95), weight decay 0.1 of matrices and clipped gradients.
    """
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": 0.1},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate(i, recipe.steps))
    losses: list[float] = []
    model.train()
    with Bar(total=recipe.steps * recipe.batch_size * blocks.shape[1], unit="tok") as bar:
        for batch in batches(blocks, recipe):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise A3Error(
                    f"train: the loss of step {len(losses)} is {losses[-1]}; expected a finite "
                    f"number. Lower learning_rate, which is {recipe.learning_rate}."
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(batch.numel())
    return losses


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warmup, then half a cosine from 1 to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (steps + 1 - warmup)))


def batches(blocks: Tensor, recipe: Recipe) -> Tensor:
    """Blocks (N, L), permuted anew for each pass over them, as (steps, batch_size, L)."""
    wanted = recipe.steps * recipe.batch_size
    draw = torch.Generator().manual_seed(recipe.seed)
    passes = math.ceil(wanted / len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=draw) for _ in range(passes)])
    return blocks[order[:wanted]].unflatten(0, (recipe.steps, recipe.batch_size))


def final(losses: list[float]) -> float:
    """Mean loss of the last tenth of the steps."""
    last = losses[-max(1, round(FINAL * len(losses))) :]
    return sum(last) / len(last)


def unigram_loss(ids: Tensor) -> float:
    """Entropy of the tokens' frequencies, nats: the loss of a model that knows nothing else."""
    share = ids.flatten().bincount().double() / ids.numel()
    return torch.special.entr(share).sum().item()
