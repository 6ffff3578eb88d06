"""The whole model: names, options, independence of canvas and batch; tests/parity has PyTorch's results."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.errors import UserError
from cnx2_jax.models import VARIANTS, EncoderConfig, MaskRCNN, create_model
from cnx2_jax.models.mask_rcnn import Truth
from cnx2_jax.models.mask_rcnn.fpn import FPN
from cnx2_jax.models.mask_rcnn.heads import RoIHead
from cnx2_jax.models.mask_rcnn.layers import Upsample
from cnx2_jax.models.mask_rcnn.rpn import RPNHead
from cnx2_jax.models.state import merge, split

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = EncoderConfig((1, 1, 1, 1), (4, 6, 8, 10), drop_path=0.1)
OPTIONS = {
    "num_classes": 3,
    "channels": 8,
    "fc_channels": 12,
    "detections": 8,
    "train_candidates": 30,
    "train_proposals": 40,
    "candidates": 30,
    "proposals": 20,
    "rpn_samples": 300,
    "roi_samples": 16,
}
SIZE = (40, 50)

# Our names and shapes beside the encoder's, with the defaults and 80 classes; channels come last.
EXPECTED = {
    **{f"neck.lateral_convs.{i}.conv": (1, 1, dim, 256) for i, dim in enumerate((40, 80, 160, 320))},
    **{f"neck.fpn_convs.{i}.conv": (3, 3, 256, 256) for i in range(4)},
    "rpn_head.rpn_conv": (3, 3, 256, 256),
    "rpn_head.rpn_cls": (1, 1, 256, 3),
    "rpn_head.rpn_reg": (1, 1, 256, 12),
    "roi_head.bbox_head.shared_fcs.0": (7, 7, 256, 1024),
    "roi_head.bbox_head.shared_fcs.1": (1024, 1024),
    "roi_head.bbox_head.fc_cls": (1024, 81),
    "roi_head.bbox_head.fc_reg": (1024, 320),
    **{f"roi_head.mask_head.convs.{i}.conv": (3, 3, 256, 256) for i in range(4)},
    "roi_head.mask_head.upsample": (2, 2, 256, 256),
    "roi_head.mask_head.conv_logits": (1, 1, 256, 80),
}


@pytest.fixture(scope="module")
def tiny(build):
    return split(build(MaskRCNN, TINY, **OPTIONS))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((*SIZE, 3)).astype(np.float32)


def on_canvas(image, height, width):
    """A batch of the image alone, padded with 0."""
    missing = height - image.shape[0], width - image.shape[1]
    return jnp.asarray(np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0))))[None]


def truth(*present):
    """Three places for objects in each image."""
    boxes = np.array([[2, 3, 30, 40], [10, 10, 22, 20], [0, 0, 40, 50]], np.float32)
    masks = np.random.default_rng(1).integers(0, 2, (3, 14, 14)).astype(np.uint8)
    one = Truth(boxes, np.array([0, 2, 1], np.int32), np.ones(3, bool), masks)
    stacked = jax.tree.map(lambda x: jnp.asarray(np.stack([x] * len(present))), one)
    return stacked._replace(valid=jnp.asarray(present))


@pytest.mark.parametrize("variant", ["atto", "huge"])
def test_every_variant(variant, parameters):
    """Names, shapes, and those of the results in bfloat16 with the published options; nothing is computed."""
    options = {"num_classes": 80, "dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: create_model(f"mask_rcnn_{variant}", rngs=nnx.Rngs(0), **options))
    found = {
        name: value.shape for name, value in parameters(model).items() if not name.startswith("backbone.")
    }
    dims = VARIANTS[variant].dims
    expected = EXPECTED | {f"neck.lateral_convs.{i}.conv": (1, 1, dim, 256) for i, dim in enumerate(dims)}
    kernels = {f"{name}.kernel": shape for name, shape in expected.items()}
    assert found == kernels | {f"{name}.bias": shape[-1:] for name, shape in expected.items()}
    if variant == "atto":
        sizes = jax.ShapeDtypeStruct((2, 2), jnp.int32)
        images = jax.ShapeDtypeStruct((2, 512, 640, 3), jnp.float32)
        result = nnx.eval_shape(lambda model, x, sizes: model.detect(x, sizes), model, images, sizes)
        shapes = [(2, 100, 4), (2, 100), (2, 100), (2, 100), (2, 100, 28, 28)]
        assert [x.shape for x in result] == shapes
        assert [str(x.dtype) for x in result] == ["float32", "float32", "int32", "bool", "float32"]


def test_number_of_parameters(parameters):
    """torchvision's with ResNet-50 has 44,401,393 for 91 classes, of which its class 0 is the background."""
    model = nnx.eval_shape(lambda: create_model("mask_rcnn_atto", num_classes=90, rngs=nnx.Rngs(0)))
    outside = ("backbone.", "neck.lateral_convs.")
    shared = sum(math.prod(x.shape) for name, x in parameters(model).items() if not name.startswith(outside))
    resnet_50, laterals = 23_454_912, sum((dim + 1) * 256 for dim in (256, 512, 1024, 2048))
    background = 4 * (1024 + 1) + 256 + 1  # it has deltas and a mask there
    assert shared + resnet_50 + laterals + background == 44_401_393


