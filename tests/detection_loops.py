"""Detection's operations as literal loops over boxes in NumPy: what the vectorised ones are compared with."""

import math

import numpy as np

NEGATIVE, IGNORED = -1, -2


def ordered(raw):
    """Boxes `[..., 4]` with the corners `raw` in order; some may be empty."""
    first, second = raw[..., :2], raw[..., 2:]
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=-1)


def iou(a, b) -> float:
    """Intersection over union of two boxes y0, x0, y1, x1."""
    height = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    width = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)]
    return height * width / max(sum(areas) - height * width, type(a[0])(1e-6))


def encode(anchor, box, stds):
    """Deltas dx, dy, dw, dh from an anchor to a box."""
    height, width = anchor[2] - anchor[0], anchor[3] - anchor[1]
    dx = ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / width
    dy = ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / height
    dw, dh = math.log((box[3] - box[1]) / width), math.log((box[2] - box[0]) / height)
    return [value / std for value, std in zip((dx, dy, dw, dh), stds, strict=True)]


def decode(anchor, deltas, stds, size):
    """The box that deltas lead to."""
    most = abs(math.log(16 / 1000))
    dx, dy, dw, dh = (value * std for value, std in zip(deltas, stds, strict=True))
    height, width = anchor[2] - anchor[0], anchor[3] - anchor[1]
    y, x = (anchor[0] + anchor[2]) / 2 + dy * height, (anchor[1] + anchor[3]) / 2 + dx * width
    height *= math.exp(min(max(dh, -most), most))
    width *= math.exp(min(max(dw, -most), most))
    corners = y - height / 2, x - width / 2, y + height / 2, x + width / 2
    return [min(max(corner, 0), size[i % 2]) for i, corner in enumerate(corners)]


def match(boxes, valid, objects, present, positive, negative, lowest):
    """mmdetection's MaxIoUAssigner, one box and one object at a time."""
    result = []
    objects_present = [j for j in range(len(objects)) if present[j]]
    overlaps = {(i, j): iou(boxes[i], objects[j]) for i in range(len(boxes)) for j in objects_present}
    for i in range(len(boxes)):
        best = max(objects_present, key=lambda j, i=i: overlaps[i, j], default=None)
        most = -1 if best is None else overlaps[i, best]
        result.append(NEGATIVE if most < negative else best if most >= positive else IGNORED)
    boxes_valid = [i for i in range(len(boxes)) if valid[i]]
    for j in objects_present if lowest is not None and boxes_valid else []:
        most = max(overlaps[i, j] for i in boxes_valid)
        for i in boxes_valid:
            if most >= lowest and overlaps[i, j] == most:
                result[i] = j
    return [found if exists else IGNORED for found, exists in zip(result, valid, strict=True)]


def nms(boxes, scores, valid, threshold):
    """Greedy suppression; the indices of the kept boxes by falling score."""
    order = sorted((i for i in range(len(boxes)) if valid[i]), key=lambda i: -scores[i])
    kept = []
    for i in order:
        if all(not iou(boxes[j], boxes[i]) > threshold for j in kept):
            kept.append(i)
    return kept


def soft_nms(boxes, scores, count, threshold, lowest):
    """mmcv's linear soft-NMS over classes: (class, box, score) of the boxes taken."""
    scores, taken = np.array(scores), []
    while len(taken) < count and scores.max() > 0:
        chosen, index = np.unravel_index(scores.argmax(), scores.shape)
        taken.append((chosen, index, scores[chosen, index]))
        scores[chosen, index] = 0
        for other in range(scores.shape[1]):
            overlap = iou(boxes[chosen, index], boxes[chosen, other])
            if overlap >= threshold:
                scores[chosen, other] *= 1 - overlap
            if scores[chosen, other] < lowest:
                scores[chosen, other] = 0
    return taken


def roi_align(x, box, bins, limit, outside_is_zero=False):
    """RoIAlign of one region, in positions of the map `x` [h, w, c], of which `limit` rows and columns exist.

    Adaptive sampling, aligned; sample by sample. With `outside_is_zero` the map goes on as zeros.
    """
    out = np.zeros((bins, bins, x.shape[-1]))
    grid = [max(math.ceil((box[a + 2] - box[a]) / bins), 0) for a in range(2)]
    steps = [(box[a + 2] - box[a]) / bins for a in range(2)]

    def neighbours(place, size):
        if outside_is_zero:
            low = math.floor(place)
            pairs = [(low, 1 - (place - low)), (low + 1, place - low)]
            return [(i, share) for i, share in pairs if 0 <= i < size]
        if place < -1 or place > size:
            return []
        place = max(place, 0)
        low = int(place)
        if low >= size - 1:
            return [(size - 1, 1)]
        return [(low, 1 - (place - low)), (low + 1, place - low)]

    for p in range(bins):
        for q in range(bins):
            for i in range(grid[0]):
                for j in range(grid[1]):
                    y = box[0] - 0.5 + p * steps[0] + (i + 0.5) * steps[0] / grid[0]
                    z = box[1] - 0.5 + q * steps[1] + (j + 0.5) * steps[1] / grid[1]
                    for row, share in neighbours(y, limit[0]):
                        for column, other in neighbours(z, limit[1]):
                            out[p, q] += share * other * x[row, column]
            out[p, q] /= max(grid[0] * grid[1], 1)
    return out


def sample(draws, matched, count, most_positive):
    """Picks the boxes with the largest random numbers one by one: positive ones, and negative ones."""
    pools = [i for i, m in enumerate(matched) if m >= 0], [i for i, m in enumerate(matched) if m == NEGATIVE]
    chosen = [], []
    for pool, picked, most in zip(pools, chosen, (most_positive, count), strict=True):
        while pool and len(picked) < most and len(chosen[0]) + len(chosen[1]) < count:
            best = max(pool, key=lambda i: draws[i])
            pool.remove(best)
            picked.append(best)
    return chosen


def mask_target(mask, box):
    """The 28 x 28 target of a region from an object's mask over the whole image: RoIAlign, then 0.5."""
    aligned = roi_align(np.float64(mask)[..., None], np.float64(box), 28, mask.shape)[..., 0]
    return (aligned >= 0.5).astype(np.float64)
