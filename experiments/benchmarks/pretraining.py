"""The programs of masked pretraining and classification that `experiments.benchmarks.steps` times."""

import time
from collections.abc import Callable

from experiments.benchmarks.contestants import CLASSIFY, FORWARD, TRAIN, Contestant, Facts, Programs

DENSE = "dense"


def compile_with_facts(function: Callable, *arguments, donate: tuple[int, ...] = ()) -> tuple[Callable, dict]:
    """Compiles a function of these arguments; returns it and the compiler's facts for a Measurement."""
    import jax

    begin = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return compiled, {
        "compile_seconds": time.perf_counter() - begin,
        "temp_bytes": memory.temp_size_in_bytes if memory else None,
        "flops": (compiled.cost_analysis() or {}).get("flops"),
    }


def pretraining_loss(graph) -> Callable:
    """Returns a function of parameters, images and keys that returns the mean loss."""
    from cnx2_jax.models.state import merge

    return lambda params, images, keys: merge(graph, params).loss(images, keys).mean()


def train_step(graph, make_loss: Callable = pretraining_loss) -> tuple:
    """Returns AdamW and a train step, which returns the new parameters, the new state and the loss.

    Args:
      graph: the model's structure.
      make_loss: given `graph`, returns the loss as a function of parameters, images and keys.
    """
    import jax
    import optax

    optimizer = optax.adamw(1e-4, b2=0.95, weight_decay=0.05)
    loss = make_loss(graph)

    def step(params, state, images, keys):
        value, gradients = jax.value_and_grad(loss)(params, images, keys)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer, step


def build_jax(contestant: Contestant) -> tuple[Programs, Facts]:
    """Builds the programs of a contestant whose `mode` is a layout, or DENSE to classify."""
    import jax
    from flax import nnx

    from cnx2_jax.models import create_model
    from cnx2_jax.models.state import merge, split

    size = contestant.image_size
    images = jax.random.normal(jax.random.key(1), (contestant.batch, size, size, 3))
    keys = jax.random.split(jax.random.key(2), contestant.batch)
    programs: Programs = {}
    facts: Facts = {}

    def compile_program(name: str, function: Callable, *arguments, donate=()):
        compiled, facts[name] = compile_with_facts(function, *arguments, donate=donate)
        return compiled

    if contestant.mode == DENSE:
        graph, params = split(create_model(f"convnextv2_{contestant.variant}", rngs=nnx.Rngs(0)))
        classify = compile_program(
            CLASSIFY, lambda params, images: merge(graph, params)(images), params, images
        )
        programs[CLASSIFY] = lambda: classify(params, images).block_until_ready()
        return programs, facts

    model = create_model(f"fcmae_{contestant.variant}", layout=contestant.mode, rngs=nnx.Rngs(0))
    graph, params = split(model)
    optimizer, step = train_step(graph)

    if FORWARD in contestant.programs:
        forward = compile_program(FORWARD, pretraining_loss(graph), params, images, keys)
        fixed = jax.tree.map(lambda x: x.copy(), params)
        programs[FORWARD] = lambda: forward(fixed, images, keys).block_until_ready()
    if TRAIN in contestant.programs:
        held = [params, optimizer.init(params)]
        train = compile_program(TRAIN, step, *held, images, keys, donate=(0, 1))

        def run():
            *held[:], value = train(*held, images, keys)
            jax.block_until_ready(value)

        programs[TRAIN] = run
    return programs, facts


def build_torch(contestant: Contestant) -> tuple[Programs, Facts]:
    """Builds the programs of the peer, eager or compiled."""
    import torch

    from experiments.benchmarks import torch_peer

    torch.manual_seed(0)
    size = contestant.image_size
    images = torch.randn(contestant.batch, 3, size, size).to(memory_format=torch.channels_last)

    def prepare(kind):
        model = kind(contestant.variant).to(memory_format=torch.channels_last)
        return model, torch.compile(model) if contestant.mode == "compile" else model

    model, compiled = prepare(torch_peer.FCMAE)
    _, classifier = prepare(torch_peer.Classifier)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def train():
        optimizer.zero_grad(set_to_none=True)
        compiled(images).backward()
        optimizer.step()

    programs = {
        TRAIN: train,
        FORWARD: torch.no_grad()(lambda: compiled(images)),
        CLASSIFY: torch.no_grad()(lambda: classifier(images)),
    }
    return {name: programs[name] for name in contestant.programs}, {}
