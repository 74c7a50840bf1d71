# Sourced by the scripts of demo/, tests/ and experiments/: makes .venv, or reuses it, and installs
# what is given.
#
#     source demo/environment.sh requirements.txt demo/requirements.txt

fail() {
    echo "$0: $1" >&2
    exit 1
}

python=${PYTHON:-python3}
command -v "$python" > /dev/null || fail "no $python: install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" --version) is too old: wanted is 3.11 or newer; set PYTHON to one"
installed=.venv/installed-$(cat "$@" | cksum | cut -d ' ' -f 1)
if [ -e "$installed" ]; then
    echo "== .venv: there already"
else
    if ! .venv/bin/python -c "import torch" 2> /dev/null; then
        free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
        [ "$free" -ge 8 ] || fail "$free GiB of disk are free, but PyTorch and its libraries want 8"
    fi
    echo "== .venv: installing $*: 3 minutes, 3 GB to fetch and 6 on disk, most of it PyTorch's" \
        "libraries for GPUs (README says how to do without)"
    .venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear .venv \
        || fail "$python cannot make a virtual environment: on Debian, install python3-venv"
    requirements=()
    for file in "$@"; do requirements+=(--requirement "$file"); done
    .venv/bin/python -m pip install --disable-pip-version-check "${requirements[@]}" \
        || fail "pip could not install $*: see its lines above"
    touch "$installed"
fi
