"""What a checkpoint and the flags say about generation: the fields of its files, prompts in a chat template."""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from transformers import GenerationConfig

from jaxmoe.data.chat import load_tokenizer
from jaxmoe.errors import UserError
from jaxmoe.generate import __main__ as command
from jaxmoe.generate import prompts, settings
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.sampling import Sampling
from jaxmoe.generate.settings import GenerationDefaults, generation_defaults, without_effect
from peers.configs import config_of
from tests.conftest import ROOT

CHECKPOINT = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"
GREEDY = Sampling(top_k=50)  # transformers' top_k, which matters once a flag sets a temperature

Write = Callable[..., GenerationDefaults]


@pytest.fixture
def read(tmp_path: pathlib.Path) -> Write:
    """Writes generation_config.json (and config.json) into a folder and reads the settings."""

    def call(own: Any = None, model: Any = None, **options: Any) -> GenerationDefaults:
        for name, raw in (("generation_config.json", own), ("config.json", model)):
            if raw is not None:
                (tmp_path / name).write_text(raw if isinstance(raw, str) else json.dumps(raw))
        return generation_defaults(tmp_path, **options)

    return call


def test_no_file(read: Write) -> None:
    assert read() == (GREEDY, (), None, ())


QWEN = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.51.0",
}


@pytest.mark.parametrize(
    ("own", "sampling", "stop"),
    [
        (QWEN, Sampling(0.7, 20, 0.8, repetition_penalty=1.05), (151645, 151643)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "eos_token_id": 7},
         Sampling(0.6, 20, 0.95, min_p=0.05), (7,)),
        ({"do_sample": True}, Sampling(1.0, 50), ()),
        ({"do_sample": False, "top_k": 20, "repetition_penalty": 2}, Sampling(0, 20, repetition_penalty=2), ()),
        ({"bos_token_id": -1, "eos_token_id": -1, "pad_token_id": -1}, GREEDY, ()),
        ({"temperature": None, "eos_token_id": None, "num_beams": 1, "guidance_scale": 1.0}, GREEDY, ()),
        (
            {"suppress_tokens": [1], "begin_suppress_tokens": [2, 3], "forced_eos_token_id": 4, "min_new_tokens": 5,
             "bad_words_ids": [[6], [7, 8]], "sequence_bias": [[[9], 1]], "no_repeat_ngram_size": 3,
             "exponential_decay_length_penalty": [2, 1.5], "min_length": 0},
            Sampling(top_k=50, suppress_tokens=(1,), begin_suppress_tokens=(2, 3), forced_eos_token_id=(4,),
                     min_new_tokens=5, bad_words_ids=((6,), (7, 8)), sequence_bias=(((9,), 1.0),),
                     no_repeat_ngram_size=3, exponential_decay_length_penalty=(2, 1.5)),
            (),
        ),
        ({"do_sample": True, "top_h": 0.4, "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.2},
         Sampling(1.0, 50, top_h=0.4, typical_p=0.9, epsilon_cutoff=0.1, eta_cutoff=0.2), ()),
    ],
)  # fmt: skip
def test_fields_of_the_file(own: dict[str, Any], sampling: Sampling, stop: tuple[int, ...], read: Write) -> None:
    assert read(own) == (sampling, stop, None, ())


def test_every_field_of_transformers_is_listed() -> None:
    fields = {name for name in vars(GenerationConfig()) if name != "_original_object_hash"}
    assert fields <= settings._HONOURED | settings._REFUSED.keys() | settings._WITHOUT_EFFECT


def test_neutral_values_are_those_of_transformers(read: Write) -> None:
    """A file with every default of transformers written out means what an empty file means."""
    defaults = GenerationConfig()._get_default_generation_params()
    assert read(defaults) == read({})


def test_stop_tokens_come_from_the_first_file_that_has_them(read: Write) -> None:
    assert read(model={"eos_token_id": [5, 6]}).stop_tokens == (5, 6)
    assert read({"eos_token_id": None}).stop_tokens == (5, 6)
    assert read({"eos_token_id": [0]}).stop_tokens == (0,)
    assert read(use_file=False) == (Sampling(), (5, 6), None, ())


