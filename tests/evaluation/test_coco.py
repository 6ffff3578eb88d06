"""COCO's numbers equal pycocotools's own, which reads the files; masks travel as run lengths."""

import contextlib
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cnx2_jax.data.sources.coco_file import read_coco_file
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import coco
from cnx2_jax.evaluation.coco import AveragePrecision
from cnx2_jax.evaluation.detections import Detections, paste, write_results

HEIGHT, WIDTH, MOST, SIDE = 150, 200, 12, 28
NUMBERS = [f"ap{of}" for of in ("", "50", "75", "_small", "_medium", "_large")]
NUMBERS += [f"ar{of}" for of in ("1", "10", "100", "_small", "_medium", "_large")]
CATEGORIES = {3: "cat", 7: "dog", 90: "cow", 91: "never"}


def ellipse(x, y, width, height, points=12):
    angles = np.arange(points) / points * 2 * np.pi
    outline = np.stack([x + width * (1 + np.cos(angles)) / 2, y + height * (1 + np.sin(angles)) / 2], axis=1)
    return outline.round(2).reshape(-1).tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file of annotations and, by image, detections with ties: near objects, and at random places."""
    rng = np.random.default_rng(0)
    images, annotations, found = [], [], {}
    for number in range(24):
        images.append(
            {"id": 500 - 3 * number, "height": HEIGHT, "width": WIDTH, "file_name": f"{number}.jpg"}
        )
        boxes, classes = [], []
        for _ in range(0 if number % 6 == 5 else rng.integers(1, 6)):  # some images have no objects
            x, y, width, height = (*rng.uniform(0, 60, 2), *rng.uniform(4, 59, 2) * rng.choice([0.3, 1, 2]))
            x, y, width, height = (round(min(value, 120), 2) for value in (x, y, width, height))
            crowd = rng.random() < 0.2
            polygon = ellipse(x, y, width, min(height, HEIGHT - y))
            segmentation = [polygon]
            if crowd:
                runs = coco_mask.merge(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH))
                flat = coco_mask.decode([runs])[..., 0].T.reshape(-1)
                edges = np.flatnonzero(np.diff(flat, prepend=0))
                segmentation = {
                    "size": [HEIGHT, WIDTH],
                    "counts": np.diff(edges, prepend=0, append=flat.size).tolist(),
                }
            classes.append(int(rng.integers(0, 3)))
            boxes.append([y, x, y + height, x + width])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": images[-1]["id"],
                    "category_id": [3, 7, 90][classes[-1]],
                    "bbox": [x, y, width, height],
                    "area": width * height * 0.78,
                    "iscrowd": int(crowd),
                    "segmentation": segmentation,
                }
            )
        noise = rng.normal(0, 0.7, (len(boxes), 4)) if boxes else np.zeros((0, 4))
        near = np.array(boxes).reshape(-1, 4) + noise
        corner = rng.uniform(0, 50, (3, 2))
        boxes = np.concatenate([near, np.concatenate([corner, corner + rng.uniform(5, 60, (3, 2))], axis=1)])
        count = 0 if number % 7 == 3 else len(boxes)  # in some images nothing is found
        scores = np.zeros(MOST, np.float32)
        scores[:count] = rng.choice([0.25, 0.5, 0.75, 0.875], count)
        grid = (np.arange(SIDE) + 0.5) / SIDE - 0.5
        disc = 1 / (1 + np.exp(40 * (np.hypot(grid[:, None], grid) - rng.uniform(0.4, 0.5))))
        found[images[-1]["id"]] = {
            "scores": scores,
            "boxes": np.pad(boxes, ((0, MOST - len(boxes)), (0, 0))).astype(np.float32) * 2,
            "classes": np.pad([*classes, *rng.integers(0, 3, 3)], (0, MOST - len(boxes))).astype(np.int32),
            "masks": np.repeat(disc[None], MOST, axis=0).astype(np.float32),
        }
    path = tmp_path_factory.mktemp("coco") / "instances.json"
    categories = [{"id": number, "name": name} for number, name in reversed(CATEGORIES.items())]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, read_coco_file(str(path), "data.val_annotations").annotations, found


def totals(metric, found, ids):
    """The metric's total over batches of three, the last one padded; images are twice their original size."""
    total = metric.empty()
    for start in range(0, len(ids), 3):
        chosen = [ids[min(place, len(ids) - 1)] for place in range(start, start + 3)]
        scores = {name: jnp.stack([found[number][name] for number in chosen]) for name in metric.names}
        valid = jnp.arange(start, start + 3) < len(ids)
        host = {
            "id": np.array(chosen),
            "original_size": np.tile([HEIGHT, WIDTH], (3, 1)),
            "image_size": np.tile([2 * HEIGHT, 2 * WIDTH], (3, 1)),
        }
        total = metric.add(total, metric.update(scores, valid), host)
    return total


