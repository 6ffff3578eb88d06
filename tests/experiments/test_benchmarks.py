"""The benchmark's own parts: reading compiled programs, taking turns, and what it says of bad arguments."""

import pytest

PROGRAM = """\
HloModule jit_f
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %add.9 = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000000"}
}
%body.1 (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/body/mul"}, backend_config={"estimated_cycles":"7"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %f.1)
}
%condition.1 (s: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(27)
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}
%inner (q: f32[8]) -> f32[8] {
  ROOT %g = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"11"}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %while.5 = (s32[], f32[8]{0}) while(%tuple), condition=%condition.1, body=%body.1
  %call.1 = f32[8]{0} call(%a), to_apply=%inner
  ROOT %dot.1 = f32[8]{0} fusion(%a), calls=%fused, metadata={op_name="jit(f)/mul"}, backend_config={"estimated_cycles":"3"}
}
"""  # noqa: E501 - as the compiler writes it


def test_cycles_count_loops_by_their_trips_and_fusions_once(load):
    assert load("programs").cycles_by_kind(PROGRAM) == {"mul": 27 * 7 + 3, "unnamed": 11}


def test_a_loop_without_a_plain_trip_count_is_an_error(load):
    with pytest.raises(ValueError, match="trips"):
        load("programs").cycles_by_kind(PROGRAM.replace("constant(27)", "parameter(0)"))


def test_contestants_take_turns_and_who_cannot_start_is_left_out(load):
    contestants = load("contestants")
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
def test_bad_arguments(arguments, said, tmp_path, load, capsys):
    assert load("benchmark").main([*arguments, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
