"""How long a run takes: the formulas against drawn runs and against search, and errors for bad arguments."""

import json
import math

import numpy as np
import pytest

from experiments import run_cost

WORK, SAVE, RESTART = 20 * 3600.0, 10.0, 300.0
FOUND = {"batch_size": 4096, "devices": 256, "hosts": 32, "images_per_second_per_host": 1280.0}


@pytest.mark.parametrize("between", [3 * 3600.0, 40 * 3600.0])
def test_drawn_runs_take_what_the_formula_expects(between):
    rng = np.random.default_rng(0)
    interval = WORK / 100
    drawn = [run_cost.simulate(WORK, interval, SAVE, RESTART, between, rng) for _ in range(4000)]
    expected = run_cost.expected_seconds(WORK, interval, SAVE, RESTART, between)
    # The formula has a restart before the first step too.
    error = np.std(drawn) / math.sqrt(len(drawn))
    assert abs(np.mean(drawn) - expected) < 4 * error + RESTART


@pytest.mark.parametrize("between", [3600.0, 8 * 3600.0, 100 * 3600.0])
@pytest.mark.parametrize("save", [1.0, 60.0])
def test_no_other_interval_is_better(save, between):
    best = run_cost.best_interval(save, between)
    others = [
        run_cost.expected_seconds(WORK, best * factor, save, RESTART, between)
        for factor in np.geomspace(0.1, 10, 201)
    ]
    assert run_cost.expected_seconds(WORK, best, save, RESTART, between) <= 1.0005 * min(others)


def test_without_failures_only_saving_takes_time():
    assert run_cost.expected_seconds(WORK, WORK / 4, SAVE, RESTART, math.inf) == WORK + 4 * SAVE
    rng = np.random.default_rng(0)
    assert run_cost.simulate(WORK, WORK / 4, SAVE, RESTART, math.inf, rng) == WORK + 4 * SAVE


def study(tmp_path, found, *arguments):
    path = tmp_path / "found.json"
    path.write_text("a table\n" + json.dumps(found) + "\n")
    return run_cost.main(["--preflight", str(path), "--epochs", "800", "--simulations", "20", *arguments])


def test_a_run_of_the_paper(tmp_path, capsys):
    assert study(tmp_path, FOUND, "--failures-per-day", "4", "--price", "1.5") == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert (found["steps"], found["step_seconds"]) == (250_228, 0.1)
    best = found["best"]
    # Young's first order: the square root of 2 x 5 s x 6 hours, less the 5 s.
    assert best["checkpoint_steps"] * 0.1 == pytest.approx(math.sqrt(2 * 5 * 6 * 3600) - 5, rel=0.01)
    assert best["hours"] * best["goodput"] == pytest.approx(250_228 * 0.1 / 3600)
    assert best["cost"] == pytest.approx(best["hours"] * 256 * 1.5)
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == 7


def test_without_failures_one_checkpoint_is_best(tmp_path, capsys):
    assert study(tmp_path, FOUND, "--failures-per-day", "0", "--step-seconds", "0.2") == 0
    best = json.loads(capsys.readouterr().out.splitlines()[-1])["best"]
    assert best["checkpoint_steps"] == 250_228 and best["goodput"] > 0.9999


@pytest.mark.parametrize(
    ("found", "arguments", "message"),
    [
        (FOUND, ("--failures-per-day", "-1"), "-1 must not be negative"),
        (FOUND, ("--failures-per-day", "1", "--save-seconds", "0"), "must be above 0"),
        ([], ("--failures-per-day", "1"), "does not end with the JSON line"),
        ({"batch_size": 1}, ("--failures-per-day", "1"), "does not end with the JSON line"),
        ({"batch_size": 1, "devices": 1, "hosts": 1}, ("--failures-per-day", "1"), "give --step-seconds"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, found, arguments, message):
    assert study(tmp_path, found, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
