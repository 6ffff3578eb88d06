"""BatchNorm against torch.nn.BatchNorm2d."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.models.layers import BatchNorm

torch = pytest.importorskip("torch")


def channels_first(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.4, "epsilon": 1e-2}], ids=["defaults", "others"])
def test_two_steps_and_an_evaluation(options, random_params, error):
    """Output, gradients in input and parameters, and running averages."""
    layer = random_params(BatchNorm(5, dtype=jnp.float32, **options), 0)
    peer = torch.nn.BatchNorm2d(5, momentum=options.get("momentum", 0.1), eps=options.get("epsilon", 1e-5))
    peer.weight.data = torch.tensor(np.asarray(layer.scale[...]))
    peer.bias.data = torch.tensor(np.asarray(layer.bias[...]))
    graph, params, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(1)

    @jax.jit
    def step(params, statistics, x, weights):
        def scalar(params, x):
            model = nnx.merge(graph, params, statistics, copy=True)
            y = model(x, train=True)
            return (weights * y).sum(), (y, nnx.state(model, nnx.BatchStat))

        gradients, results = jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x)
        return *gradients, *results

    for _ in range(2):
        x = jnp.asarray(2 + 3 * rng.standard_normal((2, 3, 4, 5)), jnp.float32)
        weights = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
        to_params, to_x, y, statistics = step(params, statistics, x, weights)
        theirs = channels_first(x).requires_grad_()
        peer.zero_grad()
        expected = peer(theirs)
        (channels_first(weights) * expected).sum().backward()
        assert error(y, expected.detach().numpy().transpose(0, 2, 3, 1)) < 1e-5
        assert error(to_x, theirs.grad.numpy().transpose(0, 2, 3, 1)) < 1e-4
        assert error(to_params["scale"][...], peer.weight.grad.numpy()) < 1e-5
        assert error(to_params["bias"][...], peer.bias.grad.numpy()) < 1e-5
        assert error(statistics["mean"][...], peer.running_mean.numpy()) < 1e-6
        assert error(statistics["var"][...], peer.running_var.numpy()) < 1e-6

    model = nnx.merge(graph, params, statistics, copy=True)
    found, expected = model(x, train=False), peer.eval()(channels_first(x)).detach().numpy()
    assert error(found, expected.transpose(0, 2, 3, 1)) < 1e-5
    np.testing.assert_array_equal(model.mean[...], statistics["mean"][...])  # evaluation changes nothing


def test_both_refuse_one_value_per_channel():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchNorm(3, dtype=jnp.float32)(jnp.zeros((1, 1, 1, 3)), train=True)
