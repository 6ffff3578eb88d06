"""The benchmarks: contestants take turns, and errors for bad arguments."""

import pytest

from experiments.benchmarks import contestants, steps


def test_contestants_take_turns_and_one_that_cannot_start_is_skipped():
    able = contestants.Contestant("jax", "atto", "gathered", 1, 64, (contestants.FORWARD,))
    unable = contestants.Contestant("jax", "nothing", "gathered", 1, 64, (contestants.FORWARD,))
    lines: list[str] = []
    (found,) = contestants.measure([unable, able], 3, lines.append)
    assert found.contestant == able and len(found.seconds) == 3 and min(found.seconds) > 0
    assert found.temp_bytes > 0 and found.flops > 0
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
