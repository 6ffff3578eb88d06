"""AdamW, its schedule, its decay mask and clipping, each against the formula written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnx2_jax.errors import UserError
from cnx2_jax.interop.dialects import renamer, their_layout
from cnx2_jax.models import FCMAE, ConvNeXtV2, MaskRCNN, create_model
from cnx2_jax.models.state import split
from cnx2_jax.tasks import defaults
from cnx2_jax.train.optimizer import (
    decay_mask,
    layers,
    learning_rate_scales,
    learning_rate_schedule,
    make_optimizer,
    trainable,
)


def settings(**values):
    config = defaults("pretrain").optimizer
    config.update(values)
    return config


@pytest.mark.parametrize("name", ["convnextv2_atto", "fcmae_atto"])
def test_only_kernels_decay(name):
    _, params = split(nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0))))
    mask = decay_mask(params)
    assert mask.keys() == params.keys()
    endings = {name.rsplit(".", 1)[-1] for name in params}
    decayed = {name.rsplit(".", 1)[-1] for name, decays in mask.items() if decays}
    assert decayed == {"kernel"}
    assert {name.rsplit(".", 1)[-1] for name, decays in mask.items() if not decays} == endings - {"kernel"}
    # By name, so that a parameter renamed out of the rule does not pass unseen.
    prefix = "encoder." if name.startswith("fcmae") else ""
    for layer, parameter, decays in [
        ("downsample_layers.0.0", "kernel", True),
        ("downsample_layers.0.1", "scale", False),
        ("downsample_layers.1.1", "bias", False),
        ("stages.2.5.dwconv", "kernel", True),
        ("stages.2.5.dwconv", "bias", False),
        ("stages.2.5.norm", "scale", False),
        ("stages.2.5.pwconv1", "kernel", True),
        ("stages.2.5.grn", "gamma", False),
        ("stages.2.5.grn", "beta", False),
    ]:
        assert mask[f"{prefix}{layer}.{parameter}"] is decays
    if prefix:
        assert mask["mask_token"] is False
        assert mask["pred.kernel"] is True
        assert mask["decoder.0.grn.gamma"] is False
    else:
        assert mask["head.kernel"] is True
        assert mask["norm.scale"] is False


def official_pretraining_decays(name, shape):
    """`add_weight_decay` of timm 0.3.2, which the official `main_pretrain.py` calls."""
    return not (len(shape) == 1 or name.endswith(".bias"))


def official_finetuning_decays(name, shape):
    """`get_parameter_groups` of the official `optim_factory.py`."""
    return official_pretraining_decays(name, shape) and not name.endswith((".gamma", ".beta"))


@pytest.mark.parametrize(
    ("model", "decay_grn", "official"),
    [
        ("fcmae_atto", True, official_pretraining_decays),
        ("convnextv2_atto", False, official_finetuning_decays),
    ],
)
def test_decay_is_that_of_the_official_code(model, decay_grn, official):
    """Which tensors decay, against the official rules applied to the official names and shapes."""
    shapes = {name: leaf.shape for name, leaf in shapes_of(model).items()}
    mask, rename = decay_mask(shapes, decay_grn), renamer("official")
    assert mask.keys() == shapes.keys()
    for name, shape in shapes.items():
        theirs = their_layout(name, np.broadcast_to(np.float32(0), shape), "official", False).shape
        assert mask[name] is official(rename(name), theirs), name


def test_grn_and_the_mask_token_decay_if_asked():
    names = ["a.kernel", "a.bias", "grn.gamma", "grn.beta", "norm.scale", "mask_token"]
    params = {name: jnp.ones(2) for name in names}
    zeros = jax.tree.map(jnp.zeros_like, params)
    cases = ((False, {"a.kernel"}), (True, {"a.kernel", "grn.gamma", "grn.beta", "mask_token"}))
    for decay_grn, decayed in cases:
        transform = make_optimizer(settings(decay_grn=decay_grn), lambda _: 0.1, params, None)
        updates, _ = transform.update(zeros, transform.init(params), params)
        assert {name for name, update in updates.items() if update.any()} == decayed


@pytest.mark.parametrize(("batch", "peak"), [(256, 1e-3), (64, 2.5e-4), (4096, 1.6e-2)])
def test_schedule_is_linear_warmup_then_half_a_cosine(batch, peak):
    schedule = learning_rate_schedule(
        settings(base_learning_rate=1e-3, min_learning_rate=1e-5), batch, warmup_steps=10, total_steps=110
    )

    def expected(step):
        if step < 10:
            return peak * step / 10
        return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * (step - 10) / 100)) / 2

    assert float(schedule(0)) == 0
    assert float(schedule(10)) == pytest.approx(peak, rel=1e-6)
    assert float(schedule(60)) == pytest.approx((peak + 1e-5) / 2, rel=1e-5)
    assert float(schedule(110)) == pytest.approx(1e-5, rel=1e-3)
    for step in (5, 9, 11, 35, 60, 85, 109):
        assert float(schedule(step)) == pytest.approx(expected(step), rel=1e-4), step


def test_schedule_without_warmup_starts_at_the_peak():
    schedule = learning_rate_schedule(settings(base_learning_rate=1e-3), 256, 0, 100)
    assert float(schedule(0)) == pytest.approx(1e-3)
    assert float(schedule(100)) == pytest.approx(0, abs=1e-9)


def test_schedule_shorter_than_its_warmup():
    schedule = learning_rate_schedule(settings(base_learning_rate=1e-3), 256, 50, 10)
    assert [float(schedule(s)) for s in (0, 5, 10)] == pytest.approx([0, 5e-4, 1e-3])


def test_poly_schedule_falls_linearly_from_the_start_of_the_warmup():
    """mmcv's `poly` of power 1 with a linear warm-up, as ConvNeXt's recipes for UperNet use it."""
    config = settings(base_learning_rate=1.6e-3, min_learning_rate=1e-6, schedule="poly")
    schedule = learning_rate_schedule(config, 16, warmup_steps=15, total_steps=1600)
    for step in (0, 1, 14, 15, 16, 800, 1599, 1600):
        decayed = (1e-4 - 1e-6) * (1 - step / 1600) + 1e-6
        expected = decayed * min(1, step / 15)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-4, abs=1e-12), step
    schedule = learning_rate_schedule(config, 16, warmup_steps=0, total_steps=1600)
    assert float(schedule(0)) == pytest.approx(1e-4)


def test_step_schedule_is_that_of_the_detectors():
    """mmengine's LinearLR from a thousandth over 10 steps, and MultiStepLR at 27 and 33 of 36 epochs."""
    config = settings(base_learning_rate=8e-4, schedule="step")
    schedule = jax.jit(learning_rate_schedule(config, 32, warmup_steps=10, total_steps=360))
    for step in (0, 1, 5, 8, 9, 10, 269, 270, 329, 330, 359, 360):
        drops = (step >= 270) + (step >= 330)
        expected = 1e-4 * min(1, 0.001 + 0.999 * step / 9) * 0.1**drops
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-4), step
    schedule = learning_rate_schedule(config, 32, warmup_steps=0, total_steps=360)
    assert float(schedule(0)) == pytest.approx(1e-4)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match=r"unknown optimizer\.schedule 'polly'; did you mean 'poly'"):
        learning_rate_schedule(settings(schedule="polly"), 256, 0, 100)


