"""Solves one layer: its components' modes, ranks and statistics."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from a3.artifacts.eliminations import Eliminations, Unit, to_device, unit_of
from a3.core.progress import LOG, Bar
from a3.models.checkpoint import FINITE_WEIGHTS, Checkpoint
from a3.models.family import AttentionWeights, MLPWeights
from a3.models.packing import pairs_name
from a3.models.shape import Arch
from a3.numerics.elimination import Elimination
from a3.numerics.finite import require_finite
from a3.numerics.linalg import relative
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS, is_of_experts
from a3.solutions import mlp
from a3.solutions.factors import Matrix, factorise, shares
from a3.solutions.functions import losses_of, losses_of_model, solver_of
from a3.solutions.modes import COMPONENTS, ONE_SIZE, PRIOR_CHANNELS, SHARING, find_mode
from a3.solutions.plan import factor_ranks, least_rank
from a3.stages.approx.experts import ExpertStatistics

Weights: TypeAlias = AttentionWeights | MLPWeights

# Of a component: the same everywhere, one a layer, or one a layer and expert.
AnyRanks: TypeAlias = int | list[int] | list[list[int]]

# What a solution of each component replaces.
REPLACED = {
    "qk": ("q", "k", "q_gain", "k_gain"),
    "ov": ("v", "o"),
    "mlp": ("up", "gate", "down"),
}


class LayerSolver:
    """Solves one layer at a time; keeps no weights between layers."""

    def __init__(
        self,
        arch: Arch,
        checkpoint: Checkpoint,
        statistics: dict[str, Rxx],
        modes: dict[str, str],
        ranks: Mapping[str, AnyRanks],
        multiple: int = 1,
        *,
        known: Eliminations | None = None,
        device: str = "cpu",
    ) -> None:
        """`ranks`: one per component, per layer, or per layer and expert; ranks of factors are
        multiples of `multiple`.

        `known` has what `a3 losses` computed before. Solutions are computed on `device`.
        """
        self.arch = arch
        self.checkpoint = checkpoint
        self.statistics = statistics
        self.modes = modes
        self.ranks = ranks
        self.multiple = multiple
        self.known = known
        self.device = torch.device(device)
        self.experts = ExpertStatistics(arch, statistics)
        self.fields = arch.to_json()
        # The share that each matrix keeps, by its name in every layer, where it is not the same.
        self.kept: dict[str, list[float]] = {}
        # By mode, of those with one set of RoPE pairs.
        self.of_models: dict[str, Elimination] = {}
        # What a3.stages.approx.explain says of each layer's ranks, if they were allocated.
        self.explanation: dict[str, Any] = {}

    def solve(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, float]]:
        """Compressed tensors of one layer, its report in approx.json, and seconds by component."""
        tensors: dict[str, Tensor] = {}
        report: dict[str, Any] = {}
        said: dict[str, Any]
        seconds: dict[str, float] = {}
        attention = cache(partial(self.attention_weights, layer))  # QK and OV share one reading
        for component in COMPONENTS:
            start = time.perf_counter()
            if not self.arch.solves(component, layer):
                if component == "mlp" or not self.packs(layer):
                    continue
                solved, said = self.pack(layer, attention(), REPLACED[component]), {}
            elif component == "mlp" and self.arch.experts:
                solved, said = self.solve_experts(layer)
            elif component in self.ranks:
                weights = self.mlp_weights(layer) if component == "mlp" else attention()
                solved, said = self.solve_component(component, layer, weights)
            elif component != "mlp" and self.arch.adapter.repacked:
                # The compressed model has its own attention layout, even for uncompressed
                # attention.
                solved, said = self.pack(layer, attention(), REPLACED[component]), {}
            else:
                continue
            tensors |= solved
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if said:
                report[component] = said
                seconds[component] = time.perf_counter() - start
        return {name: W.cpu() for name, W in tensors.items()}, report, seconds

    def packs(self, layer: int) -> bool:
        """Whether attention that is not solved has to be laid out as the compressed model's."""
        own = self.arch.runs_own_attention
        return self.arch.adapter.repacked and not own and not self.arch.keeps_attention(layer)

    def solve_component(
        self, component: str, layer: int, weights: Weights, expert: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compressed tensors of one component of a layer, or of one expert of its MLP, and its
        report for approx.json.
        """
        name = self.layer_mode(component, layer)
        if find_mode(component, name).factors:
            return self.solve_factors(component, layer, weights)
        rank = self.rank(component, layer, expert)
        read = self.read(component, name, layer, expert)
        more = []
        if name == SHARING[component]:
            more = [self.elimination(unit_of(component, expert), layer, weights, read, rank)]
        solution = solver_of(component, name)(weights, *read, rank, *more)
        tensors = self.pack(layer, solution, REPLACED[component], expert)
        said = {
            "mode": name,
            "rank": rank,
            "relative_error": solution.relative_error,
        }
        if component == "qk" and solution.pairs is not None:
            said["rope_pairs"] = solution.pairs.tolist()
            tensors[pairs_name(self.arch, layer)] = solution.pairs.contiguous()
        if component == "mlp" and solution.bias is not None:
            tensors |= self.with_bias(layer, solution.bias, expert)
            said["bias"] = True
        return tensors, said

    def elimination(
        self, unit: Unit, layer: int, weights: Weights, read: list[Any], rank: int
    ) -> Elimination:
        """What is dropped of a unit of a layer, down to `rank` or further.

        Computed here only if it is not `known`; that ends at the least rank that a3 allocates.
        """
        component = unit.partition(".")[0]
        least = least_rank(self.arch, component)
        known = None if self.known is None else self.known.find(layer, unit)
        if known is not None and (component == "qk" or rank >= least):
            return to_device(known, self.device)
        return losses_of(component, weights, read, min(rank, least))

    def solve_factors(
        self, component: str, layer: int, weights: Weights
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Like `solve_component`, each matrix on its own: two factors, or, where all of it is
        kept, as it was. The report has the rank of each product.
        """
        arch, adapter = self.arch, self.arch.adapter
        mode = find_mode(component, self.modes[component])
        matrices = self.matrices(component, layer, weights)
        rank = self.rank(component, layer)
        ranks = factor_ranks(arch, component, mode, rank, self.multiple)
        for name in self.kept.keys() & matrices.keys():
            ranks[name] = matrices[name].rank_for(self.kept[name][layer], self.multiple)
        solution = factorise(matrices, ranks)
        stay = [name for name in REPLACED[component] if adapter.repacked and component != "mlp"]
        tensors = self.pack(layer, weights, tuple(stay))
        dtype = getattr(torch, arch.dtype)
        for name, (A, B) in solution.factors.items():
            where = adapter.packed_name(layer, name).removesuffix(".weight")
            tensors[f"{where}.encoder.weight"] = A.T.to(dtype).contiguous()
            tensors[f"{where}.weight"] = B.T.to(dtype).contiguous()
        return tensors, {
            "mode": self.modes[component],
            "rank": rank,
            "factors": {name: own for name, own in ranks.items() if own is not None},
            "relative_error": solution.relative_error,
        }

    def matrices(self, component: str, layer: int, weights: Weights) -> dict[str, Matrix]:
        """The matrices of a component without their biases, and their metrics; float64.

        Fused matrices of the MLP are factored as one, under the name of the first.
        """
        d = self.arch.hidden_size
        if isinstance(weights, MLPWeights):
            found = {
                together[0]: torch.cat([getattr(weights, p)[:d] for p in together], 1).double()
                for together in self.arch.adapter.first_of_mlp
            } | {"down": weights.down.double()}
        elif component == "ov":
            found = {"v": weights.v[:, :d].movedim(0, 1).flatten(1), "o": weights.o.flatten(0, 1)}
        else:
            found = {p: getattr(weights, p)[:, :d].movedim(0, 1).flatten(1) for p in "qk"}
        kinds = find_mode(component, self.modes[component]).factors
        return {
            name: Matrix(W, *self.metric(kinds[name], name, layer))
            for name, W in found.items()
            if name in kinds
        }

    def metric(self, kind: str | None, name: str, layer: int) -> tuple[Tensor | None, bool]:
        """The metric of one matrix, and whether it belongs to the matrix's output."""
        if kind is None:
            return None, False
        R = self.rxx(kind, layer)
        if R.dim() == 2 and KINDS[kind].form == "fisher":
            firsts = [together[0] for together in self.arch.adapter.first_of_mlp]
            R = R[firsts.index(name) if name in firsts else "qkv".index(name)]
        return R, kind == "down_output"

    def allocate(self, component: str) -> None:
        """Allocate the kept share of a component across layers, separately for each projection."""
        # The same in all layers, so far.
        kept = self.rank(component, 0) / self.arch.full_rank(component)
        if kept == 1:
            return
        losses: dict[str, list[float]] = {}
        # Modes that allocate across layers have a metric for each matrix.
        factors = find_mode(component, self.modes[component]).factors
        kinds = {name: kind for name, kind in factors.items() if kind is not None}
        layers = [n for n in range(self.arch.layers) if self.arch.solves(component, n)]
        for layer in Bar(layers, unit="layer", desc=f"ratios of {component}"):
            matrices = self.matrices(component, layer, self.weights(component, layer))
            for name, matrix in matrices.items():
                least = matrix.factor(0)[2]
                rank, full = matrix.rank_for(kept, self.multiple), len(least) - 1
                rank = full if rank is None else min(rank, full)
                tokens = self.statistics[kinds[name]].tokens
                losses.setdefault(name, []).append((least[rank].item() * tokens) ** 0.5)
        for name, found in losses.items():
            of_layer = dict(zip(layers, shares(found, kept), strict=True))
            self.kept[name] = [of_layer.get(n, 1.0) for n in range(self.arch.layers)]

    def with_bias(self, layer: int, bias: Tensor, expert: int | None) -> dict[str, Tensor]:
        """The output bias of a layer's MLP, or of an expert, with something added; it may have had
        none.
        """
        adapter = self.arch.adapter
        name = adapter.packed_name(layer, "down", "bias", expert)
        # Experts' own biases stay where they are.
        if expert is None and adapter.has_bias("down", self.fields):
            dense = self.checkpoint.tensor(adapter.name(layer, "down", "bias"))
            bias = bias.cpu() + dense.double()
        return {name: bias.to(getattr(torch, self.arch.dtype))}

    def solve_experts(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Like `solve_component`, for all experts of a layer, each on its own.

        The report has each expert's tokens and rank, and the mean of their errors.
        """
        arch, name = self.arch, self.modes.get("mlp")
        if name is None:
            return self.kept_experts(layer, range(arch.experts)), {}
        if find_mode("mlp", name).drops:
            return self.drop_experts(layer, name)
        tensors: dict[str, Tensor] = {}
        reports = []
        for expert in range(arch.experts):
            weights = self.mlp_weights(layer, expert)
            solved, report = self.solve_component("mlp", layer, weights, expert)
            tensors |= solved
            reports.append(report)
        counts = self.experts.counts(find_mode("mlp", name).kinds[0], layer)
        if few := int((counts < mlp.FEWEST_TOKENS).sum()):
            LOG.info(
                f"layer {layer}: fewer than {mlp.FEWEST_TOKENS} calibration tokens reached {few} "
                f"of {arch.experts} experts ({int(counts.min())} at the least), whose statistics "
                "are shrunk towards the mean over experts. More tokens would serve them"
            )
        ranks = [report["rank"] for report in reports]
        return tensors, {
            **reports[0],
            "rank": round(sum(ranks) / len(ranks)),
            "relative_error": sum(report["relative_error"] for report in reports) / len(reports),
            "expert_tokens": counts.int().tolist(),
            "expert_shrinkage": [round(mlp.shrinkage(count), 6) for count in counts.tolist()],
            "expert_ranks": ranks,
        }

    def drop_experts(self, layer: int, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Like `solve_experts`, for a mode that keeps some experts as they are."""
        rank = self.rank("mlp", layer)
        (kind,) = find_mode("mlp", name).kinds
        norms, counts = self.rxx(kind, layer), self.experts.counts(kind, layer)
        kept = solver_of("mlp", name)(norms, counts, rank).tolist()
        return self.kept_experts(layer, kept), {
            "mode": name,
            "rank": rank,
            "relative_error": relative(norms.sum() - norms[kept].sum(), norms.sum()).item(),
            "experts": kept,
            "expert_tokens": counts.int().tolist(),
            "expert_ranks": [self.arch.intermediate_size] * rank,
        }

    def kept_experts(self, layer: int, kept: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of some dense experts, numbered anew, and the rows of the router for them."""
        tensors: dict[str, Tensor] = {}
        for number, expert in enumerate(kept):
            weights = self.mlp_weights(layer, expert)
            tensors |= self.pack(layer, weights, REPLACED["mlp"], number)
        if len(kept) < self.arch.experts:
            name, rows = self.router(layer)
            tensors[name] = rows[list(kept)].contiguous()
        return tensors

    def router(self, layer: int) -> tuple[str, Tensor]:
        """The router's tensor, a row an expert: its name, and it."""
        name = f"{self.arch.adapter.modules['router'].format(layer)}.weight"
        return name, self.checkpoint.tensor(name)

    def rank(self, component: str, layer: int, expert: int | None = None) -> int:
        """The rank of a component in one layer, or of one of its experts."""
        rank = self.ranks[component]
        for index in (layer, expert):
            rank = rank[index] if isinstance(rank, list) and index is not None else rank
        assert isinstance(rank, int)
        return rank

    def layer_mode(self, component: str, layer: int) -> str:
        """The mode for one layer: `qk` for the scores of a layer without RoPE among those with.

        For modes that factor each matrix separately, RoPE makes no difference.
        """
        nope = component == "qk" and layer in self.arch.nope_layers
        factored = find_mode(component, self.modes[component]).factors
        return "qk" if nope and not factored else self.modes[component]

    def weights(self, component: str, layer: int) -> Weights:
        """Dense weights of attention or MLP, whichever the component is of."""
        return self.mlp_weights(layer) if component == "mlp" else self.attention_weights(layer)

    def attention_weights(self, layer: int) -> AttentionWeights:
        """Dense weights of attention, float64; A3Error if they are not finite."""
        weights = self.arch.adapter.attention(self.checkpoint, layer, self.fields)
        self.require_finite(weights, layer)
        return self.moved(weights)

    def mlp_weights(self, layer: int, expert: int | None = None) -> MLPWeights:
        """Dense weights of the MLP, or of one expert; A3Error if they are not finite."""
        weights = self.arch.adapter.mlp(self.checkpoint, layer, self.fields, expert)
        self.require_finite(weights, layer)
        return self.moved(weights)

    def moved(self, weights: Any) -> Any:
        """Weights on the device."""
        tensors = {name: W for name, W in vars(weights).items() if isinstance(W, Tensor)}
        return replace(weights, **{name: W.to(self.device) for name, W in tensors.items()})

    def require_finite(self, weights: Weights, layer: int) -> None:
        """Raise A3Error, with the layer and the matrix, where a weight is not finite."""
        for name, W in vars(weights).items():
            if isinstance(W, Tensor):
                what = f"{self.checkpoint.folder}: layer {layer}, {name}"
                require_finite(W, what, FINITE_WEIGHTS)

    def read(
        self, component: str, name: str, layer: int, expert: int | None = None
    ) -> list[Tensor | float]:
        """The statistics that a mode's function takes, between weights and rank."""
        mode = find_mode(component, name)
        read: list[Tensor | float] = [*self.own_statistics(component, name, layer, expert)]
        if expert is not None and "down_mean" in mode.kinds:
            # A variance needs means over this expert's tokens.
            share = self.experts.share("down_mean", layer, expert)
            read = [each / share for each in read]
        if mode.prior:
            prior, tokens = float(mode.prior), float(self.statistics[mode.kinds[0]].tokens)
            if expert is not None:
                prior *= min(1.0, self.arch.intermediate_size / PRIOR_CHANNELS)
                tokens = self.experts.tokens(mode.kinds[0], layer, expert)
            read.append(prior / tokens)
        if name in ONE_SIZE:
            read.append(self.of_model(name).order)
        return read

    def own_statistics(
        self, component: str, name: str, layer: int, expert: int | None = None
    ) -> list[Tensor]:
        """The statistics of the kinds that a mode reads."""
        mode = find_mode(component, name)
        normed = mode.normed and self.arch.norms_output(component)
        return [self.rxx(kind, layer, expert, normed=normed) for kind in mode.kinds]

    def rxx(
        self, kind: str, layer: int, expert: int | None = None, *, normed: bool = False
    ) -> Tensor:
        """One statistic of a layer, on the device; of an expert, if it is one of each.

        With `normed`, tokens are weighed as norms of outputs do.
        """
        if expert is not None and is_of_experts(KINDS[kind], self.fields):
            return self.experts.R(kind, layer, expert).to(self.device)
        shape = self.arch.statistic_shape(KINDS[kind])
        R = self.statistics[kind].R(layer, shape, normed=normed)
        return R.to(self.device)

    def of_model(self, mode: str) -> Elimination:
        """Which RoPE pairs a mode of one set of pairs drops from all layers, and the losses."""
        if mode not in self.of_models:
            layers = filter(self.arch.drops_pairs, range(self.arch.layers))
            C = torch.cat([self.rxx("pair_gradient", layer) for layer in layers])
            pairs, normed = self.arch.rope_dims // 2, self.arch.qk_norm is not None
            self.of_models[mode] = losses_of_model(mode, C, pairs, normed)
        return self.of_models[mode]

    def pack(
        self, layer: int, solution: Any, names: tuple[str, ...], expert: int | None = None
    ) -> dict[str, Tensor]:
        """Checkpoint tensors of a solution, in the model's dtype (o and down biases are copied)."""
        solved = {name: getattr(solution, name) for name in names}
        solved = {name: W for name, W in solved.items() if W is not None}
        dtype = getattr(torch, self.arch.dtype)
        packed = self.arch.adapter.pack(layer, solved, self.fields, expert)
        return {name: W.to(dtype).contiguous() for name, W in packed.items()}
