"""Random weights of a published shape, made on the device, for benchmarks of both frameworks.

The routers are the same NumPy arrays on every side. Their experts' vectors differ in length, so that some experts are
chosen more often than others for any hidden states. All other weights are drawn by each framework; the load per expert
then agrees up to sampling noise.

Embeddings have unit variance, and the weights that write into the residual stream are divided by the number of layers.
Otherwise each layer would amplify what the tokens have in common, since random attention averages them: after 48 layers
all tokens of a sequence would choose the same experts (measured: the busiest of 128 gets 12 times the mean).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoe.config import Qwen3MoeConfig

if TYPE_CHECKING:
    from jaxmoe.distributed.placement import Placement  # importing it would start JAX

STD = 0.02
ROUTER_SCALES = (0.25, 1.75)  # of the shortest and the longest vector
RESIDUAL = ("attention.o_proj", "dense.down_proj", "sparse.down_proj")  # these write into the residual stream


def routers(config: Qwen3MoeConfig, seed: int = 0) -> np.ndarray:
    """Router weights [Ls, E, D], float32."""
    rng = np.random.default_rng(seed)
    shape = len(config.sparse_layers), config.num_experts, config.hidden_size
    weights = rng.standard_normal(shape, dtype=np.float32) * STD
    scales = np.linspace(*ROUTER_SCALES, config.num_experts, dtype=np.float32)
    return weights * np.stack([rng.permutation(scales) for _ in range(shape[0])])[..., None]


def token_ids(config: Qwen3MoeConfig, batch: int, length: int, step: int) -> np.ndarray:
    """Random token ids [B, T + 1] of one step, the same on every side."""
    return np.random.default_rng([1, step]).integers(0, config.vocab_size, (batch, length + 1), dtype=np.int32)


def load_ratio(counts: np.ndarray) -> float:
    """Rows of the busiest expert divided by the mean, averaged over the layers; `counts` is [Ls, E]."""
    return float((counts.max(-1) / counts.mean(-1)).mean())


def jax_parameters(
    config: Qwen3MoeConfig,
    quantize: str | None = None,
    on_host: Collection[str] = (),
    placement: Placement | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Parameters in `dtype` on JAX's default device, or where they lie on a mesh; with `quantize` "nf4" or "fp8" the
    weights that it covers in that form, "fp8" on one device only. No device ever holds more than its share of them.

    In NF4, the 16-bit ones that `on_host` names are NumPy arrays.
    """
    if quantize == "fp8":
        return _fp8_parameters(config)
    if quantize is not None:
        return _nf4_parameters(config, on_host, placement)
    import jax
    import jax.numpy as jnp

    from jaxmoe.model.init import init_parameters

    draw = partial(init_parameters, config, dtype=jnp.dtype(dtype))
    key = jax.random.key(0)
    lie = _shardings(jax.eval_shape(draw, key), placement)
    params = jax.jit(draw, out_shardings=lie or None)(key)
    scales = {"embed_tokens": 1 / STD} | dict.fromkeys(RESIDUAL, 1 / config.num_hidden_layers)
    scaled = jax.jit(lambda weight, scale: weight * scale.astype(weight.dtype), donate_argnums=0)
    for path in scales.keys() & params.keys():
        params[path] = scaled(params[path], jnp.float32(scales[path]))
    return params | _gates(config, lie, dtype)


def _shardings(arrays: Mapping[str, Any], placement: Placement | None) -> dict[str, Any]:
    """Path -> where the array lies on the mesh; empty for one device."""
    if placement is None or placement.mesh.size == 1:
        return {}
    return {path: placement.sharding(spec) for path, spec in placement.specs(arrays).items()}


