#!/usr/bin/env bash
# From nothing to a trained model: install, prepare the embedded corpus, train in a hybrid layout, export, evaluate, sample, draw.
#   bash launch/quickstart.sh [key=value ...]        overrides of the training run, e.g. train.steps=50
# Uses NVIDIA GPUs if there are any, else four processes on the CPU. The same command again continues the run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh"
export PATH="$root/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=true

run=runs/quickstart
for argument in "$@"; do
    case $argument in run.dir=*) run=${argument#run.dir=} ;; esac
done

# Two pipeline stages times data ranks; a model this small gains nothing from more than four GPUs.
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
processes=4
layout=()
if [ "$gpus" -ge 1 ] && [ "$gpus" -lt 4 ]; then processes=$((gpus == 1 ? 1 : 2)); fi
if [ "$processes" -eq 1 ]; then layout=(parallel=single); fi
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
threads=$((cores / processes > 0 ? cores / processes : 1))

set -- experiment=quickstart ${layout[@]+"${layout[@]}"} "run.dir=$run" "$@"
prepare=()
for argument in "$@"; do
    case $argument in experiment=* | data=* | data.*) prepare+=("$argument") ;; esac
done
hybridtrain prepare "${prepare[@]}"
OMP_NUM_THREADS=$threads torchrun --standalone --nproc-per-node "$processes" -m hybridtrain.train "$@"
hybridtrain export "$run"
hybridtrain evaluate "$run"
sample=$(hybridtrain generate "$run")
hybridtrain report "$run"

python - "$run" "$sample" <<'PYTHON'
import json, pathlib, sys

run, sample = pathlib.Path(sys.argv[1]), sys.argv[2]
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
print(f"\nsample of the exported model\n{sample}\n")
print(f"run directory  {run.resolve()}")
print(f"loss           {rows[0]['loss']:.3f} at the start, {rows[-1]['loss']:.3f} at the end" + (f", {rows[-1]['eval_loss']:.3f} on held-out text" if rows[-1].get("eval_loss") else ""))
print(f"export         {(run / 'export').resolve()}")
print(f"loss curve     {(run / 'report' / 'loss.png').resolve()}")
print(f"page           {(run / 'report' / 'index.html').resolve()}")
PYTHON
