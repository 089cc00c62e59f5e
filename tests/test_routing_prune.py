"""Pruning: saliency against a plain loop, and a pruned model that transformers loads with the same logits."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from captures import LabelledText, Text
from convert.pruned import write_pruned
from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.model.opening import open_checkpoint
from jaxmoe.routing import pruning
from jaxmoe.routing.__main__ import main
from peers.configs import config_of, random_parameters, random_tokens
from peers.make_checkpoint import make_checkpoint
from tests import oracle
from tests.parity import COMPILER_OPTIONS, relative_error
from tests.tolerances import bound

LENGTH = 24
# Two dense layers and two with 8 experts, of which a token uses 2. All tests share one compiled step.
MIXED = config_of("mlp_only_layers").replace(vocab_size=259, dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def quick_step() -> Iterator[None]:
    import jax

    with pytest.MonkeyPatch.context() as patch:
        plain: Any = pruning._step
        step = jax.jit(plain.__wrapped__, static_argnames=("config", "options"), compiler_options=COMPILER_OPTIONS)
        patch.setattr(pruning, "_step", step)
        yield


def labels_of(config: Qwen3MoeConfig) -> LabelledText:
    """Three contexts that leave padding in a batch of two sequences."""
    ids = random_tokens(config, 3, LENGTH)
    contexts = [ids[0], ids[1, :10], ids[2, :13]]
    parts = []
    for number, tokens in enumerate(contexts):
        n, zero = len(tokens), np.zeros(len(tokens), np.int32)
        following = np.append(tokens[1:], -1).astype(np.int32)
        parts.append(Text(tokens, zero + number, np.arange(n, dtype=np.int32), zero, zero, following))
    return LabelledText(Text(*map(np.concatenate, zip(*parts, strict=True))), ("d",), ("text",), LENGTH, "digest")


def plain_loop(config: Qwen3MoeConfig, params: dict[str, np.ndarray], labels: LabelledText) -> pruning.Saliency:
    """The sums in float64, token by token: the model's own output, and that of a layer that lacks one expert."""
    E, k, F = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    counts = np.zeros((len(config.sparse_layers), E), np.int64)
    norms, changes = np.zeros(counts.shape), np.zeros(counts.shape)
    plain = oracle.experts

    def layer_output(weights, slot: int, h, logits, left: list[int]):
        """The mixture of a layer that has the experts `left` only."""
        p = oracle.softmax(logits[left])
        chosen = np.argsort(-p, kind="stable")[:k]
        w = p[chosen] / p[chosen].sum() if config.norm_topk_prob else p[chosen]
        outputs = []
        for e in np.asarray(left)[chosen]:
            gate_up, down = weights["sparse.gate_up_proj"][slot, e], weights["sparse.down_proj"][slot, e]
            outputs.append(oracle.swiglu(h, gate_up[:F], gate_up[F:], down))
        return w, outputs, sum(a * y for a, y in zip(w, outputs, strict=True))

    def watched(config, weights, slot, h, probabilities, chosen):
        for t in range(len(h)):
            logits = h[t] @ weights["sparse.gate"][slot].T
            w, outputs, whole = layer_output(weights, slot, h[t], logits, [*range(E)])
            for e, weight, y in zip(chosen[t], w, outputs, strict=True):
                counts[slot, e] += 1
                norms[slot, e] += weight * np.linalg.norm(y)
                without = layer_output(weights, slot, h[t], logits, [other for other in range(E) if other != e])[2]
                changes[slot, e] += np.linalg.norm(without - whole)
        return plain(config, weights, slot, h, probabilities, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "experts", watched)
        for context in labels.text.contexts():
            oracle.forward(config, params, labels.text.token[context][None])
    return pruning.Saliency(len(labels.text.token), counts, norms, changes)


@pytest.mark.parametrize("normalised", [True, False])
def test_saliency_is_that_of_a_plain_loop(normalised):
    config = MIXED.replace(norm_topk_prob=normalised)
    params, labels = random_parameters(config), labels_of(config)
    model = Qwen3MoeForCausalLM(config, {path: jnp.asarray(a) for path, a in params.items()})
    found = pruning.measure(model, labels, batch_size=2)
    expected = plain_loop(config, params, labels)
    assert np.array_equal(found.counts, expected.counts) and found.tokens == expected.tokens == 47
    for method in pruning.METHODS:
        error = relative_error(found.scores(method), expected.scores(method))
        assert error <= bound("saliency_fp32"), (method, error)
    # The three methods are different orders, and an expert that nobody uses has no saliency.
    orders = {tuple(np.argsort(-expected.scores(method), axis=1).ravel()) for method in pruning.METHODS}
    assert len(orders) == 3
    unused = expected.counts == 0
    assert all((found.scores(method)[unused] == 0).all() for method in pruning.METHODS)
    gate = model.params["sparse.gate"].at[1, 0, 0].set(jnp.nan)
    model = Qwen3MoeForCausalLM(config, model.params | {"sparse.gate": gate})
    with pytest.raises(UserError, match="model: layer 3: expected finite outputs of the experts, found NaN"):
        pruning.measure(model, labels, batch_size=2)


