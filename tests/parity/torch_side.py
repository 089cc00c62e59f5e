"""Runs a plan's cases in PyTorch: stock transformers, or torch_ref, never both in one process.

    python -m tests.parity.torch_side transformers|torch_ref PLAN
    python -m tests.parity.torch_side quantize SOURCE TARGET DTYPE DEVICE [SOURCE TARGET ...]

The two differ in how a model is loaded and in which loss is differentiated; hooks, batches and files are the same code.
Each chooses its own default implementation of attention and experts.
"""

from __future__ import annotations

import contextlib
import gc
import json
import pathlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from peers.reference import Reference
from tests.parity.batches import Batch
from tests.parity.environment import torch_device, write_environment
from tests.parity.plan import Case, Plan, log, read_batch, run_cases
from tests.parity.trace import torch_trace
from tests.parity.weights import Weights, in_fp8


class Side:
    """How one of the two loads a case, and its training loss."""

    name: str

    def load(self, case: Case, device: str) -> Any:
        """The model without adapters, in inference mode."""
        raise NotImplementedError

    def adapt(self, model: Any, case: Case) -> Any:
        """The model with the case's adapter."""
        raise NotImplementedError

    def loss(self, model: Any, inputs: dict[str, Any], labels: torch.Tensor, aux_coefficient: float) -> torch.Tensor:
        """Mean cross-entropy of labels that are already shifted, plus the weighted load-balancing loss."""
        raise NotImplementedError


class Transformers(Side):
    """transformers' own classes, and PEFT."""

    name = "transformers"

    def load(self, case: Case, device: str) -> Any:
        """Uses `from_pretrained`; 4-bit weights are decoded first, because transformers has no experts in 4 bit."""
        dtype = getattr(torch, case.dtype)
        if case.quantized is None:
            options = {"dtype": dtype, "device_map": device}
            if not _aligned(case.checkpoint, dtype):
                options["experts_implementation"] = "eager"
            return AutoModelForCausalLM.from_pretrained(
                case.checkpoint, **options, use_safetensors=True, trust_remote_code=False
            )
        config = AutoConfig.from_pretrained(case.checkpoint, trust_remote_code=False)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        fill(model, Weights(case.quantized, dtype, device))
        if case.rows_in_fp8:
            for module in model.modules():
                if hasattr(module, "gate_up_proj"):
                    module.forward = partial(_rows_in_fp8, module)
        return model

    def adapt(self, model: Any, case: Case) -> Any:
        """PEFT reads the folder by itself."""
        return PeftModel.from_pretrained(model, str(case.adapter), is_trainable=True)

    def loss(self, model: Any, inputs: dict[str, Any], labels: torch.Tensor, aux_coefficient: float) -> torch.Tensor:
        """Computes it from the logits, because the model shifts labels across document boundaries."""
        out = model(**inputs, output_router_logits=True)
        loss = F.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        return loss if out.aux_loss is None else loss + aux_coefficient * out.aux_loss


