"""Measures what the channels of every layer do over a set of images, in one pass without keeping features.

A layer is the output of a block (`stages.2.5`), or its wide hidden map after GRN (`stages.2.5.grn`), which is
the dimension-expansion layer in which the paper sees the collapse (section 3). docs/science.md compares the
choices here with the paper's.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict, FrozenConfigDict

from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.layouts import Dense
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import Params, merge, split

HIDDEN = ".grn"  # ends the names of hidden maps
DEAD = 0.01  # of the layer's mean standard deviation; a channel with less is dead
SATURATED = 0.1  # of the channel's own absolute mean; a channel with less is saturated, unless it is dead
BINS = 20  # of the histogram of selectivity, over [0, 1]

Sums = dict[str, jax.Array]  # the running sums of a layer
State = dict[str, Sums]  # by layer, and under "" what is common to all


@dataclasses.dataclass(frozen=True)
class Layer:
    """What was measured of one layer.

    Attributes:
      channels: how many there are.
      cosine_distance: the mean over images of 1/C^2 sum_ij (1 - cos(X_i, X_j)) / 2, where X_i is the map of
        channel i as a vector (paper, section 3). A map of zeros has cosine 0 with every map, itself included.
      effective_rank: exp of the entropy of the singular values of the channels' covariance over positions and
        images, divided by their sum (Roy and Vetterli 2007); 0 if nothing varies. None for hidden maps, whose
        covariance would cost more than the block.
      dead: channels whose standard deviation over positions and images is at most `DEAD` times the mean one
        of the layer: zero, or constant.
      saturated: other channels whose standard deviation is at most `SATURATED` times their absolute mean.
      selectivity: `[C]`, each channel's `class_selectivity`; None without labels of two classes or more.
    """

    channels: int
    cosine_distance: float
    effective_rank: float | None
    dead: int
    saturated: int
    selectivity: np.ndarray | None

    def as_json(self) -> dict:
        """Returns the numbers, with the mean and the histogram of selectivity."""
        values = dataclasses.asdict(self)
        if self.selectivity is not None:
            counts, _ = np.histogram(self.selectivity, BINS, (0, 1))
            values["selectivity"] = float(self.selectivity.mean())
            values["selectivity_histogram"] = counts.tolist()
        return values


def analyse(
    model: ConvNeXtV2, config: ConfigDict, batches: Iterable[Mapping[str, Array]], classes: int = 0
) -> tuple[int, dict[str, Layer]]:
    """Returns the number of images, and what was measured of each layer by name, in the order of depth.

    Args:
      model: a classifier, or another model's encoder (see `models.without_decoder`).
      config: of its run, for the normalisation.
      batches: batches of `data.images.eval_batches`; padding is left out.
      classes: how many classes "label" counts; 0 leaves labels out.
    """
    graph, params = split(model)
    state: State | None = None
    for batch in batches:
        taken = {name: batch[name] for name in ("image", "mask", "label") if name in batch}
        if state is None:
            state = _empty(graph, params, _scale(config), taken, classes)
        state = _update(graph, params, _scale(config), taken, state)
    assert state is not None, "there are no images"
    found = jax.device_get(state)
    images, class_images = found[""]["images"], found[""].get("class_images")
    # JAX sorts the keys of dictionaries, which puts stages.2.10 before stages.2.2.
    return int(images), {name: _measured(found[name], images, class_images) for name in layer_names(model)}


def activation_maps(
    model: ConvNeXtV2, config: ConfigDict, images: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns the float32 maps `[B, h, w, C]` of the named layers, for images `[B, H, W, C]` of batches."""
    graph, params = split(model)
    found = jax.device_get(_maps(graph, params, _scale(config), images, tuple(names)))
    return {name: found[name] for name in names}


