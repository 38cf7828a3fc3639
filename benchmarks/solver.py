"""The paper's dense algorithm against ours, side by side in one run, on Llama-shaped random layers.

    python benchmarks/solver.py --sizes 1024 2048 4096

The paper's side as published: the square root of each d × d autocorrelation, then an SVD of the
d × d fused matrix of each head (GQA: of the g matrices of a group, together), for the MLP the
square root of the n × n autocorrelation. It is treated fairly: the same dtype (float64) and
threads, R^½ once per layer where heads share R, and for GQA also the randomised `svd_lowrank` of
the paper's own code. Heads are all alike: where there are many, two are timed and multiplied, which
the table says; so is the MLP's root of the largest sizes, by its cube law. Ours is a3's own code,
with the R·W products and the building of the factors.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from a3.models.families import AttentionWeights, MLPWeights
from a3.solutions import mlp, ov, qk

HEAD = 128
RATIO = 0.2
RANK = round((1 - RATIO) * HEAD)
TIMED = 2  # heads or groups
LARGEST_ROOT = 8192


def autocorrelation(width: int, draw: torch.Generator) -> Tensor:
    """A full-rank R whose spectrum decays over four decades, as that of activations does."""
    x = torch.randn(width + 64, width, generator=draw, dtype=torch.float64)
    x *= torch.logspace(0, -2, width, dtype=torch.float64)
    return x.T @ x / len(x)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and value of one call."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def root(R: Tensor) -> tuple[Tensor, Tensor]:
    """R^½ and R^-½, by eigendecomposition."""
    values, vectors = torch.linalg.eigh(R)
    half = values.clamp(min=1e-30).sqrt()
    return (vectors * half) @ vectors.T, (vectors / half) @ vectors.T


def truncated(target: Tensor, inverse: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """The paper's factors R^-½ U_r Σ_r^½ and Σ_r^½ V_rᵀ (R^-½) of an SVD."""
    U, S, V = torch.linalg.svd(target, full_matrices=False)
    scale = S[:RANK].sqrt()
    second = scale[:, None] * V[:RANK]
    return inverse @ (U[:, :RANK] * scale), second if right is None else second @ right


def loss(half: Tensor, target: Tensor, found: Tensor) -> float:
    """‖R^½ found − target‖² / ‖target‖², where target already has R^½ in it."""
    return ((half @ found - target).square().sum() / target.square().sum()).item()


class Layer:
    """One random attention layer of hidden size d with heads of 128; GQA has 4 heads a group."""

    def __init__(self, d: int, gqa: bool) -> None:
        self.draw = torch.Generator().manual_seed(d)
        self.d, self.heads = d, d // HEAD
        self.groups = self.heads // 4 if gqa else self.heads
        self.timed = min(TIMED, self.groups)
        self.R = autocorrelation(d, self.draw)
        self.W = AttentionWeights(
            q=self.random(self.heads, d, HEAD),
            k=self.random(self.groups, d, HEAD),
            v=self.random(self.groups, d, HEAD),
            o=self.random(self.heads, HEAD, d),
        )

    def random(self, *shape: int) -> Tensor:
        """Weights of unit gain."""
        W = torch.randn(*shape, generator=self.draw, dtype=torch.float64)
        return W / shape[-2] ** 0.5

    def qk(self) -> dict[str, Any]:
        """Scores without RoPE, R on both sides."""
        ours, found = timed(lambda: qk.qk(self.W, self.R, RANK))
        paper, (half, inverse) = timed(lambda: root(self.R))
        each, lowrank, gap = 0.0, 0.0, 0.0
        for g in range(self.timed):
            heads = self.W.grouped(self.W.q)[g]
            start = time.perf_counter()
            # d × d of each head: R^½ W_k W_qᵀ R^½, those of a group side by side.
            target = torch.cat([half @ (self.W.k[g] @ W.T) @ half for W in heads], dim=1)
            U, V = truncated(target, inverse, None)
            V = torch.cat([part @ inverse for part in V.split(self.d, dim=1)], dim=1)
            each += (time.perf_counter() - start) / self.timed
            lowrank += timed(lambda t=target: torch.svd_lowrank(t, q=RANK, niter=2))[0] / self.timed
            mine = [found.k[g] @ W.T @ half for W in self.W.grouped(found.q)[g]]
            best = U @ torch.cat([part @ half for part in V.split(self.d, dim=1)], dim=1)
            gap = max(gap, loss(half, target, torch.cat(mine, dim=1)) - loss(half, target, best))
        return self.row("QK", paper + each * self.groups, ours, gap, lowrank)

    def ov(self) -> dict[str, Any]:
        """MHA: `axkv`, an R of its own for each head. GQA: `xkv`, as published."""
        mha = self.groups == self.heads
        own = [autocorrelation(self.d, self.draw) for _ in range(TIMED)] if mha else []
        # What a hook on o_proj's input sees, for all heads: W_vᵀ R_p W_v.
        blocks = (
            torch.stack([W.T @ (own[i % TIMED] @ W) for i, W in enumerate(self.W.v)])
            if mha
            else None
        )
        solve = (
            (lambda: ov.axkv(self.W, blocks, RANK))
            if mha
            else (lambda: ov.xkv(self.W, self.R, RANK))
        )
        ours, found = timed(solve)
        paper, (half, inverse) = (0.0, (None, None)) if mha else timed(lambda: root(self.R))
        each, lowrank, gap = 0.0, 0.0, 0.0
        for g in range(self.timed):
            start = time.perf_counter()
            if mha:
                half, inverse = root(own[g])
            heads = self.W.grouped(self.W.o)[g]
            target = torch.cat([half @ (self.W.v[g] @ W) for W in heads], dim=1)
            U, V = truncated(target, inverse, None)
            each += (time.perf_counter() - start) / self.timed
            lowrank += timed(lambda t=target: torch.svd_lowrank(t, q=RANK, niter=2))[0] / self.timed
            mine = torch.cat([found.v[g] @ W for W in self.W.grouped(found.o)[g]], dim=1)
            gap = max(gap, loss(half, target, mine) - loss(half, target, U @ V))
        return self.row("OV", paper + each * self.groups, ours, gap, lowrank)

    def row(
        self, part: str, paper: float, ours: float, gap: float, lowrank: float
    ) -> dict[str, Any]:
        """One line of the table."""
        mha = self.groups == self.heads
        note = f"{self.timed} of {self.groups} {'heads' if mha else 'groups'} timed"
        if not mha:
            note += f"; svd_lowrank in the SVD's place: {lowrank * self.groups:.3g} s for all"
        return line(self.d, "MHA" if mha else "GQA", part, paper, ours, gap, note)


