#!/usr/bin/env bash
# One run to benchmark figures: export its newest checkpoint, then lm_eval on the folder, each in its own process.
#   TASKS=mine_a,mine_b INCLUDE_PATH=tasks bash export_and_eval.sh RUN MODEL_DIR RESULTS_DIR [more options of lm_eval]
# Needs the extra: pip install 'potstill[eval]'. A MODEL_DIR that exists is an error; FORCE=1 replaces it.
set -euo pipefail

# ---- your site ----------------------------------------------------------------------------------------------------
PYTHON=${PYTHON:-python}
TASKS=${TASKS:-}                   # names, comma between them
INCLUDE_PATH=${INCLUDE_PATH:-}     # folder with your own task files; empty: only those that lm_eval brings
WORK_DIR=${WORK_DIR:-$PWD}         # task files may name their data relative to this folder
DTYPE=${DTYPE:-float32}
DEVICE=${DEVICE:-}                 # cuda, cpu, ...; empty: a GPU if there is one
BATCH_SIZE=${BATCH_SIZE:-16}
# Nodes of a cluster have no network: fail at once instead of waiting for it. Set both to 0 for tasks of the Hub.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
# -------------------------------------------------------------------------------------------------------------------

if [ $# -lt 3 ] || [ -z "$TASKS" ]; then
    echo "usage: TASKS=a,b [INCLUDE_PATH=folder] $0 RUN MODEL_DIR RESULTS_DIR [options of lm_eval]" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("lm_eval") is None)'; then
    echo "$PYTHON has no lm_eval; install the extra: pip install 'potstill[eval]'" >&2
    exit 2
fi
run=$(realpath "$1") model=$(realpath -m "$2") results=$(realpath -m "$3")
shift 3
DEVICE=${DEVICE:-$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
include=()
if [ -n "$INCLUDE_PATH" ]; then
    include=(--include_path "$(realpath "$INCLUDE_PATH")")
fi

"$PYTHON" -m potstill.launch export --run "$run" --output "$model" ${FORCE:+--force}
cd "$WORK_DIR"
exec "$PYTHON" -m lm_eval --model hf --model_args "pretrained=$model,dtype=$DTYPE" "${include[@]}" --tasks "$TASKS" \
    --device "$DEVICE" --batch_size "$BATCH_SIZE" --output_path "$results" "$@"
