"""The benchmarks: contestants take turns, and errors for bad arguments."""

import json

import pytest

from experiments.benchmarks import contestants, segmentation, steps
from experiments.benchmarks.pretraining import build_jax


def test_contestants_take_turns_and_one_that_cannot_start_is_skipped():
    able = contestants.Contestant(build_jax, "jax", "atto", "gathered", 1, 64, (contestants.FORWARD,))
    unable = contestants.Contestant(build_jax, "jax", "nothing", "gathered", 1, 64, (contestants.FORWARD,))
    lines: list[str] = []
    (found,) = contestants.measure([unable, able], 3, lines.append)
    assert found.contestant == able and len(found.seconds) == 3 and min(found.seconds) > 0
    assert found.temp_bytes > 0 and found.flops > 0 and found.peak_bytes > 0
    record = found.record()
    assert record["median"] == sorted(found.seconds)[1]
    assert any("skipped" in line and "nothing" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["machne"], "unknown section 'machne'; did you mean 'machine'? (known: machine, growth, tpu, gpu)"),
        (["machine", "--variants", "otto"], "unknown variant 'otto'; did you mean 'atto'"),
        (["machine", "--image-size", "100"], "--image-size 100 must be a multiple of 32"),
        (["machine", "--rounds", "0"], "--rounds: '0' is not a whole number from 1 on"),
    ],
)
def test_bad_arguments(arguments, said, tmp_path, capsys):
    assert steps.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_segmentation_beside_its_peer(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(segmentation, "PEERS", ("eager",))  # to compile takes minutes
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    assert segmentation.main(["--rounds", "2", "--image-size", "64", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "upernet_atto, batch 2, 64 px" in table and (tmp_path / "segmentation.md").read_text() == table
    ours, theirs = json.loads((tmp_path / "segmentation.json").read_text())["records"]
    for record in (ours, theirs):
        assert len(record["seconds"]) == 2 and record["peak_bytes"] > 0
    assert ours["temp_bytes"] > 0 and theirs["contestant"]["mode"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variant", "otto"], "unknown variant 'otto'; did you mean 'atto'"),
        (["--image-size", "100"], "--image-size 100 must be a multiple of 32"),
        (["--batch", "1"], "--batch 1: BatchNorm needs two images"),
    ],
)
def test_bad_arguments_of_segmentation(arguments, said, tmp_path, capsys):
    assert segmentation.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "out").exists()
