"""The one training loop; every task runs in it."""

import collections
import contextlib
import fcntl
import functools
import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
from flax import nnx

from cnx2_jax import configuration
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.train import sharding
from cnx2_jax.train.checkpoint import Checkpoints
from cnx2_jax.train.program import Program, begin, make_program
from cnx2_jax.train.report import Report, say
from cnx2_jax.train.state import Params, TrainState, merge, split
from cnx2_jax.train.task import Metrics, Task

AVERAGED = "ema_"  # before the metrics of averaged parameters
STEPS_AHEAD = 2  # updates in flight: enough to hide the host's work, few enough to stop soon


class _StopAskedError(Exception):
    """Raised inside an evaluation when the run is asked to stop."""


class _StopRequest:
    """Turns SIGINT and SIGTERM into a flag; a second SIGINT ends the process at once, as usual."""

    def __init__(self):
        self.asked = False
        self._old: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self.asked = True
        say(f"{signal.Signals(number).name}: saving and stopping; Ctrl-C stops without saving")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def check(self, batches: Iterable) -> Iterator:
        for batch in batches:
            if self.asked:
                raise _StopAskedError
            yield batch


def fit(task: Task, workdir: Path) -> Metrics | None:
    """Trains to the end of the run in `workdir`, from its latest checkpoint if it has one.

    Returns:
      The metrics of the last evaluation with its `step`, or None if a signal stopped the run before its
      end; then everything is saved and the same call goes on.

    Raises:
      UserError: see `configuration.make_workdir`, `only_run_in`, `sharding.make_mesh`,
        `make_program` and the task.
      RunError: the loss or the gradient is not finite.
    """
    config, data = task.config, task.data
    mesh = sharding.make_mesh(config.mesh)
    program = make_program(task, mesh)
    total, like = program.total_steps, program.like
    configuration.make_workdir(config, workdir)

    with only_run_in(workdir), _StopRequest() as stop:
        metric, end = task.best
        metric = AVERAGED + metric if config.ema_decay else metric
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, best=(metric, end))
        state = _restore_or_start(task, program, checkpoints, mesh)
        # Not before: a run that could not start, for a wrong init_from, leaves the workdir to the next.
        configuration.record_config(config, workdir)
        step = saved = int(state.step)
        report = Report(workdir, start_step=step, total_steps=total, batch_size=config.batch_size)
        count = sum(math.prod(leaf.shape) for leaf in like.params.values())
        say(
            f"{config.task} {config.model.variant}, {count:,} parameters, on {mesh.size} "
            f"{jax.devices()[0].platform} device(s): {data.num_train:,} images, {total:,} steps of "
            f"{config.batch_size}" + (f", resuming after step {step:,}" if step else "")
        )

        hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = sharding.put_batches(data.train_batches(step, **hosts), mesh)
        flying: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        try:
            while True:
                last = step == total
                due = last or configuration.passes(config.eval_epochs, step, config, data.num_train)
                if due and report.evaluation(step) is None and not stop.asked:
                    _land(flying, 0)
                    with report.paused():
                        _evaluate(task, program.graph, state, mesh, hosts, stop, report, step)
                    if report.evaluation(step) is not None:
                        saved = -1  # what a signal saved without its evaluation is saved again, with it
                asked = stop.asked  # once, as it may change between what depends on it
                due = last or due or asked
                if step > max(saved, 0) and (due or step % config.checkpoint_steps == 0):
                    # Nothing is saved before every update in it is known to be finite.
                    _land(flying, 0)
                    with report.paused():
                        checkpoints.save(step, state, task.card(), report.evaluation(step))
                    saved = step
                if last or asked:
                    best = checkpoints.best()
                    break

                state, metrics = program.step(state, next(batches))
                step += 1
                flying.append((step, metrics))
                _land(flying, STEPS_AHEAD)
                report.progress(step)
                if step % config.log_steps == 0 or step == total:
                    _land(flying, 0)
                    values = {name: float(value) for name, value in metrics.items()}
                    values["learning_rate"] = float(program.schedule(step - 1))
                    values["images_per_sec"] = round(report.images_per_sec(step), 1)
                    report.log(step, "train", values)
        finally:
            report.close()
            checkpoints.close()
    evaluated = report.evaluation(step)
    if evaluated is None:
        say(f"stopped after step {step:,} of {total:,}; the same command goes on from there")
        return None
    say(f"done after step {total:,}; the best checkpoint by {metric} is {best}")
    return {"step": step, **evaluated}


@contextlib.contextmanager
def only_run_in(workdir: Path) -> Iterator[None]:
    """Holds a workdir for this run; the lock ends with the process, however that ends.

    Raises:
      UserError: another process trains in it.
    """
    if jax.process_index() > 0:  # one host of a run holds it for all
        yield
        return
    folder = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another process trains in workdir '{workdir}'; stop it or use another") from None
    finally:
        os.close(folder)


def _restore_or_start(task: Task, program: Program, checkpoints: Checkpoints, mesh) -> TrainState:
    """Resumes in this order: the run's latest checkpoint; else what the task starts from; else fresh."""
    like = program.like
    places = sharding.state_sharding(like, mesh)
    latest = checkpoints.latest()
    if latest is not None:
        shapes = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like, places
        )
        return checkpoints.restore(latest, shapes)

    def fresh(key) -> Params:
        return split(task.init(nnx.Rngs(key)))[1]

    params = jax.jit(fresh, out_shardings=places.params)(jax.random.key(task.config.seed))
    params = jax.device_put(task.start(params), places.params)
    start = functools.partial(begin, task.config, program.transform)
    return jax.jit(start, out_shardings=places)(params)


def _land(flying: collections.deque, most: int) -> None:
    """Waits until at most `most` updates are in flight.

    Raises:
      RunError: an update that landed was not finite.
    """
    while len(flying) > most:
        step, metrics = flying.popleft()
        for name in ("loss", "grad_norm", "update_norm"):
            value = float(metrics[name])
            if not math.isfinite(value):
                raise RunError(
                    f"{name} is {value} at step {step}; stopped, and no checkpoint holds that update: "
                    "lower optimizer.base_learning_rate or set optimizer.clip_norm, and start again in "
                    "another workdir"
                )


def _evaluate(task: Task, graph, state: TrainState, mesh, hosts, stop, report: Report, step: int) -> None:
    def pass_with(params: Params) -> Metrics:
        batches = stop.check(sharding.put_batches(task.data.eval_batches(**hosts), mesh))
        return task.evaluate(merge(graph, params), batches)

    model = merge(graph, state.params)
    try:
        metrics = pass_with(state.params)
        if state.ema is not None:
            metrics |= {AVERAGED + name: value for name, value in pass_with(state.ema).items()}
    except _StopAskedError:
        return  # done when the run goes on, before its next update
    report.log(step, "val", metrics)
    for name, picture in task.pictures(model).items():
        report.picture(step, name, picture)
