#!/usr/bin/env bash
# Machines that come and go, the same command on each: ENDPOINT=node-a:29400 bash train_torchrun.sh --config run.yaml
# Each time one joins or is lost, the ranks of the others end and continue with those that are there, from the newest
# checkpoint (checkpoint.resume: auto).
set -euo pipefail

# ---- your site ----------------------------------------------------------------------------------------------------
PYTHON=${PYTHON:-python}
ENDPOINT=${ENDPOINT:?set ENDPOINT to HOST:PORT, the machine where all meet; it has to stay}
NODES=${NODES:-1:64}                     # fewest:most machines
RUN_ID=${RUN_ID:-potstill}               # another for each run that meets at the same ENDPOINT
MAX_RESTARTS=${MAX_RESTARTS:-100}        # of the ranks of this machine after an error; 0 would end with the first
RDZV_CONF=${RDZV_CONF:-}                 # more of torchrun's rendezvous, with a comma between: last_call_timeout=5
NUM_RANKS=${NUM_RANKS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
# Minutes that a rank waits for one that does not answer: a machine that is cut off closes no connection.
export DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-30}
# Else a machine that joins later looks for the others' address where nobody writes it again (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}
# -------------------------------------------------------------------------------------------------------------------

exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$NUM_RANKS" \
    --max-restarts "$MAX_RESTARTS" --rdzv-backend c10d --rdzv-endpoint "$ENDPOINT" --rdzv-id "$RUN_ID" \
    ${RDZV_CONF:+--rdzv-conf "$RDZV_CONF"} -m potstill.student_train "$@"
