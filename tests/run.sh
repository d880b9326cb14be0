#!/usr/bin/env bash
# All checks of the repository, set-up included; also what .ci/run calls.
#
#   bash tests/run.sh [--fast] [--nightly] [-- PYTEST_ARGUMENT...]
#
#   --fast       the unit tests alone
#   --nightly    after the ordinary tests the long trials (marker "nightly")
#
# Every stage is named with its seconds; the last line counts the tests of all stages. The exit status is 0 only if
# every stage passed; a stage that collects no test has failed.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SIP_VENV:-$ROOT/.venv}
cd "$ROOT"

FAST=0 NIGHTLY=0
while (($#)); do
    case $1 in
        --fast) FAST=1 ;;
        --nightly) NIGHTLY=1 ;;
        -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
        --) shift && break ;;
        *) echo "tests/run.sh: unknown argument $1; see --help" >&2 && exit 2 ;;
    esac
    shift
done
PYTEST_ARGS=("$@")

# One thread a rank: threads that spin at barriers starve the other ranks on a small machine.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
# No test reaches for a hub or a tracker.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline

LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
BEGAN=$SECONDS
FAILED=()

# stage NAME COMMAND... : runs it, prints its seconds, remembers a failure.
stage() {
    local name=$1 began=$SECONDS status=0
    shift
    printf '== %s\n' "$name"
    "$@" || status=$?
    if ((status == 0)); then
        printf '== %s: passed in %d s\n' "$name" $((SECONDS - began))
    else
        printf '== %s: FAILED (exit status %d) in %d s\n' "$name" "$status" $((SECONDS - began))
        FAILED+=("$name")
    fi
}

# tests FOLDER MARKERS [ARGUMENT...] : pytest over one folder; its closing line is kept for the sum.
tests() {
    local status=0 log=$LOGS/output folder=$1 markers=$2
    shift 2
    "$VENV/bin/python" -m pytest "tests/$folder" -m "$markers" "$@" "${PYTEST_ARGS[@]}" 2>&1 | tee "$log" || status=$?
    ((status != 5)) || echo "no test was collected in tests/$folder for '$markers'; that counts as a failure"
    tail -n 1 "$log" >>"$LOGS/closing"
    return "$status"
}

# total : pytest's closing lines of all stages as one.
total() {
    [[ -f $LOGS/closing ]] || return 0
    awk -v seconds=$((SECONDS - BEGAN)) '
        { while (match($0, /[0-9]+ (passed|failed|errors?|skipped|deselected|xfailed|xpassed)/)) {
              split(substr($0, RSTART, RLENGTH), part, " ")
              sub(/^errors$/, "error", part[2])
              count[part[2]] += part[1]
              $0 = substr($0, RSTART + RLENGTH)
          } }
        END {
            kinds = split("failed error passed skipped deselected xfailed xpassed", order, " ")
            for (i = 1; i <= kinds; i++)
                if (count[order[i]]) line = line (line ? ", " : "") count[order[i]] " " order[i]
            print (line ? line : "no tests ran") " in " seconds "s"
        }' "$LOGS/closing"
}

have_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

if ((FAST)); then
    stage set-up bash tools/setup.sh trainer dev
else
    stage set-up bash tools/setup.sh trainer judge dev
fi
if ((${#FAILED[@]})); then
    echo "the set-up failed; nothing else was run" >&2
    exit 1
fi
if ((!FAST)); then
    stage "ruff check" "$VENV/bin/ruff" check .
    stage "ruff format" "$VENV/bin/ruff" format --check .
    stage mypy "$VENV/bin/mypy"
fi
# Two workers a core, since the tests wait as long as they compute; a file stays with one, whose fixtures it shares.
WORKERS=$((2 * $(nproc)))
stage "unit tests" tests unit "not nightly and not alone" --numprocesses $((WORKERS < 8 ? WORKERS : 8)) --dist loadfile
stage "unit tests, alone" tests unit "alone and not nightly"
if ((!FAST)); then
    stage "distributed tests" tests distributed "not nightly"
    stage "integration tests" tests integration "not nightly"
    if have_gpu; then
        stage "gpu tests" tests gpu "not nightly"
    else
        echo "== gpu tests: not run, nvidia-smi lists no GPU"
    fi
fi
if ((NIGHTLY)); then
    # The whole tree, since a trial may live in any folder.
    stage "nightly trials" tests . nightly
fi

total
if ((${#FAILED[@]})); then
    printf 'FAILED:%s\n' "$(printf ' %s;' "${FAILED[@]}")" >&2
    exit 1
fi
