"""FLOPs against the paper's table, NumPy's arithmetic and the loops by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from cnx2_jax.models import create_model
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe import flops
from cnx2_jax.observe.flops import matrix_flops


def count(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return matrix_flops(jax.jit(function).trace(*args).jaxpr)


# Multiply-adds in 1e9, at 224 pixels: the paper's tables 8 and 12 (arXiv 2301.00808).
@pytest.mark.parametrize(
    ("variant", "giga"), [("atto", 0.55), ("nano", 2.45), ("tiny", 4.47), ("base", 15.4), ("huge", 115)]
)
@pytest.mark.parametrize("scan", [False, True])
def test_the_papers_counts(variant, giga, scan):
    def create():
        return create_model(f"convnextv2_{variant}", rngs=nnx.Rngs(0), num_classes=1000, scan=scan)

    graph, params = split(nnx.eval_shape(create))
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    traced = jax.jit(lambda params, image: merge(graph, params)(image)).trace(params, image)
    assert matrix_flops(traced.jaxpr) / 2e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_what_gathering_saves_counts_and_what_it_moves_does_not(platform):
    def step(layout):
        def create():
            return create_model("fcmae_base", rngs=nnx.Rngs(0), layout=layout, platform=platform, scan=True)

        graph, params = split(nnx.eval_shape(create))
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

        def loss(params, image, keys):
            return merge(graph, params)(image, keys).loss.mean()

        return matrix_flops(jax.jit(jax.grad(loss)).trace(params, image, keys).jaxpr)

    # 19 of 49 patches are visible; the decoder has all. Products that move pixels would add a half to that.
    visible, whole = step("gathered"), step("masked")
    assert 19 / 49 < visible / whole < 19 / 49 + 0.02


def test_products():
    assert count(lambda a, b: a @ b, (3, 5, 7), (7, 11)) == 2 * 3 * 5 * 7 * 11
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 4), (2, 4, 5)) == 2 * 2 * 3 * 4 * 5
    assert count(lambda a: jnp.sin(a) + 1, (100,)) == 0


def convolve(stride, groups):
    def apply(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=numbers, feature_group_count=groups
        )

    return apply


def test_convolutions_and_their_gradients():
    patches, image, kernel = convolve(4, 1), (2, 32, 32, 3), (4, 4, 3, 40)
    forward = 2 * 2 * 8 * 8 * 40 * 4 * 4 * 3
    assert count(patches, image, kernel) == forward

    def loss(x, kernel):
        return patches(x, kernel).sum()

    # Towards a kernel as much as forwards; towards an image too, as what a stride leaves out is not counted.
    assert count(jax.grad(loss, argnums=1), image, kernel) == 2 * forward
    towards = count(jax.grad(loss, argnums=0), image, kernel) - forward
    assert towards == pytest.approx(forward, rel=0.01)

    assert count(convolve(1, 6), (2, 9, 9, 6), (7, 7, 1, 6)) == 2 * 2 * 3 * 3 * 6 * 49


def test_loops_branches_and_devices():
    square, product = (4, 4), 2 * 4**3

    def scanned(a):
        return lax.scan(lambda x, _: (x @ a, None), a, length=5)[0]

    assert count(scanned, square) == 5 * product
    assert count(lambda a: lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a), square) == product
    assert count(lambda a: lax.platform_dependent(a, cpu=jnp.sin, default=lambda a: a @ a), square) == product
    # Two forwards, one of them again, and two each backwards.
    assert (
        count(jax.grad(lambda a: (jax.checkpoint(lambda x: jnp.sin(x @ a) @ a)(a)).sum()), square)
        == 7 * product
    )

    mesh = Mesh(jax.devices(), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    spread = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert count(spread, (8 * mesh.size, 4), square) == 2 * 8 * mesh.size * 16


def test_the_peak_of_a_mesh(monkeypatch):
    mesh = Mesh(jax.devices(), ("data",))
    assert flops.peak(mesh) is None
    monkeypatch.setitem(flops.PEAKS, jax.devices()[0].device_kind, 100.0)
    assert flops.peak(mesh) == 100 * mesh.size


def test_what_nothing_uses_is_not_counted():
    def step(x, y):
        def weigh(_, part):
            return None, (part @ y).sum() * 0 + part.sum()

        def count(_, part):
            dead = part @ y
            del dead
            return None, part.sum()

        return jax.lax.scan(weigh, None, x)[1].sum() + jax.lax.scan(count, None, x)[1].sum()

    x, y = jnp.ones((4, 8, 16)), jnp.ones((16, 32))
    assert matrix_flops(jax.jit(step).trace(x, y).jaxpr) == 4 * 2 * 8 * 16 * 32
