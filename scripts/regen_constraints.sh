#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/regen_constraints.sh

Regenerate constraints.txt: install the newest versions that pyproject.toml allows into a fresh
environment (.venv-newest) and record them. Then run scripts/test.sh --all, and commit the file if it
passes: the scripts install exactly these versions. The exit code is that of the first step that fails.
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

rm -rf .venv-newest
"$(find_python)" -m venv .venv-newest
# torch is updated by hand, with its range in pyproject.toml: its build differs between machines.
has_accelerator || install_cpu_torch .venv-newest
.venv-newest/bin/python -m pip install -qq --editable ".[dev]" "torch==$TORCH_VERSION"
{
    echo "# Exact versions that the tests passed with. Written by scripts/regen_constraints.sh."
    # CUDA's own packages are pinned by torch, and only some machines have them.
    .venv-newest/bin/python -m pip list --format freeze --exclude-editable |
        sed 's/+[a-z0-9.]*$//' | grep -ivE '^(pip|setuptools|wheel|triton|nvidia-[^=]*|cuda-[^=]*)=='
} >constraints.txt.unfinished
mv constraints.txt.unfinished constraints.txt
rm -rf .venv-newest
say "constraints.txt: $(grep -c == constraints.txt) versions; now run scripts/test.sh --all"
