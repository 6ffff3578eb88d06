"""The key-value store that the processes of a run share. JAX's coordinator in process 0 serves it."""

from typing import Any

from jax._src import distributed  # JAX has no public access to the store; Orbax uses the same import


def shared_store() -> Any:
    """Returns the store, or None in a run of one process."""
    return distributed.global_state.client
