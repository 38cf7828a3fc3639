"""Compressed models whose attention stays their family's own code, with smaller projections.

Some families do more with queries, keys and attention outputs than `A3Attention` knows: sinks,
gates, temperatures by position, a norm after RoPE. Their module stays, and is changed in place: q,
k and v have fewer outputs, which are put where they were among the dense ones, with zeros in all
other places, and o reads only the places that hold something. The cache keeps only these, too.
Scores and outputs are as wide as the dense ones while they are computed.

This file needs only torch and transformers, because a copy of it is in every compressed folder.
"""

from typing import Any

import torch
from torch import Tensor, nn


def spread(x: Tensor, places: Tensor, width: int) -> Tensor:
    """x (..., r) in a tensor (..., width) of zeros: at `places` (r,), or (..., r) by head."""
    wide = x.new_zeros(*x.shape[:-1], width)
    return wide.scatter(-1, places.expand(x.shape), x)


class Spread(nn.Linear):
    """q, k or v, or several that are fused, with fewer outputs, spread over the dense width."""

    def __init__(self, own: "Own", projections: list[str], dense: nn.Module) -> None:
        rows = [own.heads[projection] * own.rank(projection) for projection in projections]
        super().__init__(own.hidden_size, sum(rows), dense.bias is not None)
        # In a list, so that it is no module in a module.
        self.own, self.projections = [own], projections

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) to the dense width."""
        own = self.own[0]
        places = torch.cat([own.rows(p, self.projections) for p in self.projections])
        width = sum(own.heads[p] for p in self.projections) * own.head_dim
        return spread(super().forward(x), places, width)


class Selected(nn.Linear):
    """o, of the first r dimensions of each head."""

    def __init__(self, own: "Own", dense: nn.Module) -> None:
        super().__init__(own.heads["q"] * own.ov_rank, own.hidden_size, dense.bias is not None)
        self.own = [own]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H h) or (..., H, h) as the dense o gets it."""
        own = self.own[0]
        heads = x.unflatten(-1, (own.heads["q"], own.head_dim))[..., : own.ov_rank]
        return super().forward(heads.flatten(-2))


class SpreadNorm(nn.Module):
    """RMS norm of spread queries or keys, of the places that hold something."""

    def __init__(self, own: "Own", projection: str, over_heads: bool, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(own.heads[projection], own.qk_rank))
        self.own, self.projection = [own], projection
        self.over_heads, self.eps = over_heads, eps

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, heads, h), (B, heads, L, h) or (B, L, heads h)."""
        own, heads = self.own[0], self.own[0].heads[self.projection]
        split = x if x.shape[-1] == own.head_dim else x.unflatten(-1, (heads, own.head_dim))
        split = split.transpose(1, 2) if own.heads_first else split
        wide = split.to(torch.promote_types(x.dtype, torch.float32))
        count = own.qk_rank * (heads if self.over_heads else 1)
        power = wide.square().sum((-2, -1) if self.over_heads else -1, keepdim=True) / count
        gain = spread(self.weight, own.dims(self.projection), own.head_dim)
        normed = (wide * torch.rsqrt(power + self.eps) * gain).to(x.dtype)
        return (normed.transpose(1, 2) if own.heads_first else normed).reshape(x.shape)


class NarrowCache:
    """A cache that keeps only the places of keys and values that hold something."""

    def __init__(self, cache: Any, own: "Own") -> None:
        self.cache, self.own = cache, own

    def __getattr__(self, name: str) -> Any:
        """All else is the cache's."""
        return getattr(self.cache, name)

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """k and v (B, G, L, h): new ones, to all, as the family's code expects them."""
        own = self.own
        places = own.dims("k")[None, :, None]
        k = k.gather(-1, places.expand(k.shape[0], -1, k.shape[2], -1))
        k, v = self.cache.update(k, v[..., : own.ov_rank], *args, **kwargs)
        v = nn.functional.pad(v, (0, own.head_dim - own.ov_rank))
        return spread(k, places, own.head_dim), v


