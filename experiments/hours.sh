#!/usr/bin/env bash
# How much speech does it take? What are transcripts of Whisper's own worth, and a smaller encoder?
# How far do seeds differ? Do copies with noise and echo pay? CTC alone:
#
#     bash experiments/hours.sh EN EN2 OUT
#
# from the repository's root, after demo/run.sh and `python demo/models.py demo/models tiny.en`. EN
# and EN2 are folders as for broad.sh. Projectors are trained from nothing on every 16th, 8th, 4th
# and each utterance of both corpora. Two more of all utterances have other seeds, and one has the
# encoder of Whisper tiny.en. Transcripts that Whisper base itself writes (three hours on one core)
# stand beside every 16th utterance, for as many others, and beside EN, for all of EN2. Every 4th is
# trained on with disturbed copies, too; with and without them, the test sets are recognised as they
# are and disturbed. All trainings see 12,800 utterances. Those of every 16th, every 4th and each
# utterance also recognise 100 others every 200 steps, for a figure. What is there already is not
# made again.
set -euo pipefail
en=$1 en2=$2 out=$3
train=("$en/train.jsonl" "$en2/train.jsonl") dev=("$en/dev.jsonl" "$en2/dev.jsonl")
source experiments/common.sh
whisper=demo/models/base.pt
llm=demo/models/SmolLM2-135M-Instruct

for every in 16 8 4; do
    select_lower "$out/hours-$((16 / every)).jsonl" "$out/train.jsonl" --every $every
done
cp "$out/train.jsonl" "$out/hours-16.jsonl"

add_heard() { # OUT, TRUE, HIDDEN: TRUE and what Whisper hears in HIDDEN
    local heard=${1%.jsonl}-heard.jsonl
    [ -s "$heard" ] || $python -m tools.whisper_baseline --num_beams 1 \
        --whisper_model_name_or_path $whisper --data_path "$3" \
        --result_path "${1%.jsonl}-results.jsonl" --as_manifest "$heard"
    # which leaves out what Whisper writes with digits
    select_lower "$1" "$2" "$heard"
}

# what is in the 2 hours alone
grep -v -x -F -f "$out/hours-1.jsonl" "$out/hours-2.jsonl" > "$out/others.jsonl"
add_heard "$out/pseudo.jsonl" "$out/hours-1.jsonl" "$out/others.jsonl"
select_lower "$out/en.jsonl" "$en/train.jsonl"
add_heard "$out/pseudo-en2.jsonl" "$out/en.jsonl" "$en2/train.jsonl"

disturb() { # OUT, IN: copies with noise or other speakers behind, half of them with an echo
    [ -e "$1/manifest.jsonl" ] || $python -m experiments.augment disturb \
        --data_path "$2" --output_dir "$1"
}
disturb "$out/copies" "$out/hours-4.jsonl"
select_lower "$out/with-copies.jsonl" "$out/hours-4.jsonl" "$out/copies/manifest.jsonl"
split_dev
for set in "${sets[@]}"; do
    disturb "$out/disturbed-$set" "$out/dev-$set.jsonl"
done

probe() { # NAME, MANIFEST, RESULT
    [ -e "$out/$1/$3.jsonl" ] || $python -m experiments.ctc_probe --bf16 True \
        --projector_model_path "$out/$1/model.safetensors" --encoder_cache "$out/encoded" \
        --data_path "$2" --result_path "$out/$1/$3.jsonl"
}
train_and_probe() { # NAME, MANIFEST, WHISPER, flags
    train "$out/$1" $llm "$3" --data_path "$2" --ctc_first 1 --ctc_weight 1 --max_steps 800 \
        --lr_scheduler_type cosine --learning_rate 1.5e-3 --save_strategy no "${@:4}"
    for set in "${sets[@]}"; do
        probe "$1" "$out/dev-$set.jsonl" $set
    done
}
for name in hours-1 hours-4 hours-16; do
    train_and_probe $name "$out/$name.jsonl" $whisper "${evaluate_fifth[@]}" --eval_steps 200
done
for name in hours-2 pseudo en pseudo-en2; do
    train_and_probe $name "$out/$name.jsonl" $whisper
done
for seed in 1 2; do
    train_and_probe seed-$seed "$out/hours-16.jsonl" $whisper --seed $seed
done
train_and_probe tiny.en "$out/hours-16.jsonl" demo/models/tiny.en.pt
train_and_probe with-copies "$out/with-copies.jsonl" $whisper
for set in "${sets[@]}"; do
    for name in hours-4 with-copies; do
        probe $name "$out/disturbed-$set/manifest.jsonl" disturbed-$set
    done
    $python -m tools.score --result_path "$out"/{hours-4,with-copies}/{,disturbed-}$set.jsonl
    $python -m tools.score --result_path "$out"/{hours-*,pseudo,en,pseudo-en2,seed-*,tiny.en}/$set.jsonl
done
$python -m experiments.hours --folder "$out" --output "$out/hours.png"
$python -m tools.plot --runs "$out"/hours-{1,4,16} --output "$out/seen.png"
