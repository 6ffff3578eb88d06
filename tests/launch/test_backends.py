"""The cloud and Slurm backends: golden scripts, shellcheck, and runs in which recorders stand in for tools.

The tests need neither a cloud nor Slurm. The scripts are compared with those in tests/golden/launch, which
shellcheck reads; `python -m tests.launch.make_launch_golden` rewrites them. In the runs, gcloud, xpk, sbatch,
srun and squeue are stand-ins that record their arguments and do just enough for the rest to continue: the
remote scripts really run.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cnx2_jax import cli
from cnx2_jax.launch import gke, plan, tpu_vm, xpk
from cnx2_jax.launch import job as record
from cnx2_jax.launch.backends import BACKENDS

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
SECRET = "hunter2 'and' \"quotes\" $HOME \\"
COMMAND = ["cnx2", "train", "--config", "configs/pretrain.py:tiny", "--workdir", "/shared/runs/a b"]
OPTIONS = {
    "tpu_vm": {
        "zone": "us-central1-a",
        "accelerator_type": "v5litepod-16",
        "runtime_version": "v2-alpha-tpuv5-lite",
        "spot": True,
    },
    "xpk": {
        "cluster": "pods",
        "zone": "us-central1-a",
        "project": "my-project",
        "tpu_type": "v5litepod-16",
        "num_slices": 2,
        "base_docker_image": "python:3.11",
    },
    "gke": {
        "topology": "v6e:4x4",
        "slices": 2,
        "image": "us-docker.pkg.dev/my-project/images/cnx2",
        "dockerfile": gke.DOCKERFILE,
        "namespace": "research",
        "queue": "pods",
        "spot": True,
        "secret": "tokens",
        "claim": ["runs:/mnt/runs", "images:/mnt/images"],
    },
    "slurm": {"nodes": 4, "time": "24:00:00", "gpus_per_node": 8, "partition": "gpu", "account": None},
    "local": {"hosts": 2},
}
# What a host runs; it is inside the scripts as a here-document, where shellcheck does not look.
INNER = {"tpu_vm": "run_script", "slurm": "batch_script"}


def golden_scripts(monkeypatch):
    """Returns every script that is stored, by file name."""
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr("sys.executable", "/venv/bin/python")
    scripts = {}
    for name, options in OPTIONS.items():
        backend = BACKENDS[name.replace("_", "-")]
        if hasattr(backend, "SETUP"):
            options = {**options, "setup": backend.SETUP}
        job = record.Job(
            folder=Path("/my jobs/pretrain"),
            name="pretrain",
            backend=name.replace("_", "-"),
            command=COMMAND,
            commit="0123456789abcdef0123456789abcdef01234567",
            repository=Path("/home/me/cnx2_jax"),
            env=[] if name == "gke" else ["WANDB_API_KEY"],
            options=options,
            retries=3,
            backoff=10.0,
            grace=60.0,
        )
        scripts[f"{name}.sh"] = re.sub(
            r"127\.0\.0\.1:\d+", "127.0.0.1:1234", plan.render(job, backend.plan(job))
        )
        if name in INNER:
            scripts[f"{name}_host.sh"] = getattr(backend, INNER[name])(job)
        others = [*backend.status(job), *backend.logs(job), *backend.stop(job)]
        if others:
            scripts[f"{name}_others.sh"] = plan.script(others)
    return scripts


def test_golden_scripts(monkeypatch):
    scripts = golden_scripts(monkeypatch)
    assert scripts.keys() == {path.name for path in GOLDEN.glob("*")}
    for name, text in scripts.items():
        assert text == (GOLDEN / name).read_text(), name


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    program = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def job(repository, monkeypatch, capsys, tmp_path):
    """The function `job(backend, action, *options)` that returns the status and output of `cnx2 launch`.

    The command records a secret, and all command lines that it sees.
    """
    command = (
        'echo "$1 $TOKEN" >>"$2/said"; cat /proc/[0-9]*/cmdline >>"$2/lines" 2>/dev/null;'
        'cat "$2/said.fails" 2>/dev/null && rm "$2/said.fails" && exit 7; true'
    )
    root = repository(greet_sh=command)
    monkeypatch.chdir(root)
    monkeypatch.setenv("TOKEN", SECRET)

    def call(backend, action, *options):
        if action == "run":
            secret = [] if backend == "gke" else ["--env", "TOKEN"]
            options = [*secret, "--backoff", "0.01", *options]
        command = ["--", "bash", "greet.sh", "hello there", str(tmp_path)] if action == "run" else []
        status = cli.main(["launch", backend, action, "--name", "job", *options, *command])
        return status, *capsys.readouterr()

    call.folder = root / "runs" / "launch" / "job"
    return call


@pytest.fixture
def seen(monkeypatch):
    """All command lines of this machine while the test runs, as often as they can be read.

    A short one may escape it: the command that is launched notes those that it sees itself.
    """
    lines: set[bytes] = set()
    done = threading.Event()

    def look():
        while not done.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    lines.add(path.read_bytes())
                except OSError:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    yield lines
    done.set()
    thread.join()


# A queued resource whose state is a file, and a host whose home is a folder. With a file `first` there, the
# slice is taken away as the command begins.
GCLOUD = """
state=STATE host=HOST; mkdir -p "$host"
for word in "$@"; do case "$word" in --command=*) command=${word#--command=} ;; esac; done
case "$*" in
  *"queued-resources describe"*)
    cat "$state" || exit 1
    [ "$(cat "$state")" = ACTIVE ] || [ "$(cat "$state")" = SUSPENDED ] || echo ACTIVE >"$state" ;;
  *"queued-resources create"*) echo WAITING_FOR_RESOURCES >"$state" ;;
  *"queued-resources delete"*) rm "$state" ;;
  *"tpu-vm scp"*)
    for word in "$@"; do
      if [ -f "$word" ]; then cp --preserve=mode "$word" "$host/cnx2/job/"; fi
    done
    stat --format=%a "$host/cnx2/job/environment" >>"$host/modes" ;;
  *"tpu-vm ssh"*run.sh*)
    if [ -e "$host/first" ]; then rm "$host/first"; echo SUSPENDED >"$state"; exit 255; fi
    cd "$host" && env --unset=TOKEN HOME="$host" bash -c "$command" ;;
  *"tpu-vm ssh"*) cd "$host" && HOME="$host" bash -c "$command" ;;
