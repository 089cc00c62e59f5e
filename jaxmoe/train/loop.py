"""The training loop: feeds the compiled steps, evaluates, saves and reports.

A run that stops, by a signal or a crash, continues with `--resume` as if it had never stopped; on CPU, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmoe import stopping
from jaxmoe.cli.notices import shown_notices
from jaxmoe.cli.progress import TrainingProgress, reading_weights
from jaxmoe.distributed import ending, launch
from jaxmoe.distributed.agreement import check_agreement, exchange, wait_for_all
from jaxmoe.errors import UserError, in_words
from jaxmoe.model.interface import Params
from jaxmoe.out_of_memory import explained
from jaxmoe.parameters import CHOICE_BIAS
from jaxmoe.runs.record import ExpertLoad
from jaxmoe.stopping import Postponed
from jaxmoe.store.digest import WeightsDigest, combined
from jaxmoe.store.files import naming_files
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train.best import Best
from jaxmoe.train.compiled_steps import CompiledSteps
from jaxmoe.train.data import tokenizer_folder
from jaxmoe.train.export import export_results
from jaxmoe.train.identity import (
    Identity,
    as_json,
    check_same_run,
    model_content,
    previous_identity,
    record_changes,
    remove_start,
    write_config_file,
    write_run_file,
)
from jaxmoe.train.metrics import MetricsLog, Unwritten, device_load, expert_load
from jaxmoe.train.optimizers import learning_rate, make_optimizer
from jaxmoe.train.prepare import Plan, prepare
from jaxmoe.train.processes import claimed_by_first, settings_of_processes
from jaxmoe.train.publish import check_access
from jaxmoe.train.reference import fill_in_reference
from jaxmoe.train.run_page import RunPage
from jaxmoe.train.samples import Sampler
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.speed import Arrivals, Arrived, Speed
from jaxmoe.train.step import (
    StepMetrics,
    TrainState,
    initial_state,
    state_to_compile,
)
from jaxmoe.train.trackers import Ended, Reported, Trackers, check_trackers
from jaxmoe.train.watch import CHANGED, Watch, watch_in_words

_log = logging.getLogger("jaxmoe")


def train(settings: TrainConfig, on_step: Callable[[dict[str, Any]], None] = lambda numbers: None) -> dict[str, Any]:
    """Trains and writes the output folder; `on_step` gets each step's numbers, as in metrics.jsonl.

    Returns:
        steps, loss (of the last step), eval_loss_before and eval_loss (None without held-out records), best_step and
        best_eval_loss (of the evaluations after a step), seconds, stopped_by (the signal that ended the run early, or
        None).

    Raises:
        UserError: bad input, before anything is written; a changed setting on resume; a loss that is not finite.
    """
    with shown_notices(), ending.together():
        return _train(settings, on_step)


def _train(settings: TrainConfig, on_step: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    check_agreement(settings_of_processes(settings))
    with claimed_by_first(settings.output) as shared, naming_files({settings.output: settings.output}):
        return _train_locked(settings, on_step, shared)


def _train_locked(
    settings: TrainConfig, on_step: Callable[[dict[str, Any]], None], shared: pathlib.Path | None
) -> dict[str, Any]:
    started = time.perf_counter()
    previous = previous_identity(settings)
    if launch.this().is_first:  # it alone reports and publishes
        check_trackers(settings.trackers, settings.output)
        if settings.push_to_hub is not None:
            check_access(settings.push_to_hub)
    plan = prepare(settings, previous, shared)
    with contextlib.closing(plan.data), explained(plan.smaller_steps):
        summary = _train_plan(plan, previous, on_step)
    return summary | {"seconds": time.perf_counter() - started}


def _train_plan(plan: Plan, previous: Identity | None, on_step: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Trains what `plan` says; `previous` is the identity of the run that is resumed."""
    settings = plan.settings
    check_agreement(plan.identity)
    if previous is not None:
        check_same_run(settings, previous, {"model": previous.get("model")} | plan.identity)
    rate = learning_rate(settings.schedule, settings.learning_rate, plan.warmup_steps, plan.total_steps)
    optimizer = make_optimizer(settings, plan.model, rate)
    sampler = None
    if settings.sample_prompts is not None:
        sampler = Sampler(settings, settings.sample_prompts, tokenizer_folder(settings), plan.model)
    state = state_to_compile(plan.model, plan.source.shapes.trainable, optimizer)
    compiled = CompiledSteps(plan, optimizer, rate, state)
    try:
        if plan.is_tight:
            compiled.wait()
        frozen, trainable, weights = _read_weights(plan)
    except BaseException:
        compiled.cancel()
        raise
    model = model_content(plan.model.config, frozen or trainable, weights, previous)
    identity = {"model": model} | plan.identity
    check_agreement({"model": model})
    changes = {} if previous is None else check_same_run(settings, previous, identity)
    if plan.model.moments_on_host:
        state = state._replace(trainable=trainable)
    else:
        state = plan.model.placement.place_state(initial_state(trainable, optimizer), trainable)
    first = launch.this().is_first
    with NewOutput(settings.output, new=previous is None and first) as output:
        if previous is None and first:
            remove_start(settings.output)
            settings.output.mkdir(exist_ok=True)
            write_run_file(settings, identity)
        if first:
            write_config_file(settings)
        wait_for_all()
        if settings.stores_reference:
            fill_in_reference(plan, frozen, state.trainable)
        # Before a checkpoint is restored: the trained arrays are still those of the model as the run began.
        watch = None if plan.data.probe is None else Watch(plan, plan.data.probe, frozen, state.trainable)
        begin = Begin(output, partial(record_changes, settings, identity, changes), changes, sampler, watch)
        state, stopped_by, summary = _run(plan, frozen, state, compiled, on_step, begin)
    if stopped_by is None:
        export_results(plan, state.trainable)
    return summary | {"stopped_by": stopped_by}


