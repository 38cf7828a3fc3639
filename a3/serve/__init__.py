"""Compressed models in servers. vLLM finds `register` by the entry point of its plugins."""

# Of families whose layers are Llama's, RoPE, MLPs gated with SiLU and two norms (llama.py).
FAMILIES = ("Llama", "Mistral", "Ministral", "Qwen2")


def register() -> None:
    """Tell vLLM of compressed models' classes, which it imports when it loads one.

    vLLM calls this in each of its processes. That a3 is imported is what lets its config be read.
    """
    from vllm import ModelRegistry

    for family in FAMILIES:
        ModelRegistry.register_model(f"A3{family}ForCausalLM", "a3.serve.llama:A3ForCausalLM")
