"""FCMAE pretraining: its evaluation and the pictures it draws."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.configuration import override
from cnx2_jax.errors import UserError
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe.grid import GAP, HEADER
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, make_task
from cnx2_jax.tasks.pretrain import HIDDEN_GREY, reconstruct

HEIGHT, WIDTH, STRIDE = 32, 16, 8


pytestmark = pytest.mark.usefixtures("compile_quickly")


def pretrain(*arguments):
    config = defaults("pretrain")
    use_digits(config)
    config.image_size = (HEIGHT, WIDTH)
    config.model.depths = (1, 1, 1, 1)
    config.model.dims = (4, 4, 8, 8)
    config.model.decoder_dim = 8
    config.model.drop_path = 0.5  # which evaluation must leave out
    return make_task(override(config, [f"--config.{argument}" for argument in arguments]))


def random_model(task):
    graph, shapes = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(name, shape):
        inputs = 49 if len(shape) == 3 else math.prod(shape[:-1])
        scale = 1 / math.sqrt(inputs) if name.endswith("kernel") else 0.3
        return jnp.float32(scale * rng.standard_normal(shape) + name.endswith("scale"))

    return merge(graph, {name: draw(name, leaf.shape) for name, leaf in sorted(shapes.items())})


@functools.cache
def evaluated(batch_size, seed=0):
    task = pretrain(f"seed={seed}", f"batch_size={batch_size}")
    return task.evaluate(random_model(task), task.data.eval_batches())["loss"]


def test_evaluation_is_a_function_of_the_seed_and_the_images():
    task = pretrain("batch_size=90")
    model = random_model(task)
    first, second = (task.evaluate(model, task.data.eval_batches()) for _ in range(2))
    assert first == second
    assert first.keys() == {"loss"}
    assert evaluated(90) == first["loss"]  # nor of the task object
    # The masks do not depend on how images are batched: 90 divides 360, 96 does not.
    assert evaluated(96) == pytest.approx(first["loss"], rel=1e-6)
    assert evaluated(90, seed=1) != pytest.approx(first["loss"], rel=1e-4)


def cells(grid, rows, height, width):
    """Cuts a grid back into `[rows, columns, height, width, 3]`, the enlargement undone."""
    factor = -(-96 // min(height, width))
    tall, wide = factor * height + GAP, factor * width + GAP
    assert grid.shape == (HEADER + rows * tall, GAP + 4 * wide, 3)
    body = grid[HEADER:, GAP:].reshape(rows, tall, 4, wide, 3).swapaxes(1, 2)
    return body[:, :, : factor * height : factor, : factor * width : factor]


def hidden_pixels(masked):
    """Which pixels of the masked column are hidden, found patch by patch."""
    patches = masked.reshape(len(masked), HEIGHT // STRIDE, STRIDE, WIDTH // STRIDE, STRIDE, -1)
    hidden = (patches == HIDDEN_GREY).all(axis=(2, 4, 5))
    return hidden, hidden.repeat(STRIDE, axis=1).repeat(STRIDE, axis=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_of_reconstructions(channels):
    arguments = [] if channels == 1 else ["model.in_chans=3", "data.mean=(.4,.5,.6)", "data.std=(.1,.2,.3)"]
    task = pretrain(*arguments)
    images = np.random.default_rng(1).integers(0, 256, (5, HEIGHT, WIDTH, channels), np.uint8)
    model = random_model(task)
    grid = reconstruct(model, task.config, images)
    assert grid.dtype == np.uint8
    columns = cells(grid, 5, HEIGHT, WIDTH)
    original, masked, reconstruction, pasted = np.moveaxis(columns, 1, 0)

    np.testing.assert_array_equal(original, np.broadcast_to(images, original.shape))
    hidden, pixels = hidden_pixels(masked)
    assert (hidden.sum(axis=(1, 2)) == 8 - 3).all()  # int(8 * 0.4) stay visible
    assert len({row.tobytes() for row in hidden}) > 1  # a mask for each image
    np.testing.assert_array_equal(masked[~pixels], original[~pixels])
    np.testing.assert_array_equal(pasted[~pixels], original[~pixels])
    np.testing.assert_array_equal(pasted[pixels], reconstruction[pixels])
    assert (reconstruction != original).mean() > 0.5

    again, other = (reconstruct(model, task.config, images, seed) for seed in (None, 7))
    np.testing.assert_array_equal(grid, again)
    assert not np.array_equal(hidden, hidden_pixels(cells(other, 5, HEIGHT, WIDTH)[:, 1])[0])


def test_pictures_are_of_validation_images():
    task = pretrain()
    pictures = task.pictures(random_model(task))
    assert pictures.keys() == {"reconstructions"}
    original = cells(pictures["reconstructions"], 8, HEIGHT, WIDTH)[:, 0]
    expected = next(task.data.eval_batches())["image"][:8]
    np.testing.assert_array_equal(original, np.broadcast_to(expected, original.shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.mask_ratio=1"], "mask_ratio 1.0 leaves 0 of 8 patches visible"),
        (["model.mask_ratio=-0.1"], "mask_ratio -0.1"),
        (["model.mask_ratio=0.9"], "mask_ratio 0.9 leaves 0 of 8 patches visible"),
        (["model.mask_patch=32"], "image size 32x16 is not a multiple of the mask_patch 32"),
        (["image_size=8"], "leaves 0 of 1 patches visible"),
        (["model.mask_patch=4"], "mask_patch 4 is not a multiple of the stride 8"),
        (["model.layout=maskd"], "did you mean 'masked'"),
    ],
)
def test_what_the_model_would_refuse_is_refused_at_once(arguments, message):
    with pytest.raises(UserError) as raised:
        pretrain(*arguments)
    assert message in str(raised.value)


def test_pretraining_starts_fresh_and_names_no_classes():
    task = pretrain()
    params = {"a": np.zeros(1)}
    assert task.start(params) is params
    assert task.metadata()["class_names"] == []
