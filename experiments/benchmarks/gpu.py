"""Speed on one GPU: correctness, kernels, and training steps beside PyTorch's, as one table each.

  python -m experiments.benchmarks.gpu                      # everything: under 8 minutes on an H100
  python -m experiments.benchmarks.gpu check depthwise      # some sections
  python -m experiments.benchmarks.gpu --small              # the same programs at a tiny size, also on a CPU

Sections:
  check       FCMAE and the depthwise kernels on the GPU against the CPU: loss, gradients, bfloat16
  rates       what the GPU reaches: a copy and a large matrix product
  depthwise   every form of the depthwise convolution and of its weights' gradient, beside PyTorch's
  stages      one block of each stage, masked and gathered, over the share of visible patches: `auto`
  steps       training steps: pretraining masked, gathered and auto, and fine-tuning; beside PyTorch eager and
              compiled (masked-dense FCMAE; timm's classifier)

Needs JAX, Flax, Optax, jaxtyping, einops, and for the peers PyTorch and timm. Each section writes
SECTION.json into the folder --out and prints a table.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
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
from cnx2_jax.kernels import depthwise
from cnx2_jax.models import VARIANTS, create_model, variant
from cnx2_jax.models.convnextv2 import Block
from cnx2_jax.models.fcmae import LAYOUTS, random_mask, visible_count
from cnx2_jax.models.layouts import Gathered, Masked
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe.flops import PEAKS, matrix_flops
from cnx2_jax.observe.tables import markdown_table
from experiments.benchmarks.contestants import pretraining_loss, train_step
from experiments.benchmarks.gpu_peers import Peers

BATCHES = {"atto": 512, "tiny": 64, "base": 64, "huge": 16}  # images
SHARES = (0.4, 0.6, 0.8)  # of visible patches
THREADS = 8  # that compile side by side


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
    _notice(f"{device.device_kind}, jax {jax.__version__}, {device.platform}")
    sections = args.sections or list(SECTIONS)
    for name in sections:
        begin = time.monotonic()
        records, table = SECTIONS[name](args)
        _notice(f"{name}: {time.monotonic() - begin:.0f} s")
        content = {"device": device.device_kind, "jax": jax.__version__, "records": records}
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"\n{name}, {device.device_kind}, jax {jax.__version__}\n{table}", flush=True)


def _size(name: str, args: argparse.Namespace) -> tuple[int, int]:
    return (2, 64) if args.small else (BATCHES.get(name, 64), 224)


def _notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def seconds(call: Callable[[int], object], wait: Callable[[object], object], *, small: bool) -> float:
    """Returns the seconds of one call, the median of groups that run without waiting in between."""
    for index in range(2):
        wait(call(index))
    begin = time.perf_counter()
    wait(call(0))
    once = time.perf_counter() - begin
    count = 1 if small else int(min(200, max(3, 0.12 / once)))
    taken = []
    for _ in range(2 if small else 5):
        begin = time.perf_counter()
        for index in range(count):
            last = call(index)
        wait(last)
        taken.append((time.perf_counter() - begin) / count)
    return statistics.median(taken)


def _jax_seconds(function: Callable, operands: Sequence[tuple], *, small: bool) -> float:
    """Times a jitted function on several sets of operands in turn, so that caches do not hold them."""
    return seconds(
        lambda index: function(*operands[index % len(operands)]), jax.block_until_ready, small=small
    )


def _shifted(x: jax.Array, kernel: jax.Array, pads: depthwise.Pads) -> jax.Array:
    """Convolves by multiply-adds of shifted maps, which XLA fuses into one loop."""
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = (side - size + 1 for side, size in zip(padded.shape[1:3], kernel.shape, strict=False))
    wide = kernel.astype(jnp.float32)
    total = sum(
        padded[:, row : row + height, column : column + width].astype(jnp.float32) * wide[row, column]
        for row in range(kernel.shape[0])
        for column in range(kernel.shape[1])
    )
    return jnp.asarray(total, x.dtype)


def _shifted_sums(x: jax.Array, gradient: jax.Array, pads: depthwise.Pads) -> jax.Array:
    """Computes the weights' gradient as one sum over all positions per tap."""
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    _, height, width, channels = gradient.shape
    rows, columns = padded.shape[1] - height + 1, padded.shape[2] - width + 1
    wide = gradient.astype(jnp.float32)
    sums = [
        (padded[:, row : row + height, column : column + width].astype(jnp.float32) * wide).sum((0, 1, 2))
        for row in range(rows)
        for column in range(columns)
    ]
    return jnp.stack(sums).reshape(rows, columns, channels)


