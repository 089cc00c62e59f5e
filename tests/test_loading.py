"""Layers read by several threads and stacked on the device: the same values, bounded memory, the same errors."""

from __future__ import annotations

import pathlib
import threading
import time
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from convert.hf2jax import hf2jax, read_hf
from convert.jax2hf import jax2hf
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.nf4.recode import dequantized, quantized
from jaxmoe.parameters import Quantization, layer_paths, parameter_specs, top_level_paths
from jaxmoe.store.checkpoint import Block, Checkpoint, Layout
from jaxmoe.store.converted import read_converted
from jaxmoe.store.loading import load_stacks
from peers.configs import config_of
from peers.make_checkpoint import make_checkpoint
from tests.parts import check_parts


@pytest.mark.parametrize("form", ["per_expert", "fused", "converted", "float32", "nf4"])
def test_stacks_hold_the_blocks(form, tmp_path):
    config = config_of("mlp_only_layers")
    make_checkpoint(tmp_path / "hf", config, layout="fused" if form == "fused" else "per_expert", dtype="bfloat16")
    source: Checkpoint = read_hf(tmp_path / "hf", "float32" if form == "float32" else None)
    if form == "converted":
        hf2jax(tmp_path / "hf", tmp_path / "jax")
        source = read_converted(tmp_path / "jax")
    if form == "nf4":
        source = quantized(source)
    params = load_stacks(config, source)
    expected = list(source.blocks())
    assert len(expected) == config.num_hidden_layers + 1
    for block in expected:
        places = layer_paths(config, block.layer, source.quantization) if block.layer is not None else ()
        found = {path: params[path][slot] for path, slot in places} or {path: params[path] for path in block.arrays}
        assert found.keys() == block.arrays.keys()
        for path, array in block.arrays.items():
            assert found[path].dtype == array.dtype
            assert (np.asarray(found[path]).view(np.uint8) == np.ascontiguousarray(array).view(np.uint8)).all(), path


def opened(form: str, folder: pathlib.Path) -> Checkpoint:
    """A checkpoint of two sparse layers and a dense one, in one of the forms that can be read in parts."""
    config, hf, jax_folder = config_of("mlp_only_layers"), folder / "hf", folder / "jax"
    make_checkpoint(hf, config, layout="fused" if form == "fused" else "per_expert", dtype="bfloat16")
    if form.startswith("HF in NF4"):
        hf2jax(hf, jax_folder, quantize="nf4")
        jax2hf(jax_folder, folder / "nf4")
        return read_hf(folder / "nf4", dequantize=form.endswith("decoded"))
    if not form.startswith("converted"):
        source = read_hf(hf, "float32" if form == "cast" else None)
        return quantized(source) if form == "encoded on the way" else source
    hf2jax(hf, jax_folder, quantize="nf4" if "NF4" in form else None)
    source = read_converted(jax_folder, "float32" if form.endswith("cast") else None)
    if form.endswith("encoded"):
        return quantized(source)
    return dequantized(source) if form.endswith("decoded") else source


FORMS = "per expert/fused/cast/encoded on the way/HF in NF4/HF in NF4, decoded"
CONVERTED = "converted/converted, cast/converted, encoded/converted in NF4/converted in NF4, decoded"


@pytest.mark.parametrize("form", [*FORMS.split("/"), *CONVERTED.split("/")])
def test_parts_are_those_of_the_blocks(form: str, tmp_path: pathlib.Path) -> None:
    check_parts(opened(form, tmp_path))


class Watched:
    """A checkpoint of ones that counts its readers and the layers in memory."""

    quantization: Quantization | None = None
    layout: Layout = "fused"
    stored_tied_head = False

    def __init__(self, config: Qwen3MoeConfig, path, broken: int | None = None):
        self.path, self.config, self.broken = path, config, broken
        self.dtypes = {name: np.dtype(np.float32) for name in parameter_specs(config)}
        self.lock = threading.Lock()
        self.reading = self.alive = self.most_reading = self.most_alive = 0
        self.begun: list[int | None] = []

    def block(self, layer):
        with self.lock:
            self.begun.append(layer)
            self.reading += 1
            self.alive += 1
            self.most_reading, self.most_alive = max(self.most_reading, self.reading), max(self.most_alive, self.alive)
        time.sleep(0.02)
        if layer is not None and layer == self.broken:
            raise UserError(f"layer {layer}: expected more bytes, found fewer")
        specs = parameter_specs(self.config)
        if layer is None:
            arrays = {path: np.ones(specs[path].shape, np.float32) for path in top_level_paths(self.config)}
        else:
            paths = layer_paths(self.config, layer)
            arrays = {path: np.full(specs[path].shape[1:], layer, np.float32) for path, _ in paths}
        block = Block(layer, arrays)
        weakref.finalize(block, self._dropped)
        with self.lock:
            self.reading -= 1
        return block

    def _dropped(self):
        with self.lock:
            self.alive -= 1

    def blocks(self):
        raise AssertionError


def small(layers):
    return config_of("plain").replace(num_hidden_layers=layers)


def test_reads_ahead_and_holds_no_more_than_it_says(tmp_path):
    source = Watched(small(12), tmp_path)
    params = load_stacks(source.config, source, readers=3)
    assert source.most_reading > 1
    assert source.most_alive <= 4
    assert (params["attention.input_layernorm"] == jnp.arange(12.0)[:, None]).all()


def test_an_error_in_a_reader_is_the_caller_s(tmp_path):
    source = Watched(small(12), tmp_path, broken=2)
    with pytest.raises(UserError, match=r"^layer 2: expected more bytes, found fewer$"):
        load_stacks(source.config, source, readers=3)
    assert len(source.begun) < 12
