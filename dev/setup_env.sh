#!/usr/bin/env bash
# Creates VENV (or updates it) with the smallest set of packages that runs the ComfyUI checkout COMFYUI on a
# CPU (Python API, server, web page) and this pack's tests: triton for its CPU interpreter, NVRTC to build the CUDA
# kernel without a GPU, pytest, ruff.
#
#   dev/setup_env.sh VENV COMFYUI          PYTHON=python3.12 dev/setup_env.sh ... for another interpreter
#
# Which version of what comes from the checkout's own requirements.txt; torch and its relatives are pinned
# here, because an unpinned torchvision would pull in another torch. pip's own settings apply: point
# PIP_EXTRA_INDEX_URL at a source of CPU wheels to save the gigabytes of CUDA that torch brings otherwise.
# Running it again is cheap; with another checkout it moves the pinned comfy packages to that one's versions.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1 comfyui=$2
[ -f "$comfyui/requirements.txt" ] || { echo "no requirements.txt in $comfyui" >&2; exit 1; }

echo "environment $venv: about two minutes the first time" >&2
"$venv/bin/python" -c '' 2>/dev/null || "${PYTHON:-python3.11}" -m venv --clear "$venv"
install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" </dev/null; }

cat > "$venv/constraints.txt" <<PINS
torch==2.13.0
torchvision==0.28.0
torchaudio==2.11.0
triton==3.7.1
nvidia-cuda-nvrtc-cu12==12.8.93
PINS
# Not needed to start, or of no use without a display; core nodes that want them report that they cannot load.
skip='comfyui-workflow-templates|comfyui-embedded-docs|PyOpenGL|comfy-angle'
grep -vE "^(torch|torchvision|torchaudio|$skip)([^A-Za-z0-9_-]|\$)" "$comfyui/requirements.txt" > "$venv/requirements.txt"
[ "$(uname -s)" = Linux ] && compilers="triton nvidia-cuda-nvrtc-cu12" || compilers=

install -c "$venv/constraints.txt" torch $compilers
install -c "$venv/constraints.txt" --no-deps torchvision torchaudio
install -c "$venv/constraints.txt" -r "$venv/requirements.txt" -r "$here/../requirements.txt" pytest pytest-xdist hypothesis ruff

# Work-arounds for a CPU build of torch, whose torchvision and torchaudio are still built for CUDA.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
if "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
    cp "$here/tv_cpu_hook.py" "$site/"
    echo 'import tv_cpu_hook' > "$site/tv_cpu_hook.pth"
    rm -f "$site"/torchaudio/lib/*torchaudio*.so     # without it torchaudio runs in pure Python
fi

"$venv/bin/python" - <<'CHECK'
import importlib.metadata as metadata
import torch, torchaudio, torchvision  # noqa: F401
found = {d.name.replace('_', '-'): d.version for d in metadata.distributions()}
print(*(f"{name} {found[name]}" for name in (
    "torch", "torchvision", "torchaudio", "triton", "numpy", "einops", "safetensors", "comfy-kitchen", "comfy-aimdo",
    "comfyui-frontend-package", "pytest", "pytest-xdist", "hypothesis", "ruff") if name in found), sep=", ")
CHECK
echo "$venv ready in $SECONDS s, $(du -sh "$venv" | cut -f1)"
