"""config.json of an ONNX graph; needs none of the libraries that write or run graphs."""

import json
from typing import Any

from transformers import PreTrainedModel

from a3.stages.export.decoder import Slot


def config_of(
    model: PreTrainedModel, slots: list[Slot], name: str, said: str, outside: bool
) -> dict[str, Any]:
    """The content of config.json: the family's, with what transformers.js needs.

    A head size that all layers have for keys and values is the config's, too, since older decoders
    make an empty cache by it; where sizes differ, the graph's inputs say them.
    """
    content = json.loads(model.config.to_json_string(use_diff=False))
    if a3 := content.pop("a3", None):
        content["model_type"] = a3["family"]
        content["architectures"] = [type(model).__name__.removeprefix("A3")]
    content.pop("auto_map", None)
    content.pop("_name_or_path", None)  # the folder it was loaded from
    sizes = {size for slot in slots for size in (slot.key, slot.value)}
    if len(sizes) == 1 and "head_dim" in content:
        content["head_dim"] = sizes.pop()
    content["transformers.js_config"] = {
        "dtype": said,
        "kv_cache_dtype": {"fp16": "float16"},
    }
    if outside:
        content["transformers.js_config"]["use_external_data_format"] = {name: True}
    return content
