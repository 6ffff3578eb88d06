"""Speed of masked pretraining: on this machine against PyTorch, and as compiled for TPUs and GPUs.

  python -m experiments.benchmarks.steps                    # everything: about an hour on 2 cores
  python -m experiments.benchmarks.steps machine growth     # some sections
  python -m experiments.benchmarks.steps machine --variants atto --rounds 3 --image-size 64    # a quick look

Sections:
  machine   on this machine's CPU: train step and forward pass, masked and gathered (which `auto` chooses on
            CPUs), and classification, in turns with a PyTorch peer (masked-dense FCMAE, channels-last, eager
            and torch.compile; needs the extra `parity`)
  growth    on the CPU: cost per image over batch size, image size and variant; compile time over depth
  tpu       compiled for a TPU topology: FLOPs, bytes, memory, estimated cycles (needs the extra `tpu`)
  gpu       compiled for an H100: memory (needs the extra `cuda`)

Each section writes SECTION.json, a table SECTION.md and, for machine and growth, a plot SECTION.png into the
folder --out.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cnx2_jax.preflight import topologies  # before JAX: it sets environment variables that JAX reads

# isort: split
from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models import VARIANTS, variant
from cnx2_jax.models.fcmae import stage_kinds
from cnx2_jax.observe.plots import draw_into
from cnx2_jax.observe.tables import markdown_table
from experiments.benchmarks import gradient
from experiments.benchmarks.contestants import (
    CLASSIFY,
    FORWARD,
    PEERS,
    TRAIN,
    Contestant,
    Measurement,
    measure,
)
from experiments.benchmarks.plots import draw_growth, draw_machine
from experiments.benchmarks.pretraining import DENSE, build_jax, build_torch, train_step

LAYOUTS = ("masked", "gathered", "auto")
VISIBLE = 19 / 49  # of the patches of 224 pixels, at the paper's mask ratio of 0.6
GROWTH: dict[str, list] = {
    "batch": [1, 2, 4, 8, 16, 32],
    "image_size": [64, 128, 224, 384],
    "variant": ["atto", "femto", "pico", "nano", "tiny"],
}
DEPTHS = ("atto", "tiny", "base", "huge")  # whose train steps are compiled


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _run(_parse(argv)), "steps")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.benchmarks.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark"), help="folder; %(default)s by default"
    )
    parser.add_argument(
        "--variants", nargs="+", default=["atto", "tiny"], help="machine; atto tiny by default"
    )
    parser.add_argument(
        "--rounds", type=count, default=11, help="machine, growth: turns; %(default)s by default"
    )
    parser.add_argument("--batch", type=count, default=8, help="machine: images; %(default)s by default")
    parser.add_argument("--image-size", type=int, default=224, help="machine: pixels; %(default)s by default")
    parser.add_argument("--topology", default="v5e:2x2", help="tpu; %(default)s by default")
    parser.add_argument("--compiled-variant", default="base", help="tpu, gpu; %(default)s by default")
    parser.add_argument(
        "--compiled-batch", type=count, default=64, help="tpu, gpu: per device; %(default)s by default"
    )
    args = parser.parse_args(argv)
    for section in args.sections:
        if section not in SECTIONS:
            raise UserError(
                f"unknown section '{section}'{nearest(section, SECTIONS)} (known: {', '.join(SECTIONS)})"
            )
    for name in [*args.variants, args.compiled_variant]:
        variant(name)
    if args.image_size < 64 or args.image_size % 32:
        raise UserError(f"--image-size {args.image_size} must be a multiple of 32, at least 64")
    return args


def _run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for section in args.sections or SECTIONS:
        begin = time.monotonic()
        records, table, draw = SECTIONS[section](args)
        _notice(f"{section}: {time.monotonic() - begin:.0f} s")
        content = {
            "machine": _machine(),
            "arguments": vars(args) | {"out": str(args.out)},
            "records": records,
        }
        (args.out / f"{section}.json").write_text(json.dumps(content, indent=1) + "\n")
        (args.out / f"{section}.md").write_text(table + "\n")
        print(table)
        if draw:
            _notice(draw_into(args.out / f"{section}.png", draw))


def _notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _machine() -> dict:
    import jax

    return {"processor": _processor(), "cores": os.cpu_count(), "jax": jax.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


# machine


def machine(args: argparse.Namespace):
    """Measures every layout against the peers, one variant after another."""
    records, rows, bars = [], [], {}
    for name in args.variants:
        options = {"variant": name, "batch": args.batch, "image_size": args.image_size}
        contestants = [
            *(
                Contestant(build_jax, "jax", mode=layout, programs=(TRAIN, FORWARD), **options)
                for layout in LAYOUTS[:2]
            ),
            Contestant(build_jax, "jax", mode=DENSE, programs=(CLASSIFY,), **options),
            *(Contestant(build_torch, "torch", mode=peer, **options) for peer in PEERS),
        ]
        found = measure(contestants, args.rounds, _notice)
        records += [measurement.record() for measurement in found]
        for program in (TRAIN, FORWARD, CLASSIFY):
            row, speedups = _compare([m for m in found if m.program == program])
            rows.append([f"{name}, {program}", *row])
            bars[f"{name}\n{program}"] = speedups
    header = [
        f"batch {args.batch}, {args.image_size} px",
        "ours",
        "over torch eager",
        "over torch compile",
        *(f"{column} ms" for column in ("masked", "gathered", "torch eager", "torch compile")),
    ]
    floors = _floors(args)
    records.append({"floors": floors})
    table = markdown_table(header, rows) + "\n\n" + _floor_table(floors)
    return records, table, lambda figure: draw_machine(figure, bars)


def _floors(args: argparse.Namespace) -> dict:
    """Measures this machine's rates and counts the operations and bytes of a gathered train step."""
    import jax
    import jax.numpy as jnp

    _notice("measuring rates")
    square = jnp.ones((2048, 2048))
    large = jnp.ones(2**26)
    rates = {
        "flops_per_second": 2 * 2048**3 / _seconds(jax.jit(lambda x: x @ x), square),
        "bytes_per_second": 2 * large.nbytes / _seconds(jax.jit(lambda x: x + 1), large),
    }
    counts = {}
    for name in args.variants:
        _notice(f"counting {name}")
        # Unrolled, because XLA counts a loop's body once.
        costs = _lower_step(name, args.batch, args.image_size, scan=False).compile().cost_analysis() or {}
        counts[name] = {"flops": costs.get("flops", 0), "bytes": costs.get("bytes accessed", 0)}
    return rates | {"counts": counts}


