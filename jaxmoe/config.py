"""The configuration of a Qwen3-MoE model, as a frozen dataclass; standard library only.

The fields of `Qwen3MoeConfig` have the names of transformers' `Qwen3MoeConfig`. A field that Qwen3-MoE does not have
and that would change the computation is an error (`jaxmoe.other_fields`). `LoraConfig` and `expand_targets` come from
`jaxmoe.lora`.

Dimension key. Each letter has one meaning in all code, comments and docstrings of the project:

    B batch                  N query heads          L layers (Ls sparse, Ld dense)
    T query length           K key/value heads      E experts
    S key length             G = N/K                k experts per token
    D model width            H head width           F expert hidden width
    V vocabulary             r LoRA rank            I dense MLP hidden width
    M = B*T tokens           R = M*k routed rows    P padded rows
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxmoe.errors import ConfigError, check_integer, check_number, shown
from jaxmoe.json_text import read_json
from jaxmoe.lora import LoraConfig, expand_targets
from jaxmoe.other_fields import check_other_fields, unknown_fields

__all__ = [
    "DTYPES",
    "MODEL_TYPE",
    "ConfigError",
    "LoraConfig",
    "Qwen3MoeConfig",
    "RopeParameters",
    "expand_targets",
    "read_config",
    "read_json",
]

MODEL_TYPE = "qwen3_moe"

DTYPES = ("float32", "bfloat16", "float16")

# torch's other names of these dtypes
_DTYPE_ALIASES = {"float": "float32", "half": "float16"}

# Keys in rope_parameters that have no effect here: without images the axes of Qwen3-VL's positions are equal, and
# `finetuned` is a note of early yarn models.
_NEUTRAL_ROPE_KEYS = ("mrope_section", "mrope_interleaved", "finetuned")

# Far above every model; a file that asks for more would only cost time and memory before it is refused.
_AT_MOST = {"num_hidden_layers": 1_000, "num_experts": 65_536}


def _rope_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `rope_parameters` or `rope_scaling`, without keys that have no effect; the kind is `rope_type`."""
    new, old = (_one_rope_form(name, raw.get(name)) for name in ("rope_parameters", "rope_scaling"))
    if new and old:
        # transformers would read rope_scaling, whose base may stand at the top level
        base = {"rope_theta": raw.get("rope_theta")}
        if base | new != base | old:
            raise ConfigError("rope_parameters and rope_scaling: expected the same values, found different ones")
    return new or old


def _one_rope_form(name: str, form: Any) -> dict[str, Any]:
    if form is not None and not isinstance(form, Mapping):
        raise ConfigError(f"{name}: expected an object, found {shown(form)}")
    values = {key: value for key, value in (form or {}).items() if key not in _NEUTRAL_ROPE_KEYS}
    if any(isinstance(value, Mapping) for value in values.values()):
        raise ConfigError(f"{name}: expected one set of values for all layers, found one per layer type")
    kinds = [kind for kind in (values.pop("rope_type", None), values.pop("type", None)) if kind is not None]
    if len(kinds) > 1 and kinds[0] != kinds[1]:
        raise ConfigError(f"rope_type and type: expected the same kind, found {shown(kinds[0])} and {shown(kinds[1])}")
    return values | ({"rope_type": kinds[0]} if kinds else {})


@dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding (Su et al. 2021); `linear` scales positions, `yarn` is Peng et al. 2023.

    Names and defaults are those of transformers' `modeling_rope_utils`.
    """

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, max_position_embeddings: int) -> RopeParameters:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4).

        A file may hold both forms if they agree. As in transformers, an `original_max_position_embeddings` at the top
        level overrides the one inside, and keys without effect on text are ignored.

        Raises:
            ConfigError: a kind of scaling or a value that is not supported, or two forms that differ.
        """
        scaling = _rope_values(raw)
        kind = scaling.pop("rope_type", None) or "default"
        theta = scaling.pop("rope_theta", None)
        outer_theta = raw.get("rope_theta")
        if theta is not None and outer_theta is not None and theta != outer_theta:
            found = f"{shown(theta)} in rope_parameters and {shown(outer_theta)} at the top level"
            raise ConfigError(f"rope_theta: expected one value, found {found}")
        theta = theta if theta is not None else outer_theta
        theta = 10_000.0 if theta is None else theta  # transformers' `default_theta`
        if (rotated := scaling.pop("partial_rotary_factor", 1.0)) not in (1.0, None):
            raise ConfigError(
                f"partial_rotary_factor: expected 1.0 (Qwen3-MoE rotates whole heads), found {shown(rotated)}"
            )
        allowed = {
            "default": set(),
            "linear": {"factor"},
            "yarn": {
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            },
        }
        if not isinstance(kind, str) or kind not in allowed:
            raise ConfigError(f"rope_type: expected one of {', '.join(allowed)}, found {shown(kind)}")
        if kind == "default":
            # transformers ignores scaling values of the default type, with a warning. Here only neutral ones are
            # ignored: those that would have no effect in another type either.
            neutral = {"factor": 1, "attention_factor": 1, "original_max_position_embeddings": max_position_embeddings}
            scaling = {key: value for key, value in scaling.items() if value not in (None, neutral.get(key))}
        unknown = set(scaling) - allowed[kind]
        if unknown:
            raise ConfigError(
                f"rope_parameters: expected the values of rope_type {kind!r}, also found {', '.join(sorted(unknown))}"
            )
        # yarn divides by the logarithm of the base, which must not be zero
        check_number("rope_theta", theta, above=1 if kind == "yarn" else 0)
        if kind == "yarn":
            if (outer := raw.get("original_max_position_embeddings")) is not None:
                scaling["original_max_position_embeddings"] = outer
            scaling = cls._checked_yarn(scaling, max_position_embeddings)
        if kind != "default":
            check_number("rope_parameters.factor", scaling.get("factor"), at_least=1)
        return cls(rope_theta=float(theta), rope_type=kind, **scaling)

    @staticmethod
    def _checked_yarn(scaling: dict[str, Any], max_position_embeddings: Any) -> dict[str, Any]:
        """The values of yarn without nulls. A wrong value is an error, even where transformers only warns."""
        check_integer("max_position_embeddings", max_position_embeddings, at_least=1)
        # For a null factor transformers uses the ratio of the two context lengths; an absent factor is an error.
        ratio = "factor" in scaling and scaling["factor"] is None
        scaling = {key: value for key, value in scaling.items() if value is not None}
        context = scaling.setdefault("original_max_position_embeddings", max_position_embeddings)
        check_integer("rope_parameters.original_max_position_embeddings", context, at_least=1)
        if ratio:
            scaling["factor"] = max_position_embeddings / context
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if name in scaling:
                check_number(f"rope_parameters.{name}", scaling[name], above=0)
        fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
        if fast < slow:
            raise ConfigError(f"rope_parameters.beta_fast: expected at least beta_slow ({slow}), found {fast}")
        if not isinstance(scaling.get("truncate", True), bool):
            raise ConfigError(f"rope_parameters.truncate: expected true or false, found {shown(scaling['truncate'])}")
        return scaling

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` dictionary of transformers 5: base, kind, and what differs from the defaults."""
        out: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": self.rope_type}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in out and value != field.default:
                out[field.name] = value
        return out


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """The architecture. Names, defaults and meanings of the fields are those of transformers' `Qwen3MoeConfig`."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int = 128
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.001
    mlp_only_layers: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings decoder_sparse_step moe_intermediate_size"
        ).split():
            check_integer(name, getattr(self, name), at_least=1)
        check_integer("num_experts", self.num_experts, at_least=0)
        for name, most in _AT_MOST.items():
            if (value := getattr(self, name)) > most:
                raise ConfigError(f"{name}: expected at most {most:,}, found {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads: expected a multiple of num_key_value_heads ({self.num_key_value_heads}), "
                f"found {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: expected an even number (rotary halves), found {self.head_dim}")
        if self.hidden_act not in ("silu", "swish"):
            raise ConfigError(f"hidden_act: expected 'silu', found {shown(self.hidden_act)}")
        for layer in self.mlp_only_layers:
            check_integer("mlp_only_layers", layer, at_least=0)
            if layer >= self.num_hidden_layers:
                raise ConfigError(f"mlp_only_layers: expected layers below {self.num_hidden_layers}, found {layer}")
        if self.num_experts:
            check_integer("num_experts_per_tok", self.num_experts_per_tok, at_least=1)
            if self.num_experts_per_tok > self.num_experts:
                raise ConfigError(
                    f"num_experts_per_tok: expected at most num_experts ({self.num_experts}), "
                    f"found {self.num_experts_per_tok}"
                )
        if self.sliding_window is not None:
            check_integer("sliding_window", self.sliding_window, at_least=1)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {shown(self.dtype)}")
        for name in ("rms_norm_eps", "initializer_range", "router_aux_loss_coef", "attention_dropout"):
            check_number(name, getattr(self, name), at_least=0)
        if self.attention_dropout >= 1:
            raise ConfigError(f"attention_dropout: expected a number below 1, found {self.attention_dropout}")

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose MLP is a mixture of experts, as transformers' `Qwen3MoeDecoderLayer` decides."""
        dense = frozenset(self.mlp_only_layers)
        return tuple(
            i
            for i in range(self.num_hidden_layers)
            if i not in dense and self.num_experts > 0 and (i + 1) % self.decoder_sparse_step == 0
        )

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the layers with an ordinary SwiGLU MLP."""
        sparse = set(self.sparse_layers)
        return tuple(i for i in range(self.num_hidden_layers) if i not in sparse)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Qwen3MoeConfig:
        """Reads the dictionary in a config.json written by transformers 4 or 5.

        Raises:
            ConfigError: another model type, a wrong value, values that contradict each other, or a field of another
                architecture whose value changes what the model computes.
        """
        config, others = cls._read(raw)
        check_other_fields(config, others)
        return config

    @classmethod
    def _read(cls, raw: Mapping[str, Any]) -> tuple[Qwen3MoeConfig, dict[str, Any]]:
        """The config, and the fields of `raw` that it does not have."""
        raw = dict(raw)
        kind = raw.pop("model_type", None)
        if kind != MODEL_TYPE:
            raise ConfigError(f"model_type: expected {MODEL_TYPE!r}, found {shown(kind)}")
        values: dict[str, Any] = {}
        known = {field.name for field in fields(cls)} - {"rope_parameters", "head_dim", "sliding_window", "dtype"}
        for name in known & set(raw):
            values[name] = raw.pop(name)
        # transformers 5 writes num_local_experts where 4.x wrote num_experts
        if "num_local_experts" in raw:
            local = raw.pop("num_local_experts")
            if (experts := values.setdefault("num_experts", local)) != local:
                found = f"{shown(experts)}, {shown(local)}"
                raise ConfigError(f"num_experts, num_local_experts: expected the same number, found {found}")
        for name in ("hidden_size", "num_attention_heads"):
            if name in values:
                check_integer(name, values[name], at_least=1)
        heads = values.get("num_attention_heads", cls.num_attention_heads)
        width = values.get("hidden_size", cls.hidden_size)
        head_dim = raw.pop("head_dim", None)
        if head_dim is None:
            if width % heads:
                raise ConfigError(
                    f"head_dim: expected a value, since {heads} heads do not divide hidden_size {width}; found none"
                )
            head_dim = width // heads
        values["head_dim"] = head_dim
        values.setdefault("num_key_value_heads", cls.num_key_value_heads)
        only_dense = values.get("mlp_only_layers")
        if only_dense is not None and not isinstance(only_dense, list):
            raise ConfigError(f"mlp_only_layers: expected a list of layers, found {shown(only_dense)}")
        values["mlp_only_layers"] = tuple(only_dense or ())
        use_window = raw.pop("use_sliding_window", False)
        if not isinstance(use_window, bool):
            raise ConfigError(f"use_sliding_window: expected true or false, found {shown(use_window)}")
        window = raw.pop("sliding_window", None if not use_window else 4096)
        raw.pop("max_window_layers", None)  # transformers ignores it for this model: every layer slides, or none
        values["sliding_window"] = window if use_window else None
        layer_types = raw.pop("layer_types", None)
        if layer_types is not None:
            kind = "sliding_attention" if values["sliding_window"] is not None else "full_attention"
            layers = values.get("num_hidden_layers", cls.num_hidden_layers)
            if layer_types != [kind] * check_integer("num_hidden_layers", layers, at_least=1):
                found = shown(layer_types)
                raise ConfigError(f"layer_types: expected {kind!r} for each of {layers} layers, found {found}")
        dtypes = [raw.pop(name, None) for name in ("dtype", "torch_dtype")]
        dtypes = [_dtype_name(dtype) for dtype in dtypes if dtype not in (None, "auto")]
        if len(dtypes) > 1 and dtypes[0] != dtypes[1]:
            raise ConfigError(
                f"dtype and torch_dtype: expected the same, found {shown(dtypes[0])} and {shown(dtypes[1])}"
            )
        values["dtype"] = dtypes[0] if dtypes else None
        values["rope_parameters"] = RopeParameters.from_hf(
            raw, max_position_embeddings=values.get("max_position_embeddings", cls.max_position_embeddings)
        )
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"):
            raw.pop(name, None)
        for name, value in values.items():
            default = getattr(cls, name)
            if isinstance(default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{name}: expected true or false, found {shown(value)}")
        return cls(**values), raw

    @classmethod
    def unknown_fields(cls, raw: Mapping[str, Any]) -> tuple[str, ...]:
        """The fields of a config.json that are accepted although neither this model nor a sister architecture has them,
        such as the stamps of the tool that saved it; errors as in `from_hf`."""
        return unknown_fields(cls._read(raw)[1])

    @classmethod
    def from_pretrained(cls, path: str | pathlib.Path) -> Qwen3MoeConfig:
        """Reads `config.json` in the folder `path` (an HF folder or a converted one).

        Raises:
            ConfigError: as `read_config`; what is not a model's folder is named, with the way out.
        """
        folder = pathlib.Path(path)
        if not folder.is_dir() and str(folder).isprintable():  # what no path can hold is named by its reader
            way_out = f"; a model of the hub is first converted: python -m convert hf2jax {folder} FOLDER"
            is_hub_id = not folder.is_absolute() and len(folder.parts) == 2
            raise ConfigError(f"{folder}: expected a model folder, found none{way_out if is_hub_id else ''}")
        return read_config(folder / "config.json")[0]

    def to_hf(self) -> dict[str, Any]:
        """The dictionary that transformers 5 writes for this model."""
        out: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": MODEL_TYPE}
        for field in fields(self):
            out[field.name] = getattr(self, field.name)
        out["rope_parameters"] = self.rope_parameters.to_hf()
        out["mlp_only_layers"] = list(self.mlp_only_layers)
        out["use_sliding_window"] = self.sliding_window is not None
        if self.dtype is None:
            del out["dtype"]
        return out

    def replace(self, **changes: Any) -> Qwen3MoeConfig:
        """A copy with some fields changed; its values are checked again."""
        return replace(self, **changes)


def _dtype_name(dtype: Any) -> Any:
    """The name of a dtype; some tools write "torch.bfloat16" where transformers writes "bfloat16"."""
    if not isinstance(dtype, str):
        return dtype
    name = dtype.removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def _found_instead(folder: pathlib.Path) -> str | None:
    """What a folder without config.json holds in its place, and the way out."""
    if (folder / "adapter_config.json").is_file() or (folder / "adapter.json").is_file():
        return "an adapter: give the folder of its base model as the model, and this one as the adapter"
    if gguf := next(iter(sorted(folder.glob("*.gguf"))), None):
        return f"{gguf.name}: GGUF is not supported; download the model's safetensors and config.json"
    return None


# (file, fields) of the notices that this process has given
_LISTED: set[tuple[str, tuple[str, ...]]] = set()


def read_config(path: pathlib.Path) -> tuple[Qwen3MoeConfig, dict[str, Any]]:
    """The config in the file `path`, and the JSON object that it holds. Unknown fields are listed in one notice.

    Raises:
        ConfigError: what `read_json` and `Qwen3MoeConfig.from_hf` raise; the message starts with `path`.
    """
    if not path.exists() and (instead := _found_instead(path.parent)):
        raise ConfigError(f"file not found: {path} (the folder holds {instead})")
    raw = read_json(path)
    try:
        config = Qwen3MoeConfig.from_hf(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    unknown = Qwen3MoeConfig.unknown_fields(raw)
    if unknown and (str(path), unknown) not in _LISTED:
        _LISTED.add((str(path), unknown))
        # A warning, so that it is shown where no handler is installed.
        logging.getLogger("jaxmoe").warning("%s: unknown fields, kept but not used: %s", path, ", ".join(unknown))
    return config, raw
