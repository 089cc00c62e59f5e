"""The forwards that replace transformers', and the functions that install and remove them.

Names and signatures are those of Unsloth's `qwen3_moe.py`. Results are those of transformers' `modeling_qwen3_moe.py`:
the configuration decides whether routing weights are renormalised, layers may be dense, decoding applies q/k norm,
documents packed into one sequence do not attend to each other, and an output has the dtype of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from torch_ref.adapters import linear, split_experts
from torch_ref.experts import DenseStack, Projection, Stack, implementation
from torch_ref.loss import cross_entropy, shifted_labels
from torch_ref.rotary import norm_and_rotate, unsupported

# In earlier versions of transformers a layer's __call__ checkpoints it; in later ones a wrapper around the class's own
# forward does, and the patch replaces that forward.
_CALL_CHECKPOINTS = "__call__" in vars(GradientCheckpointingLayer)


def Qwen3Attention_fast_forward(
    self: Any,
    hidden_states: Float[Tensor, "B T D"],
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T D"], Tensor | None]:
    """Grouped-query attention with q/k norm and rotary embedding, with the cache or without.

    Returns the output and, from the eager implementation, the attention weights [B, N, T, S]. All other arguments
    (position_ids, the flash kernels' cu_seq_lens_q, ...) are passed to transformers' attention interface.
    """
    B, T, _ = hidden_states.shape
    heads = (B, T, -1, self.head_dim)
    query, key = (linear(projection, hidden_states).view(heads) for projection in (self.q_proj, self.k_proj))
    query, key = normed_rotary(self, query, key, *position_embeddings)
    value = linear(self.v_proj, hidden_states).view(heads).transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, modeling_qwen3_moe.eager_attention_forward
    )
    out, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=self.sliding_window,
        **kwargs,
    )
    return linear(self.o_proj, out.reshape(B, T, -1).contiguous()), weights


def normed_rotary(
    attention: Any, query: Float[Tensor, "B T N H"], key: Float[Tensor, "B T K H"], cos: Tensor, sin: Tensor
) -> tuple[Float[Tensor, "B N T H"], Float[Tensor, "B K T H"]]:
    """The rotary embedding of the normed heads; one kernel computes both where it is supported."""
    pairs = (attention.q_norm, query), (attention.k_norm, key)
    if all(_is_plain(norm, x) and unsupported(x, norm.weight, cos) is None for norm, x in pairs):
        fused = (norm_and_rotate(x, norm.weight, cos, sin, norm.variance_epsilon) for norm, x in pairs)
        query, key = (x.transpose(1, 2) for x in fused)
        return query, key
    query, key = (rms_norm(norm, x).transpose(1, 2) for norm, x in pairs)
    return modeling_qwen3_moe.apply_rotary_pos_emb(query, key, cos, sin)


def _is_plain(module: Any, x: Tensor) -> bool:
    """Whether `module` is transformers' own RMSNorm, in x's dtype."""
    known = modeling_qwen3_moe.Qwen3MoeRMSNorm | modeling_qwen3.Qwen3RMSNorm
    return isinstance(module, known) and module.weight.dtype == x.dtype


def rms_norm(module: Any, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """`module(x)`, in one kernel if `module` is transformers' own RMSNorm in x's dtype: float32 inside, rounded once.

    transformers also rounds before it multiplies by the weight; in float32 both give the same.
    """
    if not _is_plain(module, x):
        return module(x)
    # autocast makes the result float32
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon).to(x.dtype)


def fast_swiglu_inference(
    self: Any,
    X: Float[Tensor, "B T D"],
    temp_gate: Float[Tensor, "B T F"] | None = None,
    temp_up: Float[Tensor, "B T F"] | None = None,
) -> Float[Tensor, "B T D"]:
    """down(activation(gate(X)) * up(X)), in training too; `temp_gate` and `temp_up` receive the two products.

    Raises:
        ValueError: a buffer while gradients are on, or one of the wrong shape or dtype.
    """
    gate = _into(temp_gate, "temp_gate", linear(self.gate_proj, X))
    up = _into(temp_up, "temp_up", linear(self.up_proj, X))
    return linear(self.down_proj, self.act_fn(gate) * up)


def _into(buffer: Tensor | None, name: str, value: Tensor) -> Tensor:
    """`value`, copied into `buffer` if there is one."""
    _check_buffer(buffer, name, value.shape, value.dtype)
    return value if buffer is None else buffer.copy_(value)


def _check_buffer(buffer: Tensor | None, name: str, shape: Iterable[int], dtype: torch.dtype) -> None:
    if buffer is None:
        return
    if torch.is_grad_enabled():
        raise ValueError(f"{name}: a buffer is overwritten in place and needs torch.no_grad(), found gradients on")
    if tuple(buffer.shape) != tuple(shape) or buffer.dtype != dtype:
        raise ValueError(f"{name}: expected {tuple(shape)} {dtype}, found {tuple(buffer.shape)} {buffer.dtype}")


def Qwen3MoeSparseMoeBlock_fast_forward(
    self: Any,
    X: Float[Tensor, "B T D"],
    temp_gate: Float[Tensor, "M E"] | None = None,
    temp_up: Float[Tensor, "R F2"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "M E"]]:
    """Routes every token to its k experts; returns the output in X's dtype and the router's logits.

    Under no_grad `temp_gate` [B*T, E] receives the router's logits and is returned in their place; `temp_up`
    [B*T*k, 2F] receives the gate and up products of the rows, ordered by expert, then by token.

    Raises:
        ValueError: a buffer while gradients are on, or one of the wrong shape or dtype.
    """
    B, T, D = X.shape
    x = X.reshape(-1, D)
    # Called as a module, because adapters and transformers' recorder of router logits hook that call.
    router_logits, weights, selected = self.gate(x)
    router_logits = _into(temp_gate, "temp_gate", router_logits)
    experts, adapters = split_experts(self.experts)
    gate_up, down = (
        Projection(stack_of(experts, name), adapters.get(name, ())) for name in ("gate_up_proj", "down_proj")
    )
    _check_buffer(temp_up, "temp_up", (selected.numel(), gate_up.stack.shape[1]), X.dtype)
    run = implementation(getattr(experts, "torch_ref_implementation", None), x, gate_up)
    out = run(x, selected, weights, gate_up, down, experts.act_fn, temp_up)
    return out.view(B, T, D), router_logits


def stack_of(experts: nn.Module, name: str) -> Stack:
    """The weights `name` (gate_up_proj or down_proj) of an expert module, in 16 or 4 bit."""
    stack = getattr(experts, "stack", None)
    return DenseStack(getattr(experts, name)) if stack is None else stack(name)


def Qwen3MoeDecoderLayer_fast_forward(
    self: Any,
    hidden_states: Float[Tensor, "B T D"],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    output_router_logits: bool = False,
    past_key_value: Cache | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """One layer: attention, then the sparse block or, in a dense layer, the MLP.

    Returns (hidden_states, [attention weights], [router logits], [cache]), the last three only if requested. The router
    logits of a dense layer are None.
    """
    residual = hidden_states
    hidden_states, attention_weights = self.self_attn(
        hidden_states=rms_norm(self.input_layernorm, hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_value,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states = residual + hidden_states
    mlp = self.mlp(rms_norm(self.post_attention_layernorm, hidden_states))
    out, router_logits = mlp if isinstance(mlp, tuple) else (mlp, None)
    outputs: tuple[Any, ...] = (hidden_states + out,)
    if output_attentions:
        outputs += (attention_weights,)
    if output_router_logits:
        outputs += (router_logits,)
    if use_cache:
        outputs += (past_key_value,)
    return outputs


@can_return_tuple
@merge_with_config_defaults
def LlamaModel_fast_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    output_router_logits: bool | None = None,
    **kwargs: Any,
) -> MoeModelOutputWithPast:
    """The decoder: embeddings, layers, final norm. `router_logits` has one [B*T, E] per sparse layer, in layer order.

    Raises:
        ValueError: neither or both of `input_ids` and `inputs_embeds`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    config = self.config
    if output_attentions is None:
        output_attentions = bool(config.output_attentions)
    if output_hidden_states is None:
        output_hidden_states = bool(config.output_hidden_states)
    if output_router_logits is None:
        output_router_logits = bool(getattr(config, "output_router_logits", False))
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=config)
    if inputs_embeds is None:
        inputs_embeds = self.embed_tokens(input_ids)
    assert inputs_embeds is not None
    if position_ids is None:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
    make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    mask = make_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )
    hidden_states = inputs_embeds
    position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

    all_hidden, all_attentions, all_router_logits = [], [], []
    for layer in self.layers[: config.num_hidden_layers]:
        if output_hidden_states:
            all_hidden.append(hidden_states)
        checkpointed = layer.gradient_checkpointing and self.training
        call: Callable[..., tuple[Any, ...]] = partial(
            layer,
            attention_mask=mask,
            position_ids=position_ids,
            output_router_logits=output_router_logits,
            past_key_value=None if checkpointed else past_key_values,
            position_embeddings=position_embeddings,
            output_attentions=output_attentions,
            **kwargs,
        )
        if checkpointed and not _CALL_CHECKPOINTS:
            hidden_states, *extras = layer._gradient_checkpointing_func(call, hidden_states)
        else:
            hidden_states, *extras = call(hidden_states)
        if output_attentions:
            all_attentions.append(extras.pop(0))
        if output_router_logits and extras[0] is not None:
            all_router_logits.append(extras[0])
    hidden_states = rms_norm(self.norm, hidden_states)
    if output_hidden_states:
        all_hidden.append(hidden_states)
    return MoeModelOutputWithPast(
        last_hidden_state=hidden_states,
        past_key_values=past_key_values,
        hidden_states=tuple(all_hidden) if output_hidden_states else None,
        attentions=tuple(all_attentions) if output_attentions else None,
        router_logits=tuple(all_router_logits) if output_router_logits and all_router_logits else None,
    )


