"""LoRA fine-tuning, and training of all parameters, of a Qwen3-MoE model: `python -m jaxmoe.train --help`.

The output folder holds the adapter in PEFT's form (`adapter_model.safetensors`, `adapter_config.json`), or the model in
`model/` when all parameters are trained; `metrics.jsonl`, `tensorboard/`, `checkpoints/` (Orbax) and
`train_config.json`. A run that stops, by a signal or a crash, continues with `--resume` as if it had never stopped; on
CPU, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from captures import Capture
from jaxmoe.cli import xla
from jaxmoe.cli.arguments import ArgumentParser, add_dataclass_arguments, dataclass_from_arguments
from jaxmoe.cli.progress import progress, reading_weights
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets, read_json
from jaxmoe.control.replay import Replay
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.packing import Batch, Sequences, cut
from jaxmoe.data.records import Record, digest, hold_out, read_records
from jaxmoe.errors import UserError
from jaxmoe.memory import Remat, choose_remat, device_bytes, human, training_forecast
from jaxmoe.model.init import init_adapters, init_parameters
from jaxmoe.model.interface import Params
from jaxmoe.model.opening import load_adapter, open_checkpoint
from jaxmoe.model.selection import fallbacks, selected_implementations
from jaxmoe.parameters import Quantization
from jaxmoe.store.loading import OnLayer, load_stacks, stack_shapes
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train.export import export_adapter, export_merged, export_model
from jaxmoe.train.metrics import MetricsLog, Progress, expert_load
from jaxmoe.train.step import (
    Model,
    Schedule,
    StepMetrics,
    TrainState,
    adamw,
    initial_state,
    learning_rate,
    make_eval_step,
    make_train_step,
)

_RUN_FILE = "train_config.json"
_UNROLLING_PAYS = 3000  # steps of Qwen3-30B-A3B on an H200 that save what compiling its layers takes (README)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on; each field is a flag of `python -m jaxmoe.train`.

    Raises:
        UserError: a value out of range, or flags that exclude each other.
    """

    data: pathlib.Path = field(metadata={"help": "JSONL records to train on"})
    output: pathlib.Path = field(metadata={"help": "folder to write; new or empty, unless --resume"})
    model: pathlib.Path | None = field(
        default=None, metadata={"help": "model folder: HF form, or converted by python -m convert hf2jax"}
    )
    adapter: pathlib.Path | None = field(
        default=None, metadata={"help": "adapter folder to start from; it decides targets, rank and alpha"}
    )
    full: bool = field(
        default=False,
        metadata={"help": "train all parameters of --model, not adapters, and write the model in HF form"},
    )
    from_scratch: pathlib.Path | None = field(
        default=None, metadata={"help": "config.json of a new model to train from random weights"}
    )
    tokenizer: pathlib.Path | None = field(
        default=None, metadata={"help": "folder with the tokenizer, for --from-scratch"}
    )

    lora_targets: tuple[str, ...] = field(
        default=("attention",),
        metadata={"help": "groups (attention, router, experts, dense) or names such as q_proj, experts.down_proj"},
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: float = field(default=32.0, metadata={"help": "the low-rank product is scaled by alpha / r"})
    rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r) instead"})

    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    schedule: Schedule = field(default="cosine", metadata={"help": "course of the learning rate behind the warm-up"})
    warmup_steps: int | None = field(
        default=None, metadata={"help": "steps of linear warm-up (default: from --warmup-ratio)"}
    )
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of all steps to warm up over"})
    epochs: int | None = field(default=None, metadata={"help": "passes over the data (default: 1, unless --max-steps)"})
    max_steps: int | None = field(default=None, metadata={"help": "optimizer steps, instead of --epochs"})
    batch_size: int = field(default=4, metadata={"help": "rows per micro-batch"})
    accumulation: int = field(default=1, metadata={"help": "micro-batches per optimizer step"})
    seq_length: int = field(default=1024, metadata={"help": "tokens per row"})
    pack: bool = field(default=True, metadata={"help": "pack several records into a row (each sees only itself)"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip gradients to this global norm; 0 never clips"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's decoupled weight decay"})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon"})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "weight of the load-balancing loss (default: the model config's)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of fresh weights and of the order of the data"})
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None,
        metadata={"help": "dtype to compute in (default: the model's own; float32 when all parameters are trained)"},
    )
    quantize: Literal["nf4"] | None = field(
        default=None, metadata={"help": "hold the frozen projections, dense MLPs and experts in 4 bits (QLoRA)"}
    )
    remat: Literal["auto", "fast", "balanced", "low-memory", "offload"] = field(
        default="auto",
        metadata={
            "help": "what to keep for the backward pass; fast: all that is dear, balanced: not the experts' products, "
            "low-memory: each layer's input; auto: the first of these that the device's memory holds by forecast; "
            "offload: each layer's input, in the host's memory, and half as many logits at a time"
        },
    )
    unroll_layers: bool = field(
        default=False,
        metadata={
            "help": "compile the layers one by one, not one for all: on a GPU a step is 4 to 5 % faster, the first "
            "one takes a minute or so longer; for runs of thousands of steps, where adapters are trained"
        },
    )

    replay: pathlib.Path | None = field(
        default=None,
        metadata={"help": "capture of the training data whose experts are used instead of the router's choice"},
    )

    eval_data: pathlib.Path | None = field(default=None, metadata={"help": "JSONL records to evaluate on"})
    eval_fraction: float | None = field(default=None, metadata={"help": "share of --data to hold out and evaluate on"})
    eval_every: int | None = field(
        default=None, metadata={"help": "evaluate every so many steps (always before the first and after the last)"}
    )
    save_every: int | None = field(
        default=None, metadata={"help": "save a checkpoint every so many steps (always after the last)"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "how many checkpoints to keep"})
    resume: bool = field(
        default=False, metadata={"help": "continue from the last checkpoint in --output, if there is one"}
    )
    log_every: int = field(default=10, metadata={"help": "log every so many steps"})
    tensorboard: bool = field(default=True, metadata={"help": "write TensorBoard files"})
    merge: bool = field(default=False, metadata={"help": "also write the model with the adapter merged, in HF form"})

    def __post_init__(self) -> None:
        for name in "lora_r batch_size accumulation seq_length keep_checkpoints log_every".split():
            _at_least(name, getattr(self, name), 1)
        for name in "epochs max_steps eval_every save_every".split():
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in "warmup_steps router_aux_loss_coef".split():
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 0)
        for name in "seed learning_rate warmup_ratio max_grad_norm weight_decay adam_epsilon".split():
            _at_least(name, getattr(self, name), 0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected a number from 0 to below 1, found {getattr(self, name)!r}")
        if self.epochs is not None and self.max_steps is not None:
            raise UserError("epochs and max_steps: expected one of them, found both")
        if self.eval_data is not None and self.eval_fraction is not None:
            raise UserError("eval_data and eval_fraction: expected one of them, found both")
        if self.eval_every is not None and self.eval_data is None and self.eval_fraction is None:
            raise UserError("eval_every: expected eval_data or eval_fraction with it, found neither")
        if (self.model is None) == (self.from_scratch is None):
            found = "neither" if self.model is None else "both"
            raise UserError(f"model and from_scratch: expected one of them, found {found}")
        if (self.from_scratch is None) != (self.tokenizer is None):
            raise UserError("tokenizer: expected with from_scratch, and only there")
        if self.trains_all and (self.adapter is not None or self.merge):
            raise UserError("adapter and merge: expected only where adapters are trained")
        if self.trains_all and self.quantize is not None:
            raise UserError("quantize: expected only where adapters are trained")
        if self.unroll_layers and (self.trains_all or self.remat == "offload"):
            raise UserError("unroll_layers: expected only where adapters are trained, and without remat offload")
        if self.full and self.from_scratch is not None:
            raise UserError("full: expected with model; from_scratch trains all parameters anyway")
        lora = ("lora_targets", "lora_r", "lora_alpha", "rslora")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = [name for name in lora if getattr(self, name) != defaults[name]]
        if changed and (self.trains_all or self.adapter is not None):
            owner = "all parameters are trained" if self.trains_all else "the adapter decides it"
            raise UserError(f"{changed[0]}: expected none, {owner}")

    @property
    def trains_all(self) -> bool:
        """Whether all parameters are trained, not adapters."""
        return self.full or self.from_scratch is not None


_Weights = tuple[Params, Params]  # frozen ones, trainable ones
_Shapes = tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]  # of these


