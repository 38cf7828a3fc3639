"""MLP: keep r of n intermediate channels (paper section 3.3)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from a3.models.family import MLPWeights
from a3.numerics.assignment import assign
from a3.numerics.clusters import average_linkage
from a3.numerics.elimination import Elimination, eliminate
from a3.numerics.linalg import (
    keep_best,
    relative,
    ridge_leverage,
    ridge_of,
    root_of,
    take_over,
    times_root,
)

# a3 tells if fewer calibration tokens reach an expert: the relative error of its channels' mean
# squares exceeds sqrt(2 / 256) = 9 %.
FEWEST_TOKENS = 256

# An expert's statistics are shrunk towards the mean over experts as if by so many tokens of it.
# One was better than 8, 32, 64 or 256, with 1,024 calibration tokens as with 32,768 (docs/log.md).
MEAN_TOKENS = 1

# Damping of elimination, and so of the predicted loss, as a share of a channel's mean square. In
# allocation it weighs the MLP against attention, so it must not depend on the calibration's size.
ELIMINATION = 0.03

# MoDeGPT's ridge, as a share of a channel's mean square; the paper does not specify it.
MODEGPT_RIDGE = 1e-2

# Number of columns of W_down that are converted to float64 at a time.
CHUNK = 256


@dataclass(frozen=True)
class MLPSolution:
    """up and gate (d̂, r), down (r, d); channels (r,) kept, ascending.

    `relative_error` is the dropped share of Σ_j ‖r_j‖² ‖w_j‖²: the functional error without the
    cross terms between dropped channels, which the diagonal of R does not contain. `bias` (d,) is
    added to the output; None for no bias.
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    channels: Tensor
    relative_error: float
    bias: Tensor | None = None


def expert_ridge(power: Tensor, counts: Tensor) -> Tensor:
    """λ (), so that C + λ 1 is an expert's C shrunk towards the mean over the experts of a layer.

    `power` (E, n) is the diagonal of each expert's C = Σ zᵀz / N, over the tokens that reach it and
    N tokens in all; `counts` (E,) are these tokens. Channels of different experts have nothing in
    common: an expert computes the same with its channels in another order, or with the signs of
    rows j of up and down changed. The mean over experts and over all these equivalent forms of them
    is a 1, a being the mean square of a channel over all experts' tokens. With N_e tokens,
    S_e = Σ zᵀz / N_e becomes (N_e S_e + τ a 1) / (N_e + τ), τ = MEAN_TOKENS: as if τ more tokens of
    this mean had reached the expert. In C that adds λ = τ a / N. So an expert that no token reaches
    keeps the channels with the largest rows of W_down, and counts for allocation as one that τ
    tokens reach.
    """
    return MEAN_TOKENS * power.mean(1).sum() / counts.sum()


def shrinkage(tokens: float) -> float:
    """The share of the mean over experts in the statistics of one that so many tokens reach."""
    return MEAN_TOKENS / (tokens + MEAN_TOKENS)


def frequency(norms: Tensor, counts: Tensor, keep: int) -> Tensor:
    """Keep the experts that most tokens reach, and drop the others with their rows of the router.

    The heavy-hitters count of SEER-MoE (Muzio et al. 2024, arXiv 2404.05089, section 3), in each
    layer the same number of experts. norms and counts (E,); the numbers of the kept experts,
    ascending.
    """
    return keep_best(counts, keep)


def reap(norms: Tensor, counts: Tensor, keep: int) -> Tensor:
    """Keep the experts of the largest mean norm of the output times the routing weight.

    REAP's criterion (Lasby et al. 2025, arXiv 2510.13999): what the layer's output loses, in the
    mean over the tokens that reach the expert. `norms` (E,) are sums of these norms over the
    `counts` tokens, at any common scale. The others are dropped as by `frequency`.
    """
    return keep_best(norms / counts.clamp(min=1), keep)


