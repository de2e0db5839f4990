#!/usr/bin/env bash
# Trains on one machine, one process per GPU: launch/torchrun.sh [override ...]
#
#   launch/torchrun.sh data=indexed 'data.paths=[data/corpus]' train.out=runs/corpus
#   NPROC=2 launch/torchrun.sh experiment=quickstart parallel=tp2    # on two GPUs or CPU ranks
#
#   NPROC    processes to start; by default one per visible GPU, or one if there is none
#   PYTHON   the interpreter; by default the checkout's .venv/bin/python if it is there, else python
#
# Paths such as train.out and data.paths are relative to where it is called.
# On SIGTERM and SIGINT the run finishes its step, saves and ends; the same command continues it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    if [[ -x "$root/.venv/bin/python" ]]; then PYTHON="$root/.venv/bin/python"; fi
fi

if [[ -z "${NPROC:-}" ]]; then
    NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi

# How long torchrun waits after a signal before it kills the ranks. Its default of 30 seconds is
# short for a step and a checkpoint of a large model.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" \
    -m megakda.train "$@"
