"""The names and values that tensors of files have in memory, by transformers' own rules.

Folders of the hub are older than transformers' classes. So transformers renames tensors when it
loads them, and makes one of several; files that it saves are as the hub's.
"""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from a3.models.built import build
from a3.models.wrappers import wrapper_in


@dataclass
class Joined:
    """A tensor in memory that a rule of transformers makes of stored ones, by their keys.

    `patterns` are those of the rule that the keys match. Some rules look at `model`, which has no
    weights.
    """

    rule: WeightConverter
    model: PreTrainedModel
    patterns: dict[str, str] = field(default_factory=dict)

    def join(self, name: str, stored: dict[str, Tensor]) -> Tensor:
        """The tensor, of this name in memory, of the stored ones by their keys."""
        rule = deepcopy(self.rule)
        for key, value in stored.items():
            rule.add_tensor(name, key, self.patterns[key], value)
        (value,) = rule.convert(name, model=self.model, config=self.model.config).values()
        return value[0] if isinstance(value, list) else value


@dataclass
class InMemory:
    """The name in memory of each stored key, and those tensors that are made of stored ones."""

    names: dict[str, str]
    joined: dict[str, Joined]


def in_memory(folder: Path, keys: tuple[str, ...]) -> InMemory:
    """What a dense folder's tensors, which have these keys in its files, are in memory.

    Experts that files have one by one stay so (a3.models.family), and so does a tensor that would
    become several. Files of compressed models are as memory is. Raises A3Error as
    `a3.models.built.build` does, for a model of several modalities, and where tensors are joined.
    """
    path = folder / "config.json"
    return _in_memory(path, path.read_text() if path.is_file() else "{}", keys)


@lru_cache(maxsize=16)
def _in_memory(path: Path, content: str, keys: tuple[str, ...]) -> InMemory:
    """`in_memory`, once in a process for a config.json of this content."""
    said = json.loads(content)
    found = InMemory({}, {})
    options: dict[str, Any] = {}
    model = None
    if "a3" in said:
        rules = []
    elif wrapper_in(said):
        model = built(path.parent, said)
        rules = get_model_conversion_mapping(model)
        options = {
            "base_model_prefix": model.base_model_prefix,
            "meta_state_dict": model.state_dict(),
        }
    else:
        rules = get_checkpoint_conversion_mapping(said.get("model_type")) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter) and joins(rule)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, **options)
        found.names[key] = name
        if pattern is not None:
            model = model or built(path.parent, said)
            one = found.joined.setdefault(name, Joined(of_pattern[pattern], model))
            one.patterns[key] = pattern
    return found


def built(folder: Path, said: dict[str, Any]) -> PreTrainedModel:
    """The model without weights of a config.json's content."""
    return build(folder, CONFIG_MAPPING[said["model_type"]].from_dict(said))


def joins(rule: WeightConverter) -> bool:
    """Whether a rule makes one tensor, and not of a list of modules such as experts."""
    listed = any(isinstance(operation, MergeModulelist) for operation in rule.operations)
    return len(rule.target_patterns) == 1 and not listed
