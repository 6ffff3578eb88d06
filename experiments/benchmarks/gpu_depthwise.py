"""Forms of the depthwise convolution on a GPU: their errors and their times, beside PyTorch's."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnx2_jax.kernels import depthwise
from cnx2_jax.models import VARIANTS
from cnx2_jax.models.fcmae import visible_count
from cnx2_jax.observe.tables import markdown_table
from experiments.benchmarks.gpu_timing import jax_seconds, notice, seconds


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


def measure_depthwise(*, small: bool) -> tuple[list[dict], str]:
    """Times the forms at the shapes of base's stages: whole maps, and windows with their borders."""
    batch = 2 if small else 64
    dims, cells = VARIANTS["base"].dims, visible_count(49, 0.6)
    shapes = [
        ("stage 1", (batch, 56, 56, dims[0]), True),
        ("stage 2", (batch, 28, 28, dims[1]), True),
        ("stage 3", (batch, 14, 14, dims[2]), True),
        ("stage 4", (batch, 7, 7, dims[3]), True),
        ("stage 1, windows", (batch * cells, 14, 14, dims[0]), False),
        ("stage 2, windows", (batch * cells, 10, 10, dims[1]), False),
    ]
    if small:
        shapes = [("stage 4", (1, 7, 7, 16), True), ("stage 2, windows", (1, 10, 10, 16), False)]
    records: list[dict] = []
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
            record: dict[str, Any] = {"where": name, "form": form, "shape": shape, "bytes": int(floor)}
            for what, function, operands in (
                ("forward", forward, [(x, kernel) for x in xs]),
                ("weights", backward, list(zip(xs, gradients, strict=True))),
            ):
                begin = time.perf_counter()
                jitted = jax.jit(lambda x, other, f=function, pads=pads: f(x, other, pads))
                jax.block_until_ready(jitted(*operands[0]))
                record[f"{what} compile"] = time.perf_counter() - begin
                record[what] = jax_seconds(jitted, operands, small=small)
            records.append(record)
            notice(f"{name} {form}: {1e3 * record['forward']:.3f} {1e3 * record['weights']:.3f} ms")
        records.append(
            {"where": name, "form": "torch", "shape": shape, **_torch_depthwise(shape, same, small=small)}
        )
    rows = []
    for name, shape, _ in shapes:
        found = {r["form"]: r for r in records if r["where"] == name}
        for what in ("forward", "weights"):
            values = [f"{1e3 * found[f][what]:.3f}" if what in found[f] else "-" for f in found]
            rows.append([f"{name} {what}", "x".join(map(str, shape)), *values])
    return records, markdown_table(["bfloat16, ms", "shape", *FORMS, "PyTorch"], rows)


def _torch_depthwise(shape: tuple, same: bool, *, small: bool) -> dict:
    """Times PyTorch's convolution, channels-last; its gradient of map and weights alone, each."""
    try:
        import torch
    except ImportError:
        return {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    batch, height, width, channels = shape
    x = torch.randn(batch, channels, height, width, device=device, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, 7, 7, device=device, dtype=torch.bfloat16)
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
    return {name: seconds(call, wait, small=small) for name, call in programs.items()}


def check_form(form: str, shape: tuple, dtype) -> dict:
    """Returns the relative errors of a form against float32 on the CPU."""
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
