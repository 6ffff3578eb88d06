"""Counts the FLOPs of a traced program, and lists the peak FLOP/s of accelerators."""

import math
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval
from jax.sharding import Mesh

# Peak FLOP/s in bfloat16 of one JAX device, by `device_kind`. TPUs: Google Cloud's architecture pages, per
# chip, halved for v2, v3 and 7x, whose chips have two devices. GPUs: NVIDIA's data sheets, without sparsity.
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
    """Returns the FLOPs of a traced program's matrix products and convolutions, summed over all devices.

    A multiply-add is two FLOPs. Padding counts; the zeros that a stride inserts between inputs do not. The
    body of a `scan` counts once per iteration, that of a `while` once. Rematerialised operations count again.
    Where platforms take different branches, the branch for GPUs counts: TPUs move pixels by products with
    one-hot matrices, which would count as useful work. What a `scan` computes and does not return does not
    count, as compilers drop it.

    Args:
      jaxpr: such as `jax.jit(f).trace(*args).jaxpr`. Inside `shard_map`, shapes are those of one device, and
        the count is multiplied by the size of the mesh.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += params["length"] * matrix_flops(_needed(params["jaxpr"].jaxpr))
        elif name == "cond":
            branches = params["branches"]
            if platforms := params.get("branches_platforms"):
                branches = [branches[_on_gpus(platforms)]]
            total += max(matrix_flops(branch.jaxpr) for branch in branches)
        else:
            inner = sum(matrix_flops(program) for program in _programs(params))
            total += inner * params["mesh"].size if name == "shard_map" else inner
    return total


def _needed(body: core.Jaxpr) -> core.Jaxpr:
    """Returns the body of a loop without what none of its results depends on."""
    return partial_eval.dce_jaxpr(body, [True] * len(body.outvars))[0]


def _on_gpus(platforms: tuple) -> int:
    """Returns the index of the branch that CUDA takes: the one that names it, else the default branch."""
    named = [i for i, names in enumerate(platforms) if names and "cuda" in names]
    return named[0] if named else platforms.index(None)


def _programs(params: dict) -> list:
    """Returns the jaxprs among the parameters of an operation."""
    values = [each for value in params.values() for each in (value if isinstance(value, tuple) else (value,))]
    closed = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [value for value in closed if isinstance(value, core.Jaxpr)]


def peak(mesh: Mesh) -> float | None:
    """Returns the peak FLOP/s of all devices of a mesh together, or None if it is unknown."""
    one = PEAKS.get(mesh.devices.flat[0].device_kind)
    return one * mesh.size if one else None


def _product(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _convolution(equation) -> int:
    params, kernel = equation.params, equation.invars[1].aval.shape
    # The kernel's axes: output channels, input channels per group, then spatial axes.
    _, inputs, *space = params["dimension_numbers"].rhs_spec
    taps = kernel[inputs] * math.prod(kernel[axis] for axis in space)
    return 2 * math.prod(equation.outvars[0].aval.shape) * taps // math.prod(params["lhs_dilation"])
