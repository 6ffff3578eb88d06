"""AdamW with layer decay, weight-decay mask and clipping, against torch.optim.AdamW with parameter groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnx2_jax.models import ConvNeXtV2, EncoderConfig
from cnx2_jax.models.state import merge, split
from cnx2_jax.tasks import defaults
from cnx2_jax.train.optimizer import learning_rate_schedule, make_optimizer

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("compile_quickly")

DEPTHS = (1, 2, 4, 1)
DECAY, CLIP, WEIGHT_DECAY = 0.7, 0.5, 0.3


def published_layer(name, kind):
    """The official `get_num_layer_for_convnext_single` and `..._group`, by what they compute."""
    parts = name.split(".")
    if parts[0] == "downsample_layers":
        stage = int(parts[1])
        if kind == "single":
            return 1 + sum(DEPTHS[:stage])
        return {0: 0, 1: 2, 2: 3, 3: 12}[stage]
    if parts[0] == "stages":
        stage, block = int(parts[1]), int(parts[2])
        if kind == "single":
            return 1 + sum(DEPTHS[:stage]) + block
        return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[stage]
    return sum(DEPTHS) + 1 if kind == "single" else 13


def groups(parameters, kind, rate):
    """One parameter group for each layer and for each of decayed or not, as the official code makes them."""
    last = (sum(DEPTHS) if kind == "single" else 12) + 1
    found = {}
    for name, parameter in parameters.items():
        plain = parameter.ndim == 1  # biases, norms, and GRN, which has more axes in their code
        key = (published_layer(name, kind), plain)
        group = found.setdefault(
            key,
            {
                "params": [],
                "lr": rate * DECAY ** (last - key[0]),
                "weight_decay": 0.0 if plain else WEIGHT_DECAY,
            },
        )
        group["params"].append(parameter)
    return list(found.values())


@pytest.fixture(scope="module")
def network(build):
    """The parameters of a network, and a function of parameters that returns their gradient."""
    model = build(ConvNeXtV2, EncoderConfig(DEPTHS, (8, 8, 16, 16), patch_size=2), num_classes=5)
    graph, params = split(model)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32, 32, 3)), jnp.float32)
    labels = jnp.arange(4)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = merge(graph, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    return params, gradient


@pytest.mark.parametrize("kind", ["single", "group"])
def test_steps_equal_torchs(kind, network):
    params, gradient = network
    config = defaults("classify").optimizer
    config.update(
        {"weight_decay": WEIGHT_DECAY, "clip_norm": CLIP, "layer_decay": DECAY, "layer_decay_type": kind}
    )
    config.update({"base_learning_rate": 1e-2, "b1": 0.9, "b2": 0.999})
    schedule = learning_rate_schedule(config, 512, 0, 10)
    transform = make_optimizer(config, schedule, params, "")
    update = jax.jit(transform.update)
    state = transform.init(params)

    twins = {name: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for name, leaf in params.items()}
    peer = torch.optim.AdamW(groups(twins, kind, 1.0), betas=(0.9, 0.999), eps=1e-8)
    scales = [group["lr"] for group in peer.param_groups]
    before = params
    for step in range(3):
        gradients = gradient(params)
        assert float(optax.tree.norm(gradients)) > CLIP  # it clips
        for group, scale in zip(peer.param_groups, scales, strict=True):
            group["lr"] = scale * float(schedule(step))
        for name, twin in twins.items():
            twin.grad = torch.tensor(np.asarray(gradients[name]))
        torch.nn.utils.clip_grad_norm_(twins.values(), CLIP)
        peer.step()
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, twin in twins.items():
            np.testing.assert_allclose(
                params[name], twin.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=(step, name)
            )
    # What is compared has moved by far more than the tolerance, even where it is decayed most.
    assert min(float(jnp.abs(params[name] - before[name]).max()) for name in params) > 2e-4