# The convolution and its weights' gradient: what the package uses on this platform, and alternatives.
FORMS = {
    "ours": (depthwise.convolve, depthwise.kernel_gradient),
    "XLA's": (depthwise.native, depthwise.native_kernel_gradient),
    "shifts": (_shifted, _shifted_sums),
}


# check


def check(args: argparse.Namespace):
    """Compares FCMAE's loss and gradients, and the depthwise kernels, with the CPU's."""
    cpu, here = jax.devices("cpu")[0], jax.devices()[0]
    size, batch = (64, 2) if args.small else (224, 4)
    images = np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32)
    keys = jax.random.split(jax.random.key(3), batch)
    records: list[dict] = []

    def gradients(layout: str, dtype, device):
        graph, params = split(create_model("fcmae_atto", rngs=nnx.Rngs(0), layout=layout, dtype=dtype))
        params = {
            name: jax.random.normal(jax.random.key(9), p.shape) * 0.05 + p for name, p in params.items()
        }
        function = jax.jit(jax.value_and_grad(pretraining_loss(graph)))
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            value, found = function(*jax.device_put((params, images, keys), device))
        return np.asarray(value, np.float64), np.concatenate(
            [np.asarray(leaf, np.float64).ravel() for _, leaf in sorted(found.items())]
        )

    loss, gradient = gradients("masked", jnp.float32, cpu)
    for layout in LAYOUTS:
        for dtype in (jnp.float32, jnp.bfloat16):
            other_loss, other = gradients(layout, dtype, here)
            records.append(
                {
                    "what": f"FCMAE atto {layout} {jnp.dtype(dtype).name}",
                    "forward": abs(float(other_loss - loss) / float(loss)),
                    "gradient": float(np.linalg.norm(other - gradient) / np.linalg.norm(gradient)),
                }
            )
    for form in FORMS:
        for shape in ((1, 7, 7, 16),) if args.small else ((2, 14, 14, 40), (3, 28, 28, 96), (2, 7, 7, 768)):
            for dtype in (jnp.float32, jnp.bfloat16):
                records.append(_check_form(form, shape, dtype))
    rows = [[r["what"], f"{r['forward']:.1e}", f"{r['gradient']:.1e}"] for r in records]
    return records, markdown_table(["against float32 on the CPU", "forward", "gradient"], rows)


def _check_form(form: str, shape: tuple, dtype) -> dict:
    random = np.random.default_rng(1)
    x, gradient = (jnp.asarray(random.standard_normal(shape), dtype) for _ in range(2))
    kernel = jnp.asarray(random.standard_normal((7, 7, shape[-1])), dtype)
    pads = depthwise.same_pads((7, 7))
    found = [jax.jit(f, static_argnums=2)(x, o, pads) for f, o in _pairs(form, kernel, gradient)]
    cpu = jax.devices("cpu")[0]
    wide = [jax.device_put(np.asarray(a, np.float32), cpu) for a in (x, kernel, gradient)]
    expected = [jax.jit(f, static_argnums=2)(wide[0], o, pads) for f, o in _pairs("ours", *wide[1:])]
    errors = [
        float(np.linalg.norm(np.asarray(f, np.float64) - e) / np.linalg.norm(e))
        for f, e in zip(found, map(np.asarray, expected), strict=True)
    ]
    return {"what": f"{form} {shape} {jnp.dtype(dtype).name}", "forward": errors[0], "gradient": errors[1]}


def _pairs(form: str, kernel, gradient):
    forward, backward = FORMS[form]
    return (forward, kernel), (backward, gradient)


# rates


def rates(args: argparse.Namespace):
    """Measures the bytes per second of a copy and the FLOP/s of a matrix product."""
    side, count = (256, 2**16) if args.small else (8192, 2**30)
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (count,), jnp.bfloat16)
    product = _jax_seconds(jax.jit(lambda a: a @ a.T), [(a,)], small=args.small)
    copy = _jax_seconds(jax.jit(lambda x: -x), [(x,)], small=args.small)
    record = {"flops_per_second": 2 * side**3 / product, "bytes_per_second": 2 * x.nbytes / copy}
    row = [f"{record['flops_per_second'] / 1e12:.0f}", f"{record['bytes_per_second'] / 1e12:.2f}"]
    return [record], markdown_table(["bfloat16 product, TFLOP/s", "copy, TB/s"], [row])


# depthwise


