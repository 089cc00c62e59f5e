"""`--config run.toml`: flags count more than the file, the file more than defaults; what is wrong in it is named; and
the file that a run writes is read back as the same settings."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from jaxmoe.cli import xla
from jaxmoe.cli.arguments import ArgumentParser, add_dataclass_arguments, dataclass_from_arguments, flag_kinds
from jaxmoe.cli.config_file import add_config, given_settings, read_settings, settings_text
from jaxmoe.errors import UserError
from jaxmoe.train.__main__ import main
from jaxmoe.train.settings import TrainConfig


@dataclass
class Options:
    model: pathlib.Path
    name: str = "run"
    steps: int | None = 10
    rate: float = 1e-4
    pack: bool = True
    dtype: Literal["float32", "bfloat16"] | None = None
    targets: tuple[str, ...] = ("attention",)
    pairs: tuple[str, ...] = field(default=(), metadata={"repeat": True})
    resume: bool = field(default=False, metadata={"once": True})


def parse(*argv: str) -> Options:
    given = given_settings(argv, flag_kinds(Options))
    parser = ArgumentParser(prog="program")
    add_config(parser)
    add_dataclass_arguments(parser, Options, given)
    return dataclass_from_arguments(Options, parser.parse_args(argv))


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "run.toml"


def test_flags_count_more_than_the_file(file: pathlib.Path) -> None:
    file.write_text('model = "m"\nsteps = 3\nrate = 1\npack = false\ntargets = ["a", "b"]\npairs = ["x=1", "y=2"]\n')
    config = ("--config", str(file))
    in_file = Options(pathlib.Path("m"), steps=3, rate=1.0, pack=False, targets=("a", "b"), pairs=("x=1", "y=2"))
    assert parse(*config) == in_file
    assert type(parse(*config).rate) is float
    flags = ("--steps", "4", "--pack", "--targets", "c", "--pairs", "z=3", "--model", "other")
    over = Options(pathlib.Path("other"), steps=4, rate=1.0, pack=True, targets=("c",), pairs=("z=3",))
    assert parse(*flags, *config) == parse(*config, *flags) == over


def test_hyphens_are_underscores(file: pathlib.Path) -> None:
    kinds = {"learning_rate": float}
    file.write_text("learning-rate = 0.5")
    assert read_settings(file, kinds) == {"learning_rate": 0.5}
    file.write_text("learning-rate = 0.5\nlearning_rate = 0.5")
    with pytest.raises(UserError, match="learning_rate: expected it once"):
        read_settings(file, kinds)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step = 3", "'step': expected the name of a flag, found none; the nearest is steps"),
        ("[train]\nsteps = 3", "'train': expected the name of a flag, found none; the nearest is "),
        ("steps = '3'", "steps: expected a whole number below 2^63, found '3'"),
        ("steps = 3.0", "steps: expected a whole number below 2^63, found 3.0"),
        ("steps = true", "steps: expected a whole number below 2^63, found True"),
        ("steps = 9223372036854775808", "steps: expected a whole number below 2^63, found 9223372036854775808"),
        ("rate = nan", "rate: expected a finite number, found nan"),
        ("rate = 1" + "0" * 400, "rate: expected a finite number, found 1000"),
        ("rate = [1.0]", "rate: expected a finite number, found [1.0]"),
        ("pack = 1", "pack: expected true or false, found 1"),
        ("model = 5", "model: expected a string, found 5"),
        ("name = 2026-01-01", "name: expected a string, found datetime.date(2026, 1, 1)"),
        ("dtype = 'int8'", "dtype: expected one of float32, bfloat16; found 'int8'"),
        ("targets = 'a,b'", "targets: expected an array, found 'a,b'"),
        ("targets = ['a', 1]", "targets: expected a string, found 1"),
        ("steps 3", "expected TOML, found a mistake: Expected '=' after a key"),
        (b"name = '\xff'", "expected TOML, found a mistake: 'utf-8' codec"),
        ("x = " + "[" * 10**5, "expected TOML, found too many arrays inside each other"),
        ("steps = " + "1" * 5000, "expected TOML, found a whole number of thousands of digits"),
        ("model = ''", "model: expected a path, found ''"),
        ('model = "a\\u0000b"', "model: expected a string without null characters, found 'a\\x00b'"),
        (None, "expected a TOML file, found none"),
    ],
    ids=str,
)
def test_what_is_wrong_in_the_file_is_named(content: str | bytes | None, message: str, file: pathlib.Path) -> None:
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        parse("--model", "m", "--config", str(file))
    assert str(error.value).startswith(f"{file}: {message}")


def test_what_is_missing_in_both_is_required(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("steps = 3")
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert capsys.readouterr().err == "program: the following arguments are required: --model\n"


ODD = 'a "b"\\ ü 😀 \x7f\x01\n'


@pytest.mark.parametrize(
    "settings",
    [
        Options(pathlib.Path("m")),
        Options(pathlib.Path(ODD), ODD, None, 1e-300, False, "bfloat16", (ODD, "b"), (), resume=True),
    ],
)
def test_the_written_file_is_read_back(settings: Options, file: pathlib.Path) -> None:
    text = settings_text(settings, ["how to use it"])
    file.write_text(text)
    assert text.startswith("# how to use it\n")
    given = read_settings(file, flag_kinds(Options))
    assert "resume" not in given
    values: dict[str, Any] = {"steps": None} | given
    assert Options(**values) == dataclasses.replace(settings, resume=False)


def test_the_training_settings_are_read_back(file: pathlib.Path) -> None:
    paths: dict[str, Any] = {"model": pathlib.Path("m"), "data": pathlib.Path("d"), "output": pathlib.Path("o")}
    settings = TrainConfig(**paths, lora_targets=("router", "experts"), max_steps=3, template_arg=("a=[1,2]",))
    file.write_text(settings_text(settings, []))
    given = read_settings(file, flag_kinds(TrainConfig))
    assert TrainConfig(**given) == settings
    assert {"learning_rate", "seed", "save_every", "resume"} & {*given} == {"learning_rate", "seed"}
    assert tomllib.loads(file.read_text())["lora_targets"] == ["router", "experts"]


def test_the_command_takes_all_its_flags_from_the_file(
    file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(f'model = "{tmp_path}/none"\ndata = "d"\noutput = "{tmp_path}/out"\nmemory-limit = 8\n')
    limits: list[float | None] = []
    monkeypatch.setattr(xla, "configure", limits.append)
    for more in ([], ["--memory-limit", "9"]):
        with pytest.raises(UserError, match="none: expected a model folder, found none"):
            main(["--config", str(file), *more])
    assert limits == [8, 9]
