"""Figures of a table: quality against compression, error by layer, kept RoPE pairs, frontiers."""

from collections.abc import Sequence
from pathlib import Path

from a3.artifacts.runs import Run, read_runs
from a3.report.figures.bits import bits_drawing
from a3.report.figures.drawing import Drawing, save_drawings, styled
from a3.report.figures.frontier import frontier_drawing
from a3.report.figures.layer_error import _error_rows, _layer_error
from a3.report.figures.losses import losses_drawing
from a3.report.figures.quality import _harness, _perplexities, _perplexity, _scores
from a3.report.figures.ranks import ranks_drawing
from a3.report.figures.rope_pairs import rope_drawings
from a3.report.figures.sets import set_drawing
from a3.report.figures.spectra import spectra_drawing
from a3.report.frontiers import read_frontiers
from a3.solutions.modes import COMPONENTS


def build_figures(
    results: Path,
    experiments: list[dict[str, str]],
    perplexity: list[str],
    harness: list[str],
    out: Path,
    spectra: Sequence[Path] = (),
    frontiers: Sequence[Path] = (),
) -> None:
    """Write every figure as SVG and PNG into the folder `out`, and captions.json.

    captions.json lists the figures in reading order as {"name", "caption"}. Per model: perplexity
    and harness values against compression, the loss on each text of a set, the relative functional
    error of each component in each layer, where whole RoPE pairs are kept, which ones, ranks,
    predicted losses and marginal losses of allocated rows, what the model loses at every size among
    `frontiers` (<model>/<calibration>/<modes>.json), and the spectra of its calibrations among
    `spectra` (<model>/<calibration>.json).

    Raises:
        A3Error: as `build_tables` does, and for frontiers and spectra of other weights.
    """
    drawings: list[Drawing] = []
    with styled():
        for dense, runs in read_runs(results, experiments, perplexity, harness):
            its_own = [path for path in spectra if path.parent.name == dense.place.model]
            drawings += _model(dense, runs, perplexity, harness)
            drawings += map(frontier_drawing, read_frontiers(frontiers, [dense], {}))
            drawings += [spectra_drawing(dense, path) for path in its_own]
        save_drawings(drawings, out)


def _model(
    dense: Run,
    runs: list[Run],
    perplexity: Sequence[str],
    harness: Sequence[str],
) -> list[Drawing]:
    """All figures of one model's rows."""
    drawings = []
    # The number of parameters says little about quantised rows.
    whole = [run for run in runs if not run.place.is_quantised]
    if perplexity and (whole or not runs):
        drawings.append(_perplexity(dense, whole, perplexity))
    if any(run.place.nominal is not None for run in whole):
        drawings += [set_drawing(dense, whole, entry) for entry in filter(dense.is_set, perplexity)]
    if harness and (whole or not runs):
        drawings.append(_harness(dense, whole, harness))
    if whole != runs:
        drawings.append(bits_drawing(dense, runs, _perplexities(perplexity) | _scores(harness)))
    # A trained row has the solutions of the row that it was made from.
    solved = [run for run in runs if not run.place.is_healed]
    errors = {key: _error_rows(solved, key) for key in COMPONENTS}
    if any(errors.values()):
        drawings.append(_layer_error(dense, {key: rows for key, rows in errors.items() if rows}))
    drawings += rope_drawings(dense, solved)
    if ranks := ranks_drawing(dense, solved):
        drawings.append(ranks)
    if losses := losses_drawing(dense, solved):
        drawings.append(losses)
    return drawings
