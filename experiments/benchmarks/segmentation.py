"""Speed and memory of UperNet's train step on this machine's CPU, against Hugging Face's in PyTorch.

  python -m experiments.benchmarks.segmentation                # minutes on 2 cores; needs the extra `parity`
  python -m experiments.benchmarks.segmentation --rounds 3 --image-size 64    # a quick look

Both compute the losses of both heads over 150 classes at the images' resolution, their gradients, the new
running statistics and AdamW, in float32. Contestants take turns, each in a process of its own. Memory is what
a process holds at most while it trains, beyond what it held once its library was imported.

Writes segmentation.json and a table segmentation.md into the folder --out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.models import variant
from cnx2_jax.observe.tables import markdown_table
from experiments.benchmarks.contestants import PEERS, TRAIN, Contestant, Facts, Measurement, Programs, measure
from experiments.benchmarks.pretraining import compile_with_facts

CLASSES = 150
AUXILIARY_WEIGHT = 0.4


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _run(_parse(argv)), "segmentation")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.benchmarks.segmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark_segmentation"), help="folder; %(default)s by default"
    )
    parser.add_argument("--variant", default="atto", help="%(default)s by default")
    parser.add_argument(
        "--peers", choices=PEERS, nargs="+", default=PEERS, help="of PyTorch; to compile takes minutes"
    )
    parser.add_argument("--rounds", type=count, default=11, help="turns; %(default)s by default")
    parser.add_argument("--batch", type=count, default=2, help="images; %(default)s by default")
    parser.add_argument("--image-size", type=count, default=256, help="pixels; %(default)s by default")
    args = parser.parse_args(argv)
    variant(args.variant)
    if args.image_size % 32:
        raise UserError(f"--image-size {args.image_size} must be a multiple of 32")
    if args.batch < 2:
        raise UserError("--batch 1: BatchNorm needs two images")
    return args


def _run(args: argparse.Namespace) -> None:
    options = {
        "variant": args.variant,
        "batch": args.batch,
        "image_size": args.image_size,
        "programs": (TRAIN,),
    }
    contestants = [
        Contestant(build_jax, "jax", mode="jit", **options),
        *(Contestant(build_torch, "torch", mode=peer, **options) for peer in args.peers),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    found = measure(contestants, args.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    if not found or found[0].contestant.library != "jax":
        raise RunError("the program of JAX could not be built")
    text = table(found)
    content = {"arguments": vars(args) | {"out": str(args.out)}, "records": [m.record() for m in found]}
    (args.out / "segmentation.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "segmentation.md").write_text(text + "\n")
    print(text)


def table(found: list[Measurement]) -> str:
    """Returns times and memory, and both relative to the first contestant, which is ours."""
    ours, *_ = found
    of = ours.contestant
    return markdown_table(
        [
            f"upernet_{of.variant}, batch {of.batch}, {of.image_size} px",
            "ms (quartiles)",
            "time / ours",
            "peak MiB",
            "peak / ours",
        ],
        [
            [
                m.contestant.name,
                f"{1e3 * m.median:.0f} ({' to '.join(f'{1e3 * s:.0f}' for s in m.record()['quartiles'])})",
                f"{m.median / ours.median:.2f}",
                f"{m.peak_bytes / 2**20:.0f}" if m.peak_bytes else "-",
                f"{m.peak_bytes / ours.peak_bytes:.2f}" if m.peak_bytes and ours.peak_bytes else "-",
            ]
            for m in found
        ],
    )


def build_jax(contestant: Contestant) -> tuple[Programs, Facts]:
    """Builds the train step of `upernet_VARIANT`."""
    import jax
    import optax
    from flax import nnx

    from cnx2_jax.models import create_model
    from cnx2_jax.models.resampling import resize
    from cnx2_jax.models.state import merge, parameters, split, variables

    size = (contestant.image_size, contestant.image_size)
    model = create_model(f"upernet_{contestant.variant}", num_classes=CLASSES, rngs=nnx.Rngs(0))
    graph, _ = split(model)
    images = jax.random.normal(jax.random.key(1), (contestant.batch, *size, 3))
    maps = jax.random.randint(jax.random.key(2), (contestant.batch, *size), 0, CLASSES)
    optimizer = optax.adamw(1e-4, weight_decay=0.05)

    def losses(params, others, images, maps, keys):
        model = merge(graph, {**others, **params})
        logits = model(images, keys, train=True)
        main, auxiliary = (
            optax.softmax_cross_entropy_with_integer_labels(resize(scores, size), maps).mean()
            for scores in logits
        )
        return main + AUXILIARY_WEIGHT * auxiliary, variables(model)

    def step(params, others, state, images, maps, key):
        keys = jax.random.split(key, len(images))
        gradient = jax.value_and_grad(losses, has_aux=True)
        (loss, others), gradients = gradient(params, others, images, maps, keys)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), others, state, loss

    params = parameters(model)
    held = [params, variables(model), optimizer.init(params)]
    key = jax.random.key(3)
    train, facts = compile_with_facts(step, *held, images, maps, key, donate=(0, 1, 2))

    def run() -> None:
        *held[:], loss = train(*held, images, maps, key)
        jax.block_until_ready(loss)

    return {TRAIN: run}, {TRAIN: facts}


def build_torch(contestant: Contestant) -> tuple[Programs, Facts]:
    """Builds the train step of transformers' UperNetForSemanticSegmentation, whose sizes are the same."""
    import torch
    from transformers import ConvNextV2Config, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    shape = variant(contestant.variant)
    backbone: dict[str, Any] = {
        "depths": list(shape.depths),
        "hidden_sizes": list(shape.dims),
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    heads: dict[str, Any] = {
        "backbone_config": ConvNextV2Config(**backbone),
        "auxiliary_in_channels": shape.dims[2],
        "auxiliary_loss_weight": AUXILIARY_WEIGHT,
        "num_labels": CLASSES,
    }
    model = UperNetForSemanticSegmentation(UperNetConfig(**heads))
    model = model.train().to(memory_format=torch.channels_last)
    size = contestant.image_size
    images = torch.randn(contestant.batch, 3, size, size).to(memory_format=torch.channels_last)
    maps = torch.randint(CLASSES, (contestant.batch, size, size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    forward = torch.compile(model) if contestant.mode == "compile" else model

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(pixel_values=images, labels=maps).loss.backward()
        optimizer.step()

    return {TRAIN: run}, {}


if __name__ == "__main__":
    sys.exit(main())
