"""Rewrites tests/golden/launch; run `python -m tests.launch.make_launch_golden` in the checkout root."""

import pytest

from tests.launch.test_backends import GOLDEN, golden_scripts


def main() -> None:
    with pytest.MonkeyPatch.context() as patch:
        scripts = golden_scripts(patch)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.glob("*"):
        path.unlink()
    for name, text in scripts.items():
        (GOLDEN / name).write_text(text)


if __name__ == "__main__":
    main()
