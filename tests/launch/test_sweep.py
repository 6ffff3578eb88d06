"""`cnx2 sweep`: real runs of digits, one of them killed; its commands; results of made-up runs."""

import argparse
import csv
import itertools
import json
import os
import shlex
import signal
import sys
import threading

import pytest
from PIL import Image

from cnx2_jax import cli
from cnx2_jax.commands import launch
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import RunError
from cnx2_jax.launch import job, results, runs
from cnx2_jax.tasks import TASKS
from cnx2_jax.train.task import ranked_by

pytestmark = pytest.mark.processes

CONFIG = """
from cnx2_jax.tasks import defaults
from cnx2_jax.recipes import use_digits
from cnx2_jax.sweeps import choice, product, random


def get_config(argument="tiny"):
    config = defaults("classify")
    use_digits(config)
    config.model.depths, config.model.dims = (1, 1, 1, 1), (4, 8, 8, 16)
    config.image_size = (16, 16)
    config.batch_size = 16
    config.total_steps = 6
    config.log_steps = config.checkpoint_steps = 1
    return config


def sweep_lr():
    return product(**{"optimizer.base_learning_rate": (1e-3, 1e-2, 1e-1)})


def sweep_erasing():  # which is done before the program that is compiled: once for all runs
    return product(**{"data.random_erasing": (0.0, 0.2, 0.4)})


def sweep_chosen():
    return random(9, 0, **{"batch_size": choice(16, 32), "model.dims": choice((4, 8, 8, 16))})


def sweep_wrong():
    return product(**{"optimizer.base_learning_rat": (1, 2)})


def sweep_alike():
    return [{"data.root": "a/b"}, {"data.root": "a b"}]


def sweep_none():
    return []
"""
NAMES = ["base_learning_rate=0.001", "base_learning_rate=0.01", "base_learning_rate=0.1"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def sweep(config, tmp_path, capfd):
    """The function `sweep(name, *arguments)` that returns the status, output and errors of `cnx2 sweep`."""

    def call(name, *arguments):
        where = ["--config", str(config), "--sweep", name, "--out", str(tmp_path / "out")]
        status = cli.main(["sweep", *where, *arguments])
        return status, *capfd.readouterr()

    return call


def test_a_sweep_leaves_out_what_is_finished_and_goes_on_with_what_broke_off(sweep, tmp_path, wait_for):
    out = tmp_path / "out"
    names = ["random_erasing=0.0", "random_erasing=0.2", "random_erasing=0.4"]
    killed, others = out / names[1], [out / names[0], out / names[2]]

    def kill():
        wait_for(lambda: any(killed.glob("checkpoints/[1-9]")))
        os.kill(int((out / "logs" / f"{killed.name}.pid").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    status, _, err = sweep("erasing", "--workers", "2")
    killer.join()
    assert status == 1
    assert err.splitlines()[-1].startswith(f"cnx2: stopped: 1 of 3 runs broke off ({killed.name})")
    assert not (killed / "result.json").exists()
    before = [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in others]

    _, dry, _ = sweep("erasing", "--dry-run")
    states = [line.rpartition(" ")[2] for line in dry.splitlines() if line.startswith("#")]
    assert states == ["finished", "begun", "finished"]
    status, printed, err = sweep("erasing")
    assert status == 0
    ended = [line for line in err.splitlines() if "ended with status" in line]
    assert ended == [f"{killed.name}: ended with status 0"]
    assert [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in others] == before
    assert "resuming after step" in (out / "logs" / f"{killed.name}.log").read_text()

    rows = json.loads((out / "results.json").read_text())
    assert [row["state"] for row in rows] == ["finished"] * 3 and {row["run"] for row in rows} == set(names)
    for row in rows:
        result = json.loads((out / row["run"] / "result.json").read_text())
        assert (row["step"], row["accuracy"]) == (6, result["accuracy"])
    assert [row["accuracy"] for row in rows] == sorted((row["accuracy"] for row in rows), reverse=True)
    assert json.loads(printed.splitlines()[-1]) == {"best": rows[0], "results": str(out / "results.json")}
    assert printed.splitlines()[2].split("|")[1].strip() == rows[0]["run"]


def test_dry_run_prints_commands_and_makes_nothing(sweep, config, tmp_path):
    status, out, err = sweep("lr", "--config.seed=3", "--dry-run")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[::2] == [f"# {name}: new" for name in NAMES]
    for name, line in zip(NAMES, lines[1::2], strict=True):
        workdir = tmp_path / "out" / name
        assert shlex.split(line) == [
            *["cnx2", "train", "--config", str(config), "--workdir", str(workdir)],
            *["--config.seed=3", f"--config.optimizer.{name}"],
        ]
    assert not (tmp_path / "out").exists()


def test_through_launch(sweep, tmp_path):
    status, out, _ = sweep("lr", "--dry-run", "--", "slurm", "--nodes", "4", "--time", "1:00:00")
    assert status == 0
    commands = [shlex.split(line) for line in out.splitlines()[1::2]]
    names = set()
    for arguments, name in zip(commands, NAMES, strict=True):
        split = arguments.index("--")
        assert arguments[:6] == [sys.executable, "-m", "cnx2_jax.cli", "launch", "slurm", "run"]
        assert arguments[split + 1 :][:2] == ["cnx2", "train"] and arguments[-1].endswith(name)
        parser = argparse.ArgumentParser()
        launch.add_arguments(parser)
        args = parser.parse_args(arguments[4:split])
        job.check_name(args.name)
        names.add(args.name)
        assert (args.nodes, args.record) == (4, tmp_path / "out" / "launch")
    assert len(names) == 3


# Runs what is submitted at once, as far as a workdir shows; one job is refused.
SBATCH = """
workdir=$(grep --only-matching -- '--workdir [^ ]*' "${!#}"); workdir=${workdir#--workdir }
[[ $workdir != *=0.1 ]] || exit 1
mkdir -p "$workdir"
echo '{"step": 6, "split": "val", "accuracy": 0.5}' | tee "$workdir/metrics.jsonl" >"$workdir/result.json"
"""


def test_launched_runs_are_finished_when_their_workdirs_say_so(
    sweep, recorder, repository, tmp_path, monkeypatch
):
    monkeypatch.chdir(repository())
    recorder("squeue")
    recorder("sbatch", SBATCH)
    arguments = ("--workers", "3", "--", "slurm", "--time", "1:00:00")
    for submitted in (3, 4):  # the second time what is finished is left out
        status, _, err = sweep("lr", *arguments)
        assert status == 1 and "1 of 3 runs broke off (base_learning_rate=0.1)" in err
        rows = json.loads((tmp_path / "out" / "results.json").read_text())
        states = [(row["run"], row["state"]) for row in rows]
        assert states == list(zip(NAMES, ("finished", "finished", "new"), strict=True))
        assert len([line for line in recorder.calls() if line.startswith("sbatch")]) == submitted


@pytest.fixture
def made_up(tmp_path):
    """Three runs of sweep lr as if trained: one at its end, one under way, one not yet evaluated."""
    for name, state, losses in zip(
        NAMES, ("result", "config", "config"), ([3.0, 2.0], [1.0, 1.5], []), strict=True
    ):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / f"{state}.json").write_text("{}")
        rows = [
            {"step": 3 * step, "split": split, "loss": loss if split == "val" else 0, "accuracy": 1 / loss}
            for step, loss in enumerate(losses, 1)
            for split in ("val", "train")
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("metric", "values"), [([], [1 / 1.5, 0.5, None]), (["--metric", "loss"], [1.5, 2.0, None])]
)
def test_results_are_of_the_latest_evaluation_best_first(sweep, made_up, metric, values):
    status, out, err = sweep("lr", "--table", *metric)
    assert status == 0, err
    name = metric[1] if metric else "accuracy"
    rows = json.loads((made_up / "results.json").read_text())
    assert [row[name] for row in rows] == values
    assert [row["run"] for row in rows] == [NAMES[1], NAMES[0], NAMES[2]]
    assert [row["state"] for row in rows] == ["begun", "finished", "begun"]
    assert [row["step"] for row in rows] == [6, 6, None]
    assert [row["optimizer.base_learning_rate"] for row in rows] == [1e-2, 1e-3, 1e-1]
    with (made_up / "results.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == [row["run"] for row in rows]
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({len(line) for line in table}) == 1
    if "matplotlib is not installed" not in err:
        assert Image.open(made_up / "results.png").size[0] > 300


def test_equal_draws_are_one_run(sweep):
    status, out, _ = sweep("chosen", "--dry-run")
    assert status == 0
    assert sorted(out.splitlines()[::2]) == [
        "# batch_size=16,dims=_4,_8,_8,_16_: new",
        "# batch_size=32,dims=_4,_8,_8,_16_: new",
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("l", [], "has no sweep 'l'; did you mean 'lr'? (known: lr, erasing, chosen, wrong, alike, none)"),
        ("wrong", [], "unknown config key 'optimizer.base_learning_rat'"),
        ("alike", [], "two runs called 'root=a_b'"),
        ("none", [], "sweep 'none' of"),
        ("lr", ["--config.batch_sise=3"], "unknown config key 'batch_sise'"),
        ("lr", ["--config.optimizer.base_learning_rate=1"], "is what sweep 'lr' changes"),
        ("lr", ["--workers", "0"], "--workers: '0' is not a whole number from 1 on"),
        ("lr", ["--worker"], "--worker"),
    ],
)
def test_bad_arguments(sweep, tmp_path, name, arguments, said):
    status, out, err = sweep(name, *arguments)
    assert status == 2 and out == ""
    assert said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "metric", "smaller"),
    [
        ("pretrain:digits", "loss", True),
        ("finetune:tiny", "ema_accuracy", False),
        ("multilabel:digits", "map", False),
        ("regress:digits", "rmse", True),
        ("regress:tiny", "ema_rmse", True),
        ("segment:digits", "miou", False),
        ("detect:digits", "box_ap", False),
    ],
)
def test_runs_are_ranked_by_what_chooses_their_best_checkpoint(recipe, metric, smaller):
    config = load_config(recipe)
    name, end = ranked_by(TASKS[config.task].best, config)
    assert (name, end) == (metric, "min" if smaller else "max")
    assert results.smaller_is_better(metric) is smaller
    assert results.smaller_is_better(f"{metric}_age") is smaller  # of one target


