"""Captures record what the model did, in one format for both frameworks, whatever the batches."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from captures import ROLES, Capture, CaptureWriter, Chunk, LabelledText, Model, Text
from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.data.chat import ChatSettings, load_tokenizer
from jaxmoe.data.records import read_records
from jaxmoe.errors import UserError
from jaxmoe.routing.__main__ import main
from jaxmoe.routing.capture import capture, pack_in_order
from jaxmoe.routing.text import label, labelled_text, read_text
from tests.conftest import ROOT
from tests.tolerances import bound

CHECKPOINT = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"
LENGTH = 64
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


@pytest.fixture(scope="session")
def model() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")


def records(folder: pathlib.Path) -> list[pathlib.Path]:
    """A text of several contexts, short records of every kind, and a plain file."""
    lines = [
        {"text": "def add(a, b):\n    return a + b\n", "domain": "code"},
        {"prompt": "def square(x):", "completion": "\n    return x * x"},
        {"messages": [{"role": "user", "content": "def f(x)"}, {"role": "assistant", "content": "Return the value."}]},
        {"text": "The value of the expression is the object. " * 12, "domain": "prose"},
    ]
    jsonl, plain = folder / "mixed.jsonl", folder / "module.py"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain.write_text("import os\n\n\ndef main():\n    print(os.getcwd())\n")
    return [jsonl, plain]


@pytest.fixture(scope="session")
def text(tokenizer, shared_tmp) -> LabelledText:
    return read_text(records(shared_tmp), tokenizer, 2048, LENGTH)


@pytest.fixture(scope="module")
def captured(quick_compilation, model, text, shared_tmp) -> Capture:
    return capture(model, text, shared_tmp / "captured", batch_size=2)


def whole(found: Capture) -> Chunk:
    return found.read(0, found.tokens)


def losses(chunk: Chunk) -> np.ndarray:
    assert chunk.loss is not None
    return chunk.loss


def test_labels(text, tokenizer):
    assert text.domains == ("code", "mixed", "prose", "module")
    assert text.roles == ROLES
    stream = text.text
    # positions restart with each context, contexts fit into a sequence, documents are whole
    assert (stream.position < LENGTH).all() and (np.diff(stream.document) >= 0).all()
    starts = stream.position == 0
    assert (stream.position[1:][~starts[1:]] == stream.position[:-1][~starts[1:]] + 1).all()
    for number in range(5):
        mine = np.flatnonzero(stream.document == number)
        assert (stream.next[mine[:-1]] == stream.token[mine[1:]]).all() and stream.next[mine[-1]] == -1
    of_chat = stream.document == 2
    by_role = {name: tokenizer.decode(stream.token[of_chat & (stream.role == ROLES.index(name))]) for name in ROLES}
    assert by_role["user"] == "def f(x)"
    assert by_role["assistant"] == "Return the value.<|im_end|>"
    assert by_role["template"].startswith("<|im_start|>user\n")
    of_prompt = stream.document == 1
    roles = stream.role[of_prompt]
    assert tokenizer.decode(stream.token[of_prompt][roles == ROLES.index("prompt")]) == "def square(x):"
    assert set(roles) == {ROLES.index("prompt"), ROLES.index("completion")}


def test_a_system_message_has_its_role(tokenizer):
    raw = {"messages": [{"role": "user", "content": "def f(x)"}, {"role": "assistant", "content": "Return."}]}
    found = label(raw, tokenizer, "code", ChatSettings("Be brief."))
    assert tokenizer.decode(found.tokens[found.roles == ROLES.index("system")]) == "Be brief."
    assert tokenizer.decode(found.tokens[found.roles == ROLES.index("user")]) == "def f(x)"


def test_flags_of_the_template_need_conversations(tmp_path):
    for flags in (["--system", "s"], ["--no-thinking"], ["--template-arg", "a=1"]):
        command = ["capture", "--model", str(CHECKPOINT), "--text", "x", "--out", str(tmp_path / "out"), *flags]
        with pytest.raises(UserError, match="system, no-thinking and template-arg: only valid with data, found text"):
            main(command)


def test_tokens_are_those_of_training(text, tokenizer, tmp_path):
    path, _ = records(tmp_path)
    stripped = [json.loads(line) for line in path.read_text().splitlines()]
    for line in stripped:
        line.pop("domain", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in stripped))
    for number, record in enumerate(read_records(path, tokenizer, 2048)):
        assert np.array_equal(text.text.token[text.text.document == number], record.tokens)


def test_a_bad_domain_is_named_with_its_line(tokenizer, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "domain": 3}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: domain: expected a name, found 3"):
        read_text([path], tokenizer, 2048, LENGTH)


def test_sequences_keep_the_order_of_the_stream(text):
    seen = []
    for batch in pack_in_order(text, 2):
        assert batch.input_ids.shape == (2, LENGTH)
        assert np.array_equal(batch.input_ids.reshape(-1)[batch.valid], text.text.token[batch.part])
        assert np.array_equal(batch.next.reshape(-1)[batch.valid], text.text.next[batch.part])
        seen.append(batch.part)
    assert [part.start for part in seen[1:]] == [part.stop for part in seen[:-1]]
    assert seen[0].start == 0 and seen[-1].stop == len(text.text.token)


def test_a_capture_is_what_the_model_computed(model, text, captured):
    """Every number against the model's own call on each context alone."""
    chunk = whole(captured)
    k = model.config.num_experts_per_tok
    assert np.array_equal(chunk.text.token, text.text.token)
    contexts = text.text.contexts()
    ids, mask = (np.zeros((len(contexts), LENGTH), np.int32) for _ in range(2))
    for row, part in enumerate(contexts):
        ids[row, : part.stop - part.start], mask[row, : part.stop - part.start] = text.text.token[part], 1
    out = model(ids, attention_mask=mask, output_router_logits=True)
    # In float64: a float32 sum of exponentials over the vocabulary is off by up to 1e-4.
    router_logits, all_logits = np.stack(out.router_logits), np.asarray(out.logits, np.float64)
    for row, part in enumerate(contexts):
        n = part.stop - part.start
        logits = router_logits[:, row, :n]
        order = np.argsort(-logits, axis=-1, kind="stable")
        top = np.take_along_axis(logits, order, axis=-1)
        assert np.allclose(chunk.top_logits[:, part], top[..., :16], rtol=0, atol=bound("capture_logits_fp32"))
        assert np.allclose(
            chunk.log_sum_exp[:, part], np.logaddexp.reduce(logits, axis=-1), rtol=0, atol=bound("capture_logits_fp32")
        )
        p = np.exp(logits - np.logaddexp.reduce(logits, axis=-1)[..., None])
        assert np.allclose(chunk.entropy[:, part], -(p * np.log(p)).sum(-1), rtol=0, atol=bound("capture_logits_fp32"))
        clear = top[..., k - 1] - top[..., k] > bound("capture_logit_margin")
        same = np.sort(chunk.experts[:, part], -1) == np.sort(order[..., :k], -1)
        assert clear.mean() > 0.95 and same.all(-1)[clear].all()
        chosen = np.take_along_axis(p, chunk.experts[:, part].astype(int), -1)
        assert np.allclose(
            chunk.weights[:, part], chosen / chosen.sum(-1, keepdims=True), rtol=0, atol=bound("capture_weights_fp32")
        )
        ordered = np.sort(p, -1)
        assert np.allclose(
            chunk.margin[:, part], ordered[..., -k] - ordered[..., -k - 1], rtol=0, atol=bound("capture_weights_fp32")
        )
        log_p = all_logits[row, :n] - np.logaddexp.reduce(all_logits[row, :n], axis=-1)[:, None]
        following = chunk.text.next[part]
        known = following >= 0
        assert np.allclose(
            losses(chunk)[part][known], -log_p[known, following[known]], rtol=0, atol=bound("capture_loss_fp32")
        )
        assert np.isnan(losses(chunk)[part][~known]).all()
        assert chunk.predicted is not None and (chunk.predicted[part] == log_p.argmax(-1)).mean() > 0.95
    sums = np.zeros_like(captured.probability_sums())
    for layer, (experts, p) in enumerate(zip(chunk.top_experts, chunk.probabilities, strict=True)):
        np.add.at(sums[layer], experts, p)
    # the sums also include experts after the top 16
    assert (sums - captured.probability_sums()).max() / captured.tokens <= bound("capture_sums_fp32")
    assert captured.probability_sums().sum(-1) == pytest.approx([captured.tokens] * 6, rel=bound("capture_sums_fp32"))