def _seconds(function: Callable, argument) -> float:
    taken = []
    for _ in range(7):
        begin = time.perf_counter()
        function(argument).block_until_ready()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[3]


def _floor_table(floors: dict) -> str:
    flops, moved = floors["flops_per_second"], floors["bytes_per_second"]
    rows = [
        [
            name,
            f"{count['flops'] / 1e9:.1f}",
            f"{1e3 * count['flops'] / flops:.0f}",
            f"{count['bytes'] / 1e9:.2f}",
            f"{1e3 * count['bytes'] / moved:.0f}",
        ]
        for name, count in floors["counts"].items()
    ]
    header = [
        "gathered train step",
        "GFLOP",
        f"ms at {flops / 1e9:.0f} GFLOP/s",
        "GB between operations",
        f"ms at {moved / 1e9:.1f} GB/s",
    ]
    return markdown_table(header, rows)


def _compare(found: list[Measurement]) -> tuple[list[str], dict[str, float]]:
    """Returns a table row, ratios first, and the speed of every contestant relative to PyTorch eager."""
    by_name = {m.contestant.name: m for m in found}
    # Classification has no masks; its only contestant takes the place of the masked one.
    ours = by_name.get("jax gathered") or by_name.get("jax dense")
    if ours is None:
        return ["-"] * 7, {}

    def ratio(peer: str) -> str:
        return f"{by_name[peer].median / ours.median:.2f}x" if peer in by_name else "-"

    def milliseconds(*names: str) -> str:
        m = next((by_name[name] for name in names if name in by_name), None)
        if m is None:
            return "-"
        return f"{1e3 * m.median:.0f} ({1e3 * min(m.seconds):.0f}-{1e3 * max(m.seconds):.0f})"

    row = [
        ours.contestant.mode,
        ratio("torch eager"),
        ratio("torch compile"),
        milliseconds("jax masked", "jax dense"),
        milliseconds("jax gathered"),
        milliseconds("torch eager"),
        milliseconds("torch compile"),
    ]
    base = by_name.get("torch eager", ours).median
    return row, {name: base / m.median for name, m in by_name.items()}


# growth


def growth(args: argparse.Namespace):
    """Measures time and memory per image of the train step along one axis at a time, and compile time."""
    base = Contestant(build_jax, "jax", "atto", "auto", programs=(TRAIN,))
    records, rows, curves = [], [], {}
    for axis, values in GROWTH.items():
        contestants = [dataclasses.replace(base, **{axis: value}) for value in values]
        found = measure(contestants, args.rounds, _notice)
        records += [m.record() for m in found]
        per_image = [(m.median / m.contestant.batch, (m.temp_bytes or 0) / m.contestant.batch) for m in found]
        curves[axis] = (values, per_image)
        for value, m, (seconds, temp) in zip(values, found, per_image, strict=True):
            rows.append(
                [f"{axis} {value}", f"{1e3 * seconds:.1f}", f"{temp / 2**20:.1f}", m.contestant.batch]
            )
    compiled = {name: _compile_seconds(name) for name in DEPTHS}
    records.append({"compile_seconds": compiled})
    table = markdown_table(
        ["atto, 224 px, batch 8, but", "ms per image", "temp MiB per image", "batch"], rows
    )
    first = compiled[DEPTHS[0]]
    table += "\n\n" + markdown_table(
        ["train step of", "blocks", "compiles in s", f"over {DEPTHS[0]}"],
        [[n, sum(VARIANTS[n].depths), f"{s:.1f}", f"{s / first:.2f}x"] for n, s in compiled.items()],
    )
    return records, table, lambda figure: draw_growth(figure, curves)


