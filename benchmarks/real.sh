#!/usr/bin/env bash
# Everything that is shown on weights that were trained for long, at once, on a machine with one GPU and 16 cores: the
# studies of systems 1, 2, 4 and 5 at scale real, and the benchmarks of a fine-tuned network. Takes about 20 minutes.
#
#     benchmarks/real.sh RUNS RESULTS [SECONDS] [PART...]
#
# Parts: system1 system2 system4 intel system5 widths tokens answers piad; all by default. data/vits14.safetensors and
# data/imagenette160 must be there, for intel also data/intel. The benchmarks take the network in RUNS/vits14, which is
# fine-tuned first if it is not there. Runs, which are resumed by the same command, are kept in the folder RUNS; tables
# and whatever is finished are copied to the folder RESULTS every 20 seconds, so that nothing is lost where SECONDS are
# too few. Times in the tables of studies are those of a machine that did other work too; ratios are within the same
# rounds.
set -u
runs=$1 results=$2 seconds=${3:-3600} start=$SECONDS
shift $(($# < 3 ? $# : 3))
parts=" ${*:-system1 system2 system4 intel system5 widths tokens answers piad} "
images=data/imagenette160 model=$runs/vits14 widths=$runs/widths-vits14-cuda python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$runs/logs" "$results"

wanted() { [[ $parts == *" $1 "* ]]; }

run() {  # NICE NAME COMMAND...: within the time that is left, output in logs/NAME.log.
    local nice=$1 name=$2 left=$((seconds - SECONDS + start))
    shift 2
    ((left > 0)) || return 0
    nice -n "$nice" timeout -k 10 "$left" "$@" >>"$runs/logs/$name.log" 2>&1
    echo "$name ended with $? after $((SECONDS - start)) s"
}

study() {  # NICE PART SYSTEM ROOT WORKERS
    wanted "$2" || return 0
    run "$1" "$2" "$python" -m vitrim study "recipes/$3/study.yaml" --scale real --root "$4" --out "$runs/$2-real" --workers "$5"
}

bench() {  # NAME SCRIPT OPTIONS...
    local name=$1 script=$2
    shift 2
    run 0 "$name" "$python" "benchmarks/$script.py" "$model" --root $images "$@"
}

kept() {  # Tables, certificates and what describes a run, without weights and checkpoints.
    local folder
    for folder in "$runs"/*-real; do
        [ -d "$folder" ] || continue
        mkdir -p "$results/${folder##*/}"
        (cd "$folder" && find . -maxdepth 2 -type f \( -name '*.md' -o -name '*.csv' -o -name '*.json' -o -name '*.jsonl' \
            -o -name '*.yaml' -o -name '*.txt' \) -print0 | tar cf - --null -T -) | tar xf - -C "$results/${folder##*/}"
    done
    cp -r "$runs"/*-vits14-cuda*.{md,csv,json,jsonl} "$runs/logs" "$results/" 2>/dev/null
    return 0
}
(while sleep 20; do kept; done) &
keeping=$!
trap 'kill $keeping; kept' EXIT

study 0 system1 system1 $images 2 &
study 2 system2 system2 $images 4 &
study 2 system5 system5 $images 3 &
study 4 system4 system4 $images 4 &
study 6 intel system4 data/intel 4 &
others=$(jobs -p | grep -v "^$keeping$")
if wanted widths || wanted tokens || wanted answers || wanted piad; then
    if ! [ -e "$model/vitrim.json" ]; then
        run 0 finetune "$python" -m vitrim train --config recipes/system5/finetune-vits14.yaml --data.limit 9469 \
            --data.workers 4 --epochs 3 --optim.precision auto --out "$model"
    fi
    ended=()
    if wanted widths; then
        for seed in 1 2 3; do bench "widths-$seed" widths --device cuda --seeds $seed --table false --out "$widths" & ended+=($!); done
    fi
    if wanted tokens; then bench tokens tokens --device cuda --out "$runs/tokens-vits14-cuda" & ended+=($!); fi
    if wanted piad; then bench piad piad --device cuda --runs "$runs/piad" --out "$runs/piad-vits14-cuda" & ended+=($!); fi
    if wanted answers; then
        for kind in tokens width joint; do
            bench "answers-$kind" compress --models "$runs/answers" --kinds $kind --limit 3000 &
            ended+=($!)
        done
    fi
    wait "${ended[@]}"
    if wanted widths; then bench widths widths --device cuda --out "$widths"; fi
    if wanted answers; then bench answers compress --models "$runs/answers" --limit 3000 --out "$runs/compress-vits14-cuda"; fi
fi
wait $others
