"""The one training loop; every task runs in it."""

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from cnx2_jax import configuration
from cnx2_jax.checkpoints.checkpoint import Checkpoints
from cnx2_jax.cluster import processes
from cnx2_jax.cluster.hang import HangWatch
from cnx2_jax.cluster.stopping import StopAskedError, StopRequest
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.models.state import Params, merge
from cnx2_jax.observe import flops
from cnx2_jax.observe.profile import Profile
from cnx2_jax.observe.progress import say
from cnx2_jax.observe.report import Report, Silence
from cnx2_jax.observe.timing import Observer
from cnx2_jax.train import sharding, starting
from cnx2_jax.train.flight import Flight
from cnx2_jax.train.optimizer import updates_made
from cnx2_jax.train.program import make_program
from cnx2_jax.train.state import TrainState
from cnx2_jax.train.task import Task
from cnx2_jax.types import Metrics

AVERAGED = "ema_"  # before the metrics of averaged parameters


def fit(task: Task, workdir: Path) -> Metrics | None:
    """Trains to the end of the run in `workdir`, from its latest checkpoint if it has one.

    All processes of a run call it; the workdir is the same folder for all, and process 0 writes what is not a
    checkpoint.

    Returns:
      The metrics of the last evaluation with its `step`, or None if a signal stopped the run before its
      end; then everything is saved and the same call goes on.

    Raises:
      UserError: see `configuration.make_workdir`, `only_run_in`, `sharding.make_mesh`,
        `make_program`, `starting.first_state` and the task.
      RunError: the loss or the gradient is not finite, or something cannot be written.
    """
    config, data = task.config, task.data
    observer = Observer(config.batch_size)
    profile = Profile(config.profile_steps, workdir / "profile")
    mesh = sharding.make_mesh(config.mesh)
    program = make_program(task, mesh)
    total, like = program.total_steps, program.like
    configuration.make_workdir(config, workdir)

    with (
        only_run_in(workdir),
        HangWatch(config.hang_seconds, workdir, jax.process_index()) as hang,
        StopRequest(hang.moved) as stop,
    ):
        metric, end = task.best
        metric = AVERAGED + metric if config.ema_decay else metric
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, best=(metric, end))
        state = starting.first_state(task, program.transform, checkpoints, like, mesh)
        with hang.aside():
            task.begin(state.params)
        step = saved = begun = int(state.step)
        report = Silence(workdir, start_step=step)
        if processes.is_first():
            # Not before: a run that could not start, for a wrong init_from, leaves the workdir to the next.
            configuration.record_config(config, workdir)
            report = Report(workdir, start_step=step, total_steps=total, batch_size=config.batch_size)
        count = sum(math.prod(leaf.shape) for leaf in like.params.values())
        several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(
            f"{config.task} {config.model.variant}, {count:,} parameters, on {mesh.size} "
            f"{jax.devices()[0].platform} device(s){several}: {data.num_train:,} images, {total:,} steps of "
            f"{config.batch_size}" + (f", resuming after step {step:,}" if step else "")
        )

        batches = sharding.put_batches(data.train_batches(step, **processes.share()), mesh)
        flight = Flight(config.max_nonfinite, observer.landed)
        with _closing(report, checkpoints, profile):
            while True:
                asked = stop.reached()
                last = step == total
                due = last or configuration.passes(config.eval_epochs, step, config, data.num_train)
                if due and report.evaluation(step) is None and not asked:
                    flight.land()
                    with observer.paused(), contextlib.suppress(StopAskedError):
                        # Where it is interrupted, it is done when the run goes on, before its next update.
                        _evaluate(task, program.graph, state, mesh, stop, report, step)
                        saved = -1  # what a signal saved without its evaluation is saved again, with it
                    asked = stop.reached()
                due = last or due or asked
                if step > max(saved, 0) and (due or step % config.checkpoint_steps == 0):
                    # Nothing is saved before every update in it is known to be finite.
                    flight.land()
                    with observer.paused():
                        checkpoints.save(step, state, task.card(), report.evaluation(step))
                    saved = step
                if last or asked:
                    best = checkpoints.best()
                    break

                profile.before(step + 1)
                with observer.waiting():
                    batch = next(batches)
                if step == begun and (peak := flops.peak(mesh)):
                    observer.expect(flops.matrix_flops(program.step.trace(state, batch).jaxpr) / peak)
                state, metrics = program.step(state, batch)
                step += 1
                flight.start(step, metrics)
                if profile.after(step):
                    flight.land()
                    profile.close()
                report.progress(step)
                if step % config.log_steps == 0 or step == total:
                    flight.land()
                    values = {name: float(value) for name, value in metrics.items()}
                    # A skipped update has metrics that are no numbers, and JSON has none such.
                    values = {name: value for name, value in values.items() if math.isfinite(value)}
                    # Of the last update that was made: the schedule does not follow those that were skipped.
                    made = updates_made(state.opt_state)
                    values["learning_rate"] = float(program.schedule(max(made - 1, 0)))
                    values |= observer.values()
                    report.log(step, "train", values)
    evaluated = report.evaluation(step)
    if evaluated is None:
        say(f"stopped after step {step:,} of {total:,}; the same command goes on from there")
        return None
    say(observer.summary())
    say(f"done after step {total:,}; the best checkpoint by {metric} is {best}")
    return {"step": step, **evaluated}


@contextlib.contextmanager
def only_run_in(workdir: Path) -> Iterator[None]:
    """Holds a workdir for this run; the lock ends with the process, however that ends.

    Raises:
      UserError: another process trains in it.
    """
    if not processes.is_first():  # one host of a run holds it for all
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


@contextlib.contextmanager
def _closing(report: Silence, checkpoints: Checkpoints, profile: Profile) -> Iterator[None]:
    """Closes all three, and so finishes what is being saved.

    But not where the computation fails on several processes: one of them may be gone, and saving would wait
    for it.
    """
    finish = True
    try:
        yield
    except BaseException as error:
        finish = jax.process_count() == 1 or isinstance(error, UserError | RunError)
        raise
    finally:
        if finish:
            profile.close()
            report.close()
            checkpoints.close()


def _evaluate(
    task: Task, graph, state: TrainState, mesh: Mesh, stop: StopRequest, report: Silence, step: int
) -> None:
    """Evaluates and reports.

    Raises:
      StopAskedError: the run is to stop; nothing is reported.
    """

    def pass_with(params: Params) -> Metrics:
        batches = sharding.put_batches(task.data.eval_batches(**processes.share()), mesh)
        return task.evaluate(merge(graph, params), stop.check(batches))

    # Whole: XLA would otherwise gather activations of every layer and batch, as it splits them like kernels.
    whole = sharding.everywhere(state.params, mesh)
    metrics = pass_with(whole)
    pictures = task.pictures(merge(graph, whole)) if processes.is_first() else {}
    del whole
    if state.ema is not None:
        averaged = pass_with(sharding.everywhere(state.ema, mesh))
        metrics |= {AVERAGED + name: value for name, value in averaged.items()}
    report.log(step, "val", metrics)
    for name, picture in pictures.items():
        report.picture(step, name, picture)
