#!/usr/bin/env bash
# Make .venv complete: Python, the pinned packages of constraints.txt and this project (editable).
#   bash launch/setup.sh           training, TensorBoard and wandb, reports, the readers of Parquet and of Hugging Face datasets
#   bash launch/setup.sh all       every optional part: DeepSpeed too
#   bash launch/setup.sh test      and what the tests need
# PYTHON=/path/to/python3 chooses the interpreter. Quick when there is nothing to do.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
extra=${1:-}
case $extra in
    "") parts=data,report,trackers stamps="run all test" ;;
    all) parts=all stamps="all test" ;;
    test) parts=all,test stamps="test" ;;
    *) echo "setup.sh: unknown part '$extra'; allowed: nothing, all, test" >&2; exit 2 ;;
esac

# A stamp says what is installed. `test` includes `all`, which includes what stands without a name: `stamps` are those that do.
key=$(cat pyproject.toml constraints.txt | cksum)
stamp=.venv/.complete
for name in $stamps; do
    if [ -f "$stamp-$name" ] && [ "$(cat "$stamp-$name")" = "$key $root" ]; then exit 0; fi
done

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup.sh: no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python3 bash launch/setup.sh" >&2
    return 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "setup: .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || { echo "setup.sh: $python has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
fi

# torch first and alone: a resolver that is free to choose tries other versions, gigabytes each.
export PIP_CONSTRAINT="$root/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { .venv/bin/python -m pip install --quiet --progress-bar off "$@"; }
echo "setup: torch (minutes when it has to be downloaded)"
pip "$(grep '^torch==' constraints.txt)"
echo "setup: the other packages and the project, with $parts"
pip --editable ".[$parts]"
echo "$key $root" >"$stamp-${extra:-run}"
