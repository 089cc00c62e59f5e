"""The forwards that replace transformers', and the functions that install and remove them.

Names and signatures are those of Unsloth's `qwen3_moe.py`. Results are those of transformers' `modeling_qwen3_moe.py`:
the configuration decides whether routing weights are renormalised, layers may be dense, decoding applies q/k norm,
documents packed into one sequence do not attend to each other, and an output has the dtype of its input.

Submodules are called as modules, so that hooks, forwards of their own and offloaded weights have their effect. Only
the norm of queries and keys and plain LoRA are computed without a call, and only if it would do nothing more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from torch_ref.adapters import called_alone, linear, split_experts, wrapped_plainly
from torch_ref.experts import mixture, stack_of, transformers_implementation
from torch_ref.loss import CHUNKED, NO_LOGITS, cross_entropy, shifted_labels
from torch_ref.rotary import norm_and_rotate, unsupported

# transformers' own: it dispatches to the implementation that the configuration names
_TRANSFORMERS_EXPERTS = modeling_qwen3_moe.Qwen3MoeExperts.forward
_NORMS = (modeling_qwen3_moe.Qwen3MoeRMSNorm, modeling_qwen3.Qwen3RMSNorm)


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
    query, key = normed_rotary(self, hidden_states, *position_embeddings)
    value = linear(self.v_proj, hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
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
    attention: Any, hidden_states: Float[Tensor, "B T D"], cos: Tensor, sin: Tensor
) -> tuple[Float[Tensor, "B N T H"], Float[Tensor, "B K T H"]]:
    """Queries and keys: projected, normed and rotated; one kernel computes norm and rotation where it is supported."""
    heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
    norms = attention.q_norm, attention.k_norm
    query = linear(attention.q_proj, hidden_states).view(heads)
    if not all(_can_be_fused(norm, query, cos) for norm in norms):
        # the order of the calls, which hooks can see, is that of transformers
        query = norms[0](query).transpose(1, 2)
        key = norms[1](linear(attention.k_proj, hidden_states).view(heads)).transpose(1, 2)
        return modeling_qwen3_moe.apply_rotary_pos_emb(query, key, cos, sin)
    key = linear(attention.k_proj, hidden_states).view(heads)
    query, key = (
        norm_and_rotate(x, norm.weight, cos, sin, norm.variance_epsilon).transpose(1, 2)
        for norm, x in zip(norms, (query, key), strict=True)
    )
    return query, key


def _can_be_fused(norm: Any, x: Tensor, cos: Tensor) -> bool:
    """Whether one kernel can norm and rotate x, and `norm` would do no more than transformers' RMSNorm."""
    if type(norm) not in _NORMS or type(norm).forward is not rms_norm or not called_alone(norm):
        return False
    return norm.weight.dtype == x.dtype and unsupported(x, norm.weight, cos) is None


