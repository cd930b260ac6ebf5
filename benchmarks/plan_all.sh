#!/usr/bin/env bash
# Plans every config of docs/scaling.md and writes its tables: benchmarks/plan_all.sh [FLAG ...]
# FLAGs are passed to every plan, for example --quick. PLANS=regex selects plans by name. Each plan
# becomes a line of docs/plans.jsonl; the full plans are left in runs/plans, which git ignores. A
# plan that has a line already is kept; remove docs/plans.jsonl to remake them all (about 20 x 3
# compilations). A plan that fails does not stop the others. Needs `pip install -e '.[tpu-plan]'`
# and no TPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
summary=docs/plans.jsonl
full=runs/plans
mkdir -p "$full"
touch "$summary"

failed=()
plan() { # name, config, topology, flags
  local name="$1" config="$2" topology="$3"
  shift 3
  [[ "$name" =~ ${PLANS:-.} ]] || return 0
  grep -q "^{\"plan\":\"$name\"," "$summary" && return 0
  echo "== $name" >&2
  rm -f "$full/$name.json"
  if ! "$python" -m dpr_jax.plan --config="configs/$config.py" --topology="$topology" \
    --methods=dpr --output="$full/$name.json" "$@" >&2; then
    failed+=("$name")
    return 0
  fi
  "$python" -m benchmarks.plan_tables summarize "$full/$name.json" --output="$summary"
}

flags=("$@")
# Accumulation 4 where memory is tight; whole batches of 64 rows.
short=(--config.sft.accumulation=4 --config.budget.accumulation=4)
lora=(--config.model.lora.rank=16)
# On 256 chips a micro-batch needs a row for each of data * fsdp groups, so there is only one.
large=(--config.sft.batch_size=256 --config.budget.batch_size=256
  --config.sft.accumulation=1 --config.budget.accumulation=1)
for config in llama31_8b qwen25_7b mistral_7b gemma3_4b; do
  # Every mesh that may fit, where memory is tight and the choice matters.
  plan "${config}_v5e_4x4" "$config" v5e:4x4 --exhaustive "${short[@]}" ${flags[@]+"${flags[@]}"}
  plan "${config}_v5p_2x2x2" "$config" v5p:2x2x2 ${flags[@]+"${flags[@]}"}
  plan "${config}_v6e_4x4" "$config" v6e:4x4 ${flags[@]+"${flags[@]}"}
  plan "${config}_lora_v5e_4x4" "$config" v5e:4x4 "${short[@]}" "${lora[@]}" ${flags[@]+"${flags[@]}"}
done
plan llama31_8b_v5e_16x16 llama31_8b v5e:16x16 "${large[@]}" ${flags[@]+"${flags[@]}"}
plan llama31_8b_lora_v5e_16x16 llama31_8b v5e:16x16 "${large[@]}" "${lora[@]}" ${flags[@]+"${flags[@]}"}
# fsdp alone, one micro-batch: its SFT step is compared with the analytic minimum. Its rollout does
# not fit, because each chip would have to hold all weights.
plan llama31_8b_fsdp16_v5e_4x4 llama31_8b v5e:4x4 --mesh=1,16,1 \
  --config.sft.accumulation=1 --config.budget.accumulation=1 ${flags[@]+"${flags[@]}"}
# Rows of 32k tokens.
plan llama31_8b_32k_v5p_4x4x4 llama31_8b v5p:4x4x4 --config.data.row_length=32768 \
  --config.sft.batch_size=32 ${flags[@]+"${flags[@]}"}

"$python" -m benchmarks.plan_tables "$summary" docs/scaling.md

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