def depthwise_section(args: argparse.Namespace):
    """Times the forms at the shapes of base's stages: whole maps, and windows with their borders."""
    batch = 2 if args.small else 64
    dims, cells = VARIANTS["base"].dims, visible_count(49, 0.6)
    shapes = [
        ("stage 1", (batch, 56, 56, dims[0]), True),
        ("stage 2", (batch, 28, 28, dims[1]), True),
        ("stage 3", (batch, 14, 14, dims[2]), True),
        ("stage 4", (batch, 7, 7, dims[3]), True),
        ("stage 1, windows", (batch * cells, 14, 14, dims[0]), False),
        ("stage 2, windows", (batch * cells, 10, 10, dims[1]), False),
    ]
    if args.small:
        shapes = [("stage 4", (1, 7, 7, 16), True), ("stage 2, windows", (1, 10, 10, 16), False)]
    records = []
    for name, shape, same in shapes:
        pads = depthwise.same_pads((7, 7)) if same else ((0, 0), (0, 0))
        out = shape if same else (shape[0], shape[1] - 6, shape[2] - 6, shape[3])
        keys = jax.random.split(jax.random.key(0), 7)
        xs = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3]]
        gradients = [jax.random.normal(key, out, jnp.bfloat16) for key in keys[3:6]]
        kernel = jax.random.normal(keys[6], (7, 7, shape[-1]), jnp.bfloat16)
        floor = 2 * (np.prod(shape) + np.prod(out))  # bytes of either operation
        for form in FORMS:
            forward, backward = FORMS[form]
            record = {"where": name, "form": form, "shape": shape, "bytes": int(floor)}
            for what, function, operands in (
                ("forward", forward, [(x, kernel) for x in xs]),
                ("weights", backward, list(zip(xs, gradients, strict=True))),
            ):
                begin = time.perf_counter()
                jitted = jax.jit(lambda x, other, f=function, pads=pads: f(x, other, pads))
                jax.block_until_ready(jitted(*operands[0]))
                record[f"{what} compile"] = time.perf_counter() - begin
                record[what] = _jax_seconds(jitted, operands, small=args.small)
            records.append(record)
            _notice(f"{name} {form}: {1e3 * record['forward']:.3f} {1e3 * record['weights']:.3f} ms")
        records.append(
            {"where": name, "form": "torch", "shape": shape, **_torch_depthwise(shape, same, args)}
        )
    rows = []
    for name, shape, _ in shapes:
        found = {r["form"]: r for r in records if r["where"] == name}
        for what in ("forward", "weights"):
            values = [f"{1e3 * found[f][what]:.3f}" if what in found[f] else "-" for f in found]
            rows.append([f"{name} {what}", "x".join(map(str, shape)), *values])
    return records, markdown_table(["bfloat16, ms", "shape", *FORMS, "PyTorch"], rows)


def _torch_depthwise(shape: tuple, same: bool, args: argparse.Namespace) -> dict:
    """Times PyTorch's convolution, channels-last; its gradient of map and weights alone, each."""
    try:
        import torch
    except ImportError:
        return {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    batch, height, width, channels = shape
    like = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(batch, channels, height, width, **like).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, 7, 7, **like)
    pad = 3 if same else 0
    y = torch.nn.functional.conv2d(x, weight, padding=pad, groups=channels)
    gradient = torch.randn_like(y)

    def backward(mask):
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], channels, mask
        )

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    programs = {
        "forward": lambda _: torch.nn.functional.conv2d(x, weight, padding=pad, groups=channels),
        "inputs": lambda _: backward([True, False, False]),
        "weights": lambda _: backward([False, True, False]),
    }
    return {name: seconds(call, wait, small=args.small) for name, call in programs.items()}


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
            taken = _jax_seconds(future.result(), [operands], small=args.small)
            records.append({"stage": stage, "layout": layout, "share": share, "seconds": taken})
            _notice(str(records[-1]))
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
        if kind is Gathered:
            held = Gathered.from_mask(masked, visible, scale)
        else:
            held = Masked.from_mask(masked, scale)
        return jnp.square(merge(graph, params)(x, held).astype(jnp.float32)).mean()

    shape = (batch, visible * scale**2, dim) if kind is Gathered else (batch, grid * scale, grid * scale, dim)
    x = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)
    masked = random_mask(jax.random.split(jax.random.key(1), batch), (grid, grid), 1 - share)
    return jax.grad(loss, argnums=(0, 1)), (params, x, masked)


# steps


