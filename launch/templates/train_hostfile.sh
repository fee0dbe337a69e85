#!/usr/bin/env bash
# Several machines by a hostfile ("name slots=8" per line): HOSTFILE=hosts bash train_hostfile.sh --config run.yaml
# With passwordless ssh run it once. Without ssh run it on every machine with NODE_RANK and MASTER_ADDR set.
set -euo pipefail

# ---- your site ----------------------------------------------------------------------------------------------------
HOSTFILE=${HOSTFILE:-hosts}
DEEPSPEED=${DEEPSPEED:-deepspeed}
LAUNCHER=${LAUNCHER:-pdsh}               # or another of `deepspeed --help`; LAUNCHER_ARGS are its own options
INCLUDE=${INCLUDE:-} EXCLUDE=${EXCLUDE:-}    # parts of the hostfile: node-a@node-b:0,2
SSH_PORT=${SSH_PORT:-}
MASTER_ADDR=${MASTER_ADDR:-}             # empty: the first address that the first machine says of itself
MASTER_PORT=${MASTER_PORT:-29500}
EXPORT=${EXPORT:-}                       # names of further variables for the nodes: "HF_HOME NCCL_SOCKET_IFNAME"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}     # on each node's own disk
# -------------------------------------------------------------------------------------------------------------------

# DeepSpeed would only warn and then run on this machine alone.
if [ ! -s "$HOSTFILE" ]; then
    echo "train_hostfile.sh: error: hostfile '$HOSTFILE' is missing or empty; set HOSTFILE=FILE with lines like" \
        "'node-a slots=8'" >&2
    exit 2
fi

# ssh brings no variables along: DeepSpeed takes those for the nodes from a file, `NAME=value` on each line.
variables=$(mktemp)
trap 'rm -f "$variables"' EXIT
cat "$HOME/${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}" 2> /dev/null | grep = > "$variables" || true
for name in OMP_NUM_THREADS TRITON_CACHE_DIR $EXPORT; do
    [ -z "${!name+set}" ] || echo "$name=${!name}" >> "$variables"
done
export DS_ENV_FILE=$variables

nodes=() words=()
if [ -n "${NODE_RANK:-}" ]; then
    nodes=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?set MASTER_ADDR to the first machine}")
    words=("$@")
else
    nodes=(--force_multi --launcher "$LAUNCHER" --launcher_args="${LAUNCHER_ARGS:-}")    # one machine may be another
    nodes+=(${MASTER_ADDR:+--master_addr="$MASTER_ADDR"} ${SSH_PORT:+--ssh_port="$SSH_PORT"})
    # A shell of the node reads the words after pdsh, to which % means something. DeepSpeed puts those with a space into
    # double quotes, the others nowhere.
    for word in "$@"; do
        case $LAUNCHER:$word in
            pdsh:*' '*) word=$(sed 's/[\\$`]/\\&/g; s/%/%%/g' <<< "$word") ;;
            pdsh:*) word=$(printf %q "${word//%/%%}") ;;
        esac
        words+=("$word")
    done
fi
nodes+=(${INCLUDE:+--include="$INCLUDE"} ${EXCLUDE:+--exclude="$EXCLUDE"})
"$DEEPSPEED" --hostfile "$HOSTFILE" "${nodes[@]}" --master_port "$MASTER_PORT" --no_local_rank \
    --module "${MODULE:-potstill.student_train}" "${words[@]}" &
pid=$!
trap 'stopping=1; kill -TERM "$pid" 2> /dev/null || true' INT TERM HUP
# The exit code of this command is not to be trusted when the launcher is killed: RUN/done.json marks a done run.
while stopping= code=0; wait "$pid" || code=$?; [ -n "$stopping" ]; do :; done
exit "$code"