def test_ties_stay_in_favour_of_the_lower_index():
    scores = np.zeros((2, 8))
    scores[1, 5] = 1
    assert pruning.kept_experts(MIXED, scores, 3) == {1: (0, 1, 2), 3: (0, 1, 5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A model of both kinds of layers, whose config.json says num_local_experts and another name of it, and a text."""
    here = tmp_path_factory.mktemp("prune")
    make_checkpoint(here / "model", MIXED, layout="fused")
    raw = json.loads((here / "model" / "config.json").read_text())
    raw["num_local_experts"] = raw.pop("num_experts", raw.get("num_local_experts"))
    (here / "model" / "config.json").write_text(json.dumps(raw | {"a_field_of_others": 1, "n_routed_experts": 8}))
    (here / "text.txt").write_text("def add(a, b):\n    return a + b\n\n" * 4)
    command = ["prune", "--model", here / "model", "--data", here / "text.txt", "--seq-length", LENGTH]
    main([*map(str, [*command, "--keep", 5, "--batch-size", 2, "--out", here / "pruned", "--table", here / "t.csv"])])
    return here


def test_transformers_loads_the_pruned_model_with_the_same_logits(folder):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    ids = random_tokens(MIXED, 2, LENGTH)
    pruned = Qwen3MoeForCausalLM.from_pretrained(folder / "pruned")
    assert pruned.config.num_experts == 5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "pruned", trust_remote_code=False, use_safetensors=True
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    assert relative_error(np.asarray(pruned(ids).logits), expected) <= bound("parity_fp32")
    # A router whose rows are in another order than its experts gives other logits.
    with torch.no_grad():
        gate = theirs.model.layers[1].mlp.gate.weight
        gate.copy_(gate.flip(0))
        wrong = theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    assert relative_error(wrong, expected) > 1e-2


def record(folder: pathlib.Path) -> dict:
    return json.loads((folder / "pruned" / "pruning.json").read_text())


def test_what_stays_keeps_its_bytes_and_is_recorded(folder):
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "pruned"))
    about, config = record(folder), json.loads((folder / "pruned" / "config.json").read_text())
    assert config == json.loads((folder / "model" / "config.json").read_text()) | {
        "num_local_experts": 5,
        "n_routed_experts": 5,
    }
    assert before.keys() == after.keys()
    for name, array in after.items():
        parts = name.split(".")
        experts = about["experts"].get(parts[2]) if "layers" in name else None
        with_experts = experts is not None and ("mlp.experts" in name or "mlp.gate.weight" in name)
        expected = before[name][experts] if with_experts else before[name]
        assert array.tobytes() == expected.tobytes(), name
    assert about["method"] == "reap" and about["text"]["tokens"] == 133 and len(about["text"]["digest"]) == 64
    card = (folder / "pruned" / "README.md").read_text()
    assert "model with 5 of 8 experts" in card and str(folder) not in card
    lines = (folder / "t.csv").read_text().splitlines()
    assert lines[0] == "layer,expert,reap,frequency,effect,kept" and len(lines) == 1 + 2 * 8
    assert sum(int(line.split(",")[-1]) for line in lines[1:]) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--keep", "1"], r"keep: expected 2 \(num_experts_per_tok, .*\) to 7, found 1"),
        (["--keep", "8"], "keep: expected 2 .* to 7, found 8"),
        (["--out", "model"], "expected a new or empty folder"),
        (["--data", "none.txt"], "none.txt"),
        (["--table", "model"], "model: expected a file to write, found a folder"),
    ],
)
def test_refusals_leave_nothing(folder, changes, message, monkeypatch):
    paths = {"--model": "model", "--data": "text.txt", "--out": "other", "--keep": "5"} | dict([changes])
    command = ["prune", *(text for flag, value in paths.items() for text in (flag, value))]
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        main(command)
    assert not (folder / "other").exists()


def test_layers_of_different_sizes_and_nf4_are_refused(folder, tmp_path):
    source = open_checkpoint(folder / "model")[1]
    with pytest.raises(UserError, match="the same number in each of the MoE layers 1, 3, found 2 in 1, 3 in 3"):
        write_pruned(tmp_path / "out", source, {1: [0, 1], 3: [0, 1, 2]}, {})
    in_nf4 = open_checkpoint(folder / "model", quantize="nf4")[1]
    with pytest.raises(UserError, match="found NF4"):
        write_pruned(tmp_path / "out", in_nf4, {1: [0, 1], 3: [0, 1]}, {})
    assert not (tmp_path / "out").exists()
