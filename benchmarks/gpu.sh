#!/bin/bash
# What a GPU makes of it, in five minutes: the tests that need one, then the table, then its JSON.
#
#   benchmarks/gpu.sh FOLDER [OUT]
#
# FOLDER holds eight or more pictures of 1024x1024 or larger; OUT is where the JSON goes,
# benchmarks/results if it is not given. Needs torch, timm and what else pyproject.toml names in the
# Python that is active, and installs nothing. A part that fails or takes too long is named at the
# end, and the others go on.
#
# To try the script itself without a GPU:
#   DEVICE=cpu PRECISION=fp32 LARGE=vit_small_patch16_224 BASE=vit_tiny_patch16_224 SIZE=256x256 \
#       BATCHES="1 2" RIVALS=torch TIME=0.1 benchmarks/gpu.sh FOLDER /tmp/out
set -u
folder=${1:?give a folder of pictures}
here=$(cd "$(dirname "$0")/.." && pwd)
out=${2:-$here/benchmarks/results}
device=${DEVICE:-cuda} precision=${PRECISION:-bf16} size=${SIZE:-1024x1024} time=${TIME:-1.0}
large=${LARGE:-vit_large_patch16_224} base=${BASE:-vit_base_patch16_224}
export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=()

run() { # NAME SECONDS COMMAND...: one part, which may take so long
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" || failed+=("$name (exit code $?)")
}

options=(--device "$device" --precision "$precision" --seconds "$time")
for batch in ${BATCHES:-1 8}; do options+=(--batch "$batch"); done
rivals=()
for rival in ${RIVALS:-torch compile autotune}; do rivals+=(--rival "$rival"); done

[ "$device" = cpu ] || run tests 50 python -m pytest -q -m gpu "$here/tests"
names=()
for which in "large $large 12,18" "base $base 6,9"; do
    read -r name vit exits <<< "$which"
    [ "$device" = cpu ] && exits=4,8
    file="$out/gpu_$name.json"
    run "$name" 80 python -m tokenstep bench "$folder" --model aerial --backbone "$vit" --exits "$exits" \
        --halt 0.25,0.25 --reducer tome:share=0.05 --size "$size" "${rivals[@]}" "${options[@]}" --json "$file"
    names+=("$file")
done
for model in road aerial; do
    file="$out/gpu_$model.json"
    run "$model" 40 python -m tokenstep bench "$folder" --model "$model" --size "$size" "${rivals[@]}" \
        "${options[@]}" --json "$file"
    names+=("$file")
done

echo "== table: milliseconds a picture, model only"
python - "${names[@]}" <<'PYTHON'
import json, sys
from pathlib import Path

for name in sys.argv[1:]:
    if not Path(name).is_file():
        continue
    report = json.loads(Path(name).read_text())
    rows = [row for row in report["rows"] if row["scope"] == "model"]
    print(report["backbone"] or report["model"], report["precision"], report["machine"]["device"])
    for row in rows:
        alike = [one for one in rows if one["batch"] == row["batch"]]
        plain = next((one for one in alike if one["method"] == "dense, compile"), None)
        faster = plain and plain["latency_ms"]["p50"] / row["latency_ms"]["p50"]
        print(
            f"  batch {row['batch']}  {row['latency_ms']['p50'] / row['batch']:9.3f} ms"
            f"  / {row['compute_ratio'] or 1:.2f} of the compute"
            f"  {'%.2f x the compiled dense model' % faster if faster else '':32}  {row['method']}"
        )
PYTHON
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
