"""Mask R-CNN: object detection and instance segmentation on a ConvNeXt V2 encoder."""
