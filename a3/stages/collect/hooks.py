"""Hooks that read the activations from which statistics are computed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from a3.core.errors import A3Error
from a3.models.experts_a3 import activated, first_of
from a3.models.shape import Arch
from a3.models.sizes import component_of
from a3.rxx.container import Accumulator
from a3.rxx.kinds import KINDS, TRIANGULAR_FORMS, is_of_experts, sums_of

# What norms of outputs add to a mean square, about; a token of no output would have all weight.
NORM_EPS = 1e-6

# Sites that are inputs of a projection; other sites are outputs of the named projection.
SITES = {"attention_input": "q", "o_input": "o", "mlp_input": "up", "down_input": "down"}


def attach_all(
    arch: Arch, accumulators: dict[str, Accumulator], trunk: nn.Module, layer: int
) -> list[RemovableHandle]:
    """Hook all statistics of one layer onto it."""
    return [attach(trunk, arch, layer, accumulator) for accumulator in accumulators.values()]


def attach(trunk: nn.Module, arch: Arch, layer: int, accumulator: Accumulator) -> RemovableHandle:
    """Hook one statistic of one layer onto the projection whose output or input it uses.

    Its sums are zeros where a3 leaves the layer's component as it is.
    """
    site = KINDS[accumulator.kind].site
    if not observed(arch, site, layer):
        return nothing(arch, layer, accumulator)
    if is_of_experts(KINDS[accumulator.kind], vars(arch)):
        return attach_experts(trunk, arch, layer, accumulator)
    if site == "router":
        return attach_router(trunk, arch, layer, accumulator)
    projection = SITES.get(site, site)
    if site == "attention_input" and not arch.solves("qk", layer):
        projection = "v"
    module = trunk.get_submodule(arch.module(layer, projection))

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        if projection == "down":
            x = output.flatten(0, -2)
            accumulator.add(layer, x if module.bias is None else x.float() - module.bias.float())
        else:
            accumulator.add(layer, activation(output, projection, arch))

    def on_input(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        accumulator.add(layer, inputs[0].flatten(0, -2))

    def on_both(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x = inputs[0].flatten(0, -2)
        accumulator.add(layer, x)
        accumulator.add(layer, x / rms(output), 1)

    if sums_of(KINDS[accumulator.kind], vars(arch)) == 2:
        return module.register_forward_hook(on_both)
    if site == projection:
        return module.register_forward_hook(on_output)
    return module.register_forward_pre_hook(on_input)


def rms(output: Tensor) -> Tensor:
    """The root mean square of each token of an output (1, L, d): (L, 1), float32."""
    y = output.detach().flatten(0, -2).float()
    return (y.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()


def observed(arch: Arch, site: str, layer: int) -> bool:
    """Whether something that a3 compresses in a layer uses an activation."""
    if site in ("attention_input", "qkv"):
        return not arch.keeps_attention(layer)
    return arch.solves(component_of(SITES.get(site, site)), layer)


def nothing(arch: Arch, layer: int, accumulator: Accumulator) -> RemovableHandle:
    """Add zeros for a layer, and hook nothing; the handle is that of a module that is not run."""
    shape, site = arch.statistic_shape(KINDS[accumulator.kind]), KINDS[accumulator.kind].site
    if is_of_experts(KINDS[accumulator.kind], vars(arch)):
        width = arch.intermediate_size if site == "down_input" else arch.hidden_size
        accumulator.add_experts(layer, [(torch.zeros(0, width), torch.zeros(0))] * arch.experts)
    elif KINDS[accumulator.kind].form in TRIANGULAR_FORMS:
        accumulator.add(layer, torch.zeros(1, shape[-1]))
    else:
        accumulator.add_sum(layer, torch.zeros(shape, dtype=torch.float64))
    return nn.Identity().register_forward_hook(lambda *_: None)


def attach_experts(
    trunk: nn.Module, arch: Arch, layer: int, accumulator: Accumulator
) -> RemovableHandle:
    """Hook the input of the experts' down projections, each token with its routing weight.

    No module has exactly that input, so up and gate are computed again (and down where outputs are
    asked for; of all tokens for their sums).
    """
    turned = arch.structure is not None and arch.structure["turned"]
    every = KINDS[accumulator.kind].form == "output"

    def hook(experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        accumulator.add_experts(layer, reached(experts, routed(arch.experts, every, *inputs)))

    def reached(
        experts: nn.Module, inputs: Iterator[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        first = first_of(experts)
        for expert, (hidden, own) in enumerate(inputs):
            W = getattr(experts, first)[expert]
            both = hidden @ (W if turned else W.T)
            if hasattr(experts, f"{first}_bias"):
                both = both + getattr(experts, f"{first}_bias")[expert]
            x = activated(experts, both, first == "gate_up_proj")
            if site == "experts":
                W = experts.down_proj[expert]
                x = x @ (W if turned else W.T)
                if hasattr(experts, "down_proj_bias"):
                    x = x + experts.down_proj_bias[expert]
            yield (x if every else x.double() * own[:, None]), own

    site = KINDS[accumulator.kind].site
    name = arch.adapter.experts_module(layer).removeprefix(f"{arch.adapter.prefix}.")
    return trunk.get_submodule(name).register_forward_pre_hook(hook)


def attach_router(
    trunk: nn.Module, arch: Arch, layer: int, accumulator: Accumulator
) -> RemovableHandle:
    """Hook the router's logits of all tokens, which are computed again."""
    name = arch.adapter.modules["router"].format(layer).removeprefix(f"{arch.adapter.prefix}.")

    def hook(router: nn.Module, inputs: tuple[Tensor]) -> None:
        accumulator.add(layer, inputs[0].flatten(0, -2) @ router.weight.T)

    return trunk.get_submodule(name).register_forward_pre_hook(hook)


def routed(
    experts: int,
    every: bool,
    hidden: Tensor,
    index: Tensor | None = None,
    weight: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each expert, the tokens that reach it (t, d), or `every` token (T, d), and its outputs'
    weights for those that reach it (t,), float64.

    As a module of experts gets them (a3.models.experts_a3.Experts): hidden (T, d), index and
    weight (T, top k); or hidden (E T, d) alone, 0 where a token goes elsewhere.
    """
    if index is None or weight is None:
        if every:
            raise A3Error(
                "statistic 'expert_output': this family's experts see only tokens that are routed "
                "to them, and mode hc-smoe needs the outputs of all. Take another mode."
            )
        for rows in hidden.view(experts, -1, hidden.shape[-1]):
            reaching = rows[rows.any(-1)]
            yield reaching, torch.ones(len(reaching), dtype=torch.float64, device=rows.device)
        return
    for expert in range(experts):
        token, place = torch.where(index == expert)
        yield hidden if every else hidden[token], weight[token, place].double()


def activation(output: Tensor, projection: str, arch: Arch) -> Tensor:
    """q, k or v (tokens, width), float64, of the output (1, L, …) of the module that makes it.

    If the model norms q and k, the result is normed, without the norm's gains.
    """
    x = arch.adapter.unfuse(output.flatten(0, -2).T, projection, vars(arch)).T.double()
    if projection == "v" or arch.qk_norm is None:
        return x
    vectors = x.unflatten(1, (-1, arch.head_dim)) if arch.qk_norm == "head" else x
    tiny = torch.finfo(x.dtype).tiny
    power = vectors.square().mean(-1, keepdim=True).clamp(min=tiny)
    return (vectors * power.rsqrt()).reshape(x.shape)