def layer_names(model: ConvNeXtV2) -> list[str]:
    """Returns the names of all layers, in the order of depth; a block's hidden map precedes its output."""
    blocks = [f"stages.{stage}.{i}" for stage, depth in enumerate(model.config.depths) for i in range(depth)]
    return [name + end for name in blocks for end in (HIDDEN, "")]


def layer_maps(
    model: ConvNeXtV2, images: Float[Array, "b height width c"]
) -> Iterator[tuple[str, Float[Array, "b h w channels"]]]:
    """Yields the name and the map `[B, h, w, C]` of every layer in the compute dtype, as `layer_names` does.

    Args:
      model: the encoder.
      images: normalised.
    """
    layout, x = Dense(), images
    for stage, (down, blocks) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
        if stage == 0:
            conv, norm = down
            x = norm(conv(layout.enter(x, model.config.patch_size)))
        else:
            norm, conv = down
            x = conv(layout.patches(norm(x)))
        for index, block in enumerate(blocks):
            # As `Block.reference`: the kernel that a block runs as a whole does not return its hidden map.
            hidden = jax.nn.gelu(block.pwconv1(block.norm(block.dwconv(x, layout))), approximate=False)
            hidden = block.grn(hidden)
            yield f"stages.{stage}.{index}{HIDDEN}", hidden
            x = x + block.pwconv2(hidden)
            yield f"stages.{stage}.{index}", x


def cosine_distance(x: Float[Array, "b n c"]) -> Float[Array, " b"]:
    """Returns each image's mean cosine distance between the maps of its channels, see `Layer`.

    The cosines of all pairs add up to the squared length of the sum of the normalised maps, so that no matrix
    of pairs is needed.
    """
    squares = jnp.square(x).sum(axis=1)
    lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    total = jnp.einsum("bnc,bc->bn", x, jnp.where(squares > 0, 1 / lengths, 0))
    return (1 - jnp.square(total / x.shape[-1]).sum(axis=1)) / 2


def class_selectivity(
    activity: Float[np.ndarray, "classes c"], images: Int[np.ndarray, " classes"]
) -> np.ndarray | None:
    """Returns the class selectivity index of each channel, float64 `[C]` in [0, 1] (Morcos et al. 2018).

    It is (top - rest) / (top + rest), for a channel's mean activity on the class that excites it most, and
    the mean of those on all other classes; 0 for a channel that is never active. None for fewer than two
    classes with images.

    Args:
      activity: the sum over each class's images; not negative.
      images: how many there are of each class.
    """
    seen = images > 0
    if seen.sum() < 2:
        return None
    means = activity[seen].astype(np.float64) / images[seen, None]
    top = means.max(axis=0)
    rest = (means.sum(axis=0) - top) / (len(means) - 1)
    total = top + rest
    return np.divide(top - rest, total, out=np.zeros_like(total), where=total > 0)


def effective_rank(covariance: Float[np.ndarray, "c c"]) -> float:
    """Returns exp of the entropy of the singular values' shares of their sum; 0 for a matrix of zeros."""
    # A covariance is positive semidefinite, so its singular values are its eigenvalues.
    values = np.clip(np.linalg.eigvalsh(covariance.astype(np.float64)), 0, None)
    if not values.sum():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _scale(config: ConfigDict) -> FrozenConfigDict:
    return FrozenConfigDict({"mean": config.data.mean, "std": config.data.std})


def _empty(graph: nnx.GraphDef, params: Params, scale: FrozenConfigDict, batch, classes: int) -> State:
    def shapes(params, images):
        return dict(layer_maps(merge(graph, params), normalise(images, scale["mean"], scale["std"])))

    state: State = {"": {"images": jnp.zeros(())}}
    if classes:
        state[""]["class_images"] = jnp.zeros(classes)
    for name, x in jax.eval_shape(shapes, params, batch["image"]).items():
        channels = x.shape[-1]
        moments = (channels,) if name.endswith(HIDDEN) else (channels, channels)
        sums = {"distance": jnp.zeros(()), "mean": jnp.zeros(channels), "moments": jnp.zeros(moments)}
        if classes:
            sums["activity"] = jnp.zeros((classes, channels))
        state[name] = sums
    return state