def hc_smoe(outputs: Tensor, counts: Tensor, keep: int) -> Tensor:
    """Merge experts whose mean outputs are near each other (average linkage), by their tokens.

    HC-SMoE (Chen et al. 2024, arXiv 2410.08589), in the form of its main results, and as its
    authors' code has it: average linkage of expert outputs, frequency-weighted merging. `outputs`
    (E, d) are means over all T calibration tokens, wherever these are routed:
    o_e = 1/T Σ_x E_e(x). Of the clusters, one an expert at first, the two with the least average
    distance 1/(|A| |B|) Σ_{a ∈ A, b ∈ B} ‖o_a - o_b‖ are joined, until `keep` are left, in each
    layer as many. Which of them each expert is in, (E,), by the order of their first experts;
    `shares_of_merged` says how their weights are added up.
    """
    return average_linkage(outputs, keep)


def m_smoe(logits: Tensor, counts: Tensor, keep: int) -> Tensor:
    """Merge experts into those that most tokens reach, by similarity of the router's logits.

    M-SMoE (Li et al. 2023, arXiv 2310.01334). The `keep` experts with the largest `counts` (E,) are
    dominant. Each other one goes into the dominant one of the largest
    Sim(e, f) = cosine(H_e, H_f), H (E, T) being the router's logits on all calibration tokens, of
    which `logits` (E, E) is H Hᵀ, at any scale. Before, channels of all experts of a cluster are
    put in the order of the layer's first expert (`aligned_to`), as the authors' code has it for
    Switch Transformers (that for Mixtral leaves them). The authors choose dominant experts of all
    layers together, so that layers differ in how many they have; here each layer has the same
    number, as with all modes of experts. Which dominant expert each goes into, (E,), by the order
    of these; `shares_of_merged` says how weights are added up.
    """
    dominant = keep_best(counts, keep)
    root = logits.diagonal().clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    merged = (logits / (root[:, None] * root))[:, dominant].argmax(1)
    merged[dominant] = torch.arange(keep, device=merged.device)
    return merged


def aligned_to(first: MLPWeights, weights: MLPWeights) -> MLPWeights:
    """An expert with its channels in another order, which leaves it the same function.

    The permutation P with the least Σ ‖W_first - W P‖² over up, gate and down, that is, with the
    largest Σ <W_first, W P>: weight matching (Ainsworth et al. 2022, arXiv 2209.04836, section 3.2)
    in M-SMoE's form for a single hidden layer.
    """
    scores = first.down.double() @ weights.down.double().T
    scores += first.up.double().T @ weights.up.double()
    if first.gate is not None and weights.gate is not None:
        scores += first.gate.double().T @ weights.gate.double()
    order = assign(scores)
    gate = None if weights.gate is None else weights.gate[:, order]
    return MLPWeights(up=weights.up[:, order], gate=gate, down=weights.down[order])


def shares_of_merged(merged: Tensor, counts: Tensor) -> Tensor:
    """What an expert's weights count in those of the one that it is merged into, (E,) float64.

    α_e = f_e / Σ_{i ∈ C} f_i, f being how often the router chose an expert of the cluster C, so
    that the merged weights are Σ_{e ∈ C} α_e W_e: the frequency-weighted merging of M-SMoE (Li et
    al. 2023, arXiv 2310.01334) and HC-SMoE. Where no token reaches any of them, they count the
    same; the authors' code makes the merged weights 0 there. `merged` (E,) has the cluster of each.
    """
    count = int(merged.max()) + 1
    own = counts.double()
    whole = own.new_zeros(count).index_add_(0, merged, own)[merged]
    size = own.new_zeros(count).index_add_(0, merged, torch.ones_like(own))[merged]
    return torch.where(whole > 0, own / whole.clamp(min=1), 1 / size)


