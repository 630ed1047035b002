#!/usr/bin/env bash
# One host's share of a Rhizome system, from the variables that SLURM launchers export:
#
#   NNODES NPROC_PER_NODE NODE_RANK MASTER_ADDR MASTER_PORT    hosts, GPUs a host, which is this
#   SGLANG_EXECUTION_MODE    `offline` (default): benchmark and end; `server`: serve until ended
#   SGLANG_MODEL_PATH        directory of the model; --model-path goes before it
#
# usage: launch.sh [--one-group] [rhizome serve's flags] [-- rhizome bench serving's flags]
#
# docs/slurm.md has the rest.
set -euo pipefail

die() {
    echo "launch.sh: $*" >&2
    exit 2
}

# A whole number within bounds, for what arithmetic and flags are made of.
require_number() { # name value least greatest
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
        die "$1 must be a number within $3..$4, got '$2'"
    fi
}

nnodes=${NNODES:-1}
nproc_per_node=${NPROC_PER_NODE:-1}
node_rank=${NODE_RANK:-0}
master_addr=${MASTER_ADDR:-127.0.0.1}
master_port=${MASTER_PORT:-29500}
mode=${SGLANG_EXECUTION_MODE:-offline}

require_number NNODES "$nnodes" 1 100000
require_number NPROC_PER_NODE "$nproc_per_node" 1 1000
require_number NODE_RANK "$node_rank" 0 $((nnodes - 1))
require_number MASTER_PORT "$master_port" 1 65535
[[ $mode == server || $mode == offline ]] \
    || die "SGLANG_EXECUTION_MODE must be server or offline, got '$mode'"

one_group=false
flags=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --one-group) one_group=true ;;
        *) flags+=("$1") ;;
    esac
    shift
done
if (($#)) && [[ $mode == server ]]; then
    die "flags after -- are for the benchmark, and SGLANG_EXECUTION_MODE is server"
fi

if $one_group; then
    replicas=1 ranks=$((nnodes * nproc_per_node))
else
    replicas=$nnodes ranks=$nproc_per_node
fi
# madengine exports it; Rhizome takes the same from NPROC_PER_NODE.
if [[ ${SGLANG_TENSOR_PARALLEL_SIZE:-$nproc_per_node} != "$nproc_per_node" ]]; then
    die "SGLANG_TENSOR_PARALLEL_SIZE is $SGLANG_TENSOR_PARALLEL_SIZE, NPROC_PER_NODE is $nproc_per_node"
fi

command=(--tp "$ranks" --dp "$replicas")
if ((nnodes > 1)); then
    command+=(--nnodes "$nnodes" --node-rank "$node_rank" --end-with-node-0)
    command+=(--nccl-init-addr "$master_addr:$master_port")
fi
# What the caller's own flags may say otherwise.
has_flag() { # name
    local flag
    for flag in ${flags[@]+"${flags[@]}"}; do
        [[ ${flag%%=*} == "$1" ]] && return 0
    done
    return 1
}
has_flag --host || command+=(--host 0.0.0.0)
has_flag --shutdown-grace-s || command+=(--shutdown-grace-s 15)
if [[ -n ${SGLANG_MODEL_PATH:-} ]] && ! has_flag --model-path && ! has_flag --model; then
    command+=(--model-path "$SGLANG_MODEL_PATH")
fi

if [[ $mode == server ]]; then
    command=(serve "${command[@]}" ${flags[@]+"${flags[@]}"})
else
    has_flag --perf-csv || command+=(--perf-csv perf.csv)
    [[ -z ${SLURM_JOB_ID:-} ]] || command+=(--deployment-type slurm)
    command=(offline "${command[@]}" ${flags[@]+"${flags[@]}"} "$@")
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${RHIZOME_PYTHON:-}
if [[ -z $python ]]; then
    python=$here/../../.venv/bin/python
    [[ -x $python ]] || python=python3
fi
exec "$python" -m services.launch "${command[@]}"
