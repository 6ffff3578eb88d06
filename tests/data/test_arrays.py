"""Arrays in, equal arrays out: every dtype, layout and kind of file against NumPy and tifffile."""

import builtins
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from cnx2_jax.data.array_files import DTYPES, open_form
from cnx2_jax.data.images import ImageData
from cnx2_jax.data.sources import open_paths, open_source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults

HEIGHT, WIDTH, BANDS = 7, 5, 4


def values(dtype, *shape, seed=0):
    """Noise over the whole range of the dtype, its extremes among it."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(seed)
    if dtype.kind == "f":
        return (rng.standard_normal(shape) * 1000).astype(dtype)
    info = np.iinfo(dtype)
    noise = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    noise.flat[:2] = info.min, info.max
    return noise


def config(root="", **changes):
    found = defaults("classify")
    found.update({"batch_size": 2, "image_size": (8, 16)})
    found.data.update({"source": "arrays", "root": str(root), "eval_crop": 1.0, "val_fraction": 0.0})
    found.update_from_flattened_dict(changes)
    return found


def arrays_of(source):
    """All arrays of a source, decoded in a graph as the pipeline does."""
    decode = source.fields["image"].decode
    records = tf.data.Dataset.range(source.num_records).map(lambda index: decode(source.read(index)["image"]))
    return list(records.as_numpy_iterator())


def equal(found, expected):
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def save(path, array, layout):
    """Writes [h, w, bands] in the kind of file that the path ends in."""
    first = layout == "channels_first"
    stored = np.moveaxis(array, -1, 0) if first else array
    if path.suffix == ".npy":
        np.save(path, stored)
    elif path.suffix == ".npz":
        np.savez(path, image=stored)
    else:
        planes = "separate" if first else "contig"
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planes)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("ending", [".npy", ".npz", ".tif"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_read_bit_for_bit(tmp_path, dtype, ending, layout):
    """The third file has another size, so that it does not fit the template of the first one."""
    images = [values(dtype, HEIGHT + place // 2, WIDTH, BANDS, seed=place) for place in range(3)]
    for place, image in enumerate(images):
        save(tmp_path / f"{place}{ending}", image, layout)
    data = config(tmp_path, **{"data.layout": layout}).data
    assert all(map(equal, arrays_of(open_source(data, "train", 0)), images))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"tile": (16, 16)},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"rowsperstrip": 2},
        {"rowsperstrip": 2, "byteorder": ">", "description": "of another length"},
    ],
    ids=str,
)
def test_other_tiffs(tmp_path, options):
    images = [values("uint16", HEIGHT, WIDTH, BANDS, seed=seed) for seed in range(2)]
    for place, image in enumerate(images):
        path = tmp_path / f"{place}.TIFF"
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig", **options)
        assert np.array_equal(tifffile.imread(path), image)
    assert all(map(equal, arrays_of(open_source(config(tmp_path).data, "train", 0)), images))


def test_pages_are_bands_where_the_layout_says_so(tmp_path):
    images = [values("float32", BANDS, HEIGHT, WIDTH, seed=seed) for seed in range(2)]
    for place, image in enumerate(images):
        tifffile.imwrite(tmp_path / f"{place}.tif", image, photometric="minisblack")
    data = config(tmp_path, **{"data.layout": "channels_first"}).data
    found = arrays_of(open_source(data, "train", 0))
    assert all(map(equal, found, (np.moveaxis(image, 0, -1) for image in images)))
    with pytest.raises(UserError, match=rf"0.tif' has {BANDS} pages; .*data.layout=channels_first"):
        open_source(config(tmp_path).data, "train", 0)


@pytest.mark.parametrize("order", ["<", ">"])
def test_npy_of_other_orders(tmp_path, order):
    image = values("uint32", HEIGHT, WIDTH).astype(f"{order}u4")
    np.save(tmp_path / "a.npy", image)
    np.save(tmp_path / "b.npy", np.asfortranarray(image))
    for found in arrays_of(open_source(config(tmp_path).data, "train", 0)):
        np.testing.assert_array_equal(found, image[..., None])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pngs_keep_their_bits(tmp_path, dtype):
    grey = values(dtype, HEIGHT, WIDTH)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert equal(arrays_of(open_source(config(tmp_path).data, "train", 0))[0], grey[..., None])


@pytest.mark.parametrize("kind", ["npy", "zarr"])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_one_file_of_many_images(tmp_path, kind, layout):
    images = values("uint16", 6, HEIGHT, WIDTH, BANDS)
    path = tmp_path / f"images.{kind}"
    stored = images if layout == "channels_last" else np.ascontiguousarray(np.moveaxis(images, -1, 1))
    if kind == "npy":
        np.save(path, stored)
    else:
        zarr.create_array(str(path), data=stored, chunks=(1, *stored.shape[1:]))
    np.save(tmp_path / "labels.npy", np.array([0, 2, 1, 0, 2, 1]))
    data = config(path, **{"data.layout": layout, "data.val_fraction": 0.5}).data
    train, val = (open_source(data, split, 0) for split in ("train", "val"))
    assert train.class_names == ("0", "1", "2") and train.num_records == val.num_records == 3
    for source in (train, val):
        for index, found in enumerate(arrays_of(source)):
            place = int(re.search(r"\[(\d)\]$", source.describe(index))[1])
            assert equal(found, images[place]) and source.labels[index] == [0, 2, 1, 0, 2, 1][place]


def resident():
    """The bytes of this process's memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat_while_a_large_file_is_read(tmp_path):
    count, mebibyte = 192, 2**20
    stored = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", "uint16", (count, 512, 512, 2))
    stored[:, 0, 0, 0] = np.arange(count)  # the rest are holes, which cost neither disk nor time
    del stored
    source = open_source(config(tmp_path / "images.npy").data, "train", 0)
    decode = source.fields["image"].decode
    images = tf.data.Dataset.range(count).map(lambda index: decode(source.read(index)["image"]))
    found, growth, before = [], 0, resident()
    for image in images.as_numpy_iterator():
        found.append(int(image[0, 0, 0]))
        growth = max(growth, resident() - before)
    assert sorted(found) == list(range(count))
    assert growth < 64 * mebibyte  # of the 192 that were read


