"""Makes up small data sets of arrays, to try docs/audio.md and docs/arrays.md without data of one's own.

  python -m experiments.synthesise sounds --out sounds
  python -m experiments.synthesise fields --out fields

`sounds` writes spectrograms of eight kinds of synthetic sounds: float32 .npy files of 64 mel bands (rows, the
highest first) by 64 times (columns), decibels. Pitch, onset, length and the level of the noise are random.
`fields` writes uint16 TIFFs of four bands, B01 to B04, of 72x72 pixels: four kinds of land with a noisy
spectrum and texture of their own. Both have the folders train/KIND and val/KIND. Nothing in them is recorded,
so results show that the commands work, not how well they would do.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new

RATE, WINDOW, HOP, FRAMES, MELS = 16_000, 512, 250, 64, 64
SAMPLES = WINDOW + HOP * (FRAMES - 1)  # a little more than a second
LOWEST, HIGHEST = 80.0, 7600.0  # Hz, of the mel bands
KINDS = ("chord", "fall", "harmonics", "hiss", "pulses", "rise", "tone", "warble")

SIDE, BANDS = 72, ("B01", "B02", "B03", "B04")
# Mean reflectance of blue, green, red and near infrared, and the size of the texture's cells in pixels.
LANDS = {
    "bare": ((900, 1300, 1800, 2300), 24),
    "crop": ((450, 800, 600, 3200), 12),
    "forest": ((300, 550, 400, 2900), 3),
    "water": ((550, 500, 350, 250), 36),
}


def sound(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a sound of a kind, float [SAMPLES], somewhere in noise."""
    time = np.arange(SAMPLES) / RATE
    onset, length = rng.uniform(0, 0.45), rng.uniform(0.3, 0.55)
    inside = np.clip((time - onset) / length, 0, 1)
    pitch = np.exp(rng.uniform(np.log(250), np.log(2000)))
    octaves = rng.uniform(0.5, 1.5) * {"rise": inside, "fall": 1 - inside}.get(kind, np.zeros(SAMPLES))
    if kind == "warble":
        octaves = rng.uniform(0.1, 0.2) * np.sin(2 * np.pi * rng.uniform(6, 10) * time)
    phase = 2 * np.pi * np.cumsum(pitch * 2.0**octaves) / RATE
    parts = {"harmonics": (1, 2, 3, 4, 5), "chord": (1, 1.26, 1.5)}.get(kind, (1,))
    wave = np.mean([np.sin(part * phase + rng.uniform(0, 2 * np.pi)) for part in parts], axis=0)
    if kind == "pulses":
        wave *= np.sin(2 * np.pi * rng.uniform(10, 16) * time) > 0
    if kind == "hiss":  # noise of half an octave around the pitch
        spectrum = np.fft.rfft(rng.standard_normal(SAMPLES))
        distance = np.abs(np.log2(np.fft.rfftfreq(SAMPLES, 1 / RATE)[1:] / pitch))
        wave = np.fft.irfft(np.concatenate([[0], spectrum[1:] * (distance < 0.25)]), SAMPLES)
        wave /= wave.std() * np.sqrt(2)
    envelope = (inside > 0) & (inside < 1)
    return wave * envelope + 10 ** rng.uniform(-1.0, 0.0) * rng.standard_normal(SAMPLES)


@functools.cache
def mel_filters() -> np.ndarray:
    """Returns the weights of frequencies in mel bands, [MELS, WINDOW // 2 + 1]: triangles."""
    lowest, highest = (2595 * np.log10(1 + edge / 700) for edge in (LOWEST, HIGHEST))
    mels = np.linspace(lowest, highest, MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = np.fft.rfftfreq(WINDOW, 1 / RATE)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    weights = np.maximum(0, np.minimum(rising, falling))
    nearest = np.abs(frequencies - edges[1:-1, None]).argmin(axis=1)
    weights[np.arange(MELS), nearest] = np.maximum(weights[np.arange(MELS), nearest], 0.5)  # narrow ones
    return weights[::-1]


def spectrogram(wave: np.ndarray) -> np.ndarray:
    """Returns the power in mel bands in decibels, float32 [MELS, FRAMES]."""
    places = np.arange(FRAMES)[:, None] * HOP + np.arange(WINDOW)
    power = np.abs(np.fft.rfft(wave[places] * np.hanning(WINDOW), axis=1)) ** 2
    return (10 * np.log10(mel_filters() @ power.T + 1e-3)).astype(np.float32)


def field(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns an image of a kind of land, uint16 [SIDE, SIDE, 4]."""
    spectrum, cell = LANDS[kind]
    light = rng.uniform(0.7, 1.3)
    count = -(-SIDE // cell)
    texture = rng.standard_normal((count, count)).repeat(cell, 0).repeat(cell, 1)[:SIDE, :SIDE, None]
    noise = rng.standard_normal((SIDE, SIDE, len(BANDS)))
    image = np.array(spectrum) * light * (1 + 0.2 * texture + 0.3 * noise)
    return np.clip(image, 0, 65535).round().astype(np.uint16)


def write(out: Path, kinds: tuple[str, ...], counts: dict[str, int], save: Callable, make: Callable) -> None:
    """Writes `counts` arrays of each kind and split, each a function of its kind, split and number."""
    for place, kind in enumerate(kinds):
        for split, wanted in counts.items():
            folder = out / split / kind
            folder.mkdir(parents=True)
            for number in range(wanted):
                seed = [place, ("train", "val").index(split), number]
                save(folder / f"{number:04}", make(kind, np.random.default_rng(seed)))


def main(arguments: Sequence[str] | None = None) -> int:
    return run(lambda: _main(arguments), "synthesise")


def _main(arguments: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m experiments.synthesise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", choices=("sounds", "fields"))
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--train", type=count, default=150, help="arrays of each kind to train on")
    parser.add_argument("--val", type=count, default=50, help="arrays of each kind to evaluate on")
    args = parser.parse_args(arguments)
    check_new(args.out, "--out")
    counts = {"train": args.train, "val": args.val}
    if args.data == "sounds":
        write(
            args.out,
            KINDS,
            counts,
            lambda path, array: np.save(f"{path}.npy", array),
            lambda kind, rng: spectrogram(sound(kind, rng)),
        )
        return
    try:
        import tifffile
    except ImportError:
        raise UserError("fields are TIFFs; pip install 'cnx2_jax[arrays]'") from None

    def save(path: Path, array: np.ndarray) -> None:
        tifffile.imwrite(f"{path}.tif", array, photometric="minisblack", planarconfig="contig")

    write(args.out, tuple(LANDS), counts, save, field)


if __name__ == "__main__":
    sys.exit(main())
