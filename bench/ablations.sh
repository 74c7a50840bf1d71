#!/usr/bin/env bash
# One learning curve for each choice that was made, against the default (first row):
#
#     bash bench/ablations.sh TRAIN.jsonl DEV.jsonl LLM WHISPER.pt OUT
#
# A curve that is there already is not computed again, so that it can be stopped and go on.
set -euo pipefail
train=$1 dev=$2 llm=$3 whisper=$4 out=$5
mkdir -p "$out"

arm() { # NAME, constants of model.py, --, flags of train.py
    local name=$1 constants=()
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        constants+=("$1")
        shift
    done
    if [ ! -e "$out/$name/curve.md" ]; then
        rm -rf "${out:?}/$name"
        .venv/bin/python bench/ablate.py "$out/encoded.pt" "${constants[@]}" -- \
            --llm_model_name_or_path "$llm" --whisper_model_name_or_path "$whisper" \
            --data_path "$train" --eval_data_path "$dev" --eval_strategy steps --eval_steps 100 \
            --save_steps 100 --max_steps 300 --per_device_train_batch_size 16 --bf16 True \
            --per_device_eval_batch_size 16 --learning_rate 1e-3 --lr_scheduler_type cosine \
            --warmup_ratio 0.05 --dataloader_num_workers 1 --report_to none \
            --output_dir "$out/$name" "${@:2}" > "$out/$name.log" 2>&1
    fi
    sed "s/^/$name | /" "$out/$name/curve.md" | tail -n +3
}

echo "choice | utterances | loss | listening gap | greedy | beam 4"
echo "---|---|---|---|---|---"
arm default
arm no-ctc -- --ctc_weight 0
arm ctc-from-the-start-beside -- --ctc_first 0
arm ctc-alone -- --ctc_first 1
arm ctc-weight-1 -- --ctc_weight 1
arm blank-comma blank=,
arm blank-newline blank=$'\n'
arm blanks-kept BLANK_COSINE=2
arm sharpness-7 CTC_SHARPNESS=7
arm sharpness-28 CTC_SHARPNESS=28
arm no-examples "prompt=Repeat word for word:"
arm transcribe "prompt=Transcribe the speech."
arm lr-3e-4 -- --learning_rate 3e-4
arm lr-3e-3 -- --learning_rate 3e-3
arm stride-3 -- --stride 3
arm stride-4 -- --stride 4
arm stride-8 -- --stride 8
