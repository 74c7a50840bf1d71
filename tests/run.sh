#!/usr/bin/env bash
# Set up .venv where it is missing, check the style and run every test:
#
#     bash tests/run.sh            # arguments go to pytest: bash tests/run.sh -k prompt
set -euo pipefail
cd "$(dirname "$0")/.."
source demo/environment.sh requirements.txt demo/requirements.txt tools/requirements.txt \
    tests/requirements.txt

export CUDA_VISIBLE_DEVICES=  # the tests are for CPUs
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest --durations=5 "$@"