def _read_weights(plan: Plan) -> tuple[Params, Params, str | None]:
    """The frozen and the trainable arrays, and the digest of what was read; None for random weights."""
    with reading_weights() as on_layer, WeightsDigest(exchange) as digest:
        weights = plan.source.load(on_layer, digest, plan.on_host)
        return *weights, combined(digest.parts()) if plan.source.from_folder else None


def _run(
    plan: Plan,
    frozen: Params,
    state: TrainState,
    compiled: CompiledSteps,
    on_step: Callable[[dict[str, Any]], None],
    begin: Begin,
) -> tuple[TrainState, int | None, dict[str, Any]]:
    """Restores the state and trains: (state to write, the signal that ended the run early, summary)."""
    settings, best = plan.settings, Best()
    checkpoints = TrainCheckpoints(settings.output / "checkpoints", keep=settings.keep_checkpoints)
    restored = checkpoints.restore_latest(state, settings.resume_from)
    first, before = 0, None
    if restored is not None:
        first, state, saved = restored
        before, best = saved["eval_loss_before"], Best.stored_in(saved)
        plan.data.restore(saved.get("data"))
    log: MetricsLog | Unwritten = Unwritten()
    keep_to = first if restored is not None else -1
    page: RunPage | None = None
    if launch.this().is_first:
        begin.record(first)
        log = MetricsLog(settings.output, keep_to=keep_to)
        page = RunPage(settings.output, keep_to)
    progress = TrainingProgress(plan.total_steps, first)
    arrivals = Arrivals()
    ended: Ended = "failed"
    try:
        names = settings.trackers if launch.this().is_first else ()
        trackers = Trackers(names, Reported(settings.output, as_json(settings), keep_to))
        log.also(trackers)
        about_watch = begin.watch.notices if begin.watch is not None else []
        for notice in [*plan.notices, *about_watch, *trackers.notices, *filter(None, [checkpoints.notice])]:
            _log.info(notice)
        if settings.resumes:
            _log.info(f"continuing at step {first}" if restored else "no checkpoint yet: starting at step 0")
        for name, (was, now) in begin.changes.items():
            _log.info(f"{name}: {in_words(was)} before, {in_words(now)} after step {first}")
        if settings.keep_best and best.step is not None and best.step not in checkpoints.steps():
            _log.info(f"step {best.step} had the lowest held-out loss, and its checkpoint is gone: chosen from here on")
            best = Best()
        recorders = Recorders(checkpoints, log, progress, arrivals, begin, best, page)
        loop = Loop(plan, frozen, compiled, recorders, on_step)
        loop.summary |= {"steps": first, "eval_loss_before": before}
        state, stopped_by = loop.train(state, first)
        loop.summary |= {"best_step": best.step, "best_eval_loss": None if best.step is None else best.loss}
        if settings.keep_best and stopped_by is None and best.step not in (None, loop.summary["steps"]):
            state = _restored(checkpoints, state, best.step)
        ended = "done" if stopped_by is None else "stopped"
    finally:
        arrivals.close()
        progress.close()
        log.close(ended)
        checkpoints.close()
    return state, stopped_by, loop.summary


