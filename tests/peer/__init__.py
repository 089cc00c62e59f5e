"""The tests of transformers and PEFT, run on stock and on patched classes."""
