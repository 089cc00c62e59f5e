"""The settings of a training run, checked when the object is made; each is a flag of `python -m jaxmoe.train`."""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxmoe.data.chat_flags import HELP
from jaxmoe.data.sources import DEFAULT_WINDOW, Source, Sources, as_tuple, sources, weights_of
from jaxmoe.distributed.mesh import AUTO, MeshShape
from jaxmoe.errors import UserError
from jaxmoe.memory import LOSSES_OVER_PAIRS, LossName, OptimizerName
from jaxmoe.weight_form import WeightForm

MAX_EPOCHS = 10_000
Schedule = Literal["cosine", "linear", "constant"]

# How a field enters the identity of a run, which a resumed run must share (`jaxmoe.train.identity`). A field's metadata
# holds "identity": VALUE, APART, or `entries(...)`.
VALUE = "value"  # an entry of the field's name holds the field's value
APART = "apart"  # in no entry: where files go, what is reported and when; the weights do not depend on it


def entries(*names: str) -> tuple[str, ...]:
    """These entries hold what the field resolves to, such as the content of a file or a default that is worked out."""
    return names


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on; each field is a flag of `python -m jaxmoe.train`.

    Raises:
        UserError: a value out of range, or flags that exclude each other.
    """

    data: Sources = field(
        metadata={
            "help": "records to train on: files, folders or data sets of the hub, each with :WEIGHT if they are mixed "
            "in shares (docs/data.md)",
            "metavar": "SOURCE",
            "several": True,
            "identity": entries("data", "mixture"),
        }
    )
    output: pathlib.Path = field(metadata={"help": "folder to write; new or empty, unless --resume", "identity": APART})
    model: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "model folder: HF form, or converted by python -m convert hf2jax",
            "identity": entries("model"),
        },
    )
    adapter: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "adapter folder to start from; it decides targets, rank, alpha and modules to save",
            "identity": entries("lora"),
        },
    )
    full: bool = field(
        default=False,
        metadata={
            "help": "train all parameters of --model, not adapters, and write the model in HF form",
            "identity": entries("lora", "dtype"),
        },
    )
    from_scratch: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "config.json of a new model to train from random weights",
            "identity": entries("model", "lora", "dtype"),
        },
    )
    tokenizer: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "folder with the tokenizer, for --from-scratch",
            "identity": entries("data", "eval_data"),
        },
    )
    system: str | None = field(
        default=None, metadata={"help": HELP["system"], "identity": entries("data", "eval_data")}
    )
    thinking: bool = field(default=True, metadata={"help": HELP["thinking"], "identity": entries("data", "eval_data")})
    template_arg: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": HELP["template_arg"],
            "metavar": "KEY=VALUE",
            "repeat": True,
            "identity": entries("data", "eval_data"),
        },
    )

    lora_targets: tuple[str, ...] = field(
        default=("attention",),
        metadata={
            "group": "adapters",
            "help": "what gets adapters: groups (attention, router, experts, dense) or names such as q_proj, "
            "experts.down_proj",
            "identity": entries("lora"),
        },
    )
    lora_experts: str | None = field(
        default=None,
        metadata={
            "help": "which experts of a layer get an adapter, with the target experts: top:N, the N that "
            '--lora-capture uses most, or a JSON file such as {"0": [3, 17], "1": [5, 8]} (default: all)',
            "metavar": "top:N|FILE",
            "identity": entries("lora"),
        },
    )
    lora_capture: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "for --lora-experts top:N: a capture of the task's text (python -m jaxmoe.routing capture)",
            "metavar": "DIR",
            "identity": entries("lora"),
        },
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters", "identity": entries("lora")})
    lora_alpha: float = field(
        default=32.0, metadata={"help": "the low-rank product is scaled by alpha / r", "identity": entries("lora")}
    )
    rslora: bool = field(
        default=False, metadata={"help": "scale by alpha / sqrt(r) instead", "identity": entries("lora")}
    )
    lora_dropout: float | None = field(
        default=None,
        metadata={
            "help": "probability that an element of an adapter's input is dropped, in training; only with targets in "
            "attention, as in PEFT (default: 0, or what --adapter was trained with)",
            "identity": entries("lora"),
        },
    )
    modules_to_save: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "weights to train in full beside the adapters: lm_head, embed_tokens; a tied head stays tied",
            "identity": entries("lora"),
        },
    )

    loss: LossName = field(
        default="next-token",
        metadata={
            "group": "loss",
            "help": "what is minimised. next-token: cross-entropy; dpo and orpo: losses over pairs of answers, the "
            "chosen and the rejected one of each record",
            "identity": entries("loss"),
        },
    )
    beta: float = field(
        default=0.1,
        metadata={
            "help": "of dpo: how strongly the model is held to the reference; of orpo: weight of the odds ratio",
            "identity": entries("loss"),
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "share of pairs that are expected to be the wrong way round (robust DPO); below 0.5, with dpo",
            "identity": entries("loss"),
        },
    )
    precompute_reference: bool = field(
        default=False,
        metadata={
            "help": "with dpo: compute the reference's log-probabilities once, before the first step, and store them "
            "with the run. With --adapter or --full this is always done: the reference is the model as the run starts",
            "identity": entries("loss"),
        },
    )
    learning_rate: float = field(
        default=2e-4,
        metadata={"group": "steps and optimizer", "help": "peak learning rate", "identity": VALUE, "changeable": True},
    )
    schedule: Schedule = field(
        default="cosine",
        metadata={"help": "how the learning rate changes after the warm-up", "identity": VALUE, "changeable": True},
    )
    warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "steps of linear warm-up (default: from --warmup-ratio)",
            "identity": entries("warmup_steps"),
            "changeable": True,
        },
    )
    warmup_ratio: float = field(
        default=0.03,
        metadata={
            "help": "share of all steps to warm up over",
            "identity": entries("warmup_steps"),
            "changeable": True,
        },
    )
    epochs: int | None = field(
        default=None,
        metadata={
            "help": "passes over the data (default: 1, unless --max-steps)",
            "identity": entries("max_steps", "warmup_steps"),
            "changeable": True,
        },
    )
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": "optimizer steps, instead of --epochs",
            "identity": entries("max_steps", "warmup_steps"),
            "changeable": True,
        },
    )
    batch_size: int = field(
        default=4,
        metadata={"help": "sequences per micro-batch; with dpo and orpo pairs of sequences", "identity": VALUE},
    )
    accumulation: int = field(default=1, metadata={"help": "micro-batches per optimizer step", "identity": VALUE})
    seq_length: int = field(default=1024, metadata={"help": "tokens per sequence", "identity": VALUE})
    pack: bool = field(
        default=True,
        metadata={"help": "pack several records into a sequence (each record sees only itself)", "identity": VALUE},
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "clip gradients to this global norm; 0 turns clipping off", "identity": VALUE},
    )
    optimizer: OptimizerName = field(
        default="adamw",
        metadata={
            "help": "adamw; lion keeps half as much of each trained parameter, adafactor next to nothing of a large "
            "matrix; muon moves the layers' matrices by orthogonal factors, and everything else as adamw does",
            "identity": entries("optimizer"),
        },
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "decoupled weight decay, of matrices only", "identity": VALUE}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1", "identity": VALUE})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2", "identity": VALUE})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon", "identity": VALUE})
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "group": "router",
            "help": "weight of the load-balancing loss (default: the model config's; 0 with --router-bias-rate)",
            "identity": entries("router_aux_loss_coef"),
        },
    )
    router: Literal["full"] | None = field(
        default=None,
        metadata={
            "help": "full: train the router's weights themselves beside the adapters (default: frozen, or an adapter "
            "with the target router)",
            "identity": entries("lora"),
        },
    )
    router_z_loss: float = field(
        default=0.0,
        metadata={
            "help": "weight of the router z-loss, the mean square of the log-sum-exp of the router's logits",
            "identity": entries("router_training"),
        },
    )
    routing_penalty: float = field(
        default=0.0,
        metadata={
            "help": "weight of the KL divergence of the router's probabilities from those without adapters, "
            "which costs a second forward pass, or from those in --routing-base",
            "identity": entries("router_training"),
        },
    )
    routing_base: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "for --routing-penalty: a capture of the training data with --full-logits, whose router logits "
            "take the place of the second forward pass",
            "metavar": "DIR",
            "identity": entries("routing_base"),
        },
    )
    router_bias_rate: float = field(
        default=0.0,
        metadata={
            "help": "with --from-scratch: balances the load without a loss. A bias, added to an expert's probability "
            "where experts are chosen, moves by this much in each step; it is written into router_bias.json beside "
            "the model, which has no place for it",
            "identity": entries("router_training"),
        },
    )
    dense_mixer: bool = field(
        default=False,
        metadata={
            "help": "DenseMixer: the router also learns from the experts that a token does not use; the backward pass "
            "computes all experts",
            "identity": entries("router_training"),
        },
    )
    replay: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "capture of the training data; its experts are used instead of the router's choice",
            "identity": entries("replay"),
        },
    )
    seed: int = field(
        default=0,
        metadata={
            "group": "precision, memory and devices",
            "help": "seed of fresh weights and of the order of the data",
            "identity": VALUE,
        },
    )
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None,
        metadata={
            "help": "dtype to compute in (default: the model's own; float32 when all parameters are trained)",
            "identity": entries("dtype"),
        },
    )
    quantize: WeightForm | None = field(
        default=None,
        metadata={
            "help": "hold the frozen projections, dense MLPs and experts in 4 bits (nf4: QLoRA) or in 8 (fp8)",
            "identity": VALUE,
        },
    )
    dequantize: bool = field(
        default=False,
        metadata={
            "help": "decode FP8 weights to the dtype in config.json, NF4 weights to the dtype that they had before",
            "identity": APART,  # the weights' digest tells the two apart
        },
    )
    remat: Literal["auto", "fast", "balanced", "low-memory", "offload"] = field(
        default="auto",
        metadata={
            "help": "which results of the forward pass are saved for the backward pass. fast: all that are expensive "
            "to recompute; balanced: the same without the experts' products; low-memory: each layer's input; offload: "
            "the same in the host's memory, which then also holds the frozen embedding and large moments; "
            "auto: the first of these whose forecast fits into the device's memory",
            "identity": entries("remat"),
        },
    )
    unroll_layers: bool = field(
        default=False,
        metadata={
            "help": "unroll the layers: about one more minute of compiling, steps 4 to 5 % faster on a GPU; for runs "
            "of thousands of steps, only with LoRA training",
            "identity": entries("unroll_layers"),
        },
    )

    mesh: str | None = field(
        default=None,
        metadata={
            "help": "the GPUs that share each step: auto (all of them), or sizes of axes such as fsdp=2,expert=4. "
            "data, fsdp and expert split the sequences of a micro-batch; fsdp also splits the layers' weights, expert "
            "the experts. context splits the tokens of each sequence. The losses are the same on every mesh (default: "
            "one GPU)",
            "metavar": "MESH",
            "identity": APART,  # it decides only who computes what
        },
    )

    split: str | None = field(
        default=None,
        metadata={
            "group": "reading the data",
            "help": "part of a folder of datasets or of a data set of the hub (default: train, or the only one)",
            "metavar": "NAME",
            "identity": entries("data"),
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read --data while the run trains, for what does not fit into memory; needs --max-steps",
            "identity": entries("streaming"),
        },
    )
    shuffle_buffer: int = field(
        default=DEFAULT_WINDOW,
        metadata={
            "help": "records that are shuffled and packed together, with --streaming",
            "identity": entries("streaming"),
        },
    )

    eval_data: Sources | None = field(
        default=None,
        metadata={
            "group": "measuring",
            "help": "records to evaluate on",
            "metavar": "SOURCE",
            "several": True,
            "identity": entries("eval_data"),
        },
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "as --split, of --eval-data", "metavar": "NAME", "identity": entries("eval_data")},
    )
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "share of --data to hold out and evaluate on",
            "identity": entries("data", "eval_data"),
        },
    )
    eval_every: int | None = field(
        default=None,
        metadata={
            "help": "evaluate every N steps (always before the first and after the last)",
            "identity": APART,
        },
    )
    watch_routing: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "records to measure the routing on, in every MoE layer: how many tokens use other experts than in "
            "the base model, how far the router's probabilities are from the base's, the load, unused experts "
            "(docs/routing.md)",
            "metavar": "PROBE",
            "identity": APART,
        },
    )
    watch_every: int | None = field(
        default=None,
        metadata={
            "help": "measure the routing every N steps (always before the first and after the last)",
            "identity": APART,
        },
    )
    sample_prompts: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "prompts to continue at each evaluation, shown on the run's page: a text file with one a line, or "
            "JSONL with prompt or messages",
            "identity": APART,
        },
    )
    sample_tokens: int = field(
        default=64, metadata={"help": "tokens to write after each of --sample-prompts", "identity": APART}
    )
    save_every: int | None = field(
        default=None,
        metadata={
            "group": "checkpoints",
            "help": "save a checkpoint every N steps (always after the last)",
            "identity": APART,
        },
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "how many checkpoints to keep", "identity": APART})
    resume: bool = field(
        default=False,
        metadata={
            "help": "continue from the last checkpoint in --output, if there is one",
            "identity": APART,
            "once": True,
        },
    )
    resume_from: str | None = field(
        default=None,
        metadata={
            "help": "as --resume, from an older checkpoint: its step, or previous for the one before the newest; the "
            "later ones are removed when the next one is saved",
            "metavar": "STEP",
            "identity": APART,
            "once": True,
        },
    )
    allow_change: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "settings that a resumed run may change: epochs and max_steps (only more), learning_rate, "
            "schedule, warmup_steps, warmup_ratio",
            "identity": APART,
            "once": True,
        },
    )
    keep_best: bool = field(
        default=False,
        metadata={
            "help": "keep the checkpoint with the lowest held-out loss, and write that adapter or model at the end",
            "identity": APART,
        },
    )
    patience: int | None = field(
        default=None,
        metadata={
            "help": "stop after N evaluations in a row whose held-out loss is not below the lowest before",
            "identity": APART,
        },
    )
    log_every: int = field(
        default=10, metadata={"group": "reports and results", "help": "log every N steps", "identity": APART}
    )
    report_to: tuple[Literal["none", "tensorboard", "wandb", "mlflow", "trackio"], ...] = field(
        default=("tensorboard",),
        metadata={
            "help": "where the numbers go besides metrics.jsonl; a resumed run continues the same run there",
            "identity": APART,
        },
    )
    tensorboard: bool | None = field(
        default=None,
        metadata={"help": "add tensorboard to --report-to, or take it out", "identity": APART},
    )
    merge: bool = field(
        default=False,
        metadata={"help": "also write the model with the adapter merged, in HF form", "identity": APART},
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={
            "metavar": "ID",
            "help": "upload the adapter, or with --full the model, to this repository of the hub; a new one is private",
            "identity": APART,
        },
    )

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):  # equal settings are equal, whether one source was given alone or as a tuple
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_tuple(given))
        # Names as flags have them are names, too.
        object.__setattr__(self, "allow_change", tuple(name.replace("-", "_") for name in self.allow_change))
        _check_ranges(self)
        _check_combinations(self)

    @property
    def sources(self) -> list[Source]:
        """Where the training data comes from."""
        return sources(self.data, "data")

    @property
    def eval_sources(self) -> list[Source]:
        """Where the held-out data comes from; none without `eval_data`."""
        return [] if self.eval_data is None else sources(self.eval_data, "eval_data")

    @property
    def resumes(self) -> bool:
        """Whether the run may continue another one."""
        return self.resume or self.resume_from is not None

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where the numbers go besides metrics.jsonl, each once."""
        names = dict.fromkeys(self.report_to)
        if self.tensorboard is not None:
            names = {name: None for name in names if name not in ("none", "tensorboard")}
            names |= {"tensorboard": None} if self.tensorboard else {}
        return tuple(name for name in names if name != "none")

    @property
    def trains_all(self) -> bool:
        """Whether all parameters are trained, not adapters."""
        return self.full or self.from_scratch is not None

    @property
    def learns_from_pairs(self) -> bool:
        """Whether each record holds a chosen and a rejected answer."""
        return self.loss in LOSSES_OVER_PAIRS

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with a reference model: itself, as the run starts."""
        return self.loss == "dpo"

    @property
    def stores_reference(self) -> bool:
        """Whether the reference's log-probabilities are stored with the run. New adapters change nothing yet, so the
        model without them is the reference, and each step can ask it."""
        changes_at_once = self.trains_all or self.adapter is not None
        return self.has_reference and (self.precompute_reference or changes_at_once)


def changeable_settings() -> list[str]:
    """The fields that --allow-change may name: no data, no weights and no shape of a stored array depend on them."""
    return [each.name for each in dataclasses.fields(TrainConfig) if each.metadata.get("changeable")]


def _check_allowed_changes(settings: TrainConfig) -> None:
    known = changeable_settings()
    for name in settings.allow_change:
        if name not in known:
            raise UserError(f"allow_change: expected names among {', '.join(known)}; found {name!r}")
    if settings.allow_change and not settings.resumes:
        raise UserError("allow_change: only valid with resume or resume_from")


def _check_ranges(settings: TrainConfig) -> None:
    at_least_1 = "lora_r batch_size accumulation seq_length keep_checkpoints log_every"
    at_least_1 += " epochs max_steps eval_every save_every patience sample_tokens shuffle_buffer watch_every"
    at_least_0 = "warmup_steps router_aux_loss_coef seed learning_rate warmup_ratio max_grad_norm weight_decay"
    at_least_0 += " adam_epsilon beta router_z_loss routing_penalty router_bias_rate"
    for least, names in ((1, at_least_1), (0, at_least_0)):
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not value >= least:
                raise UserError(f"{name}: expected at least {least}, found {value!r}")
    if settings.epochs is not None and settings.epochs > MAX_EPOCHS:  # each is packed before the first step
        raise UserError(f"epochs: expected at most {MAX_EPOCHS:,} (or use max_steps), found {settings.epochs:,}")
    for name in "seed max_steps warmup_steps".split():
        if (value := getattr(settings, name)) is not None and value >= 2**31:  # steps are counted in 32 bits
            raise UserError(f"{name}: expected less than {2**31:,}, found {value:,}")
    for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
        if not 0 <= (getattr(settings, name) or 0) < 1:
            raise UserError(f"{name}: expected a number from 0 to below 1, found {getattr(settings, name)!r}")
    if not 0 <= settings.label_smoothing < 0.5:
        raise UserError(f"label_smoothing: expected a number from 0 to below 0.5, found {settings.label_smoothing!r}")


def _check_combinations(settings: TrainConfig) -> None:
    defaults = {each.name: each.default for each in dataclasses.fields(settings)}
    _check_course(settings)
    _check_evaluation(settings)
    _check_allowed_changes(settings)
    _check_model(settings)
    _check_mesh(settings)
    _check_data(settings)
    _check_loss(settings, defaults)
    _check_optimizer(settings, defaults)
    _check_router(settings)
    _check_adapters(settings, defaults)


def _check_course(settings: TrainConfig) -> None:
    """Where a run begins, how long it is, and where its numbers go."""
    if (step := settings.resume_from) is not None and step != "previous" and not (step.isascii() and step.isdigit()):
        raise UserError(f"resume_from: expected a step or previous, found {step!r}")
    if "none" in settings.report_to and len(settings.report_to) > 1:
        raise UserError(f"report_to: expected none alone, found {','.join(settings.report_to)}")
    if settings.epochs is not None and settings.max_steps is not None:
        raise UserError("epochs and max_steps: expected one of them, found both")


def _check_evaluation(settings: TrainConfig) -> None:
    if settings.eval_data is not None and settings.eval_fraction is not None:
        raise UserError("eval_data and eval_fraction: expected one of them, found both")
    if settings.eval_every is not None and settings.eval_data is None and settings.eval_fraction is None:
        raise UserError("eval_every: expected eval_data or eval_fraction with it, found neither")
    for name in ("keep_best", "patience"):
        if getattr(settings, name) and settings.eval_every is None:
            raise UserError(f"{name}: expected eval_every with it, found none")
    if settings.watch_every is not None and settings.watch_routing is None:
        raise UserError("watch_every: expected watch_routing with it, found none")


def _check_model(settings: TrainConfig) -> None:
    """Which weights a run starts from and trains, and in which form it holds them."""
    if (settings.model is None) == (settings.from_scratch is None):
        found = "neither" if settings.model is None else "both"
        raise UserError(f"model and from_scratch: expected one of them, found {found}")
    if (settings.from_scratch is None) != (settings.tokenizer is None):
        found = "it alone" if settings.from_scratch is None else "from_scratch alone"
        raise UserError(f"tokenizer: only valid with from_scratch, which needs it; found {found}")
    if settings.trains_all and (settings.adapter is not None or settings.merge):
        raise UserError("adapter and merge: only valid with LoRA training")
    if settings.trains_all and settings.quantize is not None:
        raise UserError("quantize: only valid with LoRA training")
    if settings.dequantize and settings.from_scratch is not None:
        raise UserError("dequantize: only valid with model")
    if settings.unroll_layers and (settings.trains_all or settings.remat == "offload"):
        raise UserError("unroll_layers: only valid with LoRA training, and not with remat offload")
    if settings.full and settings.from_scratch is not None:
        raise UserError("full: only valid with model; from_scratch trains all parameters anyway")


def _check_mesh(settings: TrainConfig) -> None:
    if settings.mesh not in (None, AUTO):
        mesh = MeshShape.parse(settings.mesh)
        mesh.check_batch(settings.batch_size)
        mesh.check_length(settings.seq_length)


def _check_router(settings: TrainConfig) -> None:
    if settings.router_bias_rate and settings.from_scratch is None:
        raise UserError(
            "router_bias_rate: only valid with from_scratch, since a finished model has no place for a bias"
        )
    if settings.router_bias_rate and settings.replay is not None:
        raise UserError("router_bias_rate and replay: expected one of them, since both decide which experts are used")
    if settings.routing_base is not None and not settings.routing_penalty:
        raise UserError("routing_base: only valid with routing_penalty above 0")
    if settings.routing_penalty and settings.trains_all and settings.routing_base is None:
        raise UserError("routing_penalty: only valid with LoRA training, which keeps the base, or with routing_base")
    if settings.router == "full" and {"router", "gate"} & {*settings.lora_targets}:
        raise UserError("router full and lora_targets router: expected one of them, found both")


def _check_adapters(settings: TrainConfig, defaults: dict[str, Any]) -> None:
    if settings.lora_dropout is not None and settings.trains_all:
        raise UserError("lora_dropout: only valid with LoRA training")
    if (settings.lora_experts or "").startswith("top:") != (settings.lora_capture is not None):
        found = "it alone" if settings.lora_capture is not None else f"{settings.lora_experts} alone"
        raise UserError(f"lora_capture: only valid with lora_experts top:N, which needs it; found {found}")
    names = ("lora_targets", "lora_experts", "lora_r", "lora_alpha", "rslora", "modules_to_save", "router")
    changed = [name for name in names if getattr(settings, name) != defaults[name]]
    if changed and (settings.trains_all or settings.adapter is not None):
        owner = "all parameters are trained" if settings.trains_all else "the adapter decides it"
        raise UserError(f"{changed[0]}: expected none, since {owner}")


def _check_optimizer(settings: TrainConfig, defaults: dict[str, Any]) -> None:
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if settings.optimizer not in ("adamw", "muon") and getattr(settings, name) != defaults[name]:
            raise UserError(f"{name}: only valid with --optimizer adamw or muon, found {settings.optimizer}")


def _check_loss(settings: TrainConfig, defaults: dict[str, Any]) -> None:
    only_with = {"label_smoothing": ("dpo",), "precompute_reference": ("dpo",), "beta": ("dpo", "orpo")}
    for name, losses in only_with.items():
        if getattr(settings, name) != defaults[name] and settings.loss not in losses:
            raise UserError(f"{name}: only valid with --loss {' or '.join(losses)}, found --loss {settings.loss}")
    for name in ("replay", "routing_base"):
        if getattr(settings, name) is not None and settings.learns_from_pairs:
            raise UserError(f"{name}: only valid with --loss next-token, found --loss {settings.loss}")
    mesh = settings.mesh
    if mesh not in (None, AUTO) and MeshShape.parse(mesh).context > 1 and settings.learns_from_pairs:
        raise UserError(f"mesh: context: only valid with --loss next-token, found --loss {settings.loss}")


def _check_data(settings: TrainConfig) -> None:
    assert settings.sources
    if weights_of(settings.eval_sources) is not None:
        raise UserError("eval_data: expected sources without weights, since each record is evaluated once")
    if settings.eval_split is not None and settings.eval_data is None:
        raise UserError("eval_split: only valid with eval_data")
    if not settings.streaming:
        if settings.shuffle_buffer != DEFAULT_WINDOW:
            raise UserError("shuffle_buffer: only valid with streaming")
        return
    if settings.max_steps is None:
        raise UserError("streaming: expected max_steps with it (how many records there are is not known), found none")
    leave_out = "leave one of them out"
    for name, instead in (("eval_fraction", "use eval_data"), ("replay", leave_out), ("routing_base", leave_out)):
        if getattr(settings, name) is not None:
            raise UserError(f"streaming and {name}: expected one of them, found both; {instead}")
    if settings.stores_reference:
        raise UserError(
            "streaming: expected data that is read once, since the run stores what its reference says of it"
        )
