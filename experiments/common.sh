# Sourced by other scripts, with $train and $dev, one manifest or several, and $out set: makes
# $out/train.jsonl, $out/dev.jsonl and every fifth line of it, $out/dev-fifth.jsonl, with lower-case
# transcripts, and defines what trains and recognises. What is there already is not made again.

source demo/environment.sh requirements.txt demo/requirements.txt tools/requirements.txt
python=.venv/bin/python
mkdir -p "$out"

select_lower() { # OUT, IN..., more flags
    [ -e "$1" ] || $python -m experiments.augment select --output_path "$1" --data_path "${@:2}"
}

select_source() { # OUT, IN, how the lines' src begins
    grep "\"src\": \"$3" "$2" > "$1" || {
        echo "$2: no line has a src that begins with $3" >&2
        exit 2
    }
}

sets=(speechocean762 cv librispeech) # of which EN and EN2 have test sets, as their src begins
split_dev() { # makes $out/dev-SET.jsonl of each
    for set in "${sets[@]}"; do
        select_source "$out/dev-$set.jsonl" "$out/dev.jsonl" "$set"
    done
}

select_lower "$out/train.jsonl" "${train[@]}"
select_lower "$out/dev.jsonl" "${dev[@]}"
select_lower "$out/dev-fifth.jsonl" "$out/dev.jsonl" --every 5

copy_at_speeds() { # FOLDER, MANIFEST, factors
    [ -e "$1/manifest.jsonl" ] || $python -m experiments.augment speed \
        --data_path "$2" --output_dir "$1" --factors "${@:3}"
}

train() { # OUTPUT_DIR, LLM, WHISPER, flags
    [ ! -e "$1/model.safetensors" ] || return 0
    echo "== $1: training"
    $python train.py --output_dir "$1" --llm_model_name_or_path "$2" \
        --whisper_model_name_or_path "$3" --encoder_cache "$out/encoded" --bf16 True \
        --per_device_train_batch_size 16 --per_device_eval_batch_size 20 --learning_rate 1e-3 \
        --warmup_ratio 0.03 --dataloader_num_workers 1 --logging_steps 50 --report_to none "${@:4}"
}

evaluate_fifth=(--eval_data_path "$out/dev-fifth.jsonl" --eval_strategy steps --eval_hypotheses 100)

recognize() { # PROJECTOR, MANIFEST, RESULT, widths of the beam
    $python recognize.py --projector_model_path "$1" --bf16 True \
        --encoder_cache "$out/encoded" --data_path "$2" --result_path "$3" --num_beams "${@:4}"
}
