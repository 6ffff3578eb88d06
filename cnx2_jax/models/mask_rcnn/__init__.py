"""Mask R-CNN: object detection and instance segmentation on a ConvNeXt V2 encoder."""

from cnx2_jax.models.mask_rcnn.model import Detections, MaskRCNN
from cnx2_jax.models.mask_rcnn.postprocess import paste_masks
from cnx2_jax.models.mask_rcnn.targets import Truth

__all__ = ["Detections", "MaskRCNN", "Truth", "paste_masks"]
