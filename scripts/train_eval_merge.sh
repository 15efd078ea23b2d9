#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/train_eval_merge.sh RECIPE [--set KEY=VALUE]...

For GPU boxes and job queues: check the recipe, train, evaluate base and tuned model, and merge. The
results are eval.json and merged/ in the run folder (output.dir). After an interruption the same line
resumes from the newest checkpoint; finished steps are skipped.

Exit codes: those of the step that failed (`qlora --help` lists them); 127 without a command `qlora`.
A recipe without held-out rows and tasks is trained and merged, but not evaluated.
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi
if (($# == 0)); then
    usage >&2
    exit 2
fi

# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
find_qlora

resolved=$(qlora validate "$@" --json)
run=$(json_value recipe.output.dir <<<"$resolved")

stage "train" train_once "$run" "$@"
if [[ $(json_value tasks <"$run/run.json") != "[]" ]]; then
    stage "evaluate" eval_once "$run/eval.json" qlora eval "$run"
fi
stage "merge" merge_once "$run"
print_stages >&2
say "done: $run"
