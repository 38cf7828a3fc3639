"""What a folder has to pass before it is published: it loads, tokenises and generates."""

import re
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import a3.models.quantised  # noqa: F401
from a3.artifacts.card import is_own_card
from a3.core.errors import A3Error
from a3.core.files import RECORDS, read_json, sha256
from a3.models import modeling_a3
from a3.models.checkpoint import CARD, Checkpoint, front_matter, recorded_files
from a3.models.load import load_model, load_tokenizer, number_of_parameters
from a3.models.packing import CODE
from a3.models.registry import dense_type
from a3.models.tokenizer import has_tokenizer, require_rows

# Texts that a tokenizer has to read and write back: numbers, accents, other scripts, code, spaces.
TEXTS = (
    "A river is a natural watercourse; in 1969 about 600 million viewers watched one.",
    "Ça coûte 12,50 € – déjà vu? “Größe” ¿qué?",
    "日本語のテキスト, русский текст, 한국어 🙂",
    "def add(a, b):\n    return a + b  # two\n\n\tdone",
)

NEW_TOKENS = 12

# The largest difference of two logits that rounding may explain, as a share of the largest logit.
ROUNDING = {"float32": 1e-3, "float64": 1e-6}

ROUGH = 0.05

# Licences that forbid to share what was made from the model.
NO_DERIVATIVES = re.compile(r"(^|[-_. ])nd([-_. ]|$)|no[-_ ]?deriv")

NON_COMMERCIAL = re.compile(r"(^|[-_. ])nc([-_. ]|$)|non[-_ ]?commercial")

# What cards say in place of a licence.
NO_LICENCE = ("", "unknown", "unlicensed", "none")


def check_folder(
    folder: Path, dtype: str, device: str, upload: bool = False
) -> list[tuple[str, str]]:
    """What was checked of a dense, compressed or exported folder: (name, finding) in reading order.

    Every recorded file is hashed, the model loaded in `dtype` on `device`, texts tokenised and
    written back, and tokens generated with the cache and compared to a run without it. Code of the
    folder does not run: it is compared to a3's own, which the model then runs. For an `upload` it
    has to be equal. Raises A3Error for the first check that fails.
    """
    files = whole(folder)
    if not has_tokenizer(folder):
        raise A3Error(f"{folder}: no tokenizer in it. Save the model's tokenizer there.")
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype).to(device)
    count = f"{type(model).__name__}, {number_of_parameters(model):,} parameters, in {dtype}"
    return [
        ("files", files),
        ("loads", count),
        ("alone", code(folder, upload)),
        ("tokenises", tokenises(folder, tokenizer)),
        ("generates", generates(folder, model, tokenizer, dtype)),
    ]


def whole(folder: Path) -> str:
    """Compares every recorded file to its hash."""
    recorded = recorded_files(folder)
    Checkpoint(folder).verify_all()
    if not recorded:
        return f"no record ({', '.join(RECORDS)}), so nothing to compare them to"
    name = next(name for name in RECORDS if (folder / name).exists())
    return f"{len(recorded)} as {name} recorded them"


def code(folder: Path, upload: bool) -> str:
    """Compares the code in a folder, by which transformers loads it without a3, to a3's own.

    Raises A3Error if auto_map is not as a3 writes it, or if code that others would run (`upload`)
    is not what was tried.
    """
    said: dict[str, Any] = read_json(folder / "config.json")
    if "a3" not in said:
        return "an ordinary checkpoint, which needs no a3"
    if "quantised" in said["a3"]:
        return "needs `import a3`, which simulates its low precision"
    classes = modeling_a3.classes(dense_type(said["a3"]))
    expected = {auto: f"modeling_a3.{own.__name__}" for auto, own in classes.items()}
    named = said.get("auto_map") or {}
    if named != expected:
        foreign = {auto: one for auto, one in named.items() if one != expected.get(auto)}
        missing = {auto: one for auto, one in expected.items() if one != named.get(auto)}
        raise A3Error(
            f"{folder / 'config.json'}: auto_map names {in_words(foreign)}, expected "
            f"{in_words(missing)}. Build the folder again."
        )
    own = {Path(str(module.__file__)) for module in CODE}
    if lost := sorted(path.name for path in own if not (folder / path.name).is_file()):
        raise A3Error(f"{folder}: its code {', '.join(lost)} is missing. Build the folder again.")
    if other := sorted(p.name for p in own if sha256(folder / p.name) != sha256(p)):
        found = f"{', '.join(other)} in it is of another version of a3"
        if upload:
            raise A3Error(
                f"{folder}: {found}, so it was not tried. Build the folder again, or upload it "
                "with the a3 that made it."
            )
        return f"not tried: {found}, so it would not be uploaded"
    return "with trust_remote_code=True its code runs, which equals that of this a3"