def rms_norm(self: Any, hidden_states: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """Computes x / rms(x) * weight, in one kernel if the weight has x's dtype: float32 inside, rounded once.

    transformers also rounds before it multiplies by the weight; in float32 both give the same.
    """
    shape, dtype = self.weight.shape, hidden_states.dtype
    if self.weight.dtype != dtype:
        return self.weight * F.rms_norm(hidden_states.float(), shape, None, self.variance_epsilon).to(dtype)
    # autocast makes the result float32
    return F.rms_norm(hidden_states, shape, self.weight, self.variance_epsilon).to(dtype)


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
    activated = self.act_fn(_into(temp_gate, "temp_gate", linear(self.gate_proj, X)))
    return linear(self.down_proj, activated * _into(temp_up, "temp_up", linear(self.up_proj, X)))


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
    if temp_up is not None:
        width = stack_of(experts, "gate_up_proj").shape[1]
        _check_buffer(temp_up, "temp_up", (selected.numel(), width), X.dtype)
    asked = transformers_implementation(experts)
    if asked == "batched_mm" and adapters and torch.compiler.is_compiling():
        asked = None  # transformers decodes with it; PEFT's own module cannot be traced
    if wrapped_plainly(self.experts) and asked is None:
        out = mixture(experts, x, selected, weights, adapters, temp_up)
    else:
        out = self.experts(x, selected, weights, **({} if temp_up is None else {"temp_up": temp_up}))
    return out.view(B, T, D), router_logits


def Qwen3MoeExperts_fast_forward(
    self: Any,
    hidden_states: Float[Tensor, "M D"],
    top_k_index: Int[Tensor, "M k"],
    top_k_weights: Float[Tensor, "M k"],
    temp_up: Float[Tensor, "R F2"] | None = None,
) -> Float[Tensor, "M D"]:
    """The experts' outputs, weighted and summed; `temp_up` as in the block.

    An implementation of transformers that is not one of ours (batched_mm, sonicmoe, ...) runs if the model asks for it.

    Raises:
        ValueError: `temp_up` with such an implementation.
    """
    theirs = transformers_implementation(self)
    if theirs is None:
        return mixture(self, hidden_states, top_k_index, top_k_weights, temp_up=temp_up)
    if temp_up is not None:
        raise ValueError(f"temp_up: expected the implementation loop or grouped, found {theirs}")
    return _TRANSFORMERS_EXPERTS(self, hidden_states, top_k_index, top_k_weights)


def Qwen3MoeDecoderLayer_fast_forward(
    self: Any,
    hidden_states: Float[Tensor, "B T D"],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    output_router_logits: bool = False,
    past_key_value: Cache | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """One layer: attention, then the sparse block or, in a dense layer, the MLP.

    Returns (hidden_states, [attention weights], [router logits], [cache]), the last three only if requested. The router
    logits of a dense layer are None.
    """
    with _router_logits(self.mlp if output_router_logits else None) as router_logits:
        hidden_states, attention_weights = _attention_and_mlp(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_value,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **({"output_attentions": True} if output_attentions else {}),
            **kwargs,
        )
    outputs: tuple[Any, ...] = (hidden_states,)
    if output_attentions:
        outputs += (attention_weights,)
    if output_router_logits:
        outputs += (router_logits[0] if router_logits else None,)
    if use_cache:
        outputs += (past_key_value,)
    return outputs


def _attention_and_mlp(
    layer: Any, hidden_states: Float[Tensor, "B T D"], **of_attention: Any
) -> tuple[Float[Tensor, "B T D"], Tensor | None]:
    """The hidden states after a layer, and its attention weights."""
    attended, attention_weights = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **of_attention)
    hidden_states = hidden_states + attended
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states)), attention_weights


@contextlib.contextmanager
def _router_logits(mlp: Any) -> Iterator[list[Tensor]]:
    """The router's logits of a call of `mlp`; a list that stays empty for a dense MLP, and for None."""
    found: list[Tensor] = []
    if mlp is None or not hasattr(mlp, "gate"):
        yield found
        return
    handle = mlp.gate.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    try:
        yield found
    finally:
        handle.remove()