@partial(jax.jit, static_argnames=("graph", "scale"), donate_argnames="state")
def _update(
    graph: nnx.GraphDef, params: Params, scale: FrozenConfigDict, batch: dict[str, jax.Array], state: State
) -> State:
    """Returns the running sums with those of a batch added."""
    mask, common = batch["mask"], dict(state[""])
    before, added = common["images"], mask.sum(dtype=jnp.float32)
    common["images"] = before + added
    if "class_images" in common:
        common["class_images"] = common["class_images"].at[batch["label"]].add(mask)
    updated = {"": common}
    images = normalise(batch["image"], scale["mean"], scale["std"])
    for name, x in layer_maps(merge(graph, params), images):
        rows = x.reshape(len(x), -1, x.shape[-1]).astype(jnp.float32)
        updated[name] = _add(state[name], rows, mask, batch.get("label"), before, added)
    return updated


def _add(
    sums: Sums, x: Float[Array, "b n c"], mask: Bool[Array, " b"], labels: Array | None, before, added
) -> Sums:
    """Returns a layer's sums after a batch of `added` images, when `before` images are in them already.

    Means and centred second moments are merged by the formula of Chan et al. (1979): a difference of raw
    moments in float32 would lose the variance of a channel whose mean is large.
    """
    positions = x.shape[1]
    chosen = mask[:, None, None]
    mean = jnp.where(chosen, x, 0).sum(axis=(0, 1)) / jnp.maximum(added * positions, 1)
    centred = jnp.where(chosen, x - mean, 0)
    delta, after = mean - sums["mean"], jnp.maximum(before + added, 1)
    weight = positions * before * added / after
    if sums["moments"].ndim == 1:
        moments = jnp.square(centred).sum(axis=(0, 1)) + weight * jnp.square(delta)
    else:
        moments = jnp.einsum("bnc,bnd->cd", centred, centred) + weight * jnp.outer(delta, delta)
    result = {
        "distance": sums["distance"] + jnp.where(mask, cosine_distance(x), 0).sum(),
        "mean": sums["mean"] + delta * added / after,
        # Divided by positions so that `_measured` needs no shapes.
        "moments": sums["moments"] + moments / positions,
    }
    if "activity" in sums:
        activity = jnp.where(mask[:, None], jax.nn.relu(x).mean(axis=1), 0)
        result["activity"] = sums["activity"].at[labels].add(activity)
    return result


@partial(jax.jit, static_argnames=("graph", "scale", "names"))
def _maps(
    graph: nnx.GraphDef, params: Params, scale: FrozenConfigDict, images: jax.Array, names: tuple[str, ...]
) -> dict[str, jax.Array]:
    normal = normalise(images, scale["mean"], scale["std"])
    found = layer_maps(merge(graph, params), normal)
    return {name: x.astype(jnp.float32) for name, x in found if name in names}


def _measured(sums: Mapping[str, np.ndarray], images: np.ndarray, class_images: np.ndarray | None) -> Layer:
    count = max(float(images), 1)
    covariance = sums["moments"] / count
    is_hidden = covariance.ndim == 1
    deviation = np.sqrt(np.maximum(covariance if is_hidden else np.diagonal(covariance), 0))
    dead = deviation <= DEAD * deviation.mean()
    saturated = ~dead & (deviation <= SATURATED * np.abs(sums["mean"]))
    return Layer(
        channels=len(deviation),
        cosine_distance=float(sums["distance"] / count),
        effective_rank=None if is_hidden else effective_rank(covariance),
        dead=int(dead.sum()),
        saturated=int(saturated.sum()),
        selectivity=None if class_images is None else class_selectivity(sums["activity"], class_images),
    )
