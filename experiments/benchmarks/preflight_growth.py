"""Draws how what each device computes and sends grows with the devices, from what preflight printed.

  for run in ...; do python experiments/preflight.py ... | tail -1 >> runs/growth.jsonl; done
  python experiments/preflight_growth.py runs/growth.jsonl --out docs/preflight_growth.png

Standard output is the table; docs/preflight.md has the commands.
"""

import argparse
import json
import sys
from pathlib import Path

from cnx2_jax.observe.plots import draw_into


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", type=Path, help="JSON lines of preflight.py")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    found = [json.loads(line) for line in args.lines.read_text().splitlines()]
    found.sort(key=lambda run: run["devices"])
    print("| devices | topology | mesh | MFLOP per image | MB sent | over parameters |\n|" + "---|" * 6)
    for run in found:
        mesh = ", ".join(f"{axis}={size}" for axis, size in run["mesh"].items())
        print(
            f"| {run['devices']} | {run['topology']} | {mesh} | {run['flops_per_image'] / 1e6:.1f} "
            f"| {sent(run) / 1e6:.1f} | {sent(run) / parameter_bytes(run):.2f} |"
        )
    print(draw_into(args.out, lambda figure: draw(figure, found)), file=sys.stderr)
    return 0


def sent(run: dict) -> int:
    """Returns the bytes that each device sends per step."""
    return sum(kind["bytes"] for kind in run["collectives"].values())


def parameter_bytes(run: dict) -> int:
    return 4 * run["parameters"]


def draw(figure, found: list[dict]) -> None:
    """Lines over the number of devices: FLOPs per image, and bytes sent over those of the parameters."""
    figure.set_size_inches(6, 3)
    axes = figure.subplots()
    devices = [run["devices"] for run in found]
    flops = [run["flops_per_image"] / found[0]["flops_per_image"] for run in found]
    axes.plot(devices, flops, "o-", color="#08519c", label="FLOPs per image, first = 1")
    ratios = [sent(run) / parameter_bytes(run) for run in found]
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