def intermediate(d: int, layer: Layer) -> dict[str, Any]:
    """MLP with n = 4 d channels: the paper's square root of R against its diagonal."""
    n = 4 * d
    W = MLPWeights(up=layer.random(d, n), gate=layer.random(d, n), down=layer.random(n, d))
    measured = min(n, LARGEST_ROOT)
    R = autocorrelation(measured, layer.draw)

    def paper() -> Tensor:
        score = root(R)[0].square().sum(0) * W.down[:measured].square().sum(1)
        return score.topk(round((1 - RATIO) * measured)).indices

    seconds, kept = timed(paper)
    part = MLPWeights(up=W.up[:, :measured], gate=W.gate[:, :measured], down=W.down[:measured])
    mine = mlp.rxx_w(part, R.diagonal(), len(kept)).channels
    diagonal = torch.rand(n, generator=layer.draw, dtype=torch.float64)
    ours, _ = timed(lambda: mlp.rxx_w(W, diagonal, round((1 - RATIO) * n)))
    note = (
        "timed whole" if measured == n else f"timed at n = {measured}, times {(n // measured) ** 3}"
    )
    gap = float(set(kept.tolist()) != set(mine.tolist()))
    return line(d, "any", "MLP", seconds * (n / measured) ** 3, ours, gap, note)


def line(d: int, kind: str, part: str, paper: float, ours: float, gap: float, note: str) -> dict:
    """One line; `gap` is ours minus the paper's objective, relative to the zero solution."""
    names = (
        "d",
        "attention",
        "part",
        "paper s",
        "ours s",
        "ratio",
        "objective gap",
        "paper's side",
    )
    return dict(zip(names, (d, kind, part, paper, ours, paper / ours, gap, note), strict=True))


def whole_layers(rows: pd.DataFrame) -> pd.DataFrame:
    """Add, for each size and attention type, the line of the whole layer."""
    whole = []
    for (d, kind), group in rows[rows.attention != "any"].groupby(["d", "attention"], sort=False):
        parts = pd.concat([group, rows[(rows.d == d) & (rows.attention == "any")]])
        paper, ours = parts["paper s"].sum(), parts["ours s"].sum()
        whole.append(line(d, kind, "layer", paper, ours, parts["objective gap"].max(), ""))
    return pd.concat([rows, pd.DataFrame(whole)], ignore_index=True)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    # The first calls load libraries and touch memory.
    warm = Layer(512, gqa=False)
    warm.qk(), warm.ov()
    rows = []
    for d in chosen.sizes:
        for gqa in (False, True):
            layer = Layer(d, gqa)
            rows += [layer.qk(), layer.ov()]
            print(pd.DataFrame(rows[-2:]).to_string(), flush=True)
        rows.append(intermediate(d, layer))
    table = whole_layers(pd.DataFrame(rows)).sort_values(["d", "attention"], kind="stable")
    print(table.to_markdown(index=False, floatfmt=".3g"))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