def test_initial_weights():
    """As in mmdetection."""
    rngs = nnx.Rngs(0)
    neck = FPN((4, 64), 64, dtype=jnp.float32, rngs=rngs)
    rpn = RPNHead(64, dtype=jnp.float32, rngs=rngs)
    head = RoIHead(64, 256, 40, dtype=jnp.float32, rngs=rngs)
    box, mask = head.bbox_head, head.mask_head
    deviations = {
        neck.fpn_convs[0].conv: (2 / (18 * 64)) ** 0.5,
        neck.lateral_convs[1].conv: (2 / 128) ** 0.5,
        rpn.rpn_conv: 0.01,
        box.shared_fcs[0]: (2 / (49 * 64 + 256)) ** 0.5,
        box.fc_cls: 0.01,
        box.fc_reg: 0.001,
        mask.convs[2].conv: (2 / (9 * 64)) ** 0.5,
        mask.upsample: (2 / (4 * 64)) ** 0.5,
        mask.conv_logits: (2 / 40) ** 0.5,
    }
    for layer, deviation in deviations.items():
        assert float(layer.kernel[...].std()) == pytest.approx(deviation, rel=0.06)
        assert not layer.bias[...].any()
    largest = float(jnp.abs(box.shared_fcs[0].kernel[...]).max())
    assert largest < 1.8 * deviations[box.shared_fcs[0]], "not uniform"


def test_upsampling_writes_each_position_into_its_own_cells(build):
    layer = build(Upsample, 3, 2, dtype=jnp.float32)
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 3)).astype(np.float32)
    found = np.asarray(layer(jnp.asarray(x)))
    for y in range(4):
        for z in range(6):
            expected = x[0, y // 2, z // 2] @ np.asarray(layer.kernel[y % 2, z % 2]) + np.asarray(
                layer.bias[...]
            )
            np.testing.assert_allclose(found[0, y, z], expected, rtol=1e-5)


