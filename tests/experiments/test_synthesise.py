"""The made-up data of docs/audio.md and docs/arrays.md: what it promises, and the same at every call."""

import numpy as np
import tifffile

from experiments import synthesise


def test_sounds_and_fields_are_arrays_of_labelled_folders(tmp_path, capsys):
    for data in ("sounds", "fields"):
        arguments = [data, "--out", str(tmp_path / data), "--train", "2", "--val", "1"]
        assert synthesise.main(arguments) == 0
    assert synthesise.main(arguments) == 2
    assert "exists already; nothing was overwritten" in capsys.readouterr().err
    assert synthesise.main([*arguments, "--train", "x"]) == 2
    sounds = sorted((tmp_path / "sounds").glob("*/*/*.npy"))
    assert len(sounds) == 3 * len(synthesise.KINDS)
    for path in sounds:
        image = np.load(path)
        assert (image.shape, image.dtype) == ((64, 64), np.float32) and np.isfinite(image).all()
    fields = sorted((tmp_path / "fields").glob("*/*/*.tif"))
    assert len(fields) == 3 * len(synthesise.LANDS)
    assert all(tifffile.imread(path).shape == (72, 72, 4) for path in fields)


def test_a_rising_sound_is_higher_at_its_end_and_the_highest_band_comes_first():
    rng = np.random.default_rng(1)
    wave = synthesise.sound("rise", rng)
    loudest = synthesise.spectrogram(wave).argmax(axis=0)
    sounding = np.flatnonzero(synthesise.spectrogram(wave).max(axis=0) > 25)
    assert loudest[sounding[-3]] < loudest[sounding[2]]
    np.testing.assert_array_equal(wave, synthesise.sound("rise", np.random.default_rng(1)))
