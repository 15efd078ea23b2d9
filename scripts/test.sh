#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/test.sh [PYTEST_ARGUMENTS...]

Everything that has to hold before a change is merged: makes .venv with the development extras, gets
the demo model, then runs lint, types, the check of the generated docs, and the tests. Stops at the
first that fails, with its exit code.

The slow tests run on the demo model; where it cannot be had they are skipped, by name.
Environment: as for scripts/quickstart.sh (see its --help).
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

get_demo_model() {
    python scripts/get_demo_model.py ||
        say "no demo model: the tests that need it will be skipped"
}

# A process for each processor, each on one thread: threads of several that share processors wait
# for each other.
run_tests() {
    OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 4 "$@"
}

stage "environment" make_environment dev
find_qlora
stage "demo model" get_demo_model
stage "lint" ruff check .
stage "text" python scripts/check_text.py
stage "format" ruff format --check .
stage "types" mypy
stage "docs" python scripts/gen_docs.py --check
stage "tests" run_tests "$@"
