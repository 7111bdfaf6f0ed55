#!/usr/bin/env bash
# The one place that starts torchrun: a config on the GPUs of one node or several. The run_*_cycle.sh call it.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/launch.sh [--nodes N] [--stage S] [--dry-run | --check] CONFIG [key=value ...]

Starts `searche1 cycle --config CONFIG key=value ...` on every GPU of this node, as one of N nodes. Call it once on each
node, or once under Slurm's srun with one task a node. The same command again continues a run that was stopped.

  --nodes N     nodes that CONFIG is made for (default 1); others take NODES=... to say so
  --stage S     grpo or opsd: that stage alone, from model.path, instead of whole cycles
  --dry-run     print what would be started, and start nothing
  --check       look at the cluster instead: versions, shared folders, messages between ranks
  -h, --help    this text

Environment, each with what it is taken from otherwise:
  NODES         number of nodes                Slurm; else 1, which is refused if CONFIG is made for more
  NODE_RANK     this node's number, from 0     Slurm; node 0 runs the retriever and drives the rollouts
  MASTER_ADDR   address of node 0              Slurm's first host
  MASTER_PORT   a free port there              Slurm: from the job's number; else 29500
  GPUS          processes of a node, one a GPU 8
  RESTARTS      how often ranks are started     3 on one node; on several the same command, or Slurm's queue, does it
                again when one has died

Set here unless you have set them: CUDA_DEVICE_MAX_CONNECTIONS=1, NCCL_DEBUG=WARN,
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280. docs/launching.md explains these and
the NCCL variables of a cluster. SEARCHE1_* of scripts/env.sh work as ever.
END
}
refuse() {
    echo "launch.sh: $*" >&2
    exit 2
}
warn() { echo "launch.sh: $*" >&2; }
is_number() { [[ $1 =~ ^[0-9]+$ ]]; }
is_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; } # something listens on this port

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
made_for=1 stage=cycle mode=run config="" settings=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --nodes)
        if ! is_number "${2:-}" || [ "$2" = 0 ]; then refuse "--nodes is '${2:-}', it must be a number such as 2"; fi
        made_for=$2
        shift
        ;;
    --stage)
        case ${2:-} in cycle | grpo | opsd) stage=$2 ;; *) refuse "--stage is '${2:-}', it must be grpo or opsd" ;; esac
        shift
        ;;
    --dry-run) mode=dry-run ;;
    --check) mode=check ;;
    [a-z]*=*) settings+=("$1") ;;
    -*) refuse "unknown flag '$1'; scripts/launch.sh --help lists the flags" ;;
    *)
        if [ -n "$config" ]; then refuse "two configs were given, $config and $1; one run has one"; fi
        config=$1
        # What torchrun starts, starts in the checkout: a file beside the caller keeps its path.
        if [ -f "$config" ] && ! [ "$PWD" -ef "$root" ]; then config=$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1"); fi
        ;;
    esac
    shift
done
if [ -z "$config" ] && [ $mode != check ]; then refuse "which config? For example configs/qwen2.5-3b.yaml"; fi
# Slurm counts the nodes of this step, or of the job. Without it, a node that was told nothing about others is alone.
nodes=${NODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-}}}
if [ -z "$nodes" ] && [ -n "${NODE_RANK:-}" ]; then
    refuse "NODE_RANK=$NODE_RANK numbers one node of several, but NODES does not say of how many; set it too"
fi
if [ -z "$nodes" ] && [ "$made_for" -gt 1 ]; then
    refuse "$config is made for $made_for nodes. Start it on each of them, with their numbers from 0:
  NODES=$made_for NODE_RANK=0 MASTER_ADDR=<address of node 0> bash scripts/launch.sh $config
or once under Slurm: sbatch --nodes $made_for scripts/slurm/cycle.sbatch $config. NODES=1 tries it on this node alone;
searche1 plan says what fits"
fi
nodes=${nodes:-1} gpus=${GPUS:-8} port=${MASTER_PORT:-}
if [ -z "$port" ]; then # two jobs may share a node
    if is_number "${SLURM_JOB_ID:-}"; then port=$((20000 + SLURM_JOB_ID % 10000)); else port=29500; fi
fi
for pair in "NODES=$nodes" "GPUS=$gpus" "MASTER_PORT=$port"; do
    if ! is_number "${pair#*=}" || [ "${pair#*=}" = 0 ]; then refuse "$pair must be a whole number above 0"; fi
done