def test_pyramid_levels(build):
    """Five levels; an odd number of rows leaves the larger half; positions that do not exist stay 0."""
    neck = build(FPN, (2, 3), 4, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    maps = [
        jnp.asarray(rng.standard_normal((1, 10 // s, 12 // s, c)), jnp.float32) for s, c in ((1, 2), (2, 3))
    ]
    visible = [jnp.zeros((1, 10 // s, 12 // s), bool).at[:, : 6 // s, : 4 // s].set(True) for s in (1, 2)]
    levels = neck(maps, visible)
    assert [x.shape for x in levels] == [(1, 10, 12, 4), (1, 5, 6, 4), (1, 3, 3, 4)]
    for level, mask in zip(levels, visible, strict=False):
        assert ((level != 0).all(axis=-1) == mask).all()


@pytest.mark.slow
def test_results_do_not_depend_on_the_canvas(tiny, image):
    """Boxes within 1e-3 pixels and all else within 1e-4, on a canvas three times as large."""
    graph, arrays = tiny
    detect = jax.jit(lambda arrays, x, size: merge(graph, arrays).detect(x, size))
    size = jnp.asarray([SIZE])
    alone = detect(arrays, on_canvas(image, 64, 64), size)
    padded = detect(arrays, on_canvas(image, 96, 128), size)
    other = detect(arrays, on_canvas(image[::-1], 64, 64), size)
    assert alone.valid.all() and (alone.boxes <= np.array([*SIZE, *SIZE])).all()
    np.testing.assert_allclose(padded.boxes, alone.boxes, rtol=0, atol=1e-3)
    for name in ("scores", "classes", "masks"):
        np.testing.assert_allclose(getattr(padded, name), getattr(alone, name), rtol=0, atol=1e-4)
    assert np.abs(other.boxes - alone.boxes).max() > 1, "the comparison could not fail"
    assert detect._cache_size() == 2  # one program for each canvas, whatever the content


@pytest.mark.slow
def test_losses_of_a_batch_are_sums_over_its_images(tiny, image):
    """With stochastic depth; all parameters have a gradient, and it is finite without objects."""
    graph, arrays = tiny
    keys = jax.random.split(jax.random.key(0), 2)
    sizes = jnp.asarray([SIZE, (33, 64)])
    images = jnp.concatenate(
        [on_canvas(image, 64, 64), on_canvas(np.tile(image, (1, 2, 1))[:33, :64], 64, 64)]
    )
    objects = truth((True, True, True), (False, False, False))

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def run(graph, params, *arguments):
        losses = merge(graph, params).losses(*arguments)
        return sum(total / weight.clip(1) for total, weight in losses.values()), losses

    def of(*rows):
        rows = jnp.asarray(rows)
        batch = images[rows], sizes[rows], jax.tree.map(lambda x: x[rows], objects), keys[rows]
        (_, losses), gradients = run(graph, arrays, *batch)
        assert all(np.isfinite(x).all() for x in gradients.values())
        return losses, gradients

    together, gradients = of(0, 1)
    assert not [name for name, x in gradients.items() if not np.asarray(x).any()]
    with_objects, without = of(0, 0)[0], of(1, 1)[0]
    for name, found in together.items():
        parts = np.array([with_objects[name], without[name]]).sum(axis=0) / 2
        np.testing.assert_allclose(found, parts, rtol=1e-4, err_msg=name)
    assert without["rpn_class_loss"][1] == 2 * OPTIONS["rpn_samples"]
    assert without["rpn_box_loss"][0] == without["box_loss"][0] == without["mask_loss"][1] == 0
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes 0 of Mask R-CNN must be at least 1"),
        ({"channels": 0}, "channels 0"),
        ({"fc_channels": -1}, "fc_channels -1"),
        ({"roi_samples": 3}, "roi_samples 3 of Mask R-CNN must be at least 4"),
        ({"rpn_samples": 1}, "rpn_samples 1 of Mask R-CNN must be at least 2"),
        ({"detections": 0}, "detections 0"),
        ({"proposals": 0}, "proposals 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        create_model("mask_rcnn_atto", rngs=nnx.Rngs(0), **{"num_classes": 2, **options})


def test_canvases_that_do_not_fit(tiny, image):
    with pytest.raises(UserError, match="image size 40x64 is not a multiple of the stride 32"):
        merge(*tiny).detect(on_canvas(image, 40, 64), jnp.asarray([SIZE]))