class Own:
    """What the changed modules of one layer's attention have in common; changes them.

    `said` is the config's `a3["own"]`: where q, k, v, o and norms are in the model, {} for the
    layer; rope_dims, rope_layout, interleaved, heads_first, norm_eps of the family.
    """

    def __init__(self, body: nn.Module, attention: nn.Module, a3: dict, layer: int) -> None:
        said = a3["own"]
        self.attention = attention
        self.heads = {"q": a3["heads"], "k": a3["kv_heads"], "v": a3["kv_heads"]}
        self.head_dim, self.hidden_size = said["head_dim"], said["hidden_size"]
        self.qk_rank, self.ov_rank = a3["qk_ranks"][layer], a3["ov_ranks"][layer]
        self.neighbours = said["rope_layout"] == "neighbours"
        self.rope_dims = said["rope_dims"]
        self.interleaved, self.heads_first = said["interleaved"], said["heads_first"]
        rotated = a3["rope"] and layer not in a3["nope_layers"]
        pairs = torch.arange(a3["rope_pairs"][layer] if rotated else 0)
        attention.register_buffer(
            "rope_pairs", pairs.expand(a3["kv_heads"], -1).contiguous(), persistent=rotated
        )
        wanted = [p for p in "qkvo" if layer not in a3["fixed"]["qk" if p in "qk" else "ov"]]
        for name in dict.fromkeys(said["projections"][p] for p in wanted):
            found = [p for p in wanted if said["projections"][p] == name]
            dense = body.get_submodule(name.format(layer))
            own = Selected(self, dense) if found == ["o"] else Spread(self, found, dense)
            body.set_submodule(name.format(layer), own)
        if a3["qk_norm"] and "q" in wanted:
            for p, name in said["norms"].items():
                norm = SpreadNorm(self, p, a3["qk_norm"] == "layer", said["norm_eps"])
                body.set_submodule(name.format(layer), norm)
        attention.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of attention, with a narrow cache."""
        narrow = {}
        for name in ("past_key_values", "layer_past"):
            if (cache := kwargs.get(name)) is not None:
                # A decoder that could have an encoder has a cache for each.
                cache = getattr(cache, "self_attention_cache", cache)
                narrow[name] = NarrowCache(cache, self)
        return args, kwargs | narrow

    def rank(self, projection: str) -> int:
        """Dimensions of a head that a projection has."""
        return self.ov_rank if projection == "v" else self.qk_rank

    def dims(self, projection: str) -> Tensor:
        """The places (heads, r) of a projection's dimensions in its dense heads."""
        heads, pairs = self.heads[projection], self.attention.rope_pairs
        if projection == "v":
            return torch.arange(self.ov_rank, device=pairs.device).expand(heads, -1)
        half = self.rope_dims // 2
        both = (2 * pairs, 2 * pairs + 1) if self.neighbours else (pairs, pairs + half)
        first = self.rope_dims if pairs.numel() else 0
        rest = self.qk_rank - 2 * pairs.shape[1]
        others = torch.arange(first, first + rest, device=pairs.device).expand(len(pairs), -1)
        return torch.cat((*both, others), dim=1).repeat_interleave(heads // len(pairs), 0)

    def rows(self, projection: str, fused: list[str]) -> Tensor:
        """The places (heads r,) of a projection's outputs among those of all that are fused."""
        numbers = torch.arange(self.heads[projection], device=self.attention.rope_pairs.device)
        if self.interleaved and len(fused) > 1:
            share = self.heads["q"] // self.heads["k"]
            at = {"q": numbers // share * (share + 2) + numbers % share}
            at["k"] = numbers * (share + 2) + share
            at["v"] = at["k"] + 1
            heads = at[projection]
        else:
            before = fused[: fused.index(projection)]
            heads = numbers + sum(self.heads[other] for other in before)
        return (heads[:, None] * self.head_dim + self.dims(projection)).flatten()
