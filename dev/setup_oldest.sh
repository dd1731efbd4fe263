#!/usr/bin/env bash
# Creates VENV with the oldest torch that this pack supports, for tests/test_oldest_torch.py.
#
#   dev/setup_oldest.sh VENV          PYTHON=python3.12 dev/setup_oldest.sh ... for another interpreter, 3.10 to 3.12
#
# On Linux x86_64 that torch is a CUDA build of 0.8 GB and asks for 2.4 GB of libraries beside it. On a CPU only the
# smallest of them do anything: these are installed, hollow_cuda.py makes the rest (needs gcc and binutils).
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1 python=${PYTHON:-python3.11} torch=2.4.1
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || {
    echo "torch $torch exists for Python 3.10 to 3.12, found $("$python" --version): set OLDEST_PYTHON" >&2; exit 1; }

echo "environment $venv: torch $torch, a minute or two the first time" >&2
"$venv/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$venv"
install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile "$@" </dev/null; }

install numpy einops 'safetensors>=0.4.2' pytest hypothesis filelock typing-extensions sympy networkx jinja2 fsspec
install --no-deps "torch==$torch"
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    install --no-deps nvidia-cuda-runtime-cu12==12.1.105 nvidia-cuda-cupti-cu12==12.1.105 nvidia-nvtx-cu12==12.1.105
    "$venv/bin/python" "$here/hollow_cuda.py" "$venv"
fi
"$venv/bin/python" -c 'import torch; print("torch", torch.__version__, (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item())'
echo "$venv ready in $SECONDS s, $(du -sh "$venv" | cut -f1)"
