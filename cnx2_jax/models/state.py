"""The way between a module and its arrays by dotted name."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

Params = dict[str, Any]  # by official dotted name, such as `stages.2.5.dwconv.kernel`


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a module into its structure and all its arrays by dotted name."""
    graph, state = nnx.split(model)
    return graph, _flat(state)


def merge(graph: nnx.GraphDef, arrays: Mapping[str, Any]) -> Any:
    """Inverse of `split`: the module of that class, which shares the arrays.

    Each array gets the kind of variable (parameter, batch statistic) that the structure has in its place.
    """
    paths: dict = {
        tuple(int(p) if p.isdigit() else p for p in name.split(".")): arrays[name] for name in arrays
    }
    return nnx.merge(graph, nnx.from_flat_state(paths))


def parameters(model: nnx.Module) -> Params:
    """Returns the arrays that are `nnx.Param`, by dotted name: what an optimizer may change."""
    return _flat(nnx.state(model, nnx.Param))


def variables(model: nnx.Module) -> Params:
    """Returns all other arrays, such as batch statistics, by dotted name: what a forward pass may change."""
    return _flat(nnx.state(model, nnx.Not(nnx.Param)))


def _flat(state: Any) -> Params:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