esac
"""
TPU = ("--zone", "z", "--accelerator-type", "v5litepod-16", "--runtime-version", "v2", "--setup", "true")


@pytest.fixture
def cloud(recorder, tmp_path):
    """A folder with the state of the queued resource and the host's home."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    body = GCLOUD.replace("STATE", str(folder / "state")).replace("HOST", str(folder / "host"))
    recorder("gcloud", body)
    recorder("sleep")
    return folder


def verbs(calls):
    """Returns the kind of each call, without repetitions."""
    found = [re.search(r"(queued-resources|tpu-vm) (\w+)|sleep", line).group() for line in calls]
    return [verb for verb, before in zip(found, [None, *found], strict=False) if verb != before]


def test_tpu_vm_runs_the_commit_on_the_host_and_gives_the_slice_back(job, cloud, recorder, tmp_path, seen):
    status, out, err = job("tpu-vm", "run", *TPU)
    assert status == 0, err + (job.folder / "logs" / "prepare.log").read_text()
    assert json.loads(out)["state"] == "finished"
    assert (tmp_path / "said").read_text() == f"hello there {SECRET}\n"
    assert verbs(recorder.calls()) == [
        "queued-resources describe",
        "queued-resources create",
        "queued-resources describe",
        "sleep",
        "queued-resources describe",
        "tpu-vm ssh",
        "tpu-vm scp",
        "tpu-vm ssh",
    ]
    # The secret came by a file that only its owner could read, and that is gone.
    assert (cloud / "host" / "modes").read_text() == "600\n"
    left = [path for folder in (job.folder, cloud) for path in folder.rglob("*") if path.is_file()]
    assert len(left) > 5
    assert not [path for path in left if b"hunter2" in path.read_bytes()]
    seen.add((tmp_path / "lines").read_bytes())
    assert any(b"greet.sh" in line for line in seen)
    assert not [line for line in seen if b"hunter2" in line]
    assert not [line for line in recorder.calls() if "hunter2" in line]

    (cloud / "host" / "cnx2" / "job" / "log").write_text("step 1\n")
    assert job("tpu-vm", "logs")[0] == 0
    assert job("tpu-vm", "status")[0] == 0
    assert "delete" not in " ".join(recorder.calls())
    assert job("tpu-vm", "stop")[0] == 0
    assert recorder.calls()[-1].split()[3:] == [
        "queued-resources",
        "delete",
        "job",
        "--zone=z",
        "--force",
        "--quiet",
    ]
    assert not (cloud / "state").exists()


def test_a_preempted_slice_is_asked_for_anew(job, cloud, recorder, tmp_path):
    (cloud / "host").mkdir()
    (cloud / "host" / "first").touch()
    status, out, err = job("tpu-vm", "run", *TPU, "--spot")
    assert status == 0, err
    assert json.loads(out)["attempt"] == 2
    assert (tmp_path / "said").read_text() == f"hello there {SECRET}\n"
    created = [line for line in recorder.calls() if "queued-resources create" in line]
    assert len(created) == 2 and all("--spot" in line for line in created)
    assert verbs(recorder.calls()).count("queued-resources delete") == 1


