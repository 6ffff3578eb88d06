"""`cnx2 predict`: names, JSON, batches, folders, feature vectors, and no files after a mistake."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.cli import main
from cnx2_jax.data.images import preprocess_files
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import merge, split
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, models, weights

NAMES = ("n02012849", "n02123045", "zebra crossing")
SHOWN = {"n02012849": "crane (bird)", "n02123045": "tabby", "zebra crossing": "zebra crossing"}
COMMAND = Path(sys.executable).with_name("cnx2")


def run(*arguments):
    try:
        return main(["predict", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def config(task):
    values = defaults(task)
    use_digits(values)
    values.image_size = (16, 16)
    values.model.depths, values.model.dims = (1, 1, 1, 1), (4, 4, 8, 12)
    # What training tolerated, predict does not.
    values.data.unreadable, values.data.max_unreadable = "skip", 0.5
    if task == "pretrain":
        values.model.decoder_dim = 8
    return values


def store(folder, task, names, fill):
    empty = nnx.eval_shape(lambda: models.build(config(task), len(names), nnx.Rngs(0)))
    checkpoint.write(folder, split(fill(empty, 3))[1], make_metadata(config(task), names))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, random_params):
    return store(tmp_path_factory.mktemp("checkpoints") / "classifier", "classify", NAMES, random_params)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, random_params):
    return store(tmp_path_factory.mktemp("checkpoints") / "pretrained", "pretrain", (), random_params)


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8)).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    return [save(tmp_path / "images" / f"{name}.png", seed) for seed, name in enumerate("dabec")]


@functools.cache
def loaded(folder):
    """The model of a checkpoint, its encoder, its config and the function from an image to its vector."""
    model, values, _ = weights.load(folder)
    encoder = models.without_decoder(model)
    graph, params = split(encoder)
    return model, encoder, values, jax.jit(lambda x: merge(graph, params).pooled(x))


def expected(folder, paths):
    """Vectors and probabilities of files, computed one at a time."""
    model, encoder, values, pooled = loaded(folder)
    pixels = preprocess_files(paths, values)
    vectors = np.concatenate(
        [pooled(normalise(image[None], values.data.mean, values.data.std)) for image in pixels]
    )
    if not encoder.num_classes:
        return vectors, None
    logits = vectors @ np.asarray(model.head.kernel) + np.asarray(model.head.bias)
    return vectors, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def check_lines(out, paths, shares, top=3):
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    for line, row in zip(lines, shares, strict=True):
        assert line.keys() == {"image", "predictions"}
        order = np.argsort(-row)[:top]
        assert [one["class"] for one in line["predictions"]] == [NAMES[place] for place in order]
        assert [one["name"] for one in line["predictions"]] == [SHOWN[NAMES[place]] for place in order]
        found = [one["probability"] for one in line["predictions"]]
        np.testing.assert_allclose(found, row[order], rtol=1e-4)


@pytest.mark.parametrize("size", [2, 32])
def test_json_keeps_the_order_in_batches_of_any_size(classifier, images, size, capfd):
    assert run("--checkpoint", classifier, "--json", "--batch-size", size, *images) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    shares = expected(classifier, images)[1]
    assert len(np.unique(shares.round(4), axis=0)) == 5  # one cannot pass for another
    check_lines(captured.out, images, shares)


def test_a_table_shows_ids_with_their_names(classifier, images, capfd):
    assert run("--checkpoint", classifier, *images[:2]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [lines[0], lines[4]] == [str(path) for path in images[:2]]
    rows = [*lines[1:4], *lines[5:]]
    texts = [re.fullmatch(r"  (\S.*\S) +(\d+\.\d\d)%", row)[1].rstrip() for row in rows]
    assert set(texts) == {"n02012849 crane (bird)", "n02123045 tabby", "zebra crossing"}
    assert len({len(row) for row in rows}) == 1  # columns


@pytest.mark.parametrize(("top", "shown"), [(2, 2), (9, 3)])
def test_top(classifier, images, top, shown, capfd):
    assert run("--checkpoint", classifier, "--json", "--top", top, images[0]) == 0
    check_lines(capfd.readouterr().out, images[:1], expected(classifier, images[:1])[1], shown)


def test_folders_are_walked_in_order(classifier, images, tmp_path, capfd):
    folder = tmp_path / "images"
    deep = save(folder / "b" / "x.PNG", 7)
    save(folder / ".hidden" / "y.png", 8)
    (folder / "notes.txt").write_text("no image")
    odd = images[0].rename(tmp_path / "image without an ending")
    assert run("--checkpoint", classifier, "--json", odd, folder, images[1]) == 0
    paths = [odd, *(folder / name for name in ("a.png", "b.png")), deep]
    paths += [*(folder / name for name in ("c.png", "e.png")), images[1]]
    check_lines(capfd.readouterr().out, paths, expected(classifier, paths)[1])


def test_a_name_that_is_no_text(classifier, tmp_path, capfd):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    save(tmp_path / "a.png", 1).rename(os.fsdecode(path))
    assert run("--checkpoint", classifier, tmp_path) == 0
    assert capfd.readouterr().out.splitlines()[0] == f"{tmp_path}/\ufffd.png"
    assert run("--checkpoint", classifier, "--json", tmp_path) == 0
    assert json.loads(capfd.readouterr().out)["image"] == os.fsdecode(path)


@pytest.mark.parametrize("kind", ["classifier", "pretrained"])
def test_features(kind, request, images, tmp_path, capfd):
    folder, out = request.getfixturevalue(kind), tmp_path / "new" / "out.npy"
    arguments = ["--checkpoint", folder, "--json", "--features", out, "--batch-size", 2]
    assert run(*arguments, *images) == 0
    captured = capfd.readouterr()
    vectors, shares = expected(folder, images)
    if shares is None:
        assert captured.out == ""
    else:
        check_lines(captured.out, images, shares)
    assert captured.err == f"wrote {out}, and the names of its rows to {tmp_path}/new/out.json\n"
    stored = np.load(out)
    assert (stored.shape, stored.dtype) == ((5, 12), np.float32)
    np.testing.assert_allclose(stored, vectors, atol=2e-5)
    assert json.loads(out.with_suffix(".json").read_text()) == [str(path) for path in images]


def test_a_corrupt_image_in_a_later_batch(classifier, images, tmp_path, capfd):
    images[3].write_bytes(images[3].read_bytes()[:60])
    out = tmp_path / "out.npy"
    arguments = ["--checkpoint", classifier, "--json", "--batch-size", 2, "--features", out]
    assert run(*arguments, *images) == 2
    captured = capfd.readouterr()
    check_lines(captured.out, images[:2], expected(classifier, images[:2])[1])
    assert captured.err == (
        f"cnx2: error: image '{images[3]}' is not a readable JPEG, PNG or WebP image; it may be truncated or "
        "animated: repair or remove it\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{tmp}/images --top 0", "--top 0 must be at least 1"),
        ("{tmp}/images --batch-size -1", "--batch-size -1 must be at least 1"),
        ("{tmp}/images --features {tmp}/there.npy", "'{tmp}/there.npy' exists already; nothing was"),
        ("{tmp}/images --features {tmp}/named.npy", "'{tmp}/named.json' exists already; nothing was"),
        ("{tmp}/images --features {tmp}/x.npz", "--features '{tmp}/x.npz' must end in .npy"),
    ],
)
def test_mistakes_are_said_before_any_work(images, tmp_path, capfd, words, message):
    (tmp_path / "there.npy").write_text("mine")
    (tmp_path / "named.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    arguments = words.format(tmp=tmp_path).split()
    assert run("--checkpoint", tmp_path / "no checkpoint", *arguments) == 2  # not what is complained of
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message.format(tmp=tmp_path) in captured.err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.npy").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{tmp}/empty", "no images (.jpeg, .jpg, .png, .webp) in '{tmp}/empty'"),
        ("{tmp}/images {tmp}/none.png", "'{tmp}/none.png' does not exist"),
    ],
)
def test_images_that_are_missing(classifier, images, tmp_path, capfd, words, message):
    """Said once the checkpoint is known, which decides what kind of files are read."""
    (tmp_path / "empty").mkdir()
    assert run("--checkpoint", classifier, *words.format(tmp=tmp_path).split()) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message.format(tmp=tmp_path) in captured.err


@pytest.mark.parametrize(("task", "why"), [("pretrain", "is of pretraining"), ("classify", "has no head")])
def test_where_there_are_no_classes_to_name(task, why, images, tmp_path, random_params, capfd):
    folder = store(tmp_path / "checkpoint", task, (), random_params)
    assert run("--checkpoint", folder, *images) == 2
    assert f"{why} and so has no classes; fine-tune it first, or give --feat" in capfd.readouterr().err
    assert run("--checkpoint", folder, "--features", tmp_path / "out.npy", images[0]) == 0
    assert capfd.readouterr().out == ""
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(folder, images[:1])[0], atol=2e-5)


def test_a_reader_that_leaves_early(classifier, images):
    command = [COMMAND, "predict", "--checkpoint", classifier, "--batch-size", "1", *images]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_probabilities_are_averaged_over_both_views(classifier, images, tmp_path, capfd):
    mirrored = []
    for index, path in enumerate(images):
        mirrored.append(tmp_path / f"{index}.png")
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored[-1])
    assert run("--checkpoint", classifier, "--json", "--tta", "flip", *images) == 0
    shares = (expected(classifier, images)[1] + expected(classifier, mirrored)[1]) / 2
    check_lines(capfd.readouterr().out, images, shares)


def test_heat_maps_are_drawn_for_every_image(classifier, pretrained, images, tmp_path, capfd):
    folder = tmp_path / "heat"
    assert run("--checkpoint", classifier, "--heatmap", folder, "--batch-size", 2, *images) == 0
    assert capfd.readouterr().err == f"drew the heat maps into {folder}\n"
    assert {path.name for path in folder.iterdir()} == {f"{path.stem}.heatmap.png" for path in images}
    assert all(Image.open(path).size == (16, 16) for path in folder.iterdir())
    features = ["--features", tmp_path / "x.npy"]
    for stored, options, message in (
        (classifier, ["--heatmap", folder], "exists already"),
        (pretrained, [*features, "--heatmap", tmp_path / "y"], "has no outputs to explain"),
        (classifier, [*features, "--tta", "flip"], "give only one"),
    ):
        assert run("--checkpoint", stored, *options, *images) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "x.npy").exists() and not (tmp_path / "y").exists()
