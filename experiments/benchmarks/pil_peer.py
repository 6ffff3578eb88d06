"""Pillow in a PyTorch DataLoader, the peers of `experiments.benchmarks.data`.

One peer normalises images to float32 on the host, as the official ConvNeXt V2 code does. The other keeps them
uint8, as timm's prefetcher does, which normalises on the accelerator.
"""

import io
import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset

FILL = (124, 116, 104)
MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


def loader(
    contents: Sequence[bytes], size: int, batch: int, *, recipe: bool, normalised: bool, workers: int
) -> DataLoader:
    """Returns an endless loader of batches of images, decoded, cropped and mirrored.

    Args:
      contents: encoded images.
      size: side of the images in a batch, in pixels.
      batch: images in a batch.
      recipe: whether to apply RandAugment and random erasing too.
      normalised: whether batches are float32 `[batch, 3, size, size]` instead of uint8 `[batch, size, size,
        3]`.
      workers: worker processes; 0 loads in this process.
    """
    images = _Images(contents, size, recipe, normalised)
    return DataLoader(images, batch, num_workers=workers, persistent_workers=workers > 0)


class _Images(Dataset):
    def __init__(self, contents: Sequence[bytes], size: int, recipe: bool, normalised: bool):
        self.contents, self.size, self.recipe, self.normalised = contents, size, recipe, normalised

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.contents[index % len(self.contents)])).convert("RGB")
        left, top, width, height = _crop(*image.size)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.recipe:
            for operation in random.choices(OPERATIONS, k=2):
                if random.random() <= 0.5:
                    level = min(max(random.gauss(9, 0.5), 0), 10) / 10
                    image = operation(image, level, random.choice((-1, 1)))
        erased = self.recipe and random.random() <= 0.25
        pixels = torch.from_numpy(np.array(image))
        if not self.normalised:
            return _erased_bytes(pixels) if erased else pixels
        # torchvision's ToTensor and Normalize.
        values = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        values.sub_(MEAN[:, None, None]).div_(STD[:, None, None])
        return _erased(values) if erased else values


def _crop(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = random.uniform(0.08, 1) * width * height
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _box(height: int, width: int) -> tuple[slice, slice]:
    for _ in range(10):
        area = random.uniform(0.02, 1 / 3) * width * height
        ratio = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            return slice(top, top + h), slice(left, left + w)
    return slice(0), slice(0)


def _erased(values: torch.Tensor) -> torch.Tensor:
    rows, columns = _box(*values.shape[1:])
    values[:, rows, columns].normal_()
    return values


def _erased_bytes(pixels: torch.Tensor) -> torch.Tensor:
    rows, columns = _box(*pixels.shape[:2])
    box = pixels[rows, columns]
    noise = torch.empty(box.shape).normal_().mul_(255 * STD).add_(255 * MEAN + 0.5)
    box.copy_(noise.clamp_(0, 255))
    return pixels


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _enhance(kind):
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


OPERATIONS = (
    lambda image, *_: ImageOps.autocontrast(image),
    lambda image, *_: ImageOps.equalize(image),
    lambda image, *_: ImageOps.invert(image),
    lambda image, level, sign: image.rotate(sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=FILL),
    # Pillow 13 and later refuse 0 bits.
    lambda image, level, _: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    lambda image, level, _: ImageOps.solarize(image, 256 - int(256 * level)),
    lambda image, level, _: _solarize_add(image, int(110 * level)),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    lambda image, level, sign: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height)),
)
