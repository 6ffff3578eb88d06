"""UperNet against Hugging Face's in PyTorch: the weights and running averages of theirs, through interop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.names import from_torch, to_torch
from cnx2_jax.interop.safetensors import run_huggingface, write
from cnx2_jax.models import EncoderConfig, UperNet
from cnx2_jax.models.resampling import resize
from cnx2_jax.models.state import merge, parameters, split, variables

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.usefixtures("compile_quickly"), pytest.mark.slow]

BOUND = 1e-5  # largest absolute difference over largest absolute value, in float32
IGNORED = 255
# A 1x1 convolution and BatchNorm follow these alone, which removes what they add: no gradient but rounding.
SHIFTS = ("backbone.norm0.bias", "backbone.norm1.bias")
SMALL = EncoderConfig((1, 1, 2, 1), (8, 16, 24, 32))


@pytest.fixture(scope="module")
def small(build, upernet_twin_of):
    """A narrow model with other options than the defaults, and its twin."""
    options = {"channels": 12, "auxiliary_channels": 20, "pool_scales": (1, 3, 4), "dropout": 0.0}
    model = build(UperNet, SMALL, num_classes=5, **options)
    return model, upernet_twin_of(model)


@functools.cache
def compiled():
    return jax.jit(lambda model, images: (*model(images), model.segment(images)))


@pytest.mark.parametrize("size", [(64, 64), (160, 96)])
def test_small(small, run_of_upernet, size, error):
    model, twin = small
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    found = compiled()(model, images)
    with torch.inference_mode():
        expected = run_of_upernet(twin, images)
        whole = twin(torch.tensor(images.transpose(0, 3, 1, 2))).logits.permute(0, 2, 3, 1)
    for ours, theirs in zip(found, [*expected, whole], strict=True):
        assert error(ours, theirs) < BOUND


def test_whole_network(upernet_reference, upernet_twin_of, run_of_upernet, error):
    """Atto and tiny at full width, square and not."""
    model, images = upernet_reference.model(), upernet_reference.images()
    with torch.inference_mode():
        expected = run_of_upernet(upernet_twin_of(model), images)
    for ours, theirs in zip(upernet_reference.outputs(), expected, strict=True):
        assert error(ours, theirs) < BOUND


def both_losses(logits, labels, size):
    """The loss of training: both heads' cross-entropy, averaged over all pixels, the ignored ones as zero."""
    total = 0.0
    for scores, weight in zip(logits, (1.0, 0.4), strict=True):
        likelihoods = jax.nn.log_softmax(resize(scores, size))
        chosen = jnp.take_along_axis(likelihoods, jnp.where(labels == IGNORED, 0, labels)[..., None], axis=-1)
        total -= weight * jnp.where(labels == IGNORED, 0, chosen[..., 0]).mean()
    return total


def test_one_step_of_training(small, run_of_upernet, error):
    """Loss, every gradient, and the running averages afterwards."""
    model, twin = small
    rng = np.random.default_rng(1)
    images = rng.standard_normal((3, 64, 96, 3)).astype(np.float32)
    labels = rng.integers(0, 6, (3, 64, 96))
    labels[labels == 5] = IGNORED
    graph, arrays = split(model)

    def scalar(params, others):
        model = merge(graph, {**others, **params})
        return both_losses(model(jnp.asarray(images), train=True), labels, (64, 96)), variables(model)

    step = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    (loss, averages), gradients = step(parameters(model), variables(model))

    twin.train()
    total = 0
    for scores, weight in zip(run_of_upernet(twin, images), (1.0, 0.4), strict=True):
        scores = torch.nn.functional.interpolate(scores.permute(0, 3, 1, 2), size=(64, 96), mode="bilinear")
        losses = torch.nn.functional.cross_entropy(
            scores, torch.tensor(labels), ignore_index=IGNORED, reduction="none"
        )
        total = total + weight * losses.mean()
    total.backward()
    assert error(loss, total.item()) < BOUND
    state = {name: value.detach().numpy() for name, value in twin.state_dict().items()}
    expected = from_torch(state, "twin").params
    assert averages.keys() == {name for name in arrays if name.endswith((".mean", ".var"))}
    for name, value in averages.items():
        assert error(value, expected[name]) < BOUND, name
    state |= {name: value.grad.numpy() for name, value in twin.named_parameters()}
    twin.eval()
    expected = from_torch(state, "twin").params
    for name, gradient in gradients.items():
        if name in SHIFTS:
            assert max(np.abs(gradient).max(), np.abs(expected[name]).max()) < 1e-7, name
        else:
            assert error(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize("size", [(64, 64), (160, 96)])
def test_transformers_runs_what_is_written(tmp_path, small, error, size):
    """The written folder has the class names, the pool scales and the running averages."""
    import transformers

    model, _ = small
    facts = Facts(tuple("abcde"), size, 0.875, (0.5,) * 3, (0.2,) * 3)
    arrays = {name: np.asarray(value) for name, value in split(model)[1].items()}
    write(tmp_path / "model", arrays, facts, "huggingface", model.pool_scales)
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    assert error(run_huggingface(tmp_path / "model", images), compiled()(model, images)[-1]) < BOUND
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.id2label == dict(enumerate("abcde")) and config.loss_ignore_index == IGNORED
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert processor(np.zeros((50, 70, 3), np.uint8), return_tensors="np")["pixel_values"].shape[2:] == size


def test_names_and_shapes_are_those_of_transformers(build, upernet_twin_of):
    """Every name and shape, the count of batches too, there and back bit for bit; nothing is computed."""
    config = dataclasses.replace(SMALL, patch_size=1, in_chans=5)
    model = build(UperNet, config, num_classes=7, channels=8, auxiliary_channels=4)
    arrays = {name: np.asarray(value) for name, value in split(model)[1].items()}
    theirs = upernet_twin_of(model).state_dict()
    tensors = to_torch(arrays, "huggingface")
    assert {name: value.shape for name, value in tensors.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    assert all(str(value.dtype) == str(theirs[name].dtype)[6:] for name, value in tensors.items())
