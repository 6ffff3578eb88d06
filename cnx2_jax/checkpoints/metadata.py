"""What travels with the weights."""

from ml_collections import ConfigDict


def make_card(config: ConfigDict, class_names: tuple[str, ...]) -> dict:
    """Returns what travels with the weights, as JSON."""
    return {"format": "cnx2_jax 1", "class_names": list(class_names), "config": config.to_dict()}
