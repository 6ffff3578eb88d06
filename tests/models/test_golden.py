"""Against stored outputs of Hugging Face's ConvNeXt V2; needs no PyTorch (see make_golden.py)."""

import numpy as np


def test_outputs_are_those_of_hugging_face(reference, error):
    """Logits and a sample of all four stage maps, within the bound that tests/parity has."""
    with np.load(reference.golden) as golden:
        found = reference.stored(*reference.outputs())
        assert found.keys() == set(golden)
        for name, array in found.items():
            assert error(array, golden[name]) < 1e-5, name


def test_stored_arrays_are_small_and_alive(reference):
    """Outputs near 1 in size and different between the two images: the comparison can fail."""
    assert reference.golden.stat().st_size < 75_000
    with np.load(reference.golden) as golden:
        for name in golden:
            x = golden[name]
            assert 0.1 < x.std() < 10 and np.abs(x[0] - x[1]).mean() > 0.1 * x.std(), name
