#!/usr/bin/env bash
# One learning curve for each choice that was made, against the default (first rows):
#
#     bash bench/ablations.sh TRAIN.jsonl DEV.jsonl LLM WHISPER.pt OUT [ARM...]
#
# from the repository's root. 3,200 English utterances of at most 5 s are seen, of which the CTC loss
# has the first half to itself. Transcripts are made lower-case and lose their punctuation, in all
# but one arm. A curve that is there already is not computed again, so that it can be stopped and go
# on.
set -euo pipefail
train=$1 dev=$2 llm=$3 whisper=$4 out=$5 only=" ${*:6} "
mkdir -p "$out"

.venv/bin/python - "$train" "$dev" "$out" << 'END'
import json
import sys
from pathlib import Path

import soundfile

sys.path.insert(0, "bench")
from augment import plain

*manifests, out = map(Path, sys.argv[1:])
# every fifth utterance of dev
for manifest, name, share, most in zip(manifests, ("train", "dev"), (1, 5), (5, float("inf"))):
    rows = [json.loads(line) for line in manifest.read_text().strip().split("\n")][::share]
    published, lower = Path(out, f"{name}.jsonl"), Path(out, f"{name}.lower.jsonl")
    with published.open("w") as a, lower.open("w") as b:
        for row in rows:
            row["wav"] = str((manifest.parent / row["wav"]).resolve())
            if soundfile.info(row["wav"]).duration > most or not plain(row["txt"]):
                continue
            print(json.dumps(row), file=a)
            row["txt"] = plain(row["txt"])
            print(json.dumps(row), file=b)
END

arm() { # NAME, constants of model.py, --, flags of train.py
    local name=$1 text=.lower constants=()
    shift
    if [ "$only" != "  " ] && [[ "$only" != *" $name "* ]]; then return; fi
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        constants+=("$1")
        shift
    done
    if [ "$name" = as-published ]; then text=; fi
    if [ ! -e "$out/$name/curve.md" ]; then
        rm -rf "${out:?}/$name"
        .venv/bin/python bench/ablate.py "$out/encoded" "${constants[@]}" -- \
            --llm_model_name_or_path "$llm" --whisper_model_name_or_path "$whisper" \
            --data_path "$out/train$text.jsonl" --eval_data_path "$out/dev$text.jsonl" \
            --eval_strategy steps --eval_steps 50 --eval_hypotheses 100 --max_steps 200 \
            --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --bf16 True \
            --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 \
            --dataloader_num_workers 1 --report_to none --save_strategy no \
            --output_dir "$out/$name" "${@:2}" > "$out/$name.log" 2>&1
    fi
    sed "s/^/$name | /" "$out/$name/curve.md" | tail -n +3
}

echo "choice | utterances | loss | listening gap | greedy WER"
echo "---|---|---|---|---"
arm default
arm no-ctc -- --ctc_weight 0
arm ctc-beside-from-the-start -- --ctc_first 0
arm as-published
arm stride-4 -- --stride 4
arm lr-3e-4 -- --learning_rate 3e-4
arm stride-3 -- --stride 3
arm blanks-kept BLANK_COSINE=2
arm no-examples "prompt=Repeat word for word:"
arm transcribe "prompt=Transcribe the speech."
arm sharpness-7 CTC_SHARPNESS=7
arm sharpness-28 CTC_SHARPNESS=28
arm blank-newline blank=$'\n'
arm no-rms-norm rms_norm=off
arm lr-3e-3 -- --learning_rate 3e-3
arm stride-8 -- --stride 8
for seed in 1 2 3; do # windows cut to the speech, and of 30 s as Whisper was trained
    arm "seed-$seed" -- --seed "$seed"
    arm "whole-windows-seed-$seed" SILENCE=480000 -- --seed "$seed"
done