def test_all_logits_on_request_and_other_batches(model, text, captured, tmp_path):
    full = capture(model, text, tmp_path / "full", batch_size=3, keep_logits=99, predictions=False)
    assert full.keep_logits == 32 and full.shards != captured.shards and not full.predictions
    assert full.text["digest"] == captured.text["digest"]
    for a, b in zip(full.chunks(50), captured.chunks(50), strict=True):
        assert len(a) == len(b) <= 50
        assert np.allclose(a.top_logits[..., :16], b.top_logits, rtol=0, atol=bound("capture_logits_fp32"))
        assert np.allclose(a.dense_probabilities().sum(-1), 1, rtol=0, atol=bound("capture_weights_fp32"))
    with pytest.raises(ValueError, match="expected all 32 of each token, found the top 16"):
        next(captured.chunks()).dense_probabilities()
    three = captured.read(10, 90, slice(2, 4))
    assert three.experts.shape == (2, 80, 8)
    assert np.array_equal(three.experts, whole(captured).experts[2:4, 10:90])


def test_too_few_logits_for_the_margin_are_refused(model, text, tmp_path):
    with pytest.raises(UserError, match="top: expected at least 9 logits per token"):
        capture(model, text, tmp_path / "few", keep_logits=8)
    assert not list(tmp_path.iterdir())


