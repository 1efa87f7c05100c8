#!/usr/bin/env bash
# All folds trained, evaluated and put into one table: bash launch/cross_validate.sh [flags of train_lora.py]
#
# With several GPUs as many folds train at a time, each on its own. After a break run it again: a fold that was cut off
# goes on, one that is done is left as it is. From the environment, with what they are otherwise:
#   OUT=out  DATA=data  FOLDS="0 1 2 3 4" (as download.py makes them)  PYTHON= (.venv's, else python)
#   EVALUATE= (flags of evaluate.py, such as "--num_inference_steps 12")
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out} data=${DATA:-data} folds=(${FOLDS:-0 1 2 3 4})
case " $* " in *" --push_to_hub"*)
    echo "cross_validate.sh: --push_to_hub takes an evaluated adapter; upload one fold with train_lora.py afterwards" >&2
    exit 2 ;;
esac
python=${PYTHON:-python}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python

# fold K FLAGS...: train it with the preset of its card, and evaluate it unless that was done since, with the same flags
fold() {
    local run=$out/fold$1 flags=$out/fold$1/evaluate_flags.txt command train
    command=$($python launch/doctor.py --command --no_launcher --run "$run") || return
    read -ra train <<<"$command"
    $python "${train[@]:1}" --fold "$1" --train_data_dir "$data" --output_dir "$run" "${@:2}" || return
    if [ ! -e "$run/evaluation/metrics.json" ] || [ "$run/pytorch_lora_weights.safetensors" -nt "$run/evaluation/metrics.json" ] ||
        [ "$(cat "$flags" 2>/dev/null)" != "${EVALUATE:-}" ] ||
        ! grep -q '^  "training_films"' "$run/evaluation/metrics.json"; then # else of an earlier version, which the table refuses
        $python evaluate.py --lora "$run" ${EVALUATE:-} || return
        printf '%s' "${EVALUATE:-}" >"$flags"
    fi
}

# Every GPU takes each next fold of its own share
gpus=$($python -c "import utils.quiet, torch; from utils.hardware import is_cuda_used; print(is_cuda_used() * torch.cuda.device_count())")
IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
if [ "$gpus" -gt 1 ]; then
    mkdir -p "$out"
    workers=()
    set -m # a process group each, so that what a worker has started ends with it
    trap 'kill -TERM -- "${workers[@]/#/-}" 2>/dev/null; wait; exit 130' HUP INT TERM
    for ((gpu = 0; gpu < gpus && gpu < ${#folds[@]}; gpu++)); do
        (
            trap 'exit 143' TERM # once what runs has left: training saves first
            export CUDA_VISIBLE_DEVICES=${devices[gpu]}
            for ((i = gpu; i < ${#folds[@]}; i += gpus)); do
                echo "fold ${folds[i]} on GPU ${devices[gpu]}: $out/fold${folds[i]}.txt"
                fold "${folds[i]}" "$@" >"$out/fold${folds[i]}.txt" 2>&1 || {
                    tail -n 1 "$out/fold${folds[i]}.txt" >&2
                    exit 1
                }
            done
        ) &
        workers+=($!)
    done
    set +m
    status=0
    for worker in "${workers[@]}"; do wait "$worker" || status=1; done
    [ $status -eq 0 ] || exit $status
else
    for k in "${folds[@]}"; do
        printf '\n== fold %s\n' "$k"
        fold "$k" "$@"
    done
fi
$python evaluate.py --cross_validation "$out"
