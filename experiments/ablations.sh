#!/usr/bin/env bash
# A learning curve for each choice that was made, beside the default (first rows):
#
#     bash experiments/ablations.sh TRAIN.jsonl DEV.jsonl LLM WHISPER.pt OUT [ARM...]
#
# from the repository's root, after demo/run.sh. 3,200 English utterances of at most 5 s are seen,
# the first half with the CTC loss alone; every fifth utterance of DEV is evaluated. Transcripts are
# lower-case without punctuation, in all but one arm. A curve that is there already is not computed
# again, so that it can be stopped and go on.
set -euo pipefail
train=$1 dev=$2 llm=$3 whisper=$4 out=$5 only=" ${*:6} "
python=.venv/bin/python
mkdir -p "$out"

select_utterances() { # IN, OUT, flags
    [ -e "$2" ] || $python -m experiments.augment select \
        --data_path "$1" --output_path "$2" "${@:3}"
}

select_utterances "$train" "$out/train.jsonl" --longest 5 --lower False
select_utterances "$train" "$out/train.lower.jsonl" --longest 5
select_utterances "$dev" "$out/dev.jsonl" --every 5 --lower False
select_utterances "$dev" "$out/dev.lower.jsonl" --every 5

arm() { # NAME, fields of model.Config, --, flags of train.py
    local name=$1 text=.lower fields=()
    shift
    if [ "$only" != "  " ] && [[ "$only" != *" $name "* ]]; then return; fi
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        fields+=("$1")
        shift
    done
    if [ "$name" = as-published ]; then text=; fi
    if [ ! -e "$out/$name/curve.md" ]; then
        rm -rf "${out:?}/$name"
        $python -m experiments.ablate "${fields[@]}" -- \
            --llm_model_name_or_path "$llm" --whisper_model_name_or_path "$whisper" \
            --encoder_cache "$out/encoded" \
            --data_path "$out/train$text.jsonl" --eval_data_path "$out/dev$text.jsonl" \
            --eval_strategy steps --eval_steps 50 --eval_hypotheses 100 --max_steps 200 \
            --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --bf16 True \
            --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 \
            --dataloader_num_workers 1 --report_to none --save_strategy no \
            --output_dir "$out/$name" "${@:2}" > "$out/$name.log" 2>&1
    fi
    tail -n +3 "$out/$name/curve.md" | sed "s/^/| $name /"
}

echo "| choice | utterances | loss | listening gap | greedy WER % |"
echo "| --- | --- | --- | --- | --- |"
arm default
arm no-ctc -- --ctc_weight 0
arm ctc-beside-from-the-start -- --ctc_first 0
arm as-published
arm stride-4 stride=4
arm lr-3e-4 -- --learning_rate 3e-4
arm stride-3 stride=3
arm blanks-kept blank_threshold=2
arm transcribe "prompt=Transcribe the speech."
arm sharpness-7 ctc_sharpness=7
arm sharpness-28 ctc_sharpness=28
arm lr-3e-3 -- --learning_rate 3e-3
arm stride-8 stride=8
arm seed-1 -- --seed 1
arm seed-2 -- --seed 2
arm seed-3 -- --seed 3
