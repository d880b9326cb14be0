# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are shared among these files
# The self-contained mode: every stage of Self-Improving Pretraining on this machine, on real parts.
# A finished stage leaves a stamp in $RUN_DIR/stages, so that a second call goes on after it.

# demo_settings : sizes that fit two cores; QUICK=1 keeps every stage and makes each short.
demo_settings() {
    if [[ ${QUICK:-0} == 1 ]]; then
        NTP_STEPS=32 SIP_STEPS=5 SIP_PREFIXES=2 ROLLOUTS=2 JUDGE_INTERVAL=5 REWRITE_INTERVAL=3
        HELD_OUT_PREFIXES=12 UNSAFE_PREFIXES=24 LOSS_TOKENS=10000
        # Some ten thousand tokens do not beat a unigram model; both losses are printed all the same.
        LOSS_CHECK=()
        RUN_DIR=${RUN_DIR:-runs/demo-quick}
    else
        NTP_STEPS=489 SIP_STEPS=30 SIP_PREFIXES=8 ROLLOUTS=4 JUDGE_INTERVAL=30 REWRITE_INTERVAL=30
        HELD_OUT_PREFIXES=100 UNSAFE_PREFIXES=100 LOSS_TOKENS=50000
        LOSS_CHECK=(--require-below-unigram)
        RUN_DIR=${RUN_DIR:-runs/demo}
    fi
    DATA_DIR=${DATA_DIR:-data/demo}
    JUDGE_MODEL_DIR=${JUDGE_MODEL_DIR:-models/smollm2-135m-instruct}
    PREFIX=48 SUFFIX=128 NTP_SEQ=256 NTP_BATCH=8
    TP=${TP:-2}
    if has_gpu && (($(nvidia-smi -L | grep -c GPU) < TP)); then
        say "fewer GPUs than TP=$TP: one rank without tensor parallelism"
        TP=1
    fi
    GPUS_PER_NODE=$TP NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1
}

# scoring_args : who competes, who judges, and what is asked.
scoring_args() {
    SCORING_ARGS=(
        --pool original rewrite rollout
        --num-rollouts "$ROLLOUTS"
        --likelihood-weight 10
        --likelihood-interval 6
        --classifier-weight 1
        --classifier profanity-check
        --quality-weight 1
        --scoring adaptive
        --adaptive-budget "$((3 * (ROLLOUTS + 2)))"
        --adaptive-rounds 2
        --judge-interval "$JUDGE_INTERVAL"
        --judge-reading logit
        --rewrite-interval "$REWRITE_INTERVAL"
        --rewriter-temperature 0.2
        --rewriter-max-tokens "$SUFFIX"
    )
}

# keep_settings : a folder that was made with other settings is not continued.
keep_settings() {
    scoring_args
    local now="steps $NTP_STEPS+$SIP_STEPS, prefixes $SIP_PREFIXES, TP $TP, data $DATA_DIR, scoring ${SCORING_ARGS[*]}"
    now+=", flags $*"
    local file=$RUN_DIR/settings
    if [[ ${FRESH:-0} == 1 && -e $RUN_DIR ]]; then
        [[ -f $file ]] ||
            die "FRESH=1 would delete $RUN_DIR, which this script did not make; remove it or choose another RUN_DIR"
        rm -rf "$RUN_DIR"
    fi
    mkdir -p "$RUN_DIR/stages" "$RUN_DIR/logs"
    if [[ -f $file && $(<"$file") != "$now" ]]; then
        die "$RUN_DIR was made with other settings ($(<"$file")); say FRESH=1 to start anew or choose another RUN_DIR"
    fi
    printf '%s\n' "$now" >"$file"
}

# stage NAME TITLE COMMAND... : run a stage once.
stage() {
    local name=$1 title=$2 began=$SECONDS
    shift 2
    if [[ -f $RUN_DIR/stages/$name ]]; then
        say "== $title: finished before, in $(<"$RUN_DIR/stages/$name") s"
        return
    fi
    say "== $title"
    "$@"
    printf '%s\n' "$((SECONDS - began))" >"$RUN_DIR/stages/$name"
    say "   took $((SECONDS - began)) s"
}

# tool NAME COMMAND... : a short program whose output is for the reader; it is kept in the log too.
tool() {
    local name=$1 log=$RUN_DIR/logs/$1.log
    shift
    run_logged "$name" "$log" '.' "$@"
}

# train NAME FLAG... : one launch of the trainer.
train() {
    local name=$1
    shift
    MASTER_PORT=$(free_port)
    train_command "$@"
    run_logged "$name" "$RUN_DIR/logs/$name.log" '^( \[|> |megatron_sip: error)' "${COMMAND[@]}"
}

