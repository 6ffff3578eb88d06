"""The benchmarks: contestants take turns, and errors for bad arguments."""

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


def test_segmentations_table_has_ratios():
    options = {"batch": 2, "image_size": 64, "programs": (contestants.TRAIN,)}
    found = [
        contestants.Measurement(
            contestants.Contestant(segmentation.build_jax, library, "atto", mode, **options),
            contestants.TRAIN,
            seconds,
            peak_bytes=peak,
        )
        for library, mode, seconds, peak in (
            ("jax", "jit", [0.1, 0.2, 0.3], 2**30),
            ("torch", "eager", [0.3, 0.5, 0.7], 3 * 2**29),
            ("torch", "compile", [0.4, 0.4, 0.4], None),
        )
    ]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in segmentation.table(found).splitlines()]
    assert rows[2:] == [
        ["jax jit", "200 (100 to 300)", "1.00", "1024", "1.00"],
        ["torch eager", "500 (300 to 700)", "2.50", "1536", "1.50"],
        ["torch compile", "400 (400 to 400)", "2.00", "-", "-"],
    ]


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
