#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/test_lowest.sh [PYTEST_ARGUMENTS...]

Try the lower ends of the version ranges in pyproject.toml: install the lowest versions that go
together into .venv-lowest (resolved by uv) and run the tests with them. The exit code is pytest's.
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

rm -rf .venv-lowest
"$(find_python)" -m venv .venv-lowest
.venv-lowest/bin/python -m pip install -qq uv
.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra dev \
    --output-file .venv-lowest/lowest.txt pyproject.toml
has_accelerator || install_cpu_torch .venv-lowest
.venv-lowest/bin/python -m pip install -qq --constraint .venv-lowest/lowest.txt --editable ".[dev]"
PATH=$ROOT/.venv-lowest/bin:$PATH OMP_NUM_THREADS=1 python -m pytest \
    --numprocesses auto --maxprocesses 4 --dist worksteal -m "not slow" "$@"
