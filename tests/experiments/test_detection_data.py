"""The benchmark of detection's input: its measure of cropped masks, and errors for bad arguments."""

import numpy as np

from experiments.benchmarks import detection_data


def test_targets_average_the_pixels_of_each_cell():
    mask = np.zeros((56, 84))
    mask[:28, 42:] = 1
    target = detection_data._target(mask, np.array([0.0, 0.0, 56.0, 84.0]))
    expected = np.zeros((28, 28))
    expected[:14, 14:] = 1
    difference = np.abs(target - expected)
    assert difference.max() <= 0.25 and (difference > 0).sum() <= 14 + 14 + 28


def test_cropped_masks_give_nearly_the_same_targets(tmp_path, capsys):
    arguments = ["masks", "--objects", "4", "--image-size", "256", "--out", str(tmp_path)]
    assert detection_data.main(arguments) == 0
    assert "| small" in capsys.readouterr().out
    assert (tmp_path / "masks.json").is_file()


def test_bad_arguments(tmp_path, capsys):
    assert detection_data.main(["maks", "--out", str(tmp_path / "out")]) == 2
    assert "unknown section 'maks'; did you mean 'masks'? (known: speed, masks)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
