"""Which stacks of an HF checkpoint are quantised, and which layers of them are not: the same for every form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from convert.names import Row, rows
from convert.safetensors_io import Tensor
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.parameters import Quantization, quantizable

Left = tuple[tuple[str, tuple[int, ...]], ...]


def quantized_stacks(
    where: str,
    config: Qwen3MoeConfig,
    tensors: Mapping[str, Tensor],
    blocks: Mapping[int | None, Sequence[Row]],
    form_of: Callable[[str], str | None],
) -> tuple[tuple[str, ...], Left]:
    """(the parameters that are quantised, those of them with unquantised layers, and these as indices in the stack).

    `form_of` returns the form of the weight with a key, or None for a plain one.

    Raises:
        UserError: a layer has experts of both kinds.
    """
    candidates = quantizable(config, router=True)
    kinds: dict[str, dict[int, bool]] = {}  # path -> layer -> whether it is quantised
    for layer, block in blocks.items():
        if layer is None:
            continue
        first: dict[str, Row] = {}
        for row in block:
            found = form_of(row.key) is not None
            if row.path not in candidates or not (found or row.key in tensors):  # what is missing is reported later
                continue
            one = first.setdefault(row.path, row)
            if kinds.setdefault(row.path, {}).setdefault(layer, found) != found:
                shown = [form_of(key) or tensors[key].code for key in (one.key, row.key)]
                raise UserError(
                    f"{where}: {row.key}: expected {shown[0]} as in {one.key}, found {shown[1]} (in one layer, "
                    f"{_together(row)} of all experts must have one form; --dequantize, or dequantize=True, decodes "
                    "all weights)"
                )
    marked = {path: layers for path, layers in kinds.items() if any(layers.values())}
    slots = {path: tuple(i for i, found in enumerate(layers.values()) if not found) for path, layers in marked.items()}
    return tuple(sorted(marked)), tuple(sorted((path, left) for path, left in slots.items() if left))


def _together(row: Row) -> str:
    """The projections that share an array with the tensor of `row`."""
    return "gate_proj and up_proj" if row.path == "sparse.gate_up_proj" else "down_proj"


def unquantized_layers(config: Qwen3MoeConfig, quantization: Quantization) -> dict[str, list[int]]:
    """Path -> the decoder layers of a mixed stack that are not quantised."""
    kinds = {"attention": range(config.num_hidden_layers), "sparse": config.sparse_layers, "dense": config.dense_layers}
    return {path: [kinds[path.split(".")[0]][slot] for slot in left] for path, left in quantization.unquantized}


def skipped_modules(config: Qwen3MoeConfig, quantization: Quantization) -> list[str]:
    """The modules that transformers must not quantise: head, routers, and layers of mixed stacks."""
    left = unquantized_layers(config, quantization)
    if "sparse.gate" not in quantization.paths:
        left["sparse.gate"] = list(config.sparse_layers)
    keys = (
        row.key.removesuffix(".weight")
        for layer in range(config.num_hidden_layers)
        for row in rows(config, layer, "per_expert")
        if layer in left.get(row.path, ())
    )
    return ["lm_head", *keys]
