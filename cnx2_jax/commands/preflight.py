"""Says, on a machine without accelerators, whether a run fits a TPU slice or GPUs, and what a step costs.

  python experiments/preflight.py --config configs/pretrain.py:base --topology v3:16x8
  python experiments/preflight.py --config configs/pretrain.py:huge --topology v5e:16x16 --find-batch \\
      --config.mesh.data=1 --config.mesh.fsdp=-1 --config.model.remat=block
  python experiments/preflight.py --config configs/finetune.py:base --topology h100:1x8 --config.model.scan=on

Compiles the train step that `cnx2 train` would run with this config, from shapes alone; no images are
read. Chips: v2, v3, v4, v5e, v5p, v6e, tpu7x (extra `tpu`), and h100:NODESxGPUS (extra `cuda`). Standard
output is a table and, last, the same as a JSON line. Exit status: 0 if it fits, 1 if not, 2 for a mistake.
--config.model.scan=on compiles several times faster; without it XLA can count FLOPs and bytes.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence

from cnx2_jax.preflight import compiled as programs
from cnx2_jax.preflight import topologies  # before JAX starts: it says where to look for TPUs

import jax  # isort: skip
from ml_collections import ConfigDict

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.configuration import load_config, total_steps
from cnx2_jax.errors import UserError
from cnx2_jax.observe import flops
from cnx2_jax.tasks import make_task
from cnx2_jax.train import sharding
from cnx2_jax.train.program import make_program

FINENESS = 16  # --find-batch stops once what fits and what does not are this share apart


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _main(argv), "preflight")


def _main(argv: Sequence[str] | None) -> int:
    args, overrides = _parse(argv)
    topology = topologies.topology(args.topology)
    config = load_config(args.config, overrides)
    _without_images(config, args.images, args.classes)
    found = find_batch(config, topology) if args.find_batch else preflight(config, topology)
    if args.hours and found["fits"]:
        found |= needed_rate(config, topology, found, args.hours)
    print(table(found))
    print(json.dumps(found))
    return 0 if found["fits"] else 1


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE:RECIPE", help="as for `cnx2 train`")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:16x16, h100:1x8")
    parser.add_argument("--find-batch", action="store_true", help="find the largest batch that fits")
    parser.add_argument("--hours", type=float, help="say what each host must read for a run of that length")
    parser.add_argument("--images", type=count, default=1_281_167, help="to train on; %(default)s")
    parser.add_argument("--classes", type=count, default=1000, help="of a classifier; %(default)s")
    args, overrides = parser.parse_known_args(argv)
    for argument in overrides:
        if not re.match(r"--config\..*=", argument):
            raise UserError(f"unknown argument '{argument}'; config keys are given as --config.KEY=VALUE")
    if args.hours is not None and not 0 < args.hours < math.inf:
        raise UserError(f"--hours {args.hours} must be above 0")
    return args, overrides


def _without_images(config: ConfigDict, images: int, classes: int) -> None:
    """Sets made-up images, in place: of the real ones a program knows only how many there are."""
    if config.task == "probe":
        raise UserError("a probe trains one linear layer, which fits anywhere; give its encoder's config")
    config.data.source = f"synthetic:{images}:{classes}"
    config.data.root = config.data.val_source = config.data.val_root = ""


def preflight(config: ConfigDict, topology: topologies.Topology) -> dict:
    """Compiles a run's train step, and returns what there is to know of it; see `table` for the keys.

    Where it does not fit, `fits` is False, and all that the compiler counts can be missing.

    Raises:
      UserError: see `make_task`, `sharding.make_mesh` and `make_program`.
    """
    task = make_task(config, topology.platform)
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    program = make_program(task, mesh)
    one = next(task.images.of_batch(1).train_batches(0))
    batch = {n: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype) for n, x in one.items()}
    parameters = sum(math.prod(leaf.shape) for leaf in program.like.params.values())
    found = {
        "config": f"{config.task} {config.model.variant}, {config.model.dtype}, remat {config.model.remat}",
        "topology": topology.name,
        "devices": mesh.size,
        "hosts": topology.hosts,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "batch_per_device": config.batch_size // mesh.size,
        "parameters": parameters,
        "usable_bytes": topology.usable_bytes,
    }
    traced = program.step.trace(program.like, batch)
    work = flops.matrix_flops(traced.jaxpr)
    found["matrix_flops_per_image"] = work / config.batch_size
    if peak := flops.peak(mesh):
        found["seconds_at_peak"] = work / peak
    lowered = traced.lower()
    begin = time.monotonic()
    try:
        compiled = lowered.compile(topologies.compiler_options(topology.platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**found, "peak_bytes": _needed(str(error)), "fits": False}
    found["compile_seconds"] = round(time.monotonic() - begin, 1)
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    assert text and memory  # as both compilers give
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    found |= {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "fits": peak <= topology.usable_bytes,
        "collectives": programs.collectives(text),
    }
    costs = compiled.cost_analysis() or {}
    if "flops" in costs and not programs.has_loops(text):
        share = mesh.size / config.batch_size
        found["flops_per_image"] = costs["flops"] * share
        found["bytes_per_image"] = costs["bytes accessed"] * share
    if topology.platform == "tpu":
        found["cycles"] = programs.cycles_by_kind(text)
    if topology.clock:
        cycles = sum(found["cycles"].values())
        found |= _rate(topology, found, cycles / topology.clock, "at the estimated cycles")
    elif "seconds_at_peak" in found:
        found |= _rate(topology, found, found["seconds_at_peak"], "at the peak, so at the very most")
    found["pixel_bytes_per_image"] = one["image"].nbytes
    return found


def _needed(message: str) -> int | None:
    """Reads from a compiler's complaint how much memory it would have needed, at least."""
    if not (used := re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMGT])", message)):
        return None
    return int(float(used[1]) * 2 ** (10 * ("KMGT".index(used[2]) + 1)))


