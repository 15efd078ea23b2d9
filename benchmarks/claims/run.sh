#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: benchmarks/claims/run.sh DATA [OUT]

Compares methods on SmolLM2-135M-Instruct, on DATA/sst2 and DATA/gsm8k (forgetting on DATA/wikitext2).
Writes the comparisons to OUT (default: runs/claims), then docs/comparison.md and docs/comparison.svg.
Run it again to continue after an interruption. A cell that is impossible (BitFit on a model without
biases) appears in the table with its reason and does not make this script fail.
HELP
}

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    usage
    [[ $# -ge 1 ]] && exit 0 || exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${2:-runs/claims}"
out=$(cd "${2:-runs/claims}" && pwd)
model=$root/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf
cd "$1" # the recipes name data from here

methods=full,lora,nf4,fp4,int8,bottleneck,ia3,bitfit
grid=(
    --vary lora:adapter.r=4,16,64
    --vary "lora:adapter.target_modules=all-linear,[q_proj,k_proj,v_proj,o_proj]"
    --vary nf4:quantization.double_quant=true,false
    --vary fp4:quantization.double_quant=true,false
)
rates=(--learning-rate full=5e-5 --learning-rate ia3=5e-3 --learning-rate bitfit=2e-3)
compare() {
    # 8: some cells failed, which the page says.
    qlora compare "$root/benchmarks/claims/$1.yaml" --out "$out/$2" --set "model.path=$model" \
        "${@:3}" -q >/dev/null || [[ $? == 8 ]]
}

compare sst2 sst2 --methods "$methods" "${grid[@]}" "${rates[@]}"
# Generation speed does not depend on the task, so measure it once.
compare gsm8k gsm8k --no-generation --methods "$methods" "${grid[@]}" "${rates[@]}"
# More seeds, because claims about small differences are checked against these figures.
compare sst2 seeds --no-generation --methods full,lora --learning-rate full=5e-5 \
    --vary lora:adapter.r=4,16,64 --vary lora:adapter.target_modules=all-linear --vary training.seed=1,2

cd "$root"
python -m benchmarks.claims.page "$out"
