#!/usr/bin/env bash
# All figures of docs/performance.md, for an idle machine; one JSON line per benchmark.
#
#   benchmarks/run_all.sh RESULTS.jsonl
#
# Environment: PYTHON (ours), PEER_PYTHON (has torch, transformers, trl, lm_eval), TUNIX_PYTHON (has
# google-tunix), each "" to leave those peers out; MODEL (a CKPT; default: random weights of
# SmolLM2-135M's shape; evaluate_speed needs one); DATA (its prompts, a file of GSM8K); REPEATS (5);
# REMAT of the SFT step ("dots full", with ACCELERATOR dots); ACCELERATOR (1: instead, the shape of
# a model of 1.2 billion parameters in bfloat16, rows of 2,048 tokens, for a GPU or TPU); EXTRA
# (flags of every benchmark, such as --sequential).
# Then: python -m benchmarks.render RESULTS.jsonl docs/performance.md
set -euo pipefail
results=${1:?usage: benchmarks/run_all.sh RESULTS.jsonl}
[[ $results = /* ]] || results=$PWD/$results
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
torch=${PEER_PYTHON-}
tunix=${TUNIX_PYTHON-}
read -r -a extra <<<"${EXTRA-}"
[[ -z ${MODEL-} ]] || extra+=(--model="$MODEL")

# peers NAME ...: the flags of those whose Python is given.
peers() {
  local name
  flags=()
  for name in "$@"; do
    if [[ $name = tunix && -n $tunix ]]; then
      flags+=(--peer=tunix --peer_python="tunix=$tunix")
    elif [[ $name != tunix && -n $torch ]]; then
      flags+=(--peer="$name" --peer_python="$name=$torch")
    fi
  done
}

# bench NAME FLAGS ...: one line more in the results; a failure does not end the others.
failed=()
bench() {
  local name=$1
  shift
  echo "$name $*" >&2
  if ! PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$python" -m "benchmarks.$name" \
    --repeats="${REPEATS:-5}" ${extra[@]+"${extra[@]}"} "$@" >>"$results"; then
    failed+=("$name")
  fi
}

if [[ -n ${ACCELERATOR-} ]]; then
  extra+=(--config=configs/llama32_1b.py --dtype=bfloat16 --logits_budget=1)
  remats=${REMAT:-dots}
  sft=(--batch=4 --length=2048) score=(--batch=8 --length=2048)
  rollout=(--batch=64 --prompt=256 --new=256) step=(--batch=64 --prompt=256 --new=256 --skew=64)
  skewed=(--batch=64 --prompt=256 --new=256 --skew=64 --slots=64 --skew_rows=256 --samples=4)
  slots=32
else
  remats=${REMAT:-dots full}
  sft=(--batch=4 --length=256 --logits_budget=0.125)
  score=(--batch=8 --length=192)
  rollout=(--batch=8 --prompt=64 --new=128) step=(--batch=16 --prompt=64 --new=64 --skew=16)
  skewed=(--batch=8 --prompt=64 --new=64 --skew=16 --slots=8 --skew_rows=32 --samples=4)
  slots=8
fi

peers torch trl tunix
for remat in $remats; do
  bench sft_step "${sft[@]}" --remat="$remat" ${flags[@]+"${flags[@]}"}
done
peers torch tunix
bench score "${score[@]}" ${flags[@]+"${flags[@]}"}
bench rollout "${rollout[@]}" ${flags[@]+"${flags[@]}"}
bench rollout "${skewed[@]}"
bench dpr_step "${step[@]}" --samples=4 --slots="$slots"
if [[ -n ${MODEL-} ]]; then
  peers lm_eval
  bench evaluate_speed ${DATA:+--data="$DATA"} ${flags[@]+"${flags[@]}"}
fi
if [[ -z ${ACCELERATOR-} ]]; then
  REPEATS=1 bench memory --what=sft,score,dpr --lengths=256,512 --batches=4,8 \
    --logits_budgets=0.25,1000 --lora_ranks=0,16 --remats=none,dots,full
  # Gemma's vocabulary of 262,144 has a shape of its own.
  REPEATS=1 bench memory --config=configs/gemma3_270m.py --model= --what=sft,score,dpr \
    --lengths=256 --batches=4 --lora_ranks=0,16
  bench scaling --devices=1,2,4 --axis=fsdp --batch=8 --length=128
fi

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