def steps(args: argparse.Namespace):
    """Times training steps: pretraining in every layout, and fine-tuning a classifier."""
    wanted = []
    for name in args.variants:
        for layout in LAYOUTS:
            wanted.append((name, "pretraining", layout, {"layout": layout, "platform": "gpu"}))
        wanted.append((name, "fine-tuning", "dense", {"num_classes": 1000, "drop_path": 0.1}))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        compiled = []
        for name, _, _, options in wanted:
            traced, shapes = _trace_step(name, *_size(name, args), **options)
            compiled.append((traced, shapes, pool.submit(_compile, traced)))
        concurrent.futures.wait(future for *_, future in compiled)
        records = []
        for (name, program, mode, _), (traced, shapes, future) in zip(wanted, compiled, strict=True):
            record = {"variant": name, "program": program, "mode": mode}
            records.append(record | _time_step(traced, shapes, *future.result(), small=args.small))
            _notice(str(records[-1]))
    # Only now, so that PyTorch's compilers do not disturb what is timed above.
    with Peers({name: _size(name, args) for name in args.peers if name in args.variants}) as peers:
        records += peers.measure(seconds, small=args.small)
    return records, _step_table(records)


def _trace_step(name: str, batch: int, size: int, **options):
    """Traces a train step with AdamW, from shapes alone; scans as `model.scan=auto` does."""
    family, make_loss = (
        ("convnextv2", _classification_loss) if "num_classes" in options else ("fcmae", pretraining_loss)
    )
    options |= {"dtype": jnp.bfloat16, "scan": jax.default_backend() == "cpu"}
    graph, params = split(
        nnx.eval_shape(lambda: create_model(f"{family}_{name}", rngs=nnx.Rngs(0), **options))
    )
    optimizer, step = train_step(graph, make_loss)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, images, keys), (params, state, images)


def _compile(traced) -> tuple:
    begin = time.perf_counter()
    return traced.lower().compile(), time.perf_counter() - begin


def _time_step(traced, shapes: tuple, compiled, compile_seconds: float, *, small: bool) -> dict:
    params, state, images = shapes
    random = np.random.default_rng(0)
    held = [
        {key: jnp.asarray(0.02 * random.standard_normal(p.shape, np.float32)) for key, p in params.items()},
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state),
    ]
    batch = images.shape[0]
    images = jax.random.normal(jax.random.key(1), images.shape)
    keys = jax.random.split(jax.random.key(2), batch)

    def call(_):
        *held[:], value = compiled(*held, images, keys)
        return value

    taken = seconds(call, jax.block_until_ready, small=small)
    flops, peak = matrix_flops(traced.jaxpr.jaxpr), PEAKS.get(jax.devices()[0].device_kind)
    return {
        "batch": batch,
        "seconds": taken,
        "compile": compile_seconds,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops": flops,
        "utilisation": flops / taken / peak if peak else None,
    }


def _classification_loss(graph) -> Callable:
    """Returns a function of parameters, images and keys: cross-entropy against labels drawn from the keys."""
    import optax

    def loss(params, images, keys):
        labels = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(keys)
        logits = merge(graph, params)(images, keys)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def _step_table(records: list[dict]) -> str:
    rows = []
    for r in records:
        peers = [
            p["seconds"] / r["seconds"]
            for mode in ("eager", "compile")
            for p in records
            if (p["variant"], p["program"], p["mode"]) == (r["variant"], r["program"], mode)
        ]
        ratios = [f"{ratio:.2f}x" for ratio in peers] if r["mode"] not in ("eager", "compile") else []
        rows.append(
            [
                f"{r['variant']}, {r['program']}, batch {r['batch']}",
                r["mode"],
                *(ratios + ["-"] * 2)[:2],
                f"{r['batch'] / r['seconds']:.0f}",
                f"{1e3 * r['seconds']:.1f}",
                f"{r['temp_bytes'] / 2**30:.2f}" if r.get("temp_bytes") else "-",
                f"{100 * r['utilisation']:.0f}%" if r.get("utilisation") else "-",
                f"{r['compile']:.0f}" if "compile" in r else "-",
            ]
        )
    header = ["224 px, bfloat16", "mode", "over eager", "over compile", "images/s", "ms", "temp GiB"]
    return markdown_table([*header, "of peak FLOP/s", "compile s"], rows)


SECTIONS = {
    "check": check,
    "rates": rates,
    "depthwise": depthwise_section,
    "stages": stages,
    "steps": steps,
}


if __name__ == "__main__":
    sys.exit(main())
