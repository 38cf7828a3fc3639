"""Stage losses: what each layer loses at each rank, for modes that eliminate (fisher, joint, obs).

The order in which channels, directions and RoPE pairs are dropped, and the predicted loss, do not
depend on the ratio. So they are computed once, down to the least rank that a3 allocates; allocate
and approx of every ratio read them.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from threading import Lock

import torch

from a3.artifacts.eliminations import (
    Unit,
    expert_of,
    of_layers,
    units_of,
    write_eliminations,
)
from a3.core.devices import require_device
from a3.core.errors import A3Error
from a3.core.files import write_record
from a3.core.progress import Bar
from a3.core.provenance import provenance
from a3.core.shards import share
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.shape import Arch
from a3.numerics.elimination import Elimination
from a3.solutions.functions import losses_of
from a3.solutions.modes import SHARING, eliminating, find_mode
from a3.solutions.plan import least_rank, require_fit
from a3.stages.approx.layers import LayerSolver
from a3.stages.approx.statistics import made_from, read_statistics

# As many layers as fit in so many bytes are solved at once, with one thread each: small matrices do
# not keep several cores busy. A layer has about six matrices of its channels in memory.
TOGETHER = 2**30


def losses(
    model_folder: Path,
    rxx_folder: Path,
    row: Mapping[str, str],
    out: Path,
    *,
    shard: str = "0of1",
    device: str = "cpu",
) -> None:
    """Write orders and losses of a range of layers ("0of4" to "3of4") to `out`, a .safetensors
    file, and the seconds that it took beside it.

    `row` has the modes of qk, ov and mlp; those that do not eliminate are left out. Raises A3Error
    if none eliminates, one does not fit the model, or statistics are missing or damaged.
    """
    start = time.perf_counter()
    modes = eliminating(row)
    if not modes:
        named = ", ".join(f"{component} {mode}" for component, mode in SHARING.items())
        raise A3Error(f"losses: no mode eliminates; expected at least one of {named}.")
    arch = load_arch(model_folder)
    for component, mode in modes.items():
        require_fit(arch, component, mode)
    kinds = {kind for component, mode in modes.items() for kind in find_mode(component, mode).kinds}
    statistics = read_statistics(rxx_folder, sorted(kinds), model_folder, arch)
    dense = Checkpoint(model_folder, arch.adapter.prefix)
    require_device(device, "float64")
    solver = LayerSolver(arch, dense, statistics, modes, {}, device=device)
    layers = share(arch.layers, shard, "layers")
    record = {
        "modes": modes,
        "layers": of_layers(layers),
        "weights_sha256": arch.weights_sha256,
        "provenance": provenance(__name__, **made_from(model_folder, arch, statistics)),
    }
    write_eliminations(out, eliminate_layers(solver, layers), record)
    write_record(out.with_suffix(".timing.json"), {"seconds": time.perf_counter() - start})


def eliminate_layers(solver: LayerSolver, layers: range) -> dict[int, dict[Unit, Elimination]]:
    """The eliminations of some layers, by unit; several layers at once if they are small."""
    threads = torch.get_num_threads()
    at_once = min(threads, max(1, TOGETHER // (6 * 8 * solver.arch.intermediate_size**2)))
    torch.set_num_threads(threads // at_once)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            found = pool.map(partial(eliminate_layer, solver, Lock()), layers)
            bar = Bar(found, total=len(layers), unit="layer", desc="losses by rank")
            return dict(zip(layers, bar, strict=True))
    finally:
        torch.set_num_threads(threads)


def eliminate_layer(solver: LayerSolver, reading: Lock, layer: int) -> dict[Unit, Elimination]:
    """The eliminations of one layer, by unit; `reading` lets one layer read at a time."""
    found = {}
    attention = cache(partial(solver.attention_weights, layer))  # QK and OV share one reading
    for component in solver.modes:
        if not is_eliminated(solver.arch, component, layer):
            continue
        least = least_rank(solver.arch, component)
        mode = solver.modes[component]
        for unit in units_of(solver.arch, component):
            expert = expert_of(unit)
            with reading:
                weights = solver.mlp_weights(layer, expert) if component == "mlp" else attention()
                read = solver.own_statistics(component, mode, layer, expert)
            found[unit] = losses_of(component, weights, read, least)
    return found


def is_eliminated(arch: Arch, component: str, layer: int) -> bool:
    """Whether a component of a layer is; scores of layers without RoPE among others are not."""
    return arch.drops_pairs(layer) if component == "qk" else arch.solves(component, layer)
