"""The training loop, the same for every task."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from cnx2_jax import configuration
from cnx2_jax.checkpoints.manager import Checkpoints
from cnx2_jax.cluster import processes
from cnx2_jax.cluster.agree import from_first
from cnx2_jax.cluster.hang import HangWatch
from cnx2_jax.cluster.stopping import StopAskedError, StopRequest
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.files import locked
from cnx2_jax.models.state import Params, merge
from cnx2_jax.observe import flops
from cnx2_jax.observe.profile import Profile
from cnx2_jax.observe.progress import say, watched
from cnx2_jax.observe.report import NoReport, Report, read_evaluations
from cnx2_jax.observe.timing import Observer
from cnx2_jax.train import sharding, starting
from cnx2_jax.train.early import EarlyStopping
from cnx2_jax.train.flight import Flight
from cnx2_jax.train.optimizer import updates_made
from cnx2_jax.train.program import make_program
from cnx2_jax.train.state import TrainState, saved_items
from cnx2_jax.train.task import AVERAGED, Task, ranked_by
from cnx2_jax.types import Metrics
from cnx2_jax.workdir import RESULT, make_workdir, record_config


def fit(task: Task, workdir: Path) -> Metrics | None:
    """Trains to the end of the run in `workdir`, from its latest checkpoint if it has one.

    All processes of a run call it with the same workdir. Process 0 writes everything but checkpoints.

    Returns:
      The metrics of the last evaluation with its `step`, or of the best one if the run stopped early; None if
      a signal stopped the run before its end; then everything is saved and the same call resumes it.

    Raises:
      UserError: see `workdir.make_workdir`, `only_run_in`, `sharding.make_mesh`,
        `make_program`, `starting.first_state` and the task.
      RunError: the loss or the gradient is not finite, or something cannot be written.
    """
    config, data = task.config, task.data
    observer = Observer(config.batch_size)
    profile = Profile(config.profile_steps, workdir / "profile")
    mesh = sharding.make_mesh(config.mesh)
    program = make_program(task, mesh)
    total, like = program.total_steps, program.like
    make_workdir(config, workdir)

    with (
        only_run_in(workdir),
        HangWatch(config.hang_seconds, workdir, jax.process_index()) as hang,
        StopRequest(hang.progressed) as stop,
    ):
        metric, end = ranked_by(task.best, config)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, best=(metric, end))
        state = starting.first_state(task, program.transform, checkpoints, like, mesh)
        with hang.suspended():
            task.begin(state.arrays)
        step = saved = begun = int(state.step)
        early = EarlyStopping(metric, end, config.early_stopping_patience)
        # Process 0 reads for all. A checkpoint of this step exists, so these are on disk.
        first = processes.is_first()
        evaluations = from_first(read_evaluations(workdir / "metrics.jsonl", step) if first else None)
        # The evaluation at `step`, None while it was not done.
        evaluated = evaluations[-1] if evaluations and evaluations[-1]["step"] == step else None
        if evaluated is not None and not checkpoints.was_evaluated(step):
            saved = -1  # the run died between the evaluation and saving the checkpoint with it
        report = NoReport()
        if first:
            # Not earlier: after a wrong init_from, the workdir is still free for the corrected command.
            record_config(config, workdir)
            report = Report(workdir, start_step=step, total_steps=total, batch_size=config.batch_size)
        say(_headline(task, mesh, total, step, like))

        batches = sharding.put_batches(data.train_batches(step, **processes.share()), mesh)
        flight = Flight(config.max_nonfinite, observer.landed)
        with _closing(report, checkpoints, profile):
            while True:
                asked = stop.reached()
                last, stalled = step == total, False
                due = last or configuration.passes(config.eval_epochs, step, config, data.num_train)
                if due and evaluated is None and not asked:
                    flight.land()
                    with observer.paused(), contextlib.suppress(StopAskedError):
                        # If it is interrupted, it is done when the run resumes, before the next update.
                        evaluated = _evaluate(task, program.graph, state, mesh, stop, report, step)
                        evaluations.append(evaluated)
                        saved = -1  # a checkpoint without this evaluation is saved again, with it
                    asked = stop.reached()
                if evaluated is not None and not last:
                    stalled = from_first(early.reached(evaluations))
                due = last or due or asked
                if step > max(saved, 0) and (due or step % config.checkpoint_steps == 0):
                    # A checkpoint must not hold an update that is not known to be finite.
                    flight.land()
                    with observer.paused():
                        report.settle()
                        checkpoints.save(step, saved_items(state), task.metadata(), _values(evaluated))
                    saved = step
                if last or stalled or asked:
                    best = checkpoints.best()
                    break

                if step == begun and first:
                    (workdir / RESULT).unlink(missing_ok=True)  # of a run that ended earlier
                profile.before(step + 1)
                with observer.waiting():
                    batch = next(batches)
                if step == begun and (peak := flops.peak(mesh)):
                    observer.expect(flops.matrix_flops(program.step.trace(state, batch).jaxpr) / peak)
                state, metrics = program.step(state, batch)
                step, evaluated = step + 1, None
                flight.start(step, metrics)
                if profile.after(step):
                    flight.land()
                    profile.close()
                report.progress(step)
                if step % config.log_steps == 0 or step == total:
                    flight.land()
                    values = {name: float(value) for name, value in metrics.items()}
                    # JSON has no NaN, so the metrics of a skipped update are left out.
                    values = {name: value for name, value in values.items() if math.isfinite(value)}
                    # The rate of the last update that was applied: the schedule does not count skipped ones.
                    made = updates_made(state.opt_state)
                    values["learning_rate"] = float(program.schedule(max(made - 1, 0)))
                    values |= observer.values()
                    report.log(step, "train", values)
    if evaluated is None or not (last or stalled):
        say(f"stopped after step {step:,} of {total:,}; the same command resumes there")
        return None
    say(observer.summary())
    if stalled:
        say(f"{early.reason(evaluations, data.num_train, config.batch_size)}; the best checkpoint is {best}")
        found = [evaluation for evaluation in evaluations if evaluation["step"] == int(best.name)]
        return found[0] if found else evaluated  # without it only if metrics.jsonl was deleted between starts
    say(f"done after step {total:,}; the best checkpoint by {metric} is {best}")
    return evaluated


def _values(evaluation: Metrics | None) -> Metrics | None:
    """Returns the metrics of an evaluation without its step."""
    return evaluation and {name: value for name, value in evaluation.items() if name != "step"}


def _headline(task: Task, mesh: Mesh, total: int, step: int, like: TrainState) -> str:
    config = task.config
    count = sum(math.prod(leaf.shape) for leaf in like.params.values())
    several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    start = config.get("init_from") or "random weights"
    begin = f"resuming after step {step:,}" if step else f"from {start}, compiling the first"
    kept = jax.config.values["jax_compilation_cache_dir"]
    keeping = f"; compiled programs are kept in {kept}" if kept else ""
    return (
        f"{config.task} {config.model.variant}, {count:,} parameters, on {mesh.size} "
        f"{mesh.devices.flat[0].platform} device(s){several}: {task.data.num_train:,} images, "
        f"{total:,} steps of {config.batch_size}, {begin}{keeping}"
    )


@contextlib.contextmanager
def only_run_in(workdir: Path) -> Iterator[None]:
    """Locks a workdir for this run; see `files.locked`.

    Raises:
      UserError: another process trains in it.
    """
    if not processes.is_first():  # process 0 locks it for all
        yield
        return
    try:
        with locked(workdir):
            yield
    except BlockingIOError:
        raise UserError(
            f"workdir '{workdir}' is in use by another training process; stop it or choose another --workdir"
        ) from None


@contextlib.contextmanager
def _closing(report: NoReport, checkpoints: Checkpoints, profile: Profile) -> Iterator[None]:
    """Closes all three on leaving, which waits for checkpoints that are being saved.

    Not after a failure of a run of several processes: one of them may be gone, and saving would wait for it.
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
    task: Task, graph, state: TrainState, mesh: Mesh, stop: StopRequest, report: NoReport, step: int
) -> Metrics:
    """Evaluates, reports, and returns the metrics with their `step`.

    Raises:
      StopAskedError: the run is to stop; nothing is reported.
    """
    count = task.data.num_val

    def pass_with(arrays: Params, averaged: str = "") -> Metrics:
        what = f"evaluating {averaged}at step {step:,}"
        batches = sharding.put_batches(task.data.eval_batches(**processes.share()), mesh, keep_host=True)
        return task.evaluate(merge(graph, arrays), stop.check(watched(batches, count, what)))

    # Replicated first: XLA would shard activations like kernels, and gather them in every layer and batch.
    whole = sharding.replicated(state.arrays, mesh)
    metrics = pass_with(whole)
    pictures = task.pictures(merge(graph, whole)) if processes.is_first() else {}
    del whole
    if state.ema is not None:
        averaged = pass_with(sharding.replicated(state.ema, mesh), "the averaged weights ")
        metrics |= {AVERAGED + name: value for name, value in averaged.items()}
    report.log(step, "val", metrics)
    for name, picture in pictures.items():
        report.picture(step, name, picture)
    return {"step": step, **metrics}
