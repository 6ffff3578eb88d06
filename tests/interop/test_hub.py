"""Downloads from a real HTTP server on this machine, through the real huggingface_hub."""

import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy

from cnx2_jax.interop.names import to_torch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = "import sys; from cnx2_jax.interop import hub; print(hub.fetch(sys.argv[1]))"
REFUSED = {  # as the hub answers: status and X-Error-Code
    "some/absent": (404, "RepoNotFound"),
    "some/gated": (403, "GatedRepo"),
}


@pytest.fixture
def hub():
    """The files of the server by `OWNER/NAME/FILE`, and its address."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            status, code = REFUSED.get(repository, (404, "EntryNotFound"))
            content = files.get(f"{repository}/{name}")
            if revision not in ("main", "v1", COMMIT):
                status, code, content = 404, "RevisionNotFound", None
            self.send_response(200 if content is not None else status)
            if content is None:
                self.send_header("X-Error-Code", code)
            else:
                self.send_header("ETag", f'"{abs(hash(content)):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield files, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def python(address, cache, *arguments, **extra):
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **extra}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


def fetch(address, cache, location, **extra):
    return python(address, cache, "-c", FETCH, location, **extra)


def refusal(result):
    """The message of the UserError that ended the process."""
    assert result.returncode == 1
    kind, _, message = result.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "cnx2_jax.errors.UserError"
    return message


def test_convert_from_the_hub(hub, tmp_path, small):
    files, address = hub
    tensors = to_torch({name: value.astype(np.float32) for name, value in small.items()}, "timm")
    files["some/model/model.safetensors"] = safetensors.numpy.save(tensors)
    config = {"architecture": "convnextv2_tiny", "label_names": ["a", "b", "c"]}
    config["model_args"] = {"depths": [1, 2, 1, 1], "dims": [8, 16, 24, 40]}
    config["pretrained_cfg"] = {"input_size": [3, 96, 96]}
    files["some/model/config.json"] = json.dumps(config).encode()
    arguments = ("-m", "cnx2_jax.cli", "convert", "--from", "hf:some/model@v1", "--to", tmp_path / "new")
    result = python(address, tmp_path / "cache", *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["variant"], found["classes"], found["image_size"]) == ("custom", 3, [96, 96])
    assert (tmp_path / "new" / "params").is_dir()


def test_older_repositories_hold_a_pickle(hub, tmp_path):
    files, address = hub
    files["some/model/pytorch_model.bin"] = b"weights"
    files["some/model/preprocessor_config.json"] = b"{}"
    result = fetch(address, tmp_path, "hf:some/model")
    assert result.returncode == 0, result.stderr
    path = result.stdout.strip()
    assert path.endswith("pytorch_model.bin")
    assert sorted(os.listdir(os.path.dirname(path))) == ["preprocessor_config.json", "pytorch_model.bin"]


def test_what_was_fetched_once_needs_no_network(hub, tmp_path):
    files, address = hub
    files["some/model/model.safetensors"] = b"weights"
    online = fetch(address, tmp_path, "hf:some/model")
    assert online.returncode == 0, online.stderr
    files.clear()
    offline = fetch(address, tmp_path, "hf:some/model", HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout, offline.stderr


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("hf:some/empty", "has neither model.safetensors nor pytorch_model.bin"),
        ("hf:some/absent", "is not on the hub"),
        ("hf:some/gated", "is gated; accept its terms"),
        ("hf:some/empty@v9", "has no revision 'v9'"),
        ("hf:a/b/c", "is not the name of a repository; give hf:OWNER/NAME"),
    ],
)
def test_refusals(hub, tmp_path, location, said):
    message = refusal(fetch(hub[1], tmp_path, location))
    assert message.startswith(f"'{location}'") and said in message


def test_no_network(tmp_path):
    """HF_HUB_OFFLINE: without it, huggingface_hub retries for 20 seconds."""
    message = refusal(fetch("http://127.0.0.1:9", tmp_path, "hf:some/model", HF_HUB_OFFLINE="1"))
    assert (
        message
        == "'hf:some/model' cannot be reached and is not in the cache; check the network, or give a file"
    )
