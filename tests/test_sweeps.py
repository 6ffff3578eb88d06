"""Sweeps: product and random search, and every override of every config's sweeps."""

import runpy
from pathlib import Path

import pytest

from cnx2_jax.configuration import load_config
from cnx2_jax.errors import UserError
from cnx2_jax.sweeps import arguments, choice, log_uniform, product, random, uniform

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
SWEEPS = {
    f"{path.name}:{name}": (path, function)
    for path in CONFIGS
    for name, function in runpy.run_path(str(path)).items()
    if name.startswith("sweep_")
}
AXES = {"optimizer.base_learning_rate": log_uniform(1e-4, 1e-1), "mixup": choice(0.0, 0.8)}


def test_product_is_every_combination():
    found = product(**{"optimizer.layer_decay": (0.7, 0.8), "batch_size": (16, 32)})
    assert [tuple(overrides.values()) for overrides in found] == [(0.7, 16), (0.7, 32), (0.8, 16), (0.8, 32)]
    assert all(list(overrides) == ["optimizer.layer_decay", "batch_size"] for overrides in found)


def test_random_is_the_same_again_longer_and_with_other_keys():
    found = random(20, 7, **AXES)
    assert found == random(20, 7, **AXES)
    assert random(30, 7, **AXES)[:20] == found
    more = random(20, 7, **{"model.drop_path": uniform(0, 1)}, **AXES)
    assert [{key: overrides[key] for key in AXES} for overrides in more] == found
    assert random(20, 8, **AXES) != found
    assert {overrides["mixup"] for overrides in found} == {0.0, 0.8}


def test_log_uniform_spreads_over_factors():
    drawn = [overrides["optimizer.base_learning_rate"] for overrides in random(300, 0, **AXES)]
    assert min(drawn) >= 1e-4 and max(drawn) <= 1e-1
    for decade in (1e-4, 1e-3, 1e-2):  # a third each; 4 standard deviations are 33
        assert 67 <= sum(decade <= value < 10 * decade for value in drawn) <= 133
    drawn = [
        overrides["model.drop_path"] for overrides in random(300, 0, **{"model.drop_path": uniform(0, 4)})
    ]
    assert 1.7 < sum(drawn) / 300 < 2.3 and 0 <= min(drawn) < 0.2 and 3.8 < max(drawn) <= 4


@pytest.mark.parametrize(
    "make", [lambda: random(0, 0, **AXES), lambda: log_uniform(0, 1), lambda: log_uniform(2, 1)]
)
def test_wrong_sweeps(make):
    with pytest.raises(UserError):
        make()


def test_every_config_has_a_sweep():
    assert {place.partition(":")[0] for place in SWEEPS} == {path.name for path in CONFIGS}


@pytest.mark.parametrize("place", SWEEPS)
def test_every_override_of_every_sweep_names_a_real_key(place):
    path, sweep = SWEEPS[place]
    assert sweep.__doc__
    found = sweep()
    assert len({str(overrides) for overrides in found}) == len(found) > 1
    for overrides in found:
        config = load_config(str(path), arguments(overrides))
        for key, value in overrides.items():
            group = config
            for part in key.split("."):
                group = group[part]
            assert group == value
