"""Writes tests/golden/launch anew, for a look at the difference."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def main() -> None:
    sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1] / "experiments")]
    test = importlib.import_module("test_backends")
    with pytest.MonkeyPatch.context() as patch:
        scripts = test.golden_scripts(importlib.import_module, patch)
    test.GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in test.GOLDEN.glob("*"):
        path.unlink()
    for name, text in scripts.items():
        (test.GOLDEN / name).write_text(text)


if __name__ == "__main__":
    main()
