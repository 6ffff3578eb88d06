"""The plots of `experiments.benchmarks.steps`."""


def draw_machine(figure, bars: dict[str, dict[str, float]]) -> None:
    """Draws bars: the speed relative to PyTorch eager by group and contestant."""
    axes = figure.subplots()
    figure.set_size_inches(9, 3.6)
    names = ["torch eager", "torch compile", "jax masked", "jax dense", "jax gathered"]
    colours = {"torch eager": "#b0b0b0", "torch compile": "#707070"}
    colours |= {"jax masked": "#9ecae1", "jax dense": "#6baed6", "jax gathered": "#08519c"}
    labelled = set()
    for place, speedups in enumerate(bars.values()):
        present = [name for name in names if name in speedups]
        for index, name in enumerate(present):
            label = None if name in labelled else name
            labelled.add(name)
            x = place + (index - (len(present) - 1) / 2) * 0.2
            bar = axes.bar(x, speedups[name], 0.19, color=colours[name], label=label)
            axes.bar_label(bar, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(bars)), bars.keys(), fontsize=8)
    axes.set_ylabel("speed, PyTorch eager = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_growth(figure, curves: dict) -> None:
    """Draws a panel per axis that grows.

    Args:
      figure: a matplotlib figure.
      curves: by axis, its values and, for each value, the seconds and bytes per image.
    """
    figure.set_size_inches(9, 3)
    panels = figure.subplots(1, len(curves))
    for axes, (name, (values, per_image)) in zip(panels, curves.items(), strict=True):
        for index, (label, colour) in enumerate((("time", "#08519c"), ("memory", "#d94801"))):
            costs = [costs[index] for costs in per_image]
            smallest = costs[0]
            axes.plot(range(len(values)), [c / smallest for c in costs], "o-", color=colour, label=label)
        axes.set_xticks(range(len(values)), values, fontsize=8)
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("cost per image, first = 1")
    panels[0].legend(fontsize=8, frameon=False)