def _rows_in_fp8(experts: Any, hidden: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Fused experts of transformers, one after the other, over rows [M, D] in FP8."""
    out = torch.zeros_like(hidden)
    for expert in selected.unique().tolist():
        token, place = torch.where(selected == expert)
        gate, up = F.linear(in_fp8(hidden[token]), experts.gate_up_proj[expert]).chunk(2, dim=-1)
        rows = F.linear(in_fp8(experts.act_fn(gate) * up), experts.down_proj[expert])
        out.index_add_(0, token, rows * weights[token, place, None])
    return out


def _aligned(checkpoint: str, dtype: torch.dtype) -> bool:
    """Whether rows of the experts' matrices start at multiples of 16 bytes, as torch's grouped matmul requires."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    return all(width * dtype.itemsize % 16 == 0 for width in (config.hidden_size, config.moe_intermediate_size))


class TorchRef(Side):
    """This project's patched model."""

    name = "torch_ref"

    def load(self, case: Case, device: str) -> Any:
        """Uses its own `from_pretrained`, with the 4-bit folder if there is one."""
        from torch_ref import FastQwen3MoeModel

        folder = case.quantized or case.checkpoint
        options = {"max_seq_length": None, "load_in_4bit": False, "fix_tokenizer": False}
        model = FastQwen3MoeModel.from_pretrained(folder, dtype=case.dtype, device_map=device, **options)[0]
        if case.rows_in_fp8:
            from torch_ref.fp8 import multiply_in_fp8

            multiply_in_fp8(model)
        return model

    def adapt(self, model: Any, case: Case) -> Any:
        """Uses `get_peft_model`, then copies the folder's weights."""
        from torch_ref import FastQwen3MoeModel

        settings = json.loads((pathlib.Path(str(case.adapter)) / "adapter_config.json").read_text(encoding="utf-8"))
        adapted = FastQwen3MoeModel.get_peft_model(
            model,
            target_modules=[*settings["target_modules"], *(settings["target_parameters"] or ())],
            **{name: settings[name] for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")},
        )
        found = set_peft_model_state_dict(adapted, load_peft_weights(str(case.adapter), device=str(model.device)))
        assert not found.unexpected_keys, found.unexpected_keys[0]
        return FastQwen3MoeModel.for_inference(adapted)

    def loss(self, model: Any, inputs: dict[str, Any], labels: torch.Tensor, aux_coefficient: float) -> torch.Tensor:
        """The model's own loss, which never holds all logits."""
        from torch_ref import FastQwen3MoeModel

        model.get_base_model().router_aux_loss_coef = aux_coefficient
        FastQwen3MoeModel.for_training(model)
        return model(**inputs, labels=inputs["input_ids"], shift_labels=labels, output_router_logits=True).loss


def fill(model: Any, weights: Weights) -> None:
    """Copies every weight of a folder into a model of transformers, experts into its fused stacks."""
    config = model.config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                layer = int(name.split("layers.")[1].split(".")[0])
                experts = model.get_submodule(name.rpartition(".")[0])
                both, down = weights.experts(layer, config.num_experts)
                parameter.copy_(both)
                experts.down_proj.copy_(down)
            elif not name.endswith("experts.down_proj"):
                parameter.copy_(weights[name])


class Recorder:
    """Records every router's output. If experts are pinned, it replaces the choice but keeps the router's weights."""

    def __init__(self, routers: list[Any], pinned: np.ndarray | None, device: str) -> None:
        self.routers = routers
        self.pinned = None if pinned is None else torch.from_numpy(pinned.astype(np.int64)).flatten(1, 2).to(device)
        self.records: dict[int, tuple[torch.Tensor, ...]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Installs the hooks while the block runs."""
        handles = [router.register_forward_hook(self._hook(slot)) for slot, router in enumerate(self.routers)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, slot: int) -> Any:
        def hook(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, scores, indices = output
            chosen = indices
            if self.pinned is not None:
                indices = self.pinned[slot]
                scores = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(-1, indices)
                if router.norm_topk_prob:
                    scores = scores / scores.sum(dim=-1, keepdim=True)
                scores = scores.to(logits.dtype)
            self.records[slot] = tuple(t.detach() for t in (logits, chosen, indices, scores))
            return logits, scores, indices

        return hook

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """router_logits [Ls, B, T, E], the router's own choice, the experts used, and the routing weights."""
        if not self.records:
            return {}
        names = ("router_logits", "chosen", "selected", "weights")
        stacks = zip(*(self.records[slot] for slot in range(len(self.routers))), strict=True)
        shape = batch.input_ids.shape
        return {
            name: to_numpy(torch.stack(stack).unflatten(1, shape)) for name, stack in zip(names, stacks, strict=True)
        }


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The array on the host, floats as float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor.int()).cpu().numpy()


def inputs_of(batch: Batch, device: str) -> dict[str, Any]:
    """Token ids and positions; without a mask and a cache, restarting positions mean packed documents."""
    ids, positions = (torch.from_numpy(a.astype(np.int64)).to(device) for a in batch[:2])
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def run_case(plan: Plan, side: Side, case: Case) -> None:
    """Loads the case's model once and writes the arrays of all of its runs."""
    device = torch_device(plan.device)
    model = side.load(case, device).eval()
    reference = Reference.of(model)
    routers = reference.routers
    if case.adapter:
        model = side.adapt(model, case)
    batch = read_batch(case.batch)
    pinned = plan.oracle_experts(case)
    for run in case.runs:
        recorder = Recorder(routers, None if run in ("free", "trace") else pinned, device)
        if run in ("free", "pinned"):
            with torch.no_grad(), recorder.watching():
                out = model(**inputs_of(batch, device), output_hidden_states=True, output_router_logits=bool(routers))
            arrays = {"logits": to_numpy(out.logits), "hidden": np.stack([to_numpy(h) for h in out.hidden_states])}
            if routers:
                arrays["aux_loss"] = to_numpy(out.aux_loss)
            plan.save(case, side.name, run, arrays | recorder.arrays(batch))
        elif run == "gradients":
            for draw, name in enumerate(case.gradient_runs):
                labels = batch.labels_of(draw, case.draws)
                arrays = train(side, model, reference, case, batch, labels, recorder, device)
                plan.save(case, side.name, name, arrays)
        else:
            plan.save(case, side.name, run, torch_trace(model, inputs_of(batch, device)))


def train(
    side: Side,
    model: Any,
    reference: Reference,
    case: Case,
    batch: Batch,
    labels: np.ndarray,
    recorder: Recorder,
    device: str,
) -> dict[str, np.ndarray]:
    """Loss, gradients, and, if there is only one draw, the adapter after one step of AdamW without weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=case.learning_rate, weight_decay=0.0)
    optimizer.zero_grad()
    with recorder.watching():
        expected = torch.from_numpy(labels.astype(np.int64)).to(device)
        loss = side.loss(model, inputs_of(batch, device), expected, case.aux_coefficient)
        loss.backward()
    out = {"loss": to_numpy(loss.detach())}
    out |= {f"gradient.{path}": array for path, array in reference.gradients().items()}
    if case.draws > 1:
        return out
    optimizer.step()
    return out | {f"after.{path}": array for path, array in reference.adapters().items()}


def quantize(arguments: list[str]) -> None:
    """Writes checkpoints in bitsandbytes' NF4, experts included, so that every side reads the same bytes."""
    from torch_ref import FastQwen3MoeModel

    while arguments:
        (source, target, dtype, device), arguments = arguments[:4], arguments[4:]
        log("quantize", target)
        model, tokenizer = FastQwen3MoeModel.from_pretrained(
            source, max_seq_length=None, dtype=dtype, load_in_4bit=True, device_map=device, fix_tokenizer=False
        )
        FastQwen3MoeModel.save_pretrained_4bit(model, target, tokenizer)
        del model


def main() -> int:
    """Runs every case of a plan on one side."""
    if sys.argv[1] == "quantize":
        quantize(sys.argv[2:])
        return 0
    side = {"transformers": Transformers, "torch_ref": TorchRef}[sys.argv[1]]()
    plan = Plan.read(pathlib.Path(sys.argv[2]))

    def run(case: Case) -> None:
        try:
            run_case(plan, side, case)
        finally:
            gc.collect()
            torch.cuda.empty_cache()  # the next model needs the memory

    failed = run_cases(plan, side.name, run)
    write_environment(plan, side.name)
    return failed


if __name__ == "__main__":
    sys.exit(main())
