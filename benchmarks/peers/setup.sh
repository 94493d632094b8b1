#!/usr/bin/env bash
# Makes the virtual environment of the peers: benchmarks/peers/setup.sh [folder]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:-$here/../../.venv-peers}"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet --requirement "$here/requirements.txt"
"$folder/bin/python" -c "import captum, nnsight, torch, transformer_lens; print(torch.__version__)"
