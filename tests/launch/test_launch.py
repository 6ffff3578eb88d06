"""The local backend of `cnx2 launch`: real processes, real signals, a real git repository."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from cnx2_jax import cli
from cnx2_jax.launch import pid_files
from cnx2_jax.launch.plan import delays

pytestmark = pytest.mark.processes

# A stand-in for `cnx2 train`: counts to 40 in a file and, when started again, resumes from the count there.
COUNT = """
import os, signal, sys, time
from pathlib import Path

folder, flags = Path(sys.argv[1]), sys.argv[2:]
host = flags[flags.index("--process-id") + 1] if flags else "0"
file = folder / f"count{host}"
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
begin = int(file.read_text()) if file.exists() else 0
print("from", begin, *flags, flush=True)
for count in range(begin, 40):
    file.write_text(str(count + 1))
    time.sleep(float(os.environ.get("PAUSE", 0.05)))
    if stopped:
        print("stopped", flush=True)
        sys.exit(0)
print("done", flush=True)
"""
# 40 counts then take long enough for other commands to start on a busy machine.
SLOWLY = {"PAUSE": "0.5"}
DEAF = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[-1] == "0":
    sys.exit(3)
time.sleep(600)
"""


@pytest.fixture
def launch(repository, start_launch):
    """The function `launch(action, *arguments)` in a repository with count.py and deaf.py, and its root."""
    root = repository(count_py=COUNT, deaf_py=DEAF)

    def start(*arguments, **options):
        return start_launch("local", *arguments, cwd=root, **options)

    start.root = root
    start.record = root / "runs" / "launch"
    return start


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out, err


def one_line(process, *said):
    """Asserts that a process ends as after a user's mistake: status 2, one line, and nothing on stdout."""
    out, err = finish(process, 2)
    assert out == "" and len(err.splitlines()) == 1, err
    for text in said:
        assert text in err


def pids(record, name):
    """Of the living processes of a job, by name."""
    folder = record / name / "pids"
    return {
        path.name: int(path.read_text())
        for path in folder.glob("host*")
        if path.exists() and path.read_text() and subprocess.run(["flock", "-n", path, "true"]).returncode
    }


def test_hosts_run_the_commit_and_are_told_of_each_other(launch, tmp_path):
    arguments = ("run", "--name", "two", "--hosts", "2", "--", "python", "count.py", tmp_path)
    out, _ = finish(launch(*arguments))
    found = json.loads(out)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=launch.root, capture_output=True, text=True
    ).stdout
    assert (found["state"], found["attempt"], found["status"]) == ("finished", 1, 0)
    assert found["commit"] == commit.strip() and found["alive"] == []
    first, second = (
        (launch.record / "two" / "logs" / f"host{host}.log").read_text().splitlines() for host in (0, 1)
    )
    assert first[1:] == second[1:] == ["done"]
    arguments, others = first[0].split(), second[0].split()
    assert arguments[:3] == ["from", "0", "--coordinator"] and arguments[3].startswith("127.0.0.1:")
    assert arguments[4:] == ["--num-processes", "2", "--process-id", "0"]
    assert others == [*arguments[:-1], "1"]

    assert json.loads(finish(launch("status", "--name", "two"))[0]) == found
    logs, _ = finish(launch("logs", "--name", "two"))
    assert f"==> host1 <==\n{chr(10).join(second)}\n" in logs
    assert json.loads(finish(launch("stop", "--name", "two"))[0]) == found  # nothing is left to stop


def test_a_killed_worker_ends_the_others_and_all_go_on(launch, tmp_path, wait_for):
    arguments = ("--name", "killed", "--hosts", "2", "--retries", "1", "--backoff", "0.1", "--grace", "30")
    running = launch("run", *arguments, "--", "python", "count.py", tmp_path)
    wait_for(lambda: (tmp_path / "count1").exists() and (tmp_path / "count0").exists())
    os.kill(wait_for(lambda: pids(launch.record, "killed").get("host1")), signal.SIGKILL)
    out, err = finish(running)
    assert json.loads(out)["state"] == "finished" and json.loads(out)["attempt"] == 2
    assert "host1 ended with status -9" in err and "again in 0.1 s" in err

    logs = [
        (launch.record / "killed" / "logs" / f"host{host}.log").read_text().splitlines() for host in (0, 1)
    ]
    assert logs[0][1] == "stopped"  # by SIGTERM, in time to save
    for lines in logs:
        separator = lines.index("--- attempt 1") if "--- attempt 1" in lines else lines.index("--- attempt 2")
        begin = int(lines[separator + 1].split()[1])
        assert 0 < begin < 40 and lines[-1] == "done"
    assert [(tmp_path / f"count{host}").read_text() for host in (0, 1)] == ["40", "40"]


