"""Speed on one GPU: correctness, kernels, and training steps beside PyTorch's, as one table each.

  python -m experiments.benchmarks.gpu                      # everything
  python -m experiments.benchmarks.gpu check depthwise      # some sections: compiling takes most of the time
  python -m experiments.benchmarks.gpu --small              # the same programs at a tiny size, also on a CPU

Sections:
  rates       what the GPU reaches: a copy and a large matrix product
  depthwise   every form of the depthwise convolution and of its weights' gradient, beside PyTorch's
  stages      one block of each stage, masked and gathered, over the share of visible patches: `auto`
  steps       training steps: pretraining masked and gathered, and fine-tuning; then PyTorch's, eager and
              compiled (masked-dense FCMAE; timm's classifier), which take three minutes to compile
  check       FCMAE and the depthwise kernels on the GPU against the CPU: loss, gradients, bfloat16

Needs JAX, Flax, Optax, jaxtyping, einops, and for the peers PyTorch and timm. Each section writes
SECTION.json into the folder --out and prints a table.
"""

import argparse
import concurrent.futures
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's processes share the GPU

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnx2_jax.commandline import Parser, run
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models import VARIANTS, create_model, variant
from cnx2_jax.models.convnextv2 import Block
from cnx2_jax.models.fcmae import LAYOUTS, random_mask, visible_count
from cnx2_jax.models.layouts import Gathered, Masked
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe.tables import markdown_table
from experiments.benchmarks.gpu_depthwise import FORMS, check_form, measure_depthwise
from experiments.benchmarks.gpu_steps import THREADS, measure_steps
from experiments.benchmarks.gpu_timing import jax_seconds, notice
from experiments.benchmarks.pretraining import pretraining_loss

BATCHES = {"atto": 512, "tiny": 64, "base": 64, "huge": 16}  # images
SHARES = (0.4, 0.6, 0.8)  # of visible patches


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _run(_parse(argv)), "gpu")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="some of the above; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder; %(default)s by default")
    parser.add_argument(
        "--variants", nargs="+", default=list(BATCHES), help=f"steps; {' '.join(BATCHES)} by default"
    )
    parser.add_argument(
        "--peers", nargs="*", default=["tiny", "base"], help="steps: variants that PyTorch runs too"
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    args = parser.parse_args(argv)
    for section in args.sections:
        if section not in SECTIONS:
            raise UserError(
                f"unknown section '{section}'{nearest(section, SECTIONS)} (known: {', '.join(SECTIONS)})"
            )
    for name in args.variants:
        variant(name)
    return args


def _run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    notice(f"{device.device_kind}, jax {jax.__version__}, {device.platform}")
    sections = args.sections or list(SECTIONS)
    for name in sections:
        begin = time.monotonic()
        records, table = SECTIONS[name](args)
        notice(f"{name}: {time.monotonic() - begin:.0f} s")
        content = {"device": device.device_kind, "jax": jax.__version__, "records": records}
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"\n{name}, {device.device_kind}, jax {jax.__version__}\n{table}", flush=True)


def _size(name: str, args: argparse.Namespace) -> tuple[int, int]:
    return (2, 64) if args.small else (BATCHES.get(name, 64), 224)


# check


