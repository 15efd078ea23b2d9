#!/usr/bin/env bash
# The other trainers' environments for the race, each in a folder of its own:
#
#     benchmarks/race/environments.sh FOLDER [trl] [llamafactory]
#
# FOLDER is a cache outside of the repository. TRL is in the development extras too, so a race
# without FOLDER/trl runs TRL in the project's own environment.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/_env.sh
source "$HERE/../../scripts/_env.sh"

make_peer() {
    local name=$1 folder=$2/$1 stamp=$2/$1/installed
    local wanted=$HERE/environments/$name.txt
    [[ -f $wanted ]] || die "no such trainer: $name; there are trl and llamafactory" 2
    if [[ -f $stamp ]] && cmp -s "$stamp" "$wanted"; then
        say "$folder: already there"
        return
    fi
    say "$folder: installing; this takes some minutes"
    mkdir -p "$2"
    [[ -x $folder/bin/python ]] || "$(find_python)" -m venv "$folder"
    # By itself first: pinned, a CPU build of it is taken where there is one.
    "$folder/bin/python" -m pip install -qq "torch==$TORCH_VERSION"
    "$folder/bin/python" -m pip install -qq -r "$wanted"
    if [[ $name == llamafactory ]]; then
        without_sound_and_pictures "$folder"
    fi
    cp "$wanted" "$stamp"
}

# LLaMA-Factory requires torchvision and torchaudio, whose builds on PyPI load libraries of CUDA
# that a CPU build of torch does not have. It imports torchaudio at its start, and training on text
# calls nothing of either.
without_sound_and_pictures() {
    local python=$1/bin/python
    if "$python" -c 'import torchvision, torchaudio' 2>/dev/null; then
        return
    fi
    "$python" -m pip uninstall -qq --yes torchvision torchaudio
    local packages
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo '"""In the place of the package, which does not load: a run on text calls nothing of it."""' \
        >"$packages/torchaudio.py"
}

[[ $# -ge 1 && $1 != -* ]] || die "give a folder: environments.sh FOLDER [trl] [llamafactory]" 2
target=$(realpath -m "$1")
[[ $target/ != "$ROOT"/* ]] || die "$target is inside of the repository; choose a folder outside" 2
shift
[[ $# -ge 1 ]] || set -- trl llamafactory
for name in "$@"; do
    make_peer "$name" "$target"
done
