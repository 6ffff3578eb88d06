"""FCMAE's loss and gradient compiled for accelerators that this machine does not have."""

import dataclasses

from cnx2_jax.preflight import topologies  # before JAX: see there

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnx2_jax.models import create_model
from cnx2_jax.models.state import merge, split
from cnx2_jax.preflight.compiled import cycles_by_kind


def compile_gradient(
    variant: str, layout: str, devices: list, *, platform: str, batch: int, image_size: int = 224, **options
):
    """Compiles FCMAE's loss and gradient, with the batch sharded over the devices.

    Args:
      variant: such as `base`.
      layout: `masked`, `gathered` or `auto`.
      devices: to compile for.
      platform: for which `auto` chooses: `tpu` or `gpu`.
      batch: images per device.
      image_size: pixels along both sides.
      **options: other options of FCMAE, such as `dtype`, `remat` and `scan`.
    """

    def create():
        return create_model(f"fcmae_{variant}", rngs=nnx.Rngs(0), layout=layout, platform=platform, **options)

    graph, params = split(nnx.eval_shape(create))
    mesh = Mesh(np.array(devices), ("data",))
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    count = batch * len(devices)

    def place(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    params = {name: place(leaf, replicated) for name, leaf in params.items()}
    images = jax.ShapeDtypeStruct((count, image_size, image_size, 3), jnp.float32, sharding=sharded)
    keys = place(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)), sharded)

    def loss(params, images, keys):
        return merge(graph, params).loss(images, keys).mean()

    return (
        jax.jit(jax.value_and_grad(loss))
        .lower(params, images, keys)
        .compile(topologies.compiler_options(platform))
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiler's figures for a program, per device.

    Attributes:
      temp_bytes: memory besides arguments and results.
      flops, bytes_accessed: XLA's count, which takes a loop's body once; compile with `scan=False` to use
        them.
      cycles: estimated cycles by kind of operation (the last part of its name), loops times their trips. The
        TPU compiler's cost model knows no overlap and leaves some operations out, so use them only to compare
        two forms of one program.
    """

    temp_bytes: int
    flops: float
    bytes_accessed: float
    cycles: dict[str, int]


def report(compiled) -> Report:
    """Returns the figures of a compiled program."""
    costs = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    cycles = cycles_by_kind(compiled.as_text())
    return Report(
        memory.temp_size_in_bytes, costs.get("flops", 0.0), costs.get("bytes accessed", 0.0), cycles
    )