def test_who_does_not_heed_sigterm_is_killed_after_the_grace(launch):
    arguments = ("--name", "deaf", "--hosts", "2", "--retries", "0", "--grace", "0.5")
    out, err = finish(launch("run", *arguments, "--", "python", "deaf.py"), 1)
    assert json.loads(out)["state"] == "failed" and json.loads(out)["alive"] == []
    assert "host0 ended with status 3" in err


@pytest.mark.parametrize(("status", "attempts", "ours"), [(2, 1, 2), (3, 3, 1)])
def test_failures_are_retried_unless_they_are_the_users(launch, status, attempts, ours):
    arguments = ("--name", "failing", "--retries", "2", "--backoff", "0.01")
    out, err = finish(launch("run", *arguments, "--", "bash", "-c", f"exit {status}"), ours)
    assert json.loads(out)["attempt"] == attempts and json.loads(out)["status"] == status
    assert err.count("ended with status") == attempts
    assert "Traceback" not in err

    # What failed may be put right under the same name; what did not keeps its name.
    finish(launch("run", "--name", "failing", "--", "true"))
    one_line(launch("run", "--name", "failing", "--", "false"), "is of another command (local: true)")


def test_delays_double_up_to_a_limit():
    assert delays(8, 10) == [10, 20, 40, 80, 160, 320, 600, 600]
    assert delays(0, 10) == []


def test_a_running_job_is_refused_and_stop_ends_it(launch, tmp_path, wait_for):
    arguments = ("run", "--name", "long", "--", "python", "count.py", tmp_path)
    running = launch(*arguments, env={**os.environ, **SLOWLY})
    wait_for((tmp_path / "count0").exists)
    one_line(launch(*arguments), "'long' runs already")
    status = json.loads(finish(launch("status", "--name", "long"))[0])
    assert status["state"] == "running" and status["alive"] == ["host0", "launcher"]
    stopped = json.loads(finish(launch("stop", "--name", "long"))[0])
    assert stopped["state"] == "stopped" and stopped["alive"] == []
    out, _ = finish(running)
    assert json.loads(out)["state"] == "stopped"
    assert "stopped" in (launch.record / "long" / "logs" / "host0.log").read_text()
    assert int((tmp_path / "count0").read_text()) < 40
    assert json.loads(finish(launch(*arguments))[0])["state"] == "finished"


def test_workers_whose_launcher_was_killed_are_found_and_stopped(launch, tmp_path, wait_for):
    arguments = ("run", "--name", "orphan", "--", "python", "count.py", tmp_path)
    running = launch(*arguments, env={**os.environ, **SLOWLY})
    wait_for((tmp_path / "count0").exists)
    running.kill()
    running.communicate()
    assert json.loads(finish(launch("status", "--name", "orphan"))[0])["state"] == "orphaned"
    one_line(launch(*arguments), "host0 of job 'orphan' still run", "stop")
    assert json.loads(finish(launch("stop", "--name", "orphan"))[0])["alive"] == []
    assert json.loads(finish(launch("status", "--name", "orphan"))[0])["state"] == "stopped"
    assert json.loads(finish(launch(*arguments))[0])["state"] == "finished"


def test_dry_run_prints_what_would_be_run(launch, tmp_path):
    arguments = ("run", "--name", "dry", "--hosts", "2", "--dry-run", "--", "python", "count.py", tmp_path)
    printed, err = finish(launch(*arguments))
    assert err == "" and not launch.record.exists()
    subprocess.run(["bash", "-c", printed], check=True, timeout=60)
    assert [(tmp_path / f"count{host}").read_text() for host in (0, 1)] == ["40", "40"]
    for host in (0, 1):
        assert "done" in (launch.record / "dry" / "logs" / f"host{host}.log").read_text()


