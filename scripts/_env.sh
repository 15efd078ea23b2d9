# Sourced by the other scripts: the environment, and runs that can be resumed.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_VERSION=$(sed -n "s/^torch==//p" "$ROOT/constraints.txt")

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $1"
    exit "${2:-1}"
}

# stage NAME COMMAND...: run a command, and log its name and duration.
STAGES=()
stage() {
    local name=$1 started=$SECONDS
    shift
    say "== $name"
    "$@"
    STAGES+=("$(printf '%5d s  %s' $((SECONDS - started)) "$name")")
    say "== $name: $((SECONDS - started)) s"
}

print_stages() { printf '%s\n' "${STAGES[@]}" "$(printf '%5d s  %s' "$SECONDS" 'in all')"; }

# Find a Python that can make the environment: your own `python3` before any other.
find_python() {
    local candidate
    for candidate in "${QLORA_PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c \
            'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 to 3.13 with the module venv was found; QLORA_PYTHON can name one"
}

has_accelerator() {
    [[ $(uname -s) == Darwin || -e /dev/nvidia0 || -e /dev/kfd ]] || nvidia-smi -L >/dev/null 2>&1
}

# install_cpu_torch [ENVIRONMENT]: install torch's CPU build, a tenth of the size of the ordinary one.
install_cpu_torch() {
    local python=${1:-.venv}/bin/python
    if [[ -n ${QLORA_TORCH_INDEX:-} ]]; then
        PIP_INDEX_URL=$QLORA_TORCH_INDEX "$python" -m pip install -qq "torch==$TORCH_VERSION"
        return
    fi
    say "no accelerator: QLORA_TORCH_INDEX can name a package index with CPU builds of torch"
    # An exact version lets pip take a CPU build from wherever pip is configured to look.
    "$python" -m pip install -qq "torch==$TORCH_VERSION"
}

# check_card: stop if this machine has a card that the installed torch cannot use.
check_card() {
    .venv/bin/python -c '
import sys
from qlora_cli.distributed.world import World
from qlora_cli.errors import QloraError
try:
    print("device:", World().summary(), file=sys.stderr)
except QloraError as error:
    sys.exit(f"error: {error}\nhint: {error.hint}")'
}

# make_environment EXTRA: make .venv with the project and the versions in constraints.txt, unless it
# is there (EXTRA: "" or "dev").
make_environment() {
    local extra=$1 wanted stamp
    stamp=.venv/installed${extra:+-$extra}
    wanted=$(cat pyproject.toml constraints.txt scripts/_env.sh)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        say ".venv: already there"
        return
    fi
    if [[ ! -x .venv/bin/python ]]; then
        local python
        python=$(find_python)
        say ".venv: made with $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
        "$python" -m venv .venv
    fi
    say "installing; the first time this takes some minutes"
    has_accelerator || install_cpu_torch
    .venv/bin/python -m pip install -qq --constraint constraints.txt \
        --editable ".${extra:+[$extra]}"
    check_card
    printf '%s\n' "$wanted" >"$stamp"
}

# Find the command of this checkout if it has an environment, else the one on the path.
find_qlora() {
    if [[ -x $ROOT/.venv/bin/qlora ]]; then
        PATH=$ROOT/.venv/bin:$PATH
    fi
    command -v qlora >/dev/null || die "no command qlora: make the environment first" 127
}

json_value() { python -c 'import json, sys; d = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    d = d[key]
print("" if d is None else d)' "$1"; }

# train_once RUN RECIPE...: train unless RUN is finished; resume it if it was interrupted.
train_once() {
    local run=$1
    shift
    if [[ ! -f $run/run.json ]]; then
        qlora train "$@"
    elif [[ $(json_value status <"$run/run.json") == finished ]]; then
        say "$run: already trained"
    elif compgen -G "$run/checkpoints/step-*" >/dev/null; then
        say "$run: was interrupted; resuming"
        qlora train "$@" --resume auto
    else
        local aside
        aside=$run.interrupted-$(date +%Y%m%d-%H%M%S)
        say "$run: was interrupted before its first checkpoint; moved to $aside"
        mv "$run" "$aside"
        qlora train "$@"
    fi
}

# eval_once FILE COMMAND...: write the command's JSON to FILE unless it is there.
eval_once() {
    local file=$1
    shift
    if [[ -f $file ]]; then
        say "$file: already there"
        return
    fi
    "$@" --json >"$file.unfinished"
    mv "$file.unfinished" "$file"
}

# merge_once RUN: write RUN/merged unless it is there.
merge_once() {
    if [[ -d $1/merged ]]; then
        say "$1/merged: already there"
        return
    fi
    qlora merge "$1" --output "$1/merged"
}
