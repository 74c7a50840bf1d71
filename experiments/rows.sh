#!/usr/bin/env bash
# A row for each encoder, LLM, stride and seed, beside the encoder's own decoder:
#
#     bash experiments/rows.sh TRAIN.jsonl DEV.jsonl OUT ENCODER:LLM:STRIDE:SEED[:copies]...
#
# from the repository's root, such as base:SmolLM2-135M-Instruct:5:42; the models are those that
# demo/models.py made in demo/models. Each projector is trained on 19,200 utterances of TRAIN, the
# first half with the CTC loss alone (21 minutes on two cores). With `copies` it is trained on
# 44,800, copies at four other speeds among them, the first 70 % with the CTC loss alone;
# `--ctc_weight` is 1. DEV is decoded with a beam of 5, as by Whisper's decoder. What is there already
# is not made again.
set -euo pipefail
train=$1 dev=$2 out=$3
source experiments/common.sh

for row in "${@:4}"; do
    IFS=: read -r encoder llm stride seed copies <<< "$row"
    whisper=demo/models/$encoder.pt
    run=$out/${row//:/-}
    recipe=(--data_path "$out/train.jsonl" --max_steps 1200 --eval_steps 240)
    if [ "$copies" ]; then
        copy_at_speeds "$out/speeds" "$out/train.jsonl" 0.8 0.88 1.12 1.25
        recipe=(--data_path "$out/train.jsonl" "$out/speeds/manifest.jsonl" --max_steps 2800
            --eval_steps 400 --ctc_first 0.7 --ctc_weight 1)
    fi
    train "$run" "demo/models/$llm" "$whisper" --stride "$stride" --seed "$seed" "${recipe[@]}" \
        "${evaluate_fifth[@]}" --lr_scheduler_type cosine --save_steps 200 --save_total_limit 1
    if [ ! -e "$run/dev.jsonl" ]; then
        echo "== $run: recognising"
        recognize "$run/model.safetensors" "$out/dev.jsonl" "$run/dev.jsonl" 5
    fi
    if [ ! -e "$out/whisper-$encoder.jsonl" ]; then
        echo "== $encoder: its own decoder"
        $python -m tools.whisper_baseline --whisper_model_name_or_path "$whisper" \
            --data_path "$out/dev.jsonl" --result_path "$out/whisper-$encoder.jsonl"
    fi
done
$python -m tools.score --result_path "$out"/*/dev.jsonl "$out"/whisper-*.jsonl
