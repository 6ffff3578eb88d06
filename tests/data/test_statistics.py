"""Statistics of bands: NumPy's, and what a config takes of them."""

import json

import numpy as np
import pytest

from cnx2_jax import cli
from cnx2_jax.bands import read_statistics, take_statistics
from cnx2_jax.configuration import override
from cnx2_jax.data.images import ImageData
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults

NAMES = "near,far,flat"


def images(dtype, count=7):
    rng = np.random.default_rng(0)
    drawn = rng.integers(5, 250, (count, 8, 16, 3)).astype(dtype)
    drawn[..., 1] += 1  # a band of other values than the first
    drawn[..., 2] = 4
    return drawn


def written(root, dtype, *, no_data="", sample=None):
    """The arrays, the file of their statistics, and the arguments that name both."""
    stack, path = images(dtype), root / "bands.json"
    if no_data:
        stack[:, 0, 0] = float(no_data)
    np.save(root / "images.npy", stack)
    keys = {
        "source": "arrays",
        "root": root / "images.npy",
        "bands": NAMES,
        "val_fraction": 0.0,
        "no_data": no_data,
    }
    arguments = [f"--config.data.{key}={value}" for key, value in keys.items()]
    more = ["--sample", str(sample)] if sample else []
    assert cli.main(["data", "--config", "pretrain:smoke", "--statistics", str(path), *more, *arguments]) == 0
    return stack, path, arguments


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_statistics_are_numpys(tmp_path, dtype, capsys):
    stack, path, _ = written(tmp_path, dtype)
    found = read_statistics(path)
    pixels = stack.reshape(-1, 3).astype(np.float64)
    assert found.dtype == dtype and found.names == tuple(NAMES.split(",")) and found.images == 7
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-12)
    low, high = np.percentile(pixels, (2, 98), axis=0)
    np.testing.assert_allclose(found.low, low, rtol=1e-12)
    np.testing.assert_allclose(found.high, high, rtol=1e-12)
    assert np.array_equal(found.least, pixels.min(axis=0)) and np.array_equal(found.most, pixels.max(axis=0))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 7
    assert "| near" in printed.err and "band 'flat' is constant" in printed.err


def test_a_sample_without_missing_values(tmp_path):
    stack, path, _ = written(tmp_path, "float32", no_data="-99", sample=3)
    found = read_statistics(path)
    pixels = stack[[0, 3, 6]].reshape(-1, 3).astype(np.float64)
    pixels = pixels[pixels[:, 0] != -99]
    assert found.images == 3 and found.bad == pytest.approx((1 / 128,) * 3)
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-12)


def configured(arguments):
    """Returns a config as `load_config` does."""
    config = override(defaults("classify"), arguments)
    take_statistics(config.data)
    return config


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float64"])
def test_a_config_takes_them(tmp_path, dtype):
    stack, path, arguments = written(tmp_path, dtype)
    arguments += [f"--config.data.statistics={path}", "--config.data.use_bands=far,near"]
    config = configured([*arguments, "--config.model.in_chans=2", "--config.image_size=(8,16)"])
    unit = 255 if dtype == "uint8" else 1
    expected = stack.astype(np.float64)[..., [1, 0]]
    np.testing.assert_allclose(config.data.mean, expected.mean(axis=(0, 1, 2)) / unit, rtol=1e-12)
    np.testing.assert_allclose(config.data.std, expected.std(axis=(0, 1, 2)) / unit, rtol=1e-12)
    assert config.data.dtype == ("float32" if dtype == "float64" else dtype) and config.data.bands == NAMES
    assert next(ImageData(config).train_batches(0))["image"].dtype == config.data.dtype


def test_mistakes(tmp_path):
    _, path, arguments = written(tmp_path, "uint16")
    arguments = [each for each in arguments if "bands" not in each]

    def refused(message, **keys):
        keys = {"statistics": path, **keys}
        given = [f"--config.data.{key}={value}" for key, value in keys.items()]
        with pytest.raises(UserError, match=message):
            configured([*arguments, *given])

    refused(r"bands.json': band 'flat' has the deviation 0, as all its values are 4; leave it out")
    refused(
        r"data.use_bands: unknown band 'fat'; did you mean 'flat'\?; bands: near, far, flat", use_bands="fat"
    )
    refused(r"is of the bands near, far, flat, and data.bands names a, b; write it anew", bands="a,b")
    refused(r"none.json' cannot be read: No such file", statistics=tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"mean": 1}')
    refused(
        r"other.json' is not a file that `cnx2 data --statistics` writes", statistics=tmp_path / "other.json"
    )


def test_options_of_the_command(tmp_path, capsys):
    path = tmp_path / "bands.json"
    assert cli.main(["data", "--config", "pretrain:smoke"]) == 2
    assert "give either --out" in capsys.readouterr().err
    path.write_text("")
    assert cli.main(["data", "--config", "pretrain:smoke", "--statistics", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
