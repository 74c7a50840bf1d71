#!/usr/bin/env bash
# Set up .venv where it is missing, check the style and run every test:
#
#     bash tests/run.sh            # arguments go to pytest: bash tests/run.sh -k prompt
#     bash tests/run.sh -m gpu     # what needs a GPU, on the first one
set -euo pipefail
cd "$(dirname "$0")/.."
source demo/environment.sh requirements.txt demo/requirements.txt tools/requirements.txt \
    tests/requirements.txt

gpu=  # the other tests are for CPUs
if [[ " $* " == *" -m gpu "* ]]; then
    gpu=${CUDA_VISIBLE_DEVICES:-0}
fi
export CUDA_VISIBLE_DEVICES=$gpu
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -rs --durations=5 "$@"
