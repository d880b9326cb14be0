# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are shared among these files
# The cluster mode: one call on each node, settings from a recipe, the usual Megatron variables on top.

# cluster_settings : defaults of the variables that the help text names.
cluster_settings() {
    MODEL=${MODEL:-llama-1.4b}
    RUN_DIR=${RUN_DIR:-runs/$MODEL}
    CHECKPOINT_PATH=${CHECKPOINT_PATH:-$RUN_DIR/checkpoints}
    JUDGE_PORT=${JUDGE_PORT:-8100}
    JUDGE_HOST=${JUDGE_HOST:-$MASTER_ADDR}
    # A worker that is asked to stop finishes its step and saves.
    STOP_GRACE=${STOP_GRACE:-110}
    # torchrun starts the ranks again after a fault; they go on from the newest checkpoint.
    MAX_RESTARTS=${MAX_RESTARTS:-3}
}

# cluster_require : what no default can stand for.
cluster_require() {
    [[ -n ${DATA_PATH:-} ]] || die "DATA_PATH is not set; give the prefix of a corpus made by tools/preprocess_data.py"
    [[ -n ${TOKENIZER_MODEL:-} ]] || die "TOKENIZER_MODEL is not set; give the folder of the policy's tokenizer"
    [[ -x $(command -v "$PYTHON") ]] ||
        die "there is no $PYTHON; run 'bash tools/setup.sh trainer' or set PYTHON to an interpreter with the requirements"
}

# cluster_args FLAG... : the argument arrays. The recipe comes first, so that the environment and FLAGs win.
cluster_args() {
    local overrides=() words=() recipe
    read -ra overrides <<<"${RECIPE_OVERRIDES:-}"
    recipe=$("$PYTHON" -m megatron_sip.recipes "$MODEL" "${overrides[@]}" ${GOAL:+--goal "$GOAL"} --print-flags) || exit 2
    mapfile -t MODEL_ARGS <<<"$recipe"
    TRAINING_ARGS=(
        ${MICRO_BATCH_SIZE:+--micro-batch-size "$MICRO_BATCH_SIZE"}
        ${GLOBAL_BATCH_SIZE:+--global-batch-size "$GLOBAL_BATCH_SIZE"}
        ${TRAIN_ITERS:+--train-iters "$TRAIN_ITERS"}
        ${LR:+--lr "$LR"}
    )
    MODEL_PARALLEL_ARGS=(
        ${TP:+--tensor-model-parallel-size "$TP"}
        ${PP:+--pipeline-model-parallel-size "$PP"}
    )
    read -ra words <<<"$DATA_PATH"
    DATA_ARGS=(--data-path "${words[@]}" --tokenizer-model "$TOKENIZER_MODEL")
    SIP_ARGS=()
    if [[ -n ${JUDGE_URL:-} ]]; then
        read -ra words <<<"$JUDGE_URL"
        SIP_ARGS+=(--judge-url "${words[@]}" ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"})
    fi
    if [[ -n ${REWRITER_URL:-} ]]; then
        read -ra words <<<"$REWRITER_URL"
        SIP_ARGS+=(--rewriter-url "${words[@]}")
    fi
    SIP_ARGS+=(${REWRITER_MODEL:+--rewriter-model "$REWRITER_MODEL"})
    load_args "$CHECKPOINT_PATH" "${LOAD:-}"
    EVAL_AND_LOGGING_ARGS=(
        "${LOAD_ARGS[@]}"
        --save-interval "${SAVE_INTERVAL:-100}"
        --tensorboard-dir "$RUN_DIR/tensorboard"
        ${WANDB_PROJECT:+--wandb-project "$WANDB_PROJECT" --wandb-exp-name "${WANDB_EXP_NAME:-$MODEL}"}
    )
    train_command "$@"
}

# judge_is_ours : this example is to serve the judge, on node 0.
judge_is_ours() { [[ -z ${JUDGE_URL:-} && -n ${JUDGE_MODEL_DIR:-} ]]; }

# judge_flags : how node 0 serves it.
judge_flags() {
    JUDGE_FLAGS=(--host "$JUDGE_HOST" --port "$JUDGE_PORT" ${JUDGE_TP:+--tensor-parallel-size "$JUDGE_TP"})
    [[ -z ${JUDGE_CUDA_VISIBLE_DEVICES:-} ]] || JUDGE_ENV=(env "CUDA_VISIBLE_DEVICES=$JUDGE_CUDA_VISIBLE_DEVICES")
}

# print_command COMMAND... : as a line that a shell would take.
print_command() {
    printf '%q ' "$@"
    printf '\n'
}

# dry_run FLAG... : the commands of this node; without MODEL those of the 1.4B and the 8B recipe.
dry_run() {
    local MODEL=${MODEL:-} RUN_DIR=${RUN_DIR:-} CHECKPOINT_PATH=${CHECKPOINT_PATH:-} JUDGE_URL=${JUDGE_URL:-}
    if [[ -z $MODEL ]]; then
        MODEL=llama-1.4b dry_run "$@"
        MODEL=llama3-8b dry_run "$@"
        return
    fi
    DATA_PATH=${DATA_PATH:-/path/to/corpus_text_document}
    TOKENIZER_MODEL=${TOKENIZER_MODEL:-/path/to/tokenizer}
    cluster_settings
    printf '# %s, node %s of %s\n' "$MODEL" "$NODE_RANK" "$NNODES"
    if judge_is_ours; then
        judge_flags
        [[ $NODE_RANK != 0 ]] ||
            print_command "${JUDGE_ENV[@]}" "$PYTHON" tools/serve_vllm.py --model "$JUDGE_MODEL_DIR" "${JUDGE_FLAGS[@]}"
        JUDGE_URL=http://$JUDGE_HOST:$JUDGE_PORT/v1
    fi
    JUDGE_URL=${JUDGE_URL:-http://judge:8100/v1}
    cluster_args "$@"
    print_command "${COMMAND[@]}"
}

# cluster_judge : node 0 starts or checks the judge; the others know its address.
cluster_judge() {
    local words
    if judge_is_ours; then
        judge_flags
        if [[ $NODE_RANK == 0 ]]; then
            say "starting the judge server, log $RUN_DIR/judge.log"
            start_judge "$JUDGE_MODEL_DIR" "$RUN_DIR/judge.log" "$RUN_DIR/judge.url" "${JUDGE_FLAGS[@]}"
        fi
        JUDGE_URL=http://$JUDGE_HOST:$JUDGE_PORT/v1
    fi
    if [[ $NODE_RANK == 0 && -n ${JUDGE_URL:-} ]]; then
        read -ra words <<<"$JUDGE_URL"
        check_judge "${words[@]}"
    fi
}

# run_cluster FLAG... : this node's share of the run.
run_cluster() {
    local status=0
    cluster_require
    cluster_settings
    mkdir -p "$RUN_DIR"
    has_gpu || bound_threads
    allow_insecure "$@"
    cluster_judge
    cluster_args "$@"
    say "node $NODE_RANK of $NNODES: $(print_command "${COMMAND[@]}")"
    setsid "${WITH_US[@]}" "${COMMAND[@]}" </dev/null &
    STARTED+=("$!")
    wait "${STARTED[-1]}" || status=$?
    forget "${STARTED[-1]}"
    exit "$status"
}
