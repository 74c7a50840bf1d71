#!/usr/bin/env bash
# A row for each encoder, LLM, stride and seed, beside the encoder's own decoder:
#
#     bash bench/rows.sh TRAIN.jsonl DEV.jsonl OUT ENCODER:LLM:STRIDE:SEED[:copies]...
#
# from the repository's root, such as base:SmolLM2-135M-Instruct:5:42; the models are those that
# demo/models.py made in demo/models. Each projector is trained on 19,200 utterances of TRAIN, the
# first half with the CTC loss alone (21 minutes on two cores); or with `copies` on 44,800, copies at
# four other speeds among them, the first 70 % with the CTC loss alone, of which there is more. DEV
# is decoded with a beam of 5, as by Whisper's decoder. What is there already is not made again.
set -euo pipefail
source demo/environment.sh requirements.txt demo/requirements.txt bench/requirements.txt
train=$1 dev=$2 out=$3
python=.venv/bin/python
mkdir -p "$out"
[ -e "$out/dev.jsonl" ] || $python bench/augment.py lower "$dev" "$out/dev.jsonl"
[ -e "$out/train.jsonl" ] || $python bench/augment.py lower "$train" "$out/train.jsonl"
awk 'NR % 5 == 1' "$out/dev.jsonl" > "$out/dev-fifth.jsonl"

for row in "${@:4}"; do
    IFS=: read -r encoder llm stride seed copies <<< "$row"
    whisper=demo/models/$encoder.pt run=$out/${row//:/-}
    recipe=(--data_path "$out/train.jsonl" --max_steps 1200 --eval_steps 240)
    if [ "$copies" ]; then
        [ -e "$out/speeds/manifest.jsonl" ] \
            || $python bench/augment.py speed "$out/train.jsonl" "$out/speeds" 0.8 0.88 1.12 1.25
        recipe=(--data_path "$out/train.jsonl" "$out/speeds/manifest.jsonl" --max_steps 2800
            --eval_steps 400 --ctc_first 0.7 --ctc_weight 1)
    fi
    if [ ! -e "$run/model.safetensors" ]; then
        echo "== $run: training"
        $python bench/cached.py "$out/encoded" train.py --output_dir "$run" --seed "$seed" \
            --llm_model_name_or_path "demo/models/$llm" --stride "$stride" \
            --whisper_model_name_or_path "$whisper" --bf16 True "${recipe[@]}" \
            --eval_data_path "$out/dev-fifth.jsonl" --eval_strategy steps --eval_hypotheses 100 \
            --per_device_train_batch_size 16 --per_device_eval_batch_size 20 \
            --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.03 \
            --dataloader_num_workers 1 --save_steps 200 --save_total_limit 1 \
            --logging_steps 50 --report_to none
    fi
    if [ ! -e "$run/dev.jsonl" ]; then
        echo "== $run: recognising"
        $python bench/cached.py "$out/encoded" recognize.py --data_path "$out/dev.jsonl" \
            --projector_model_path "$run/model.safetensors" --bf16 True \
            --num_beams 5 --result_path "$run/dev.jsonl"
    fi
    if [ ! -e "$out/native-$encoder.jsonl" ]; then
        echo "== $encoder: its own decoder"
        $python bench/native.py --whisper_model_name_or_path "$whisper" \
            --data_path "$out/dev.jsonl" --result_path "$out/native-$encoder.jsonl"
    fi
done
$python bench/score.py --result_path "$out"/*/dev.jsonl "$out"/native-*.jsonl