def test_what_no_commit_holds_is_refused(launch):
    (launch.root / "new.py").write_text("")
    (launch.root / "count.py").write_text("pass")
    one_line(launch("run", "--name", "dirty", "--", "true"), "count.py, new.py", "commit")
    assert not launch.record.exists()


def test_outside_a_repository(start_launch, tmp_path):
    one_line(
        start_launch("local", "run", "--name", "x", "--", "true", cwd=tmp_path), "not in a git repository"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--name", "x"], "run needs a command after --"),
        (["run", "--name", "X_1", "--", "true"], "job name 'X_1' must be"),
        (["run", "--name", "x" * 41, "--", "true"], "at most 40"),
        (
            ["run", "--name", "x", "--hosts", "0", "--", "true"],
            "--hosts: '0' is not a whole number",
        ),
        (["run", "--name", "x", "--retries", "-1", "--", "true"], "--retries -1 must be"),
        (["run", "--name", "x", "--env", "NOT_SET", "--", "true"], "--env NOT_SET: there is no such"),
        (["run", "--name", "x", "--", "cnx2", "train", "--workdir", "runs/a"], "--workdir runs/a would be"),
        (["run", "--name", "x", "--", "cnx2", "train", "--workdir=a"], "--workdir a would be"),
        (["status", "--name", "x"], "no local job 'x' has its record in 'runs/launch'"),
        (["stop", "--name", "x", "--", "true"], "stop takes no command"),
        (["restart", "--name", "x"], "invalid choice: 'restart'"),
    ],
)
def test_bad_arguments(repository, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(repository())
    assert cli.main(["launch", "local", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_program_that_is_not_there_is_named(launch):
    _, err = finish(launch("run", "--name", "x", "--", "no-such-program"), 2)
    assert err.splitlines()[-1] == "cnx2: error: cannot run 'no-such-program': No such file or directory"
    assert json.loads(finish(launch("status", "--name", "x"))[0])["state"] == "failed"


def test_a_secret_is_not_repeated_by_an_error(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository())
    arguments = ["local", "run", "--name", "x", "--env", "TOKEN=hunter2", "--", "true"]
    assert cli.main(["launch", *arguments]) == 2
    assert "hunter2" not in capsys.readouterr().err


def test_the_id_of_an_ended_process_is_ignored(tmp_path):
    path = tmp_path / "pid"
    path.write_text("1")
    assert pid_files.holder(path) is None
    descriptor = pid_files.claim(path)
    assert pid_files.holder(path) is None  # claimed, and not yet signed
    pid_files.sign(descriptor, 4321)
    assert pid_files.holder(path) == 4321
    with pytest.raises(BlockingIOError):
        pid_files.claim(path)
    os.close(descriptor)
    assert pid_files.holder(path) is None


def test_a_training_run_whose_worker_is_killed_goes_on_from_its_checkpoint(launch, tmp_path, wait_for):
    workdir, recipe = tmp_path / "run", Path(__file__).parents[2] / "configs" / "finetune.py:digits"
    small = [
        "--config.model.depths=(1,1,1,1)", "--config.model.dims=(4,8,8,16)", "--config.image_size=16",
        "--config.batch_size=16", "--config.total_steps=60", "--config.log_steps=1",
        "--config.checkpoint_steps=5", "--config.eval_epochs=0",
    ]  # fmt: skip
    arguments = ("--name", "train", "--hosts", "2", "--retries", "1", "--backoff", "0.1")
    command = ["cnx2", "train", "--config", recipe, "--workdir", workdir, *small]
    kept = {"JAX_COMPILATION_CACHE_DIR": tmp_path / "kept", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    running = launch("run", *arguments, "--", *command, env={**os.environ, **kept})
    wait_for(lambda: (workdir / "checkpoints" / "5").exists())
    os.kill(pids(launch.record, "train")["host1"], signal.SIGKILL)
    out, err = finish(running)
    assert json.loads(out)["state"] == "finished" and json.loads(out)["attempt"] == 2, err
    log = (launch.record / "train" / "logs" / "host0.log").read_text()
    assert "host1 ended with status -9" in err and "resuming after step" in log
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 61))
    assert (workdir / "checkpoints" / "60").is_dir()
