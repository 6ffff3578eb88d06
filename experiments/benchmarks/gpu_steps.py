"""Training steps on a GPU, beside PyTorch's."""

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnx2_jax.models import create_model
from cnx2_jax.models.fcmae import LAYOUTS
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe.flops import PEAKS, matrix_flops
from cnx2_jax.observe.tables import markdown_table
from experiments.benchmarks.gpu_peers import Peers
from experiments.benchmarks.gpu_timing import notice, seconds
from experiments.benchmarks.pretraining import pretraining_loss, train_step

THREADS = 8  # that compile side by side


def measure_steps(
    sizes: dict[str, tuple[int, int]], peers: list[str], *, small: bool
) -> tuple[list[dict], str]:
    """Times training steps: pretraining in every layout, and fine-tuning a classifier.

    Args:
      sizes: for each variant, how many images and their pixels along both sides.
      peers: variants that PyTorch runs too.
      small: measure hardly at all.

    Returns:
      Records, and a table.
    """
    wanted: list[tuple[str, str, str, dict[str, Any]]] = []
    for name in sizes:
        for layout in LAYOUTS:
            wanted.append((name, "pretraining", layout, {"layout": layout, "platform": "gpu"}))
        wanted.append((name, "fine-tuning", "dense", {"num_classes": 1000, "drop_path": 0.1}))
    records = []
    with (
        Peers({name: sizes[name] for name in peers if name in sizes}) as others,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        compiled = []
        for name, _, _, options in wanted:
            traced, shapes = _trace_step(name, *sizes[name], **options)
            compiled.append((traced, shapes, pool.submit(_compile, traced)))
        concurrent.futures.wait(future for *_, future in compiled)
        others.wait()  # so that no compiler disturbs what is timed
        for (name, program, mode, _), (traced, shapes, future) in zip(wanted, compiled, strict=True):
            record = {"variant": name, "program": program, "mode": mode}
            records.append(record | _time_step(traced, shapes, *future.result(), small=small))
            notice(str(records[-1]))
        records += others.measure(small=small)
    return records, _step_table(records)


def _trace_step(name: str, batch: int, size: int, **options):
    """Traces a train step with AdamW, from shapes alone; scans as `model.scan=auto` does."""
    family, make_loss = (
        ("convnextv2", _classification_loss) if "num_classes" in options else ("fcmae", pretraining_loss)
    )
    options |= {"dtype": jnp.bfloat16, "scan": jax.default_backend() == "cpu"}
    graph, params = split(
        nnx.eval_shape(lambda: create_model(f"{family}_{name}", rngs=nnx.Rngs(0), **options))
    )
    optimizer, step = train_step(graph, make_loss)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, images, keys), (params, state, images)


def _compile(traced) -> tuple:
    begin = time.perf_counter()
    return traced.lower().compile(), time.perf_counter() - begin


def _time_step(traced, shapes: tuple, compiled, compile_seconds: float, *, small: bool) -> dict:
    params, state, images = shapes
    noise = 0.02 * np.random.default_rng(0).standard_normal(2**20 + 7, np.float32)
    held = [
        {key: jnp.asarray(np.resize(noise, p.shape)) for key, p in params.items()},
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state),
    ]
    batch = images.shape[0]
    images = jax.random.normal(jax.random.key(1), images.shape)
    keys = jax.random.split(jax.random.key(2), batch)

    def call(_):
        *held[:], value = compiled(*held, images, keys)
        return value

    taken = seconds(call, jax.block_until_ready, small=small)
    memory = compiled.memory_analysis()
    flops, peak = matrix_flops(traced.jaxpr.jaxpr), PEAKS.get(jax.devices()[0].device_kind)
    return {
        "batch": batch,
        "seconds": taken,
        "compile": compile_seconds,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,  # the state is donated
        "flops": flops,
        "utilisation": flops / taken / peak if peak else None,
    }


def _classification_loss(graph) -> Callable:
    """Returns a function of parameters, images and keys: cross-entropy against labels drawn from the keys."""
    import optax

    def loss(params, images, keys):
        labels = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(keys)
        logits = merge(graph, params)(images, keys)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def _step_table(records: list[dict]) -> str:
    rows = []
    for r in records:
        peers = [
            p["seconds"] / r["seconds"]
            for mode in ("eager", "compile")
            for p in records
            if (p["variant"], p["program"], p["mode"]) == (r["variant"], r["program"], mode)
        ]
        ratios = [f"{ratio:.2f}x" for ratio in peers] if r["mode"] not in ("eager", "compile") else []
        rows.append(
            [
                f"{r['variant']}, {r['program']}, batch {r['batch']}",
                r["mode"],
                *(ratios + ["-"] * 2)[:2],
                f"{r['batch'] / r['seconds']:.0f}",
                f"{1e3 * r['seconds']:.1f}",
                f"{r['peak_bytes'] / 2**30:.2f}" if r.get("peak_bytes") else "-",
                f"{100 * r['utilisation']:.0f}%" if r.get("utilisation") else "-",
                f"{r['compile']:.0f}" if "compile" in r else "-",
            ]
        )
    header = ["224 px, bfloat16", "mode", "over eager", "over compile", "images/s", "ms", "GiB"]
    return markdown_table([*header, "of peak FLOP/s", "compile s"], rows)