def _gates(config: Qwen3MoeConfig, lie: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    return {"sparse.gate": jax.device_put(routers(config).astype(jnp.dtype(dtype)), lie.get("sparse.gate"))}


def _nf4_parameters(config: Qwen3MoeConfig, on_host: Collection[str], placement: Placement | None) -> dict[str, Any]:
    """Parameters whose codes are drawn, layer by layer, so that no weight ever exists in 16 bits."""
    import jax
    import jax.numpy as jnp

    from jaxmoe.nf4.codec import NF4_TABLE, dynamic_map
    from jaxmoe.parameters import NESTED_QUANT_MAP, Quantization, parameter_specs, quantizable, stored_specs

    quantization = Quantization(quantizable(config))
    specs = stored_specs(config, quantization)
    lie = _shardings(specs, placement)
    unchanged = {path: spec for path, spec in parameter_specs(config).items() if path in specs}
    keys = dict(zip(specs, jax.random.split(jax.random.key(0, impl="rbg"), len(specs)), strict=True))

    def random_bytes(path: str) -> Any:
        shape = specs[path].shape

        def draw(key: Any) -> Any:
            layers = jax.random.split(key, shape[0])
            return jax.lax.map(lambda key: jax.random.bits(key, shape[1:], jnp.uint8), layers)

        return jax.jit(draw, out_shardings=lie.get(path))(keys[path])

    def normal(path: str, std: float) -> Any:
        draw = lambda key: std * jax.random.normal(key, specs[path].shape, jnp.bfloat16)
        return jax.jit(draw, out_shardings=lie.get(path))(keys[path])

    params: dict[str, Any] = {}
    for path, spec in unchanged.items():
        ones = partial(jnp.ones, spec.shape, jnp.bfloat16, device=lie.get(path))
        params[path] = ones() if spec.init == "ones" else normal(path, 1.0 if path == "embed_tokens" else STD)
        if path in on_host:
            params[path] = np.asarray(params[path])
    for path in quantization.paths:
        std = STD / config.num_hidden_layers if path in RESIDUAL else STD
        absmax = std / float(np.sqrt(np.mean(NF4_TABLE**2)))  # of a block whose codes are equally frequent
        for name in (f"{path}.codes", f"{path}.absmax"):
            params[name] = random_bytes(name)
        for name, value in ((f"{path}.nested_absmax", absmax / 8), (f"{path}.nested_offset", absmax)):
            params[name] = jnp.full(specs[name].shape, value, jnp.float32, device=lie.get(name))
    params[NESTED_QUANT_MAP] = jax.device_put(dynamic_map(), lie.get(NESTED_QUANT_MAP))
    return params | _gates(config, lie, "bfloat16")


def _fp8_parameters(config: Qwen3MoeConfig) -> dict[str, Any]:
    """Parameters whose codes are drawn, layer by layer, so that no weight ever exists in 16 bits."""
    import jax
    import jax.numpy as jnp

    from jaxmoe.parameters import Quantization, parameter_specs, stored_specs

    quantization = Quantization.default(config, "fp8")
    specs = stored_specs(config, quantization)
    keys = dict(zip(specs, jax.random.split(jax.random.key(0, impl="rbg"), len(specs)), strict=True))
    spread = 100.0  # of the codes, of which the largest is 448

    @partial(jax.jit, static_argnums=1)
    def codes(key: Any, shape: tuple[int, ...]) -> Any:
        draw = lambda key: (spread * jax.random.normal(key, shape[1:], jnp.bfloat16)).astype(jnp.float8_e4m3fn)
        return jax.lax.map(draw, jax.random.split(key, shape[0]))

    params: dict[str, Any] = {}
    for path, spec in parameter_specs(config).items():
        std = 1.0 if path == "embed_tokens" else STD / config.num_hidden_layers if path in RESIDUAL else STD
        if path in quantization.paths:
            params[f"{path}.codes"] = codes(keys[f"{path}.codes"], specs[f"{path}.codes"].shape)
            params[f"{path}.scales"] = jnp.full(specs[f"{path}.scales"].shape, std / spread, jnp.float32)
            continue
        draw = jax.jit(lambda key, shape=spec.shape, std=std: std * jax.random.normal(key, shape, jnp.bfloat16))
        params[path] = jnp.ones(spec.shape, jnp.bfloat16) if spec.init == "ones" else draw(keys[path])
    return params | {"sparse.gate": jnp.asarray(routers(config), jnp.bfloat16)}


def torch_model(config: Qwen3MoeConfig, experts: str = "grouped_mm") -> Any:
    """Transformers' model in bfloat16 on the GPU (without one, on the CPU); only one copy is ever in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from peers.reference import hf_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf = hf_config(config.to_hf())
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            hf,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation=experts,
            trust_remote_code=False,
        )
    # to_empty loses the values of buffers (the rotary frequencies); they are made again below.
    model = model.to_empty(device=device)
    with torch.device(device), torch.no_grad():
        model.model.rotary_emb = type(model.model.rotary_emb)(hf)
        for name, parameter in model.named_parameters():
            residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
            std = STD / config.num_hidden_layers if residual else STD
            parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, std)
        model.model.embed_tokens.weight.normal_(0, 1)
        for slot, router in enumerate(routers(config)):
            layer = model.model.layers[config.sparse_layers[slot]]
            layer.mlp.gate.weight.copy_(torch.from_numpy(router))
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def quantize_linear_maps(model: Any) -> None:
    """Puts the linear maps of transformers' layers into NF4 with bitsandbytes; experts are no linear maps and stay."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit

    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if type(child) is not torch.nn.Linear:
                continue
            device, dtype = child.weight.device, child.weight.dtype
            quantized = Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
            quantized.load_state_dict(child.cpu().state_dict())
            setattr(module, name, quantized.to(device))


def torch_load(model: Any, config: Qwen3MoeConfig, ids: Any) -> float:
    """`load_ratio` of one forward pass of transformers' model."""
    import torch

    counts = []

    def count(module: Any, inputs: Any, outputs: Any) -> None:
        counts.append(torch.bincount(outputs[2].reshape(-1), minlength=config.num_experts).cpu().numpy())

    gates = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
    hooks = [gate.register_forward_hook(count) for gate in gates]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return load_ratio(np.stack(counts))
