"""The annotated objects of a set of images, as arrays: what detections are compared with."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """Objects in the order of their images, crowds included.

    Attributes:
      image_ids: int64 [images].
      sizes: int32 [images, 2], height and width.
      starts: int64 [images + 1]; the objects of image i are those from starts[i] to starts[i + 1].
      boxes: float64 [n, 4], x, y, width, height in pixels, as in COCO's files.
      areas: float64 [n], the pixels of the objects.
      classes: int32 [n], indices into `class_names`.
      crowds: bool [n]; detections of a crowd count neither for nor against.
      masks: bytes, object [n]; see `encoded_masks`.
      class_names: the name of each class.
      category_ids: int64 [classes], the class's number in files of results.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray
    masks: np.ndarray
    class_names: tuple[str, ...]
    category_ids: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """How many objects each image has, int64 [images]."""
        return np.diff(self.starts)

    def only(self, images: np.ndarray) -> "Annotations":
        """Returns the annotations of some images, given by their places, in that order."""
        counts = self.counts[images]
        starts = np.concatenate([[0], np.cumsum(counts)])
        rows = np.repeat(self.starts[images] - starts[:-1], counts) + np.arange(starts[-1])
        return self.with_objects(rows, starts, self.image_ids[images], self.sizes[images])

    def kept(self, chosen: np.ndarray) -> "Annotations":
        """Returns the same images with those objects alone for which `chosen`, bool [n], is true."""
        starts = np.concatenate([[0], np.cumsum(chosen)])[self.starts]
        return self.with_objects(np.flatnonzero(chosen), starts, self.image_ids, self.sizes)

    def with_objects(
        self, rows: np.ndarray, starts: np.ndarray, image_ids: np.ndarray, sizes: np.ndarray
    ) -> "Annotations":
        """Returns the objects of some rows for the images given; see the attributes."""
        objects = {
            name: getattr(self, name)[rows] for name in ("boxes", "areas", "classes", "crowds", "masks")
        }
        return dataclasses.replace(self, image_ids=image_ids, sizes=sizes, starts=starts, **objects)