def test_without_the_file_config_json_is_read(read: Write) -> None:
    model = {"model_type": "qwen3_moe", "eos_token_id": 3, "repetition_penalty": 1.2, "max_length": 20, "top_k": 50}
    assert read(model=model) == (Sampling(top_k=50, repetition_penalty=1.2), (3,), None, ())
    assert read({}, model) == (GREEDY, (3,), None, ())


REFUSED = {
    "num_beams": 4, "num_beam_groups": 2, "num_return_sequences": 2, "penalty_alpha": 0.6, "guidance_scale": 1.5,
    "encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 2, "forced_bos_token_id": 1, "max_time": 3.0,
    "stop_strings": ["a"], "token_healing": True, "watermarking_config": {}, "dola_layers": "low",
    "constraints": [1], "force_words_ids": [[1]], "assistant_early_exit": 2,
}  # fmt: skip
BAD = {
    "a string": {"temperature": "0.7"},
    "a bool": {"top_k": True},
    "a fraction": {"top_k": 2.5},
    "not a number": '{"top_p": NaN}',
    "infinite": '{"temperature": Infinity}',
    "beyond float64": {"temperature": 10**400},
    "negative": {"repetition_penalty": -1.0},
    "zero": {"repetition_penalty": 0},
    "negative top_k": {"top_k": -1},
    "a temperature that is not used": {"temperature": -0.5},
    "do_sample": {"do_sample": "false"},
    "do_sample as a number": {"do_sample": 1},
    "eos of a bool": {"eos_token_id": True},
    "eos of a string": {"eos_token_id": "<|im_end|>"},
    "eos negative": {"eos_token_id": -2},
    "eos negative in a list": {"eos_token_id": [7, -1]},
    "eos huge": {"eos_token_id": [1, 10**30]},
    "eos nested": {"eos_token_id": [[1]]},
    "eos a fraction": {"eos_token_id": 1.0},
    "pad": {"pad_token_id": "x"},
    "bos": {"bos_token_id": -5},
    "max_new_tokens": {"max_new_tokens": 0},
    "max_length": {"max_length": "long"},
    "bad words": {"bad_words_ids": [1, 2]},
    "an empty word": {"bad_words_ids": [[]]},
    "a bias of old form": {"sequence_bias": {"(1,)": 2.0}},
    "an infinite bias": '{"sequence_bias": [[[1], Infinity]]}',
    "a penalty": {"exponential_decay_length_penalty": [1]},
    "suppressed": {"suppress_tokens": [1, None]},
    **{name: {name: value} for name, value in REFUSED.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_field_is_named(name: str, read: Write) -> None:
    raw = BAD[name]
    field = next(iter(json.loads(raw) if isinstance(raw, str) else raw))
    with pytest.raises(UserError, match=rf"generation_config\.json: {field}: expected .*, found .+") as caught:
        read(raw)
    assert "\n" not in str(caught.value)
    assert (name in REFUSED) == str(caught.value).endswith("or use --no-generation-config)")
    if name not in REFUSED:
        return
    assert read(raw, use_file=False).sampling == Sampling()


@pytest.mark.parametrize("raw", ["[]", "{", '{"top_k": 1' + "0" * 5000 + "}"])
def test_a_file_that_is_no_object(raw: str, read: Write) -> None:
    with pytest.raises(UserError, match=r"generation_config\.json: expected"):
        read(raw)


def test_what_has_no_effect_is_announced(read: Write) -> None:
    notices = read(
        {"presence_penalty": 1.5, "max_length": 4096, "temperature": 0.6, "cache_implementation": "static"}
    ).notices
    assert [line.split("generation_config.json: ")[1] for line in notices] == [
        "not known and not used: presence_penalty",
        "max_length 4096 is not used; --max-new-tokens sets the limit",
        "temperature 0.6 is not used, because do_sample is not true",
    ]
    assert without_effect(Sampling(top_k=20, min_p=0.1)) == ["top_k", "min_p"]
    assert without_effect(GREEDY) == without_effect(Sampling(0.6, 20, 0.9)) == []


TEMPLATE = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{%- endfor -%}
{%- if tools -%}{{ tools | length }} tools{%- endif -%}
{%- if add_generation_prompt -%}<|im_start|>{{ name or 'assistant' }}
{%- if enable_thinking is defined and enable_thinking is false -%}<think></think>{%- endif -%}{%- endif -%}
"""


def encoded(*words: str, template: str | None = TEMPLATE) -> tuple[list[str], list[str]]:
    tokenizer = load_tokenizer(CHECKPOINT)
    tokenizer.chat_template = template
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="folder")
    prompts.add_arguments(parser)
    arguments = parser.parse_args(["--prompt", "q", *words])
    settings, notices = prompts.chat_settings(arguments, tokenizer)
    found = prompts.encode_prompts(arguments, tokenizer, settings)
    return [tokenizer.decode(tokens) for tokens in found], notices


USER = "<|im_start|>user: q<|im_end|>"
ASKED = USER + "<|im_start|>assistant"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--chat"], ASKED),
        (["--chat", "--system", "s"], "<|im_start|>system: s<|im_end|>" + ASKED),
        (["--chat", "--no-thinking"], ASKED + "<think></think>"),
        (["--chat", "--template-arg", "enable_thinking=false"], ASKED + "<think></think>"),
        (["--chat", "--template-arg", "enable_thinking=true"], ASKED),
        (["--chat", "--template-arg", "name=bot"], USER + "<|im_start|>bot"),
        (["--chat", "--template-arg", 'name="a b"'], USER + "<|im_start|>a b"),
        (["--chat", "--template-arg", 'tools=[{"name": "f"}]'], USER + "1 tools<|im_start|>assistant"),
        ([], "q"),
    ],
)
def test_prompts(words: list[str], text: str) -> None:
    assert encoded(*words) == ([text], [])


def test_an_argument_that_the_template_does_not_read() -> None:
    assert encoded("--chat", "--template-arg", "nam=1")[1] == [
        "the chat template does not read nam, which has no effect"
    ]
    _, notices = encoded("--chat", "--no-thinking", template=TEMPLATE.replace("enable_thinking", "other"))
    assert notices == ["the chat template does not read enable_thinking, which has no effect"]


def test_a_prompt_that_fills_the_context() -> None:
    words = ["--model", str(CHECKPOINT), "--prompt", "word " * 3000]
    with pytest.raises(UserError, match="expected a prompt of fewer than 2,048 tokens, the model's context, found"):
        command.main(words)


@pytest.mark.parametrize("name", ["documents", "tokenizer", "template", "bos_token"])
def test_arguments_of_any_name_reach_the_template(name: str) -> None:
    words = ["--chat", "--template-arg", f'{name}=[{{"a": 1}}]']
    found, notices = encoded(*words, template="{{ messages[0].content ~ " + name + "[0].a }}")
    assert (found, notices) == (["q1"], [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--system", "s"], "system: expected together with --chat"),
        (["--no-thinking"], "no-thinking: expected together with --chat"),
        (["--template-arg", "a=1"], "template-arg: expected together with --chat"),
        (["--chat", "--template-arg", "a"], "expected KEY=VALUE, found 'a'"),
        (["--chat", "--template-arg", "a b=1"], "expected KEY=VALUE"),
        (["--chat", "--template-arg", "name=True"], "expected JSON .* for name, found True"),
        (["--chat", "--template-arg", "name=[1"], r"expected JSON .* for name, found \[1"),
        (["--chat", "--template-arg", "name=NaN"], "expected JSON .* for name, found NaN"),
        (["--chat", "--template-arg", "messages=[]"], "found messages, which is not free"),
        (["--chat", "--template-arg", "tokenize=false"], "found tokenize, which is not free"),
        (["--chat", "--no-thinking", "--template-arg", "enable_thinking=true"], "one value of enable_thinking, found"),
        (["--chat", "--template-arg", "tools=3"], "tools: expected a list of objects, found a number"),
    ],
)
def test_bad_prompt_flags(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoded(*words)


def test_no_template_names_the_ways_out() -> None:
    with pytest.raises(UserError, match=r"chat: folder: .* chat template, found none; put .*, or leave out --chat"):
        encoded("--chat", template=None)


class Recorder(Generator):
    """Stands in for the generator and for `capture_generation`; records what they are told."""

    calls: ClassVar[list[tuple[str, Sampling, tuple[int, ...], int]]] = []

    def __init__(self, _: Any) -> None:
        self.config = config_of("plain")

    def check(self, *_: Any) -> None:
        pass

    def generate(self, prompts: Any, count: int, sampling: Any, stop: Any, on_token: Any = None) -> Any:
        self.calls.append(("streamed" if on_token else "batch", sampling, stop, count))
        return [[5]] * len(prompts)

    @classmethod
    def capture(cls, _: Any, prompts: Any, count: int, folder: Any, **options: Any) -> Any:
        kind = "captured" if folder else "changed"
        cls.calls.append((kind, options["sampling"], options["stop_tokens"], count))
        return [[5]] * len(prompts)


@pytest.fixture
def told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command on a folder with a generation config; returns what the generator was told."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    monkeypatch.setattr(command.Qwen3MoeForCausalLM, "from_pretrained", lambda *_: None)
    monkeypatch.setattr(command, "Generator", Recorder)
    monkeypatch.setattr(command, "capture_generation", Recorder.capture)

    def call(own: dict[str, Any], *words: str) -> Any:
        (folder / "generation_config.json").write_text(json.dumps(own))
        command.main(["--model", str(folder), "--prompt", "a", *words])
        return Recorder.calls.pop()

    return call


OWN = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1, "eos_token_id": [3], "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], "streamed"),
        (["--prompt", "b"], "batch"),
        (["--capture", "new"], "captured"),
        (["--ablate", "0:1"], "changed"),
    ],
)
def test_every_way_of_generating_is_told_the_settings(words: list[str], kind: str, told: Callable[..., Any]) -> None:
    assert told(OWN, *words) == (kind, Sampling(0.7, 50, repetition_penalty=1.1), (3,), 9)


def test_flags_go_before_the_file(told: Callable[..., Any]) -> None:
    words = "--temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.3 --seed 4 --max-new-tokens 2"
    sampling = Sampling(0.5, 3, 0.9, 4, min_p=0.1, repetition_penalty=1.3)
    assert told(OWN, *words.split()) == ("streamed", sampling, (3,), 2)
    assert told(OWN, "--no-generation-config")[1:] == (Sampling(), (2047,), 256)  # as in config.json
    assert told({})[1:] == (GREEDY, (2047,), 256)
    assert told(OWN, "--chat")[2] == (3, 2047), "a chat also ends with the tokenizer's end of text"


def test_a_chat_ends_where_the_template_ends_a_turn(told: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """A base model that was trained on chats names the end of a text only, in all its files."""
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|endoftext|>"}))
    end_of_text = load_tokenizer(tmp_path / "model").eos_token_id
    assert told({"eos_token_id": end_of_text}, "--chat")[2] == (end_of_text, 2047)
    assert told({"eos_token_id": end_of_text})[2] == (end_of_text,)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert told({"eos_token_id": end_of_text}, "--chat")[2] == (end_of_text,)


def test_what_has_no_effect_goes_to_stderr(told: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    told({"frequency_penalty": 1}, "--min-p", "0.2")
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in said] == ["not known and not used: frequency_penalty", "min_p"]
    told(OWN, "--min-p", "0.2")
    assert capsys.readouterr().err == ""
