"""How harness prompts are built: chat template, examples as turns, a system instruction."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from a3.core.errors import A3Error

# Templates that put today's date into the prompt (Llama 3's) get this date, which is the default of
# Llama's own template. Otherwise results of two days could not be compared.
NOW = "strftime_now"

PINNED = f"{{%- macro {NOW}(format) -%}}26 Jul 2024{{%- endmacro -%}}"


@dataclass(frozen=True)
class Prompting:
    """lm-eval's options, under its names; part of a result's protocol."""

    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None

    def __post_init__(self) -> None:
        for key in ("apply_chat_template", "system_instruction"):
            if getattr(self, key) == "":
                raise A3Error(f"{key.replace('_', '-')} is '', expected text. Leave it out.")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise A3Error(
                "fewshot-as-multiturn requires a chat template. Set apply-chat-template too."
            )

    @property
    def record(self) -> dict[str, Any]:
        """The keys that a result records."""
        return asdict(self)

    def options(self, chat: HFLM | SimpleNamespace) -> dict[str, Any]:
        """What lm-eval's `build_all_requests` takes; `chat` is a model, or a stand-in for one."""
        return {
            "system_instruction": self.system_instruction,
            "apply_chat_template": bool(self.apply_chat_template),
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "chat_template": partial(HFLM.apply_chat_template, chat),
        }


def stand_in(tokenizer: PreTrainedTokenizerBase) -> SimpleNamespace:
    """What `HFLM.apply_chat_template` reads of a model."""
    return SimpleNamespace(tokenizer=tokenizer, chat_template_args={})


def choose_template(tokenizer: PreTrainedTokenizerBase, prompting: Prompting, folder: Path) -> None:
    """Make the requested template the tokenizer's only one.

    lm-eval does not pass on the template's name, and would use the default one. Raises A3Error if
    the tokenizer of `folder` has no such template, or it leaves the system instruction out.
    """
    asked = prompting.apply_chat_template
    if not asked:
        return
    found = tokenizer.chat_template
    if not found:
        raise A3Error(
            f"{folder}: its tokenizer has no chat template (chat_template.jinja). Leave "
            "apply-chat-template out, or add one."
        )
    named = found if isinstance(found, dict) else {"default": found}
    name = "default" if asked is True else asked
    if name not in named:
        raise A3Error(
            f"{folder}: its tokenizer has no chat template {name!r}; it has "
            f"{', '.join(sorted(named))}. Set apply-chat-template to one of them."
        )
    tokenizer.chat_template = (PINNED if NOW in named[name] else "") + named[name]
    system = prompting.system_instruction
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "?"})
    try:
        shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # Templates call functions of Python's, too.
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise A3Error(
            f"{folder}: its chat template {name!r} cannot be applied ({error}). Take another one"
            f"{', or leave system-instruction out' if system else ''}."
        ) from error
    if system and system.strip() not in shown:
        raise A3Error(
            f"{folder}: its chat template {name!r} leaves the system instruction out. Leave "
            "system-instruction out, or put it into the task's description."
        )
