"""Routed experts of inference servers: every form gives the same capture, and what does not fit is refused."""

from __future__ import annotations

import base64
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from captures import Capture, CaptureWriter, LabelledText, tokenizer_digest
from jaxmoe.control.provenance import model_of
from jaxmoe.control.replay import Replay
from jaxmoe.data.packing import Document, Sequences
from jaxmoe.errors import UserError
from jaxmoe.routing.compare import compare
from jaxmoe.routing.imported import Response, import_experts, read_responses
from jaxmoe.routing.summary import summarise
from peers.configs import config_of
from tests.test_routing_interventions import Letters, stream_of

CONFIG = config_of("mlp_only_layers")  # 4 layers, of which 1 and 3 have 8 experts; a token uses 2
LAYERS, SPARSE, E, K = 4, [1, 3], 8, 2
LENGTHS = ((3, 5), (1, 2), (6, 4))  # tokens of prompt and answer


def sequences() -> list[tuple[list[int], list[int], np.ndarray]]:
    """(prompt, answer, experts [n - 1, all layers, k]) of each sequence; a dense layer has zeros and ones."""
    rng = np.random.default_rng(0)
    found = []
    for p, a in LENGTHS:
        ids = rng.integers(2, 97, p + a).tolist()
        experts = np.argsort(rng.random((p + a - 1, LAYERS, E)), axis=-1)[..., :K]
        experts[:, [0, 2]] = [0, 1]
        found.append((ids[:p], ids[p:], experts))
    return found


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array.astype(np.uint8))
    return base64.b64encode(file.getvalue()).decode()


def raw(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def logprobs(ids: list[int]) -> list[list[Any]]:
    return [[None if i == 0 else -0.5, token, None] for i, token in enumerate(ids)]


FORMS = {
    "vllm, offline": lambda p, a, e: {"prompt_token_ids": p, "token_ids": a, "routed_experts": e[:, SPARSE].tolist()},
    "vllm, completions": lambda p, a, e: {
        "choices": [{"index": 0, "prompt_token_ids": p, "token_ids": a, "routed_experts": npy(e)}],
        "usage": {"prompt_tokens": len(p)},
    },
    "vllm, chat": lambda p, a, e: {
        "prompt_token_ids": p,
        "choices": [{"message": {"content": "x"}, "token_ids": a, "routed_experts": npy(e[:, SPARSE])}],
    },
    "vllm, the prompt apart": lambda p, a, e: {
        "prompt_token_ids": p,
        "prompt_routed_experts": e[: len(p)].tolist(),
        "choices": [{"token_ids": a, "routed_experts": e[len(p) :].tolist(), "prompt_token_ids": None}],
    },
    "sglang": lambda p, a, e: {"input_ids": p, "output_ids": a, "meta_info": {"routed_experts": raw(e), "id": "x"}},
    "sglang, layers with experts": lambda p, a, e: {
        "input_ids": p,
        "output_ids": a,
        "meta_info": {"routed_experts": raw(e[:, SPARSE])},
    },
    "sglang, logprobs": lambda p, a, e: {
        "output_ids": a,
        "meta_info": {
            "routed_experts": raw(np.concatenate([e, e[-1:]])),  # some versions pad the last token
            "input_token_logprobs": logprobs(p),
            "output_token_logprobs": logprobs(a),
        },
    },
}


def written(folder: pathlib.Path, form: str) -> pathlib.Path:
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(FORMS[form](*each)) + "\n" for each in sequences()))
    return path


def imported(folder: pathlib.Path, form: str, text: LabelledText | None = None) -> Capture:
    return import_experts(written(folder, form), folder / "capture", CONFIG, tokenizer_digest(Letters()), text)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_capture(form, tmp_path):
    found = imported(tmp_path, form)
    text, experts = found.read_text(), found.read_experts()
    at = 0
    for number, (prompt, answer, expected) in enumerate(sequences()):
        n = len(prompt) + len(answer) - 1
        part = slice(at, at + n)
        assert text.token[part].tolist() == [*prompt, *answer][:-1]
        assert text.next[part].tolist() == [*prompt, *answer][1:]
        assert (text.document[part] == number).all() and text.position[part].tolist() == [*range(n)]
        assert np.array_equal(experts[:, part], expected[:, SPARSE].swapaxes(0, 1))
        at += n
    assert at == found.tokens == len(found.read(0, at))
    with pytest.raises(UserError, match=r"expected a capture with router logits, found experts alone; .* --replay"):
        compare(found, found)
    with pytest.raises(UserError, match="expected a capture with router logits"):
        summarise(found)


