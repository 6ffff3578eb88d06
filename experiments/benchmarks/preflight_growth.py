"""Plots how a device's computation and communication grow with the number of devices, from `cnx2 preflight`.

  for run in ...; do cnx2 preflight ... | tail -1 >> runs/growth.jsonl; done
  python -m experiments.benchmarks.preflight_growth runs/growth.jsonl --out docs/preflight_growth.png

Standard output is a table; docs/preflight.md has the commands.
"""

import argparse
import json
import sys
from pathlib import Path

from cnx2_jax.commandline import Parser, run
from cnx2_jax.observe.plots import draw_into
from cnx2_jax.observe.tables import markdown_table


def main(argv: list[str] | None = None) -> int:
    return run(lambda: _main(argv), "preflight_growth")


def _main(argv: list[str] | None) -> None:
    parser = Parser(
        prog="python -m experiments.benchmarks.preflight_growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lines", type=Path, help="a file with the JSON lines of `cnx2 preflight`")
    parser.add_argument("--out", type=Path, required=True, help="the plot to write")
    args = parser.parse_args(argv)
    found = [json.loads(line) for line in args.lines.read_text().splitlines()]
    found.sort(key=lambda one: one["devices"])
    rows = [
        [
            one["devices"],
            one["topology"],
            ", ".join(f"{axis}={size}" for axis, size in one["mesh"].items()),
            f"{one['flops_per_image'] / 1e6:.1f}",
            f"{sent(one) / 1e6:.1f}",
            f"{sent(one) / parameter_bytes(one):.2f}",
        ]
        for one in found
    ]
    header = ["devices", "topology", "mesh", "MFLOP per image", "MB sent", "over parameters"]
    print(markdown_table(header, rows))
    print(draw_into(args.out, lambda figure: draw(figure, found)), file=sys.stderr)


def sent(found: dict) -> int:
    """Returns the bytes that each device sends per step."""
    return sum(kind["bytes"] for kind in found["collectives"].values())


def parameter_bytes(found: dict) -> int:
    return 4 * found["parameters"]


def draw(figure, found: list[dict]) -> None:
    """Draws FLOPs per image, and bytes sent relative to parameter bytes, over the number of devices."""
    figure.set_size_inches(6, 3)
    axes = figure.subplots()
    devices = [one["devices"] for one in found]
    flops = [one["flops_per_image"] / found[0]["flops_per_image"] for one in found]
    axes.plot(devices, flops, "o-", color="#08519c", label="FLOPs per image, first = 1")
    ratios = [sent(one) / parameter_bytes(one) for one in found]
    axes.plot(devices, ratios, "o-", color="#d94801", label="bytes each device sends / parameter bytes")
    axes.axhline(3, color="#b0b0b0", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, devices)
    axes.set_xlabel("devices")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    sys.exit(main())