def test_a_host_that_fails_shows_its_output_and_is_retried(job, cloud, tmp_path):
    (tmp_path / "said.fails").write_text("out of memory\n")
    status, out, _ = job("tpu-vm", "run", *TPU)
    assert status == 0 and json.loads(out)["attempt"] == 2
    assert "out of memory" in (job.folder / "logs" / "hosts.log").read_text()
    assert len((tmp_path / "said").read_text().splitlines()) == 2


def test_clearing_a_host_ends_what_holds_its_lock(job, cloud, wait_for, tmp_path):
    assert job("tpu-vm", "run", *TPU)[0] == 0
    host = cloud / "host"
    (host / "cnx2" / "job" / "source" / "long.sh").write_text('echo $$ >"$HOME/pid"; exec tail -f /dev/null')
    run = "exec 9>lock; flock --nonblock 9; exec bash source/long.sh"
    running = subprocess.Popen(
        ["bash", "-c", run], cwd=host / "cnx2" / "job", env={**os.environ, "HOME": str(host)}
    )
    wait_for(lambda: (host / "pid").exists() and (host / "pid").read_text())
    found = record.read(job.folder)
    subprocess.run(["bash", "-c", tpu_vm.clear(found)[0]], check=True)
    assert running.wait(timeout=30) == -15


SLURM = ("--nodes", "2", "--time", "1:00:00")


def test_slurm_submits_a_job_that_retries(job, recorder, tmp_path):
    recorder("squeue")
    recorder("sbatch", 'bash "${!#}"')
    recorder("srun", 'while [[ $1 == --* ]]; do shift; done; "$@"')
    recorder("sleep")
    (tmp_path / "said.fails").touch()
    status, out, err = job("slurm", "run", *SLURM, "--retries", "2")
    assert status == 0, err + (job.folder / "logs" / "submit.log").read_text()
    assert json.loads(out)["state"] == "submitted"
    assert (tmp_path / "said").read_text() == f"hello there {SECRET}\n" * 2
    calls = recorder.calls()
    assert [line.split()[0] for line in calls] == ["squeue", "sbatch", "srun", "sleep", "srun"]
    assert not [line for line in calls if "hunter2" in line]
    assert "--export=ALL" in calls[1]
    assert b"hunter2" not in (job.folder / "batch.sh").read_bytes()

    recorder("scancel")
    assert json.loads(job("slurm", "stop")[1])["state"] == "stopped"
    assert recorder.calls()[-1].split() == ["scancel", "--me", "--name=job"]


@pytest.mark.parametrize(("status", "runs"), [(0, 1), (2, 1), (5, 3)])
def test_a_slurm_job_ends_as_its_command_does(job, recorder, status, runs):
    recorder("squeue")
    recorder("sbatch")
    assert job("slurm", "run", *SLURM, "--retries", "2")[0] == 0
    recorder("srun", f"exit {status}")
    recorder("sleep")
    assert subprocess.run(["bash", job.folder / "batch.sh"], capture_output=True).returncode == status
    assert len([line for line in recorder.calls() if line.startswith("srun")]) == runs


def test_slurm_does_not_submit_what_is_in_the_queue(job, recorder):
    recorder("squeue", "echo 17")
    recorder("sbatch")
    status, out, _ = job("slurm", "run", *SLURM)
    assert status == 1 and json.loads(out)["state"] == "failed"
    assert "in the queue already" in (job.folder / "logs" / "prepare.log").read_text()
    assert [line.split()[0] for line in recorder.calls()] == ["squeue"]


XPK = ("--cluster", "c", "--zone", "z", "--project", "p", "--tpu-type", "v5litepod-16", "--setup", "true")


def test_xpk_creates_a_workload_of_the_commit(job, recorder, tmp_path):
    # As xpk does: the command runs in a copy of the script folder, with variables named by the file.
    body = f"""
    for word in "$@"; do case "$word" in
      --command=*) command=${{word#--command=}} ;;
      --script-dir=*) tree=${{word#--script-dir=}} ;;
      --env-file=*) names=$(cat "${{word#--env-file=}}") ;;
    esac; done
    [ "$2" = create ] || exit 0
    echo "$names" >{tmp_path}/names; cd "$tree" && bash -c "$command"
    """
    recorder("xpk", body)
    status, out, err = job("xpk", "run", *XPK, "--retries", "5")
    assert status == 0, err
    assert json.loads(out)["state"] == "submitted"
    assert (tmp_path / "said").read_text() == f"hello there {SECRET}\n"
    assert (tmp_path / "names").read_text() == "TOKEN\n"
    assert "--max-restarts=5" in recorder.calls()[0]
    restarted = [part.split("-") for part in xpk.RESTARTED.split(",")]
    assert not any(int(part[0]) <= 2 <= int(part[-1]) for part in restarted)  # a user's mistake
    assert "hunter2" not in recorder.calls()[0]
    assert stat.S_ISREG((job.folder / "environment").stat().st_mode)
    assert "hunter2" not in (job.folder / "environment").read_text()
    assert job("xpk", "status")[0] == 0 and "workload list" in recorder.calls()[-1]
    assert job("xpk", "stop")[0] == 0 and "workload delete" in recorder.calls()[-1]