def _restored(checkpoints: TrainCheckpoints, like: TrainState, step: int) -> TrainState:
    """The state of an earlier step, in the host's memory: the device's holds the last one. Of several processes each
    restores its share on its devices."""
    template = like
    if launch.this().count == 1:
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    restored = checkpoints.restore_latest(template, str(step))
    assert restored is not None
    return restored[1]


class Begin(NamedTuple):
    """What a run begins with."""

    output: NewOutput
    record: Callable[[int], None]  # records `changes`, given the step after which they hold
    changes: Mapping[str, list[Any]]  # what a resumed run does otherwise than before: name -> before, now
    sampler: Sampler | None
    watch: Watch | None


class NewOutput:
    """The output folder of a run; of a new one, what ends the run before its first step is done removes the content, so
    that the folder does not refuse the next run."""

    def __init__(self, output: pathlib.Path, *, new: bool) -> None:
        self._begun = contextlib.ExitStack()
        self._remove = partial(remove_start, output)
        self._new = new

    def __enter__(self) -> NewOutput:
        if self._new:
            self._begun.enter_context(stopping.undone_by(self._remove))
        return self

    def keep(self) -> None:
        """To be called when the first step is done: from then on the content stays."""
        self._new = False
        self._begun.close()

    def __exit__(self, *exc_info: object) -> None:
        if self._new:
            self._remove()
        self._begun.close()


class Recorders(NamedTuple):
    """Where a run's state and numbers go, the thread that waits for the numbers, how the run began, and the best
    evaluation so far."""

    checkpoints: TrainCheckpoints
    log: MetricsLog | Unwritten
    progress: TrainingProgress
    arrivals: Arrivals
    begin: Begin
    best: Best
    page: RunPage | None  # of the first process


