"""A small byte-level BPE tokenizer in Qwen's form: `python -m examples.train_tokenizer DATA OUTPUT --vocab-size 2048`.

DATA is a JSONL file of `{"text": ...}`. The `AutoTokenizer` of transformers loads OUTPUT, which has Qwen's special
tokens and a ChatML template. The same data give the same tokenizer.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.errors import UserError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_TOKEN, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
BYTES = 256
CONTEXT = 2048  # max_position_embeddings of the recipes in examples/pretrain

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocab_size` tokens, the special ones last, as in Qwen.

    Raises:
        UserError: `vocab_size` is too small for 256 bytes and the special tokens.
    """
    if vocab_size < BYTES + len(SPECIAL_TOKENS):
        raise UserError(f"vocab_size: expected at least {BYTES + len(SPECIAL_TOKENS)}, found {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains on a JSONL file and saves the tokenizer."""
    parser = ArgumentParser(description="Train a byte-level BPE tokenizer with Qwen's special tokens.")
    parser.add_argument("data", type=pathlib.Path, metavar="DATA", help='JSONL file of {"text": ...}')
    parser.add_argument("output", type=pathlib.Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="number of tokens (default: 2048)")
    arguments = parser.parse_args(argv)
    with arguments.data.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output)
    characters = sum(map(len, texts))
    tokens = sum(len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"])
    print(f"{arguments.output}: {len(tokenizer)} tokens; {characters / tokens:.2f} characters of its data per token")


if __name__ == "__main__":
    run(main)