@pytest.fixture(scope="module")
def merged(made):
    _, annotations, found = made
    metric = AveragePrecision(annotations)
    return metric, metric.merge(totals(metric, found, list(found)))


def oracle(path, results, kind):
    """What pycocotools makes of the files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_numbers_equal_pycocotools_on_the_files(made, merged, tmp_path):
    path, annotations, _ = made
    metric, total = merged
    write_results(tmp_path / "results", total, annotations)
    with pytest.raises(UserError, match="exists already"):
        write_results(tmp_path / "results", total, annotations)
    results, columns = metric.result(total), metric.per_class(total)
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected = oracle(path, tmp_path / f"results/results_{kind}.json", kind)
        found = [results.get(f"{name}_{of}", -1) for of in NUMBERS]
        np.testing.assert_array_equal(found, expected.stats)
        assert 0.05 < results[f"{name}_ap"] < 0.95 and results[f"{name}_ap"] == expected.stats[0]
        assert results[f"{name}_ap_small"] == expected.stats[3]
        assert results[f"{name}_ar100"] == expected.stats[8]
        ours = coco.evaluated(annotations, total, kind).eval["precision"]
        np.testing.assert_array_equal(ours, expected.eval["precision"])
        for place in range(3):
            precision = expected.eval["precision"][:, :, place, 0, -1]
            assert columns[f"{name}_ap"][place] == pytest.approx(precision[precision > -1].mean())
        assert np.isnan(columns[f"{name}_ap"][3])


def test_two_processes_give_the_numbers_of_one(made, merged, monkeypatch):
    *_, found = made
    metric, whole = merged
    ids = list(found)
    parts = [totals(metric, found, ids[1::2]), totals(metric, found, ids[::2]), []]
    content = [Detections.joined(part).to_bytes() for part in parts]
    monkeypatch.setattr(coco, "gathered_bytes", lambda own: content)
    np.testing.assert_equal(metric.result(metric.merge(parts[0])), metric.result(whole))


def test_images_without_detections_count(made):
    _, annotations, found = made
    metric = AveragePrecision(annotations)
    silent = {number: {**each, "scores": np.zeros(MOST, np.float32)} for number, each in found.items()}
    results = metric.result(metric.merge(totals(metric, silent, list(silent))))
    assert results["box_ap"] == results["mask_ap"] == 0
    one = dict(list(found.items())[:1])
    alone = metric.result(metric.merge(totals(metric, one, list(one))))["box_ap"]
    beside = metric.result(metric.merge(totals(metric, {**silent, **one}, list(silent))))["box_ap"]
    assert beside < alone


def test_equal_metrics_compile_once(made):
    _, annotations, _ = made
    metric = AveragePrecision(annotations)
    assert metric == AveragePrecision(annotations) and hash(metric) == hash(AveragePrecision(annotations))
    assert metric != AveragePrecision(annotations.only(np.arange(3)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_masks_are_pasted_like_a_loop_over_pixels(data):
    size = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    corner = [data.draw(st.floats(-8, side + 4, width=16)) for side in size]
    sides = [data.draw(st.floats(0, 24, width=16)) for _ in range(2)]
    box = np.float32([*corner, *np.add(corner, sides)])
    cells = data.draw(st.integers(1, 5))
    mask = np.float32(
        data.draw(st.lists(st.sampled_from([0, 0.3, 0.8, 1]), min_size=cells**2, max_size=cells**2))
    )
    mask = mask.reshape(cells, cells)
    expected = np.zeros(size, bool)
    near = np.zeros(size, bool)  # to the threshold, where rounding decides
    for y in range(size[0]):
        for x in range(size[1]):
            if not (sides[0] > 1e-3 and sides[1] > 1e-3):
                continue
            place = [
                (middle + 0.5 - box[axis]) / (box[axis + 2] - box[axis]) * cells - 0.5
                for axis, middle in enumerate((y, x))
            ]
            value = sum(
                mask[i, j] * max(0, 1 - abs(place[0] - i)) * max(0, 1 - abs(place[1] - j))
                for i in range(cells)
                for j in range(cells)
            )
            expected[y, x], near[y, x] = value >= 0.5, abs(value - 0.5) < 1e-4
    runs = {"size": list(size), "counts": paste(mask, box, size)}
    pasted = coco_mask.decode([runs])[..., 0].astype(bool)
    if min(sides) > 1e-3:
        np.testing.assert_array_equal(pasted | near, expected | near)
    assert coco_mask.encode(np.asfortranarray(pasted, np.uint8))["counts"] == runs["counts"]