def in_words(classes: dict[str, Any]) -> str:
    """Classes of an auto_map."""
    return ", ".join(f"{own} for {auto}" for auto, own in classes.items()) or "nothing more"


def tokenises(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Has texts tokenised, written back and tokenised again, which has to give the same tokens."""
    tried = 0
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        require_rows(folder, tokenizer, torch.tensor(ids))
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            continue  # a small vocabulary cannot write everything
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = tokenizer.encode(back, add_special_tokens=False)
        if not ids or again != ids:
            raise A3Error(
                f"{folder}: its tokenizer reads {text!r} as {len(ids)} tokens, and what it writes "
                f"back, {back!r}, as others. Save the model's own tokenizer there."
            )
        tried += 1
    if not tried:
        raise A3Error(
            f"{folder}: its tokenizer has an unknown token in each of {len(TEXTS)} texts, expected "
            "one at least that it can write. Save the model's own tokenizer there."
        )
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[0]}], tokenize=False)
        except TemplateError as error:
            raise A3Error(
                f"{folder}: its chat template fails on a message of a user "
                f"({type(error).__name__}: {error}). Save the model's own chat template there."
            ) from error
    chat = ", and its chat template" if tokenizer.chat_template else ""
    return f"{tried} texts, there and back{chat}"


def generates(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> str:
    """Generates greedily with the cache, and compares each step's logits to a run without it."""
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        start = ids.shape[1] - 1
        at_once = model(made.sequences[:, :-1], use_cache=False).logits[0, start:].float()
    require_same(folder, torch.cat(made.logits).float(), at_once, ROUNDING.get(dtype, ROUGH))
    text = tokenizer.decode(made.sequences[0, start + 1 :], skip_special_tokens=True)
    return f"{len(at_once)} tokens with the cache as without it: {' '.join(text.split())!r}"


def require_same(folder: Path, cached: Tensor, at_once: Tensor, rounding: float) -> None:
    """Raise A3Error unless logits (tokens, vocabulary) are finite and equal up to `rounding`."""
    if not (cached.isfinite().all() and at_once.isfinite().all()):
        raise A3Error(f"{folder}: its logits are not finite. Build it again, or take float32.")
    off = ((cached - at_once).abs().max() / at_once.abs().max()).item()
    if off > rounding:
        raise A3Error(
            f"{folder}: logits with the cache differ from those without it by {off:.1%} of the "
            f"largest, expected {rounding:.1%} at most. Build it again; if it stays, report it."
        )


def licence_of(folder: Path) -> tuple[str | None, str]:
    """The licence that a folder's card names, None if it may not be shared, and what to say of it.

    Its name is in lower case, several ones with commas between them. A licence called "other"
    counts where its name or text is there.
    """
    said = front_matter(folder / CARD)
    found = said.get("license")
    items = found if isinstance(found, list) else [found]
    names = [one.strip().lower() for one in items if isinstance(one, str)]
    title = str(said.get("license_name") or "").strip()
    text = any(folder.glob("LICENSE*")) or said.get("license_link")
    named = title.lower() not in NO_LICENCE
    if (
        not names
        or len(names) < len(items)
        or any(one in NO_LICENCE for one in names)
        or ("other" in names and not (text or named))
    ):
        return (
            None,
            "unknown: the card names none. Look it up, and add it: a3 card FOLDER --licence NAME",
        )
    name = ", ".join(names)
    called = f"{name} ({title})" if title else name
    if any(NO_DERIVATIVES.search(one) for one in (*names, title.lower())):
        return None, f"{called}: forbids to share what was made from the model"
    if any(NON_COMMERCIAL.search(one) for one in (*names, title.lower())):
        return name, f"{called}: not for commercial use"
    if any(one.startswith("llama") for one in names):
        return name, f"{called}: asks for a name that begins with Llama, and “Built with Llama”"
    return name, called


def card_of(folder: Path) -> str:
    """Whose card a folder has; raises A3Error if there is none."""
    if not (folder / CARD).is_file():
        raise A3Error(
            f"{folder}: no {CARD}, which says what the model is. Write one, or build it again."
        )
    return f"{CARD} by a3" if is_own_card(folder / CARD) else f"{CARD}, not by a3 or changed since"
