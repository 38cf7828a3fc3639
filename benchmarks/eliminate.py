"""Solving one layer by a3-plus: an earlier build beside this one, on one core.

    python benchmarks/eliminate.py                  # n 3584, d 1024: a minute
    python benchmarks/eliminate.py --size 8b        # n 14336, d 4096: half an hour, 10 GB

Times what `a3 losses`, `a3 allocate` and `a3 approx` compute for one layer whose ratio is 0.2: the
losses by rank down to an eighth, and the solution at 0.8. A build before `a3 losses` eliminated in
allocate and again in approx. Each build runs in a process of its own, one after the other, on the
same statistics: of activations silu(u) v, where u and v are sums of few directions of falling size
and of noise, and --huge channels are 100 times larger. Prints seconds of CPU time (and elapsed
ones, which other processes lengthen), peak memory, and the relative difference of the loss
tr(Xᵀ C X F) of both solutions, computed directly in float64.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Of Llama 3.1: heads, key/value heads; then n, d of a quarter, a half and all of its sizes.
SIZES = {"small": (8, 2, 3584, 1024), "half": (16, 4, 7168, 2048), "8b": (32, 8, 14336, 4096)}
HEAD = 128
KEPT, LEAST, DAMPING = 0.8, 0.125, 4096 / 262144


def activations(tokens: int, width: int, huge: int, seed: int) -> Tensor:
    """silu(u) v of correlated channels of very different sizes, (tokens, width), float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    few = max(8, width // 16)
    fall = torch.arange(1, few + 1).float().pow(-0.7)
    u, v = (
        draw(tokens, few) * fall @ draw(few, width) + 0.5 * draw(tokens, width) for _ in range(2)
    )
    x = torch.nn.functional.silu(u) * v * draw(width).exp()
    x[:, :huge] *= 100
    return x


def gram(width: int, tokens: int, huge: int, seed: int) -> Tensor:
    """An autocorrelation (width, width)."""
    x = activations(tokens, width, huge, seed)
    return (x.T @ x).double() / tokens


def made(size: str, huge: int) -> dict[str, Tensor]:
    """Weights and statistics of a layer."""
    H, G, n, d = SIZES[size]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    q, k = torch.randn(2, H, 4 * HEAD, HEAD, generator=generator).double()
    e = torch.randn(H, 8 * HEAD, HEAD, generator=generator).double()
    return {
        "down": draw(n, d),
        "C": gram(n, n + 1024, huge, 1),
        "F_mlp": gram(d, 2 * d, huge, 2) * 1e-9,
        "o": draw(H, HEAD, d).double(),
        "R": gram(H * HEAD, 2 * H * HEAD, huge, 3),
        "F_ov": gram(d, 2 * d, huge, 4) * 1e-9,
        "qk": draw(H, d, HEAD).double(),
        "Gq": q.mT @ q,
        "Gk": (k.mT @ k)[:G].contiguous(),
        "pairs": e.mT @ e * 1e-9,
    }


def solve(data: Path, out: Path) -> None:
    """Solve the layer with the a3 that Python finds, and write the solution and the seconds."""
    from a3.models.family import AttentionWeights, MLPWeights
    from a3.solutions import mlp, ov, qk

    given = load_file(data)
    shared = "known" in inspect.signature(mlp.obs).parameters
    groups = len(given["Gk"])
    weights = AttentionWeights(
        q=given["qk"], k=given["qk"][:groups], v=given["qk"][:groups], o=given["o"], rope_dims=HEAD
    )
    channels = MLPWeights(torch.zeros(1, len(given["down"])), None, given["down"])
    least = {"qk": int(LEAST * HEAD) // 2, "ov": int(LEAST * HEAD), "mlp": len(given["C"]) // 8}
    kept = {"qk": int(KEPT * HEAD) // 2 * 2, "ov": int(KEPT * HEAD)}
    kept["mlp"] = int(KEPT * len(given["C"]))
    jobs = {
        "qk": (qk.fisher_losses, qk.fisher, weights, ("pairs",), ("Gq", "Gk", "pairs")),
        "ov": (ov.joint_losses, ov.joint, weights, ("R", "F_ov"), ("R", "F_ov", DAMPING)),
        "mlp": (mlp.obs_losses, mlp.obs, channels, ("C", "F_mlp"), ("C", "F_mlp", DAMPING)),
    }
    seconds, found = {}, {}
    for name, (losses, solution, of, few, many) in jobs.items():
        few, many = ([given.get(key, key) for key in keys] for keys in (few, many))
        ends = () if name == "qk" and shared else (least[name],)
        seconds[f"{name} losses"], known = timed(losses, of, *few, *ends)
        more = (known,) if shared else ()
        seconds[f"{name} solution"], found[name] = timed(solution, of, *many, kept[name], *more)
        losses = known.losses if shared else known[1]
        found[f"{name}.losses"] = losses[:: max(1, len(losses) // 16)]
    tensors = {
        "v": found["ov"].v,
        "o": found["ov"].o,
        "q": found["qk"].q,
        "k": found["qk"].k,
        "down": found["mlp"].down,
        "channels": found["mlp"].channels,
    }
    tensors |= {key: value for key, value in found.items() if key.endswith("losses")}
    save_file({key: value.contiguous() for key, value in tensors.items()}, out)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
    errors = {name: found[name].relative_error for name in jobs}
    said = {"seconds": seconds, "peak": peak, "errors": errors}
    out.with_suffix(".json").write_text(json.dumps(said))


def timed(call: Any, *arguments: Any) -> tuple[tuple[float, float], Any]:
    """Seconds of CPU time and elapsed ones, and the result."""
    start = time.process_time(), time.perf_counter()
    found = call(*arguments)
    return (time.process_time() - start[0], time.perf_counter() - start[1]), found


def run(tree: Path, data: Path, out: Path, threads: int) -> dict[str, Any]:
    """Solve the layer by the build in the folder `tree`."""
    environ = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--solve", str(data), str(out)]
    subprocess.run(command, env=environ, check=True)
    return json.loads(out.with_suffix(".json").read_text())


def lost(given: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """tr(Xᵀ C X F) of the MLP and of OV, from its definition."""
    X = given["down"].double()
    X[found["channels"]] -= found["down"].double()
    H, groups = len(given["o"]), len(given["Gk"])
    # v = W_v B has the basis B of each group, since W_v has full rank.
    basis = torch.linalg.lstsq(given["qk"][:groups], found["v"]).solution
    Z = basis.repeat_interleave(H // groups, 0) @ found["o"]
    Y = (given["o"] - Z).flatten(0, 1)
    return {
        "mlp": (X * (given["C"] @ (X @ given["F_mlp"]))).sum().item(),
        "ov": (Y * (given["R"] @ (Y @ given["F_ov"]))).sum().item(),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--before", default="daac38b", help="commit of the earlier build")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--huge", type=int, default=8, help="channels of 100 times the size")
    options.add_argument("--alone", action="store_true", help="only time this build")
    options.add_argument("--solve", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", chosen.threads)))
    if chosen.solve:
        solve(*chosen.solve)
        return
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as name:
        work, earlier = Path(name), Path(name, "before")
        data = work / "given.safetensors"
        save_file(made(chosen.size, chosen.huge), data)
        trees = {"now": here}
        if not chosen.alone:
            earlier.mkdir()
            archive = subprocess.run(
                ["git", "archive", chosen.before, "a3"], cwd=here, capture_output=True, check=True
            )
            subprocess.run(["tar", "-x", "-C", earlier], input=archive.stdout, check=True)
            trees = {"before": earlier, "now": here}
        said, losses = {}, {}
        for build, tree in trees.items():
            out = work / f"{build}.safetensors"
            said[build] = run(tree, data, out, chosen.threads)
            told = said[build]["seconds"]
            total, elapsed = map(sum, zip(*told.values(), strict=True))
            parts = ", ".join(f"{name} {cpu:.1f}" for name, (cpu, _) in told.items())
            print(
                f"{build}: {total:.1f} s ({parts}); elapsed {elapsed:.1f} s; "
                f"{said[build]['peak']:.1f} GiB",
                flush=True,
            )
            losses[build] = load_file(out)
        if chosen.alone:
            return
        before, now = (
            [sum(times) for times in zip(*said[build]["seconds"].values(), strict=True)]
            for build in trees
        )
        print(
            f"{before[0] / now[0]:.2f} times as fast (elapsed {before[1] / now[1]:.2f})", flush=True
        )
        given = load_file(data)
        one, other = (lost(given, losses[build]) for build in trees)
        for name in one:
            curves = [losses[build][f"{name}.losses"] for build in trees]
            apart = ((curves[0] - curves[1]).abs() / curves[0].clamp(min=1e-300)).max().item()
            print(
                f"{name}: loss {one[name]:.9e}, {other[name] / one[name] - 1:+.1e}; losses by rank "
                f"within {apart:.1e}; relative error as told {said['before']['errors'][name]:.9f}, "
                f"{said['now']['errors'][name]:.9f}"
            )
        kept = [set(losses[build]["channels"].tolist()) for build in trees]
        print(f"{len(kept[0] - kept[1])} of {len(kept[0])} kept channels differ")
        print("qk: the same queries and keys:", torch.equal(*(losses[b]["q"] for b in trees)))


if __name__ == "__main__":
    main()
