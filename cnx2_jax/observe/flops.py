"""How much arithmetic a program is, and the share of an accelerator's peak that a step reaches."""

import math
from typing import Any

from jax.extend import core
from jax.sharding import Mesh

# FLOP/s in bfloat16 of one device as JAX counts them, by its `device_kind`. TPUs: Google Cloud's architecture
# pages, per chip, halved for v2, v3 and 7x, whose chips are two devices. GPUs: NVIDIA's data sheets, dense.
PEAKS = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def matrix_flops(jaxpr: Any) -> int:
    """Counts the FLOPs of a traced program's matrix products and convolutions, over all devices.

    A multiply-add is two. Padding counts, the zeros that a stride puts between inputs do not. Loops count
    times their trips, `while` once. What rematerialisation computes again counts again. Of what is done
    differently on each platform, the form for GPUs counts: there convolutions are convolutions and moving
    is moving, while TPUs move pixels by products with one-hot matrices, which are no use by themselves.

    Args:
      jaxpr: such as `jax.jit(f).trace(*args).jaxpr`. Under `shard_map` shapes are of one device; it is over
        all axes of its mesh.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "cond":
            branches = params["branches"]
            if platforms := params.get("branches_platforms"):
                branches = [branches[_on_gpus(platforms)]]
            total += max(matrix_flops(branch.jaxpr) for branch in branches)
        else:
            inner = sum(matrix_flops(program) for program in _programs(params))
            if name == "scan":
                inner *= params["length"]
            elif name == "shard_map":
                inner *= params["mesh"].size
            total += inner
    return total


def _on_gpus(platforms: tuple) -> int:
    """Returns the number of the branch that CUDA takes: the one that names it, else that of all others."""
    named = [i for i, names in enumerate(platforms) if names and "cuda" in names]
    return named[0] if named else platforms.index(None)


def _programs(params: dict) -> list:
    """Returns the programs that an operation carries."""
    values = [each for value in params.values() for each in (value if isinstance(value, tuple) else (value,))]
    closed = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [value for value in closed if isinstance(value, core.Jaxpr)]


def peak(mesh: Mesh) -> float | None:
    """Returns the FLOP/s that all devices of a mesh could do, None where that is not known."""
    one = PEAKS.get(mesh.devices.flat[0].device_kind)
    return one * mesh.size if one else None


def _product(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _convolution(equation) -> int:
    params, kernel = equation.params, equation.invars[1].aval.shape
    # The kernel's axes: output channels, input channels of a group, then space.
    _, inputs, *space = params["dimension_numbers"].rhs_spec
    taps = kernel[inputs] * math.prod(kernel[axis] for axis in space)
    return 2 * math.prod(equation.outvars[0].aval.shape) * taps // math.prod(params["lhs_dilation"])