@can_return_tuple
def CausalLM_fast_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_router_logits: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    return_logits: bool | None = None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> MoeCausalLMOutputWithPast:
    """Logits [B, T, V] and, with `labels`, transformers' loss: mean cross-entropy plus the weighted auxiliary loss.

    In training with labels `logits` is None unless `return_logits` is true: the loss never holds the logits of all
    tokens. `shift_labels` [B, T], labels that are already shifted, replace `labels`.
    """
    if output_router_logits is None:
        output_router_logits = bool(self.config.output_router_logits)
    outputs = self.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        output_router_logits=output_router_logits,
        **kwargs,
    )
    hidden_states = outputs.last_hidden_state
    has_labels = labels is not None or shift_labels is not None
    logits = loss = aux_loss = None
    if has_labels:
        if shift_labels is None:
            assert labels is not None
            shift_labels = shifted_labels(labels, ignore_index)
        targets = shift_labels.flatten().to(hidden_states.device)
        loss = cross_entropy(hidden_states.flatten(0, 1), self.lm_head, targets, num_items_in_batch, ignore_index)
    if return_logits if return_logits is not None else not (self.training and has_labels):
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep] if not isinstance(keep, int) else hidden_states)
    if output_router_logits and outputs.router_logits:
        balance = modeling_qwen3_moe.load_balancing_loss_func
        aux_loss = balance(outputs.router_logits, self.num_experts, self.num_experts_per_tok, attention_mask)
        assert isinstance(aux_loss, Tensor)
        if loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
    return MoeCausalLMOutputWithPast(
        loss=loss,
        aux_loss=aux_loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        router_logits=outputs.router_logits,
    )