@pytest.mark.parametrize("name", ["w", ""])
def test_one_of_several_arrays(tmp_path, name):
    image = values("int16", HEIGHT, WIDTH, 2)
    np.savez(tmp_path / "a.npz", v=image[:2], w=image)
    data = config(tmp_path, **{"data.array": name}).data
    if name:
        assert equal(arrays_of(open_source(data, "train", 0))[0], image)
    else:
        with pytest.raises(UserError, match=r"a.npz' has the arrays v, w; choose one with data.array"):
            open_source(data, "train", 0)


def unnormalised(root, bands, dtype="uint16", **changes):
    """A config for arrays whose mean and deviation are set by hand."""
    normal = {"model.in_chans": bands, "data.mean": (100.0,) * bands, "data.std": (2.0,) * bands}
    return config(root, **{"data.dtype": dtype, **normal, **changes})


def folder_of(root, *images, ending=".npy"):
    for place, image in enumerate(images):
        path = root / f"{place}{ending}"
        save(path, image, "channels_last")
    return root


def test_batches_hold_the_chosen_bands_in_their_own_dtype(tmp_path):
    images = [values("uint16", 8, 16, 3, seed=seed) for seed in range(4)]
    chosen = {"data.bands": "R,G,B", "data.use_bands": "B,R"}
    data = ImageData(unnormalised(folder_of(tmp_path, *images), 2, **chosen))
    data.val = data.train
    first, second = data.eval_batches()
    found = np.concatenate([first["image"], second["image"]])
    assert equal(found, np.stack(images)[..., [2, 0]])
    batches = data.train_batches(0)
    assert [next(batches)["image"].dtype for _ in range(2)] == [np.uint16] * 2


def test_a_run_enters_the_stream_at_any_step(tmp_path):
    images = [values("float32", 9, 9, 1, seed=seed) for seed in range(5)]
    data = ImageData(unnormalised(folder_of(tmp_path, *images), 1, "float32"))
    batches = data.train_batches(0)
    early = [next(batches)["image"] for _ in range(4)]
    assert np.array_equal(next(data.train_batches(3))["image"], early[3])


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32", "float64"])
def test_bad_values_become_the_mean_of_the_band(tmp_path, dtype):
    image = np.full((8, 16, 2), 7, dtype)
    image[2, 3, 1] = 9
    if np.dtype(dtype).kind == "f":
        image[4, 5, 0], image[6, 7, 1] = np.nan, -np.inf
    batch = np.float32 if dtype == "float64" else dtype
    means = {"data.mean": (100.0, 200.4), "data.no_data": "9"}
    data = ImageData(unnormalised(folder_of(tmp_path, image, image), 2, np.dtype(batch).name, **means))
    data.val = data.train
    found = next(data.eval_batches())["image"][0]
    expected = np.full((8, 16, 2), 7, batch)
    expected[2, 3, 1] = 200 if dtype == "uint16" else 200.4
    if np.dtype(dtype).kind == "f":
        expected[4, 5, 0], expected[6, 7, 1] = 100, 200.4
    assert equal(found, expected)


