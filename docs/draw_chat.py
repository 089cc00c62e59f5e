"""Draws docs/chat.svg: a chat with the demo's checkpoint, as the terminal shows it. `python -m docs.draw_chat`."""

from __future__ import annotations

import pathlib
import re

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.data.chat import AS_WRITTEN, load_tokenizer, turn_end
from jaxmoe.generate.chat import Chat
from jaxmoe.generate.conversation import Conversation
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.sampling import Sampling
from jaxmoe.generate.settings import Settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"
LINES = ("Write a test for a stack.", "/system Answer with code.", "And how do I open a file?", "/reset", "/quit")


def main() -> None:
    """Chats and writes the picture."""
    console = Console(record=True, width=100, force_terminal=True)
    typed = iter(LINES)

    def ask(prompt: str) -> str:
        line = next(typed)
        console.out(f"{prompt}{line}", highlight=False, style="bold")
        return line

    tokenizer = load_tokenizer(MODEL)
    generator = Generator(Qwen3MoeForCausalLM.from_pretrained(MODEL))
    end = turn_end(tokenizer)
    assert end is not None
    settings = Settings(60, Sampling(temperature=0.5, top_k=20, repetition_penalty=1.1, seed=1), (end,))
    conversation = Conversation(tokenizer, AS_WRITTEN, generator.config.max_position_embeddings, 60)
    Chat(generator, tokenizer, conversation, settings, console, console).run(ask)
    # The picture names no font that would have to be downloaded.
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    command = "python -m jaxmoe.generate --model DIR --interactive"
    (ROOT / "docs" / "chat.svg").write_text(console.export_svg(title=command, code_format=form))


if __name__ == "__main__":
    main()