# common_args : what all training runs of the demo share.
common_args() {
    MODEL_ARGS=(--model-preset llama-tiny)
    MODEL_PARALLEL_ARGS=(--tensor-model-parallel-size "$TP")
    PRECISION_ARGS=()
    # Twice as fast where the hardware multiplies in bfloat16; emulated it would be far slower than fp32.
    if has_gpu || grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
        PRECISION_ARGS=(--bf16)
    fi
    DATA_ARGS=(
        --data-path "$DATA_DIR/train_text_document"
        --tokenizer-model "$DATA_DIR/tokenizer"
        --data-cache-path "$RUN_DIR/cache"
    )
}

# on_cuts : the documents, cuts and steps that SIP and continued pretraining share.
on_cuts() {
    common_args
    DATA_ARGS+=(--split-mode random --seq-length "$((PREFIX + SUFFIX))" --suffix-length "$SUFFIX")
    TRAINING_ARGS=(
        --micro-batch-size 2 "${PRECISION_ARGS[@]}"
        --global-batch-size "$SIP_PREFIXES"
        --lr 5e-5
        --min-lr 5e-6
        --lr-warmup-iters 3
        --lr-decay-iters "$SIP_STEPS"
    )
}

# prepare_data : corpus and judge model, side by side: each is a download and one thread of work.
prepare_data() {
    local log=$RUN_DIR/logs/judge-model.log from pid
    from=$(lines_of "$log")
    start_logged "$log" "$PYTHON" tools/get_judge_model.py --output "$JUDGE_MODEL_DIR"
    pid=${STARTED[-1]}
    tool data "$PYTHON" tools/get_demo_data.py --output-dir "$DATA_DIR" \
        --train-documents 5000 --held-out-documents 500
    await_logged judge-model "$log" "$pid" "$from"
}

pretrain_base() {
    common_args
    DATA_ARGS+=(--seq-length "$NTP_SEQ")
    TRAINING_ARGS=(
        --objective ntp
        --micro-batch-size 8
        --global-batch-size "$NTP_BATCH"
        --train-iters "$NTP_STEPS"
        --lr 2e-3 "${PRECISION_ARGS[@]}"
        --lr-warmup-iters "$((NTP_STEPS / 16))"
    )
    SIP_ARGS=()
    EVAL_AND_LOGGING_ARGS=(
        --log-interval "$((NTP_STEPS / 16))"
        --save "$RUN_DIR/base" --load "$RUN_DIR/base" --save-interval "$((NTP_STEPS / 4))"
        --metrics-file "$RUN_DIR/base.metrics.jsonl"
    )
    say "   $((NTP_STEPS * NTP_BATCH * NTP_SEQ)) tokens, tensor parallel over $TP ranks"
    train base
}

export_arm() {
    rm -rf "$RUN_DIR/$1-hf"
    tool "export-$1" "$PYTHON" tools/checkpoint/convert.py --loader mcore --saver hf \
        --load-dir "$RUN_DIR/$1" --save-dir "$RUN_DIR/$1-hf" --dtype fp32
}

held_out_loss() {
    # It takes as long to start as this stage takes, and the next one needs it.
    [[ -f $RUN_DIR/stages/sip-2 ]] || begin_own_judge
    export_arm base
    tool held-out-loss "$PYTHON" tools/held_out_loss.py --model "$RUN_DIR/base-hf" \
        --train-path "$DATA_DIR/train_text_document" --data-path "$DATA_DIR/held_out_text_document" \
        --tokenizer-model "$DATA_DIR/tokenizer" --seq-length "$NTP_SEQ" --max-tokens "$LOSS_TOKENS" \
        --num-threads "$(nproc)" \
        --out "$RUN_DIR/held_out_loss.json" "${LOSS_CHECK[@]}"
}

# begin_own_judge : start the judge server, unless there is one; a stage that needs it waits for it.
begin_own_judge() {
    [[ -z ${JUDGE_URL:-}$JUDGE_PID ]] || return 0
    say "   starting the judge server, log $RUN_DIR/logs/judge.log"
    begin_judge "$JUDGE_MODEL_DIR" "$RUN_DIR/logs/judge.log" "$RUN_DIR/judge.url" \
        --threads "${JUDGE_THREADS:-2}" --memory-share "${JUDGE_MEMORY_SHARE:-0.2}"
}