@pytest.mark.parametrize("rate", [0.0, -1e-3, math.nan])
def test_learning_rate_must_be_positive(rate):
    with pytest.raises(UserError, match="base_learning_rate"):
        learning_rate_schedule(settings(base_learning_rate=rate), 256, 0, 100)


def literal_adamw(params, gradients, rates, *, b1, b2, decay, clip):
    """AdamW with decoupled decay on kernels, clipping of the whole gradient, in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in gradient.values()))
        factor = min(1, clip / norm) if clip else 1
        for name in params:
            g = gradient[name] * factor
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g * g
            direction = first[name] / (1 - b1**step) / (np.sqrt(second[name] / (1 - b2**step)) + 1e-8)
            if name.endswith("kernel"):
                direction = direction + decay * params[name]
            params[name] = params[name] - rate * direction
    return params


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_updates_equal_adamw_written_out(clip):
    rng = np.random.default_rng(0)
    shapes = {"a.kernel": (3, 4), "a.bias": (4,), "grn.gamma": (4,), "mask_token": (5,)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    # Norms from far below to far above the clipping norm.
    gradients = [
        {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
        for scale in (0.01, 10.0, 0.3, 3.0)
    ]
    config = settings(base_learning_rate=0.1, b1=0.8, b2=0.95, weight_decay=0.3, clip_norm=clip)
    schedule = learning_rate_schedule(config, 256, 2, 8)
    transform = make_optimizer(config, schedule, shapes, None)

    @jax.jit
    def step(params, state, gradient):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    ours = {name: jnp.asarray(value) for name, value in params.items()}
    state = transform.init(ours)
    for gradient in gradients:
        ours, state = step(ours, state, gradient)

    rates = [float(schedule(s)) for s in range(4)]
    expected = literal_adamw(params, gradients, rates, b1=0.8, b2=0.95, decay=0.3, clip=clip)
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], rtol=2e-5, atol=1e-6)
    # The expected value would notice if clipping or decay did nothing.
    other = literal_adamw(params, gradients, rates, b1=0.8, b2=0.95, decay=0.3, clip=1.0 - clip)
    assert np.abs(other["a.bias"] - expected["a.bias"]).max() > 1e-3
    other = literal_adamw(params, gradients, rates, b1=0.8, b2=0.95, decay=0.0, clip=clip)
    assert np.abs(other["a.kernel"] - expected["a.kernel"]).max() > 1e-3


def shapes_of(name):
    return split(nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0))))[1]


# Of the published rules (official `optim_factory.py`), written down by hand.
ATTO_SINGLE = {
    "downsample_layers.0.0.kernel": 1,
    "downsample_layers.0.1.scale": 1,
    "stages.0.0.dwconv.kernel": 1,
    "stages.0.1.norm.bias": 2,
    "downsample_layers.1.1.kernel": 3,
    "stages.1.0.grn.gamma": 3,
    "stages.1.1.grn.beta": 4,
    "downsample_layers.2.0.scale": 5,
    "stages.2.0.pwconv1.kernel": 5,
    "stages.2.5.pwconv2.bias": 10,
    "downsample_layers.3.1.bias": 11,
    "stages.3.0.dwconv.bias": 11,
    "stages.3.1.dwconv.bias": 12,
    "norm.scale": 13,
    "head.kernel": 13,
}
BASE_GROUP = {
    "downsample_layers.0.0.kernel": 0,
    "stages.0.0.dwconv.kernel": 1,
    "stages.0.2.dwconv.kernel": 1,
    "downsample_layers.1.0.scale": 2,
    "stages.1.0.norm.scale": 2,
    "downsample_layers.2.1.kernel": 3,
    "stages.2.0.grn.gamma": 3,
    "stages.2.2.grn.gamma": 3,
    "stages.2.3.grn.gamma": 4,
    "stages.2.13.grn.gamma": 7,
    "stages.2.26.grn.gamma": 11,
    "downsample_layers.3.0.bias": 12,
    "stages.3.0.pwconv1.kernel": 12,
    "stages.3.2.pwconv1.kernel": 12,
    "norm.bias": 13,
    "head.bias": 13,
}


@pytest.mark.parametrize(
    ("variant", "kind", "expected"), [("atto", "single", ATTO_SINGLE), ("base", "group", BASE_GROUP)]
)
def test_layers_are_those_of_the_published_rules(variant, kind, expected):
    names = shapes_of(f"convnextv2_{variant}")
    numbers, after = layers(names, kind, "")
    assert numbers.keys() == names.keys()
    assert {name: numbers[name] for name in expected} == expected
    assert set(numbers.values()) == set(range(1 if kind == "single" else 0, after + 1))
    scales = learning_rate_scales(names, 0.9, kind, "")
    for name, number in expected.items():
        assert scales[name] == pytest.approx(0.9 ** (13 - number))
    assert scales["head.kernel"] == 1


# `get_num_layer_layer_wise` of ConvNeXt's object_detection, with `num_layers` 6 for tiny and 12 for base.
TINY_LAYER_WISE = {
    "downsample_layers.0.0.kernel": 0,
    "downsample_layers.0.1.scale": 0,
    "stages.0.0.dwconv.kernel": 1,
    "stages.0.2.grn.gamma": 1,
    "downsample_layers.1.0.scale": 2,
    "stages.1.2.norm.scale": 2,
    "downsample_layers.2.1.kernel": 3,
    "stages.2.0.grn.gamma": 3,
    "stages.2.2.grn.gamma": 3,
    "stages.2.3.grn.gamma": 4,
    "stages.2.8.pwconv2.bias": 5,
    "downsample_layers.3.0.bias": 6,
    "stages.3.0.pwconv1.kernel": 6,
    "stages.3.2.pwconv1.kernel": 6,
    "norm0.scale": 7,
}
BASE_LAYER_WISE = {
    "downsample_layers.0.0.kernel": 0,
    "stages.0.2.dwconv.kernel": 1,
    "downsample_layers.1.0.scale": 2,
    "stages.1.0.norm.scale": 2,
    "downsample_layers.2.1.kernel": 3,
    "stages.2.2.grn.gamma": 3,
    "stages.2.3.grn.gamma": 4,
    "stages.2.13.grn.gamma": 7,
    "stages.2.26.grn.gamma": 11,
    "downsample_layers.3.0.bias": 12,
    "stages.3.2.pwconv1.kernel": 12,
    "norm3.bias": 13,
}


@pytest.mark.parametrize(("variant", "expected"), [("tiny", TINY_LAYER_WISE), ("base", BASE_LAYER_WISE)])
def test_layers_of_a_detector_are_those_of_the_published_rule(variant, expected):
    names = split(
        nnx.eval_shape(lambda: create_model(f"mask_rcnn_{variant}", num_classes=3, rngs=nnx.Rngs(0)))
    )[1]
    numbers, after = layers(names, "layer_wise", MaskRCNN.encoder_prefix)
    assert {name: numbers[f"backbone.{name}"] for name in expected} == expected
    heads = {number for name, number in numbers.items() if not name.startswith("backbone.")}
    assert heads == {after} == {7 if variant == "tiny" else 13}
    scales = learning_rate_scales(names, 0.95, "layer_wise", MaskRCNN.encoder_prefix)
    for name, number in expected.items():
        assert scales[f"backbone.{name}"] == pytest.approx(0.95 ** (after - number))


@pytest.mark.parametrize(("variant", "last"), [("atto", 6), ("tiny", 6), ("small", 12), ("huge", 12)])
def test_stages_as_layers_are_those_of_the_published_rule(variant, last):
    """ConvNeXt's `get_num_layer_stage_wise`, with `num_layers` 6 for tiny and 12 for the deeper ones."""
    names = shapes_of(f"convnextv2_{variant}")
    scales = learning_rate_scales(names, 0.9, "stage", "")
    for name, scale in scales.items():
        folder, stage, *_ = name.split(".")
        number = {"downsample_layers": "0", "stages": stage}.get(folder)
        number = last + 1 if number is None else int(number) + (folder == "stages")
        assert scale == pytest.approx(0.9 ** (last + 1 - number)), name
    assert {scales[name] for name in ("norm.scale", "head.kernel")} == {1}


