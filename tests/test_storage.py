"""Object storage, in a server of its API on this machine; see object_storage.py."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiny_task import TinyTask

from cnx2_jax import cli
from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import UserError
from cnx2_jax.files import Rows, check_new, creating, locked, replacing, to_path
from cnx2_jax.models.state import split
from cnx2_jax.observe.timing import TIMED
from cnx2_jax.tasks import make_task
from cnx2_jax.train.loop import fit
from cnx2_jax.workdir import record_config

pytest.importorskip("gcp_storage_emulator")

import object_storage

pytestmark = pytest.mark.usefixtures("compile_quickly", "server")

SETTINGS = ("ema_decay=0.9", "checkpoint_steps=3", "eval_epochs=0.5")


@pytest.fixture(scope="module")
def server():
    with object_storage.serving() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def root(request):
    """A place in the bucket for each test."""
    return to_path(f"gs://{object_storage.BUCKET}/{request.node.name}")


def test_the_client_is_chosen_before_a_local_path_is_met():
    # epath, which Orbax and TensorFlow Datasets use, decides once, at its first path of any kind.
    code = """
import cnx2_jax
from etils import epath
from etils.epath.backend import fsspec_backend

epath.Path("/local").exists()
assert epath.Path("gs://bucket/x")._backend is fsspec_backend
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_name_of_a_folder_is_no_pattern(root):
    odd = root.with_name("run[1]*")
    (odd / "checkpoints" / "3" / "file").write_text("")
    assert [path.name for path in (odd / "checkpoints").glob("*")] == ["3"]
    assert list((odd / "none").glob("*")) == []


def test_a_server_that_does_not_answer_is_no_mistake_of_the_user(root, monkeypatch, capsys):
    from cnx2_jax import storage

    class Client:
        def cat_file(self, path):
            raise TimeoutError("no answer")

    monkeypatch.setattr(storage, "_client", lambda: Client())
    assert cli.main(["evaluate", "--workdir", str(root), "--checkpoint", str(root)]) == 1
    assert capsys.readouterr().err == f"cnx2: stopped: '{root}/config.json': no answer\n"


def test_a_path_has_the_methods_of_a_local_one(root):
    file = root / "folder" / "file.txt"
    assert (file.name, file.suffix, file.parent.name) == ("file.txt", ".txt", "folder")
    assert str(file) == f"{root}/folder/file.txt" == str(file.absolute())
    assert not root.exists()
    file.write_text("café\n")
    assert (root.is_dir(), root.is_file(), file.is_dir(), file.is_file()) == (True, False, False, True)
    assert file.read_text() == "café\n" == file.open(encoding="utf-8").read()
    assert file.read_bytes() == "café\n".encode() == file.open("rb").read()
    assert [path.name for path in root.glob("*")] == ["folder"] == [path.name for path in root.iterdir()]
    file.parent.rename(root / "other")
    assert (root / "other" / "file.txt").read_text() == "café\n"
    assert not file.exists()
    (root / "other" / "file.txt").unlink()
    assert not root.exists()


def test_errors_are_those_of_a_disk(root, capsys):
    for path in (root / "none", to_path("gs://no-such-bucket/file")):
        with pytest.raises(FileNotFoundError) as caught:
            path.read_bytes()
        assert (caught.value.filename, caught.value.strerror) == (str(path), "No such file or directory")
    forbidden = to_path("gs://forbidden/run")
    for attempt in (forbidden.exists, forbidden.read_text, lambda: forbidden.write_bytes(b"")):
        with pytest.raises(PermissionError, match=r"permission denied .*'gs://forbidden/run'"):
            attempt()
    for command in (["evaluate", "--workdir"], ["export", "--format", "orbax", "--out", "x", "--checkpoint"]):
        assert cli.main([*command, str(forbidden)]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        assert "permission denied" in printed


@pytest.mark.parametrize("text", ["s3://bucket/run", "gs://", "gs:///run", "http://host/run"])
def test_other_schemes_are_refused(text):
    with pytest.raises(UserError, match="only local paths and gs://BUCKET/NAME"):
        to_path(text)


def test_without_its_client_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cnx2_jax\[storage\]'"):
        to_path("gs://bucket/run")


@pytest.mark.parametrize(
    "command",
    [
        "convert --from gs://bucket/model.safetensors --to x",
        "sweep --config pretrain:digits --sweep seeds --out gs://bucket/sweep",
        "data --config pretrain:tiny --config.data.root=gs://bucket/images --out sheet.png",
    ],
)
def test_what_must_be_local_is_refused_in_one_line(command, capsys):
    assert cli.main(command.split()) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "must be on a local disk; copy it there, or mount the bucket" in printed


def test_objects_appear_whole_or_not_at_all(root):
    check_new(root / "out", "--out")
    with pytest.raises(KeyboardInterrupt), creating(root / "out") as place:
        place.write_text("half")
        raise KeyboardInterrupt
    assert not root.exists()
    with creating(root / "out") as place:
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "file").write_text("one")
        place.with_name("out.data").write_text("two")
    assert (root / "out" / "sub" / "file").read_text() == "one"
    assert (root / "out.data").read_text() == "two"
    with pytest.raises(UserError, match=r"out\.data' exists already"), creating(root / "out.data") as place:
        place.write_text("three")
    with pytest.raises(UserError, match="out' exists already"):
        check_new(root / "out", "--out")
    with pytest.raises(UserError, match="cannot write 'gs://forbidden/out': permission denied"):
        check_new(to_path("gs://forbidden/out"), "--out")
    with replacing(root / "out.data") as place:
        place.write_text("four")
    assert (root / "out.data").read_text() == "four"