@dataclass(frozen=True)
class _Run:
    """What a run needs, read and checked before anything is written; of the weights only what they will be."""

    model: Model
    shapes: _Shapes
    load: Callable[[OnLayer], _Weights]
    rows: Sequences
    eval_rows: Sequences | None
    total_steps: int
    warmup_steps: int
    aux_coefficient: float
    notices: list[str]
    replay: Replay | None
    identity: dict[str, Any]  # flag -> value, of everything but the weights that the course of the run depends on

    def batch(self, step: int, settings: TrainConfig) -> Batch:
        """The input of a step, from 0 on."""
        batch = self.rows.batch(step, (settings.accumulation, settings.batch_size))
        return batch if self.replay is None else self.replay.on(batch)


class _Compiled:
    """The training step and, where it is needed, the evaluation step, traced and compiled while the weights are read.

    From shapes alone: reading takes longest, and XLA, which tries products on buffers of its own, does not have to find
    room for them beside all the weights.
    """

    def __init__(self, plan: _Run, settings: TrainConfig, optimizer: optax.GradientTransformation, rate: Any) -> None:
        frozen, trainable = plan.shapes
        state = jax.eval_shape(partial(initial_state, optimizer=optimizer), trainable)
        train_step = jax.jit(make_train_step(plan.model, optimizer, rate, plan.aux_coefficient), donate_argnums=1)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._train = self._begin(train_step, frozen, state, plan.batch(0, settings))
        self._evaluate = None
        if plan.eval_rows is not None:
            batch = plan.eval_rows.batch(0, (settings.batch_size,))
            self._evaluate = self._begin(jax.jit(make_eval_step(plan.model)), frozen, trainable, batch)

    def _begin(self, step: Any, *shapes: Any) -> Future[Any]:
        # What the choice of implementations depends on may be a variable of this thread's context.
        return self._pool.submit(copy_context().run, lambda: step.lower(*shapes).compile())

    def cancel(self) -> None:
        """Begins nothing that has not begun: a process that ends waits for what has."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def train_step(self) -> Callable[[Params, TrainState, Batch], tuple[TrainState, StepMetrics]]:
        return self._train.result()

    @property
    def eval_step(self) -> Callable[[Params, Params, Batch], tuple[jax.Array, jax.Array]]:
        assert self._evaluate is not None
        return self._evaluate.result()


def train(settings: TrainConfig, on_step: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Trains and writes the output folder; `on_step` gets each step's numbers, as they stand in metrics.jsonl.

    Returns:
        steps, loss (of the last step), eval_loss_before and eval_loss (None without held-out records), seconds,
        stopped_by (the signal that ended the run early, or None).

    Raises:
        UserError: bad input, before anything is written; a changed setting on resume; a loss that is not finite.
    """
    started = time.perf_counter()
    previous = _previous_run(settings)
    plan = _prepare(settings, previous)
    if previous is not None:
        _same_run(settings.output, previous, {"model": previous.get("model")} | plan.identity)
    rate = learning_rate(settings.schedule, settings.learning_rate, plan.warmup_steps, plan.total_steps)
    optimizer = adamw(
        rate,
        plan.model,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
    )
    compiled = _Compiled(plan, settings, optimizer, rate)
    try:
        with reading_weights() as on_layer:
            frozen, trainable = plan.load(on_layer)
    except BaseException:
        compiled.cancel()
        raise
    identity = {"model": [plan.model.config.to_hf(), _sample(frozen or trainable)]} | plan.identity
    if previous is not None:
        _same_run(settings.output, previous, identity)
    state = initial_state(trainable, optimizer)

    if previous is None:
        settings.output.mkdir(parents=True, exist_ok=True)
        _write_json(settings.output / _RUN_FILE, _describe(settings, identity))
    checkpoints = TrainCheckpoints(settings.output / "checkpoints", keep=settings.keep_checkpoints)
    restored = checkpoints.restore_latest(state)
    first, before = 0, None
    if restored is not None:
        first, state, saved = restored
        before = saved["eval_loss_before"]
    log = MetricsLog(settings.output, keep_to=first if restored is not None else -1, tensorboard=settings.tensorboard)
    progress = Progress(plan.total_steps, first)
    try:
        for notice in [*plan.notices, *([log.notice] if log.notice else [])]:
            progress.say(notice)
        if settings.resume:
            progress.say(f"continuing at step {first}" if restored else "no checkpoint yet: starting at step 0")
        loop = _Loop(settings, plan, frozen, compiled, checkpoints, log, progress, on_step)
        with _Signals() as signals:
            loop.summary |= {"steps": first, "eval_loss_before": before}
            state, stopped_by = loop.run(state, first, signals)
    finally:
        progress.close()
        log.close()
        checkpoints.close()
    summary = loop.summary | {"seconds": time.perf_counter() - started, "stopped_by": stopped_by}
    if stopped_by is None:
        _export(settings, plan, state.trainable)
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jaxmoe.train`: 0 when done, 128 + the signal's number when a signal ended the run early."""
    parser = ArgumentParser(description=__doc__, formatter_class=_help_formatter())
    add_dataclass_arguments(parser, TrainConfig)
    settings = dataclass_from_arguments(TrainConfig, parser.parse_args(argv))
    xla.configure()
    summary = train(settings)
    if summary["stopped_by"] is not None:
        name = signal.Signals(summary["stopped_by"]).name
        print(
            f"{name}: saved after step {summary['steps']}; the same command with --resume continues from there",
            file=sys.stderr,
        )
        return 128 + summary["stopped_by"]
    print(f"{summary['steps']} steps in {summary['seconds']:.0f} s, wrote {settings.output}")
    if summary["eval_loss"] is not None:
        before, after = summary["eval_loss_before"], summary["eval_loss"]
        print(f"held-out loss {before:.4f} -> {after:.4f} (perplexity {_exp(before):.2f} -> {_exp(after):.2f})")
    return 0


class _Loop:
    """The steps of one run; the numbers of a step are fetched while the device works on the next one."""

    def __init__(
        self,
        settings: TrainConfig,
        plan: _Run,
        frozen: Params,
        compiled: _Compiled,
        checkpoints: TrainCheckpoints,
        log: MetricsLog,
        progress: Progress,
        on_step: Callable[[dict[str, Any]], None],
    ) -> None:
        self._settings, self._plan, self._frozen, self._compiled = settings, plan, frozen, compiled
        self._checkpoints, self._log, self._progress, self._on_step = checkpoints, log, progress, on_step
        self._since: float | None = None  # tokens/s counts from here: the last logged step, or what interrupted it
        self._tokens = 0
        self.summary: dict[str, Any] = {"steps": 0, "loss": None, "eval_loss_before": None, "eval_loss": None}

    def run(self, state: TrainState, first: int, signals: _Signals) -> tuple[TrainState, int | None]:
        """Trains from step `first`; returns the state and the signal that ended the run early, if one did."""
        settings, total = self._settings, self._plan.total_steps
        if first == 0 and self._plan.eval_rows is not None:
            before = self._evaluate(state)
            self.summary["eval_loss_before"] = self.summary["eval_loss"] = before
            self._log.write({"step": 0, "eval_loss": before})
            self._progress.say(f"step 0/{total}  held-out loss {before:.4f}")
        pending: tuple[int, StepMetrics] | None = None
        for step in range(first + 1, total + 1):
            state, metrics = self._compiled.train_step(self._frozen, state, self._plan.batch(step - 1, settings))
            if pending is not None:
                self._report(*pending)
            pending = (step, metrics)
            last = step == total
            evaluate = self._plan.eval_rows is not None and (last or _due(step, settings.eval_every))
            stop = signals.received is not None
            if evaluate or last or stop or _due(step, settings.save_every):
                self._report(*pending, state if evaluate else None)
                pending = None
                if last or stop or _due(step, settings.save_every):
                    self._checkpoints.save(step, state, {"eval_loss_before": self.summary["eval_loss_before"]})
                self._restart_clock()
            if stop and not last:
                return state, signals.received
        return state, None

    def _evaluate(self, state: TrainState) -> float:
        """Mean token loss (nats) over the held-out rows."""
        rows, size = self._plan.eval_rows, self._settings.batch_size
        assert rows is not None
        parts = [
            self._compiled.eval_step(self._frozen, state.trainable, rows.batch(i, (size,)))
            for i in range(rows.steps(1, size))
        ]
        losses, weights = zip(*jax.device_get(parts), strict=True)
        return float(np.sum(losses, dtype=np.float64) / np.sum(weights, dtype=np.float64))

    def _report(self, step: int, metrics: StepMetrics, evaluate: TrainState | None = None) -> None:
        """Waits for a step's numbers, checks and logs them; evaluates first when given a state to evaluate."""
        numbers = jax.device_get(metrics)
        self._tokens += int(numbers.tokens)
        # The first step's time has the rest of the compilation in it.
        speed = self._tokens / (time.perf_counter() - self._since) if self._since is not None else None
        loss, norm = float(numbers.loss), float(numbers.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = self._checkpoints.latest_step()
            where = "no checkpoint was saved before" if kept is None else f"the checkpoint of step {kept} is kept"
            raise UserError(
                f"loss: expected a finite number, found {loss} (gradient norm {norm}) at step {step}; {where}"
            )
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "learning_rate": float(numbers.learning_rate),
            "grad_norm": norm,
            "tokens_per_second": speed,
            "aux_loss": float(numbers.aux_loss),
            "eval_loss": self._evaluate(evaluate) if evaluate is not None else None,
            **expert_load(numbers.expert_counts),
        }
        logged = step in (1, self._plan.total_steps) or _due(step, self._settings.log_every) or evaluate is not None
        if logged:
            self._log.write(row)
        self._progress.step(row, logged=logged)
        if evaluate is not None:
            self.summary["eval_loss"] = row["eval_loss"]
            self._progress.say(f"step {step}/{self._plan.total_steps}  held-out loss {row['eval_loss']:.4f}")
        self.summary |= {"steps": step, "loss": loss}
        self._on_step(row)
        if logged or self._since is None:
            self._restart_clock()

    def _restart_clock(self) -> None:
        self._since, self._tokens = time.perf_counter(), 0


class _Signals:
    """Notes the first SIGINT or SIGTERM; a second one of either kind then ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        for each in self._before:
            # The system's own action needs no interpreter: it also ends a process that waits for the device.
            signal.signal(each, signal.SIG_DFL)


def _prepare(settings: TrainConfig, previous: Mapping[str, Any] | None) -> _Run:
    """Reads and checks everything, cheap things first."""
    source = settings.tokenizer if settings.from_scratch is not None else settings.model
    assert source is not None
    config = _model_config(settings)
    lora = None
    if not settings.trains_all and settings.adapter is None:
        lora = LoraConfig(
            r=settings.lora_r,
            alpha=settings.lora_alpha,
            use_rslora=settings.rslora,
            targets=expand_targets(settings.lora_targets),
            base_model_name_or_path=str(settings.model),
        )
        lora.check_against(config)
    if config.attention_dropout:
        raise UserError(f"attention_dropout: expected 0 (training applies none), found {config.attention_dropout}")
    if settings.seq_length > config.max_position_embeddings:
        raise UserError(
            f"seq_length: expected at most the model's max_position_embeddings ({config.max_position_embeddings}), "
            f"found {settings.seq_length}"
        )

    tokenizer = load_tokenizer(source)
    records = _read(settings.data, tokenizer, config.vocab_size)
    held_out = []
    if settings.eval_data is not None:
        held_out = _read(settings.eval_data, tokenizer, config.vocab_size)
    elif settings.eval_fraction is not None:
        records, held_out = hold_out(records, settings.eval_fraction)
    epochs = None if settings.max_steps is not None else settings.epochs or 1
    segments, lost = cut(records, settings.seq_length)
    notices = lost.notices(settings.seq_length)
    replay = None
    if settings.replay is not None:
        replay = Replay(Capture.open(settings.replay), config, tokenizer)
        replay.check(segments)
    rows = Sequences(segments, settings.seq_length, seed=settings.seed, pack=settings.pack, epochs=epochs)
    eval_rows = None
    if held_out:
        segments, lost = cut(held_out, settings.seq_length)
        notices += [f"held-out: {line}" for line in lost.notices(settings.seq_length)]
        eval_rows = Sequences(segments, settings.seq_length, pack=settings.pack, shuffle=False, epochs=1)
    rows_per_step = settings.batch_size * settings.accumulation
    total = settings.max_steps if epochs is None else rows.steps(epochs, rows_per_step)
    assert total is not None
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = round(settings.warmup_ratio * total)

    model, shapes, load = _open(settings, config, lora)
    packed = any(each.packed for each in (rows, eval_rows) if each is not None)
    model = model._replace(packed=packed, unroll=settings.unroll_layers)
    model, notice = _with_remat(settings, model, shapes[0], previous)
    notices += notice + fallbacks(config, model.dtype)
    if previous is None or settings.unroll_layers:  # a resumed run keeps what it had
        notices += _about_unrolling(settings, total, jax.default_backend() == "gpu")
    coefficient = settings.router_aux_loss_coef
    if coefficient is None:
        coefficient = config.router_aux_loss_coef
    same = "seq_length batch_size accumulation pack learning_rate schedule max_grad_norm weight_decay adam_beta1 "
    same += "adam_beta2 adam_epsilon seed quantize"
    identity = {
        "data": digest(records),
        "eval_data": digest(held_out),
        "lora": dataclasses.asdict(model.lora) | {"base_model_name_or_path": None} if model.lora else None,
        "dtype": model.dtype,
        "remat": model.remat,
        "unroll_layers": settings.unroll_layers or None,  # as in runs from before there was a choice
        "router_aux_loss_coef": coefficient,
        "warmup_steps": warmup,
        "max_steps": total,
        "replay": replay.digest if replay else None,
        **{name: getattr(settings, name) for name in same.split()},
    }
    return _Run(model, shapes, load, rows, eval_rows, total, warmup, coefficient, notices, replay, identity)


def _about_unrolling(settings: TrainConfig, steps: int, on_gpu: bool) -> list[str]:
    """What `--unroll-layers` costs, or would save in a run that is long enough for it."""
    if settings.unroll_layers:
        return ["--unroll-layers: the first step waits for every layer to be compiled, a minute or so"]
    if on_gpu and steps >= _UNROLLING_PAYS and not settings.trains_all and settings.remat != "offload":
        return [f"{steps:,} steps: with --unroll-layers each is 4 to 5 % faster, the first a minute or so longer"]
    return []


def _read(path: pathlib.Path, tokenizer: Any, vocab_size: int) -> list[Record]:
    with progress(f"reading {path}") as show:

        def on_read(done: int, total: int, records: int) -> None:
            show(done, total, f"{records:,} records, {done / total:.0%}")

        return read_records(path, tokenizer, vocab_size, on_read)


def _model_config(settings: TrainConfig) -> Qwen3MoeConfig:
    if settings.from_scratch is not None:
        return Qwen3MoeConfig.from_hf(read_json(settings.from_scratch))
    assert settings.model is not None
    if not settings.model.is_dir():
        raise UserError(f"{settings.model}: expected a model folder, found none")
    return Qwen3MoeConfig.from_pretrained(settings.model)


def _open(
    settings: TrainConfig, config: Qwen3MoeConfig, lora: LoraConfig | None
) -> tuple[Model, _Shapes, Callable[[OnLayer], _Weights]]:
    """What to run, the shapes of its weights, and how to get these."""
    key = jax.random.key(settings.seed)
    if settings.from_scratch is not None:
        draw = partial(jax.jit(init_parameters, static_argnums=(0, 2)), config, key, jnp.dtype("float32"))
        return Model(config, None, settings.dtype or "float32"), ({}, jax.eval_shape(draw)), lambda _: ({}, draw())
    assert settings.model is not None
    dtype = "float32" if settings.full else settings.dtype
    checkpoint_config, source = open_checkpoint(settings.model, dtype, settings.quantize)
    shapes = stack_shapes(checkpoint_config, source)
    read = lambda on_layer: load_stacks(checkpoint_config, source, on_layer=on_layer)
    if settings.full:
        if source.quantization is not None:
            raise UserError(f"full: expected weights that can be trained, found NF4 in {settings.model}")
        return Model(config, None, settings.dtype or "float32"), ({}, shapes), lambda on_layer: ({}, read(on_layer))
    if settings.merge and source.quantization is not None:
        raise UserError("merge: expected weights to merge into, found NF4; merge with python -m convert afterwards")
    if settings.adapter is not None:
        lora, loaded = load_adapter(settings.adapter, checkpoint_config)
        adapters: Callable[[], Params] = lambda: loaded
    else:
        assert lora is not None
        adapters = partial(jax.jit(init_adapters, static_argnums=(0, 1)), config, lora, key)
    model = Model(config, lora, str(shapes["embed_tokens"].dtype))
    return model, (shapes, jax.eval_shape(adapters)), lambda on_layer: (read(on_layer), adapters())


def _with_remat(
    settings: TrainConfig, model: Model, frozen: Iterable[str], previous: Mapping[str, Any] | None
) -> tuple[Model, list[str]]:
    """The model with its recomputation policy; a notice where `auto` chose it. A resumed run keeps what it had."""
    if settings.remat != "auto":
        return model._replace(remat=settings.remat), []
    if previous is not None and previous.get("remat") in get_args(Remat):
        return model._replace(remat=previous["remat"]), []
    config = model.config
    taken: Any = selected_implementations(config, model.dtype)
    forecasts = {
        remat: training_forecast(
            config,
            model.lora,
            batch_size=settings.batch_size,
            seq_length=settings.seq_length,
            dtype=model.dtype,
            accumulation=settings.accumulation,
            quantize="nf4" if Quantization.of(frozen) else None,
            remat=remat,
            packed=model.packed,
            **taken,
        )
        for remat in get_args(Remat)
    }
    available = device_bytes(jax.local_devices()[0])
    remat = choose_remat(forecasts, available)
    room = "unknown memory" if available is None else f"{human(available)} of memory"
    notice = f"--remat auto takes {remat}: {human(forecasts[remat].total)} by forecast, {room}"
    return model._replace(remat=remat), [notice]


def _previous_run(settings: TrainConfig) -> dict[str, Any] | None:
    """The identity of the run that --resume continues, or None when the output folder is new or empty."""
    output = settings.output
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: expected a folder, found a file")
    if not output.exists() or not any(output.iterdir()):
        return None
    if not settings.resume:
        raise UserError(f"{output}: expected a new or empty folder, or --resume; found a folder with files in it")
    return read_json(output / _RUN_FILE).get("identity", {})


def _same_run(output: pathlib.Path, previous: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(identity))
    for name in [*now, *previous]:
        before, after = previous.get(name), now.get(name)
        if before != after:
            shown = f"{before!r}, found {after!r}"
            if name in ("model", "data", "eval_data"):
                shown = "the content that it had, found another"
            raise UserError(f"{name}: expected, to resume {output}, {shown}")


def _sample(params: Params) -> str:
    """SHA-256 over the first and last row of every parameter: tells two models of one shape apart, at no cost."""

    @jax.jit
    def ends(params: Params) -> Params:
        return {path: a.reshape(-1, a.shape[-1])[jnp.asarray([0, -1])] for path, a in params.items()}

    total = hashlib.sha256()
    for path, rows in sorted(jax.device_get(ends(params)).items()):
        total.update(path.encode() + rows.tobytes())
    return total.hexdigest()


def _describe(settings: TrainConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, identity and versions, as JSON can hold them."""
    from importlib.metadata import version

    flags = {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in dataclasses.asdict(settings).items()
    }
    packages = ("jaxmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {
        "settings": flags,
        "identity": identity,
        "versions": {"python": platform.python_version()} | {name: _version(version, name) for name in packages},
        "device": str(jax.devices()[0].device_kind),
    }


def _version(version: Callable[[str], str], name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:  # a source tree that is not installed
        return None


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _export(settings: TrainConfig, plan: _Run, trainable: Params) -> None:
    """Writes what was trained: the adapter (and the merged model, if asked for), or the model."""
    config, lora = plan.model.config, plan.model.lora
    arrays = {path: np.asarray(array) for path, array in trainable.items()}
    if lora is None:
        source = settings.tokenizer if settings.from_scratch is not None else settings.model
        assert source is not None
        export_model(settings.output / "model", source, config, arrays)
        return
    export_adapter(settings.output, config, lora, arrays)
    if settings.merge:
        assert settings.model is not None
        export_merged(settings.output / "merged", settings.model, config, lora, arrays)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{name}: expected at least {least}, found {value!r}")


def _help_formatter() -> Any:
    import argparse

    return argparse.RawDescriptionHelpFormatter
