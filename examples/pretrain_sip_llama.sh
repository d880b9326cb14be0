#!/usr/bin/env bash
# Self-Improving Pretraining of a Llama on megatron-core, with a vLLM server as judge and rewriter.
#
#   bash examples/pretrain_sip_llama.sh
#       Everything by itself, on two cores and without a GPU: environments, demo corpus, judge model, judge server;
#       next-token pretraining of a tiny Llama, Self-Improving Pretraining from there (saved, resumed), plain
#       pretraining continued on the same documents, export to Hugging Face, comparison of the three.
#         QUICK=1       the same stages in at most 4 minutes
#         FRESH=1       forget finished stages and start anew (else a second call goes on where the first stopped)
#         RUN_DIR       folder of the run (runs/demo, with QUICK=1 runs/demo-quick); DATA_DIR, JUDGE_MODEL_DIR
#         JUDGE_URL     use this server instead of starting one; REWRITER_URL likewise
#
#   MODEL=llama-1.4b DATA_PATH=... TOKENIZER_MODEL=... bash examples/pretrain_sip_llama.sh [FLAG...]
#       One node of a cluster; run it on every node. What follows the script's name goes to the trainer as flags.
#         MODEL         a recipe, such as llama-1.4b, llama3.2-1b or llama3-8b
#         DATA_PATH     prefix of a corpus made by tools/preprocess_data.py; TOKENIZER_MODEL its tokenizer
#         LOAD          a checkpoint or a Hugging Face Llama to start from; CHECKPOINT_PATH where to save, and to go on
#                       from if a checkpoint is there (default $RUN_DIR/checkpoints)
#         NNODES (or NUM_NODES), NODE_RANK, GPUS_PER_NODE, MASTER_ADDR, MASTER_PORT; TP, PP
#         JUDGE_URL     the judge's server(s), blanks between; REWRITER_URL. Or JUDGE_MODEL_DIR: node 0 serves that
#                       model on JUDGE_HOST:JUDGE_PORT, on the devices of JUDGE_CUDA_VISIBLE_DEVICES if that is set
#         GOAL          quality, factuality or safety; RECIPE_OVERRIDES  KEY=VALUE settings, blanks between
#         MAX_RESTARTS  how often torchrun starts the ranks again after a fault (3); STOP_GRACE  seconds for a quiet end
#         MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, TRAIN_ITERS, LR, SAVE_INTERVAL, WANDB_PROJECT
#         DRY_RUN=1     print the commands, start nothing
#
# Keys (JUDGE_API_KEY, REWRITER_API_KEY, WANDB_API_KEY) are read from the environment and stand on no command line.
# PYTHON names the interpreter of the trainer (default .venv/bin/python, which tools/setup.sh makes).
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
# shellcheck source=examples/lib/processes.sh
source "$HERE/lib/processes.sh"
# shellcheck source=examples/lib/launch.sh
source "$HERE/lib/launch.sh"
# shellcheck source=examples/lib/judge.sh
source "$HERE/lib/judge.sh"
# shellcheck source=examples/lib/demo.sh
source "$HERE/lib/demo.sh"
# shellcheck source=examples/lib/cluster.sh
source "$HERE/lib/cluster.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi

PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-${NUM_NODES:-1}}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

install_traps
cd "$ROOT"
if [[ ${DRY_RUN:-0} == 1 ]]; then
    dry_run "$@"
elif [[ -n ${MODEL:-}${DATA_PATH:-}${TOKENIZER_MODEL:-} ]]; then
    run_cluster "$@"
else
    run_demo "$@"
fi
