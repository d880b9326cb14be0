#!/usr/bin/env bash
# Serves a post-trained model with vLLM on a GPU machine, as judge and rewriter of a training run elsewhere.
#
#   JUDGE_MODEL=/models/gpt-oss-120b JUDGE_TP=4 JUDGE_API_KEY=... bash examples/serve_judge.sh [-- more vLLM flags]
#
# JUDGE_MODEL          model folder (required)
# JUDGE_TP             GPUs that share the model              default: all that nvidia-smi lists
# JUDGE_HOST           address to listen on                   default: 127.0.0.1
# JUDGE_PORT           port                                   default: 8100
# JUDGE_MAX_MODEL_LEN  longest prompt plus answer, in tokens  default: 8192 (2048 text + options + answer fit)
# JUDGE_API_KEY        key that clients must send; by environment alone, never on a command line
# DRY_RUN=1            print the command and end
#
# On the trainer: --judge-url https://HOST:PORT/v1 and the same JUDGE_API_KEY. vLLM guards only /v1 with the key:
# /tokenize stays open, so listen on a private network, or behind a proxy that ends TLS. Plain http to another host
# with a key needs --allow-insecure-judge. Several servers: give several URLs, the client spreads its calls.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ ${1:-} == -- ]] && shift

JUDGE_MODEL=${JUDGE_MODEL:?set JUDGE_MODEL to a model folder; see --help}
JUDGE_HOST=${JUDGE_HOST:-127.0.0.1}
if [[ -z ${JUDGE_TP:-} ]]; then
    JUDGE_TP=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    if [[ $JUDGE_TP == 0 ]]; then
        echo "serve_judge: nvidia-smi lists no GPU; set JUDGE_TP, or use tools/serve_vllm.py --device cpu" >&2
        exit 2
    fi
fi
case $JUDGE_HOST in
    127.* | localhost | ::1) ;;
    *) [[ -n ${JUDGE_API_KEY:-} ]] || echo "serve_judge: listening on $JUDGE_HOST without JUDGE_API_KEY" >&2 ;;
esac

SERVER_ARGS=(
    --model "$JUDGE_MODEL"
    --host "$JUDGE_HOST"
    --port "${JUDGE_PORT:-8100}"
    --device gpu
    --tensor-parallel-size "$JUDGE_TP"
    --max-model-len "${JUDGE_MAX_MODEL_LEN:-8192}"
    --startup-timeout 3600
)
COMMAND=("${SIP_PYTHON:-python3}" "$ROOT/tools/serve_vllm.py" "${SERVER_ARGS[@]}" -- "$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${COMMAND[@]}"
    printf '\n'
    exit 0
fi
[[ -x ${SIP_JUDGE_VENV:-$ROOT/.venv-judge}/bin/python ]] || SIP_JUDGE_BACKEND=gpu bash "$ROOT/tools/setup.sh" judge
exec "${COMMAND[@]}"
