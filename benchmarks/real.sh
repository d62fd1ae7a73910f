#!/usr/bin/env bash
# Everything that is shown on weights that were trained for long, at once, on a machine with one GPU and 16 cores: the
# studies of systems 1, 2, 4 and 5 at scale real, then the benchmarks of the fine-tuned network. Takes about 15 minutes.
#
#     benchmarks/real.sh RUNS RESULTS [SECONDS]
#
# data/vits14.safetensors and data/imagenette160 must be there. Runs, which are resumed by the same command, are kept in
# the folder RUNS; tables are copied to the folder RESULTS when the script ends, also where SECONDS were too few for all.
# Times in the tables of studies are those of a machine that did other work too; ratios are within the same rounds.
set -u
runs=$1 results=$2 seconds=${3:-3600} start=$SECONDS
images=data/imagenette160 model=$runs/vits14
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$runs/logs" "$results"

run() {  # NICE NAME COMMAND...: within the time that is left, output in logs/NAME.log.
    local nice=$1 name=$2 left=$((seconds - SECONDS + start))
    shift 2
    ((left > 0)) || return 0
    nice -n "$nice" timeout -k 10 "$left" "$@" >"$runs/logs/$name.log" 2>&1
    echo "$name ended with $? after $((SECONDS - start)) s"
}

study() {  # NICE SYSTEM WORKERS
    run "$1" "system$2" vitrim study "recipes/system$2/study.yaml" --scale real --root $images --out "$runs/system$2-real" --workers "$3"
}

kept() {  # Tables, certificates and what describes a run, without weights and checkpoints.
    local folder
    for folder in "$runs"/system?-real; do
        [ -d "$folder" ] || continue
        mkdir -p "$results/${folder##*/}"
        (cd "$folder" && find . -maxdepth 2 -type f \( -name '*.md' -o -name '*.csv' -o -name '*.json' -o -name '*.jsonl' \
            -o -name '*.yaml' -o -name '*.txt' \) -print0 | tar cf - --null -T -) | tar xf - -C "$results/${folder##*/}"
    done
    cp "$runs"/*-vits14-cuda.{md,csv,json} "$results/" 2>/dev/null
    cp "$runs"/*.finished.jsonl "$runs/logs/" 2>/dev/null
    return 0
}
trap kept EXIT

study 0 1 2 &
study 2 2 4 &
study 4 5 3 &
study 6 4 4 &
run 0 finetune vitrim train --config recipes/system5/finetune-vits14.yaml --data.limit 9469 --data.workers 4 --epochs 3 \
    --optim.precision auto --out "$model"
run 0 widths python benchmarks/widths.py "$model" --root $images --device cuda --out "$runs/widths-vits14-cuda" &
run 0 tokens python benchmarks/tokens.py "$model" --root $images --device cuda --out "$runs/tokens-vits14-cuda" &
answers() { run 0 "answers-$1" python benchmarks/compress.py "$model" --root $images --models "$runs/answers" "${@:2}"; }
for kind in tokens width joint; do answers "$kind" --kinds "$kind" & done
wait
answers all --out "$runs/compress-vits14-cuda"
