"""docs/files.md names every file and every key that the code writes."""

import dataclasses
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cnx2_jax.bands import BandStatistics
from cnx2_jax.checkpoints import damage, manager, metadata
from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.encoded_masks import region_runs
from cnx2_jax.evaluation import analysis, detections
from cnx2_jax.evaluation.coco import _NUMBERS, KINDS
from cnx2_jax.evaluation.labels import regression_errors
from cnx2_jax.evaluation.metrics import ConfusionMatrix
from cnx2_jax.interop import facts, safetensors
from cnx2_jax.launch.job import Job
from cnx2_jax.launch.results import collect
from cnx2_jax.launch.runs import LOG_FOLDER, Run
from cnx2_jax.observe.timing import TIMED
from cnx2_jax.tasks import defaults
from cnx2_jax.tasks.regress import Standards
from cnx2_jax.train.step import FINITE
from cnx2_jax.workdir import RESULT

PAGE = (Path(__file__).parents[1] / "docs" / "files.md").read_text()
DEPTHS, DIMS = (2, 2, 6, 2), (40, 80, 160, 320)
FACTS = facts.Facts(("a", "b"), (224, 224), 0.875, (0.5,), (0.5,), (1333, 800), "uint16", ("B1",))


def absent(names):
    """Returns the names that the page does not have as code."""
    code = set(re.findall(r"`([^`]+)`", PAGE))
    return {name for name in names if name not in code}


def section(heading):
    """Returns the text between a heading and the next one."""
    return re.split(r"^#+ ", PAGE.split(f"# {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def keys(document):
    """Returns the keys of a JSON object and of those in it, but for the numbers of classes."""
    inner = [keys(value) for key, value in document.items() if isinstance(value, dict) and "2" not in key]
    return {*document, *(name for names in inner for name in names)}


def test_a_checkpoint():
    written = metadata.make_metadata(defaults("classify"), ("a",))
    item = metadata.METADATA_ITEM
    names = {*manager.ITEMS, f"{item}/metadata", metadata.COMMITTED, *written, written["format"]}
    assert absent(names) == set()
    assert absent({"threshold", "standards", *Standards._fields}) == set()
    assert f"checkpoints/{damage.ASIDE}STEP/" in PAGE


def test_a_workdir():
    assert absent({"config.json", "metrics.jsonl", "checkpoints/STEP/", "tensorboard/", RESULT}) == set()
    starts = [name.rstrip(".*") for name in TIMED.pattern.split("|")]
    assert [start for start in starts if f"`{start}" not in PAGE] == []


def test_a_run_of_the_first_version():
    with tarfile.open(Path(__file__).parent / "golden" / "runs_0_1.tar.gz") as archive:
        rows = [
            json.loads(line)
            for task in ("classify", "pretrain")
            for line in archive.extractfile(f"./{task}/metrics.jsonl")
        ]
        held = {name.split("/")[4] for name in archive.getnames() if "/checkpoints/3/" in name}
    assert absent({name.removeprefix("ema_") for row in rows for name in row}) == set()
    items = {name for name in held if f"`{name}" not in PAGE}
    assert items == set()


def source(name):
    return (Path(__file__).parents[1] / "cnx2_jax" / name).read_text()


def test_metrics():
    scores = {f"{kind}_{number}" for kind in list(KINDS)[:1] for number in _NUMBERS}
    confusion = ConfusionMatrix(2).result(np.eye(2, dtype=np.int64))
    errors = regression_errors(np.zeros((2, 1)), np.ones((2, 1)))
    assert absent({*FINITE, *scores, *confusion, *errors}) == set()
    losses = set(
        re.findall(r'"(\w+_loss)": ', source("models/mask_rcnn/losses.py") + source("tasks/segment.py"))
    )
    assert len(losses) >= 7 and absent(losses) == set()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_exported_folders(dtype):
    given = dataclasses.replace(FACTS, dtype=dtype)
    sizes = (given, DEPTHS, DIMS, 1)
    documents = [
        facts.huggingface_config(*sizes, 4),
        facts.huggingface_upernet_config(*sizes, 4, channels=8, auxiliary_channels=8, pool_scales=(1,)),
        facts.timm_config(*sizes[:1], "custom", *sizes[1:], 4),
        facts.detector_config(given),
        facts.detector_preprocessor(given),
        facts.huggingface_segmenter_preprocessor(given),
        facts.huggingface_preprocessor(given) or {},
    ]
    for document in documents:
        nested = {name: value for name, value in document.items() if name not in ("size", "model_args")}
        assert absent({*keys(nested), *document}) == set()
    assert absent({safetensors.WEIGHTS}) == set()


def test_results_of_detection(tmp_path):
    mask = region_runs(np.ones((2, 2), bool), 0, 0, (4, 4))
    one = dataclasses.replace(
        detections.Detections.none(),
        image_ids=np.array([7]),
        sizes=np.array([[4, 4]], np.int32),
        counts=np.array([1]),
        boxes=np.array([[0, 0, 2, 2]], np.float32),
        scores=np.ones(1, np.float32),
        classes=np.zeros(1, np.int32),
        lengths=np.array([len(mask)]),
        runs=np.frombuffer(mask, np.uint8),
    )
    annotations = object.__new__(Annotations)
    object.__setattr__(annotations, "category_ids", np.array([3]))
    entries = [entry for kind in KINDS.values() for entry in one.results(annotations, kind)]
    assert absent({name for entry in entries for name in keys(entry)}) == set()
    assert absent({detections.BOX_FILE, detections.MASK_FILE}) == set()


def test_statistics_and_records():
    statistics = section("Statistics of bands")
    named = {field.name for field in dataclasses.fields(BandStatistics)}
    assert (
        set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", statistics, re.MULTILINE)))) == named
    )
    (row,) = re.findall(r"^\| `job.json` .*$", PAGE, re.MULTILINE)
    assert {f.name for f in dataclasses.fields(Job)} == set(re.findall(r"`(\w+)`", row))


def test_an_analysis():
    layer = analysis.Layer(2, 0.1, 1.0, 0, 0, np.array([0.1, 0.2]))
    assert absent(layer.as_json()) == set()


def test_a_sweep(tmp_path):
    (row,) = collect([Run("a", tmp_path, {}, [])], "loss")
    assert absent(row) == set() and row["state"] in section("Sweeps") and f"`{LOG_FOLDER}/RUN.log`" in PAGE
