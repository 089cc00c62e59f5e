"""torch_ref's patched forwards against stock transformers on the same weights: values, gradients, decoding, buffers."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

import torch_ref.experts
import torch_ref.loss
import torch_ref.patch
from peers.configs import CONFIGS, config_of, random_parameters
from peers.reference import Reference
from tests.conftest import ROOT
from tests.parity import make_batch
from tests.tolerances import bound
from torch_ref import FastQwen3Model, FastQwen3MoeModel
from torch_ref.model import set_experts_implementation

ROWS = [[48], [-5, 43]]
PACKED = [[48], [13, 1, 34]]


def stock(name: str, **options: Any) -> Any:
    """transformers' model in float32."""
    return Reference(CONFIGS[name], random_parameters(config_of(name)), **options).model


@contextlib.contextmanager
def patched(model: Any, implementation: str = "loop") -> Iterator[None]:
    """torch_ref's forwards, installed for `model`."""
    set_experts_implementation(model, implementation)
    FastQwen3MoeModel.pre_patch()
    try:
        yield
    finally:
        FastQwen3MoeModel.unpatch()


def inputs_of(name: str, packed: bool) -> dict[str, Any]:
    """Left-padded sequences with a mask, or packed documents, marked by their positions."""
    batch = make_batch(config_of(name), PACKED if packed else ROWS)
    ids = torch.from_numpy(batch.input_ids).long()
    if packed:
        # with a cache transformers does not treat restarting positions as documents
        positions = torch.from_numpy(batch.position_ids).long()
        return {"input_ids": ids, "position_ids": positions, "use_cache": False}
    return {"input_ids": ids, "attention_mask": torch.from_numpy(batch.segment_ids).long()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in L2."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def run(model: Any, name: str, packed: bool) -> Any:
    with torch.no_grad():
        sparse = bool(config_of(name).sparse_layers)
        return model(**inputs_of(name, packed), output_hidden_states=True, output_router_logits=sparse)


def check(found: Any, expected: Any) -> None:
    """The parity that the forward tests assert, negative controls included."""
    limit = bound("torch_ref_fp32")
    assert distance(found.logits, expected.logits) <= limit
    pairs = list(zip(found.hidden_states, expected.hidden_states, strict=True))
    if expected.router_logits is not None:
        pairs += zip(found.router_logits, expected.router_logits, strict=True)
        assert float(found.aux_loss) == pytest.approx(float(expected.aux_loss), rel=limit)
    assert max(distance(*pair) for pair in pairs) <= limit


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_transformers(name: str) -> None:
    model = stock(name)
    for packed in (False, True):
        expected = run(model, name, packed)
        for implementation in torch_ref.experts.IMPLEMENTATIONS:
            with patched(model, implementation):
                if implementation == "grouped" and name == "odd_sizes":
                    with pytest.raises(
                        ValueError, match=r"experts_implementation: 'grouped' expects sizes .* use 'loop'"
                    ):
                        run(model, name, packed)
                    continue
                check(run(model, name, packed), expected)


def test_sdpa_attention_equals_transformers() -> None:
    model = stock("sliding_window", attention="sdpa")
    for packed in (False, True):
        expected = run(model, "sliding_window", packed)
        with patched(model):
            check(run(model, "sliding_window", packed), expected)


def swap_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    split = torch.Tensor.chunk
    patch.setattr(torch.Tensor, "chunk", lambda self, n, dim=0: split(self, n, dim)[::-1])


def skip_renormalisation(patch: pytest.MonkeyPatch) -> None:
    forward = modeling_qwen3_moe.Qwen3MoeTopKRouter.forward

    def wrong(self: Any, x: torch.Tensor) -> Any:
        patch.setattr(self, "norm_topk_prob", False)
        return forward(self, x)

    patch.setattr(modeling_qwen3_moe.Qwen3MoeTopKRouter, "forward", wrong)


def forget_qk_norm(patch: pytest.MonkeyPatch) -> None:
    norm = torch_ref.patch.rms_norm
    owner = modeling_qwen3_moe.Qwen3MoeRMSNorm
    patch.setattr(owner, "forward", lambda module, x: x if x.ndim == 4 else norm(module, x))


def drop_packing(patch: pytest.MonkeyPatch) -> None:
    make = torch_ref.patch.create_causal_mask
    patch.setattr(torch_ref.patch, "create_causal_mask", lambda **k: make(**{**k, "position_ids": None}))


def permute_an_expert(patch: pytest.MonkeyPatch) -> None:
    stack_of = torch_ref.experts.stack_of

    def wrong(experts: Any, name: str) -> Any:
        stack = stack_of(experts, name)
        assert isinstance(stack, torch_ref.experts.DenseStack)
        order = [1, 0, *range(2, stack.shape[0])]
        return torch_ref.experts.DenseStack(stack.weight[order]) if name == "down_proj" else stack

    patch.setattr(torch_ref.experts, "stack_of", wrong)


@pytest.mark.parametrize("implementation", torch_ref.experts.IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "fault", [swap_gate_and_up, skip_renormalisation, forget_qk_norm, drop_packing, permute_an_expert]
)
def test_a_planted_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stock("plain")
    expected = run(model, "plain", packed=True)
    with patched(model, implementation):
        check(run(model, "plain", packed=True), expected)
        with monkeypatch.context() as patch:
            fault(patch)
            with pytest.raises(AssertionError):
                check(run(model, "plain", packed=True), expected)


@pytest.mark.parametrize("name", ["plain", "mlp_only_layers", "sliding_window"])
def test_decoding_with_the_cache_equals_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock(name)
    ids = inputs_of(name, packed=False)["input_ids"][:, :20]
    with torch.no_grad():
        expected = model(ids).logits

    def decode() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            pieces = [model(ids[:, :12], past_key_values=cache, use_cache=True).logits]
            pieces += [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(12, 20)]
        return torch.cat(pieces, 1)

    def forgotten(module: Any, x: torch.Tensor) -> torch.Tensor:
        return x if x.ndim == 4 and x.shape[1] == 1 else torch_ref.patch.rms_norm(module, x)

    with patched(model):
        assert distance(decode(), expected) <= bound("torch_ref_fp32")
        with monkeypatch.context() as patch:  # the original's fault: no q/k norm with a cache
            patch.setattr(modeling_qwen3_moe.Qwen3MoeRMSNorm, "forward", forgotten)
            assert distance(decode(), expected) > bound("torch_ref_fp32")


def test_generation_equals_transformers() -> None:
    model = stock("top_8_of_32")
    inputs = inputs_of("top_8_of_32", packed=False)
    inputs = {name: tensor[:, :12] for name, tensor in inputs.items()}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **settings)
    with patched(model):
        assert torch.equal(model.generate(**inputs, **settings), expected)


