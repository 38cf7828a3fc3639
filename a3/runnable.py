"""What a runtime cannot run of a model, found before anything long: family, RoPE, tokenizer, ranks.

Export and servers refuse the same later, when the model has been made for them.
"""

from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.core.progress import LOG
from a3.models.arch import load_arch
from a3.models.served import obstacles as served_obstacles
from a3.models.shape import Arch
from a3.models.stock import obstacles as stock_obstacles
from a3.models.stock import rope_type, stock
from a3.solutions.plan import Plan
from a3.solutions.runtime import ANY, LLAMA_CPP, PLUGIN
from a3.stages.export.llama import require_llama, require_tokenizer


def check_runtime(plan: Plan, model_folder: Path, allocation: Path | None = None) -> None:
    """Raise A3Error now for what the plan's runtime, if it has one, cannot run.

    That is: the dense model's family, RoPE or tokenizer; modes and sizes (`Plan.check`); and ranks
    that were allocated for another runtime, in the file `allocation`.
    """
    if plan.runtime is None:
        return
    arch = load_arch(model_folder)
    if found := obstacles(plan, arch, model_folder):
        raise A3Error(
            f"{model_folder}: {plan.runtime} cannot run it: {'; '.join(found)}. Take another "
            "runtime (--for gpu: transformers runs every compressed model), or leave --for out."
        )
    if plan.taken.asked.code == LLAMA_CPP:
        require_llama(stock(model_folder, by_layer=True))
        require_tokenizer(model_folder)
    plan.check(model_folder)
    if plan.shared and allocation is not None:
        require_allocated(plan, arch, allocation)


def say_whole(plan: Plan, model_folder: Path) -> None:
    """Warn of heads and MLPs that stay whole, because the plan's runtime has no smaller ones."""
    arch = load_arch(model_folder)
    for component in plan.whole(arch):
        full, step = arch.full_rank(component), plan.step(arch, component)
        LOG.warning(
            f"--for {plan.runtime}: {component} stays whole: no size below {full} is a multiple of "
            f"{step}"
        )


def obstacles(plan: Plan, arch: Arch, folder: Path) -> list[str]:
    """Reasons in the dense model; empty if its compressed models can run."""
    code = plan.taken.asked.code
    if code == ANY:
        return []
    if code == PLUGIN:
        return served_obstacles(without_ranks(arch), rope_type(folder))
    by_layer = code == LLAMA_CPP
    if found := stock_obstacles(folder, by_layer):
        return found
    stock(folder, by_layer).names()  # refuses tensors that would be lost
    return []


def without_ranks(arch: Arch) -> dict[str, Any]:
    """What decides in a compressed model's config whether vLLM runs it, except modes."""
    return {
        "wrapper": arch.wrapper,
        "family": arch.family,
        "factors": [],
        "qk_norm": arch.qk_norm,
        "rope": arch.rope_layout is not None,
        "nope_layers": arch.nope_layers,
        "down_bias": False,
    }


def require_allocated(plan: Plan, arch: Arch, allocation: Path) -> None:
    """Raise A3Error for ranks in a file that the plan's runtime does not take."""
    ranks = read_record(allocation).get("ranks", {})
    uniform = plan.uniform
    for component in plan.shared:
        allowed = set(plan.allowed(arch, component))
        by_layer = ranks.get(component, [])
        found = {rank for one in by_layer for rank in (one if isinstance(one, list) else [one])}
        wrong = sorted(found - allowed)
        if wrong or (component in uniform and len(found) > 1):
            said = f"rank {wrong[0]}" if wrong else f"ranks {min(found)} to {max(found)}"
            raise A3Error(
                f"{allocation}: {component} has {said}, which {plan.runtime} does not take. "
                f"Allocate again with --for {plan.runtime}."
            )
