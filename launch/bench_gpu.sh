#!/usr/bin/env bash
# The benchmark of an NVIDIA machine, in one command of at most 10 minutes.
#   bash launch/bench_gpu.sh [--rehearse] [--minutes M] [FOLDER] [key=value ...]
# FOLDER: where results go (default: bench-gpu); overrides hold for every part.
#
# What it measures, in this order, each part within a time of its own:
#   tests        tests/gpu: parity with the plain process on the GPU, compilation, memory (where pytest is installed)
#   plain        a 1.1-billion-parameter Llama, bf16_mixed, rows of 2048 tokens, one GPU, beside a plain PyTorch loop
#   compiled     the same, both sides compiled per layer
#   parts        compiled, 8 rows at once: the fastest setting known, and the kernels that take longest
#   selective    compiled, recompute=selective: what less memory costs
#   zero3 tp2 pp2    compiled, on two GPUs each, where there are two
# For each: tokens/s, model FLOPs utilisation (of 989 TFLOP/s on H100 and H200), peak memory, the ratio to the plain loop with its interval.
#
# FOLDER gets <part>.json (every step's time), <part>.log and table.md. A part that fails or runs out of time is a row that says so.
# Needs torch, transformers, accelerate, safetensors, tokenizers, numpy and hydra-core; not this project installed. PYTHON=... chooses the interpreter.
# --rehearse runs every part on the CPU with a model of a few thousand parameters: it shows that the script works, not how fast anything is.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

rehearse=
minutes=9.7
folder=bench-gpu
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --rehearse) rehearse=yes ;;
        --minutes) minutes=${2:?--minutes wants a number}; shift ;;
        -*) echo "bench_gpu.sh: no flag $1; allowed: --rehearse, --minutes M, --help" >&2; exit 2 ;;
        *=*) overrides+=("$1") ;;
        *) folder=$1 ;;
    esac
    shift
done
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || command -v python3)}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ -n "$rehearse" ]; then
    export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
    gpus=2  # processes
    work=(model=tiny data.seq_len=32 bench.warmup=1 bench.steps=1 bench.rounds=2 engine.compile_backend=eager)
    rows=2 many=4
else
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 2
    [ "$gpus" -ge 1 ] || { echo "bench_gpu.sh: torch sees no NVIDIA GPU here; --rehearse runs on the CPU" >&2; exit 2; }
    work=(model=llama_1_1b data.seq_len=2048 bench.warmup=3 bench.steps=4 bench.rounds=9)
    rows=4 many=8  # rows at once: beside the plain loop on one GPU, and alone
fi
work+=(precision=bf16_mixed batch.global_batch_size=16)
end=$(($(date +%s) + $("$python" -c "print(round(60 * $minutes))")))
cd "$root" || exit 2

failed=0
part() { # NAME SECONDS COMMAND...: run it within SECONDS, or what is left of the whole
    local name=$1 limit=$2 left rc
    shift 2
    left=$((end - $(date +%s)))
    limit=$((limit < left ? limit : left))
    rm -f "$folder/$name.json" "$folder/$name.rc"
    if [ "$limit" -lt 5 ]; then echo "== $name: no time left" | tee "$folder/$name.log"; echo "no time left" >"$folder/$name.rc"; failed=1; return; fi
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
    rc=${PIPESTATUS[0]}
    [ "$rc" -eq 0 ] || { failed=1; echo "== $name: $([ "$rc" -ge 124 ] && [ "$rc" -ne 125 ] && echo "out of time" || echo "failed") (exit code $rc)"; }
    echo "$rc" >"$folder/$name.rc"
}
bench() { # NAME SECONDS PROCESSES OVERRIDES...
    local name=$1 limit=$2 processes=$3
    shift 3
    if [ "$processes" -eq 1 ]; then set -- "$python" -m hybridtrain.bench "${work[@]}" "$@" ${overrides[@]+"${overrides[@]}"}; else
        set -- "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m hybridtrain.bench "${work[@]}" "$@" ${overrides[@]+"${overrides[@]}"}
    fi
    part "$name" "$limit" "$@" "bench.out=$folder/$name.json"
}

if "$python" -c 'import pytest' 2>/dev/null; then
    part tests 170 "$python" -m pytest -q -o addopts= -m gpu -p no:cacheprovider tests/gpu
else
    echo "== tests: pytest is not installed, tests/gpu is left out"
fi
bench plain 100 1 "batch.micro_batch_size=$rows"
bench compiled 140 1 "batch.micro_batch_size=$rows" engine.compile=true
bench parts 90 1 "batch.micro_batch_size=$many" engine.compile=true bench.plain=false bench.parts=true
bench selective 90 1 "batch.micro_batch_size=$many" engine.compile=true recompute=selective bench.plain=false
if [ "$gpus" -ge 2 ]; then
    for layout in zero3 tp2 pp2; do
        if [ "$layout" = zero3 ]; then shape=(parallel=zero3 parallel.dp_shard=2); else shape=("parallel=$layout" parallel.dp_replicate=1); fi
        bench "$layout" 90 2 "${shape[@]}" "batch.micro_batch_size=$rows" engine.compile=true bench.plain=false
    done
fi

"$python" - "$folder" <<'PYTHON' | tee "$folder/table.md"
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
print("| part | side | rows at once | step s | tokens/s per GPU | MFU | peak GiB | against the plain loop |")
print("|---|---|---|---|---|---|---|---|")
machine = ""
for name in ("plain", "compiled", "parts", "selective", "zero3", "tp2", "pp2"):
    file, code = folder / f"{name}.json", folder / f"{name}.rc"
    if not file.is_file() or not file.stat().st_size:
        if code.is_file():
            why = {"no time left": "no time left", "124": "out of time", "137": "out of time"}.get(code.read_text().strip(), "failed")
            print(f"| {name} | {why}: see {name}.log | | | | | | |")
        continue
    told = json.loads(file.read_text())
    host = told["machine"][0]
    machine = f"{host['gpus']} x {host['gpu']}" if host["gpu"] else f"{host['cores']} cores of {host['cpu']}"
    machine += f", torch {told['versions']['torch']}, transformers {told['versions']['transformers']}"
    for number, (side, known) in enumerate(told["sides"].items()):
        mfu = "-" if known["mfu"] is None else f"{known['mfu']:.1%}"
        ratio = told.get("ratio")
        against = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio and number == 0 else ""
        rows = told["config"]["batch"]["micro_batch_size"]
        print(f"| {name} | {side} | {rows} | {known['step_s']:.4f} | {known['tokens_per_s_per_device']:,.0f} | {mfu} | {known['memory_gib_max']:.1f} | {against} |")
print(f"\n{machine or 'nothing was measured'}")
PYTHON
echo "results: $folder"
exit "$failed"
