#!/usr/bin/env bash
# Trains a small Qwen3-MoE from random weights on Python's standard library, and writes it in HF form:
#   bash examples/pretrain/run.sh small [OUTPUT [FLAG...]]     tests/checkpoints holds the result of `small`
#   bash examples/pretrain/run.sh deep  [OUTPUT [FLAG...]]     24 layers, 25 million parameters
# Further flags go to `python -m jaxmoe.train`; PYTHON names the interpreter. Runs from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

recipe=${1:?expected small or deep}
output=${2:-pretrain-output/$recipe}
declare -A steps=([small]=5500 [deep]=1500)
python=${PYTHON:-python3}

"$python" -m examples.stdlib_corpus "$output/corpus"
"$python" -m examples.train_tokenizer "$output/corpus/text.jsonl" "$output/tokenizer" --vocab-size 2048
"$python" -m jaxmoe.train --from-scratch "examples/pretrain/$recipe.json" --tokenizer "$output/tokenizer" \
    --data "$output/corpus/text.jsonl" --eval-data "$output/corpus/text.heldout.jsonl" --output "$output/run" \
    --seq-length 512 --batch-size 32 --max-steps "${steps[$recipe]}" --learning-rate 2e-3 --warmup-ratio 0.02 \
    --weight-decay 0.1 --adam-beta2 0.95 --dtype bfloat16 --remat fast --eval-every 500 --save-every 500 "${@:3}"
echo "The model, in HF form: $output/run/model"
