"""`cnx2 preflight`."""

import argparse
import json
import math

from cnx2_jax.preflight import topologies  # before JAX: it sets environment variables that JAX reads

# isort: split
from cnx2_jax.commandline import count
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import UserError
from cnx2_jax.observe.tables import markdown_table
from cnx2_jax.preflight.compile import find_batch, needed_rate, preflight
from cnx2_jax.tasks.base import Described

TAKES_OVERRIDES = True

SHOWN_KINDS = 6  # of operations with the most estimated cycles
EXAMPLES = """\
Compiles the train step that `cnx2 train` would run with this config, from shapes alone, on a machine without
accelerators; no images are read. Chips: v2, v3, v4, v5e, v5p, v6e and tpu7x (extra `tpu`), and
h100:NODESxGPUS (extra `cuda`). Standard output is a table and, last, the same as one JSON line. Exit status:
0 if the run fits, 1 if it does not, 2 after a mistake. --config.model.scan=on compiles several times faster,
but XLA then cannot count FLOPs and bytes.

  cnx2 preflight --config pretrain:base --topology v3:16x8
  cnx2 preflight --config pretrain:huge --topology v5e:16x16 --find-batch \\
      --config.mesh.data=1 --config.mesh.fsdp=-1 --config.model.remat=block
  cnx2 preflight --config finetune:base --topology h100:1x8 --config.model.scan=on
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME:RECIPE",
        help="a recipe such as pretrain:tiny, or FILE.py:RECIPE; change keys with --config.KEY=VALUE",
    )
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:16x16 or h100:1x8"
    )
    parser.add_argument(
        "--slices", type=count, default=1, metavar="N", help="of a TPU topology; %(default)s by default"
    )
    parser.add_argument(
        "--find-batch", action="store_true", help="find the largest batch per device that fits"
    )
    parser.add_argument("--hours", type=float, help="show the data rate of a run of this length")
    parser.add_argument(
        "--images", type=count, default=1_281_167, help="training images; %(default)s by default"
    )
    parser.add_argument(
        "--classes", type=count, default=1000, help="of the images or objects; %(default)s by default"
    )


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.hours is not None and not 0 < args.hours < math.inf:
        raise UserError(f"--hours {args.hours} must be above 0")
    config = load_config(args.config, overrides)
    data = Described(args.images, class_names=[str(label) for label in range(args.classes)])
    topology = topologies.topology(args.topology, args.slices)
    found = find_batch(config, topology, data) if args.find_batch else preflight(config, topology, data)
    if args.hours and found["fits"]:
        found |= needed_rate(config, topology, data, found, args.hours)
    print(table(found))
    print(json.dumps(found))
    return 0 if found["fits"] else 1


def table(found: dict) -> str:
    """Returns the result of `preflight` as a table in Markdown."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    rows = {
        "run": found["config"],
        "topology": f"{found['topology']}: {found['devices']} devices ({mesh}), {found['hosts']} hosts",
        "batch": f"{found['batch_size']}, {found['batch_per_device']} per device",
        "parameters": f"{found['parameters']:,}",
        "memory per device": f"{_gib(found['peak_bytes'])} of {_gib(found['usable_bytes'])} GiB",
        "": "fits" if found["fits"] else "DOES NOT FIT",
    }
    if "collectives" in found:
        rows["arguments, temporary memory"] = (
            f"{_gib(found['argument_bytes'])} and {_gib(found['temp_bytes'])} GiB"
        )
        rows["compile time"] = f"{found['compile_seconds']:.0f} s"
        for kind, sums in found["collectives"].items():
            rows[kind] = f"{sums['count']}, each device sends {sums['bytes'] / 1e6:,.1f} MB per step"
    rows["products and convolutions"] = f"{found['matrix_flops_per_image'] / 1e9:.2f} GFLOP per image"
    if "seconds_at_peak" in found:
        rows["products and convolutions"] += f", {1e3 * found['seconds_at_peak']:.1f} ms per step at the peak"
    if "flops_per_image" in found:
        rows["all operations"] = (
            f"{found['flops_per_image'] / 1e9:.2f} GFLOP, {found['bytes_per_image'] / 1e6:.1f} MB per image"
        )
    if "cycles" in found:
        cycles = found["cycles"]
        rows["estimated Mcycles"] = f"{sum(cycles.values()) / 1e6:.1f}: " + ", ".join(
            f"{kind} {count / 1e6:.1f}" for kind, count in list(cycles.items())[:SHOWN_KINDS]
        )
    if "images_per_second_per_host" in found:
        rate = found["images_per_second_per_host"]
        pixels = rate * found["pixel_bytes_per_image"] / 1e6
        rows["each host reads"] = f"{rate:,.0f} images/s, {pixels:,.0f} MB/s of pixels, {found['rate_is']}"
    return markdown_table(["preflight", ""], list(rows.items()))


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.2f}"
