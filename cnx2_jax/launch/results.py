"""The results of a sweep's runs, best first: a table, files and a picture."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.files import replacing, write_text
from cnx2_jax.launch.runs import Run
from cnx2_jax.observe.plots import draw_into
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.observe.tables import markdown_table

Row = dict[str, Any]


def smaller_is_better(metric: str) -> bool:
    """Returns whether a metric is an error, by its name, such as `ema_loss` or `rmse_age`."""
    return metric.removeprefix("ema_").partition("_")[0] in {"loss", "mae", "rmse"}


def collect(runs: Sequence[Run], metric: str) -> list[Row]:
    """Returns a row per run with its evaluation, best first; runs without an evaluation come last.

    The evaluation of a finished run is its result, which is the best one if it stopped early; that of
    another run is its latest.

    Args:
      runs: the runs of a sweep.
      metric: a metric of `metrics.jsonl`, split val; lower is better if it is an error (`smaller_is_better`).

    Raises:
      UserError: there are evaluations, but none has this metric.
    """
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    rows: list[Row] = []
    known: set[str] = set()
    for run in runs:
        evaluations = [row for row in read_metrics(run.workdir / "metrics.jsonl") if row["split"] == "val"]
        last = run.result() or (evaluations[-1] if evaluations else {})
        known |= last.keys() - {"step", "split"}
        rows.append(
            {
                "run": run.name,
                "state": run.state(),
                "step": last.get("step"),
                metric: last.get(metric),
                **{key: run.overrides.get(key) for key in keys},
            }
        )
    if known and metric not in known:
        raise UserError(
            f"no evaluation has a metric '{metric}'{nearest(metric, known)} (known: "
            f"{', '.join(sorted(known))})"
        )
    sign = 1 if smaller_is_better(metric) else -1
    return sorted(rows, key=lambda row: (row[metric] is None, sign * (row[metric] or 0)))


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a table in Markdown."""
    return markdown_table(list(rows[0]), [[_shown(value) for value in row.values()] for row in rows])


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Writes `results.json` and `results.csv` atomically, replacing older ones."""
    write_text(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    with replacing(folder / "results.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: Sequence[Row], runs: Sequence[Run], metric: str, path: Path) -> str | None:
    """Draws the metric over every key whose value differs between runs, and returns a line about it.

    Returns None without drawing if no run has been evaluated or no key differs.
    """
    swept = dict.fromkeys(key for run in runs for key in run.overrides)
    keys = [key for key in swept if len({str(row[key]) for row in rows}) > 1]
    if rows[0][metric] is None or not keys:
        return None
    return draw_into(path, lambda figure: _draw(figure, rows, keys, metric))


def _draw(figure, rows: Sequence[Row], keys: Sequence[str], metric: str) -> None:
    figure.set_size_inches(4 * len(keys), 3.2)
    scored = [row for row in rows if row[metric] is not None]
    panels = figure.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    for axes, key in zip(panels, keys, strict=True):
        values = [row[key] for row in scored]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            if min(values) > 0 and max(values) >= 10 * min(values):
                axes.set_xscale("log")
        else:
            values = [str(value) for value in values]
        heights = [row[metric] for row in scored]
        axes.plot(values, heights, "o", color="#6baed6")
        axes.plot(values[:1], heights[:1], "o", color="#d94801", label="best")
        axes.set_xlabel(key)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(metric)
    panels[0].legend(fontsize=8, frameon=False)