# need_judge : a server that answers, started once a run and only if a stage needs it.
need_judge() {
    local words
    if [[ -z ${JUDGE_URL:-} ]]; then
        begin_own_judge
        await_judge
    fi
    read -ra words <<<"$JUDGE_URL"
    check_judge "${words[@]}"
    JUDGE_ARGS=(--judge-url "${words[@]}" ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"})
    REWRITER_ARGS=()
    if [[ -n ${REWRITER_URL:-} ]]; then
        read -ra words <<<"$REWRITER_URL"
        REWRITER_ARGS=(--rewriter-url "${words[@]}")
    fi
    [[ -z ${REWRITER_MODEL:-} ]] || REWRITER_ARGS+=(--rewriter-model "$REWRITER_MODEL")
}

# self_improve UNTIL : SIP up to step UNTIL; the schedule is that of the whole run.
self_improve() {
    need_judge
    on_cuts
    load_args "$RUN_DIR/sip" "$RUN_DIR/base"
    TRAINING_ARGS+=(--objective online-dpo --train-iters "$1")
    scoring_args
    SIP_ARGS=(
        "${SCORING_ARGS[@]}"
        --judge-concurrency 32
        --judge-timeout 300
        "${JUDGE_ARGS[@]}" "${REWRITER_ARGS[@]}"
    )
    EVAL_AND_LOGGING_ARGS=(
        "${LOAD_ARGS[@]}" --save-interval "$((SIP_STEPS / 2))"
        --metrics-file "$RUN_DIR/sip.metrics.jsonl"
        --sample-log "$RUN_DIR/sip.samples.jsonl"
        --sample-log-interval "$((SIP_STEPS / 2))"
    )
    train sip "${EXTRA_ARGS[@]}"
}

continue_pretraining() {
    on_cuts
    load_args "$RUN_DIR/ntp" "$RUN_DIR/base"
    TRAINING_ARGS+=(--objective ntp --train-iters "$SIP_STEPS")
    DATA_ARGS+=(--ntp-samples cuts)
    SIP_ARGS=()
    EVAL_AND_LOGGING_ARGS=("${LOAD_ARGS[@]}" --log-interval "$((SIP_STEPS / 6 + 1))" --metrics-file "$RUN_DIR/ntp.metrics.jsonl")
    train ntp
}

export_both() {
    export_arm ntp
    export_arm sip
}

compare_arms() {
    need_judge
    tool compare "$PYTHON" tools/compare.py \
        --arm "base=$RUN_DIR/base-hf" --arm "ntp=$RUN_DIR/ntp-hf" --arm "sip=$RUN_DIR/sip-hf" \
        --tokenizer-model "$DATA_DIR/tokenizer" \
        --held-out "$DATA_DIR/held_out.jsonl" --unsafe "$DATA_DIR/unsafe_prefixes.jsonl" \
        --classifiers-dir "$DATA_DIR/classifiers" --trained-with judge profanity-check \
        "${JUDGE_ARGS[@]}" "${INSECURE[@]}" --judge-reading logit --no-likelihood --num-threads "$(nproc)" \
        --num-prefixes "$HELD_OUT_PREFIXES" --num-unsafe-prefixes "$UNSAFE_PREFIXES" \
        --prefix-length "$PREFIX" --suffix-length "$SUFFIX" \
        --out "$RUN_DIR/compare"
}

# run_demo FLAG... : all stages; FLAGs go to the SIP runs and win over ours.
run_demo() {
    EXTRA_ARGS=("$@")
    allow_insecure "$@"
    demo_settings
    bash tools/setup.sh trainer judge
    SCRIPT_START=$SECONDS
    keep_settings "$@"
    has_gpu || bound_threads
    say "run folder $RUN_DIR; times count from here, after set-up"
    stage data "1/8 demo corpus and judge model" prepare_data
    stage base "2/8 next-token pretraining of a tiny Llama" pretrain_base
    stage loss "3/8 held-out loss against a unigram model" held_out_loss
    stage sip-1 "4/8 Self-Improving Pretraining, steps 1 to $((SIP_STEPS / 2))" self_improve "$((SIP_STEPS / 2))"
    stage sip-2 "5/8 resumed from the checkpoint, to step $SIP_STEPS" self_improve "$SIP_STEPS"
    stage ntp "6/8 next-token pretraining on the same cuts for the same steps" continue_pretraining
    stage export "7/8 export to Hugging Face folders" export_both
    stage compare "8/8 comparison of the three on held-out prefixes" compare_arms
    stop_judge
    say "all stages finished; report in $RUN_DIR/compare/report.md, samples in $RUN_DIR/sip.samples.jsonl"
}
