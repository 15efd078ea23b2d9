#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/test.sh [--all] [PYTEST_ARGUMENTS...]

Check a change: make .venv with the development extras, get the demo model, then run lint, types,
the check of declared dependencies and generated docs, and the tests. Stop at the first that fails,
with its exit code.

  --all   Run the tests marked `slow` too: the demo model, the whole matrix of the contract, kills
          and fuzzing. This is what CI runs.

Where the demo model is not available, the tests that need it are skipped, by name.
Environment: see scripts/quickstart.sh --help.
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

MARKS=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    MARKS=()
    shift
fi

# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

get_demo_model() {
    python scripts/get_demo_model.py ||
        say "no demo model: the tests that need it will be skipped"
}

# One process per core, each on one thread: threads that share cores wait for each other. A process
# that runs out of tests takes some of another's.
run_tests() {
    OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
        "${MARKS[@]}" "$@"
}

stage "environment" make_environment dev
find_qlora
stage "demo model" get_demo_model
stage "lint" ruff check .
stage "text" python scripts/check_text.py
stage "format" ruff format --check .
stage "types" mypy --num-workers auto
stage "dependencies" deptry .
stage "docs" python scripts/gen_docs.py --check
stage "tests" run_tests "$@"
