#!/usr/bin/env bash
# Quick check of steering on vLLM: a direction out of a few contrast prompts, then two prompts steered with it, held
# against transformers (--parity). Ends with exit code 1 when the two differ. About two minutes on a CPU.
# usage: scripts/steering_smoke.sh [OUTPUT_DIR]      (a new folder under data/experiments unless given)
set -euo pipefail
cd "$(dirname "$0")/.."

output=${1:-data/experiments/steering_smoke-$(date +%Y%m%d-%H%M%S)}
data=data/directions/french_english
model=(--model_id bundled:smollm2-135m)
command -v nvidia-smi >/dev/null || model+=(--device cpu)

# --no-sync: a check must not change the environment that it checks, nor need the network.
uv run --no-sync -m src.extract_directions --positive_path "$data/target.jsonl" --negative_path "$data/control.jsonl" \
  --paired --token_position mean_prompt --num_tasks 24 "${model[@]}" --output_dir "$output/directions"
uv run --no-sync -m src.steer --prompts_json data/personas/prompts.json --num_tasks 2 "${model[@]}" --backend vllm \
  --steer "$output/directions/directions.safetensors:15:0" --coefficients 30 --random_control --max_tokens 16 \
  --max_model_len 512 --parity 2 --capture 15:mean --output_dir "$output/steered"
echo "steering_smoke.sh: passed; $output/steered/parity.json holds the comparison"