class Loop:
    """The steps of one run; a step's numbers are reported after the next step was started, so that the device never
    waits for the host."""

    def __init__(
        self,
        plan: Plan,
        frozen: Params,
        compiled: CompiledSteps,
        recorders: Recorders,
        on_step: Callable[[dict[str, Any]], None],
    ) -> None:
        self._plan, self._frozen, self._compiled = plan, frozen, compiled
        self._checkpoints, self._log, self._progress, self._arrivals, self._begin, self._best, self._page = recorders
        self._on_step = on_step
        self._unshown: OSError | None = None  # why progress can no longer be shown, such as a closed pipe
        self._speed = Speed()
        self.summary: dict[str, Any] = {"steps": 0, "loss": None, "eval_loss_before": None, "eval_loss": None}

    def train(self, state: TrainState, first: int) -> tuple[TrainState, int | None]:
        """Trains from step `first`; returns the state and the signal that ended the run early, if one did.

        A signal that comes before the first step ends the process: there is nothing to save.
        """
        total = self._plan.total_steps
        evaluates = self._plan.data.held_out is not None
        if first == 0:
            numbers = self._measured(state, Due(evaluates, self._begin.watch is not None))
            if evaluates:
                self.summary["eval_loss_before"] = self.summary["eval_loss"] = numbers["eval_loss"]
            if numbers:
                self._write({"step": 0} | numbers)
                self._progress.say(f"step 0/{total}  {_in_words(numbers)}")
            self._draw(0, state)
        train_step = self._compiled.train_step
        with Postponed() as signals, self._time_of_watch():
            return self._steps(train_step, state, first, signals)

    @contextlib.contextmanager
    def _time_of_watch(self) -> Iterator[None]:
        """Says in the end how long measuring the routing took."""
        started, watch = time.perf_counter(), self._begin.watch
        before = watch.seconds if watch is not None else 0.0
        yield
        if watch is not None and (spent := watch.seconds - before):
            share = spent / (time.perf_counter() - started)
            line = f"measuring the routing took {spent:.1f} s, {share:.1%} of the training"
            self._show(partial(self._progress.say, line))

    def _steps(
        self, train_step: Any, state: TrainState, first: int, signals: Postponed
    ) -> tuple[TrainState, int | None]:
        settings, total = self._plan.settings, self._plan.total_steps
        evaluates = self._plan.data.held_out is not None
        pending: tuple[int, Future[Arrived]] | None = None
        common_stop = ending.CommonStop()
        for step in range(first + 1, total + 1):
            if self._best.is_over(settings.patience):
                self._show(partial(self._progress.say, f"stopped after step {step - 1}: {self._best.words()}"))
                break
            frozen, batch = self._plan.fed(self._frozen, self._plan.batch(step - 1))
            state, metrics = train_step(frozen, state, batch)
            arrival = self._arrivals.expect(metrics)
            if pending is not None:
                self._report(*pending)
            pending = (step, arrival)
            last = step == total
            due = Due(
                evaluates and (last or _due(step, settings.eval_every)),
                self._begin.watch is not None and (last or _due(step, settings.watch_every)),
            )
            wish = signals.received if signals.received is not None or self._unshown is None else 0
            stopped_by = common_stop.after(step, wish)
            stop = stopped_by is not None
            if any(due):
                self._report(*pending, partial(self._measured, state, due))
                pending = None
            is_best = settings.keep_best and self._best.step == step
            save = last or stop or is_best or self._best.is_over(settings.patience) or _due(step, settings.save_every)
            if save:
                if pending is not None:
                    self._report(*pending)
                    pending = None
                self._save(step, state)
            if any(due) or last:
                self._draw(step, state, samples=due.evaluation or last)
            if any(due) or save:
                self._speed.restart(time.perf_counter())
            if stop and not last:
                if self._unshown is not None and signals.received is None:
                    raise self._unshown
                return state, stopped_by
        return state, None

    def _save(self, step: int, state: TrainState) -> None:
        metadata = {"eval_loss_before": self.summary["eval_loss_before"], "data": self._plan.data.position()}
        metadata |= self._best.stored()
        spared = self._best.step if self._plan.settings.keep_best else None
        self._checkpoints.save(step, state, metadata, spared=spared)

    def _write(self, numbers: dict[str, Any], load: ExpertLoad | None = None) -> None:
        self._log.write(numbers)
        if self._page is not None:
            self._page.add(numbers, load)

    def _draw(self, step: int, state: TrainState, *, samples: bool = True) -> None:
        """Rewrites the run's page, with samples of this step if prompts were given."""
        if self._page is not None:
            sampler = self._begin.sampler if samples else None
            self._page.draw(sampler(step, self._frozen, state.trainable) if sampler else ())

    def _measured(self, state: TrainState, due: Due) -> dict[str, Any]:
        """The numbers of what is due."""
        numbers: dict[str, Any] = self._evaluate(state) if due.evaluation else {}
        if due.evaluation and (bias := state.trainable.get(CHOICE_BIAS)) is not None:
            # As other programs read what is written; a bias of 0 chooses the same experts.
            written = state._replace(trainable=state.trainable | {CHOICE_BIAS: 0 * bias})
            numbers["eval_loss_without_bias"] = self._evaluate(written)["eval_loss"]
        if due.watch and self._begin.watch is not None:
            numbers |= self._begin.watch(self._frozen, state.trainable)
        return numbers

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        """`eval_loss`, the mean loss over the held-out sequences (in nats for next tokens), and with `eval_` before
        their names the means of what the loss reports besides."""
        parts = []
        for held_out in self._plan.held_out_batches():
            frozen, batch = self._plan.fed(self._frozen, held_out)
            parts.append(self._compiled.eval_step(frozen, state.trainable, batch))
        sums, weights = zip(*jax.device_get(parts), strict=True)
        weight = np.sum(weights, dtype=np.float64)
        mean = lambda values: float(np.sum(values, dtype=np.float64) / weight)
        further = {f"eval_{name}": mean([each.further[name] for each in sums]) for name in sums[0].further}
        return {"eval_loss": mean([each.loss for each in sums])} | further

    def _report(self, step: int, arrival: Future[Arrived], measure: Callable[[], dict[str, Any]] | None = None) -> None:
        """Waits for a step's numbers, checks and logs them, together with what `measure` finds."""
        metrics, when = arrival.result()
        speed = self._speed.completed(when, int(metrics.tokens))
        self._check_finite(step, metrics)
        self._begin.output.keep()
        numbers: dict[str, Any] = {
            "step": step,
            "loss": float(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
            "tokens_per_second": speed,
            "aux_loss": float(metrics.aux_loss),
            "eval_loss": None,
            **expert_load(metrics.expert_counts),
            **device_load(metrics.expert_counts, self._plan.model.mesh.expert),
            **{name: float(value) for name, value in metrics.further.items()},
        }
        measured = {} if measure is None else measure()
        numbers |= measured
        total, log_every = self._plan.total_steps, self._plan.settings.log_every
        logged = step in (1, total) or _due(step, log_every) or measure is not None
        if logged:
            self._write(numbers, ExpertLoad.of(step, metrics.expert_counts) if metrics.expert_counts.size else None)
            self._speed.restart(when)
        self._show(partial(self._progress.step, numbers, logged=logged))
        if "eval_loss" in measured:
            self.summary["eval_loss"] = measured["eval_loss"]
            self._best.evaluated(step, measured["eval_loss"])
        if measured:
            self._show(partial(self._progress.say, f"step {step}/{total}  {_in_words(measured)}"))
        self.summary |= {"steps": step, "loss": numbers["loss"]}
        self._on_step(numbers)

    def _show(self, show: Callable[[], None]) -> None:
        """Shows progress. If standard output fails, nothing more is shown; the run saves its state and ends."""
        if self._unshown is None:
            try:
                show()
            except OSError as error:
                self._unshown = OSError(error.errno, error.strerror, "standard output")

    def _check_finite(self, step: int, metrics: StepMetrics) -> None:
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = self._checkpoints.latest_step()
            where = "no checkpoint was saved before" if kept is None else f"the checkpoint of step {kept} is kept"
            raise UserError(
                f"loss: expected a finite number, found {loss} (gradient norm {norm}) at step {step}; {where}"
            )


class Due(NamedTuple):
    """What is measured after a step, besides the step's own numbers."""

    evaluation: bool
    watch: bool


def _in_words(measured: Mapping[str, Any]) -> str:
    """What is said of the numbers that were measured after a step."""
    said = [f"held-out loss {measured['eval_loss']:.4f}"] if "eval_loss" in measured else []
    return ", ".join(said + ([watch_in_words(measured)] if CHANGED in measured else []))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
