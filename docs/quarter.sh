#!/usr/bin/env bash
# The table "A quarter of CIFAR-100" of docs/RESULTS.md: makes the subset by links, trains, compares.
#   docs/quarter.sh CIFAR100 WORK [SEED ...]     CIFAR100: the images as train/CLASS/* and test/CLASS/*
# Runs go one after the other, on one core each; start it twice with other seeds for two cores. A run that was
# interrupted goes on, a finished one takes seconds. FLAGS="--amp bf16" where the CPU has bfloat16 instructions.
set -euo pipefail
images=$(realpath "$1") work=$2; shift 2
seeds=${*:-0 1 2}
cd "$(dirname "$0")/.."
mkdir -p "$work/quarter/train"
[ -e "$work/quarter/test" ] || ln -s "$images/test" "$work/quarter/test"
for class in "$images"/train/*/; do
  name=$(basename "$class")
  [ -e "$work/quarter/train/$name" ] && continue
  mkdir "$work/quarter/train/$name"
  ls "$class" | LC_ALL=C sort | sed -n 1,125p | while read -r file; do ln -s "$class$file" "$work/quarter/train/$name/$file"; done
done
export OMP_NUM_THREADS=1
for seed in $seeds; do
  for method in independent dml mcl deep-supervision lmcl lmcl-uniform; do
    uniform=""; [ "$method" = lmcl-uniform ] && uniform="--matching uniform"
    # shellcheck disable=SC2086
    python train.py --dataset folder --data-dir "$work/quarter" --arch resnet20 --num-nets 2 --epochs 24 --seed "$seed" \
      --method "${method%-uniform}" $uniform --save-every 10 --resume --out-dir "$work/runs/$method-$seed" ${FLAGS:-}
  done
done
python compare.py "$work"/runs/* --curves "$work/curves.png"
