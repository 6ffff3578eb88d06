"""The tables and pictures of `cnx2 analyse`: several checkpoints side by side."""

import itertools
from collections.abc import Mapping

import numpy as np

from cnx2_jax.evaluation.analysis import BINS, HIDDEN, Layer
from cnx2_jax.evaluation.report import Report, Table, shown
from cnx2_jax.observe.grid import draw_sheet

Layers = Mapping[str, Layer]

CHANNELS = 64  # of a sheet of activation maps (paper, figure 3)
COLUMNS = 8
PERCENTILES = (1, 99)  # of all maps of a sheet become black and white
COLUMN_NAMES = ("channels", "distance", "selectivity", "rank", "dead", "saturated")
KINDS = {HIDDEN: "hidden maps after GRN", "": "outputs of the blocks"}


def make_report(checkpoints: Mapping[str, Layers], pictures: Mapping[str, np.ndarray]) -> Report:
    """Returns a report: a table `layers`, plots `cosine_distance` and `selectivity`, and given pictures.

    Args:
      checkpoints: what was measured of each, by a short label.
      pictures: uint8 `[H, W, 3]` by the names of their files.
    """
    plots = {"cosine_distance": lambda figure: _draw_distances(figure, checkpoints)}
    measured = any(
        layer.selectivity is not None for layers in checkpoints.values() for layer in layers.values()
    )
    if measured:
        plots["selectivity"] = lambda figure: _draw_selectivity(figure, checkpoints)
    return Report({"layers": make_table(checkpoints)}, plots, pictures)


def make_table(checkpoints: Mapping[str, Layers]) -> Table:
    """Returns a row for every layer that a checkpoint has, with the same columns for each checkpoint."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(checkpoints.values())))
    ends = {end: [name for name in names if _end(name) == end] for end in KINDS}
    header = ["layer"]
    for label in checkpoints:
        header += [f"{label} {name}" for name in COLUMN_NAMES]
    rows = []
    for name in itertools.chain.from_iterable(ends.values()):
        row = [name]
        for layers in checkpoints.values():
            row += _cells(layers[name]) if name in layers else [""] * len(COLUMN_NAMES)
        rows.append(row)
    return Table(header, rows)


def draw_activations(maps: np.ndarray) -> np.ndarray:
    """Draws up to `CHANNELS` maps of one image and one layer, each with the number of its channel.

    All maps share one scale, so that dead channels are equally dark or grey, and saturated ones bright. Of
    more channels, evenly spaced ones are drawn.

    Args:
      maps: `[h, w, C]`.

    Returns:
      uint8 `[H, W, 3]`.
    """
    count = min(CHANNELS, maps.shape[-1])
    channels = np.arange(count) * maps.shape[-1] // count
    drawn = np.moveaxis(maps[..., channels], -1, 0)
    low, high = np.percentile(drawn, PERCENTILES)
    scaled = np.clip((drawn - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    pixels = np.round(255 * scaled).astype(np.uint8)[..., None]
    return draw_sheet(pixels, [str(channel) for channel in channels], COLUMNS)


def _end(name: str) -> str:
    return HIDDEN if name.endswith(HIDDEN) else ""


def _cells(layer: Layer) -> list[str]:
    selectivity = None if layer.selectivity is None else float(layer.selectivity.mean())
    values = (
        *(layer.channels, layer.cosine_distance, selectivity, layer.effective_rank),
        *(layer.dead, layer.saturated),
    )
    return ["" if value is None else shown(value) for value in values]


def _of_kind(layers: Layers, end: str) -> list[Layer]:
    return [layer for name, layer in layers.items() if _end(name) == end]


def _draw_distances(figure, checkpoints: Mapping[str, Layers]) -> None:
    figure.set_size_inches(9, 3.5)
    for axes, (end, title) in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS.items(), strict=True):
        for label, layers in checkpoints.items():
            distances = [layer.cosine_distance for layer in _of_kind(layers, end)]
            axes.plot(range(len(distances)), distances, marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="block", ylabel="feature cosine distance", ylim=(0, None))
        axes.label_outer()
    axes.legend()


def _draw_selectivity(figure, checkpoints: Mapping[str, Layers]) -> None:
    """Draws the distribution of every layer as a column of shades."""
    figure.set_size_inches(9, 3.2 * len(checkpoints))
    grid = figure.subplots(len(checkpoints), len(KINDS), squeeze=False)
    for row, (label, layers) in zip(grid, checkpoints.items(), strict=True):
        for axes, (end, title) in zip(row, KINDS.items(), strict=True):
            axes.set(title=f"{label}: {title}", xlabel="block", ylabel="class selectivity index")
            found = [layer.selectivity for layer in _of_kind(layers, end) if layer.selectivity is not None]
            if found:
                shares = [np.histogram(values, BINS, (0, 1))[0] / len(values) for values in found]
                box = (-0.5, len(shares) - 0.5, 0, 1)
                image = axes.imshow(np.array(shares).T, aspect="auto", origin="lower", extent=box)
                figure.colorbar(image, ax=axes, label="share of channels")
