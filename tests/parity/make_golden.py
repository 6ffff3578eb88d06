"""Writes tests/golden/*.npz: what Hugging Face's ConvNeXt V2 gives for weights made by a rule.

    python tests/parity/make_golden.py

Needs the `parity` extra. The weights and images come from `random_value` in tests/conftest.py and are
not stored. Run it again only when that rule or the list of references changes; never to make a failing
test pass.
"""

import runpy
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]


def main():
    shared = runpy.run_path(str(TESTS / "conftest.py"))
    parity = runpy.run_path(str(TESTS / "parity" / "conftest.py"))
    for reference in shared["REFERENCES"]:
        model = reference.model()
        twin = parity["hugging_face_twin"](model, shared["parameter_paths"](model))
        arrays = reference.stored(*parity["run_twin"](twin, reference.images()))
        np.savez_compressed(reference.golden, **arrays)
        print(f"{reference.golden}: {reference.golden.stat().st_size} bytes")


if __name__ == "__main__":
    main()