rendezvous=(--standalone)
node_rank=0 restarts=${RESTARTS:-3}
if ! is_number "$restarts"; then refuse "RESTARTS=$restarts must be a whole number"; fi
if [ "$nodes" -gt 1 ]; then
    # The shell of a batch job is on its first node only, and has the job's variables without a step's.
    if [ -z "${NODE_RANK:-}" ] && [ -n "${SLURM_NODEID:-}" ] && [ -z "${SLURM_STEP_NUM_NODES:-}" ]; then
        refuse "this job has $nodes nodes, of which only this one would start; put srun --ntasks-per-node=1 before bash"
    fi
    if [ -z "${NODE_RANK:-}" ] && [ "${SLURM_LOCALID:-0}" != 0 ]; then
        refuse "srun started several tasks on this node; give it --ntasks-per-node=1, torchrun starts a process a GPU"
    fi
    node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
    if [ -z "$node_rank" ]; then refuse "NODES=$nodes needs NODE_RANK, this node's number: 0 to $((nodes - 1))"; fi
    if ! is_number "$node_rank" || [ "$node_rank" -ge "$nodes" ]; then
        refuse "NODE_RANK=$node_rank must be a number from 0 to $((nodes - 1)), because NODES=$nodes"
    fi
    address=${MASTER_ADDR:-}
    if [ -z "$address" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        address=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)
    fi
    if [ -z "$address" ]; then refuse "NODES=$nodes needs MASTER_ADDR, an address of node 0 that all nodes reach"; fi
    # Numbered nodes instead of torchrun's elastic rendezvous: the node that runs the retriever and drives the rollouts
    # is chosen by you, and a restart finds it again. Nothing is restarted by torchrun: the same command continues.
    rendezvous=(--nnodes "$nodes" --node-rank "$node_rank" --master-addr "$address" --master-port "$port")
    restarts=0
fi
rendezvous+=(--max-restarts "$restarts")
case ${PYTORCH_CUDA_ALLOC_CONF:-}${PYTORCH_ALLOC_CONF:-} in
*expandable_segments:[Tt]rue*)
    refuse "PYTORCH_CUDA_ALLOC_CONF asks for expandable_segments, whose memory cannot be handed to an engine; unset it"
    ;;
esac
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron's overlap of messages relies on the order
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Seconds between SIGTERM and SIGKILL: a step is finished meanwhile, and a checkpoint written. torchrun's own are 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}

program=(searche1 $stage --config "$config" ${settings[@]+"${settings[@]}"})
if [ $mode = check ]; then program=(searche1.cluster_check ${config:+--config "$config"} ${settings[@]+"${settings[@]}"}); fi
command=(torchrun "${rendezvous[@]}" --nproc-per-node "$gpus" -m "${program[@]}")
if [ $mode = dry-run ]; then
    for name in CUDA_DEVICE_MAX_CONNECTIONS NCCL_DEBUG TORCH_ELASTIC_SHUTDOWN_TIMEOUT; do echo "$name=${!name}"; done
    printf '%q ' "${command[@]}" | sed 's/ $/\n/'
    exit 0
fi

# What would end in a stack trace on some rank, or in minutes of waiting.
if [ -z "${GPUS:-}" ] && [ "${SEARCHE1_DEVICE:-auto}" != cpu ] && [[ $(nvidia-smi -L 2>/dev/null) != *"GPU "* ]]; then
    refuse "nvidia-smi lists no GPU on $(hostname); GPUS=N with SEARCHE1_DEVICE=cpu starts N processes on its CPU"
fi
if [ "${SEARCHE1_DEVICE:-auto}" != cpu ] && command -v nvidia-smi >/dev/null; then
    seen=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then seen=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true); fi
    if [ "$seen" -gt 0 ] && [ "$seen" -lt "$gpus" ]; then
        refuse "GPUS=$gpus processes want a GPU each, but $(hostname) has $seen to use; set GPUS=$seen, or look at" \
            "nvidia-smi -L and CUDA_VISIBLE_DEVICES"
    fi
fi
if [ "$nodes" -gt 1 ]; then
    if [ "$node_rank" = 0 ] && is_taken "$port"; then
        refuse "port $port of this node is taken, perhaps by an earlier run; end that, or set MASTER_PORT on all nodes"
    fi
    if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [[ $(getent ahostsv4 "$(hostname)" 2>/dev/null | head -n 1) = 127.* ]]; then
        case $address in
        127.* | localhost) ;;
        *) warn "$(hostname) is a loopback address in /etc/hosts, and gloo would tell that to the other nodes; if ranks" \
            "do not meet, set GLOO_SOCKET_IFNAME to the interface that leads to them" ;;
        esac
    fi
    warn "node $node_rank of $nodes, $gpus processes; all meet at $address:$port, and wait 10 minutes for the last"
fi
cd "$root"
if [ "$node_rank" != 0 ]; then export SEARCHE1_WAIT=1; fi # node 0 makes the environment on the shared disk
# shellcheck source=scripts/env.sh
source scripts/env.sh
# Rank 0 holds a connection for each trajectory under way, and 1,024 open files are what shells often allow.
most=$(ulimit -Hn)
if [ "$most" = unlimited ] || [ "$most" -gt 65536 ]; then most=65536; fi
if [ "$(ulimit -Sn)" != unlimited ] && [ "$(ulimit -Sn)" -lt "$most" ]; then ulimit -Sn "$most"; fi
# Ranks that end as they should leave their status here and answer torchrun with 0, which else would start them again, or
# print a page of text. A rank that was killed leaves nothing.
SEARCHE1_STATUS=$(mktemp)
export SEARCHE1_STATUS
trap 'rm -f "$SEARCHE1_STATUS"' EXIT
set -m # a group of its own: a shell's other children do not get Ctrl-C
"${command[@]}" &
child=$!
set +m
trap 'kill -INT -- "-$child" 2>/dev/null' INT
trap 'kill -TERM "$child" 2>/dev/null' TERM
status=0
while :; do
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2>/dev/null || break # else that was a signal
done
if [ -s "$SEARCHE1_STATUS" ]; then status=$(cat "$SEARCHE1_STATUS"); fi
exit "$status"
