#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: scripts/quickstart.sh [--model HUB_ID_OR_FOLDER]

From a fresh clone to a measured fine-tuning: makes .venv, gets the demo model, writes the demo data,
trains (configs/quickstart.yaml), evaluates, merges, and prints base, tuned and merged side by side.

Finished steps are not repeated, so a second call is quick and an interrupted one resumes. To start
over, remove runs/quickstart.

  --model X   fine-tune another model: an id on the hub, a folder of safetensors or a GGUF file
  --help      this text

Environment:
  QLORA_TORCH_INDEX  package index with CPU builds of torch (pytorch.org shows its address),
                     for machines without an accelerator
  QLORA_PYTHON       the Python to make .venv with (3.11 to 3.13)

Exit codes: those of `qlora` (see `qlora --help`); 1 if the environment or the model cannot be made.
HELP
}

refuse() {
    echo "quickstart.sh: $1" >&2
    usage >&2
    exit 2
}

model=
while (($#)); do
    case $1 in
        --model)
            model=${2:-}
            [[ -n $model ]] || refuse "--model needs a hub id, a folder or a file"
            shift 2
            ;;
        -h | --help) usage && exit ;;
        *) refuse "there is no $1" ;;
    esac
done
# A relative path is relative to the user's working directory.
if [[ -e $model ]]; then
    model=$(cd "$(dirname "$model")" && pwd)/$(basename "$model")
fi

# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

recipe=(configs/quickstart.yaml)
run=runs/quickstart
if [[ -n $model ]]; then
    run=runs/quickstart-$(basename "$model")
    recipe+=(--set "model.path=$model" --set "output.dir=$run")
fi

stage "environment" make_environment ""
find_qlora
installed=$SECONDS
if [[ -z $model ]]; then
    stage "demo model" python scripts/get_demo_model.py
fi
stage "demo data" python scripts/make_demo_data.py --output demo
stage "train" train_once "$run" "${recipe[@]}"
stage "evaluate base and tuned" eval_once "$run/eval.json" qlora eval "$run"
stage "merge" merge_once "$run"
stage "evaluate merged" eval_once "$run/eval-merged.json" qlora eval "$run/merged" \
    --recipe "$run/recipe.yaml"

print_stages >&2
say "after installation: $((SECONDS - installed)) s"
python scripts/results_table.py "$run"
