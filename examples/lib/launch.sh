# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are shared among these files
# How the trainer is launched: the argument arrays that Megatron users know, and torchrun over them.
# The script sets PYTHON, GPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.

MODEL_ARGS=()
TRAINING_ARGS=()
MODEL_PARALLEL_ARGS=()
DATA_ARGS=()
SIP_ARGS=()
EVAL_AND_LOGGING_ARGS=()

# distributed_args : torchrun's own, from the usual variables. A rank that is asked to stop has --sigterm-grace (20 s)
# for its step, 10 s to agree and the rest for the save; torchrun forces it then, and the script forces torchrun.
distributed_args() {
    local patience=$((${STOP_GRACE:-45} - 10))
    DISTRIBUTED_ARGS=(
        --nproc-per-node "$GPUS_PER_NODE"
        --nnodes "$NNODES"
        --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR"
        --master-port "$MASTER_PORT"
        --max-restarts "${MAX_RESTARTS:-0}"
        --shutdown-timeout "$((patience > 5 ? patience : 5))"
    )
}

# train_command EXTRA... : sets COMMAND, the whole launch; EXTRA flags come last and win.
train_command() {
    distributed_args
    COMMAND=(
        "$PYTHON" -m torch.distributed.run "${DISTRIBUTED_ARGS[@]}"
        -m megatron_sip.pretrain
        "${MODEL_ARGS[@]}"
        "${TRAINING_ARGS[@]}"
        "${MODEL_PARALLEL_ARGS[@]}"
        "${DATA_ARGS[@]}"
        "${SIP_ARGS[@]}"
        "${EVAL_AND_LOGGING_ARGS[@]}"
        "$@"
    )
}

# load_args OWN BASE : sets LOAD_ARGS: go on with the run's own checkpoint, else begin with the weights of BASE (a
# checkpoint or a Hugging Face Llama), else anew.
load_args() {
    # Checkpoints whose latest file is lost are still the run's own; to begin with BASE would overwrite them.
    if [[ -z $2 || -f $1/latest_checkpointed_iteration.txt ]] || compgen -G "$1/iter_*[0-9]" >/dev/null; then
        LOAD_ARGS=(--load "$1" --save "$1")
    else
        LOAD_ARGS=(--load "$2" --finetune --save "$1")
    fi
}

# free_port : a port of this machine that nobody listens on and no outgoing connection is given.
free_port() { "$PYTHON" -c 'from megatron_sip.ports import free_port; print(free_port())'; }

# has_gpu : a driver that lists a card; a bare nvidia-smi binary is not one.
has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# bound_threads : one thread a rank without a GPU; threads that spin at barriers would starve the others.
bound_threads() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
}
