#!/usr/bin/env bash
# What a GPU answers, in three parts of at most four minutes each, in order of value:
#
#   exact    kernels and graphs against torch operations, waves against plain decoding, also where passes have no room
#            for all lanes, captures of graphs
#   engine   waves against plain decoding at batch 1, 8 and 32, exits against full depth, at the shapes of Huginn and Ouro
#   served   lanes inside vLLM, compiled and in graphs, and over HTTP, there also beside waves
#
#   bench/gpu.sh [--tiny] OUT [PART...]     all three parts by default; --tiny: every line with a small model, on a CPU too
#
# Nothing but this folder's checkout is needed: models have random weights. Figures go to OUT/figures.jsonl one by one,
# OUT/figures.md is their table, and what could not run has a line that says why. PYTHON names the interpreter.
set -euo pipefail
tiny=0
if [ "${1:-}" = --tiny ]; then tiny=1; shift; fi
if [ $# = 0 ]; then echo "usage: bench/gpu.sh [--tiny] OUT [exact] [engine] [served]" >&2; exit 2; fi
mkdir -p "$1"
out=$(cd "$1" && pwd); shift
parts=${*:-exact engine served}
for part in $parts; do
  case $part in exact | engine | served) ;; *) echo "part $part: one of exact, engine, served" >&2; exit 2 ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
figures=$out/figures.jsonl

# run NAME FLAGS-OF-TINY MODULE ARGUMENTS...: a benchmark, for as long as its part has time. FLAGS-OF-TINY come last.
run() {
  local name=$1 small=$2 module=$3 left=$((ends - SECONDS))
  shift 3
  [ $tiny = 1 ] || small=
  # shellcheck disable=SC2086
  "$python" -m bench.figures run --seconds $left "$figures" "$name" "$python" -m "bench.$module" "$@" $small || true
}

exact() {
  run exact "--shape tiny --requests 2 --tokens 8" exact --shape small --requests 16 --tokens 640
  run exact-crowded "--shape tiny --requests 2 --tokens 8 --width 4 --budget 4" \
    exact --shape small --requests 16 --tokens 128 --policy per-depth --width 8 --budget 48
  run graphs "--rows 4 --mixes 6 --hidden 64 --layers 4 --vocabulary 512" graphs --rows 256 --mixes 680
  run exact-huginn "--shape tiny --requests 2 --tokens 8" exact --shape huginn-3.5b --requests 4 --tokens 64
}

engine() {
  local small="--shape tiny --batch 2 --resident 2 --tokens 6 --pairs 1 --passes-per-step 4"
  local wave="--shape tiny --recurrences 4 --batch 2 --profile mid --every auto --tokens 6 --pairs 1 --no-compile"
  local waves=(--batch 1,8,32 --profile mid,easy --tokens 32 --pairs 3 --compile)
  run waves-huginn "$wave" waves --shape huginn-3.5b "${waves[@]}" --every auto,2
  run waves-ouro "$wave" waves --shape ouro-1.4b "${waves[@]}" --every auto,1
  run ouro "$small" engine --shape ouro-1.4b --batch 16 --resident 48 --policy last-exited --compile --pairs 3
  run huginn "$small --no-compile" engine --shape huginn-3.5b --batch 16 --resident 64 --tokens 32 --policy last-exited --compile --pairs 1
}

served() {
  local small="--pairs 1 --requests 2"
  run vllm-compiled "$small" serve offline --pairs 3
  run vllm-http "--pairs 1 --clients 2 --each 1" serve http --pairs 3
  run vllm-waves "--pairs 1 --clients 2 --each 1" serve http --waves 0.25 --pairs 3 --seconds 5
  run vllm-eager "$small" serve offline --pairs 3 --eager
}

"$python" -m bench.figures device "$figures"
for part in $parts; do
  ends=$((SECONDS + 240))
  $part
done
"$python" -m bench.figures table "$figures" | tee "$out/figures.md"
