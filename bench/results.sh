#!/usr/bin/env bash
# A projector like the one that ships (docs/results.md), from manifests:
#
#     bash bench/results.sh TRAIN.jsonl DEV.jsonl WHISPER.pt OUT [SEED]
#
# from the repository's root, after demo/run.sh, whose LLM and voice it uses. About three hours on two
# cores. The corpus, four copies of it at other speeds and 12,000 sentences that the LLM writes and a
# voice speaks are trained on; DEV is decoded with beams of 1 to 10, and by Whisper's own decoder.
# Speech, sentences and projectors that are there already are not made again.
set -euo pipefail
source demo/environment.sh requirements.txt demo/requirements.txt bench/requirements.txt
train=$1 dev=$2 whisper=$3 out=$4 seed=${5:-42}
python=.venv/bin/python
llm=demo/models/SmolLM2-135M-Instruct
mkdir -p "$out"

[ -e "$out/dev.jsonl" ] || $python bench/augment.py lower "$dev" "$out/dev.jsonl"
[ -e "$out/train.jsonl" ] || $python bench/augment.py lower "$train" "$out/train.jsonl"
[ -e "$out/speed/manifest.jsonl" ] \
    || $python bench/augment.py speed "$out/train.jsonl" "$out/speed" 0.88 1.12
[ -e "$out/more-speed/manifest.jsonl" ] \
    || $python bench/augment.py speed "$out/train.jsonl" "$out/more-speed" 0.8 1.25
[ -e "$out/sentences.txt" ] || $python bench/augment.py write $llm 12000 "$out/sentences.txt"
[ -e "$out/spoken/manifest.jsonl" ] \
    || $python bench/augment.py speak "$out/sentences.txt" "$out/spoken"
awk 'NR % 5 == 1' "$out/dev.jsonl" > "$out/dev-fifth.jsonl"

train() { # OUTPUT_DIR, flags
    [ ! -e "$1/model.safetensors" ] || return 0
    $python bench/cached.py "$out/encoded" train.py --output_dir "$1" --seed "$seed" \
        --llm_model_name_or_path $llm --whisper_model_name_or_path "$whisper" --bf16 True \
        --per_device_train_batch_size 16 --per_device_eval_batch_size 20 --learning_rate 1e-3 \
        --dataloader_num_workers 1 --logging_steps 50 --report_to none "${@:2}"
}

name=$(basename "$whisper" .pt)-$seed
# the CTC loss on the corpus and its copies, then on all, and then the LLM's loss beside it; last
# with more copies and more of the CTC loss, by which a beam's hypothesis is chosen
train "$out/$name-ctc" --data_path "$out/train.jsonl" "$out/speed/manifest.jsonl" \
    --max_steps 763 --ctc_first 1 --lr_scheduler_type constant_with_warmup --warmup_ratio 0.05 \
    --save_strategy no
train "$out/$name-joint" --projector_model_path "$out/$name-ctc/model.safetensors" \
    --data_path "$out/train.jsonl" "$out/speed/manifest.jsonl" "$out/spoken/manifest.jsonl" \
    --max_steps 3400 --ctc_first 0.65 --lr_scheduler_type cosine --warmup_ratio 0.03 \
    --eval_data_path "$out/dev-fifth.jsonl" --eval_strategy steps --eval_steps 425 \
    --eval_hypotheses 100 --save_steps 425 --save_total_limit 2
train "$out/$name" --projector_model_path "$out/$name-joint/model.safetensors" \
    --data_path "$out/train.jsonl" "$out/speed/manifest.jsonl" "$out/more-speed/manifest.jsonl" \
    "$out/spoken/manifest.jsonl" --max_steps 1500 --ctc_first 0 --ctc_weight 1 \
    --learning_rate 6e-4 --lr_scheduler_type cosine --warmup_ratio 0.03 \
    --eval_data_path "$out/dev-fifth.jsonl" --eval_strategy steps --eval_steps 300 --save_steps 300 \
    --eval_hypotheses 100
$python bench/cached.py "$out/encoded" bench/score.py recognize.py --bf16 True \
    --data_path "$out/dev.jsonl" --num_beams 1 3 5 8 10 \
    --projector_model_path "$out/$name/model.safetensors" \
    --result_path "$out/$name/dev.jsonl" | tee "$out/$name/beams.md"
$python bench/plot.py "$out/$name/beams.png" "$out/$name/beams.md"
$python bench/native.py --whisper_model_name_or_path "$whisper" --data_path "$out/dev.jsonl" \
    --result_path "$out/native-$(basename "$whisper" .pt).jsonl" --beside "$out/$name"/dev.beam*.jsonl
