"""What a model is to become, in the user's units: its size, cache and FLOPs, or what it may lose.

In tables, paths and `--ratio` a target stands in place of a ratio and is written as
`fit@300MB,kv-cache@0.5`: names of the options that ask for it, in their order, joined by commas.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Self

from a3.core.dtypes import GGUF_TYPES, RUN_DTYPES
from a3.core.errors import A3Error

# Bytes of a unit, and numbers of a suffix.
BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}

NUMBERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

# A largest loss is kept by so many trials at most, each on so many blocks (a3.promise).
TRIALS, TRIAL_BLOCKS = 6, 16

AMOUNT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([A-Za-z]*)")

# The options, by field.
NAMES = {
    "fit": "fit",
    "params": "params",
    "kv_cache": "kv-cache",
    "flops": "flops",
    "max_loss": "max-loss",
}


@dataclass(frozen=True)
class Target:
    """What a compressed model may have at most; None where nothing is asked.

    `fit`: bytes of its weights as a file: of the GGUF type `type`, or in a folder, which is written
    in the dtype `type` or, for None, in the dense model's. `params`: parameters. `kv_cache` and
    `flops`: shares of the dense model's KV cache, and FLOPs, per token; a cache is counted in
    numbers, whatever their dtype. `max_loss`: nats a token that it loses over the dense model,
    measured on text that was held out of the calibration.
    """

    fit: int | None = None
    type: str | None = None
    params: int | None = None
    kv_cache: Decimal | None = None
    flops: Decimal | None = None
    max_loss: Decimal | None = None

    @property
    def gguf(self) -> str | None:
        """The type of the GGUF file that is to fit."""
        return self.type if self.type in GGUF_TYPES else None

    @property
    def stored(self) -> str | None:
        """The dtype that the folder is written in, where it is not the dense model's."""
        return self.type if self.type in RUN_DTYPES else None

    @property
    def preset(self) -> str:
        """The preset whose modes fit, where none is named: llama.cpp wants one size of heads."""
        return "a3-stock" if self.gguf else "a3-plus"

    @classmethod
    def of(cls, said: Mapping[str, str | None]) -> Self:
        """The target of option values as a user spells them, by field; A3Error for a wrong one."""
        found: dict[str, int | str | Decimal | None] = {}
        for name, word in said.items():
            if word is None:
                continue
            if name == "fit":
                amount, _, found["type"] = word.partition(":")
                found |= {"fit": bytes_of(amount, word), "type": type_of(found["type"])}
            elif name == "params":
                found[name] = int(amount_of(word, NUMBERS, "params", "100M, 1.5B or 250000"))
            else:
                found[name] = decimal_of(word, NAMES[name], below_one=name != "max_loss")
        return cls(**found)  # type: ignore[arg-type]

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`; raises A3Error for anything else that means the same, too."""
        named = {name: field for field, name in NAMES.items()}
        pairs = [part.partition("@") for part in text.split(",")]
        if any(name not in named or not at for name, at, _ in pairs):
            raise A3Error(
                f"{text!r}: expected a ratio such as 0.2, or targets such as fit@300MB or "
                f"kv-cache@0.5,max-loss@0.05, of {', '.join(named)}."
            )
        found = cls.of({named[name]: word for name, _, word in pairs})
        if str(found) != text:
            raise A3Error(f"target is {text!r}; spell it {str(found)!r}.")
        return found

    def __str__(self) -> str:
        """The form used in tables and paths."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "type":
                continue
            if field.name == "fit":
                word = scaled(value, ("MB", 10**6), ("GB", 10**9))
                word += "" if self.type is None else f":{self.type}"
            elif field.name == "params":
                word = scaled(value, ("M", 10**6), ("B", 10**9))
            else:
                word = f"{value.normalize():f}"
            words.append(f"{NAMES[field.name]}@{word}")
        return ",".join(words)


def is_target(text: str) -> bool:
    """Whether a row's size is meant as targets, rather than a ratio."""
    return "@" in text


def target_of(modes: Iterable[str]) -> Target | None:
    """The target of a model's modes, as its record has them: `obs~@fit@300MB`; None of a ratio."""
    sizes = [mode.partition("@")[2] for mode in modes]
    return next((Target.parse(size) for size in sizes if is_target(size)), None)


def bytes_of(amount: str, word: str) -> int:
    """Bytes of 300MB, 1.5GB, 2GiB; raises A3Error that shows the whole `word`."""
    if not re.search("[A-Za-z]", amount):
        raise A3Error(f"fit is {word!r}; expected a size with its unit, such as 300MB or 1.5GiB.")
    return int(amount_of(amount, BYTES, "fit", "300MB, 1.5GB or 2GiB"))


def type_of(word: object) -> str | None:
    """The type after the colon, of a GGUF file or a folder, if there is one."""
    if word and word not in (*RUN_DTYPES, *GGUF_TYPES):
        raise A3Error(
            f"fit: type is {word!r}; expected {', '.join(RUN_DTYPES)} (of the folder), "
            f"{', '.join(GGUF_TYPES)} (of a GGUF file), or none."
        )
    return str(word) if word else None


def amount_of(word: str, units: Mapping[str, int], name: str, such_as: str) -> Decimal:
    """A number above 0 with a unit, in units of 1."""
    found = AMOUNT.fullmatch(word)
    if found is None or found[2] not in units:
        raise A3Error(f"{name} is {word!r}; expected a number above 0 such as {such_as}.")
    amount = Decimal(found[1]) * units[found[2]]
    if amount < 1:
        raise A3Error(f"{name} is {word!r}; expected a number above 0 such as {such_as}.")
    return amount


def decimal_of(word: str, name: str, *, below_one: bool) -> Decimal:
    """A share of the dense model's, between 0 and 1, or a loss above 0."""
    found = AMOUNT.fullmatch(word)
    value = Decimal(found[1]) if found and not found[2] else Decimal(0)
    if value <= 0 or (below_one and value >= 1):
        expected = "a share of the dense model's, between 0 and 1" if below_one else "nats above 0"
        raise A3Error(f"{name} is {word!r}; expected {expected}.")
    return value


def scaled(value: int, *units: tuple[str, int]) -> str:
    """A number in the largest of two units of which there is at least one, or else the smallest."""
    name, of = next(((name, of) for name, of in reversed(units) if value >= of), units[0])
    return f"{(Decimal(value) / of).normalize():f}{name}"
