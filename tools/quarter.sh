#!/usr/bin/env bash
# The table "A quarter of CIFAR-100" of docs/RESULTS.md: makes the subset by links, trains, compares.
#   tools/quarter.sh CIFAR100 WORK [SEED ...]     CIFAR100: the images as train/CLASS/* and test/CLASS/*
#   EPOCHS=96 METHODS="independent deep-supervision lmcl" tools/quarter.sh CIFAR100 WORK 0
# Runs go one after the other, on one core each; start it twice with other seeds for two cores. A run that was
# interrupted goes on, a finished one takes seconds. FLAGS="--amp bf16" where the CPU has bfloat16 instructions.
set -euo pipefail
[ -d "$1/train" ] && [ -d "$1/test" ] || { echo "$0: no folder $1/train or $1/test" >&2; exit 2; }
mkdir -p "$2"
images=$(realpath "$1") work=$(realpath "$2"); shift 2
seeds=${*:-0 1 2} epochs=${EPOCHS:-24} methods=${METHODS:-independent dml mcl deep-supervision lmcl lmcl-uniform}
cd "$(dirname "$0")/.."
LC_ALL=C                                                   # the order of file names
for class in "$images"/train/*/; do
  files=("$class"*) links="$work/quarter/train/$(basename "$class")"
  mkdir -p "$links"
  ln -sf "${files[@]:0:125}" "$links"
done
ln -sfn "$images/test" "$work/quarter/test"
export OMP_NUM_THREADS=1
for seed in $seeds; do
  for method in $methods; do
    name=${method%-uniform} name=${name%-moving} name=${name%-nocontrast}
    case $method in
      lmcl-uniform) more="--matching uniform" ;;
      lmcl-moving) more="--virtual-lambda moving" ;;
      lmcl-nocontrast) more="--contrast-start $epochs" ;;      # never
      *) more="" ;;
    esac
    # shellcheck disable=SC2086
    python train.py --dataset folder --data-dir "$work/quarter" --arch resnet20 --num-nets 2 --epochs "$epochs" \
      --seed "$seed" --method "$name" $more --save-every 10 --resume ${FLAGS:-} \
      --out-dir "$work/epochs-$epochs/$method-$seed"
  done
done
python compare.py "$work/epochs-$epochs"/* --curves "$work/curves-$epochs.png"
