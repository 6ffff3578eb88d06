"""Mask R-CNN: detection and instance segmentation on a ConvNeXt V2 encoder.

Behaviour and module names are those of mmdetection's Mask R-CNN, as its `projects/ConvNeXt-V2` uses it.

An image may lie on a larger canvas. The model sees of it what mmdetection's test does: the image padded with
0 to multiples of the encoder's stride. Beyond that nothing exists: convolutions see zeros, GRN sums over the
image alone, there are no anchors, and regions end at its border. So results do not depend on the canvas.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from cnx2_jax.errors import UserError
from cnx2_jax.models.convnextv2 import STAGES, EncoderConfig
from cnx2_jax.models.layouts import Masked
from cnx2_jax.models.mask_rcnn.anchors import grid_anchors, inside, valid_anchors
from cnx2_jax.models.mask_rcnn.fpn import FPN
from cnx2_jax.models.mask_rcnn.heads import BOX_BINS, MASK_BINS, RoIHead
from cnx2_jax.models.mask_rcnn.losses import Losses, box_losses, mask_losses, rpn_losses
from cnx2_jax.models.mask_rcnn.postprocess import select
from cnx2_jax.models.mask_rcnn.roi_align import roi_align
from cnx2_jax.models.mask_rcnn.rpn import Proposals, RPNHead, RPNOutputs, propose
from cnx2_jax.models.mask_rcnn.targets import (
    Truth,
    mask_targets,
    roi_targets,
    rpn_targets,
)
from cnx2_jax.models.upernet import Backbone

# Folded into a sample's key to draw anchors and regions; no block has these indices.
ANCHOR_STREAM = 0x616E6368
REGION_STREAM = 0x72656769


class Pyramid(NamedTuple):
    """What all regions of a batch share, level by level from fine to coarse.

    Attributes:
      maps: `[B, h, w, channels]`, 0 where the image does not exist.
      outputs: of the RPN.
      anchors: float32 `[n, 4]`.
      valid: which anchors exist in each image, bool `[B, n]`.
      size: height and width that exist of each image in pixels, int32 `[B, 2]`; multiples of the stride.
    """

    maps: list[Array]
    outputs: list[RPNOutputs]
    anchors: list[Array]
    valid: list[Array]
    size: Array


class Detections(NamedTuple):
    """The objects found in each image, by falling score.

    Attributes:
      boxes: float32 `[B, count, 4]`: y0, x0, y1, x1 in pixels of the canvas; 0 where there is none.
      scores: float32 `[B, count]`; 0 where there is none.
      classes: int32 `[B, count]`, from 0.
      valid: bool `[B, count]`, whether there is an object.
      masks: float32 `[B, count, 28, 28]`, the probability of each cell of the box; see `paste_masks`.
        Meaningless where there is no object.
    """

    boxes: Float[Array, "b count 4"]
    scores: Float[Array, "b count"]
    classes: Int[Array, "b count"]
    valid: Bool[Array, "b count"]
    masks: Float[Array, "b count side side"]


class MaskRCNN(nnx.Module):
    """Backbone, feature pyramid, region proposals, and the heads on regions.

    Args:
      config: the encoder's options; all else shares `dtype`, and boxes are float32.
      num_classes: without the background, which comes last in the logits.
      channels: width of the pyramid, the RPN and the mask head.
      fc_channels: width of the box head.
      train_candidates: boxes of a level before suppression in training.
      train_proposals: of an image after it.
      candidates, proposals: the same in testing.
      rpn_samples: anchors of an image in the loss.
      roi_samples: regions of an image in the loss.
      detections: most objects of an image in the result.
      rngs: the `params` stream initialises.

    Raises:
      UserError: an option is out of range.
    """

    encoder_prefix = "backbone."

    def __init__(
        self,
        config: EncoderConfig,
        *,
        num_classes: int,
        channels: int = 256,
        fc_channels: int = 1024,
        train_candidates: int = 2000,
        train_proposals: int = 1000,
        candidates: int = 1000,
        proposals: int = 1000,
        rpn_samples: int = 256,
        roi_samples: int = 512,
        detections: int = 100,
        rngs: nnx.Rngs,
    ):
        smallest = {
            "num_classes": (num_classes, 1),
            "channels": (channels, 1),
            "fc_channels": (fc_channels, 1),
            "train_candidates": (train_candidates, 1),
            "train_proposals": (train_proposals, 1),
            "candidates": (candidates, 1),
            "proposals": (proposals, 1),
            "rpn_samples": (rpn_samples, 2),  # at most half are positive
            "roi_samples": (roi_samples, 4),  # at most a quarter
            "detections": (detections, 1),
        }
        for name, (value, least) in smallest.items():
            if value < least:
                raise UserError(f"{name} {value} of Mask R-CNN must be at least {least}")
        self.num_classes = num_classes
        self.channels = channels
        self.fc_channels = fc_channels
        self.training_counts = train_candidates, train_proposals
        self.testing_counts = candidates, proposals
        self.rpn_samples = rpn_samples
        self.roi_samples = roi_samples
        self.detections = detections
        dtype = config.dtype
        self.backbone = Backbone(config, rngs=rngs)
        self.neck = FPN(config.dims, channels, dtype=dtype, rngs=rngs)
        self.rpn_head = RPNHead(channels, dtype=dtype, rngs=rngs)
        self.roi_head = RoIHead(channels, fc_channels, num_classes, dtype=dtype, rngs=rngs)

    @property
    def config(self) -> EncoderConfig:
        """The encoder's options."""
        return self.backbone.config

    @property
    def stride(self) -> int:
        """Both sides of the canvas must be multiples of this."""
        return self.backbone.stride

    def losses(
        self,
        images: Float[Array, "b height width c"],
        image_size: Int[Array, "b 2"],
        truth: Truth,
        keys: Key[Array, " b"],
        train: bool = True,
    ) -> Losses:
        """Returns the five loss terms by name, each the sum over the batch and the weight to divide it by.

        What is drawn for an image depends on its own key, objects and proposals only.

        Args:
          images: normalised images `[B, H, W, in_chans]`, 0 beyond their sizes.
          image_size: height and width of each image without padding.
          truth: the objects of each image.
          keys: one random key per sample, for the drawn boxes and for stochastic depth.
          train: whether stochastic depth is on.

        Raises:
          UserError: a side of the canvas is not a multiple of the stride, or the images do not have
            `in_chans` channels.
        """
        pyramid = self._pyramid(images, image_size, keys if train else None)
        all_anchors, all_valid = jnp.concatenate(pyramid.anchors), jnp.concatenate(pyramid.valid, axis=1)
        draw_anchors = functools.partial(rpn_targets, count=self.rpn_samples)
        anchors = jax.vmap(draw_anchors, in_axes=(0, None, 0, 0))(
            _streams(keys, ANCHOR_STREAM), all_anchors, all_valid, truth
        )
        outputs = [jnp.concatenate(parts, axis=1) for parts in zip(*pyramid.outputs, strict=True)]
        found = rpn_losses(RPNOutputs(*outputs), anchors)

        proposals = self._propose(pyramid, image_size, *self.training_counts)
        draw_regions = functools.partial(roi_targets, count=self.roi_samples, num_classes=self.num_classes)
        regions = jax.vmap(draw_regions)(_streams(keys, REGION_STREAM), *proposals, truth)
        found |= box_losses(self.roi_head.bbox_head(self._cut(pyramid, regions.boxes, BOX_BINS)), regions)

        # The positive regions come first; all others have no mask.
        regions = jax.tree.map(lambda x: x[:, : self.roi_samples // 4], regions)
        classes = jnp.minimum(regions.classes, self.num_classes - 1)
        logits = self.roi_head.mask_head(self._cut(pyramid, regions.boxes, MASK_BINS), classes)
        masks = jax.vmap(mask_targets)(regions.boxes, regions.objects, truth)
        return found | mask_losses(logits, masks, regions.positive)

    def detect(self, images: Float[Array, "b height width c"], image_size: Int[Array, "b 2"]) -> Detections:
        """Returns the objects of each image.

        Args:
          images: normalised images `[B, H, W, in_chans]`, 0 beyond their sizes.
          image_size: height and width of each image without padding.

        Raises:
          UserError: see `losses`.
        """
        pyramid = self._pyramid(images, image_size, None)
        proposals = self._propose(pyramid, image_size, *self.testing_counts)
        outputs = self.roi_head.bbox_head(self._cut(pyramid, proposals.boxes, BOX_BINS))
        best = jax.vmap(functools.partial(select, count=self.detections))
        found = best(outputs, *proposals, image_size)
        logits = self.roi_head.mask_head(self._cut(pyramid, found.boxes, MASK_BINS), found.classes)
        return Detections(*found, nnx.sigmoid(logits))

    def _pyramid(self, images: Array, image_size: Array, keys: Array | None) -> Pyramid:
        """Runs everything up to the RPN; without keys, stochastic depth is off."""
        size = -(-image_size // self.stride) * self.stride
        strides = [self.config.patch_size * 2**level for level in range(STAGES + 1)]
        visible = [
            inside((images.shape[1] // stride, images.shape[2] // stride), stride, size)
            for stride in strides[:STAGES]
        ]
        maps = self.neck(self.backbone.normalised(images, keys, [Masked(mask) for mask in visible]), visible)
        grids = [(x.shape[1], x.shape[2]) for x in maps]
        return Pyramid(
            maps,
            [self.rpn_head(x) for x in maps],
            [grid_anchors(grid, stride) for grid, stride in zip(grids, strides, strict=True)],
            [valid_anchors(grid, stride, size) for grid, stride in zip(grids, strides, strict=True)],
            size,
        )

    def _propose(self, pyramid: Pyramid, image_size: Array, before: int, after: int) -> Proposals:
        _, outputs, anchors, valid, _ = pyramid
        return propose(outputs, anchors, valid, image_size, before=before, after=after)

    def _cut(self, pyramid: Pyramid, boxes: Array, bins: int) -> Array:
        """Returns the regions of these boxes, `[B, R, bins, bins, channels]`; the coarsest level has none."""
        return roi_align(pyramid.maps[:-1], boxes, pyramid.size, finest=self.config.patch_size, bins=bins)


def _streams(keys: Key[Array, " b"], stream: int) -> Key[Array, " b"]:
    """Returns a key per sample, another one for each `stream`."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, stream)
