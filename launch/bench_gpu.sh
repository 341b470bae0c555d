#!/usr/bin/env bash
# The benchmark of an NVIDIA machine, in one command of at most 10 minutes.
#   bash launch/bench_gpu.sh [--formats] [--rehearse] [--minutes M] [FOLDER] [key=value ...]
# FOLDER: where results go (default: bench-gpu); overrides hold for the parts on two GPUs.
#
# What it measures, in this order, each part within a time of its own:
#   headline     a 1.1-billion-parameter Llama, bf16_mixed, rows of 2048 tokens, one GPU: ours and a plain PyTorch loop, compiled and eager; 8 rows at once
#   trainer      the same work by the Hugging Face Trainer, eager and compiled
#   variants     packed documents, rows of 4096 tokens, selective recomputation, bf16_pure
#   zero3 tp2 pp2    compiled, on two GPUs each, where there are two
#   tests        tests/gpu: parity with the plain process on the GPU, compilation, memory (where pytest is installed)
# --formats measures instead:
#   formats      bf16_mixed, fp16_mixed and fp8, rows of 2048 and of 4096 tokens, compiled; beside them a plain loop, and one with torchao's fp8
#                (where torchao is installed, or in the folder TORCHAO=FOLDER); all are compiled first, several at once, on models of two layers
#   monitor      what precision.monitor_every=50 adds to a step
#   tests        as above
# For each: tokens/s, model FLOPs utilisation (of 989 TFLOP/s on H100 and H200), memory, lines that wait for the device.
#
# FOLDER gets cases.jsonl (a line for each case as soon as it is measured), <part>.json and <part>.log, table.md, and all of it as results.tar.gz.
# A part that fails or runs out of time is a row that says so.
# Needs torch, transformers, accelerate and PyYAML, for two GPUs and the tests hydra-core too; not this project installed. PYTHON=... chooses the interpreter.
# --rehearse runs every part on the CPU with a model of a few thousand parameters: it shows that the script works, not how fast anything is.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

rehearse=
formats=
minutes=9.2
folder=bench-gpu
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --rehearse) rehearse=yes ;;
        --formats) formats=yes ;;
        --minutes) minutes=${2:?--minutes wants a number}; shift ;;
        -*) echo "bench_gpu.sh: no flag $1; allowed: --formats, --rehearse, --minutes M, --help" >&2; exit 2 ;;
        *=*) overrides+=("$1") ;;
        *) folder=$1 ;;
    esac
    shift
done
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || command -v python3)}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR="$folder/inductor" PYTORCH_ALLOC_CONF=expandable_segments:True
has() { "$python" -c "import $1" 2>/dev/null; }
for module in torch transformers accelerate yaml; do
    has "$module" || { echo "bench_gpu.sh: $python has no $module; install it, or name the folder that has it: PYTHONPATH=FOLDER" >&2; exit 2; }
done

if [ -n "$rehearse" ]; then
    export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
    gpus=2  # processes
    work=(model=tiny data.seq_len=32 bench.warmup=1 bench.steps=1 bench.rounds=2 engine.compile_backend=eager)
else
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 2
    [ "$gpus" -ge 1 ] || { echo "bench_gpu.sh: torch sees no NVIDIA GPU here; --rehearse runs on the CPU" >&2; exit 2; }
    work=(model=llama_1_1b data.seq_len=2048 bench.warmup=2 bench.steps=3 bench.rounds=6)
fi
work+=(precision=bf16_mixed batch.global_batch_size=16 batch.micro_batch_size=4 engine.compile=true bench.plain=false)
end=$(($(date +%s) + $("$python" -c "print(round(60 * $minutes))")))
cd "$root" || exit 2
rm -rf "$folder"/{cases.jsonl,missed.txt,results.tar.gz,table.md}

failed=0
part() { # NAME SECONDS COMMAND...: run it within SECONDS, or what is left of the whole
    local name=$1 limit=$2 left rc
    shift 2
    left=$((end - $(date +%s)))
    limit=$((limit < left ? limit : left))
    rm -f "$folder/$name.json"
    if [ "$limit" -lt 5 ]; then echo "== $name: no time left" | tee "$folder/$name.log"; echo "$name: no time left" >>"$folder/missed.txt"; failed=1; return; fi
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
    rc=${PIPESTATUS[0]}
    [ "$rc" -eq 0 ] && return
    failed=1
    echo "$name: $([ "$rc" -ge 124 ] && [ "$rc" -ne 125 ] && echo "out of time" || echo "failed") (exit code $rc), see $name.log" | tee -a "$folder/missed.txt"
}
cases() { # NAME SECONDS CASE...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" launch/bench_cases.py ${rehearse:+--tiny} --out "$folder/cases.jsonl" "$@"
}

