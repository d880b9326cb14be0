#!/usr/bin/env bash
# Makes the trainer's environment (.venv) and the judge's own (.venv-judge) in the repository root.
# Idempotent: a stamp holds the hash of the requirement files, and a second call ends at once.
#
#   bash tools/setup.sh [trainer] [judge] [dev]     default: trainer judge
#
# SIP_VENV, SIP_JUDGE_VENV   other places for the two environments
# SIP_PYTHON                 the interpreter (3.11 or 3.12); default the first one found
# SIP_JUDGE_BACKEND          gpu or cpu; default gpu where nvidia-smi lists a card
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SIP_VENV:-$ROOT/.venv}
JUDGE_VENV=${SIP_JUDGE_VENV:-$ROOT/.venv-judge}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${SIP_PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or 3.12 found; install one or set SIP_PYTHON to its path"
}

# have_gpu: a driver that lists a card; a bare nvidia-smi binary is not one.
have_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# install_set VENV FILE... : makes VENV and installs FILEs unless the stamp says that this was done.
# A file named *-wheel.txt is installed by hash and without its declared dependencies.
install_set() {
    local venv=$1 file stamp want
    shift
    stamp=$venv/.setup-stamp
    want=$(cat "$@" | sha256sum | cut -d' ' -f1)
    [[ -f $stamp && $(<"$stamp") == "$want" ]] && return 0
    say "making $venv (a few minutes)"
    [[ -x $venv/bin/python ]] || "$(find_python)" -m venv "$venv"
    # torch first and alone: a plain resolution of the rest would bring the CUDA build where there is no GPU.
    "$venv/bin/pip" install --quiet torch==2.13.0
    for file in "$@"; do
        case $file in
            *-wheel.txt) "$venv/bin/pip" install --quiet --no-deps --require-hashes -r "$file" ;;
            *) "$venv/bin/pip" install --quiet -r "$file" ;;
        esac
    done
    printf '%s\n' "$want" >"$stamp"
    say "$venv is ready"
}

judge_files() {
    local backend=${SIP_JUDGE_BACKEND:-}
    [[ -n $backend ]] || { have_gpu && backend=gpu || backend=cpu; }
    case $backend in
        gpu) printf '%s\n' "$ROOT/requirements-judge.txt" ;;
        cpu) printf '%s\n' "$ROOT/requirements-judge-cpu.txt" "$ROOT/requirements-judge-cpu-wheel.txt" ;;
        *) die "SIP_JUDGE_BACKEND is '$backend'; it must be gpu or cpu" ;;
    esac
}

parts=${*:-trainer judge}
for part in $parts; do
    case $part in
        trainer | judge | dev) ;;
        *) die "unknown part '$part'; say trainer, judge or dev" ;;
    esac
done
trainer_files=("$ROOT/requirements.txt")
[[ " $parts " == *" dev "* ]] && trainer_files+=("$ROOT/requirements-dev.txt")
# A plain 'trainer' call is content with an environment that also holds the development tools.
if [[ " $parts " == *" trainer "* || " $parts " == *" dev "* ]]; then
    with_dev=$(cat "$ROOT/requirements.txt" "$ROOT/requirements-dev.txt" | sha256sum | cut -d' ' -f1)
    if [[ ! -f $VENV/.setup-stamp || $(<"$VENV/.setup-stamp") != "$with_dev" ]]; then
        install_set "$VENV" "${trainer_files[@]}"
    fi
fi
if [[ " $parts " == *" judge "* ]]; then
    mapfile -t files < <(judge_files)
    install_set "$JUDGE_VENV" "${files[@]}"
fi