@merge_with_config_defaults
@capture_outputs
def LlamaModel_fast_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> MoeModelOutputWithPast:
    """The decoder: embeddings, layers, final norm. `router_logits` has one [B*T, E] per sparse layer, in layer order.

    transformers records what output_hidden_states, output_attentions and output_router_logits ask for.

    Raises:
        ValueError: neither or both of `input_ids` and `inputs_embeds`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    config = self.config
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
    for layer in self.layers[: config.num_hidden_layers]:
        hidden_states = layer(
            hidden_states,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


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
    **kwargs: Any,
) -> MoeCausalLMOutputWithPast:
    """Logits [B, T, V] and, with `labels`, transformers' loss: mean cross-entropy plus the weighted auxiliary loss.

    The signature is transformers', from which its Trainer reads which inputs are labels. More keywords:
        return_logits: False takes the chunked loss, which never holds the logits of all tokens; `logits` then is a
            placeholder that says so when it is read. By default, in training after `get_peft_model` or `for_training`.
        shift_labels, num_items_in_batch, ignore_index: as in transformers' loss; `shift_labels` [B, T], labels that are
            already shifted, replace `labels`.

    The chunked loss is transformers' default loss. A model with another `loss_function` gives it all logits.
    """
    if output_router_logits is None:
        output_router_logits = bool(self.config.output_router_logits)
    return_logits = kwargs.pop("return_logits", None)
    of_loss = {name: kwargs[name] for name in _LOSS_KEYWORDS if name in kwargs}
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
    loss = aux_loss = None
    has_labels = labels is not None or of_loss.get("shift_labels") is not None
    if return_logits is None:
        return_logits = not (self.training and getattr(self, CHUNKED, False))
    if has_labels and not return_logits and self.loss_function is ForCausalLMLoss:
        logits = None if torch.compiler.is_exporting() else NO_LOGITS  # a program returns tensors only
        loss = _chunked_loss(self.lm_head, hidden_states, labels, **of_loss)
    else:
        logits = self.lm_head(_positions_to_keep(hidden_states, logits_to_keep))
        if has_labels:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
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


# transformers reads the class, not its name, to find out which outputs there are
CausalLM_fast_forward.__annotations__["return"] = MoeCausalLMOutputWithPast
LlamaModel_fast_forward.__annotations__["return"] = MoeModelOutputWithPast

_LOSS_KEYWORDS = ("shift_labels", "num_items_in_batch", "ignore_index")


def _chunked_loss(
    head: Any,
    hidden_states: Float[Tensor, "B T D"],
    labels: Tensor | None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    if shift_labels is None:
        assert labels is not None
        shift_labels = shifted_labels(labels, ignore_index)
    targets = shift_labels.flatten().to(hidden_states.device)
    return cross_entropy(hidden_states.flatten(0, 1), head, targets, num_items_in_batch, ignore_index)


def _positions_to_keep(hidden_states: Float[Tensor, "B T D"], logits_to_keep: int | Tensor) -> Float[Tensor, "*kept D"]:
    """The positions whose logits are wanted, in each of transformers' forms.

    An int: the last ones, 0 for all. A vector of positions: the same ones of every sequence. Positions [B, n]. A
    boolean mask [B, T], whose result is flat, [n, D].
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if not isinstance(logits_to_keep, Tensor) or logits_to_keep.ndim < 2:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


class LlamaRotaryEmbedding(modeling_qwen3_moe.Qwen3MoeRotaryEmbedding):
    """transformers' rotary embedding, which computes its tables in float32 under autocast too."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, T, H] of position * frequency, in x's dtype."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            return super().forward(x, position_ids)


def moe_block_forward(self: Any, hidden_states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """The output of `Qwen3MoeSparseMoeBlock_fast_forward`, alone, as transformers' block returns it."""
    return Qwen3MoeSparseMoeBlock_fast_forward(self, hidden_states)[0]


class _Layer(GradientCheckpointingLayer):
    """Not a layer: transformers wraps its forward in what recomputes a layer in the backward pass."""

    def forward(
        self: Any,
        hidden_states: Float[Tensor, "B T D"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "B T D"]:
        """The hidden states of `Qwen3MoeDecoderLayer_fast_forward`, alone, as transformers' layer returns them.

        All keywords reach the attention function, as in transformers, which records the router's logits elsewhere.
        """
        return _attention_and_mlp(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )[0]


decoder_layer_forward = vars(_Layer)["forward"]

Patch = tuple[Any, str, Any]

DENSE_PATCHES: tuple[Patch, ...] = (
    (modeling_qwen3.Qwen3Attention, "forward", Qwen3Attention_fast_forward),
    (modeling_qwen3.Qwen3MLP, "forward", fast_swiglu_inference),
    (modeling_qwen3.Qwen3RMSNorm, "forward", rms_norm),
)
MOE_PATCHES: tuple[Patch, ...] = (
    (modeling_qwen3_moe.Qwen3MoeAttention, "forward", Qwen3Attention_fast_forward),
    (modeling_qwen3_moe.Qwen3MoeSparseMoeBlock, "forward", moe_block_forward),
    (modeling_qwen3_moe.Qwen3MoeExperts, "forward", Qwen3MoeExperts_fast_forward),
    (modeling_qwen3_moe.Qwen3MoeRMSNorm, "forward", rms_norm),
    (modeling_qwen3_moe.Qwen3MoeMLP, "forward", fast_swiglu_inference),
    (modeling_qwen3_moe.Qwen3MoeDecoderLayer, "forward", decoder_layer_forward),
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
