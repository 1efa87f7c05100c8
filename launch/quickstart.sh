#!/usr/bin/env bash
# From a fresh machine to chest films that follow their prompts, before and after LoRA: bash launch/quickstart.sh
#
# No GPU, no data of yours, no network but the package index; nine minutes on two cores once the packages are downloaded.
# Everything lands in out/quickstart/, whose report.html says what it means. What is done is not done again: after a
# break, run it again. PYTHON names the interpreter, 3.11 or newer, that .venv is made with.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # some images set it: every stage would compile thousands of modules anew, 24 s each time
out=out/quickstart
run=$out/fold0
adapter=$run/pytorch_lora_weights.safetensors
base=assets/cxr-tiny
python=.venv/bin/python
mkdir -p $out

# stage TITLE RESULT SOURCE COMMAND...: run the command, unless RESULT is there and no older than SOURCE. RESULT is what
# the command writes last. Its seconds are noted however it ends, and added up in the report.
title=
note() {
    [ -z "$title" ] || printf '%s\t%s\n' "$title" "$((SECONDS - start))" >>$out/seconds.tsv
    title=
}
trap note EXIT
stage() {
    if [ -e "$2" ] && [ ! "$3" -nt "$2" ]; then
        printf '== %s: done before\n' "$1"
        return
    fi
    title=$1 start=$SECONDS
    printf '\n== %s\n' "$title"
    "${@:4}"
    note
}

install() {
    local interpreter=${PYTHON:-python3}
    if ! $python -m pip --version >/dev/null 2>&1; then
        "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "quickstart.sh: $interpreter is older than Python 3.11; name a newer one: PYTHON=python3.12 bash launch/quickstart.sh" >&2
            exit 2
        }
        "$interpreter" -m venv .venv
    fi
    # Of 17,000 modules most are never imported: each is compiled when it is
    $python -m pip install --disable-pip-version-check --no-compile -r requirements.txt -c constraints.txt
    touch .venv/installed
}

# Films, adapter and page belong to the models and films they were made with
bundled() {
    local sum
    sum=$(cat $base/*/*.safetensors assets/cxr-features/*.safetensors assets/demo/metadata.jsonl | cksum)
    [ -e $out/bundled.txt ] || echo "$sum" >$out/bundled.txt
    [ "$sum" = "$(cat $out/bundled.txt)" ] || {
        echo "quickstart.sh: $out was made with other bundled models or films; delete it and run this again" >&2
        exit 2
    }
}

generate() {
    local patient="Chest radiograph of a child."
    $python generate.py --pretrained_model_name_or_path $base --num_images 4 --batch_size 12 --guidance_scale 3 "$@" \
        --prompt "$patient No acute finding." \
        --prompt "$patient Left pleural effusion." \
        --prompt "$patient Right pneumothorax." \
        --prompt "$patient Cardiomegaly." \
        --prompt "$patient Left pacemaker." \
        --prompt "$patient Right lower zone mass."
}

bundled
stage "set-up" .venv/installed constraints.txt install
stage "films" $out/data/dataset.json assets/demo/metadata.jsonl \
    $python download.py --output_dir $out/data --cache_dir $out/cache
# No caption is dropped: guidance leads away from what the model draws without one, and the base draws no findings
stage "training" $run/README.md $out/data/dataset.json \
    $python train_lora.py --fold 0 --pretrained_model_name_or_path $base --train_data_dir $out/data \
    --cache_dir $out/cache --output_dir $run --max_train_steps 950 --validation_steps 950 \
    --max_validation_samples 16 --rank 32 --learning_rate 3e-3 --adam_beta2 0.99 --box_loss_weight 0.4 --caption_dropout 0 \
    --validation_prompt "Chest radiograph of a child. Left pleural effusion." \
    --validation_prompt "Chest radiograph of a child. Right pacemaker."
stage "films by the base" $out/images/base/contact_sheet.png $out/bundled.txt generate --output_dir $out/images/base
stage "films by the adapter" $out/images/adapter/contact_sheet.png $adapter \
    generate --output_dir $out/images/adapter --lora $run
stage "evaluation" $run/evaluation/metrics.json $adapter \
    $python evaluate.py --lora $run --num_inference_steps 12 --guidance_scale 3 --max_films 40
stage "report" $out/report.html $run/evaluation/metrics.json $python -m launch.quickstart_page $out
printf '\nopen %s/report.html\n' $out
