"""The way between a module and its parameters by dotted name."""

from typing import Any

import jax
from flax import nnx

Params = dict[str, jax.Array]  # by official dotted name, such as `stages.2.5.dwconv.kernel`


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a module into its structure and its parameters by dotted name."""
    graph, state = nnx.split(model)
    return graph, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graph: nnx.GraphDef, params: Params) -> Any:
    """Inverse of `split`: the module of that class, which shares the arrays."""
    paths = {tuple(int(p) if p.isdigit() else p for p in name.split(".")): name for name in params}
    variables: dict = {path: nnx.Param(params[name]) for path, name in paths.items()}
    state = nnx.from_flat_state(variables)
    return nnx.merge(graph, state)
