#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/gpu_check.sh [--minutes N] [--json FILE] [--only WORD...] [--list]

Verifies on a CUDA card what could not be verified on a CPU, the most valuable first: attention, gradients
at the widths of an 8B model, speed and memory of steps, what the host waits for, the plan against what is
measured, and the commands. Prints a table with figures for each check, writes them to gpu_check.json
(or FILE), and downloads nothing. It takes about 15 minutes; with --minutes N it ends in that time and
skips what no longer fits.

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
exec python -m scripts.gpu_check "$@"
