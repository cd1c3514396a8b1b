#!/usr/bin/env bash
# Ten minutes on one GPU: whether all of dinogen works there, and how fast. One table at the end.
#   benchmarks/gpu.sh [--json FILE] [--trace FOLDER] [--only WORD]
#   benchmarks/gpu.sh --dry        tiny sizes, on a CPU; also where no GPU is found
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/benchmarks/gpu.py" "$@"
