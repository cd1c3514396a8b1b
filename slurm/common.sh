# What the scripts of this folder share: the site's environment, srun, and saving before the end.
# shellcheck shell=bash
#
# The site and `dinogen launch` may set, before or in the file that DINOGEN_SETUP names:
#   DINOGEN_SETUP      a file that is sourced here: module load, variables, ...
#   DINOGEN_PYTHON     the interpreter; else that of .venv beside this folder, else python
#   DINOGEN_CONTAINER  words put before it, such as: apptainer exec --nv dinogen.sif
#   DINOGEN_PROCESSES  processes per node; else as many as the job has GPUs on a node, else 1
#   DINOGEN_RESTARTS   how often torchrun restarts its workers after a failure (2)
#   DINOGEN_MIN_NODES  fewest nodes to continue on when others are lost; default: all

# ---- the site: modules ---------------------------------------------------------------------------
# module load cuda
# ---- the site: container -------------------------------------------------------------------------
# DINOGEN_CONTAINER="apptainer exec --nv --bind /scratch $HOME/dinogen.sif"
# ---- the site: network ---------------------------------------------------------------------------
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# --------------------------------------------------------------------------------------------------

if [[ -n ${DINOGEN_SETUP:-} ]]; then
    # shellcheck source=/dev/null
    . "$DINOGEN_SETUP"
fi
if [[ -z ${DINOGEN_PYTHON:-} ]]; then
    DINOGEN_PYTHON=$DINOGEN_SLURM/../.venv/bin/python
    [[ -x $DINOGEN_PYTHON ]] || DINOGEN_PYTHON=python
fi

processes=${DINOGEN_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
((processes > 0)) || processes=1
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
# srun passes on what was set here, with any --export of sbatch.
export SLURM_EXPORT_ENV=ALL
# More threads than cores only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > processes ? cpus / processes : 1))}
# srun no longer takes it from the job since Slurm 22.05.
export SRUN_CPUS_PER_TASK=$cpus

# dinogen_on_one ARGS...: `dinogen ARGS` as one process, in the place of this shell.
dinogen_on_one() {
    # shellcheck disable=SC2086  # a command of several words
    exec srun --nodes=1 --ntasks=1 ${DINOGEN_CONTAINER:-} "$DINOGEN_PYTHON" -m launch.cli "$@"
}

# dinogen_on_all ARGS...: `dinogen ARGS` under torchrun, on all nodes and GPUs of the job, in the
# place of this shell.
dinogen_on_all() {
    local nodes=$SLURM_JOB_NUM_NODES first lost_nodes=()
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if ((${DINOGEN_MIN_NODES:-$nodes} < nodes)); then
        nodes=$DINOGEN_MIN_NODES:$nodes
        lost_nodes=(--no-kill --wait=0)
    else
        lost_nodes=(--wait=60) # one torchrun gone: the others would wait for it for 10 minutes
    fi
    # A lost node is noticed after 10 s, and the others then wait 5 s for one that may still come.
    local rdzv=keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=5
    # One agent per node; -m launch.local.torchrun is torchrun that hands USR1 on to its workers.
    # shellcheck disable=SC2086
    exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${lost_nodes[@]}" \
        ${DINOGEN_CONTAINER:-} "$DINOGEN_PYTHON" -m launch.local.torchrun \
        --nnodes="$nodes" --nproc-per-node="$processes" \
        --max-restarts="${DINOGEN_RESTARTS:-2}" \
        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d \
        --rdzv-endpoint="$first:$(free_port)" --rdzv-conf="$rdzv" \
        -m launch.cli "$@"
}

# A port of the first node, where the batch script runs. It hangs on the job's number, so that jobs
# on one node do not meet, and stays below the ports that the kernel gives to clients.
free_port() {
    local port=$((20000 + SLURM_JOB_ID % 10000))
    while (: <"/dev/tcp/$(hostname)/$port") 2>/dev/null; do port=$((port < 29999 ? port + 1 : 20000)); done
    echo $port
}

# resumable dinogen_on_... ARGS...: run it; asked to stop, let it save, and queue the job again.
#
# SLURM sends USR1 to this script alone (--signal=B:USR1@...): srun hands it on to its tasks. TERM
# comes with scancel and preemption. CONT is not trapped: bash would lose USR1 for it.
resumable() {
    local stopped="" code=0
    "$@" &
    local pid=$!
    trap 'stopped=USR1; echo "USR1: saving"; kill -USR1 "$pid" 2>/dev/null || true' USR1
    trap 'stopped=TERM; echo "TERM: saving"; kill -TERM "$pid" 2>/dev/null || true' TERM
    await "$pid" || code=$?
    # 75: asked to stop, saved. 0 after a signal: the same, or it was finished just before.
    if [[ $code -eq 75 || ($code -eq 0 && -n $stopped) ]]; then
        requeue "saved"
    elif ((code != 0)) && ! all_nodes_answer; then
        # SLURM takes minutes to notice, and would take this job for one that failed by itself.
        requeue "a node does not answer"
    fi
    return "$code"
}

# requeue REASON: put this job back into the queue, unless scancel is ending it (COMPLETING).
requeue() {
    if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
        echo "$1: job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}

# Whether the slurmd of every node of the job can be reached.
all_nodes_answer() {
    local node facts address port
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        facts=$(scontrol --oneliner show node "$node")
        address=$(sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' <<<"$facts")
        port=$(sed -n 's/.* Port=\([0-9]*\).*/\1/p' <<<"$facts")
        port=${port:-$(scontrol show config | sed -n 's/^SlurmdPort *= *//p')}
        timeout 10 bash -c ": <'/dev/tcp/$address/$port'" 2>/dev/null || return 1
    done
}

# restartable dinogen_on_... ARGS...: run it; out of time, queue the job again. For work that goes
# on wherever it was killed.
restartable() {
    "$@" &
    local pid=$!
    trap 'echo "USR1: back into the queue"; scontrol requeue "$SLURM_JOB_ID"' USR1
    await "$pid"
}

# await PID: wait for a child to its end, and return what it ended with. Traps run between two sleeps:
# one that breaks into `wait` in the moment in which the child ends makes bash 5.2 lose its code.
await() {
    while kill -0 "$1" 2>/dev/null; do
        sleep 0.5 || true
    done
    wait "$1"
}