@pytest.mark.parametrize("kind", ["single", "group", "layer_wise", "stage"])
def test_an_encoder_in_a_larger_model_has_the_same_layers(kind):
    numbers, after = layers(shapes_of("fcmae_atto"), kind, FCMAE.encoder_prefix)
    alone, _ = layers(shapes_of("convnextv2_atto"), kind, ConvNeXtV2.encoder_prefix)
    for name, number in alone.items():
        if not name.startswith(("norm.", "head.")):
            assert numbers[f"encoder.{name}"] == number
    assert {numbers[name] for name in ("mask_token", "pred.kernel", "decoder.0.grn.gamma")} == {after}


def test_any_declared_prefix_has_the_same_layers():
    """Names elsewhere come after the encoder, even if they look like an encoder's."""
    alone, after = layers(shapes_of("convnextv2_atto"), "single", "")
    renamed = {f"backbone.{name}": number for name, number in alone.items()}
    others = ["decode_head.stages.0.0.norm.bias", "stages.3.7.norm.bias", "backbone.norm0.scale"]
    numbers, found_after = layers([*renamed, *others], "single", "backbone.")
    assert found_after == after
    assert numbers == renamed | dict.fromkeys(others, after)


@pytest.mark.parametrize(
    ("model", "prefix"),
    [("fcmae_atto", ""), ("convnextv2_atto", "encoder."), ("fcmae_atto", "encoder"), ("fcmae_atto", "back.")],
)
def test_an_encoder_that_is_not_under_its_prefix_is_an_error(model, prefix):
    with pytest.raises(ValueError, match=f"declares its encoder under '{prefix}'"):
        layers(shapes_of(model), "single", prefix)
    config = settings(layer_decay=0.9)
    with pytest.raises(ValueError, match=f"declares its encoder under '{prefix}'"):
        make_optimizer(config, lambda _: 0.1, shapes_of(model), prefix)


