"""The way between a module and its named parameters, and what a state is as a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.models import create_model
from cnx2_jax.models.state import merge, split
from cnx2_jax.train.state import TrainState


def build(name):
    return create_model(name, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["convnextv2_atto", "fcmae_atto"])
def test_names_are_the_papers(name):
    _, params = split(nnx.eval_shape(lambda: build(name)))
    prefix = "encoder." if name.startswith("fcmae") else ""
    expected = {
        "downsample_layers.0.0.kernel",
        "downsample_layers.3.1.bias",
        "stages.2.5.dwconv.kernel",
        "stages.2.5.norm.scale",
        "stages.2.5.pwconv2.bias",
        "stages.2.5.grn.gamma",
    }
    own = {"head.kernel", "norm.scale"} if not prefix else {"mask_token", "proj.kernel", "decoder.0.grn.beta"}
    assert {prefix + path for path in expected} | own <= params.keys()
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}


def test_merge_undoes_split():
    graph, shapes = split(nnx.eval_shape(lambda: build("fcmae_atto")))
    rng = np.random.default_rng(0)
    params = {name: jnp.float32(rng.standard_normal(leaf.shape)) for name, leaf in shapes.items()}
    model = merge(graph, params)
    assert model.mask_token[...] is params["mask_token"]  # shared, not copied
    assert model.encoder.stages[2][5].grn.gamma[...] is params["encoder.stages.2.5.grn.gamma"]
    again, values = split(model)
    assert again == graph
    assert hash(again) == hash(graph)  # a static argument of jitted functions
    assert values.keys() == params.keys()
    assert all(values[name] is params[name] for name in params)


def test_split_of_a_module_made_under_jit():
    params = jax.jit(lambda: split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[1])()
    assert {name: value.shape for name, value in params.items()} == {"kernel": (2, 3), "bias": (3,)}


def test_train_state_is_a_pytree_with_named_leaves():
    state = TrainState(jnp.int32(3), {"a.kernel": jnp.ones(2)}, (jnp.zeros(1),))
    doubled = jax.tree.map(lambda x: 2 * x, state)
    assert (int(doubled.step), float(doubled.params["a.kernel"][0])) == (6, 2.0)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert paths == [".step", ".params['a.kernel']", ".opt_state[0]"]
