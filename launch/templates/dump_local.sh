#!/usr/bin/env bash
# One machine, one worker per GPU (NUM_WORKERS on a CPU), sealed at the end. Stopped? Run it again: it continues.
#   OUTPUT=targets bash dump_local.sh --tokens data/train --teacher models/teacher
set -euo pipefail

# ---- your site ----------------------------------------------------------------------------------------------------
PYTHON=${PYTHON:-python}
STAGE=${STAGE:-dump}                                     # or score
OUTPUT=${OUTPUT:?set OUTPUT to the store to write}
STORES=${STORES:-$OUTPUT}                                # of a series of checkpoints: "OUTPUT/step_1 OUTPUT/step_2"
NUM_WORKERS=${NUM_WORKERS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
LOCAL_DISK=${LOCAL_DISK:-${TMPDIR:-/tmp}}                # this machine's own
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NUM_WORKERS - 1) / NUM_WORKERS))}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$LOCAL_DISK/triton-$(id -u)}
export HF_TOKEN_PATH=${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token}
export HF_HOME=${HF_HOME:-$LOCAL_DISK/huggingface-$(id -u)}
# -------------------------------------------------------------------------------------------------------------------

pids=() code=0 stopping=''
# Workers in the background do not see Ctrl-C: all signals reach them as TERM, which ends them cleanly.
trap 'stopping=1; kill -TERM "${pids[@]}" 2> /dev/null || true' INT TERM HUP USR1
for ((worker = 0; worker < NUM_WORKERS; worker++)); do
    [ -z "$stopping" ] || { code=75; break; }
    LOCAL_RANK=$worker "$PYTHON" -m potstill.launch "$STAGE" "$@" --output "$OUTPUT" --worker "$worker" \
        --num-workers "$NUM_WORKERS" &
    pids+=($!)
done
[ -z "$stopping" ] || kill -TERM "${pids[@]}" 2> /dev/null || true    # the signal may have missed the newest

# One that fails leaves the others to their share. The first code that is not 0 is ours; an error goes before a stop.
for pid in "${pids[@]}"; do
    while :; do
        stopping=
        one=0
        wait "$pid" || one=$?
        [ -n "$stopping" ] || break    # a signal ended the waiting, not the worker
    done
    [ "$one" -ne 143 ] || one=75    # TERM while it was still loading
    if [ "$one" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; }; then code=$one; fi
done
[ "$code" -eq 0 ] || exit "$code"

for store in $STORES; do "$PYTHON" -m potstill.launch seal "$store"; done
