"""The public classes: loading, adapters, and switching between training and inference."""

from __future__ import annotations

import math
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"torch_ref needs transformers 5, whose experts are one stack per layer, found {transformers.__version__}"
    )

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from torch_ref import export, lora, patch
from torch_ref.experts import IMPLEMENTATIONS
from torch_ref.fp8 import is_fp8, load_fp8
from torch_ref.shards import Shards
from torch_ref.strangers import check_model_folder, naming

# tokens of Qwen's vocabularies that carry no text; the first one that is present can become the padding token
_PAD_CANDIDATES = ("<|endoftext|>", "<|vision_pad|>", "<|fim_pad|>", "<unk>")


class _Default(int):
    """A default, so that it can be told apart from the same number given by the caller."""


_DEFAULT_LENGTH = _Default(4096)


class FastQwen3Model:
    """Dense Qwen3, and what Qwen3-MoE shares with it: attention, SwiGLU, loading, adapters.

    `get_peft_model` is documented in `torch_ref.lora`, `save_pretrained_merged` and `save_pretrained_4bit` in
    `torch_ref.export`.
    """

    model_class: ClassVar[type] = Qwen3ForCausalLM
    patches: ClassVar[Iterable[patch.Patch]] = patch.DENSE_PATCHES
    get_peft_model = staticmethod(lora.get_peft_model)
    save_pretrained_merged = staticmethod(export.save_pretrained_merged)
    save_pretrained_4bit = staticmethod(export.save_pretrained_4bit)

    @classmethod
    def pre_patch(cls) -> None:
        """Replaces transformers' forwards in this process; calling it again changes nothing."""
        patch.apply(cls.patches)

    @classmethod
    def unpatch(cls) -> None:
        """Restores transformers' own forwards: the very objects that `pre_patch` replaced."""
        patch.restore(cls.patches)

    @classmethod
    def from_pretrained(
        cls,
        model_name: str = "Qwen/Qwen3-8B",
        max_seq_length: int | None = _DEFAULT_LENGTH,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        token: str | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        experts_implementation: str | None = None,
        attn_implementation: str | None = None,
    ) -> tuple[Any, Any]:
        """Patches transformers, then loads the model and its tokenizer from a folder or the hub.

        Args:
            model_name: a folder in HF form, or a hub id.
            max_seq_length: the longest sequence that will be used. Above the configuration's max_position_embeddings,
                positions are compressed linearly (Chen et al. 2023), with a warning, unless `rope_scaling` covers it.
                The default, 4096, compresses nothing: a model with a lower limit keeps that limit.
            dtype: torch dtype or its name; None means bfloat16 if the device supports it, otherwise float16, and
                float32 on a CPU.
            load_in_4bit: store attention, dense MLPs and experts as NF4 with doubly quantised statistics; router,
                embeddings, norms and head stay in `dtype`. A checkpoint in 4 bit keeps its form, one in FP8 is
                decoded to `dtype`.
            token: access token for the hub.
            device_map: as in transformers: "sequential", "auto", a device, or a dictionary from module to device.
            rope_scaling: replaces the configuration's; in transformers' form: {"rope_type": "yarn", "factor": 4, ...}.
            fix_tokenizer: give the tokenizer a padding token that differs from its end-of-sequence token, padding on
                the right, and `max_seq_length` as its longest input.
            trust_remote_code: let the checkpoint's own Python code build the tokenizer and the configuration; the model
                is always transformers' own class.
            experts_implementation: "loop" or "grouped"; None picks `grouped` on CUDA if it is supported, otherwise
                `loop`.
            attn_implementation: transformers' attention: eager, sdpa, flash_attention_2, ...; None lets transformers
                choose.

        Raises:
            ValueError: an option that is not supported; the message names it.
        """
        if experts_implementation is not None and experts_implementation not in IMPLEMENTATIONS:
            expected = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"experts_implementation: expected one of {expected}, found {experts_implementation!r}")
        cls.pre_patch()
        if (folder := pathlib.Path(model_name)).is_dir():
            check_model_folder(folder)
        else:
            try:
                validate_repo_id(str(model_name))
            except HFValidationError:
                found = "a file" if folder.exists() else "neither"
                raise ValueError(f"model_name: expected a folder or a hub id, found {found}: {model_name}") from None
        with naming(model_name, "a config.json"):
            config = AutoConfig.from_pretrained(model_name, token=token, trust_remote_code=trust_remote_code)
        expected = cls.model_class.config_class.model_type
        if config.model_type != expected:
            raise ValueError(f"model_name: expected a {expected} checkpoint, found {config.model_type} in {model_name}")
        if config.hidden_act not in ACT2FN:
            raise ValueError(
                f"{model_name}: hidden_act: expected an activation of transformers, found {config.hidden_act!r}"
            )
        length = scale_positions(config, max_seq_length, rope_scaling)
        with naming(model_name, "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(model_name, token=token, trust_remote_code=trust_remote_code)
        if fix_tokenizer:
            repair_tokenizer(tokenizer, config, length)
        model = cls._load(model_name, config, choose_dtype(dtype), load_in_4bit, token, device_map, attn_implementation)
        set_experts_implementation(model, experts_implementation)
        if fix_tokenizer and model.generation_config is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.max_seq_length = length
        return cls.for_inference(model), tokenizer

    @classmethod
    def _load(
        cls,
        model_name: str,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        load_in_4bit: bool,
        token: str | None,
        device_map: Any,
        attn_implementation: str | None,
    ) -> Any:
        attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
        stored = getattr(config, "quantization_config", None)
        if is_fp8(stored):
            return load_fp8(cls.model_class, model_name, config, dtype, device_map, token, **attention)
        if load_in_4bit or stored is not None:
            # the only place that needs bitsandbytes
            from torch_ref.checkpoint import load_4bit

            return load_4bit(cls.model_class, model_name, config, dtype, device_map, token, attn_implementation)
        if (folder := pathlib.Path(model_name)).is_dir():
            shards = Shards(folder)
            shards.check_plain()
            shards.check_experts(getattr(config, "num_experts", 0))
        model, found = cls.model_class.from_pretrained(
            model_name,
            config=config,
            dtype=dtype,
            token=token,
            device_map=device_map,
            use_safetensors=True,  # a pickle can run code
            trust_remote_code=False,  # nor does a checkpoint's own generation loop run
            ignore_mismatched_sizes=True,  # an error below, which names the tensor
            output_loading_info=True,
            **attention,
        )
        for key, stored, wanted in sorted(found["mismatched_keys"]):
            raise ValueError(f"{model_name}: {key}: expected the shape {list(wanted)}, found {list(stored)}")
        # transformers would leave these random
        if missing := found["missing_keys"]:
            first = min(missing, key=lambda key: (key == "lm_head.weight", key))  # which may be tied to another
            raise ValueError(f"{model_name}: expected {first}, found none ({len(missing)} missing in all)")
        return model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Puts `model` in evaluation mode, with the cache and without recomputation, and returns it."""
        lora.set_gradient_checkpointing(model, False)
        lora.choose_chunked_loss(model, False)
        model.config.use_cache = True
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str = True, chunked_loss: bool = True) -> Any:
        """Puts `model` in training mode, without the cache, and returns it.

        With `chunked_loss` a step with labels never holds the logits of all tokens, and returns none.
        """
        return lora.for_training(model, use_gradient_checkpointing, chunked_loss)


class FastQwen3MoeModel(FastQwen3Model):
    """Qwen3-MoE: adds the routed experts, in 16 or 4 bit."""

    model_class = Qwen3MoeForCausalLM
    patches = patch.MOE_PATCHES

    @classmethod
    def from_pretrained(
        cls,
        model_name: str = "Qwen/Qwen3-30B-A3B",
        max_seq_length: int | None = _DEFAULT_LENGTH,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        token: str | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        experts_implementation: str | None = None,
        attn_implementation: str | None = None,
    ) -> tuple[Any, Any]:
        """As `FastQwen3Model.from_pretrained`, with another default model.

        Unsloth's default, Qwen/Qwen3-7B, does not exist on the hub.
        """
        return super().from_pretrained(
            model_name,
            max_seq_length,
            dtype,
            load_in_4bit,
            token,
            device_map,
            rope_scaling,
            fix_tokenizer,
            trust_remote_code,
            experts_implementation,
            attn_implementation,
        )


def choose_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype to compute in; None picks one for this machine's device.

    Raises:
        ValueError: not a floating-point dtype of 16 or 32 bits, or bfloat16 on a GPU that does not support it.
    """
    cuda = torch.cuda.is_available()
    if dtype is None:
        return (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16) if cuda else torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, found {dtype!r}")
    if chosen is torch.bfloat16 and cuda and not torch.cuda.is_bf16_supported():
        raise ValueError(f"dtype: expected float16 or float32 on {torch.cuda.get_device_name()}, found bfloat16")
    return chosen


def scale_positions(config: Any, max_seq_length: int | None, rope_scaling: dict[str, Any] | None) -> int:
    """Fits the configuration's rotary embedding to `max_seq_length` and `rope_scaling`, in place; returns the length.

    Raises:
        ValueError: a length below 1, a missing or unknown rope_type, a factor below 1, or a length that the scaling
            does not reach.
    """
    if max_seq_length is not None and max_seq_length < 1:
        raise ValueError(f"max_seq_length: expected a positive number, found {max_seq_length}")
    positions = config.max_position_embeddings
    if rope_scaling is not None:
        scaling = dict(rope_scaling)
        scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
        known = ("default", *ROPE_INIT_FUNCTIONS)
        if scaling["rope_type"] not in known:
            raise ValueError(f"rope_scaling: expected rope_type among {', '.join(known)}, found {rope_scaling}")
        factor = scaling.get("factor", 1)
        if not isinstance(factor, int | float) or not 1 <= factor < math.inf:
            raise ValueError(f"rope_scaling: expected a factor of at least 1, found {rope_scaling}")
        if scaling["rope_type"] == "yarn":
            scaling.setdefault("original_max_position_embeddings", positions)
        # the other types' frequencies depend on max_position_embeddings itself
        if scaling["rope_type"] in ("linear", "yarn") and "factor" in scaling:
            positions = int(scaling.get("original_max_position_embeddings", positions) * scaling["factor"])
        config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **scaling}
        try:
            config.standardize_rope_params()
            config.validate_rope()
        except (KeyError, ValueError) as error:
            raise ValueError(f"rope_scaling: {error}, found {rope_scaling}") from None
    config.max_position_embeddings = positions = max(positions, config.max_position_embeddings)
    if max_seq_length is None or max_seq_length <= positions:
        return positions if max_seq_length is None else int(max_seq_length)
    if isinstance(max_seq_length, _Default):
        return positions
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        raise ValueError(
            f"max_seq_length: expected at most {positions}, which {rope_type} scaling reaches, found {max_seq_length}"
        )
    factor = max_seq_length / positions
    warnings.warn(
        f"{max_seq_length} positions exceed the model's {positions}: they are compressed linearly by {factor}",
        stacklevel=3,
    )
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = max_seq_length
    return max_seq_length


def repair_tokenizer(tokenizer: Any, config: Any, max_seq_length: int) -> None:
    """Gives the tokenizer its own padding token, padding on the right, and the longest input; in place.

    Raises:
        ValueError: more tokens than the embedding has entries, or no token that can serve as padding.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"fix_tokenizer: expected at most {config.vocab_size} tokens, the embedding's size, found {len(tokenizer)}"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        free = [name for name in _PAD_CANDIDATES if name in vocabulary and name != tokenizer.eos_token]
        if not free:
            raise ValueError(
                f"fix_tokenizer: expected a token for padding other than {tokenizer.eos_token!r}, one of "
                f"{', '.join(_PAD_CANDIDATES)}, found none"
            )
        tokenizer.pad_token = free[0]
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = max_seq_length


def set_experts_implementation(model: Any, name: str | None) -> None:
    """Sets the experts' implementation, `loop` or `grouped`, of every layer; None chooses by the device.

    Raises:
        ValueError: another name.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"experts_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, found {name!r}")
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "act_fn"):
            module.torch_ref_implementation = name
