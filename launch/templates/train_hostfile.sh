#!/usr/bin/env bash
# Several machines by a hostfile ("name slots=8" per line): HOSTFILE=hosts bash train_hostfile.sh --config run.yaml
# With passwordless ssh run it once. Without ssh run it on every machine with NODE_RANK and MASTER_ADDR set.
set -euo pipefail

# ---- your site ----------------------------------------------------------------------------------------------------
HOSTFILE=${HOSTFILE:-hosts}
DEEPSPEED=${DEEPSPEED:-deepspeed}
MASTER_PORT=${MASTER_PORT:-29500}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}
# -------------------------------------------------------------------------------------------------------------------

# DeepSpeed would only warn and then run on this machine alone.
if [ ! -s "$HOSTFILE" ]; then
    echo "train_hostfile.sh: error: hostfile '$HOSTFILE' is missing or empty; set HOSTFILE=FILE with lines like" \
        "'node-a slots=8'" >&2
    exit 2
fi

nodes=()
if [ -n "${NODE_RANK:-}" ]; then
    nodes=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?set MASTER_ADDR to the first machine}")
fi
# The exit code of this command is not to be trusted when the launcher is killed: RUN/done.json marks a done run.
exec "$DEEPSPEED" --hostfile "$HOSTFILE" "${nodes[@]}" --master_port "$MASTER_PORT" \
    --module potstill.student_train "$@"
