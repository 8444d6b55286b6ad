#!/usr/bin/env bash
# What to measure in ten minutes on one GPU, offline. The most telling comes first, and each step
# writes its results when it ends.
#
#     DATA_DIR=DIR [OUT=runs/gpu] [PYTHON=python] [EPOCHS=30] bash experiments/paper/gpu.sh
#     SMALL=1 bash experiments/paper/gpu.sh     # tries the script: digits, tiny models, two minutes
#
# DATA_DIR has cifar10 as TFDS prepares it. A step that hangs is ended at its limit, and the next one
# begins. Run again with the same OUT, training goes on where it stopped.
set -u
cd "$(dirname "$0")/../.." || exit
out=${OUT:-runs/gpu} python=${PYTHON:-python} epochs=${EPOCHS:-30}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} MPLBACKEND=agg CI=1
if [ -n "${SMALL:-}" ]; then
  model=S/2/4 batch=64 repetitions=2
  training=(--epochs=2 --config.dataset=digits --config.model.size=S/2/4)
else
  : "${DATA_DIR:?names the folder of TFDS data sets}"
  export TFDS_DATA_DIR=$DATA_DIR
  model=L/8/64 batch=512 repetitions=20
  training=(--epochs="$epochs" --config.batch_size=256 --config.steps_per_dispatch=20)
fi
mkdir -p "$out"
failed=0

step() {    # NAME LIMIT COMMAND…
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  timeout --signal=TERM --kill-after=10 "$limit" "$python" "$@" > "$out/$name.log" 2>&1
  code=$?
  [ "$code" = 0 ] || failed=1
  printf '%s: exit code %s, %s s: python %s\n' "$name" "$code" $((SECONDS - begin)) "$*" |
    tee -a "$out/steps.log"
  tail -n 25 "$out/$name.log"
}

speed() {    # PRECISION LIMIT
  step "step_time_$1" "$2" experiments/step_time.py --model="$model" --batch="$batch" \
    --precision="$1" --algorithms=BP,LG-FG-A-paper,LG-FG-A --repetitions="$repetitions" \
    --out="$out/step_time_$1"
}

errors() {    # RULE LIMIT
  step "cifar10_$1" "$2" experiments/paper/reproduce.py cifar10-M-8-16 --rules="$1" \
    "${training[@]}" --out="$out/cifar10-M-8-16"
}

speed bfloat16 110
speed tensorfloat32 100
errors LG-FG-A 120
errors BP 80
errors LG-BP 80
errors LG-FG-A-paper 90
exit "$failed"
