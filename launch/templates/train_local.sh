#!/usr/bin/env bash
# One machine, all its GPUs (or NUM_RANKS processes on a CPU): bash train_local.sh --config run.yaml --set a.b=value
set -euo pipefail

# ---- your site ----------------------------------------------------------------------------------------------------
PYTHON=${PYTHON:-python}
NUM_RANKS=${NUM_RANKS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
MASTER_PORT=${MASTER_PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}
# -------------------------------------------------------------------------------------------------------------------

# torchrun, because it passes TERM on to the ranks; the `deepspeed` command leaves them running (DeepSpeed issue 4098).
exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$NUM_RANKS" --master-addr 127.0.0.1 \
    --master-port "$MASTER_PORT" -m potstill.student_train "$@"
