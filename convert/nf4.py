"""Finds, reads and writes the NF4 weights of an HF checkpoint, which are stored as bitsandbytes does.

`X.weight` holds the codes as uint8 [bytes, 1]. `X.weight.absmax`, `X.weight.quant_map` (the table) and
`X.weight.quant_state.bitsandbytes__nf4` (JSON text as uint8) accompany it, and with double quantisation also
`X.weight.nested_absmax` and `X.weight.nested_quant_map`. Fused experts have no such form: transformers 5 leaves them in
16 bits; transformers 4 and this package store each expert's matrices separately. Source:
`QuantState.as_dict(packed=True)` of bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convert.mixed import quantized_stacks, skipped_modules
from convert.names import Row
from convert.safetensors_io import Tensor
from jaxmoe.config import DTYPES, Qwen3MoeConfig
from jaxmoe.errors import UserError, shown
from jaxmoe.json_text import parse_json
from jaxmoe.nf4.codec import NF4, NF4_TABLE
from jaxmoe.parameters import NF4_BLOCK, NF4_NESTED_BLOCK, Quantization

_STATE = ".quant_state.bitsandbytes__"
_PLAIN = (".absmax", ".quant_map", f"{_STATE}nf4")
_NESTED = (*_PLAIN, ".nested_absmax", ".nested_quant_map")


def find_quantization(
    where: str, config: Qwen3MoeConfig, tensors: Mapping[str, Tensor], blocks: Mapping[int | None, Sequence[Row]]
) -> Quantization:
    """The parameters of an HF checkpoint in NF4, and the layers of them that are not.

    Raises:
        UserError: no tensor is in NF4, or a layer has experts of both kinds.
    """
    form_of = lambda key: "NF4" if in_nf4(key, tensors) else None
    paths, left = quantized_stacks(where, config, tensors, blocks, form_of)
    if not paths:
        raise UserError(
            f"{where}: quantization_config: expected tensors in NF4, found none; if they were decoded, remove "
            "quantization_config from config.json"
        )
    return Quantization(paths, any(key.endswith(_NESTED[-2:]) for key in tensors), left)


def in_nf4(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the weight `key` is in NF4: its codes or a tensor that accompanies them are there."""
    codes = tensors.get(key)
    return (codes is not None and codes.code == "U8") or any(f"{key}{suffix}" in tensors for suffix in _NESTED)


def settings_of(config: Qwen3MoeConfig, quantization: Quantization, dtype: str) -> dict[str, Any]:
    """The quantization_config that transformers writes for a model in NF4 that computes in `dtype`, a dtype's name."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": quantization.nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped_modules(config, quantization),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def companions(key: str, nested: bool) -> list[str]:
    """The keys of the tensors that accompany a weight in NF4."""
    return [f"{key}{suffix}" for suffix in (_NESTED if nested else _PLAIN)]


def read_matrix(row: Row, tensors: Mapping[str, Tensor], nested: bool) -> tuple[NF4, str, np.ndarray | None]:
    """(arrays of the weight, its dtype before quantisation, nested_quant_map); the arrays are views of the file.

    Raises:
        UserError: an array of another shape or dtype, another table, or another quantisation state.
    """
    elements = math.prod(row.shape)
    blocks = -(-elements // NF4_BLOCK)
    outer = -(-blocks // NF4_NESTED_BLOCK)

    def read(suffix: str, code: str, shape: tuple[int, ...]) -> np.ndarray:
        return tensors[f"{row.key}{suffix}"].read_as(code, shape)

    table = read(".quant_map", "F32", (16,))
    if not np.array_equal(table, NF4_TABLE):
        raise UserError(f"{tensors[f'{row.key}.quant_map'].where}: expected the table of NF4, found another")
    state = _read_state(tensors[f"{row.key}{_STATE}nf4"], row, nested)
    codes = read("", "U8", (-(-elements // 2), 1)).reshape(-1)
    if not nested:
        return NF4(codes, read(".absmax", "F32", (blocks,))), state["dtype"], None
    nested_map = read(".nested_quant_map", "F32", (256,))
    if not (np.all(np.diff(nested_map) > 0) and np.abs(nested_map).max() <= 1):
        raise UserError(
            f"{tensors[f'{row.key}.nested_quant_map'].where}: expected 256 rising values from -1 to 1, found others"
        )
    packed = NF4(
        codes,
        read(".absmax", "U8", (blocks,)),
        read(".nested_absmax", "F32", (outer,)),
        np.asarray(state["nested_offset"], np.float32),
    )
    return packed, state["dtype"], nested_map


def _read_state(tensor: Tensor, row: Row, nested: bool) -> dict[str, Any]:
    state = parse_json(tensor.read_as("U8", (tensor.data.size,)).tobytes(), tensor.where)
    wanted: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": None, "shape": list(row.shape)}
    if nested:
        wanted |= {"nested_blocksize": NF4_NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": None}
    if not isinstance(state, dict) or set(state) != set(wanted):
        raise UserError(f"{tensor.where}: expected {', '.join(wanted)}, found {shown(state)}")
    for name, value in wanted.items():
        if value is not None and state[name] != value:
            raise UserError(f"{tensor.where}: {name}: expected {value}, found {shown(state[name])}")
    if not isinstance(state["dtype"], str) or state["dtype"] not in DTYPES:
        raise UserError(f"{tensor.where}: dtype: expected one of {', '.join(DTYPES)}, found {shown(state['dtype'])}")
    if nested and not (isinstance(state["nested_offset"], float) and math.isfinite(state["nested_offset"])):
        raise UserError(f"{tensor.where}: nested_offset: expected a number, found {shown(state['nested_offset'])}")
    return state


def matrix_tensors(
    row: Row, packed: NF4, dtype: np.dtype, nested_quant_map: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The HF tensors of one matrix: the inverse of `read_matrix`, byte for byte as bitsandbytes writes them."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": dtype.name, "shape": row.shape}
    yield row.key, packed.codes[:, None]
    yield f"{row.key}.absmax", packed.absmax
    yield f"{row.key}.quant_map", NF4_TABLE
    if packed.nested_absmax is not None:
        assert packed.nested_offset is not None and nested_quant_map is not None
        yield f"{row.key}.nested_absmax", packed.nested_absmax
        yield f"{row.key}.nested_quant_map", nested_quant_map
        state |= {"nested_blocksize": NF4_NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(packed.nested_offset)
    yield f"{row.key}{_STATE}nf4", np.frombuffer(json.dumps(state).encode(), np.uint8)
