"""The model card beside what a run trained, and its upload to a stand-in of the hub."""

from __future__ import annotations

import pathlib
from typing import ClassVar

import pytest

from jaxmoe.errors import UserError
from jaxmoe.runs.card import Kind, card, write_card
from jaxmoe.runs.record import read_run
from jaxmoe.train.publish import check_access, publish
from tests.test_runs import ROWS, write_run

SETTINGS = {
    "model": "/home/me/secret/qwen3-30b",
    "data": ["/data/chats.jsonl:2", "b.parquet"],
    "learning_rate": 1e-4,
    "quantize": "nf4",
    "adapter": None,
    "merge": False,
    "output": "/home/me/out",
    "schedule": "a|b<c>",
}


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    changes = [{"after_step": 2, "learning_rate": [1e-3, 1e-4]}]
    return write_run(
        tmp_path / "my-run", ROWS, settings=SETTINGS, versions={"jaxmoe": "1.0", "jax": "0.11"}, changes=changes
    )


def test_a_card_says_what_was_trained_on_what_and_how_well(run: pathlib.Path) -> None:
    (run / "expert_load.json").write_text('{"step": 4, "load": [[0, 0.1, 1.0, 2.9], [1, 1, 1, 1]]}')
    text = card(read_run(run), "adapter")
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert dict(line.split(": ", 1) for line in front.splitlines()) == {
        "library_name": '"peft"',
        "pipeline_tag": '"text-generation"',
        "tags": '["jaxmoe", "qwen3_moe"]',
    }
    for line in (
        "# my-run",
        "| base model | qwen3-30b |",
        "| data | chats.jsonl:2, b.parquet |",
        "| steps | 4 of 4 |",
        "| versions | jaxmoe 1.0, jax 0.11 |",
        "| held-out loss before training | 5.0000 |",
        "| lowest held-out loss | 3.0000 at step 2 |",
        "| training loss of the last logged step | 3.6000 |",
        "| learning_rate | 0.0001 |",
        "| learning_rate, after step 2 | 0.0001 |",
        "| quantize | nf4 |",
        "| schedule | a\\|b&lt;c> |",
        f"    0  {'█' * 22}░░  0.90  0.50",
        f"    1  {'█' * 24}  1.00  1.00",
        "    0  ·▁▄█",
        "    1  ▄▄▄▄",
        "from peft import AutoPeftModelForCausalLM",
    ):
        assert line in body.splitlines(), line
    assert "/home" not in text and "/data" not in text  # a card may be published
    assert "| merge |" not in text and "| output |" not in text


def test_a_base_from_the_hub_and_a_dense_model(tmp_path: pathlib.Path) -> None:
    settings = {"model": "Qwen/Qwen3-30B-A3B"}
    text = card(read_run(write_run(tmp_path / "run", ROWS[:1], settings=settings)), "merged")
    assert 'base_model: "Qwen/Qwen3-30B-A3B"' in text and 'library_name: "transformers"' in text
    assert "## Routing" not in text and "lowest" not in text
    random = card(read_run(write_run(tmp_path / "other", [], settings={"model": None})), "model")
    assert "| base model | random weights |" in random and "base_model:" not in random


class Hub:
    """What `publish` uses of `huggingface_hub.HfApi`."""

    calls: ClassVar[list[tuple[str, object]]] = []

    def whoami(self):
        self.calls.append(("whoami", None))

    def create_repo(self, repository, **options):
        self.calls.append((repository, options))

        class Url(str):
            repo_id = f"me/{repository}"

        return Url(f"https://hub/me/{repository}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        found = pathlib.Path(folder_path)
        names = sorted(file.name for file in found.iterdir() if allow_patterns is None or file.name in allow_patterns)
        self.calls.append((repo_id, names))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_an_adapter_is_published_without_the_run_s_record(run: pathlib.Path, hub: type[Hub], caplog) -> None:
    (run / "adapter_config.json").write_text("{}")
    (run / "adapter_model.safetensors").write_bytes(b"")
    (run / "merged").mkdir()
    folders: dict[Kind, pathlib.Path] = {"adapter": run, "merged": run / "merged"}
    publish(run, folders, None)
    assert hub.calls == []
    assert "merged into its weights" in (run / "merged" / "README.md").read_text()
    with caplog.at_level("INFO", "jaxmoe"):
        publish(run, folders, "tuned")
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.calls == [("tuned", {"private": True, "exist_ok": True}), ("me/tuned", files)]
    assert "uploaded to https://hub/me/tuned" in caplog.text


def test_a_model_is_published_whole(run: pathlib.Path, hub: type[Hub]) -> None:
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    publish(run, {"model": run / "model"}, "owner/tuned")
    assert hub.calls[-1] == ("me/owner/tuned", ["README.md", "config.json"])


def test_a_hub_that_refuses(run: pathlib.Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise OSError("403 Forbidden\nmore")

    check_access("owner/tuned")
    with pytest.raises(UserError, match=r"push_to_hub: expected NAME or OWNER/NAME, found 'a b'"):
        check_access("a b")
    monkeypatch.setattr(Hub, "whoami", refuse)
    with pytest.raises(
        UserError, match="push_to_hub: the hub does not accept this machine: 403 Forbidden; run hf auth"
    ):
        check_access("owner/tuned")
    monkeypatch.setattr(Hub, "upload_folder", refuse)
    with pytest.raises(UserError, match=r"403 Forbidden; .* is complete; upload it with: hf upload owner/tuned"):
        publish(run, {"adapter": run}, "owner/tuned")
    assert (run / "README.md").exists()


def test_a_card_is_replaced(run: pathlib.Path) -> None:
    (run / "README.md").write_text("the base model's card")
    write_card(read_run(run), run, "adapter")
    assert (run / "README.md").read_text() == card(read_run(run), "adapter")
