#!/usr/bin/env bash
# The comparisons of docs/routing.md on the demo checkpoint: bash examples/routing_comparisons.sh OUTPUT
# OUTPUT must be new. It gets the captures, one CSV table per comparison, and a report of all captures of one text.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?usage: bash examples/routing_comparisons.sh OUTPUT}
PYTHON=${PYTHON:-.venv/bin/python}
MODEL=tests/checkpoints/qwen3-moe-stdlib
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
routing() { "$PYTHON" -m jaxmoe.routing "$@"; }

"$PYTHON" -m examples.stdlib_corpus "$OUT/corpus" --domains "$OUT/domains.jsonl"
routing capture --model $MODEL --data "$OUT/domains.jsonl" --seq-length 256 --max-tokens 12000 --out "$OUT/base"

# base against LoRA, and checkpoint against checkpoint: 40 steps on the docstrings, of adapters and of all parameters
train() { "$PYTHON" -m jaxmoe.train --model $MODEL --data "$OUT/corpus/docstrings.jsonl" --max-steps 40 --seq-length 128 \
  --batch-size 8 --log-every 40 --no-tensorboard "$@"; }
train --output "$OUT/run-lora" --lora-targets attention,router,experts --lora-r 8 --lora-alpha 16 --learning-rate 3e-3
train --output "$OUT/run-full" --full --learning-rate 1e-3
routing capture --model $MODEL --adapter "$OUT/run-lora" --text "$OUT/base" --out "$OUT/lora"
routing capture --model "$OUT/run-full/model" --dtype bfloat16 --text "$OUT/base" --out "$OUT/full"

# bfloat16 against NF4, JAX against PyTorch
routing capture --model $MODEL --quantize nf4 --text "$OUT/base" --out "$OUT/nf4"
"$PYTHON" -m torch_ref.capture --model $MODEL --dtype bfloat16 --text "$OUT/base" --out "$OUT/torch"
routing capture --model $MODEL --dtype float32 --text "$OUT/base" --out "$OUT/base-float32"
"$PYTHON" -m torch_ref.capture --model $MODEL --dtype float32 --text "$OUT/base" --out "$OUT/torch-float32"

for other in lora full nf4 torch; do
  routing compare "$OUT/base" "$OUT/$other" --out "$OUT/$other.csv"
done
routing compare "$OUT/torch-float32" "$OUT/base-float32" --out "$OUT/float32.csv"
routing compare "$OUT/base" --out "$OUT/domains.csv"
routing report "$OUT/base" "$OUT/lora" "$OUT/full" "$OUT/nf4" "$OUT/torch" --tokenizer $MODEL --out "$OUT/report"