warm() { "$python" launch/bench_cases.py ${rehearse:+--tiny} --warm "$@" >>"$folder/warm.log" 2>&1; }
tests() { # SECONDS
    if has hydra && has pytest && [ -z "$rehearse" ]; then
        part tests "$1" "$python" -m pytest -q -o addopts= -m gpu -p no:cacheprovider tests/gpu
    else
        echo "tests: left out, no pytest or hydra-core, or a rehearsal" | tee -a "$folder/missed.txt"
    fi
}
two_gpus() {
    if ! has hydra || [ "$gpus" -lt 2 ]; then
        echo "two GPUs: left out, no hydra-core or one GPU" | tee -a "$folder/missed.txt"
        return
    fi
    local layout shape
    for layout in zero3 tp2 pp2; do
        if [ "$layout" = zero3 ]; then shape=(parallel=zero3 parallel.dp_shard=2); else shape=("parallel=$layout" parallel.dp_replicate=1); fi
        part "$layout" 90 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m hybridtrain.bench \
            "${work[@]}" "${shape[@]}" ${overrides[@]+"${overrides[@]}"} "bench.out=$folder/$layout.json"
    done
}

if [ -n "$formats" ]; then
    fp8=(fp8-tensorwise fp8-rowwise fp8-tensorwise-4096 fp8-rowwise-4096)
    bf16=(compiled rows-of-4096 fp16 plain-compiled)
    torchao=(torchao-tensorwise torchao-rowwise)
    export PYTHONPATH="$PYTHONPATH${TORCHAO:+:$TORCHAO}"
    has torchao || { torchao=(); echo "torchao: left out, not installed" | tee -a "$folder/missed.txt"; }
    warm "${fp8[@]}" &
    warm "${bf16[@]}" ${torchao[@]+"${torchao[@]}"} &
    wait
    cases formats 300 compiled fp8-tensorwise fp8-rowwise plain-compiled ${torchao[@]+"${torchao[@]}"} fp16 rows-of-4096 fp8-tensorwise-4096 fp8-rowwise-4096
    has hydra && part monitor 90 "$python" -m hybridtrain.bench "${work[@]}" bench.rounds=3 precision.monitor_every=50 "bench.out=$folder/monitor.json"
    tests 200
else
    cases headline 230 compiled plain-compiled eager plain compiled-8-rows
    cases trainer 160 trainer trainer-compiled
    cases variants 170 packed rows-of-4096 selective bf16-pure
    two_gpus
    tests 600
fi

"$python" - "$folder" <<'PYTHON' | tee "$folder/table.md"
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
cases = folder / "cases.jsonl"
rows = [json.loads(line) for line in cases.read_text().splitlines()] if cases.is_file() else []
print("| case | rows at once | step s | tokens/s per GPU | MFU | attention counted whole | peak GiB | reserved | lines that wait | host s |")
print("|---|---|---|---|---|---|---|---|---|---|")
machine = "nothing was measured"


def known(row, key, form):
    return format(row[key], form) if row.get(key) is not None else "-"


for row in rows:
    machine = f"{row['device']}, torch {row['torch']}"
    if "error" in row:
        print(f"| {row['case']} | {row['error']} | | | | | | | | |")
        continue
    waits = str(len(row["syncs"])) if "syncs" in row else "-"
    some = [known(row, "mfu", ".1%"), known(row, "mfu_whole_attention", ".1%"), known(row, "peak_gib", ".1f"), known(row, "reserved_gib", ".1f")]
    print(f"| {row['case']} | {row['rows']} | {row['step_s']:.4f} | {row['tokens_per_s']:,.0f} | {' | '.join(some)} | {waits} | {known(row, 'host_s', '.3f')} |")
for name in ("zero3", "tp2", "pp2"):
    file = folder / f"{name}.json"
    for side, row in json.loads(file.read_text())["sides"].items() if file.is_file() else ():
        told = f"{row['step_s']:.4f} | {row['tokens_per_s_per_device']:,.0f} | {known(row, 'mfu', '.1%')} | - | {row['memory_gib_max']:.1f}"
        print(f"| {name}: {side} | 4 | {told} | - | - | - |")
missed = folder / "missed.txt"
print("\n" + (missed.read_text() if missed.is_file() else "") + machine)
sys.exit(any("error" in row for row in rows))
PYTHON
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
tar czf "$folder/results.tar.gz" -C "$folder" --exclude=inductor --exclude=results.tar.gz . && echo "results: $folder, and in one file $folder/results.tar.gz"
exit "$failed"
