# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are shared among these files
# The judge's server: started here with tools/serve_vllm.py, or one that runs already; checked either way.

JUDGE_PID=
INSECURE=()    # --allow-insecure-judge or nothing
JUDGE_ENV=()   # put before the server's command, such as (env CUDA_VISIBLE_DEVICES=0)

# start_judge MODEL_DIR LOG READY_FILE FLAG... : start the server and wait until it is healthy; sets JUDGE_URL.
start_judge() {
    local model=$1 log=$2 ready=$3 pid
    shift 3
    rm -f "$ready"
    start_logged "$log" "${JUDGE_ENV[@]}" "$PYTHON" tools/serve_vllm.py --model "$model" --ready-file "$ready" "$@"
    pid=${STARTED[-1]}
    JUDGE_PID=$pid
    while [[ ! -f $ready ]]; do
        if [[ -z $(still_there "$pid") ]]; then
            warn "the judge server did not start; the end of $log:"
            tail -n 25 "$log" | sed 's/^/    /' >&2
            exit 1
        fi
        sleep 0.5
    done
    JUDGE_URL=$(<"$ready")
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
