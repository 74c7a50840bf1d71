#!/usr/bin/env bash
# A projector like the one that ships (docs/results.md), from the manifests of two corpora:
#
#     bash experiments/broad.sh EN EN2 OUT [LLM [SEED]]
#
# from the repository's root, after demo/run.sh, whose models and voice it uses. EN and EN2 are
# folders with train.jsonl and dev.jsonl; lines have `spk`, and `src` that begins with
# speechocean762, cv or librispeech. It trains on both corpora, long utterances joined of short
# ones, copies of the learners at four other speeds, and a voice that reads digits and SmolLM2's
# 8,000 most common words, each twelve times. LLM is another folder of demo/models: its projector
# begins with what SmolLM2's projector in OUT has learnt to hear. SEED is that of all three
# trainings, 42 if not given; another LLM wants SmolLM2 of the same SEED in OUT. An LLM takes about
# three hours on two cores. What is there already is not made again.
set -euo pipefail
smollm2=SmolLM2-135M-Instruct
en=$1 en2=$2 out=$3 llm=${4:-$smollm2} seed=${5:-42}
train=("$en/train.jsonl" "$en2/train.jsonl") dev=("$en/dev.jsonl" "$en2/dev.jsonl")
source experiments/common.sh
whisper=demo/models/base.pt
models=(demo/models/"$llm" $whisper)
run=$out/$llm-$seed

[ -e "$out/joined/manifest.jsonl" ] || $python -m experiments.augment join \
    --data_path "$out/train.jsonl" --output_dir "$out/joined" --seconds 20 28 --count 400
[ -e "$out/words.txt" ] || $python -m experiments.augment draw \
    --llm_model_name_or_path demo/models/$smollm2 --output_path "$out/words.txt"
[ -e "$out/spoken/manifest.jsonl" ] || $python -m experiments.augment speak \
    --text_path "$out/words.txt" --output_dir "$out/spoken"
split_dev
select_source "$out/learners.jsonl" "$out/train.jsonl" speechocean762
copy_at_speeds "$out/speed" "$out/learners.jsonl" 0.8 0.88 1.12 1.25

real=("$out/train.jsonl" "$out/joined/manifest.jsonl")
made=("$out/spoken/manifest.jsonl" "$out/speed/manifest.jsonl")
recipe=(--ctc_weight 1 --lr_scheduler_type cosine --model_max_length 700 --seed "$seed")
# the CTC loss alone: of the corpora, then of all
start=$run-start/model.safetensors
if [ "$llm" = $smollm2 ]; then
    ctc_steps=3000 joint=(--max_steps 1480)
    train "$run-start" "${models[@]}" --data_path "${real[@]}" "${recipe[@]}" \
        --ctc_first 1 --max_steps 3400 --learning_rate 1.2e-3 --save_total_limit 1
else
    ctc_steps=1300 joint=(--max_steps 2180 --per_device_train_batch_size 8)
    [ -e "$start" ] || $python -m experiments.graft --llm_model_name_or_path "${models[0]}" \
        --projector_model_path "$out/$smollm2-$seed-ctc/model.safetensors" --output_path "$start"
fi
train "$run-ctc" "${models[@]}" --data_path "${real[@]}" "${made[@]}" "${recipe[@]}" \
    --projector_model_path "$start" \
    --ctc_first 1 --max_steps $ctc_steps --learning_rate 1.5e-3 --save_total_limit 1
# then the LLM's loss beside it, and the mean of the last three checkpoints
train "$run" "${models[@]}" --data_path "${real[@]}" "${recipe[@]}" \
    --projector_model_path "$run-ctc/model.safetensors" \
    --ctc_first 0 --learning_rate 6e-4 --save_steps 20 --save_total_limit 3 "${joint[@]}"
mapfile -t checkpoints < <(ls -d "$run"/checkpoint-* | sort -V | tail -3)
$python -m tools.average --projector_model_paths "${checkpoints[@]}" \
    --output_path "$run/projector.safetensors" --half True

for set in "${sets[@]}"; do
    result=$run/$set
    if [ ! -e "$result.md" ]; then
        recognize "$run/projector.safetensors" "$out/dev-$set.jsonl" "$result.jsonl" \
            1 3 5 8 10 | tee "$result.part"
        mv "$result.part" "$result.md"
    fi
    $python -m tools.score --result_path "$result.beam5.jsonl" --by duration
    [ -e "$out/whisper-$set.jsonl" ] || $python -m tools.whisper_baseline \
        --whisper_model_name_or_path $whisper --data_path "$out/dev-$set.jsonl" \
        --result_path "$out/whisper-$set.jsonl"
    $python -m tools.score --result_path "$out/whisper-$set.jsonl" --by duration
done
$python -m experiments.silence --projector_model_path "$run/projector.safetensors"