def test_half_an_encoder_is_an_error():
    with pytest.raises(ValueError, match="declares its encoder"):
        layers(["downsample_layers.0.0.kernel", "head.kernel"], "single", "")
    with pytest.raises(ValueError, match="declares its encoder"):
        layers(["stages.0.0.dwconv.kernel", "head.kernel"], "single", "")


def test_a_model_without_an_encoder_trains_without_layer_decay():
    params = {"head.kernel": jnp.ones((2, 3)), "head.bias": jnp.ones(3)}
    transform = make_optimizer(settings(), lambda _: 0.1, params, None)
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates.keys() == params.keys()
    with pytest.raises(UserError, match=r"layer_decay 0\.9 needs an encoder.*layer_decay=1"):
        make_optimizer(settings(layer_decay=0.9), lambda _: 0.1, params, None)


def test_wrong_kinds_of_layers():
    with pytest.raises(UserError, match="'groups'; did you mean 'group'"):
        layers(["head.kernel"], "groups", "")
    with pytest.raises(UserError, match="'groups'; did you mean 'group'"):
        make_optimizer(settings(layer_decay_type="groups"), lambda _: 0.1, ["head.kernel"], None)
    blocks = [f"stages.2.{block}.norm.bias" for block in range(30)]
    with pytest.raises(UserError, match="at most 27 blocks in stage 3, not 30"):
        layers(["downsample_layers.0.0.kernel", *blocks], "group", "")


