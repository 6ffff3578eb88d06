"""Writes tests/golden/*.npz: what Hugging Face's ConvNeXt V2 and UperNet give for weights made by a rule.

    python tests/parity/make_golden.py

Needs the `parity` extra. The weights and images come from `random_value` in tests/conftest.py and are
not stored. Run it again only when that rule or the list of references changes; never to make a failing
test pass.
"""

import runpy
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parents[1]


def main():
    shared = runpy.run_path(str(TESTS / "conftest.py"))
    parity = runpy.run_path(str(TESTS / "parity" / "conftest.py"))
    for reference in shared["REFERENCES"]:
        model = reference.model()
        twin = parity["hugging_face_twin"](model, shared["parameter_paths"](model))
        arrays = reference.stored(*parity["run_twin"](twin, reference.images()))
        save(reference.golden, arrays)
    for reference in shared["UPERNET_REFERENCES"]:
        twin = parity["hugging_face_upernet"](reference.model())
        with torch.inference_mode():
            logits = parity["run_upernet"](twin, reference.images())
        save(reference.golden, reference.stored(*(x.numpy() for x in logits)))


def save(path: Path, arrays: dict[str, np.ndarray]):
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
