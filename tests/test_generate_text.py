"""The chat in the terminal, and files of prompts: what is asked, kept, cut, stopped and continued.

Most tests replace the engine by one that answers from its input; tests/test_generate.py covers the engine.
"""

from __future__ import annotations

import io
import json
import pathlib
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from jaxmoe.data.chat import AS_WRITTEN, ChatSettings, load_tokenizer
from jaxmoe.errors import UserError
from jaxmoe.generate.__main__ import main
from jaxmoe.generate.answer_file import answer_file
from jaxmoe.generate.batches import Answering, batches_by_length
from jaxmoe.generate.chat import HELP, Chat
from jaxmoe.generate.conversation import Conversation
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.prompt_file import digest, read_prompts
from jaxmoe.generate.sampling import GREEDY
from jaxmoe.generate.settings import Settings
from jaxmoe.generate.speed import Speed
from tests.conftest import ROOT

CHECKPOINT = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"
STOP = 2047


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


class Echo(Generator):
    """Continues each prompt with words about it and the seed; a signal arrives where `interrupt` says so."""

    def __init__(self, tokenizer, interrupt=lambda prompts, tokens: False):
        self.tokenizer, self.interrupt = tokenizer, interrupt
        self.prompts, self.seeds = [], []

    def generate(self, prompts, max_new_tokens, sampling=GREEDY, stop_tokens=(), on_token=None, **_):
        self.prompts += [list(prompt) for prompt in prompts]
        self.seeds.append(sampling.seed)
        outputs = []
        for row, prompt in enumerate(prompts):
            text = f"answer {sampling.seed} to {len(prompt)} tokens: {sum(prompt)}"
            outputs.append([*self.tokenizer(text)["input_ids"][: max_new_tokens - 1], STOP])
            for at, token in enumerate(outputs[-1]):
                if self.interrupt(prompts, outputs[-1][:at]):
                    signal.raise_signal(signal.SIGINT)
                if on_token is not None:
                    on_token(row, token)
        return outputs


# --- the chat


