# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are shared among these files
# The judge's server: started here with tools/serve_vllm.py, or one that runs already; checked either way.

JUDGE_PID=
JUDGE_READY=   # file that holds the URL once the server is healthy
JUDGE_LOG=
INSECURE=()    # --allow-insecure-judge or nothing
JUDGE_ENV=()   # put before the server's command, such as (env CUDA_VISIBLE_DEVICES=0)

# begin_judge MODEL_DIR LOG READY_FILE FLAG... : start the server, without waiting until it is healthy.
begin_judge() {
    local model=$1 log=$2
    JUDGE_READY=$3
    shift 3
    rm -f "$JUDGE_READY"
    start_logged "$log" "${JUDGE_ENV[@]}" "$PYTHON" tools/serve_vllm.py --model "$model" --ready-file "$JUDGE_READY" "$@"
    JUDGE_PID=${STARTED[-1]}
    JUDGE_LOG=$log
}

# await_judge : wait until the server that was begun is healthy; sets JUDGE_URL.
await_judge() {
    while [[ ! -f $JUDGE_READY ]]; do
        if [[ -z $(still_there "$JUDGE_PID") ]]; then
            warn "the judge server did not start; the end of $JUDGE_LOG:"
            tail -n 25 "$JUDGE_LOG" | sed 's/^/    /' >&2
            exit 1
        fi
        sleep 0.5
    done
    JUDGE_URL=$(<"$JUDGE_READY")
}

# start_judge MODEL_DIR LOG READY_FILE FLAG... : start the server and wait until it is healthy; sets JUDGE_URL.
start_judge() {
    begin_judge "$@"
    await_judge
}

# stop_judge : end the server that start_judge started, if there is one.
stop_judge() {
    [[ -n $JUDGE_PID ]] || return 0
    end_all "$JUDGE_PID"
    wait "$JUDGE_PID" 2>/dev/null || true
    forget "$JUDGE_PID"
    JUDGE_PID=
}

# allow_insecure FLAG... : a key may travel over plain http where the trainer's FLAGs say so, in our own checks too.
allow_insecure() {
    local word
    for word in "$@"; do
        [[ $word != --allow-insecure-judge ]] || INSECURE=(--allow-insecure-judge)
    done
}

# check_judge URL... : each answers as an OpenAI-compatible server with the key of the environment.
check_judge() {
    local flags=("${INSECURE[@]}" ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"})
    "$PYTHON" tools/check_server.py --judge-url "$@" "${flags[@]}" | sed 's/^/         /' || exit 1
}