GKE = ("--image", "registry/cnx2", "--topology")


def submitted(job, recorder, *options):
    """Returns the JobSet that `cnx2 launch gke run` gives to kubectl."""
    recorder("docker", '[ "$1" != manifest ]')  # there is no such image yet
    recorder("kubectl")
    status, out, err = job("gke", "run", *GKE, *options)
    assert status == 0, err + (job.folder / "logs" / "prepare.log").read_text()
    assert json.loads(out)["state"] == "submitted"
    return json.loads((job.folder / "jobset.json").read_text())


def test_gke_builds_the_image_and_creates_a_jobset(job, recorder):
    found = submitted(job, recorder, "v6e:4x4", "--slices", "3", "--retries", "5", "--grace", "90")
    calls = [line.split() for line in recorder.calls()]
    assert [call[:2] for call in calls[:3]] == [["docker", verb] for verb in ("manifest", "build", "push")]
    commit = json.loads((job.folder / "job.json").read_text())["commit"]
    assert calls[2][-1] == f"registry/cnx2:{commit}"
    assert calls[3] == ["kubectl", "--namespace=default", "create", f"--filename={job.folder}/jobset.json"]
    (slices,) = found["spec"]["replicatedJobs"]
    of_slice = slices["template"]["spec"]
    pod = of_slice["template"]["spec"]
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert (slices["replicas"], of_slice["parallelism"], of_slice["completions"]) == (3, 4, 4)
    assert pod["terminationGracePeriodSeconds"] == 90
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["command"][:3] == ["bash", "greet.sh", "hello there"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container.keys().isdisjoint({"envFrom", "volumeMounts"})
    for action, verb in (("status", "get"), ("logs", "logs"), ("stop", "delete")):
        assert job("gke", action)[0] == 0
        assert f" {verb} " in recorder.calls()[-1]
    assert "--max-log-requests=12" in " ".join(recorder.calls())


def test_gke_keeps_an_image_that_exists(job, recorder):
    recorder("docker")
    recorder("kubectl")
    assert job("gke", "run", *GKE, "v5e:2x2")[0] == 0
    assert [line.split()[:2] for line in recorder.calls()][:2] == [
        ["docker", "manifest"],
        ["kubectl", "--namespace=default"],
    ]


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"), [("v5e:1x1", 1, 1), ("v5p:2x2x1", 1, 4), ("v4:4x4x4", 16, 4)]
)
def test_one_pod_per_host(job, recorder, topology, hosts, chips):
    (slices,) = submitted(job, recorder, topology)["spec"]["replicatedJobs"]
    spec = slices["template"]["spec"]
    assert spec["completions"] == hosts
    assert spec["template"]["spec"]["containers"][0]["resources"]["requests"] == {
        "google.com/tpu": str(chips)
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["v9:2x2"], "unknown chip 'v9'"),
        (["v6e:2x2x2"], "'v6e:2x2x2' must be v6e: and 2 numbers, such as v6e:2x2"),
        (["v5p:2x2"], "3 numbers, such as v5p:2x2x2"),
        (["v6e:3x3"], "9 chips, which hosts of 4 cannot hold"),
        (["v6e:2x2", "--claim", "runs"], "'runs' must be the name of a claim"),
        (["v6e:2x2", "--env", "TOKEN"], "the manifest would show TOKEN; put it into a Kubernetes secret"),
    ],
)
def test_mistakes_with_gke(job, recorder, options, said):
    recorder("kubectl")
    status, out, err = job("gke", "run", *GKE, *options)
    assert (status, out) == (2, "") and said in err and len(err.splitlines()) == 1
    assert recorder.calls() == [] and "hunter2" not in err


def test_a_tool_that_is_not_there_is_named(job, monkeypatch, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("git", "bash", "tar", "rm", "mkdir", "cat"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    status, out, err = job("xpk", "run", *XPK)
    assert status == 2 and out == ""
    assert err.splitlines()[-1] == "cnx2: error: cannot run 'xpk': No such file or directory"
