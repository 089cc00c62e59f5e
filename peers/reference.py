"""The `Qwen3MoeForCausalLM` of transformers, with PEFT's adapters on request, run on given arrays.

Weights are put into the state dictionary under the names of transformers. These are written out here, not imported from
`convert`, so that a wrong name there is found. All results are NumPy arrays in the layout of `jaxmoe`.
"""

from __future__ import annotations

import contextlib
import copy
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers import Qwen3MoeConfig as HfConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

from jaxmoe.lora import LORA_TARGETS, LoraConfig

# With tiny tensors a second thread costs more than it gains, and JAX uses the other core.
torch.set_num_threads(1)

_NAMES = {
    "attention": {
        "input_layernorm": "input_layernorm.weight",
        "post_attention_layernorm": "post_attention_layernorm.weight",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        **{f"{x}_proj": f"self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"{x}_proj_bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    },
    "sparse": {
        "gate": "mlp.gate.weight",
        "gate_up_proj": "mlp.experts.gate_up_proj",
        "down_proj": "mlp.experts.down_proj",
    },
    "dense": {f"{x}_proj": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class ReferenceOutput:
    """One forward pass in float32; entries of padding hold whatever transformers computes there.

    Attributes:
        logits: [B, T, V].
        hidden: [L + 1, B, T, D]: the input of every layer, then the output of the final norm.
        router_logits: [Ls, B, T, E], one entry per sparse layer.
        selected: [Ls, B, T, k] expert indices, most probable first.
    """

    logits: np.ndarray
    hidden: np.ndarray
    router_logits: np.ndarray
    selected: np.ndarray


class Reference:
    """One model in memory, in eval mode, its own weights frozen; `model` is transformers' object.

    `attention` (eager, sdpa) and `experts` (eager, batched_mm, grouped_mm) are transformers' implementations. PEFT
    keeps adapters in float32 whatever the model's `dtype`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        params: Mapping[str, np.ndarray],
        *,
        dtype: str = "float32",
        attention: str = "eager",
        experts: str = "eager",
        lora: LoraConfig | None = None,
        adapters: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """`config` is the dictionary in a config.json, `params` a flat dictionary of stacked float32 arrays."""
        self._adopt(
            AutoModelForCausalLM.from_config(
                hf_config(config),
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                experts_implementation=experts,
                trust_remote_code=False,
            )
        )
        self.model.load_state_dict(self._state_dict(params))
        if lora is not None and adapters is not None:
            self._add_adapters(lora, adapters)

    @classmethod
    def from_pretrained(
        cls,
        folder: pathlib.Path,
        *,
        dtype: str = "float32",
        attention: str = "eager",
        experts: str = "eager",
        lora: LoraConfig | None = None,
        adapters: Mapping[str, np.ndarray] | None = None,
    ) -> Reference:
        """The model of a checkpoint in HF form, read by transformers."""
        self = cls.__new__(cls)
        self._adopt(
            AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                experts_implementation=experts,
                use_safetensors=True,
                trust_remote_code=False,
            )
        )
        if lora is not None and adapters is not None:
            self._add_adapters(lora, adapters)
        return self

    @classmethod
    def of(cls, model: Any) -> Reference:
        """A reference around an existing model of transformers, without adapters."""
        self = cls.__new__(cls)
        self._adopt(model)
        return self

    def forward(
        self,
        input_ids: np.ndarray,
        position_ids: np.ndarray | None = None,
        segment_ids: np.ndarray | None = None,
        *,
        pinned: np.ndarray | None = None,
    ) -> ReferenceOutput:
        """Runs the model without gradients on `input_ids` [B, T].

        Segment 0 is padding; a token attends to earlier tokens of its own segment. `pinned` [Ls, B, T, k] replaces the
        choice of experts, not their weights.
        """
        B, T = input_ids.shape
        with torch.no_grad(), _watched(self.routers, pinned) as selected:
            out = self._run(input_ids, position_ids, segment_ids)
        hidden = np.stack([h.float().numpy() for h in out.hidden_states])
        if not self.routers:
            empty = np.zeros((0, B, T, self.config.num_experts), np.float32)
            return ReferenceOutput(out.logits.float().numpy(), hidden, empty, np.zeros((0, B, T, 0), np.int64))
        router_logits = np.stack([x.float().numpy().reshape(B, T, -1) for x in out.router_logits])
        chosen = np.stack([x.numpy().reshape(B, T, -1) for x in selected])
        return ReferenceOutput(out.logits.float().numpy(), hidden, router_logits, chosen)

    def loss_and_gradients(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        position_ids: np.ndarray | None = None,
        segment_ids: np.ndarray | None = None,
        *,
        aux_coef: float | None = None,
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Mean cross-entropy plus the weighted load-balancing loss, and its gradients under the paths of `jaxmoe`.

        `labels` [B, T] are already shifted, -100 where a token has none; `aux_coef` is the configuration's by default.
        """
        self.model.zero_grad(set_to_none=True)
        out = self._run(input_ids, position_ids, segment_ids)
        loss = torch.nn.functional.cross_entropy(
            out.logits.float().flatten(0, 1), torch.from_numpy(labels).long().flatten(), ignore_index=-100
        )
        aux = self._load_balancing_loss(out, segment_ids)
        loss = loss + (self.config.router_aux_loss_coef if aux_coef is None else aux_coef) * aux
        loss.backward()
        return float(loss.detach()), self.gradients()

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradient of every adapter weight, under the paths of `jaxmoe`."""
        for path, slot, parameter, _ in self._adapter_parameters():
            assert parameter.grad is not None, f"{path}[{slot}] has no gradient"
        return self._stacked(lambda parameter: parameter.grad)

    def adapters(self) -> dict[str, np.ndarray]:
        """The adapter weights as they are now, under the paths of `jaxmoe`."""
        return self._stacked(lambda parameter: parameter.detach())

    def _stacked(self, read: Callable[[torch.nn.Parameter], Any]) -> dict[str, np.ndarray]:
        stacks: dict[str, dict[int, np.ndarray]] = {}
        for path, slot, parameter, experts in self._adapter_parameters():
            stacks.setdefault(path, {})[slot] = _unpack(read(parameter), path, experts).float().cpu().numpy()
        return {path: np.stack([slots[i] for i in sorted(slots)]) for path, slots in stacks.items()}

    def load_balancing_loss(
        self, input_ids: np.ndarray, position_ids: np.ndarray | None = None, segment_ids: np.ndarray | None = None
    ) -> float:
        """The auxiliary loss of transformers over the tokens outside padding."""
        with torch.no_grad():
            return float(self._load_balancing_loss(self._run(input_ids, position_ids, segment_ids), segment_ids))

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop_token: int | None = None, **settings: Any
    ) -> list[list[int]]:
        """Greedy continuations of one left-padded batch, each cut after its stop token; `settings` go to `generate`."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=stop_token,
            pad_token_id=0,
            **settings,
        )
        tails = [row[longest:].tolist() for row in out]
        return [t[: t.index(stop_token) + 1] if stop_token in t else t for t in tails]

    def _adopt(self, model: Any) -> None:
        self.model = model.eval()
        self.model.requires_grad_(False)
        self.config = model.config
        # Whatever the block's class: it may stand in for transformers' own.
        self.sparse = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        self.routers = [model.model.layers[i].mlp.gate for i in self.sparse]

    def _add_adapters(self, lora: LoraConfig, adapters: Mapping[str, np.ndarray]) -> None:
        get_peft_model(self.model, peft_config(lora))  # in place
        self.set_adapters(adapters)

    def set_adapters(self, adapters: Mapping[str, np.ndarray]) -> None:
        """Gives the adapters, which PEFT has made, these weights under the paths of `jaxmoe`."""
        with torch.no_grad():
            for path, slot, parameter, experts in self._adapter_parameters():
                parameter.copy_(_pack(torch.from_numpy(adapters[path][slot]), path, experts))

    def _run(self, input_ids: np.ndarray, position_ids: np.ndarray | None, segment_ids: np.ndarray | None) -> Any:
        mask = None
        if segment_ids is not None and (segment_ids == 0).any():
            if segment_ids.max() == 1:
                mask = torch.from_numpy(segment_ids).long()
            else:
                low = torch.finfo(self.model.dtype).min
                visible = torch.from_numpy(_visible(segment_ids, self.config.sliding_window))
                mask = torch.where(visible[:, None], 0.0, low).to(self.model.dtype)
        # Without a mask and a cache, transformers itself reads restarting positions as packed documents.
        out = self.model.model(
            input_ids=torch.from_numpy(input_ids).long(),
            attention_mask=mask,
            position_ids=None if position_ids is None else torch.from_numpy(position_ids).long(),
            output_hidden_states=True,
            output_router_logits=True,
            use_cache=False,
        )
        out.logits = self.model.lm_head(out.last_hidden_state)
        return out

    def _load_balancing_loss(self, out: Any, segment_ids: np.ndarray | None) -> torch.Tensor:
        if not self.routers:
            return torch.zeros(())
        valid = None if segment_ids is None else torch.from_numpy((segment_ids != 0).astype(np.int64))
        experts, k = self.config.num_experts, self.config.num_experts_per_tok
        return torch.as_tensor(hf.load_balancing_loss_func(out.router_logits, experts, k, valid))

    def _adapter_parameters(self) -> Iterator[tuple[str, int, torch.nn.Parameter, int]]:
        """(path, slot in the stack, parameter, experts that it packs or 0) of every adapter weight."""
        dense = [i for i in range(self.config.num_hidden_layers) if i not in self.sparse]
        for name, module in self.model.named_modules():
            if "default" not in getattr(module, "lora_A", ()):
                continue
            layer = int(name.split("layers.")[1].split(".")[0])
            inner = name.split("mlp.")[-1].split(".")[0]  # below an MLP: gate, experts, or a dense projection
            wrapped = getattr(module, "parameter_name", "weight")
            if ".self_attn." in name:
                stack, slot, target = "attention", layer, name.split(".")[-1]
            elif layer in self.sparse:
                stack, slot, target = "sparse", self.sparse.index(layer), inner if wrapped == "weight" else wrapped
            else:
                stack, slot, target = "dense", dense.index(layer), inner
            experts = self.config.num_experts if inner == "experts" else 0
            for side in "AB":
                parameter = getattr(module, f"lora_{side}")["default"].weight
                yield f"{stack}.{target}.lora_{side}", slot, parameter, experts

    def _state_dict(self, params: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Stacked arrays under the names that transformers uses in memory; loading fails if one is missing."""
        out = {"model.embed_tokens.weight": params["embed_tokens"], "model.norm.weight": params["norm"]}
        out["lm_head.weight"] = params.get("lm_head", params["embed_tokens"])
        dense = [i for i in range(self.config.num_hidden_layers) if i not in self.sparse]
        layers = {"attention": range(self.config.num_hidden_layers), "sparse": self.sparse, "dense": dense}
        for path, stack in params.items():
            if "." in path:
                kind, name = path.split(".")
                for slot, layer in enumerate(layers[kind]):
                    out[f"model.layers.{layer}.{_NAMES[kind][name]}"] = stack[slot]
        return {name: torch.tensor(np.asarray(array, np.float32)) for name, array in out.items()}


def hf_config(config: Mapping[str, Any]) -> HfConfig:
    """A config.json as transformers itself reads it."""
    return HfConfig.from_dict(copy.deepcopy(dict(config)))


def peft_config(lora: LoraConfig) -> PeftConfig:
    """The adapters of `lora` as PEFT is told to make them."""
    parameters = [name for target in lora.targets if (name := LORA_TARGETS[target].peft_parameter)]
    return PeftConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        use_rslora=lora.use_rslora,
        target_modules=[target for target in lora.targets if not LORA_TARGETS[target].peft_parameter],
        target_parameters=parameters or None,
    )


def _pack(array: torch.Tensor, path: str, experts: int) -> torch.Tensor:
    """[E, r, in] or [E, out, r] -> the matrix in which PEFT stacks the experts' factors (expert fastest in B)."""
    if not experts:
        return array
    return array.flatten(0, 1) if path.endswith("lora_A") else array.permute(1, 2, 0).flatten(1, 2)


def _unpack(matrix: torch.Tensor, path: str, experts: int) -> torch.Tensor:
    """The inverse of `_pack`."""
    if not experts:
        return matrix
    if path.endswith("lora_A"):
        return matrix.unflatten(0, (experts, -1))
    return matrix.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _visible(segment_ids: np.ndarray, window: int | None) -> np.ndarray:
    """Boolean [B, T, S]: which keys of its own document a query sees; padding sees itself."""
    T = segment_ids.shape[1]
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & near


@contextlib.contextmanager
def _watched(routers: list[torch.nn.Module], pinned: np.ndarray | None) -> Iterator[list[torch.Tensor]]:
    """Collects the experts that each router selects; `pinned` [Ls, B, T, k] replaces them, not their weights."""
    selected: list[torch.Tensor] = []

    def hook(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, scores, indices = output
        if pinned is not None:
            indices = torch.from_numpy(pinned[len(selected)]).long().flatten(0, 1)
            scores = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(-1, indices)
            if router.norm_topk_prob:
                scores = scores / scores.sum(dim=-1, keepdim=True)
            scores = scores.to(logits.dtype)
        selected.append(indices)
        return logits, scores, indices

    handles = [router.register_forward_hook(hook) for router in routers]
    try:
        yield selected
    finally:
        for handle in handles:
            handle.remove()