@dataclass(frozen=True)
class MeanExpert:
    """Σ_e α_e W_e of some experts' weights, in float64.

    `power` is Σ_e α_e ‖W_e‖² over all their matrices, and `spread` Σ_e α_e ‖W_e - mean‖².
    """

    weights: MLPWeights
    power: float
    spread: float


def mean_of_experts(experts: Iterable[MLPWeights], shares: Sequence[float]) -> MeanExpert:
    """The mean of experts, which are read one after another, by `shares` α_e that sum to 1."""
    mean: dict[str, Tensor] = {}
    power = 0.0
    for weights, share in zip(experts, shares, strict=True):
        for name, W in vars(weights).items():
            if W is not None:
                power += share * squares(W)
                own = share * W.double()
                mean[name] = mean[name].add_(own) if name in mean else own
    left = sum(squares(W) for W in mean.values())
    return MeanExpert(MLPWeights(**{"gate": None} | mean), power, max(0.0, power - left))


def squares(W: Tensor) -> float:
    """The sum of the squares of W (n, d), in float64 without a copy of W in it."""
    return row_power(W).sum().item()


def rxx_w(weights: MLPWeights, R: Tensor, rank: int) -> MLPSolution:
    """Score ‖r_j‖² ‖w_j‖²: r_j the j-th column of R^½, w_j the j-th row of W_down.

    ‖r_j‖² is R[j, j], so R is the diagonal (n,) of the down-projection input's autocorrelation.
    """
    power = R * row_power(weights.down)
    return _keep_channels(weights, power, power, rank)


def rxx(weights: MLPWeights, R: Tensor, rank: int) -> MLPSolution:
    """Score ‖r_j‖² only; R is the diagonal (n,)."""
    return _keep_channels(weights, R, R * row_power(weights.down), rank)


def abs_w(weights: MLPWeights, R: Tensor, rank: int) -> MLPSolution:
    """Score Σ_k |w_jk| over row j of W_down; R, the diagonal (n,), is used only for the error."""
    return _keep_channels(weights, row_sums(weights.down), R * row_power(weights.down), rank)


def wanda(weights: MLPWeights, R: Tensor, rank: int) -> MLPSolution:
    """Score ‖x_j‖ Σ_k |w_jk|: Wanda's importance |w_jk| ‖x_j‖ (Sun et al. 2023, arXiv 2306.11695,
    equation 1) summed over the row of W_down that goes with a channel, as Wanda-sp has it (An et
    al. 2023, arXiv 2312.11983, section 4). R is the diagonal (n,).
    """
    score = R.sqrt() * row_sums(weights.down)
    return _keep_channels(weights, score, R * row_power(weights.down), rank)


def flap(weights: MLPWeights, R: Tensor, mean: Tensor, rank: int) -> MLPSolution:
    """Score Var(x_j) ‖w_j‖²; the means of dropped channels go into the output's bias.

    FLAP (An et al. 2023, arXiv 2312.11983, equations 4 and 6), with the same ratio in all layers. R
    and mean (n,) are E[x_j²] and E[x_j]. `relative_error` is the error that remains after the bias.
    """
    power = (R - mean.square()).clamp(min=0) * row_power(weights.down)
    solution = _keep_channels(weights, power, power, rank)
    dropped = torch.ones_like(mean, dtype=torch.bool)
    dropped[solution.channels] = False
    bias = mean[dropped] @ weights.down[dropped].double()
    whole = (R * row_power(weights.down)).sum()
    return replace(solution, bias=bias, relative_error=relative(power[dropped].sum(), whole).item())


def modegpt(weights: MLPWeights, C: Tensor, rank: int) -> MLPSolution:
    """Nyström: channels of the largest ridge leverage [C (C + λ 1)⁻¹]_jj, and W_down refitted.

    MoDeGPT's type I (Lin et al. 2024, arXiv 2408.09632, algorithm 1), C (n, n) the autocorrelation
    of the down-projection's input: W_down becomes (C_SS)⁻¹ C_S: W_down. The paper's λ = 1 belongs
    to a sum over its calibration; here λ is MODEGPT_RIDGE times the mean of C's diagonal.
    """
    score = ridge_leverage(C, ridge_of(C, MODEGPT_RIDGE))
    kept = keep_best(score, rank)
    return _refitted(weights, C, kept, 0.0)


