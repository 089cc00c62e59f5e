"""The command `jaxmoe COMMAND`: names, exit codes, what it imports, and the scripts that complete it."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import types

import pytest

from jaxmoe.cli import arguments, umbrella
from jaxmoe.cli.commands import COMMANDS
from jaxmoe.errors import UserError
from tests.conftest import ROOT

COMPLETE = """
source "$1"
COMP_WORDS=(jaxmoe {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="${{COMP_WORDS[*]}}"
{function}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "evaluate"])
def test_a_command_gets_the_arguments_after_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        umbrella.main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
    with pytest.raises(SystemExit) as stopped:
        umbrella.main([name, "--no-such-flag"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_hands_its_arguments_to_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    harness = types.SimpleNamespace(cli_evaluate=lambda: given.append(sys.argv[1:]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name, module in {"lm_eval.__main__": harness, "jaxmoe.evaluate.harness": harness}.items():
        monkeypatch.setitem(sys.modules, name, module)
    umbrella.main(["evaluate", "--model", "jaxmoe", "--tasks", "x"])
    assert given == [["--model", "jaxmoe", "--tasks", "x"]]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm_eval: not installed; pip install 'jaxmoe\[eval\]'"):
        umbrella.main(["evaluate"])


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--help"], 0, "fine-tune a model"),
        (["--version"], 0, "jaxmoe "),
        ([], 2, f"jaxmoe: the following arguments are required: COMMAND ({', '.join([*COMMANDS, 'completion'])})\n"),
        (["trian"], 2, "jaxmoe: argument COMMAND: invalid choice: 'trian' (choose from"),
        (["completion", "fish"], 2, "invalid choice: 'fish' (choose from"),
    ],
)
def test_without_a_command(argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        umbrella.main(argv)
    assert stopped.value.code == code
    printed = capsys.readouterr()
    assert said in (printed.err if code else printed.out)


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("/usr/bin/jaxmoe", ["train", "--model", "m"], "jaxmoe train"),
        ("/usr/bin/jaxmoe", ["--help"], "jaxmoe"),
        ("/usr/bin/jaxmoe", [], "jaxmoe"),
        ("/usr/bin/jaxmoe", ["\x1b[2J"], "jaxmoe"),
        ("/usr/bin/jaxmoe-train", ["train"], "jaxmoe-train"),
    ],
)
def test_messages_name_the_command(
    script: str, words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert arguments.program_name() == expected


def test_every_script_is_an_entry_point() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert name == "jaxmoe" or name.removeprefix("jaxmoe-") in COMMANDS


def test_nothing_heavy_is_loaded_before_a_command_runs() -> None:
    code = "import sys; sys.argv = ['jaxmoe', '--version']\nfrom jaxmoe.cli import umbrella\n"
    heavy = {"jax", "numpy", "transformers", "rich", "shtab"}
    code += f"try: umbrella.start()\nfinally: print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == [""], done.stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "jaxmoe.bash"
    path.write_text(umbrella.completion("bash"))
    return str(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tra", {"train"}),
        ("train --learning-r", {"--learning-rate"}),
        ("train --schedule co", {"cosine", "constant"}),
        ("routing comp", {"compare"}),
        ("eval", {"evaluate"}),
        ("convert hf2jax --quant", {"--quantize"}),
        ("completion z", {"zsh"}),
    ],
)
def test_bash_completes(words: str, expected: set[str], script: str) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    code = COMPLETE.format(words=words, function="_shtab_jaxmoe")
    done = subprocess.run([bash, "-c", code, "bash", script], capture_output=True, text=True, check=True)
    assert {line.strip() for line in done.stdout.split("\n") if line.strip()} == expected, done.stderr


def test_zsh_has_all_commands() -> None:
    pytest.importorskip("shtab")
    script = umbrella.completion("zsh")
    assert script.startswith("#compdef jaxmoe")
    assert all(f"\n    {name}:'" in script for name in (*COMMANDS, umbrella.COMPLETION))


def test_completion_without_shtab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(UserError, match="completion: shtab is not installed: pip install shtab"):
        umbrella.completion("bash")
