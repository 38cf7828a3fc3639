"""The paper's dense algorithm against ours, side by side in one run, on Llama-shaped random layers.

    python benchmarks/solver.py --sizes 1024 2048 4096

The paper's side as published: the square root of each d × d autocorrelation, then an SVD of the
d × d fused matrix of each head (GQA: of the g matrices of a group, together), for the MLP the
square root of the n × n autocorrelation. It is treated fairly: the same dtype (float64) and
threads, R^½ once per layer where heads share R, and for GQA also the randomised `svd_lowrank` of
the paper's own code. Heads are all alike: where there are many, two are timed and multiplied, which
the table says; so is the MLP's root of the largest sizes, by its cube law.

Ours is a3's own code with the building of the factors. a3 collects the h × h blocks Wᵀ R W, never
R itself; so that both sides start from the same statistics, "ours s" includes the products that
make the blocks from R. "as run s" is without them, as in the workflow. Peak memory is the most that
a component's side takes beyond what the layer holds before.
"""

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from a3.models.family import AttentionWeights, MLPWeights
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


@dataclass
class Cost:
    """Seconds and GiB beyond those held before, of one or several calls."""

    seconds: float = 0.0
    memory: float = 0.0

    def measure(self, call: Callable[[], Any], times: float = 1.0) -> Any:
        """The value of a call, whose seconds count `times`-fold."""
        most, done, before = [resident()], threading.Event(), resident()

        def watch() -> None:
            while not done.wait(0.002):
                most.append(max(most.pop(), resident()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        value = call()
        self.seconds += times * (time.perf_counter() - start)
        done.set()
        watcher.join()
        self.memory = max(self.memory, max(most[0], resident()) - before)
        return value


def resident() -> float:
    """GiB of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30


def gram(R: Tensor, W: Tensor) -> Tensor:
    """Wᵀ R W of each head."""
    return W.mT @ (R @ W)


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
        self.roots: tuple[Tensor, Tensor] | None = None  # R^½ and R^-½, which QK leaves for OV
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
        blocks, run, common, each, lowrank = Cost(), Cost(), Cost(), Cost(), Cost()
        G = blocks.measure(lambda: (gram(self.R, self.W.q), gram(self.R, self.W.k)))
        found = run.measure(lambda: qk.qk(self.W, *G, RANK))
        half, inverse = self.roots = common.measure(lambda: root(self.R))
        gap = 0.0
        for g in range(self.timed):

            def solve(g: int = g) -> tuple[Tensor, Tensor, Tensor]:
                heads = self.W.grouped(self.W.q)[g]
                # d × d of each head: R^½ W_k W_qᵀ R^½, those of a group side by side.
                target = torch.cat([half @ (self.W.k[g] @ W.T) @ half for W in heads], dim=1)
                U, V = truncated(target, inverse, None)
                return target, U, torch.cat([v @ inverse for v in V.split(self.d, dim=1)], dim=1)

            target, U, V = each.measure(solve, self.groups / self.timed)
            lowrank.measure(
                lambda t=target: torch.svd_lowrank(t, q=RANK, niter=2), self.groups / self.timed
            )
            mine = [found.k[g] @ W.T @ half for W in self.W.grouped(found.q)[g]]
            best = U @ torch.cat([piece @ half for piece in V.split(self.d, dim=1)], dim=1)
            gap = max(gap, loss(half, target, torch.cat(mine, dim=1)) - loss(half, target, best))
        return self.row("QK", common, each, blocks, run, gap, lowrank.seconds)

    def ov(self) -> dict[str, Any]:
        """MHA: `axkv`, an R of its own for each head. GQA: `xkv`, as published."""
        mha = self.groups == self.heads
        blocks, run, common, each, lowrank = Cost(), Cost(), Cost(), Cost(), Cost()
        if mha:
            own = [autocorrelation(self.d, self.draw) for _ in range(TIMED)]
            blocks.measure(lambda: gram(own[0], self.W.v[0]), self.heads)
            S = torch.stack([gram(own[i % TIMED], W) for i, W in enumerate(self.W.v)])
            found = run.measure(lambda: ov.axkv(self.W, S, RANK))
        else:
            G = blocks.measure(lambda: gram(self.R, self.W.v))
            found = run.measure(lambda: ov.xkv(self.W, G, RANK))
            half, inverse = self.roots
        gap = 0.0
        for g in range(self.timed):

            def solve(g: int = g) -> tuple[Tensor, ...]:
                roots = root(own[g]) if mha else (half, inverse)
                heads = self.W.grouped(self.W.o)[g]
                target = torch.cat([roots[0] @ (self.W.v[g] @ W) for W in heads], dim=1)
                return roots[0], target, *truncated(target, roots[1], None)

            halved, target, U, V = each.measure(solve, self.groups / self.timed)
            lowrank.measure(
                lambda t=target: torch.svd_lowrank(t, q=RANK, niter=2), self.groups / self.timed
            )
            mine = torch.cat([found.v[g] @ W for W in self.W.grouped(found.o)[g]], dim=1)
            gap = max(gap, loss(halved, target, mine) - loss(halved, target, U @ V))
        return self.row("OV", common, each, blocks, run, gap, lowrank.seconds)

    def row(
        self,
        component: str,
        common: Cost,
        each: Cost,
        blocks: Cost,
        run: Cost,
        gap: float,
        lowrank: float,
    ) -> dict[str, Any]:
        """One line of the table: the paper's R^½ and heads, our blocks and solution."""
        mha = self.groups == self.heads
        note = f"{self.timed} of {self.groups} {'heads' if mha else 'groups'} timed"
        if not mha:
            note += f"; svd_lowrank for all would take {lowrank:.3g} s"
            note += "; R^½ is QK's" if component == "OV" else ""
        paper = Cost(common.seconds + each.seconds, max(common.memory, each.memory))
        kind = "MHA" if mha else "GQA"
        return line(self.d, kind, component, paper, blocks, run, gap, note) | {
            "root": common.seconds
        }


def intermediate(d: int, layer: Layer) -> dict[str, Any]:
    """MLP with n = 4 d channels: the paper's square root of R against its diagonal."""
    n = 4 * d
    W = MLPWeights(up=layer.random(d, n), gate=layer.random(d, n), down=layer.random(n, d))
    measured = min(n, LARGEST_ROOT)
    R = autocorrelation(measured, layer.draw)

    def score() -> Tensor:
        power = root(R)[0].square().sum(0) * W.down[:measured].square().sum(1)
        return power.topk(round((1 - RATIO) * measured)).indices

    paper, run = Cost(), Cost()
    kept = paper.measure(score, (n / measured) ** 3)
    timed = MLPWeights(up=W.up[:, :measured], gate=W.gate[:, :measured], down=W.down[:measured])
    mine = mlp.rxx_w(timed, R.diagonal(), len(kept)).channels
    diagonal = torch.rand(n, generator=layer.draw, dtype=torch.float64)
    run.measure(lambda: mlp.rxx_w(W, diagonal, round((1 - RATIO) * n)))
    whole = measured == n
    note = "timed whole" if whole else f"timed at n = {measured}, times {(n // measured) ** 3}"
    gap = float(set(kept.tolist()) != set(mine.tolist()))
    return line(d, "any", "MLP", paper, Cost(), run, gap, note) | {"root": paper.seconds}


def line(
    d: int, kind: str, component: str, paper: Cost, blocks: Cost, run: Cost, gap: float, note: str
) -> dict[str, Any]:
    """One line; `gap` is ours minus the paper's objective, relative to the zero solution."""
    ours = blocks.seconds + run.seconds
    return {
        "d": d,
        "attention": kind,
        "component": component,
        "paper s": paper.seconds,
        "ours s": ours,
        "ratio": paper.seconds / ours,
        "as run s": run.seconds,
        "ratio as run": paper.seconds / run.seconds,
        "paper GiB": paper.memory,
        "ours GiB": max(blocks.memory, run.memory),
        "objective gap": gap,
        "paper's side": note,
    }


def total(rows: pd.DataFrame, d: int | str, kind: str, component: str, note: str) -> dict[str, Any]:
    """The line of several components together."""
    seconds = [Cost(rows[name].sum()) for name in ("paper s", "ours s", "as run s")]
    paper, ours, run = seconds
    paper.memory, run.memory = rows["paper GiB"].max(), rows["ours GiB"].max()
    blocks = Cost(ours.seconds - run.seconds)
    return line(d, kind, component, paper, blocks, run, rows["objective gap"].max(), note)


def layer_components(rows: pd.DataFrame, d: int, kind: str) -> pd.DataFrame:
    """QK, OV and MLP of one layer."""
    return rows[(rows.d == d) & rows.attention.isin((kind, "any"))]


def whole_layers(rows: pd.DataFrame) -> pd.DataFrame:
    """Add, for each size and attention type, the line of the whole layer."""
    pairs = rows[rows.attention != "any"][["d", "attention"]].drop_duplicates()
    whole = [
        total(layer_components(rows, d, kind), d, kind, "layer", "")
        for d, kind in pairs.itertuples(index=False)
    ]
    return pd.concat([rows, pd.DataFrame(whole)], ignore_index=True)


@dataclass(frozen=True)
class Model:
    """Shapes of a whole model, in heads of 128."""

    name: str
    layers: int
    d: int
    groups: int
    n: int


MODELS = {
    "MHA": Model("LLaMA-2-7B", layers=32, d=4096, groups=32, n=11008),
    "GQA": Model("LLaMA-3.1-70B", layers=80, d=8192, groups=8, n=28672),
}


def whole_model(rows: pd.DataFrame, d: int, kind: str) -> dict[str, Any]:
    """A whole model from one measured layer.

    The paper's roots go with the cube of their width, its SVDs with g d³ a group, which is H d³ for
    all; our products with H d² and our factors with H d; the MLP's with n d.
    """
    model, components = MODELS[kind], layer_components(rows, d, kind).copy()
    wide, many = model.d / d, model.d / d  # heads are as many as d / 128
    for i, row in components.iterrows():
        if row.component == "MLP":
            more = (model.n / (4 * d)) ** 3, (model.n * model.d) / (4 * d * d)
            scaled = row["paper s"] * more[0], row["ours s"] * more[1], row["as run s"] * more[1]
        else:
            each = row["paper s"] - row.root
            blocks = row["ours s"] - row["as run s"]
            run = row["as run s"] * wide * many
            paper = row.root * wide**3 + each * wide**3 * many
            scaled = paper, run + blocks * wide**2 * many, run
        components.loc[i, ["paper s", "ours s", "as run s"]] = [
            value * model.layers for value in scaled
        ]
    whole = total(components, model.d, kind, model.name, f"from one layer of d = {d}")
    return whole | {"paper GiB": float("nan"), "ours GiB": float("nan")}


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
    components = pd.DataFrame(rows)
    table = whole_layers(components).sort_values(["d", "attention"], kind="stable")
    models = [whole_model(components, max(chosen.sizes), kind) for kind in MODELS]
    table = pd.concat([table, pd.DataFrame(models)]).drop(columns="root")
    print(table.to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    main()
