"""The sparse encoders, masked and gathered, against a literal sparse convolution network, written in NumPy.

A map is a list of visible sites and one row of features per site; nothing exists at any other place. A
depthwise convolution adds, for each site, the listed neighbours only; a down-sampling layer has a site
where its four finer ones are listed; GRN sums over the sites of one sample. Nothing here is shared with
the models but the names of the parameters.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from cnx2_jax.models import FCMAE, EncoderConfig
from cnx2_jax.models.fcmae import LAYOUTS

pytestmark = pytest.mark.usefixtures("compile_quickly")

DEPTHS, DIMS = (1, 1, 2, 1), (3, 4, 5, 6)


@dataclasses.dataclass
class Case:
    """A network and images, small and with as many irregular edges as can be."""

    patch_size: int
    mask_patch: int
    height: int
    width: int


CASES = {
    "cells of one stride": Case(1, 0, 32, 24),
    "cells of two strides": Case(2, 32, 64, 96),
}


class SparseMap:
    """The visible sites of one sample at one resolution."""

    def __init__(self, sites):
        self.sites = sorted(sites)
        self.index = {site: i for i, site in enumerate(self.sites)}
        nowhere = len(self.sites)  # a row of zeros is appended there
        self.neighbours = {
            (i, j): np.array([self.index.get((r + i, c + j), nowhere) for r, c in self.sites])
            for i in range(-3, 4)
            for j in range(-3, 4)
        }

    def coarser(self):
        parents = {(r // 2, c // 2) for r, c in self.sites}
        coarse = SparseMap(parents)
        children = {
            (i, j): np.array([self.index[2 * r + i, 2 * c + j] for r, c in coarse.sites])
            for i in range(2)
            for j in range(2)
        }
        return coarse, children


class SparseNetwork:
    """ConvNeXt V2's encoder on the sites that one mask leaves visible, for one image, in float64."""

    def __init__(self, image, masked, patch_size):
        self.image, self.patch_size = image, patch_size
        scale = image.shape[0] // patch_size // masked.shape[0]
        rows, columns = masked.shape[0] * scale, masked.shape[1] * scale
        visible = [(r, c) for r in range(rows) for c in range(columns) if not masked[r // scale, c // scale]]
        self.levels, self.children = [SparseMap(visible)], []
        for _ in DEPTHS[1:]:
            coarse, children = self.levels[-1].coarser()
            self.levels.append(coarse)
            self.children.append(children)

    def __call__(self, p):
        """Returns the features `[sites, channels]` of every stage for parameters `p` by path."""
        size, maps = self.patch_size, []
        for stage, level in enumerate(self.levels):
            path = f"downsample_layers.{stage}"
            if stage == 0:
                kernel = p[f"{path}.0.kernel"]
                x = np.zeros((len(level.sites), kernel.shape[-1]))
                for n, (r, c) in enumerate(level.sites):
                    for i in range(size):
                        for j in range(size):
                            x[n] += self.image[r * size + i, c * size + j] @ kernel[i, j]
                x = normalise(x + p[f"{path}.0.bias"], p, f"{path}.1")
            else:
                fine, kernel = normalise(x, p, f"{path}.0"), p[f"{path}.1.kernel"]
                x = sum(fine[rows] @ kernel[i, j] for (i, j), rows in self.children[stage - 1].items())
                x = x + p[f"{path}.1.bias"]
            for block in range(DEPTHS[stage]):
                x = x + branch(x, level, p, f"stages.{stage}.{block}")
            maps.append(x)
        return maps


def branch(x, level, p, path):
    padded = np.concatenate([x, np.zeros((1, x.shape[1]))])
    kernel = p[f"{path}.dwconv.kernel"]
    y = sum(padded[rows] * kernel[i + 3, j + 3] for (i, j), rows in level.neighbours.items())
    y = normalise(y + p[f"{path}.dwconv.bias"], p, f"{path}.norm")
    y = y @ p[f"{path}.pwconv1.kernel"] + p[f"{path}.pwconv1.bias"]
    y = 0.5 * y * (1 + erf(y / np.sqrt(2)))
    response = np.sqrt((y * y).sum(axis=0) + 1e-6)
    response = response / (response.mean() + 1e-6)
    y = p[f"{path}.grn.gamma"] * (y * response) + p[f"{path}.grn.beta"] + y
    return y @ p[f"{path}.pwconv2.kernel"] + p[f"{path}.pwconv2.bias"]


def normalise(x, p, path):
    mean = x.mean(axis=1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p[f"{path}.scale"] + p[f"{path}.bias"]


@dataclasses.dataclass
class Comparison:
    """The model's results, as NumPy arrays, beside the reference that is to give the same."""

    maps: list[np.ndarray]  # [B, h, w, C] of every stage
    gradients: dict[str, np.ndarray]  # of `scalar` in every parameter, by path
    networks: list[SparseNetwork]  # one per sample
    values: dict[str, np.ndarray]  # the parameters
    weights: list[list[np.ndarray]]  # [sites, C] by sample and stage: the coefficients of `scalar`

    def scalar(self):
        """A sum over the features of all visible sites in all four maps."""
        return sum(
            (w * x).sum()
            for network, weights in zip(self.networks, self.weights, strict=True)
            for w, x in zip(weights, network(self.values), strict=True)
        )


@pytest.fixture(scope="module", params=itertools.product(CASES, LAYOUTS), ids=", ".join)
def compared(request, build, parameters):
    """Runs the model in float64; nothing 64-bit leaves this fixture but NumPy arrays."""
    name, layout = request.param
    case, rng = CASES[name], np.random.default_rng(5)
    images = rng.standard_normal((2, case.height, case.width, 3))
    with jax.enable_x64(True):
        model = build(
            FCMAE,
            EncoderConfig(DEPTHS, DIMS, patch_size=case.patch_size, dtype=jnp.float64),
            mask_patch=case.mask_patch,
            decoder_dim=4,
            layout=layout,
            fill_dtype=np.float64,
        )
        encoder = model.encoder
        masked = model.mask(jax.random.split(jax.random.key(3), 2), case.height, case.width)
        assert (masked[0] != masked[1]).any()
        values = {n: np.array(v[...]) for n, v in parameters(encoder).items()}
        networks = [
            SparseNetwork(image, mask, case.patch_size)
            for image, mask in zip(images, np.asarray(masked), strict=True)
        ]
        weights = [[rng.standard_normal(x.shape) for x in n(values)] for n in networks]

        spread = []  # the weights at their sites in plain maps
        for stage, dim in enumerate(DIMS):
            side = case.patch_size * 2**stage
            plain = np.zeros((2, case.height // side, case.width // side, dim))
            for sample, network in enumerate(networks):
                rows, columns = np.array(network.levels[stage].sites).T
                plain[sample, rows, columns] = weights[sample][stage]
            spread.append(plain)

        def scalar(encoder):
            maps = encoder.features(jnp.asarray(images), None, model.layouts(masked))
            return sum((w * x).sum() for w, x in zip(spread, maps, strict=True)), maps

        gradients, maps = jax.jit(jax.grad(scalar, has_aux=True))(encoder)
        maps = [np.array(x) for x in maps]
        gradients = {n: np.array(g[...]) for n, g in parameters(gradients).items()}
    assert {a.dtype for a in (*maps, *gradients.values())} == {np.dtype("float64")}
    return Comparison(maps, gradients, networks, values, weights)


def test_forward(compared, error):
    """At visible sites the same to rounding, and exactly zero at all others."""
    for sample, network in enumerate(compared.networks):
        expected = network(compared.values)
        for plain, level, x in zip(compared.maps, network.levels, expected, strict=True):
            found = plain[sample].copy()
            rows, columns = np.array(level.sites).T
            assert 0 < len(rows) < found.shape[0] * found.shape[1]
            assert error(found[rows, columns], x) < 1e-12
            found[rows, columns] = 0
            assert (found == 0).all()


def test_gradients(compared):
    """`jax.grad` against central differences of the reference, for some entries of every parameter."""
    rng, step = np.random.default_rng(6), 2e-6
    assert compared.gradients.keys() == compared.values.keys()
    for name, array in compared.values.items():
        gradient = compared.gradients[name]
        scale = np.abs(gradient).max()
        assert scale > 0, name
        for flat in rng.choice(array.size, size=min(3, array.size), replace=False):
            index = np.unravel_index(flat, array.shape)
            old, ends = array[index], []
            for sign in (1, -1):
                array[index] = old + sign * step
                ends.append(compared.scalar())
            array[index] = old
            difference = (ends[0] - ends[1]) / (2 * step)
            # Far below the largest entry, differences are rounding: an absolute bound there.
            bound = 1e-5 * max(abs(difference), 1e-2 * scale)
            assert abs(gradient[index] - difference) < bound, (name, index)
