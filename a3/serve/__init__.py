"""Compressed models in servers. vLLM finds `register` by the entry point of its plugins."""

from a3.models.served import FAMILIES


def register() -> None:
    """Tell vLLM which class runs which compressed models; it imports that when it loads one.

    vLLM calls this in each of its processes. The import of a3 lets transformers read the config.
    """
    from vllm import ModelRegistry

    for family in FAMILIES:
        # Compressed models' classes have the family's name after A3.
        name = f"A3{family.capitalize()}ForCausalLM"
        ModelRegistry.register_model(name, "a3.serve.llama:A3ForCausalLM")