def test_layer_decay_scales_whole_updates():
    names = ["downsample_layers.0.0.kernel", "stages.0.0.dwconv.kernel", "head.kernel", "head.bias"]
    rng = np.random.default_rng(0)
    params, gradient = (
        {name: jnp.asarray(rng.standard_normal(3), jnp.float32) for name in names} for _ in range(2)
    )

    def update(decay):
        config = settings(weight_decay=0.5, layer_decay=decay)
        transform = make_optimizer(config, lambda _: 0.1, params, "")
        return transform.update(gradient, transform.init(params), params)[0]

    plain, scaled = update(1.0), update(0.5)
    # One block: the stem and it are layer 1, everything after them 2.
    factors = dict(zip(names, (0.5, 0.5, 1, 1), strict=True))
    for name in names:
        np.testing.assert_allclose(scaled[name], factors[name] * plain[name], rtol=1e-6)


def test_trainable_parameters_are_found_by_name():
    params = dict.fromkeys(["stages.0.0.norm.bias", "norm.bias", "head.kernel", "head.bias"], 0)
    assert trainable(params, "") == params
    assert list(trainable(params, r"^head\.")) == ["head.kernel", "head.bias"]
    assert list(trainable(params, r"norm")) == ["stages.0.0.norm.bias", "norm.bias"]
    with pytest.raises(UserError, match="'haed' is found in no parameter's name"):
        trainable(params, "haed")
    with pytest.raises(UserError, match=r"'\(' is not a valid regular expression"):
        trainable(params, "(")