def _compile_seconds(name: str) -> float:
    """Returns the seconds to compile loss, gradient and AdamW, the median of three."""
    import jax

    _notice(f"compiling {name}")
    taken = []
    for _ in range(3):
        jax.clear_caches()
        begin = time.perf_counter()
        _lower_step(name, 8, 224).compile()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[1]


def _lower_step(name: str, batch: int, image_size: int, **options):
    """Lowers the train step of an FCMAE variant, from shapes alone."""
    import jax
    from flax import nnx

    from cnx2_jax.models import create_model
    from cnx2_jax.models.state import split

    graph, params = split(nnx.eval_shape(lambda: create_model(f"fcmae_{name}", rngs=nnx.Rngs(0), **options)))
    optimizer, step = train_step(graph)
    state = jax.eval_shape(optimizer.init, params)
    images = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), "float32")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, images, keys)


# tpu and gpu


def _compiled_layouts(platform: str) -> list[tuple[str, str | None]]:
    """Returns the layouts, each with the earlier one that treats every stage the same way, or None."""
    kinds = {layout: stage_kinds(layout, platform, VISIBLE) for layout in LAYOUTS}
    return [
        (layout, next((other for other in LAYOUTS[:i] if kinds[other] == kinds[layout]), None))
        for i, layout in enumerate(LAYOUTS)
    ]


def tpu(args: argparse.Namespace):
    """Compiles for a TPU: cycles and memory of the scanned program, FLOPs and bytes of the unrolled one."""
    import jax.numpy as jnp

    devices = topologies.tpu_devices(args.topology)
    options = {"platform": "tpu", "batch": args.compiled_batch, "dtype": jnp.bfloat16}
    records: list[dict] = []
    for scan in (True, False):
        for layout, same_as in _compiled_layouts("tpu"):
            if same_as:
                same = next(r for r in records if r["layout"] == same_as and r["scan"] == scan)
                records.append(same | {"layout": layout})
                continue
            _notice(f"compiling {args.compiled_variant}, {layout}, {'scanned' if scan else 'unrolled'}")
            compiled = gradient.compile_gradient(args.compiled_variant, layout, devices, scan=scan, **options)
            found = gradient.report(compiled)
            records.append({"layout": layout, "scan": scan, **vars(found)})
    rows = []
    for record in records:
        masked = next(r for r in records if r["layout"] == "masked" and r["scan"] == record["scan"])
        cycles, most = sum(record["cycles"].values()), sum(masked["cycles"].values())
        counted = not record["scan"]  # XLA counts a loop's body once
        rows.append(
            [
                f"{record['layout']}, {'scanned' if record['scan'] else 'unrolled'}",
                f"{cycles / most:.2f}",
                f"{record['temp_bytes'] / masked['temp_bytes']:.2f}",
                f"{cycles / 1e6:.0f}",
                f"{record['temp_bytes'] / 2**30:.2f}",
                f"{record['flops'] / 1e12:.2f}" if counted else "-",
                f"{record['bytes_accessed'] / 1e9:.0f}" if counted else "-",
                ", ".join(f"{kind} {value / 1e6:.0f}" for kind, value in list(record["cycles"].items())[:5]),
            ]
        )
    header = [
        f"{args.compiled_variant}, bf16, {args.compiled_batch} per chip, {args.topology}",
        "cycles / masked",
        "temp / masked",
        "Mcycles",
        "temp GiB",
        "TFLOP",
        "GB",
        "Mcycles by kind",
    ]
    return records, markdown_table(header, rows), None


def gpu(args: argparse.Namespace):
    """Compiles for an H100: memory as the compiler plans it."""
    import jax.numpy as jnp

    devices = topologies.h100_devices()
    records: list[dict] = []
    rows = []
    for layout, same_as in _compiled_layouts("gpu"):
        if same_as:
            temp = next(r["temp_bytes"] for r in records if r["layout"] == same_as)
        else:
            _notice(f"compiling {args.compiled_variant}, {layout}")
            options = {"platform": "gpu", "batch": args.compiled_batch, "dtype": jnp.bfloat16}
            compiled = gradient.compile_gradient(args.compiled_variant, layout, devices, **options)
            temp = compiled.memory_analysis().temp_size_in_bytes
        records.append({"layout": layout, "temp_bytes": temp})
        rows.append([layout, f"{temp / records[0]['temp_bytes']:.2f}", f"{temp / 2**30:.2f}"])
    header = [
        f"{args.compiled_variant}, bf16, {args.compiled_batch} per H100",
        "temp / masked",
        "temp GiB",
    ]
    return records, markdown_table(header, rows), None


SECTIONS: dict[str, Callable] = {"machine": machine, "growth": growth, "tpu": tpu, "gpu": gpu}


if __name__ == "__main__":
    sys.exit(main())