def test_an_unknown_metric_is_named(sweep, made_up):
    status, _, err = sweep("lr", "--table", "--metric", "acuracy")
    assert status == 2
    assert "no evaluation has a metric 'acuracy'; did you mean 'accuracy'? (known: accuracy, loss)" in err
    assert not (made_up / "results.json").exists()


def test_no_more_runs_at_a_time_than_workers(tmp_path):
    arguments = ["bash", "-c", f"echo 1 >>{tmp_path}/steps; sleep 0.3; echo -1 >>{tmp_path}/steps; exit $0"]
    commands = {f"run{index}": [*arguments, str(index)] for index in range(5)}
    statuses = runs.run_all(commands, tmp_path, 2)
    assert statuses == {f"run{index}": index for index in range(5)}
    running = list(itertools.accumulate(map(int, (tmp_path / "steps").read_text().split())))
    assert max(running) == 2 and running[-1] == 0


def test_a_sweep_that_is_stopped_stops_its_runs(tmp_path, wait_for):
    arguments = ["bash", "-c", "trap 'echo saved >$0; exit' TERM; touch $0; while :; do sleep 0.1; done"]
    commands = {name: [*arguments, str(tmp_path / name)] for name in ("a", "b", "c")}

    def stop():
        wait_for(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(RunError, match="the same command resumes"):
        runs.run_all(commands, tmp_path, 2)
    stopper.join()
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["saved\n"] * 2
    assert not (tmp_path / "c").exists()
