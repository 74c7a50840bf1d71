#!/usr/bin/env bash
# Check and measure this code on one GPU, without a network, in at most 8 minutes on an H100:
#
#     bash bench/gpu.sh OUT           # tables on the screen, and as JSON in the folder OUT
#     bash bench/gpu.sh OUT --tiny    # the same way with tiny sizes; a CPU carries it, too
#
# It needs the packages of requirements.txt and pytest in the environment that `python` is of.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ]; then
    echo "usage: bash bench/gpu.sh OUT [--tiny]" >&2
    exit 2
fi
out=$(realpath -m "$1")
mkdir -p "$out"
python=${PYTHON:-python}
tiny=()
if [ "${2:-}" = --tiny ]; then
    tiny=(--tiny True --steps 12 --batch_size 2)
fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}  # one GPU, where there are several
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
failed=()

# A part that fails does not stop those behind it.
part() {
    local name=$1
    shift
    echo "== $name"
    local start=$SECONDS
    if ! timeout 240 "$@" 2>&1 | tee "$out/$name.log"; then
        failed+=("$name")
    fi
    echo "== $name took $((SECONDS - start)) s"
}

part tests "$python" -m pytest -q -rs -m gpu tests/test_gpu.py
part learning "$python" -m bench.gpu --part learning --output_dir "$out" "${tiny[@]}"
for llm in Qwen2-1.5B Qwen2-7B; do
    part "models-$llm" "$python" -m bench.gpu --part models --llm $llm --output_dir "$out" \
        "${tiny[@]}"
    if "$python" -c "import deepspeed" 2>/dev/null; then
        part "zero-$llm" "$python" -m torch.distributed.run --standalone --nproc_per_node=1 \
            -m bench.gpu --part zero --llm $llm --output_dir "$out" "${tiny[@]}"
    else
        echo "== zero-$llm: left out, as deepspeed is not installed"
    fi
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; their logs are in $out"
    exit 1
fi