def test_dense_layers_are_left_out(tmp_path):
    from peers.configs import config_of, random_parameters, random_tokens

    config = config_of("mlp_only_layers")
    mixed = Qwen3MoeForCausalLM(config, {path: jnp.asarray(a) for path, a in random_parameters(config).items()})
    ids = random_tokens(config, 1, 20)[0]
    zero = np.zeros(20, np.int32)
    stream = Text(ids, zero, np.arange(20, dtype=np.int32), zero, zero, np.append(ids[1:], -1).astype(np.int32))
    found = capture(mixed, LabelledText(stream, ("x",), ("text",), 20, "none"), tmp_path / "c", batch_size=1)
    assert found.model.layers == tuple(config.sparse_layers) != tuple(range(config.num_hidden_layers))
    out = mixed(ids[None], output_router_logits=True)
    assert out.router_logits is not None
    logits = np.stack(out.router_logits)[:, 0]
    top = np.sort(logits, -1)[..., ::-1][..., : found.keep_logits]
    assert np.allclose(whole(found).top_logits, top, rtol=0, atol=bound("capture_tiny_logits_fp32"))


def test_pytorch_writes_the_same_format_and_the_same_routing(captured, tmp_path, capsys):
    from torch_ref import FastQwen3MoeModel
    from torch_ref.capture import main

    command = ["--model", str(CHECKPOINT), "--text", str(captured.folder), "--out", str(tmp_path / "torch")]
    try:
        main([*command, "--dtype", "float32"])
    finally:
        FastQwen3MoeModel.unpatch()
    other = Capture.open(tmp_path / "torch")
    assert other.model == captured.model and other.source["framework"] == "torch_ref"
    assert other.text["digest"] == captured.text["digest"]
    a, b = whole(captured), whole(other)
    assert np.abs(a.top_logits - b.top_logits).max() <= bound("capture_torch_fp32")
    assert np.abs(a.entropy - b.entropy).max() <= bound("capture_torch_fp32")
    assert np.nanmax(np.abs(losses(a) - losses(b))) <= bound("capture_torch_fp32")
    clear = a.margin > bound("routing_margin")
    assert (np.sort(a.experts, -1) == np.sort(b.experts, -1)).all(-1)[clear].all()
    assert np.abs(a.weights.sum(-1) - b.weights.sum(-1)).max() <= bound("capture_weights_fp32")
    assert captured.probability_sums() == pytest.approx(other.probability_sums(), rel=bound("capture_torch_sums"))


def test_pytorch_refuses_what_is_no_capture_in_one_line(tmp_path):
    from torch_ref.capture import main

    with pytest.raises(UserError, match=r"expected a capture \(a folder with manifest.json\), found none"):
        main(["--model", str(CHECKPOINT), "--text", str(tmp_path / "none"), "--out", str(tmp_path / "x")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "a/b"}}, "peft_type: expected 'LORA', found 'XLORA'"),
        ({"peft_type": "LORA", "megatron_config": {}, "megatron_core": "evil"}, "megatron_config: expected none"),
        ({"peft_type": "LORA"}, "expected adapter_model.safetensors, found a pickle"),
    ],
)
def test_pytorch_refuses_adapters_that_run_code(captured, tmp_path, settings, wrong):
    from torch_ref.capture import main

    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    command = ["--model", str(CHECKPOINT), "--text", str(captured.folder), "--out", str(tmp_path / "x")]
    with pytest.raises(UserError, match=wrong):
        main([*command, "--adapter", str(tmp_path)])


