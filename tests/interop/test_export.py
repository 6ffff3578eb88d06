"""Exports: a file or folder at the requested path is complete and was compared, or does not exist."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cnx2_jax.errors import RunError, UserError
from cnx2_jax.interop import export, stablehlo
from cnx2_jax.interop.export import FORMATS, Format, Job
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.inference import InferenceModel
from cnx2_jax.models import create_model

FACTS = Facts(tuple(f"name {i}" for i in range(1000)), (224, 224), 0.875, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def shared(inference_model):
    return inference_model()


@pytest.fixture
def job(shared, tmp_path):
    return Job(tmp_path / "unused", shared, FACTS)


@pytest.fixture(scope="module")
def atto(build):
    """The function `atto(uint8)`: the network for images of 224 pixels, one for all formats."""
    network = build(functools.partial(create_model, "convnextv2_atto"), seed=1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return functools.cache(lambda uint8: InferenceModel(network, (224, 224), mean=mean, std=std, uint8=uint8))


def of(change):
    """A format that changes the results of StableHLO."""
    return Format(
        "",
        write=lambda path, job: stablehlo.write(path, job.model),
        run=lambda path, images: change(stablehlo.run(path, images)),
        writer="jax",
        runtime="jax",
    )


@pytest.mark.parametrize("name", FORMATS)
def test_atto_at_224(name, atto, tmp_path):
    pytest.importorskip(FORMATS[name].writer)
    pytest.importorskip(FORMATS[name].runtime)
    job = Job(tmp_path, atto(uint8=name != "safetensors"), FACTS)  # which are weights alone
    result = export.export(tmp_path / "out", FORMATS[name], job)
    assert result["runtime"].startswith(FORMATS[name].runtime + " ")
    assert 0 <= result["max_difference"] < 1e-5 * result["largest"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_difference_is_told(job, tmp_path):
    result = export.export(tmp_path / "out", of(lambda x: x + 1e-5 * np.abs(x).max()), job)
    assert result["runtime"] == f"jax {jax.__version__}"
    images = job.model.some_images(3)
    assert result["largest"] == np.abs(job.model.reference(images)).max()
    assert result["max_difference"] == pytest.approx(1e-5 * result["largest"], rel=0.3)


@pytest.mark.parametrize(
    "change",
    [lambda x: x * 1.001, lambda x: x * np.nan, lambda x: x[:2], lambda x: x[:, ::-1]],
    ids=["scaled", "nan", "shape", "order"],
)
def test_other_results_leave_nothing(change, job, tmp_path):
    with pytest.raises(RunError, match="nothing was exported"):
        export.export(tmp_path / "out", of(change), job)
    assert not list(tmp_path.iterdir())


def test_bfloat16_has_a_coarser_bound(job, tmp_path):
    coarse = dataclasses.replace(job, dtype="bfloat16")
    export.export(tmp_path / "out", of(lambda x: x * 1.01), coarse)
    with pytest.raises(RunError, match="5e-02"):
        export.export(tmp_path / "other", of(lambda x: x * 1.1), coarse)


def test_without_its_runtime_nothing_is_compared(job, tmp_path):
    form = dataclasses.replace(of(lambda x: x * np.nan), runtime="no_such_runtime")
    result = export.export(tmp_path / "out", form, job)
    assert result == {"runtime": None, "max_difference": None, "largest": None}
    assert (tmp_path / "out").is_file()


def test_a_missing_package_is_named_with_the_extra():
    form = dataclasses.replace(FORMATS["onnx"], writer="no_such_package")
    with pytest.raises(UserError, match=r"'no_such_package'.*'cnx2_jax\[onnx\]'"):
        export.check_writable(form)
    export.check_writable(FORMATS["stablehlo"])
