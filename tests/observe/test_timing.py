"""Timing with a fake clock, and real traces."""

import jax.numpy as jnp
import pytest

from cnx2_jax.errors import UserError
from cnx2_jax.observe.profile import Profile
from cnx2_jax.observe.timing import TIMED, Observer


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time

    def pass_(self, seconds):
        self.time += seconds


@pytest.fixture
def clock():
    return Clock()


def update(clock, observer, waited, worked):
    with observer.waiting():
        clock.pass_(waited)
    clock.pass_(worked)
    observer.landed()


def test_goodput_waits_and_step_times(clock):
    observer = Observer(4, now=clock)
    clock.pass_(10)  # opening data, building the model
    update(clock, observer, 5, 15)  # compiles
    for _ in range(9):
        update(clock, observer, 0.25, 0.75)
    update(clock, observer, 0.25, 2.75)
    values = observer.values()
    assert values["goodput"] == pytest.approx(12 / 42, rel=1e-5)
    assert values["data_wait"] == pytest.approx(2.5 / 12, rel=1e-5)
    assert values["step_seconds_p50"] == pytest.approx(1)
    assert values["step_seconds_p99"] == pytest.approx(3, abs=0.2)

    # The next window is for itself, goodput since the beginning; a pause costs goodput alone.
    with observer.paused():
        clock.pass_(8)
    for _ in range(4):
        update(clock, observer, 0.1, 0.4)
    values = observer.values()
    assert values["goodput"] == pytest.approx(14 / 52, abs=1e-5)
    assert values["data_wait"] == pytest.approx(0.2)
    assert values["step_seconds_p50"] == values["step_seconds_p99"] == pytest.approx(0.5)
    assert observer.summary().startswith("goodput 27%, step p50 1000.0 ms, p90 ")


def test_flop_utilisation_where_the_peak_is_known(clock):
    observer = Observer(4, now=clock)
    observer.expect(0.1)
    update(clock, observer, 0, 20)  # compiles
    assert "flop_utilisation" not in observer.values()
    for _ in range(5):
        update(clock, observer, 0.1, 0.3)
    assert observer.values()["flop_utilisation"] == pytest.approx(0.25)
    for _ in range(5):
        update(clock, observer, 0.1, 0.9)
    assert observer.values()["flop_utilisation"] == pytest.approx(0.1)
    assert "14.3% of peak FLOP/s" in observer.summary()


def test_throughput():
    observer = Observer(4)
    assert observer.values()["images_per_sec"] == 0
    observer.landed()
    assert observer.values()["images_per_sec"] == 0  # the first step compiles and does not count
    observer.landed()
    rate = observer.values()["images_per_sec"]
    assert 0 < rate < float("inf")
    assert observer.values()["images_per_sec"] == rate  # no step since: the last known


def test_what_happens_in_a_pause_does_not_count(clock):
    observer = Observer(4, now=clock)
    observer.landed()
    clock.pass_(2)
    with observer.paused():
        clock.pass_(1000)
    for _ in range(4):
        observer.landed()
    assert observer.values()["images_per_sec"] == 4 * 4 / 2


def test_before_any_update_there_is_little_to_say(clock):
    observer = Observer(4, now=clock)
    clock.pass_(1)
    assert observer.values() == {"images_per_sec": 0, "goodput": 0, "data_wait": 0}
    assert observer.summary() == "goodput 0%"


def test_timed_metrics_are_told_from_others(clock):
    observer = Observer(4, now=clock)
    for _ in range(3):
        update(clock, observer, 0, 0.5)
    assert all(TIMED.fullmatch(name) for name in [*observer.values(), "memory_peak_gib", "flop_utilisation"])
    assert not any(TIMED.fullmatch(name) for name in ("loss", "grad_norm", "learning_rate", "ema_accuracy"))


def test_a_trace_is_written_of_the_steps_asked_for(tmp_path):
    profile = Profile("2:3", tmp_path / "profile")
    due = []
    for step in range(1, 6):
        profile.before(step)
        jnp.ones(8).sum().block_until_ready()
        due.append(profile.after(step))
        if due[-1]:
            profile.close()
    assert due == [False, False, True, False, False]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    profile.close()


def test_no_trace_unless_asked_for(tmp_path):
    profile = Profile("", tmp_path / "profile")
    profile.before(1)
    assert not profile.after(1)
    profile.close()
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", ["10", "5:3", "0:2", "a:b", "1:2:3", "-1:4"])
def test_steps_that_are_no_range(steps, tmp_path):
    with pytest.raises(UserError, match=r"profile_steps '.*' must be FIRST:LAST"):
        Profile(steps, tmp_path)