WRONG = values("uint16", HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("ending", [".npy", ".tif"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (WRONG, r"array '.*1\.\w+' has 3 bands of uint16, but the first array has 2 bands of uint16"),
        (WRONG[..., :2].astype("int32"), r"array '.*1\.\w+' has 2 bands of int32, but the first"),
        (None, r"array '.*1\.\w+' is not a readable array; it may be truncated: repair"),
    ],
    ids=["bands", "dtype", "truncated"],
)
def test_files_that_differ_are_named(tmp_path, ending, other, message):
    folder_of(tmp_path, WRONG[..., :2], WRONG[..., :2] if other is None else other, ending=ending)
    if other is None:
        path = tmp_path / f"1{ending}"
        path.write_bytes(path.read_bytes()[:-150])
    data = ImageData(unnormalised(tmp_path, 2))
    with pytest.raises(UserError, match=message):
        next(data.train_batches(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.use_bands": "R,X"}, r"data.use_bands: unknown band 'X'.*bands: R, G"),
        ({"data.bands": "R,G,B"}, r"data.bands names 3 bands, but the arrays have 2"),
        ({"data.bands": "R,R"}, r"data.bands 'R,R' must be different names"),
        (
            {"data.use_bands": "R"},
            r"model.in_chans is 2, but 1 of the 2 bands .* are used; set model.in_chans=1",
        ),
        ({"data.no_data": "-1"}, r"data.no_data '-1' is not a number of uint16"),
        ({"data.no_data": "none"}, r"data.no_data 'none' is not a number of uint16"),
        ({"data.layout": "rows"}, r"data.layout 'rows' must be one of channels_last, channels_first"),
        ({"data.augment": "jitter-0.4"}, r"data.augment 'jitter-0.4' .* not 2 bands of uint16; set data.aug"),
        (
            {"data.dtype": "uint8"},
            r"run `cnx2 data --config pretrain:tiny --statistics bands.json --config.data.source=arrays .*",
        ),
    ],
    ids=str,
)
def test_mistakes_of_the_config(tmp_path, changes, message):
    folder_of(tmp_path, WRONG[..., :2])
    with pytest.raises(UserError, match=message):
        ImageData(unnormalised(tmp_path, 2, **{"data.bands": "R,G", **changes}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"no array", r"array '.*a.npy' cannot be read: .*; repair or remove it"),
        ("a.tif", b"no array", r"array '.*a.tif' cannot be read: .*; repair or remove it"),
        ("a.png", b"no array", r"array '.*a.png' is not a PNG of 8 or 16 bits"),
        ("a.txt", b"no array", r"no images \(.npy, .npz, .tif, .tiff, .png\) in"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(config(tmp_path).data, "train", 0)


def test_arrays_of_other_kinds(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2), complex))
    with pytest.raises(UserError, match=r"a.npy' is of complex128; convert it to one of uint8, uint16"):
        open_form(str(tmp_path / "a.npy"), "channels_last")
    np.save(tmp_path / "b.npy", np.zeros((2, 2, 2, 2)))
    with pytest.raises(UserError, match=r"b.npy' has the shape \(2, 2, 2, 2\); an image has 2 axes"):
        open_form(str(tmp_path / "b.npy"), "channels_last")
    (tmp_path / "a.npy").rename(tmp_path / "c.npz")
    with pytest.raises(UserError, match=r"array '.*c.npz' does not end in .npy, as '.*b.npy' does"):
        open_paths([str(tmp_path)], config().data)


@pytest.mark.parametrize("codecs", [{"compressor": {"id": "pickle"}}, {"filters": [{"id": "pickle"}]}])
def test_pickles_in_a_zarr_are_not_read(tmp_path, codecs):
    # Zarr 3.0 with numcodecs 0.15 would execute the chunks; newer versions refuse them too.
    path = tmp_path / "a.zarr"
    path.mkdir()
    stated = {"zarr_format": 2, "shape": [1, 4, 4, 3], "chunks": [1, 4, 4, 3], "dtype": "|u1", "order": "C"}
    stated |= {"fill_value": 0, "filters": None, "compressor": None, **codecs}
    (path / ".zarray").write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"a.zarr' holds pickles, which could run any code when"):
        open_source(config(path).data, "train", 0)


@pytest.mark.parametrize(("library", "path"), [("tifffile", "a.tif"), ("zarr", "a.zarr")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, library, path):
    def missing(name, *given, **options):
        if name == library:
            raise ImportError(name)
        return imported(name, *given, **options)

    imported = builtins.__import__
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text("{}")
    (tmp_path / "a.tif").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", missing)
    message = rf"'{library}' cannot be imported; pip install 'cnx2_jax\[arrays\]'"
    with pytest.raises(UserError, match=message):
        if library == "zarr":
            open_source(config(tmp_path / path).data, "train", 0)
        else:
            open_form(str(tmp_path / path), "channels_last")


def test_labels_must_fit(tmp_path):
    np.save(tmp_path / "images.npy", values("uint8", 4, 3, 3))
    np.save(tmp_path / "labels.npy", np.array([0, 1]))
    with pytest.raises(UserError, match=r"labels '.*labels.npy' must be 4 whole numbers from 0 on"):
        open_source(config(tmp_path / "images.npy").data, "train", 0)