def talk(tokenizer, *lines, context=2000, most=50, system=None, interrupt=lambda prompts, tokens: False):
    """A chat of these lines, then Ctrl-D: (answers, notes, conversation, generator). `Ctrl-C` is one at the prompt."""
    typed, shown, notes = iter(lines), io.StringIO(), io.StringIO()

    def ask(prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        return line

    generator = Echo(tokenizer, interrupt)
    conversation = Conversation(tokenizer, ChatSettings(system), context, most)
    settings = Settings(most, GREEDY, (STOP,))
    consoles = (Console(file=file, width=200) for file in (shown, notes))
    Chat(generator, tokenizer, conversation, settings, *consoles).run(ask)
    return shown.getvalue(), notes.getvalue(), conversation, generator


def roles(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def test_a_chat_keeps_its_history_in_the_template(tokenizer):
    shown, notes, conversation, generator = talk(tokenizer, "import os", "", "  class A:  ", system="Short.")
    questions, answers = ["import os", "class A:"], shown.splitlines()
    pairs = [("user", questions[0]), ("assistant", answers[0]), ("user", questions[1]), ("assistant", answers[1])]
    assert roles(conversation) == pairs
    rendered = "<|im_start|>system\nShort.<|im_end|>\n" + "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs[:3]
    )
    assert generator.prompts[1] == tokenizer(rendered + "<|im_start|>assistant\n")["input_ids"]
    assert len(set(generator.seeds)) == 2  # the same question again gets another draw
    assert "2 answers, " in notes.splitlines()[-1]


def test_commands_of_the_chat(tokenizer):
    lines = ["one", "/system Be brief.", "two", "/reset", "/help", "/nonsense", "/system", "three", "/quit", "never"]
    shown, notes, conversation, generator = talk(tokenizer, *lines)
    prompts = [tokenizer.decode(prompt) for prompt in generator.prompts]
    assert len(prompts) == len(shown.splitlines()) == 3
    assert "system" not in prompts[0]
    assert prompts[1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none")
    assert prompts[2].startswith("<|im_start|>user\nthree") and len(conversation.messages) == 2
    assert HELP in notes and "no such command: /nonsense" in notes


def test_a_message_of_several_lines(tokenizer):
    _, _, conversation, _ = talk(tokenizer, '"""first', "/second", 'third"""', '"""one"""')
    assert [text for role, text in roles(conversation) if role == "user"] == ["first\n/second\nthird", "one"]


def test_ctrl_c_stops_an_answer_and_not_the_chat(tokenizer):
    first = lambda prompts, tokens: len(tokens) == 3 and len(prompts[0]) < 14
    before = signal.getsignal(signal.SIGINT)
    shown, notes, conversation, _ = talk(tokenizer, "one", "Ctrl-C", "and then two", interrupt=first)
    assert signal.getsignal(signal.SIGINT) is before
    partial, whole = shown.splitlines()
    assert partial and len(partial) < len(whole)
    assert roles(conversation)[1] == ("assistant", partial) and len(conversation.messages) == 4
    assert "; stopped" in notes and "/quit or Ctrl-D ends the chat" in notes


KEYBOARD = """
import time
from jaxmoe import stopping
stopping.watch()
with stopping.Keyboard() as keyboard:
    try:
        with keyboard.asking():
            print("asks", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.2)
    with keyboard.answering():
        print("answers", flush=True)
        while not keyboard.stopped:
            time.sleep(0.01)
        print("stopped", flush=True)
        time.sleep(60)
"""


def test_ctrl_c_in_a_command():
    """The thread that ends commands leaves Ctrl-C to the chat, and ends it at the second one during an answer."""
    command = [sys.executable, "-c", KEYBOARD]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("asks", "answers", "stopped"):
            assert process.stdout.readline() == f"{line}\n"
            process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "SIGINT: stopped\n")


def test_history_beyond_the_context_is_dropped_with_a_line(tokenizer):
    questions = [f"question {number} about nothing in particular" for number in range(6)]
    _, notes, conversation, generator = talk(tokenizer, *questions, context=160, most=40)
    assert all(len(prompt) + 40 <= 160 for prompt in generator.prompts)
    assert "2 oldest messages no longer fit" in notes
    assert len(conversation.messages) < 12 and roles(conversation)[-2] == ("user", questions[-1])
    assert roles(conversation)[0][0] == "user"


def test_a_message_beyond_the_context_is_refused(tokenizer):
    _, notes, conversation, generator = talk(tokenizer, "short", "long " * 200, context=120, most=40)
    assert "message: expected at most 90 tokens" in notes  # a quarter of the context is for the answer
    assert len(generator.prompts) == 1 and len(conversation.messages) == 2


def test_what_cannot_be_answered_leaves_the_conversation_as_it_was(tokenizer, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: allocating 1073741824 bytes")

    monkeypatch.setattr(Echo, "generate", fail)
    _, notes, conversation, _ = talk(tokenizer, "one", "lone \ud800")
    assert "out of device memory (1.00 GiB more): /reset" in notes and "lone surrogate" in notes
    assert conversation.messages == []


def test_speed_leaves_out_the_prompt_and_compilations():
    ticks = iter([0.0, 0.0, 5.0, 9.0, 10.0, 11.0, 20.0, 21.0, 22.0, 22.5, 23.0])
    speed = Speed(lambda: next(ticks))
    speed.start()
    for _ in range(4):  # 5.0, 9.0, 10.0, 11.0
        speed.count()
    assert speed.of_answer() == "4 tokens, the first after 5.00 s, then 1.0 tokens/s"
    speed.start()
    for _ in range(4):  # 21.0, 22.0, 22.5, 23.0
        speed.count()
    assert speed.of_answer() == "4 tokens, the first after 1.00 s, then 2.0 tokens/s"
    assert str(speed) == "8 tokens, 1.3 tokens/s"


# --- files of prompts


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def answers_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompt_file(tmp_path):
    records = [{"prompt": "x" * (7 * number % 23 + 1), "id": number} for number in range(11)]
    return write_lines(tmp_path / "prompts.jsonl", records)


def answer(tokenizer, prompt_file, out, interrupt=lambda prompts, tokens: False, **settings):
    prompts = read_prompts(prompt_file, tokenizer, 2048, False, AS_WRITTEN, 2048)
    generator = Echo(tokenizer, interrupt)
    with answer_file(out, len(prompts), {"prompts": digest(prompts), **settings}) as answers:
        how = Settings(20, GREEDY, (STOP,))
        done = Answering(generator, tokenizer, how, 3).run(prompts, answers, lambda *_: None)
        if done.stopped_by is None:
            answers.sort()
    return done, generator


def test_what_json_does_not_have_is_null_in_the_answers(tokenizer, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "score": NaN, "all": {"of": [1.5, -Infinity, "NaN"]}}\n')
    answer(tokenizer, prompts, tmp_path / "out.jsonl")
    (found,) = (tmp_path / "out.jsonl").read_text().splitlines()
    parsed = json.loads(found, parse_constant=pytest.fail)
    assert (parsed["score"], parsed["all"]) == (None, {"of": [1.5, None, "NaN"]})


def test_batches_have_prompts_of_similar_length():
    assert batches_by_length([3, 9, 1, 9, 4], 2) == [[1, 3], [4, 0], [2]]


def test_an_interrupted_file_is_continued(tokenizer, prompt_file, tmp_path):
    """Ctrl-C in the second batch, then a line that was half written: the answers are those of a run that never
    stopped."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer(tokenizer, prompt_file, whole)
    second = lambda prompts, tokens: len(prompts[0]) <= 10 and len(tokens) == 2
    done, _ = answer(tokenizer, prompt_file, out, second)
    assert (done.stopped_by, done.answers) == (signal.SIGINT, len(answers_of(out)))
    assert done.answers == 3
    with out.open("a") as file:
        file.write('{"index": 1, "prom')
    done, generator = answer(tokenizer, prompt_file, out)
    assert out.read_bytes() == whole.read_bytes()
    assert (done.answers, generator.seeds) == (8, [1, 2, 3])
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[1:]))  # of a batch that is there in part, only what is missing is added
    done, generator = answer(tokenizer, prompt_file, out)
    assert out.read_bytes() == whole.read_bytes()
    assert (done.answers, len(generator.seeds)) == (1, 1)
    assert [line["index"] for line in answers_of(out)] == list(range(11))
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        ["prompts.jsonl", "whole.jsonl", "whole.jsonl.settings.json", "out.jsonl", "out.jsonl.settings.json"]
    )


def test_a_complete_file_is_left_alone(tokenizer, prompt_file, tmp_path):
    out = tmp_path / "out.jsonl"
    answer(tokenizer, prompt_file, out)
    before = out.read_bytes()
    done, generator = answer(tokenizer, prompt_file, out)
    assert (done.answers, generator.prompts, out.read_bytes()) == (0, [], before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda out: None,
            r"temperature: expected 0, as when out.jsonl was begun, found 1; continue with the same settings",
        ),
        (lambda out: out.with_name("out.jsonl.settings.json").unlink(), "expected a new file"),
        (lambda out: out.with_name("out.jsonl.settings.json").write_text("[]"), "settings.json"),
    ],
)
def test_another_run_s_answers_are_refused(tokenizer, prompt_file, tmp_path, spoil, message):
    out = tmp_path / "out.jsonl"
    answer(tokenizer, prompt_file, out, temperature=0)
    spoil(out)
    before = out.read_bytes()
    with pytest.raises(UserError, match=message):
        answer(tokenizer, prompt_file, out, temperature=1)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "out.jsonl:1: .*index below 11"),
        ('{"index": 11}', "found 11"),
        ('{"index": 3}', "out.jsonl:1: expected the field 'completion', found none"),
        ("nonsense", "out.jsonl:1: expected JSON"),
    ],
)
def test_a_line_that_is_no_answer(tokenizer, prompt_file, tmp_path, line, message):
    out = tmp_path / "out.jsonl"
    answer(tokenizer, prompt_file, out)
    out.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        answer(tokenizer, prompt_file, out)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with answer_file(out, 2, {}) as answers:
        answers.append([{"index": 1}])
        opened = pathlib.Path.open

        class Full(io.FileIO):
            def write(self, data):
                if len(data) < 30:
                    raise OSError(28, "No space left on device")
                return super().write(data[:10])

        monkeypatch.setattr(pathlib.Path, "open", lambda self, *_: Full(self, "ab"))
        with pytest.raises(OSError, match="No space") as raised:
            answers.append([{"index": 0, "completion": "x" * 20}])
        monkeypatch.setattr(pathlib.Path, "open", opened)
        assert raised.value.filename == str(out)
    assert answers_of(out) == [{"index": 1}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("3", "prompts.jsonl:1: expected a JSON object"),
        ('{"text": "x"}', 'expected the key "prompt", or "messages"'),
        ('{"prompt": "x", "messages": []}', "found both"),
        ('{"prompt": 3}', "prompt: expected a string"),
        ('{"prompt": ""}', "at least one token"),
        ('{"messages": []}', "at least one message"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "from the assistant",
        ),
        ("", "at least one prompt"),
    ],
)
def test_prompts_that_are_none(tokenizer, tmp_path, record, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(record + "\n")
    with pytest.raises(UserError, match=message):
        read_prompts(path, tokenizer, 2048, False, AS_WRITTEN, 2048)


def test_a_prompt_that_fills_the_context(tokenizer, tmp_path):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "q"}, {"prompt": "a longer prompt"}])
    length = len(tokenizer("a longer prompt")["input_ids"])
    assert len(read_prompts(path, tokenizer, 2048, False, AS_WRITTEN, length + 1)) == 2
    with pytest.raises(UserError, match=f"prompts.jsonl:2: expected a prompt of fewer than {length} tokens"):
        read_prompts(path, tokenizer, 2048, False, AS_WRITTEN, length)
    with pytest.raises(UserError, match="expected a file of prompts, found a folder"):
        read_prompts(tmp_path, tokenizer, 2048, False, AS_WRITTEN, length)


def test_prompts_and_messages_become_tokens(tokenizer, tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "q", "kept": [1]}, {"messages": messages}])
    plain, chat = read_prompts(path, tokenizer, 2048, False, ChatSettings("unused"), 2048)
    assert plain == ({"prompt": "q", "kept": [1]}, tokenizer("q")["input_ids"])
    rendered = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert chat.tokens == tokenizer(rendered)["input_ids"]
    asked, same = read_prompts(path, tokenizer, 2048, True, ChatSettings("s"), 2048)
    assert asked.tokens == same.tokens == chat.tokens


# --- the commands


def test_commands_answer_a_file_and_chat(tmp_path, monkeypatch, capsys):
    """Both ways agree with `--prompt --chat`, which prints the same text."""
    messages = [{"role": "user", "content": "import os"}]
    path = write_lines(tmp_path / "prompts.jsonl", [{"messages": messages, "completion": "old"}, {"prompt": "class"}])
    common = ["--model", str(CHECKPOINT), "--max-new-tokens", "8", "--dtype", "float32"]
    out = tmp_path / "out.jsonl"
    files = ["--prompts", str(path), "--out", str(out), "--batch-size", "1"]
    assert main([*common, *files]) == 0
    printed = capsys.readouterr()
    assert "2 answers: " in printed.out and "tokens/s" in printed.out and "not copied: completion" in printed.err
    chat, plain = answers_of(out)
    assert {**chat, "completion": 0, "new_tokens": 0, "finish_reason": 0} == {
        "index": 0, "messages": messages, "completion": 0, "new_tokens": 0, "finish_reason": 0
    }  # fmt: skip
    assert plain["prompt"] == "class" and plain["new_tokens"] <= 8
    main([*common, "--chat", "--prompt", "import os"])
    assert capsys.readouterr().out.removesuffix("\n") == chat["completion"]
    monkeypatch.setattr("sys.stdin", io.StringIO("import os\n"))
    assert main([*common, "--interactive"]) == 0
    printed = capsys.readouterr()
    assert printed.out.removesuffix("\n") == chat["completion"]
    assert main([*common, *files]) == 0
    assert f"{out}: there are 2 of 2 answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x", "--out", "x"], "out: only valid with --prompts"),
        (["--prompts", "x"], "no --out"),
        (["--prompts", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl"),
        (["--interactive", "--capture", "x"], "interactive: expected no flag that captures"),
        (["--prompts", str(CHECKPOINT.parent / "source.txt"), "--out", "x", "--batch-size", "0"], "batch-size"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(UserError, match=message):
        main(["--model", str(CHECKPOINT), *flags])
