"""Stage spectra: how quickly the energy of each layer's functional matrices falls with the rank.

Computes the loss of the solutions at every rank from statistics alone; no model runs.
"""

from pathlib import Path

import torch
from torch import Tensor

from a3.core.files import write_record
from a3.core.progress import Bar
from a3.core.provenance import provenance
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.family import AttentionWeights
from a3.models.shape import Arch
from a3.numerics.linalg import gram_factor, relative
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS, SPECTRA_KINDS
from a3.solutions.mlp import FEWEST_TOKENS, row_power
from a3.solutions.modes import COMPONENTS
from a3.solutions.qk import pair_scores, with_gains
from a3.stages.approx.statistics import made_from, read_statistics

# Number of steps from zero to full rank at which curves are stored.
STEPS = 20


def spectra(model_folder: Path, rxx_folder: Path, out: Path) -> None:
    """Write the energy that is lost at each rank, by component, layer and group, to `out` (JSON).

    Energy is the squared norm of a functional matrix, split among the directions that a solution
    keeps or drops, largest first. For each group of query heads with its key and value head:

    - qk: squared singular values of R_q^½ W_q W_kᵀ R_k^½, heads stacked (paper, Theorem 2); with
      RoPE the scores of the pairs (section 3.4), each shared by its two dimensions;
    - ov: squared singular values of R^½ W_v [W_o,1 … W_o,g] (Theorem 3);
    - mlp: scores ‖r_j‖² ‖w_j‖² of the channels (section 3.3); one curve for each expert, without
      experts that few tokens reached.

    `lost` has for each component its layers' curves, (curves, ranks): the share of the energy
    beyond each of `ranks`. Raises A3Error if a statistic is missing, damaged or another model's.
    """
    arch = load_arch(model_folder)
    arch.require_every_layer("spectra")
    rxx = read_statistics(rxx_folder, SPECTRA_KINDS, model_folder, arch)
    said = provenance(__name__, **made_from(model_folder, arch, rxx))
    checkpoint = Checkpoint(model_folder, arch.adapter.prefix)
    full = {component: arch.full_rank(component) for component in COMPONENTS}
    ranks = {component: ranks_of(size) for component, size in full.items()}
    lost: dict[str, list[list[list[float]]]] = {component: [] for component in full}
    for layer in Bar(range(arch.layers), unit="layer", desc="spectra"):
        for component, energy in energies(arch, checkpoint, rxx, layer).items():
            lost[component].append(lost_beyond(energy, ranks[component]).tolist())
    record = {
        "full": full,
        "ranks": ranks,
        "lost": lost,
        "provenance": said,
    }
    write_record(out, record)


def ranks_of(full: int) -> list[int]:
    """Every twentieth of the full rank, rounded, without 0."""
    return sorted({round(full * step / STEPS) for step in range(1, STEPS + 1)} - {0})


def lost_beyond(energy: Tensor, ranks: list[int]) -> Tensor:
    """Share of the energies (…, n), largest first, that is lost at each rank, (…, ranks).

    Summed from the smallest, so that what is left of very little is exact too.
    """
    tail = energy.flip(-1).cumsum(-1).flip(-1)
    beyond = torch.cat((tail, torch.zeros_like(tail[..., :1])), dim=-1)[..., ranks]
    return relative(beyond, tail[..., :1])


def energies(
    arch: Arch, checkpoint: Checkpoint, rxx: dict[str, Rxx], layer: int
) -> dict[str, Tensor]:
    """Energies of a layer's components, largest first: qk and ov (G, h), mlp (1 or experts, n)."""
    fields = arch.to_json()
    R = {kind: each.R(layer, arch.statistic_shape(KINDS[kind])) for kind, each in rxx.items()}
    weights = arch.adapter.attention(checkpoint, layer, fields)
    experts = range(arch.experts) if arch.experts else [None]
    power = [
        row_power(arch.adapter.mlp(checkpoint, layer, fields, expert).down) for expert in experts
    ]
    channels = R["down_diagonal"].view(len(power), -1) * torch.stack(power)
    if arch.experts:
        channels = channels[rxx["down_diagonal"].counts(layer, arch.experts) >= FEWEST_TOKENS]
    return {
        "qk": qk_energy(weights, R["q_blocks"], R["k_blocks"]),
        "ov": ov_energy(weights, R["v_blocks"]),
        "mlp": channels.sort(dim=-1, descending=True).values,
    }


def qk_energy(weights: AttentionWeights, Gq: Tensor, Gk: Tensor) -> Tensor:
    """(G, h), largest first, of Gq (H, h, h) and Gk (G, h, h).

    With partial RoPE, the pairs' energies are merged with the singular values of the rest.
    """
    pairs = pair_scores(weights, Gq, Gk) / 2
    Gq, Gk = with_gains(weights, Gq, Gk)
    Gq, rotated = weights.grouped(Gq).sum(1), weights.rope_dims
    rest = squared_singular_values(Gk[:, rotated:, rotated:], Gq[:, rotated:, rotated:])
    return torch.cat((pairs, pairs, rest), dim=-1).sort(dim=-1, descending=True).values


def ov_energy(weights: AttentionWeights, Gv: Tensor) -> Tensor:
    """(G, h), largest first, of Gv (G, h, h)."""
    o = weights.grouped(weights.o)
    return squared_singular_values(Gv, (o @ o.mT).sum(1))


def squared_singular_values(G: Tensor, K: Tensor) -> Tensor:
    """Of S W [P₁ … P_g], largest first, (…, h), with G = Wᵀ Sᵀ S W and K = Σᵢ Pᵢ Pᵢᵀ (…, h, h)."""
    if G.shape[-1] == 0:
        return G.diagonal(dim1=-2, dim2=-1)
    C, _ = gram_factor(G)
    core = C @ K @ C.mT
    return torch.linalg.eigvalsh((core + core.mT) / 2).clamp(min=0).flip(-1)
