#!/usr/bin/env bash
# A dump on the machines of a hostfile, one worker per slot, sealed at the end. Stopped? Run it again: it continues.
#   HOSTFILE=hosts OUTPUT=targets bash dump_hostfile.sh --tokens data/train --teacher models/teacher
# With --engine zero3 all slots together hold one teacher. It starts train_hostfile.sh beside it, with its settings.
set -euo pipefail

# ---- your site ----------------------------------------------------------------------------------------------------
PYTHON=${PYTHON:-python}
STAGE=${STAGE:-dump}                                     # or score
OUTPUT=${OUTPUT:?set OUTPUT to the store to write}
STORES=${STORES:-$OUTPUT}                                # of a series of checkpoints: "OUTPUT/step_1 OUTPUT/step_2"
LOCAL_DISK=${LOCAL_DISK:-/tmp}                           # each node's own
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$LOCAL_DISK/triton-$(id -u)}
export HF_TOKEN_PATH=${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token}
export HF_HOME=${HF_HOME:-$LOCAL_DISK/huggingface-$(id -u)}
export EXPORT="HF_HOME HF_TOKEN_PATH ${EXPORT:-}"
# -------------------------------------------------------------------------------------------------------------------

MODULE=potstill.launch bash "$(dirname "$0")/train_hostfile.sh" "$STAGE" "$@" --output "$OUTPUT" &
pid=$!
trap 'stopping=1; kill -TERM "$pid" 2> /dev/null || true' INT TERM HUP
while stopping= code=0; wait "$pid" || code=$?; [ -n "$stopping" ]; do :; done
[ "$code" -eq 0 ] || exit "$code"

for store in $STORES; do
    "$PYTHON" -m potstill.launch status --json "$store" > /dev/null || "$PYTHON" -m potstill.launch seal "$store"
done