def check(args: argparse.Namespace):
    """Compares FCMAE's loss and gradients, and the depthwise kernels, with the CPU's."""
    cpu, here = jax.devices("cpu")[0], jax.devices()[0]
    size, batch = (64, 2) if args.small else (224, 4)
    images = np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32)
    keys = jax.random.split(jax.random.key(3), batch)
    records: list[dict] = []

    def program(layout: str, dtype, device):
        # Scanned, because that compiles a quarter of the operations; the mathematics is the same.
        options = {"layout": layout, "dtype": dtype, "scan": True}
        graph, params = split(create_model("fcmae_atto", rngs=nnx.Rngs(0), **options))
        noise = np.random.default_rng(9)
        params = {
            name: p + 0.05 * noise.standard_normal(p.shape, np.float32) for name, p in sorted(params.items())
        }
        operands = jax.device_put((params, images, keys), device)
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            return jax.jit(jax.value_and_grad(pretraining_loss(graph))).lower(*operands), operands

    wanted = [(layout, dtype) for layout in LAYOUTS for dtype in (jnp.float32, jnp.bfloat16)]
    programs = [program("masked", jnp.float32, cpu), *(program(*chosen, here) for chosen in wanted)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        compiled = list(pool.map(lambda item: item[0].compile(), programs))
    losses, gradients = [], []
    for function, (_, operands) in zip(compiled, programs, strict=True):
        value, found = function(*operands)
        losses.append(float(value))
        leaves = [np.asarray(leaf, np.float64).ravel() for _, leaf in sorted(found.items())]
        gradients.append(np.concatenate(leaves))
    for (layout, dtype), loss, gradient in zip(wanted, losses[1:], gradients[1:], strict=True):
        difference = np.linalg.norm(gradient - gradients[0]) / np.linalg.norm(gradients[0])
        records.append(
            {
                "what": f"FCMAE atto {layout} {jnp.dtype(dtype).name}",
                "forward": abs(loss / losses[0] - 1),
                "gradient": float(difference),
            }
        )
        notice(str(records[-1]))
    for form in FORMS:
        for shape in ((1, 7, 7, 16),) if args.small else ((2, 14, 14, 40), (3, 28, 28, 96), (2, 7, 7, 768)):
            for dtype in (jnp.float32, jnp.bfloat16):
                records.append(check_form(form, shape, dtype))
                notice(str(records[-1]))
    rows = [[r["what"], f"{r['forward']:.1e}", f"{r['gradient']:.1e}"] for r in records]
    return records, markdown_table(["against float32 on the CPU", "forward", "gradient"], rows)


# rates


def rates(args: argparse.Namespace):
    """Measures the bytes per second of a copy and the FLOP/s of a matrix product."""
    side, count = (256, 2**16) if args.small else (8192, 2**30)
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (count,), jnp.bfloat16)
    product = jax_seconds(jax.jit(lambda a: a @ a.T), [(a,)], small=args.small)
    copy = jax_seconds(jax.jit(lambda x: -x), [(x,)], small=args.small)
    record = {"flops_per_second": 2 * side**3 / product, "bytes_per_second": 2 * x.nbytes / copy}
    row = [f"{record['flops_per_second'] / 1e12:.0f}", f"{record['bytes_per_second'] / 1e12:.2f}"]
    return [record], markdown_table(["bfloat16 product, TFLOP/s", "copy, TB/s"], [row])


# stages


def stages(args: argparse.Namespace):
    """Times a block of base, forward and backward, in each layout, over the share of visible patches."""
    dims = (16,) * 4 if args.small else VARIANTS["base"].dims
    programs: dict[tuple, tuple] = {}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for stage, dim in enumerate(dims):
            for layout, share in (("masked", SHARES[0]), *(("gathered", share) for share in SHARES)):
                step, operands = _block_step(layout, stage, dim, share, small=args.small)
                lowered = jax.jit(step).lower(*operands)
                programs[stage + 1, layout, share] = pool.submit(lowered.compile), operands
        concurrent.futures.wait(future for future, _ in programs.values())
        records = []
        for (stage, layout, share), (future, operands) in programs.items():
            taken = jax_seconds(future.result(), [operands], small=args.small)
            records.append({"stage": stage, "layout": layout, "share": share, "seconds": taken})
            notice(str(records[-1]))
    rows = [
        [stage, *(f"{1e3 * r['seconds']:.2f}" for r in records if r["stage"] == stage)]
        for stage in range(1, 1 + len(dims))
    ]
    header = ["a block of base, ms", "masked", *(f"gathered, share {share}" for share in SHARES)]
    return records, markdown_table(header, rows)


def _block_step(layout: str, stage: int, dim: int, share: float, *, small: bool) -> tuple[Callable, tuple]:
    """Returns the gradient of a block in parameters and map, and its operands."""
    batch, grid = (2, 2) if small else (64, 7)
    scale, kind = 2 ** (3 - stage), LAYOUTS[layout][stage]
    visible = visible_count(grid**2, 1 - share)
    graph, params = split(Block(dim, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def loss(params, x, masked):
        held = (
            Gathered.from_mask(masked, visible, scale)
            if kind is Gathered
            else Masked.from_mask(masked, scale)
        )
        return jnp.square(merge(graph, params)(x, held).astype(jnp.float32)).mean()

    shape = (batch, visible * scale**2, dim) if kind is Gathered else (batch, grid * scale, grid * scale, dim)
    x = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)
    masked = random_mask(jax.random.split(jax.random.key(1), batch), (grid, grid), 1 - share)
    return jax.grad(loss, argnums=(0, 1)), (params, x, masked)


SECTIONS = {
    "rates": rates,
    "depthwise": lambda args: measure_depthwise(small=args.small),
    "stages": stages,
    "steps": lambda args: measure_steps(
        {name: _size(name, args) for name in args.variants}, args.peers, small=args.small
    ),
    "check": check,
}


if __name__ == "__main__":
    sys.exit(main())