def ls(weights: MLPWeights, C: Tensor, damping: float, rank: int) -> MLPSolution:
    """The channels of `rxx_w`, with W_down refitted to the output by least squares.

    C (n, n) is the autocorrelation of the down-projection's input; the refit uses the correlation
    of dropped with kept channels. `damping` is λ as a share of C's mean square.
    """
    kept = keep_best(C.diagonal() * row_power(weights.down), rank)
    return _refitted(weights, C, kept, ridge_of(C, damping))


def obs(
    weights: MLPWeights,
    C: Tensor,
    F: Tensor,
    damping: float,
    rank: int,
    known: Elimination | None = None,
) -> MLPSolution:
    """Channels eliminated one after another, W_down refitted each time (optimal brain surgeon).

    The loss is the second-order loss of the model: F (d, d), the autocorrelation of the loss's
    gradients at the output, weights the output's errors. `damping` is λ of the last refit as a
    share of C's mean square. `known` is what `obs_losses` returned for this rank or a smaller one.
    """
    order, _, whole = known or obs_losses(weights, C, F, rank)
    kept = torch.ones(len(C), dtype=torch.bool, device=C.device)
    kept[order[: len(C) - rank]] = False
    ridge = ridge_of(C, damping)
    return _refitted(weights, C, kept.nonzero()[:, 0], ridge, F, 2 * whole)


def obs_losses(weights: MLPWeights, C: Tensor, F: Tensor, least: int) -> Elimination:
    """The channels that `obs` drops down to `least`, in order, and ½ tr(Xᵀ (C + λ 1) X F) after
    each.
    """
    W = times_root(weights.down.double(), root_of(F))
    order, losses, whole = eliminate(C, W, len(C) - least, ridge_of(C, ELIMINATION))
    return Elimination(order, losses / 2, whole / 2)


def _refitted(
    weights: MLPWeights,
    C: Tensor,
    kept: Tensor,
    ridge: float,
    F: Tensor | None = None,
    whole: Tensor | None = None,
) -> MLPSolution:
    """The kept channels with W_down refitted; its error is that of the output, by F if given.

    `whole` is the loss without any channel; computed here if it is None.
    """
    W = weights.down.double()
    down, lost = take_over(C, kept, W, ridge, F)
    if whole is None:
        whole = (W * (C @ W)).sum()
    score = torch.zeros(len(C), dtype=C.dtype, device=C.device)
    score[kept] = 1.0
    solution = _keep_channels(weights, score, score, len(kept))
    return replace(
        solution, down=down.to(weights.down.dtype), relative_error=relative(lost, whole).item()
    )


def row_sums(W: Tensor) -> Tensor:
    """Sums of |w| over the rows of W (n, d), in float64 without a copy of W in it."""
    return sum(columns.double().abs().sum(1) for columns in W.split(CHUNK, dim=1))


def row_power(W: Tensor) -> Tensor:
    """Squared norms of the rows of W (n, d), summed in float64 without a copy of W in it."""
    return sum(columns.double().square().sum(1) for columns in W.split(CHUNK, dim=1))


def _keep_channels(weights: MLPWeights, score: Tensor, power: Tensor, rank: int) -> MLPSolution:
    kept = keep_best(score, rank)
    # Weights lie transposed in memory: so whole rows are copied there.
    return MLPSolution(
        up=weights.up.T[kept].T,
        gate=None if weights.gate is None else weights.gate.T[kept].T,
        down=weights.down.T[:, kept].T,
        channels=kept,
        relative_error=relative(power.sum() - power[kept].sum(), power.sum()).clamp(min=0).item(),
    )
