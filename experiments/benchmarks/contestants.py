"""Times contestants in turns, each in a process of its own.

Separate processes keep thread pools and memory apart; taking turns exposes every contestant to the same
noise.
"""

import contextlib
import dataclasses
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

from cnx2_jax.errors import RunError

TRAIN, FORWARD, CLASSIFY = "train step", "forward", "classification forward"
DENSE = "dense"
WARMUP = 2


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to run a model.

    Attributes:
      library: `jax` or `torch`.
      variant: such as `atto`.
      mode: for jax the layout, or `dense` to classify; for torch `eager` or `compile`.
      batch: images.
      image_size: pixels along both sides.
      programs: some of TRAIN (loss, gradient, AdamW), FORWARD (loss) and CLASSIFY.
    """

    library: str
    variant: str
    mode: str
    batch: int = 8
    image_size: int = 224
    programs: tuple[str, ...] = (TRAIN, FORWARD, CLASSIFY)

    @property
    def name(self) -> str:
        return f"{self.library} {self.mode}"


@dataclasses.dataclass
class Measurement:
    """Seconds of every round of one program, and for JAX the compiler's time and figures."""

    contestant: Contestant
    program: str
    seconds: list[float]
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    flops: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict:
        """Returns the measurement as JSON, with its median and quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        values = dataclasses.asdict(self) | {"median": self.median, "quartiles": [low, high]}
        return {key: value for key, value in values.items() if value is not None}


def measure(contestants: Iterable[Contestant], rounds: int, notice: Callable) -> list[Measurement]:
    """Runs all contestants' programs in turns.

    Args:
      contestants: the contestants; one that cannot start is skipped with a notice.
      rounds: turns of each program after warm-up.
      notice: called with lines of progress.

    Raises:
      RunError: the process of a contestant ended early.
    """
    with contextlib.ExitStack() as stack:
        measurements, connections = [], []
        for contestant in contestants:
            notice(f"starting {contestant.name}, {contestant.variant}")
            started = _start(contestant, stack)
            if isinstance(started, str):
                notice(f"skipped {contestant.name}, {contestant.variant}: {started}")
                continue
            connection, facts = started
            for program in contestant.programs:
                measurements.append(Measurement(contestant, program, [], **facts.get(program, {})))
                connections.append(connection)
        for turn in range(rounds):
            notice(f"round {turn + 1} of {rounds}")
            for measurement, connection in zip(measurements, connections, strict=True):
                connection.send(measurement.program)
                measurement.seconds.append(_receive(connection, measurement.contestant))
    return measurements


def _start(contestant: Contestant, stack: contextlib.ExitStack) -> tuple[Connection, dict] | str:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(contestant, theirs), daemon=True)
    process.start()
    theirs.close()
    stack.callback(process.join)
    stack.callback(ours.close)
    facts = _receive(ours, contestant)
    return facts if isinstance(facts, str) else (ours, facts)


def _receive(connection: Connection, contestant: Contestant):
    try:
        return connection.recv()
    except EOFError:
        raise RunError(f"the process of {contestant.name}, {contestant.variant} ended early") from None


def _serve(contestant: Contestant, connection: Connection) -> None:
    """Builds the programs and sends their figures, then runs a program per request and sends its time."""
    try:
        build = _build_jax if contestant.library == "jax" else _build_torch
        programs, facts = build(contestant)
        for run in programs.values():
            for _ in range(WARMUP):
                run()
    except ImportError as error:
        connection.send(f"{error}; the extra `parity` installs PyTorch")
        return
    except Exception:
        connection.send(traceback.format_exc().strip().splitlines()[-1])
        return
    connection.send(facts)
    with contextlib.suppress(EOFError):
        while True:
            run = programs[connection.recv()]
            begin = time.perf_counter()
            run()
            connection.send(time.perf_counter() - begin)


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


def _build_jax(contestant: Contestant) -> tuple[dict[str, Callable], dict[str, dict]]:
    import jax
    from flax import nnx

    from cnx2_jax.models import create_model
    from cnx2_jax.models.state import merge, split

    size = contestant.image_size
    images = jax.random.normal(jax.random.key(1), (contestant.batch, size, size, 3))
    keys = jax.random.split(jax.random.key(2), contestant.batch)
    programs, facts = {}, {}

    def compile_program(name: str, function: Callable, *arguments, donate=()):
        begin = time.perf_counter()
        compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        facts[name] = {
            "compile_seconds": time.perf_counter() - begin,
            "temp_bytes": memory.temp_size_in_bytes if memory else None,
            "flops": (compiled.cost_analysis() or {}).get("flops"),
        }
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


def _build_torch(contestant: Contestant) -> tuple[dict[str, Callable], dict[str, dict]]:
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