def gradients(model: Any, name: str, packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, including the auxiliary loss, and the gradient of every parameter."""
    model.train().requires_grad_(True).zero_grad(set_to_none=True)
    inputs = inputs_of(name, packed)
    labels = inputs["input_ids"].clone()
    labels[:, 20:24] = -100
    out = model(**inputs, labels=labels, output_router_logits=bool(config_of(name).sparse_layers))
    out.loss.backward()
    return float(out.loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=bound("parity_loss"))
    assert found[1].keys() == expected[1].keys()
    errors = {name: distance(found[1][name], gradient) for name, gradient in expected[1].items() if gradient.any()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound("torch_ref_gradients"), f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("name", ["top_8_of_32", "sparse_step_2", "attention_bias", "every_expert", "tied"])
@pytest.mark.parametrize("implementation", torch_ref.experts.IMPLEMENTATIONS)
def test_training_gradients_equal_transformers(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock(name)
    expected = gradients(model, name, packed=True)
    monkeypatch.setattr(torch_ref.loss, "CHUNK", 32)  # several chunks
    with patched(model, implementation):
        check_gradients(gradients(model, name, packed=True), expected)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        check_gradients(gradients(model, name, packed=True), expected)


def test_a_wrong_backward_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock("plain")
    expected = gradients(model, "plain", packed=False)

    def wrong(ctx: Any, grad: torch.Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.k))[:, 0], None, None, None

    monkeypatch.setattr(torch_ref.experts._Gather, "backward", staticmethod(wrong))
    with patched(model, "grouped"), pytest.raises(AssertionError):
        check_gradients(gradients(model, "plain", packed=False), expected)


def test_checkpointing_runs_each_layer_twice() -> None:
    model = stock("plain")
    calls: list[int] = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with patched(model):
        gradients(model, "plain", packed=False)
    assert len(calls) == 2


def test_the_loss_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock("plain").train()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    monkeypatch.setattr(torch_ref.loss, "CHUNK", 32)
    ids = inputs_of("plain", packed=False)["input_ids"]
    with patched(model):
        assert model(input_ids=ids, labels=ids).logits.shape == (2, 48, 97)
        rows.clear()
        out = model(input_ids=ids, labels=ids, return_logits=False)
        assert rows == [32, 32, 32]
        FastQwen3MoeModel.for_training(model)
        assert isinstance(model(input_ids=ids, labels=ids).logits, torch_ref.loss.NoLogits)
        assert model(input_ids=ids, labels=ids, return_logits=True).logits.shape == (2, 48, 97)
        assert model.eval()(input_ids=ids, labels=ids).logits.shape == (2, 48, 97)
        summed = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(10)).loss
        assert float(summed) == pytest.approx(float(out.loss) * 94 / 10, rel=bound("torch_ref_loss"))


@pytest.mark.parametrize("implementation", torch_ref.experts.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_have_the_dtype_of_the_input(dtype: torch.dtype, implementation: str) -> None:
    model = stock("plain").to(dtype)
    x = torch.randn(2, 5, 48, dtype=dtype)
    with patched(model, implementation), torch.no_grad():
        block = model.model.layers[0].mlp
        assert block(x).dtype == dtype
        out, router_logits = torch_ref.patch.Qwen3MoeSparseMoeBlock_fast_forward(block, x)
        assert (out.dtype, router_logits.dtype) == (dtype, dtype)
        assert (out.shape, router_logits.shape) == ((2, 5, 48), (10, 8))
        assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("implementation", torch_ref.experts.IMPLEMENTATIONS)
def test_training_under_autocast(implementation: str, dtype: torch.dtype) -> None:
    name = "every_expert"  # no routing to flip
    model = stock(name).to(dtype).train().requires_grad_(True)
    inputs = inputs_of(name, packed=True)

    def gradient() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return model.model.layers[0].mlp.experts.gate_up_proj.grad.float()

    expected = gradient()
    with patched(model, implementation):
        assert distance(gradient(), expected) <= bound("torch_ref_autocast")
        with torch.autocast("cpu", torch.bfloat16):
            assert model.model.layers[0].mlp(torch.randn(1, 3, 48, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["top_8_of_32", "every_expert"])
def test_bfloat16_is_no_further_from_float64_than_transformers(name: str) -> None:
    inputs = inputs_of(name, packed=True)
    with torch.no_grad():
        exact = stock(name).double()(**inputs).logits
        model = stock(name, dtype="bfloat16")
        own = distance(model(**inputs).logits, exact)
        for implementation in torch_ref.experts.IMPLEMENTATIONS:
            with patched(model, implementation):
                assert distance(model(**inputs).logits, exact) <= bound("torch_ref_bf16") * own


@pytest.mark.parametrize("implementation", torch_ref.experts.IMPLEMENTATIONS)
def test_buffers_are_written_in_place_without_gradients_only(implementation: str) -> None:
    model = stock("plain")
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 5, 48)
    block = functools.partial(torch_ref.patch.Qwen3MoeSparseMoeBlock_fast_forward, mlp)
    temp_gate, temp_up = torch.full((10, 8), torch.nan), torch.full((20, 48), torch.nan)
    where = temp_gate.data_ptr(), temp_up.data_ptr()
    with patched(model, implementation):
        with torch.no_grad():
            expected, logits = block(x)
            out, router_logits = block(x, temp_gate, temp_up)
            assert router_logits.data_ptr() == temp_gate.data_ptr() == where[0] and temp_up.data_ptr() == where[1]
            assert torch.equal(out, expected) and torch.equal(temp_gate, logits)
            experts = mlp.gate(x)[2].flatten().argsort(stable=True)
            flat = x.view(10, 48)[experts // 2]
            chosen = mlp.gate(x)[2].flatten()[experts]
            rows = torch.einsum("rd,rfd->rf", flat, mlp.experts.gate_up_proj[chosen])
            assert distance(temp_up, rows) <= bound("torch_ref_fp32")
            with pytest.raises(ValueError, match=r"temp_up: expected \(20, 48\)"):
                block(x, temp_gate, temp_up[:3])
            with pytest.raises(
                ValueError, match=r"temp_gate: expected \(10, 8\) torch.float32, found .* torch.float64"
            ):
                block(x, temp_gate.double())
        for buffers in ({"temp_gate": temp_gate}, {"temp_up": temp_up}):
            with pytest.raises(ValueError, match=r"a buffer is overwritten in place and needs torch\.no_grad"):
                block(x, **buffers)


def test_buffers_of_a_dense_mlp() -> None:
    model = stock("all_dense")
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 5, 48)
    temp_gate, temp_up = torch.empty(2, 5, 80), torch.empty(2, 5, 80)
    with patched(model):
        with torch.no_grad():
            assert torch.equal(mlp(x, temp_gate, temp_up), mlp(x))
            assert torch.equal(temp_gate, mlp.gate_proj(x)) and torch.equal(temp_up, mlp.up_proj(x))
        with pytest.raises(ValueError, match="temp_gate: a buffer"):
            mlp(x, temp_gate)


def test_the_layer_returns_what_is_asked_for() -> None:
    model = stock("mlp_only_layers")
    x, positions = torch.randn(1, 4, 48), torch.arange(4)[None]
    cache = DynamicCache(config=model.config)
    with patched(model), torch.no_grad():
        tables = model.model.rotary_emb(x, positions)
        fast = torch_ref.patch.Qwen3MoeDecoderLayer_fast_forward
        sparse, dense = (functools.partial(fast, model.model.layers[i]) for i in (1, 0))
        assert len(sparse(x, None, positions, False, None, tables)) == 1
        hidden, weights, logits, present = sparse(
            x, None, positions, True, cache, tables, output_attentions=True, use_cache=True
        )
        assert (hidden.shape, weights.shape, logits.shape) == (x.shape, (1, 4, 4, 4), (4, 8)) and present is cache
        assert dense(x, None, positions, True, None, tables)[1] is None


def test_patching_is_undone_exactly() -> None:
    owners = [(owner, name) for owner, name, _ in (*torch_ref.patch.MOE_PATCHES, *torch_ref.patch.DENSE_PATCHES)]
    before = [vars(owner)[name] for owner, name in owners]
    FastQwen3MoeModel.unpatch()
    for cls in (FastQwen3MoeModel, FastQwen3Model):
        cls.pre_patch()
        cls.pre_patch()
    patch = torch_ref.patch
    assert modeling_qwen3_moe.Qwen3MoeAttention.forward is patch.Qwen3Attention_fast_forward
    assert modeling_qwen3_moe.Qwen3MoeSparseMoeBlock.forward is patch.moe_block_forward
    assert modeling_qwen3_moe.Qwen3MoeExperts.forward is patch.Qwen3MoeExperts_fast_forward
    assert modeling_qwen3_moe.Qwen3MoeRMSNorm.forward is patch.rms_norm
    assert modeling_qwen3_moe.Qwen3MoeMLP.forward is patch.fast_swiglu_inference
    assert modeling_qwen3_moe.Qwen3MoeDecoderLayer.forward is patch.decoder_layer_forward
    assert modeling_qwen3_moe.Qwen3MoeModel.forward is patch.LlamaModel_fast_forward
    assert modeling_qwen3_moe.Qwen3MoeForCausalLM.forward is patch.CausalLM_fast_forward
    assert modeling_qwen3_moe.Qwen3MoeRotaryEmbedding is patch.LlamaRotaryEmbedding
    for cls in (FastQwen3MoeModel, FastQwen3Model):
        cls.unpatch()
    assert [vars(owner)[name] for owner, name in owners] == before
    assert all(a is b for a, b in zip([vars(owner)[name] for owner, name in owners], before, strict=True))


def test_dense_qwen3_equals_transformers() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = modeling_qwen3.Qwen3ForCausalLM(config).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        FastQwen3Model.pre_patch()
        try:
            assert distance(model(ids).logits, expected) <= bound("torch_ref_fp32")
        finally:
            FastQwen3Model.unpatch()


def test_an_old_transformers_is_named() -> None:
    code = "import transformers; transformers.__version__ = '4.57.6'; from torch_ref import FastQwen3Model"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode and "torch_ref needs transformers 5" in done.stderr and "found 4.57.6" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_equal_the_loop_on_a_gpu(dtype: torch.dtype) -> None:
    model = stock("top_8_of_32").to("cuda", dtype)
    inputs = {name: tensor.cuda() for name, tensor in inputs_of("top_8_of_32", packed=False).items()}
    with torch.no_grad():
        with patched(model, "loop"):
            expected = model(**inputs).logits
        with patched(model, "grouped"):
            limit = bound("torch_ref_fp32" if dtype == torch.float32 else "torch_ref_gpu_bf16")
            assert distance(model(**inputs).logits, expected) <= limit
