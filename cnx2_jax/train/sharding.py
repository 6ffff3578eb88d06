"""The device mesh, and how parameters and batches are sharded over it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError
from cnx2_jax.models.state import Params
from cnx2_jax.types import HOST

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)  # a batch is sharded over both axes

# The first match wins. An axis that the devices do not divide is passed over for the one before it.
PARTITION_RULES = (
    (r"\.kernel$", -1),  # over fsdp: the output channels, or else the input channels
    (r"", None),  # biases, norms and the like are small: replicated
)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `config.data` x `config.fsdp` devices; -1 takes the devices that are left.

    Several TPU slices, which JAX's devices tell apart, follow each other along `data`: only gradients cross
    the slower network between them, once per update.

    Args:
      config: the config's `mesh`.
      devices: the devices to use; all of the default backend by default.

    Raises:
      UserError: the product is not the number of devices, `data` does not divide over the slices, or a TPU's
        torus cannot be divided that way.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = [config.data, config.fsdp]
    if shape.count(-1) == 1:
        rest = int(np.prod([n for n in shape if n != -1]))
        shape[shape.index(-1)] = count // rest if rest > 0 else 0
    if min(shape) < 1 or int(np.prod(shape)) != count:
        raise UserError(
            f"mesh data={config.data}, fsdp={config.fsdp} does not fit {count} device(s); "
            "their product must be the number of devices (-1 takes what is left)"
        )
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    if shape[0] % len(slices):
        raise UserError(
            f"mesh data={shape[0]}, fsdp={shape[1]}: data must be a multiple of the {len(slices)} slices, "
            "because parameters are not sharded across the network between them"
        )
    kinds = (jax.sharding.AxisType.Auto,) * 2
    in_slice = (shape[0] // len(slices), shape[1])
    try:
        parts = [
            jax.make_mesh(in_slice, AXES, axis_types=kinds, devices=slices[index]) for index in sorted(slices)
        ]
    except NotImplementedError:
        raise UserError(
            f"mesh data={shape[0]}, fsdp={shape[1]} cannot be laid over this TPU slice; each must be a "
            "product of sides of the slice"
        ) from None
    return Mesh(np.concatenate([part.devices for part in parts]), AXES, axis_types=kinds)


def slice_of(device: jax.Device) -> int:
    """Returns the index of a device's TPU slice; 0 if there is only one, or none."""
    return getattr(device, "slice_index", 0)


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raises UserError unless the global batch divides over devices and accumulation steps."""
    parts = mesh.size * accumulation_steps
    if accumulation_steps < 1 or batch_size < 1 or batch_size % parts:
        raise UserError(
            f"batch_size {batch_size} does not divide over {mesh.size} device(s) x "
            f"{accumulation_steps} accumulation step(s); use a multiple of {max(parts, 1)}"
        )


def param_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the parameter of this dotted name, by `PARTITION_RULES`."""
    axis = next(axis for pattern, axis in PARTITION_RULES if re.search(pattern, name))
    spec: list[str | None] = [None] * len(shape)
    places = [] if axis is None else range(len(shape) + axis, -1, -1)
    for place in places:
        if shape[place] % mesh.shape["fsdp"] == 0:
            spec[place] = "fsdp"
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def state_sharding(state, mesh: Mesh):
    """Returns the shardings of a TrainState of arrays or shapes.

    Arrays under a parameter's name, such as the optimizer's moments, are sharded as the parameter.
    """

    def place(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return param_sharding(names[-1] if names else "", leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def put_params(params: Mapping[str, ArrayLike], mesh: Mesh) -> Params:
    """Replicates parameters on the mesh; each process must hold all of them."""
    # From the host: arrays on one process's device cannot be put on a mesh of several processes.
    host = {name: np.asarray(leaf) for name, leaf in params.items()}
    return jax.device_put(host, NamedSharding(mesh, PartitionSpec()))


def replicated(params: Params, mesh: Mesh) -> Params:
    """Returns parameters replicated on every device; all processes must call it."""
    if mesh.shape["fsdp"] == 1:
        return params
    return jax.device_put(params, NamedSharding(mesh, PartitionSpec()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every array in a batch: split along its first axis."""
    return NamedSharding(mesh, BATCH)


def put_batches(
    batches: Iterable[Mapping[str, Any]], mesh: Mesh, *, keep_host: bool = False
) -> Iterator[dict[str, Any]]:
    """Moves this host's share of each batch to the devices, as parts of global arrays.

    Args:
      batches: NumPy arrays by name; those under `types.HOST` never go to a device.
      mesh: the devices.
      keep_host: whether batches keep `types.HOST` as it is, for metrics on the host; a jitted function
        does not take such batches.
    """
    sharding = batch_sharding(mesh)
    for batch in batches:
        arrays = {name: value for name, value in batch.items() if name != HOST}
        placed = {name: jax.make_array_from_process_local_data(sharding, x) for name, x in arrays.items()}
        yield {**placed, HOST: batch[HOST]} if keep_host and HOST in batch else placed