class LlamaRotaryEmbedding(modeling_qwen3_moe.Qwen3MoeRotaryEmbedding):
    """transformers' rotary embedding, which computes its tables in float32 under autocast too."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, T, H] of position * frequency, in x's dtype."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            return super().forward(x, position_ids)


Patch = tuple[Any, str, Any]

DENSE_PATCHES: tuple[Patch, ...] = (
    (modeling_qwen3.Qwen3Attention, "forward", Qwen3Attention_fast_forward),
    (modeling_qwen3.Qwen3MLP, "forward", fast_swiglu_inference),
)
MOE_PATCHES: tuple[Patch, ...] = (
    (modeling_qwen3_moe.Qwen3MoeAttention, "forward", Qwen3Attention_fast_forward),
    (modeling_qwen3_moe.Qwen3MoeSparseMoeBlock, "forward", Qwen3MoeSparseMoeBlock_fast_forward),
    (modeling_qwen3_moe.Qwen3MoeMLP, "forward", fast_swiglu_inference),
    (modeling_qwen3_moe.Qwen3MoeDecoderLayer, "forward", Qwen3MoeDecoderLayer_fast_forward),
    (modeling_qwen3_moe.Qwen3MoeModel, "forward", LlamaModel_fast_forward),
    (modeling_qwen3_moe.Qwen3MoeForCausalLM, "forward", CausalLM_fast_forward),
    (modeling_qwen3_moe, "Qwen3MoeRotaryEmbedding", LlamaRotaryEmbedding),
)

_originals: dict[tuple[int, str], Any] = {}


def apply(patches: Iterable[Patch]) -> None:
    """Installs every replacement; one that is installed already changes nothing."""
    for owner, name, replacement in patches:
        _originals.setdefault((id(owner), name), vars(owner)[name])
        setattr(owner, name, replacement)


def restore(patches: Iterable[Patch]) -> None:
    """Restores the very objects that `apply` replaced."""
    for owner, name, _ in patches:
        if (id(owner), name) in _originals:
            setattr(owner, name, _originals.pop((id(owner), name)))
