#!/usr/bin/env bash
# Make the environments of the other trainers, each in its own folder:
#
#     benchmarks/race/environments.sh FOLDER [trl] [llamafactory]
#
# FOLDER is a cache outside the repository. TRL is also a development extra, so without FOLDER/trl the
# race runs TRL in the project's environment.
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
    # Installed first, pinned, so that pip takes a CPU build where there is one.
    "$folder/bin/python" -m pip install -qq "torch==$TORCH_VERSION"
    "$folder/bin/python" -m pip install -qq -r "$wanted"
    if [[ $name == llamafactory ]]; then
        without_sound_and_pictures "$folder"
    fi
    cp "$wanted" "$stamp"
}

# LLaMA-Factory requires torchvision and torchaudio, whose PyPI builds load CUDA libraries that a CPU
# build of torch lacks. It imports torchaudio at start-up; training on text uses neither.
without_sound_and_pictures() {
    local python=$1/bin/python
    if "$python" -c 'import torchvision, torchaudio' 2>/dev/null; then
        return
    fi
    "$python" -m pip uninstall -qq --yes torchvision torchaudio
    local packages
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo '"""Replaces the package, which does not load here and is not used for text."""' \
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
