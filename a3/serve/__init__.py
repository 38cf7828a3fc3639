"""Compressed models in servers. vLLM finds `register` by the entry point of its plugins."""

# The classes' names are the family's own, after A3.
FAMILIES = ("Llama", "Mistral", "Ministral", "Qwen2")


def register() -> None:
    """Tell vLLM which class runs which compressed models; it imports that when it loads one.

    vLLM calls this in each of its processes. The import of a3 lets transformers read the config.
    """
    from vllm import ModelRegistry

    for family in FAMILIES:
        ModelRegistry.register_model(f"A3{family}ForCausalLM", "a3.serve.llama:A3ForCausalLM")