def test_training_replays_them_as_it_replays_an_own_capture(tmp_path):
    """The batches are the same, bit for bit, so the steps are."""
    contexts = [np.asarray([*p, *a], np.int32)[:-1] for p, a, _ in sequences()]
    labels = stream_of(contexts)
    own = experts_alone(tmp_path / "own", labels, [e[:, SPARSE] for _, _, e in sequences()])
    documents = [Document(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, np.float32)) for tokens in contexts]
    batch = Sequences(documents, 24, seed=0).batch(0, (1, 1))
    theirs = Replay(imported(tmp_path, "sglang"), CONFIG, Letters())
    theirs.check(documents)
    a, b = (replay.on(batch).experts for replay in (theirs, Replay(own, CONFIG, Letters())))
    assert a is not None and b is not None and a.tobytes() == b.tobytes() and (a >= 0).any()
    # A negative control: another token somewhere in a sequence is another sequence.
    documents[0].inputs[1] += 1
    with pytest.raises(UserError, match="missing documents: 1"):
        theirs.check(documents)


def experts_alone(folder: pathlib.Path, labels: LabelledText, experts: list[np.ndarray]) -> Capture:
    with CaptureWriter(folder, model_of(CONFIG), labels=labels, source={}, experts_alone=True) as writer:
        writer.put(labels.text, {"experts": np.concatenate(experts).swapaxes(0, 1).astype(np.uint8)})
    return Capture.open(folder)


def test_records_are_aligned_token_by_token(tmp_path):
    labels = stream_of([np.asarray([*p, *a], np.int32) for p, a, _ in sequences()])
    found = imported(tmp_path, "vllm, chat", labels)
    assert found.tokens == sum(p + a - 1 for p, a in LENGTHS) and found.text["domains"] == ["d"]
    (tmp_path / "other").mkdir()
    labels.text.token[len(sequences()[0][0]) + 1] += 1
    with pytest.raises(UserError, match=r"responses.jsonl:1: choice 0: token 4: expected the id .* found"):
        imported(tmp_path / "other", "vllm, chat", labels)
    with pytest.raises(UserError, match=r"expected as many contexts as there are responses .3., found 1"):
        imported(tmp_path / "other", "vllm, chat", stream_of([np.arange(4, dtype=np.int32)]))
    assert not (tmp_path / "other" / "capture").exists()


def headed(header: str) -> str:
    """A .npy file that is nothing but this header."""
    return base64.b64encode(b"\x93NUMPY\x01\x00v\x00" + header.ljust(117).encode() + b"\n").decode()


# More numbers than fit into any memory.
LARGE = headed("{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999, 2, 2), }")
GOOD = {"prompt_token_ids": [5, 6], "token_ids": [7], "routed_experts": [[[0, 1], [2, 3]]] * 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": None}, "prompt_token_ids or input_ids: expected token ids, found none"),
        ({"token_ids": [97]}, "token_ids: expected token ids from 0 to 96, found"),
        ({"token_ids": "x"}, "token_ids: expected token ids"),
        ({"token_ids": [7, 8]}, "expected those of 3 tokens .* found 2; ask the server for those of the whole"),
        ({"routed_experts": None}, "routed_experts: expected those of every token, found none .server option"),
        ({"routed_experts": [[[0, 1]]] * 2}, r"expected \[tokens, 2, 2\], found \[2, 1, 2\]"),
        ({"routed_experts": [[[0, 1], [2]]] * 2}, "expected lists of equal length"),
        ({"routed_experts": [[[0, 8], [2, 3]]] * 2}, "expected experts from 0 to 7, found 8"),
        ({"routed_experts": [[[0, -1], [2, 3]]] * 2}, "expected experts from 0 to 7, found -1"),
        ({"routed_experts": [[[0, 0], [2, 3]]] * 2}, "expected 2 different experts"),
        ({"routed_experts": [[[0.5, 1], [2, 3]]] * 2}, "expected whole numbers"),
        ({"routed_experts": "?"}, "expected the base64 of a .npy file or of int32 numbers"),
        ({"routed_experts": raw(np.arange(7))}, "expected 2 tokens x 4 layers x 2 experts, found 7 numbers"),
        ({"meta_info": {"output_token_logprobs": [[-1, 8, None]]}}, "token_ids: expected the ids that meta_info has"),
        ({"routed_experts": LARGE}, "expected the base64 of a .npy file"),
        ({"routed_experts": headed("((")}, "expected the base64 of a .npy file"),
        ({"routed_experts": headed("{[]: 1}")}, "expected the base64 of a .npy file"),
        ({"choices": [3]}, "choices: expected objects, found 3"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | changes) + "\n")
    found = read_responses(path, CONFIG)
    assert isinstance(next(found)[1], Response)
    with pytest.raises(UserError, match=f"bad.jsonl:2: .*{message}" if "choices" not in changes else message):
        next(found)
