#!/usr/bin/env bash
# What to measure in ten minutes on one GPU, offline. The most telling comes first, and each step
# writes its results when it ends.
#
#     DATA_DIR=DIR [OUT=runs/gpu] [SECONDS_IN_ALL=560] [JOBS=4] [EPOCHS=40] [PYTHON=python] \
#       bash experiments/paper/gpu.sh
#     SMALL=1 bash experiments/paper/gpu.sh     # tries the script: digits, tiny models
#
# DATA_DIR has cifar10 as TFDS prepares it. Training takes JOBS runs at a time, so that one compiles
# (a minute) while others learn; more only share the GPU. (On an H100, LG-FG-A+ takes 1.0 s per epoch
# alone and 5.1 s among four; on an H200, four runs of 40 epochs take four minutes.) The step times
# are measured at the end, alone; they are compiled beside the training. When the seconds are up,
# runs save their state and end. Run again with the same OUT, what is done stays, and training goes
# on where it stopped.
set -u
cd "$(dirname "$0")/../.." || exit
out=${OUT:-runs/gpu} python=${PYTHON:-python} epochs=${EPOCHS:-40} in_all=${SECONDS_IN_ALL:-560}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} MPLBACKEND=agg CI=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/cache}
if [ -n "${SMALL:-}" ]; then
  model=S/2/4 batch=64 repetitions=2 epochs=2 few=2
  training=(--config.dataset=digits --config.model.size=S/2/4)
  accuracy=(--config.dataset=digits --config.model.size=S/2/4 --thresholds=60,40)
  figures=(--config.dataset=digits --images=256 --epochs=1) groups=1 alone=0
else
  : "${DATA_DIR:?names the folder of TFDS data sets}"
  export TFDS_DATA_DIR=$DATA_DIR
  model=L/8/64 batch=512 repetitions=20 few=10
  training=(--config.steps_per_dispatch=100 --config.checkpoint_every=10)
  accuracy=(--max_epochs=10) figures=() groups='2 8 32 1 4 16 64' alone=70
fi
training_ends=$((in_all - alone))
mkdir -p "$out"

step() {    # NAME LIMIT COMMAND…
  local name=$1 limit=$2 begin=$SECONDS left=$((in_all - SECONDS)) code
  shift 2
  [ -e "$out/$name.done" ] && return
  [ "$left" -lt "$limit" ] && limit=$left
  [ "$limit" -lt 5 ] && return
  timeout --signal=TERM --kill-after=15 "$limit" "$python" "$@" > "$out/$name.log" 2>&1
  code=$?
  printf '%s: exit code %s, %s s: python %s\n' "$name" "$code" $((SECONDS - begin)) "$*" |
    tee -a "$out/steps.log"
  tail -n 6 "$out/$name.log"
  if [ "$code" = 0 ]; then touch "$out/$name.done"; rm -f "$out/$name.failed"
  else touch "$out/$name.failed"; fi
}

speed() {    # NAME LIMIT PRECISION REPETITIONS
  step "$1" "$2" experiments/bench/step_time.py --model="$model" --batch="$batch" \
    --precision="$3" --algorithms=BP,LG-FG-A+ --repetitions="$4" --out="$out/$1"
}

reproduce() {    # NAME STUDY OPTIONS…
  local name=$1
  shift
  step "$name" $((training_ends - SECONDS)) experiments/paper/reproduce.py "$@"
}

errors() {    # NAME RULES EPOCHS FIELDS…
  local name=$1 rules=$2 number=$3
  shift 3
  reproduce "$name-$rules" cifar10-M-8-16 --rules="$rules" --epochs="$number" "${training[@]}" "$@" \
    --out="$out/$name"
}

figure() {    # NUMBER RULE [GROUPS]
  local groups=${3:+--groups=$3}
  reproduce "figure$1-$2$groups" "figure$1" --rules="$2" "${figures[@]}" \
    --config.steps_per_dispatch=20 $groups --out="$out/figure$1"
}

adamw() {    # DECAY
  echo --config.optimizer.name=adamw --config.optimizer.weight_decay="$1"
}

together() {    # reads commands, and runs JOBS of them at a time, the first ones first
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  local command
  while read -r command; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-4}" ]; do wait -n; done
    eval "$command" &
    sleep 4    # two that begin a folder at the same moment could take each other for strangers
  done
  wait
}

moved='--config.augment.shift=4 --config.augment.flip=True'
together <<END
speed compiled 400 tensorfloat32 1
errors decay-1 LG-FG-A+ $epochs $(adamw 1)
errors ahead LG-FG-A+ $epochs $(adamw 1) --config.losses.head_ahead=True
errors moved LG-FG-A+ $epochs $(adamw 1) --config.losses.head_ahead=True $moved
errors decay-1 LG-BP $epochs $(adamw 1)
errors decay-1 BP $epochs $(adamw 1)
errors decay-1 LG-FG-A $epochs $(adamw 1)
$(for number in $groups; do
  echo "figure 7 LG-FG-A+ $number"
  echo "figure 7 LG-FG-A $number"
done)
$(for rule in L-BP LG-FA LG-FG-W FG-A FG-W L-FA FA DFA; do echo "errors others $rule $few"; done)
figure 6 LG-FG-A+
figure 6 LG-FG-A
END
speed step_time_tensorfloat32 200 tensorfloat32 "$repetitions"
speed step_time_bfloat16 200 bfloat16 "$repetitions"
step time_to_accuracy 300 experiments/bench/time_to_accuracy.py --config=configs/cifar10.py --seeds=0 \
  "${accuracy[@]}" --config.steps_per_dispatch=100 --out="$out/time_to_accuracy"
! ls "$out"/*.failed 2> /dev/null
