#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/train_eval_merge.sh RECIPE [--set KEY=VALUE]...

For GPU boxes and job queues: checks the recipe, trains, evaluates base and tuned model, and merges.
The results are eval.json and merged/ in the run folder (output.dir). After an interruption, repeat
the command: it resumes from the newest checkpoint and skips finished steps.

Exit codes (of the step that failed):
  0    all done
  2    the recipe, its data or this command line cannot be used
  3    the model cannot be found, loaded, adapted or merged
  4    training stopped before its end, or the merged model is not the trained one
  5    training.stop_after was reached: repeat the command to resume
  6    out of memory during training
  130  interrupted by Ctrl-C; 143 by SIGTERM
  127  the command `qlora` is not installed
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
