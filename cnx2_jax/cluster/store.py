"""The key-value store that the processes of a run share; JAX's coordinator in process 0 serves it."""

from typing import Any

from jax._src import distributed  # it has no public name; Orbax reaches it like this too


def shared_store() -> Any:
    """Returns the store, None in a run of one process."""
    return distributed.global_state.client