def test_rows_are_there_after_settle_and_written_at_a_bounded_rate(root, monkeypatch):
    from cnx2_jax import storage

    monkeypatch.setattr(storage, "UPLOAD_SECONDS", 3600)
    path = root / "metrics.jsonl"
    path.write_text("0\n")
    rows = Rows(path)
    for number in range(1, 4):
        rows.write(f"{number}\n")
    assert path.read_text() == "0\n1\n"  # the first at once, the others not before UPLOAD_SECONDS
    rows.settle()
    assert path.read_text() == "0\n1\n2\n3\n"
    rows.write("4\n")
    rows.close()
    assert path.read_text() == "0\n1\n2\n3\n4\n"


def test_a_lock_is_held_while_it_is_renewed_and_expires_after(root, monkeypatch):
    from cnx2_jax import storage

    monkeypatch.setattr(storage, "LEASE_SECONDS", 4)
    with locked(root):
        with pytest.raises(BlockingIOError), locked(root):
            pass
        assert (root / "lock").exists()
    assert not (root / "lock").exists()
    (root / "lock").write_text("the lock of a run that was killed\n")
    began = time.monotonic()
    with locked(root):
        assert time.monotonic() - began >= 4
    assert not (root / "lock").exists()


def rows(workdir):
    """The rows of metrics.jsonl without those metrics that are times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not TIMED.fullmatch(k)} for line in lines]


def arrays(workdir, step=12):
    """Every array of a checkpoint, by path."""
    found = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "opt_state", "ema"):
            tree = checkpointer.restore(str(workdir.absolute() / "checkpoints" / str(step) / item))
            for path, leaf in ocp.utils.to_flat_dict(tree).items():
                found[(item, *path)] = np.asarray(leaf).tobytes()
    assert len(found) > 8
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The rows and the arrays of a run on a disk that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("reference")
    fit(TinyTask(*SETTINGS), workdir)
    return rows(workdir), arrays(workdir)


@pytest.mark.slow
def test_a_run_in_object_storage_equals_one_on_a_disk(root, reference, capsys):
    assert fit(TinyTask(*SETTINGS), root)["step"] == 12
    assert (rows(root), arrays(root)) == reference
    assert not (root / "lock").exists()
    assert len(list((root / "tensorboard").glob("*"))) == 1
    assert checkpoint.find(root).name == "12"

    # An unfinished save, and a damaged array, as on a disk: the run resumes before both.
    (root / "checkpoints" / "12" / "commit_success.txt").unlink()
    assert checkpoint.find(root).name == "9"
    damaged = root / "checkpoints" / "9" / "params" / "manifest.ocdbt"
    damaged.write_bytes(damaged.read_bytes()[:20])
    capsys.readouterr()
    assert fit(TinyTask(*SETTINGS), root)["step"] == 12
    assert "checkpoint 9 is damaged" in capsys.readouterr().err
    assert (root / "checkpoints" / "damaged-9" / "params" / "manifest.ocdbt").exists()
    assert (rows(root), arrays(root)) == reference


RUN = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny_task import Points, TinyTask
from cnx2_jax import storage
from cnx2_jax.files import to_path
from cnx2_jax.train.loop import fit

storage.LEASE_SECONDS = 4
Points.before = lambda self, step: time.sleep(0.2)
fit(TinyTask(*{SETTINGS!r}), to_path(sys.argv[1]))
"""


@pytest.mark.processes
def test_killed_and_resumed_it_equals_one_that_was_left_alone(root, reference):
    def start():
        command = [sys.executable, "-c", RUN, str(root)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])

    saving = root / "checkpoints" / "6"
    for moment in (lambda: (root / "checkpoints" / "3" / "commit_success.txt").exists(), saving.exists):
        process = start()
        while process.poll() is None and not moment():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert (root / "lock").exists()
    process = start()
    printed = process.communicate(timeout=300)[1]
    assert process.returncode == 0, printed
    assert "waiting 4 s" in printed
    assert (rows(root), arrays(root)) == reference
    assert not (root / "lock").exists()


@pytest.mark.slow
def test_commands_read_a_checkpoint_there_and_write_there(root, tmp_path, capsys):
    overrides = ["model.depths=(1,1,1,1)", "model.dims=(4,8,8,16)", "image_size=16", "batch_size=128"]
    config = load_config("finetune:digits", [f"--config.{each}" for each in overrides])
    task = make_task(config)
    record_config(config, root / "run")
    params = split(task.init(nnx.Rngs(0)))[1]
    checkpoint.write(root / "weights", params, task.metadata())
    assert (root / "weights" / "card" / "metadata").exists()
    read = checkpoint.read_params(root / "weights")
    assert all(jax.numpy.array_equal(read[name], value) for name, value in params.items())

    def run(*command):
        capsys.readouterr()
        assert cli.main(list(map(str, command))) == 0
        return capsys.readouterr().out.splitlines()[-1]

    found = json.loads(run("evaluate", "--workdir", root / "run", "--checkpoint", root / "weights"))
    assert found["checkpoint"] == f"{root}/weights"
    assert found["loss"] > 1
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "image.png")
    run("predict", "--checkpoint", root / "weights", "--features", root / "f.npy", tmp_path / "image.png")
    assert np.load((root / "f.npy").open("rb")).shape == (1, 16)
    assert json.loads((root / "f.json").read_text()) == [str(tmp_path / "image.png")]
    export = ["export", "--checkpoint", root / "weights", "--format", "safetensors"]
    run(*export, "--out", root / "exported")
    assert sorted(path.name for path in (root / "exported").iterdir())[0] == "config.json"
    assert cli.main(list(map(str, [*export, "--out", root / "exported"]))) == 2
    assert "exists already; nothing was overwritten" in capsys.readouterr().err