def test_pytorch_refuses_a_model_that_it_cannot_load(captured, tmp_path, request):
    from torch_ref import FastQwen3MoeModel
    from torch_ref.capture import main

    request.addfinalizer(FastQwen3MoeModel.unpatch)
    (tmp_path / "model").mkdir()
    command = ["--model", str(tmp_path / "model"), "--text", str(captured.folder), "--out", str(tmp_path / "x")]
    for config, wrong in (
        ({"model_type": "qwen3_moe", "num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 10,000"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "cannot be loaded"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=wrong):
            main(command)


# ---- the folder


TINY = Model((0, 1), 8, 2, True, 50)


def tiny_labels(n: int) -> LabelledText:
    zero = np.zeros(n, np.int32)
    stream = Text(np.arange(n, dtype=np.int32), zero, np.arange(n, dtype=np.int32), zero, zero, zero)
    return LabelledText(stream, ("d",), ("text",), n, "t")


def tiny_arrays(n: int) -> dict[str, np.ndarray]:
    logits = np.sort(np.random.default_rng(0).normal(size=(2, n, 8)).astype(np.float32), axis=-1)[..., ::-1]
    order = np.tile(np.arange(8, dtype=np.uint8), (2, n, 1))
    total = np.logaddexp.reduce(logits, axis=-1).astype(np.float32)
    return {
        "experts": order[..., :2],
        "top_experts": order,
        "top_logits": logits,
        "log_sum_exp": total,
        "entropy": total,
        "probability_sums": np.exp(logits - total[..., None]).sum(1),
    }


def write_tiny(folder: pathlib.Path, n: int = 5) -> Capture:
    labels = tiny_labels(n)
    with CaptureWriter(folder, TINY, labels=labels, source={}) as writer:
        writer.put(labels.text, tiny_arrays(n))
    return Capture.open(folder)


def test_nothing_appears_when_the_writer_fails(tmp_path):
    labels = tiny_labels(5)

    def write(arrays: dict[str, np.ndarray], times: int, error: BaseException | None = None) -> None:
        with CaptureWriter(tmp_path / "c", TINY, labels=labels, source={}) as writer:
            for _ in range(times):
                writer.put(labels.text, arrays)
            if error is not None:
                raise error

    wrong = tiny_arrays(5) | {"top_logits": tiny_arrays(4)["top_logits"]}
    for times in (1, 8):  # more than the queue holds: a thread that has ended must not block the caller
        with pytest.raises(ValueError, match=r"top_logits: expected float32 \[2, 5, 8\], found float32 \[2, 4, 8\]"):
            write(wrong, times)
    with pytest.raises(UserError, match="model: layer 1: expected finite router logits, found NaN or infinity"):
        write(tiny_arrays(5) | {"log_sum_exp": np.asarray([[0] * 5, [0, 0, np.nan, 0, 0]], np.float32)}, 1)
    with pytest.raises(KeyboardInterrupt):
        write(tiny_arrays(5), 1, KeyboardInterrupt())
    assert not list(tmp_path.iterdir())
    assert write_tiny(tmp_path / "c").tokens == 5


def test_padding_is_left_out_of_a_shard(tmp_path):
    labels, arrays = tiny_labels(3), tiny_arrays(5)
    valid = np.array([True, False, True, True, False])
    with CaptureWriter(tmp_path / "c", TINY, labels=labels, source={}) as writer:
        writer.put(labels.text, arrays, valid)
    assert np.array_equal(whole(Capture.open(tmp_path / "c")).top_logits, arrays["top_logits"][:, valid])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"version": 2}, "expected jaxmoe-capture 1, found jaxmoe-capture 2"),
        (lambda m: {k: v for k, v in m.items() if k != "shards"}, "found a broken one .no 'shards'"),
        (
            lambda m: m | {"shards": [{"file": "../x.safetensors", "tokens": 5}]},
            "shards: expected files in the same folder, found a path",
        ),
        (
            lambda m: m | {"shards": [{"file": "\ud800", "tokens": 5}]},
            "shards: expected files in the same folder, found a path",
        ),
        (lambda m: m | {"shards": [{"file": "x.safetensors", "tokens": 4}]}, "expected 5 tokens, found 4 in 1 shards"),
        (lambda m: m | {"model": {"layers": [0]}}, "expected the manifest of a capture"),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path, change, message):
    write_tiny(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        Capture.open(tmp_path / "c")


def test_a_missing_or_broken_shard_is_named(tmp_path):
    found = write_tiny(tmp_path / "c")
    shard = found.folder / found.shards[0][0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"routing-00000\.safetensors: expected a safetensors file"):
        whole(found)
    shard.unlink()
    with pytest.raises(UserError, match=r"file not found: .*routing-00000\.safetensors"):
        whole(found)
    shutil.copy(write_tiny(tmp_path / "other", 4).folder / shard.name, shard)
    with pytest.raises(UserError, match=r"expected shape \[.*5.*\], found \[.*4.*\]"):
        whole(found)


def test_documents_that_share_a_sequence_do_not_see_each_other(model, tokenizer, tmp_path):
    one, two = (label({"text": t}, tokenizer, "x") for t in ("import os\n", "The end of a sentence."))
    both = capture(model, labelled_text([one, two], LENGTH, "t"), tmp_path / "both", batch_size=1)
    alone = capture(model, labelled_text([two], LENGTH, "t"), tmp_path / "alone", batch_size=1)
    n = len(two.tokens)
    assert np.allclose(
        both.read(both.tokens - n, both.tokens).top_logits,
        whole(alone).top_logits,
        rtol=0,
        atol=bound("capture_logits_fp32"),
    )
