"""Helpers of rules/model.smk: what its jobs read and are told."""


def base_option(wildcards, input):
    """The folder that a model is made from, where it is made from one."""
    source = entry("models", wildcards.model)["source"]
    made = "repeat_kv" in source or "train" in source
    return ["--base", Path(input[0]).parent] if made else []


def training_text(wildcards):
    """Documents that a model is trained on."""
    source = entry("models", wildcards.model)["source"]
    if "train" not in source:
        raise WorkflowError(f"models.{wildcards.model}.source has no train, so it is not trained.")
    return learned(source["train"]["text"])
