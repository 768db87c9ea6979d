#!/bin/sh
# Curates some of the demo's sums: keeps those that its base model gets right sometimes, and trains on them.
#
#     sh examples/curate_demo.sh      # after examples/demo_base.py; about a quarter of an hour on two cores
set -eu

mkdir -p runs/demo-sums
head -n 4000 runs/demo-base/train.jsonl > runs/demo-sums/sums.jsonl

python tools/curate.py run \
    --input runs/demo-sums --evaluation runs/demo-base/held_out.jsonl --output runs/demo-curated \
    --difficulty.model runs/demo-base/final --difficulty.template short \
    --difficulty.num-responses 8 --difficulty.hard-below 1 --difficulty.max-prompt-tokens 64 \
    --sampling.max-response-tokens 64 --fleet.kind local --dtype float32

python examples/demo.py --data.train runs/demo-curated/train.jsonl --run-dir runs/demo-on-curated
