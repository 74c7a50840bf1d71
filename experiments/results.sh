#!/usr/bin/env bash
# A projector like that of commit b48c120 (docs/results_learners.md), from manifests:
#
#     bash experiments/results.sh TRAIN.jsonl DEV.jsonl WHISPER.pt OUT [SEED]
#
# from the repository's root, after demo/run.sh, whose LLM and voice it uses. About three hours on
# two cores. It trains on the corpus, four copies of it at other speeds, and 12,000 sentences that
# the LLM writes and a voice speaks. DEV is decoded with beams of 1 to 10, and by Whisper's own
# decoder. Speech, sentences and projectors that are there already are not made again.
set -euo pipefail
train=$1 dev=$2 whisper=$3 out=$4 seed=${5:-42}
source experiments/common.sh
llm=demo/models/SmolLM2-135M-Instruct

copy_at_speeds "$out/speed" "$out/train.jsonl" 0.88 1.12
copy_at_speeds "$out/more-speed" "$out/train.jsonl" 0.8 1.25
[ -e "$out/sentences.txt" ] || $python -m experiments.augment write \
    --llm_model_name_or_path $llm --output_path "$out/sentences.txt"
[ -e "$out/spoken/manifest.jsonl" ] || $python -m experiments.augment speak \
    --text_path "$out/sentences.txt" --output_dir "$out/spoken"

corpus=("$out/train.jsonl" "$out/speed/manifest.jsonl")
spoken=$out/spoken/manifest.jsonl
encoder=$(basename "$whisper" .pt)
run=$out/$encoder-$seed

# the CTC loss on the corpus and its copies
train "$run-ctc" $llm "$whisper" --seed "$seed" --data_path "${corpus[@]}" \
    --max_steps 763 --ctc_first 1 --lr_scheduler_type constant_with_warmup --warmup_ratio 0.05 \
    --save_strategy no
# then on all, and then the LLM's loss beside it
train "$run-joint" $llm "$whisper" --seed "$seed" --data_path "${corpus[@]}" "$spoken" \
    --projector_model_path "$run-ctc/model.safetensors" \
    --max_steps 3400 --ctc_first 0.65 --lr_scheduler_type cosine \
    "${evaluate_fifth[@]}" --eval_steps 425 --save_steps 425 --save_total_limit 2
# last with more copies, and more of the CTC loss, by which a beam's hypothesis is chosen
train "$run" $llm "$whisper" --seed "$seed" \
    --data_path "${corpus[@]}" "$out/more-speed/manifest.jsonl" "$spoken" \
    --projector_model_path "$run-joint/model.safetensors" \
    --max_steps 1500 --ctc_first 0 --ctc_weight 1 --learning_rate 6e-4 --lr_scheduler_type cosine \
    "${evaluate_fifth[@]}" --eval_steps 300 --save_steps 300

recognize "$run/model.safetensors" "$out/dev.jsonl" "$run/dev.jsonl" 1 3 5 8 10 | tee "$run/beams.md"
$python -m tools.plot --output "$run/beams.png" --table "$run/beams.md"
$python -m tools.whisper_baseline --whisper_model_name_or_path "$whisper" \
    --data_path "$out/dev.jsonl" --result_path "$out/whisper-$encoder.jsonl" \
    --beside "$run"/dev.beam*.jsonl
