"""Reads the stored scripts of tests/golden/launch with the tools' own parsers and schemas.

xpk pins versions that cnx2_jax cannot live with, so this needs an environment of its own:

  uv venv tools && uv pip install --python tools xpk==1.16.0 kubernetes-validate==1.37.0
  tools/bin/python tests/launch/check_tools.py
"""

import argparse
import json
import shlex
from pathlib import Path

import kubernetes_validate
from xpk.parser.core import set_parser

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
KUBERNETES = "1.33"


def check_xpk() -> int:
    """Parses every xpk command, and returns how many there are."""
    parser = argparse.ArgumentParser(prog="xpk")
    set_parser(parser)
    lines = [line for path in GOLDEN.glob("xpk*.sh") for line in path.read_text().splitlines()]
    commands = [shlex.split(line.partition(" >>")[0])[1:] for line in lines if line.startswith("xpk ")]
    for arguments in commands:
        # The folder must exist, and does not yet.
        parser.parse_args(["--script-dir=." if "--script-dir=" in word else word for word in arguments])
    return len(commands)


def check_gke() -> None:
    """Validates the Kubernetes job in the JobSet; no registry has the schema of what is around it."""
    lines = (GOLDEN / "gke.sh").read_text().splitlines()
    manifest = json.loads("\n".join(lines[lines.index("{") : lines.index("}") + 1]))
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)


if __name__ == "__main__":
    check_gke()
    print(f"{check_xpk()} commands of xpk and a job of Kubernetes {KUBERNETES} are valid")