def _rate(topology: topologies.Topology, found: dict, seconds_per_step: float, when: str) -> dict:
    rate = found["batch_size"] / topology.hosts / seconds_per_step
    return {"images_per_second_per_host": rate, "rate_is": when}


def needed_rate(config: ConfigDict, topology: topologies.Topology, found: dict, hours: float) -> dict:
    """Returns the data rate that ends the run in so many hours, instead of the compiler's."""
    steps = total_steps(config, make_task(config, topology.platform).data.num_train)
    return _rate(topology, found, 3600 * hours / steps, f"for {hours:g} hours")


def find_batch(config: ConfigDict, topology: topologies.Topology) -> dict:
    """Returns the `preflight` of the largest batch per device that fits, to one part in 16.

    The config's own batch is where it looks first.
    """
    unit = len(topology.devices) * config.accumulation_steps
    tried: dict[int, dict] = {}

    def fits(count: int) -> bool:
        config.batch_size = count * unit
        tried[count] = preflight(config, topology)
        verdict = "fits" if tried[count]["fits"] else "does not fit"
        print(f"{tried[count]['batch_per_device']} per device: {verdict}", file=sys.stderr, flush=True)
        return tried[count]["fits"]

    best = largest(fits, max(1, config.batch_size // unit))
    config.batch_size = max(best, 1) * unit
    return tried[max(best, 1)]


def largest(fits: Callable[[int], bool], first: int) -> int:
    """Returns the largest count that fits, within one part in `FINENESS`; 0 if one is too many.

    Args:
      fits: says of a count whether it fits; what is less than one that fits does too.
      first: the first to try, at least 1.
    """
    most, over, count = 0, math.inf, first
    while over - most > max(1, most // FINENESS):
        if fits(count):
            most = count
        else:
            over = count
        count = 2 * most if over == math.inf else (most + int(over)) // 2
    return most


def table(found: dict) -> str:
    """Returns the findings for people, as Markdown."""
    devices = f"{found['devices']} ({', '.join(f'{k}={n}' for k, n in found['mesh'].items())})"
    rows = {
        "run": found["config"],
        "topology": f"{found['topology']}: {devices} devices, {found['hosts']} hosts",
        "batch": f"{found['batch_size']}, {found['batch_per_device']} per device",
        "parameters": f"{found['parameters']:,}",
        "memory per device": f"{_gib(found['peak_bytes'])} of {_gib(found['usable_bytes'])} GiB",
        "": "fits" if found["fits"] else "DOES NOT FIT",
    }
    if "collectives" in found:
        rows["of it, arguments and temporary"] = (
            f"{_gib(found['argument_bytes'])} and {_gib(found['temp_bytes'])} GiB"
        )
        rows["compiled in"] = f"{found['compile_seconds']:.0f} s"
        for kind, sums in found["collectives"].items():
            rows[kind] = f"{sums['count']}, each device sends {sums['bytes'] / 1e6:,.1f} MB per step"
    rows["products and convolutions"] = f"{found['matrix_flops_per_image'] / 1e9:.2f} GFLOP per image"
    if "seconds_at_peak" in found:
        rows["products and convolutions"] += f", {1e3 * found['seconds_at_peak']:.1f} ms a step at the peak"
    if "flops_per_image" in found:
        rows["all, as compiled"] = (
            f"{found['flops_per_image'] / 1e9:.2f} GFLOP, {found['bytes_per_image'] / 1e6:.1f} MB per image"
        )
    if "cycles" in found:
        cycles = found["cycles"]
        rows["estimated Mcycles"] = f"{sum(cycles.values()) / 1e6:.1f}: " + ", ".join(
            f"{kind} {count / 1e6:.1f}" for kind, count in list(cycles.items())[:6]
        )
    if "images_per_second_per_host" in found:
        rate = found["images_per_second_per_host"]
        pixels = rate * found["pixel_bytes_per_image"] / 1e6
        rows["each host reads"] = f"{rate:,.0f} images/s, {pixels:,.0f} MB/s of pixels, {found['rate_is']}"
    lines = [("preflight", ""), ("---", "---"), *rows.items()]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.2f}"


if __name__ == "__main__":
    sys.exit(main())
