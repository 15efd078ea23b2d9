#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/gpu_check.sh

Verifies on a CUDA card what could not be verified on a CPU: the 4-bit and 8-bit kernels against plain
matmuls, gradients with and without checkpointing and offload, varlen attention, paged optimizers,
training in bf16 and fp16, evaluation, resuming and merging through the command line, the one host wait
of a step, and memory. Prints a table with a figure for each check. It takes some minutes and downloads
nothing.

Exit codes: 0 all checks passed, 1 at least one failed, 3 there is no CUDA card.
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"
if [[ ! -x .venv/bin/qlora ]] && ! command -v qlora >/dev/null; then
    stage "environment" make_environment ""
fi
find_qlora
exec python scripts/gpu_check.py "$@"
