# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are shared among these files
# Processes of the example: every one runs in a group of its own, writes to a log, and ends with the script.
#
# The script sets STOP_GRACE (seconds) if it wants another patience than 45 s.

# Put before a command: the kernel asks it to end when this script dies without a word (SIGKILL).
WITH_US=()
! setpriv --pdeathsig TERM true 2>/dev/null || WITH_US=(setpriv --pdeathsig TERM)
STARTED=()     # process ids of the groups that this script started and that may still run
SCRIPT_START=$SECONDS

say() { printf '[%4d s] %s\n' "$((SECONDS - SCRIPT_START))" "$*"; }
warn() { printf '[%4d s] %s\n' "$((SECONDS - SCRIPT_START))" "$*" >&2; }
die() {
    warn "error: $*"
    exit 1
}

# family PID... : these processes and all that descend from them. torchrun and the judge server put their
# workers into sessions of their own, so a process group alone is not all.
family() {
    local pid child
    for pid in "$@"; do
        printf '%s\n' "$pid"
        while read -r child; do
            family "$child"
        done < <(ps -o pid= --ppid "$pid" 2>/dev/null || true)
    done
}

# still_there PID... : those that run (a zombie is over).
still_there() {
    local pid state
    for pid in "$@"; do
        state=$(ps -o stat= -p "$pid" 2>/dev/null) || continue
        [[ $state == Z* ]] || printf '%s\n' "$pid"
    done
}

# await_end SECONDS PID... : wait until none runs; status 1, and what is left in LEFT, if some still do after so long.
await_end() {
    local limit=$((SECONDS + $1))
    shift
    while mapfile -t LEFT < <(still_there "$@") && ((${#LEFT[@]})); do
        ((SECONDS < limit)) || return 1
        sleep 0.2
    done
}

# end_all PID... : ask the groups to end, wait until the whole families are gone, then force what is left.
end_all() {
    local members=() pid LEFT=()
    (($#)) || return 0
    mapfile -t members < <(family "$@")
    for pid in "$@"; do
        kill -TERM -- "-$pid" 2>/dev/null || true
    done
    await_end "${STOP_GRACE:-45}" "${members[@]}" && return
    warn "these processes did not end when asked and are forced: ${LEFT[*]}"
    kill -KILL "${LEFT[@]}" 2>/dev/null || true
    # The kernel takes its time where the machine is busy.
    await_end 10 "${LEFT[@]}" || warn "these processes are still there: ${LEFT[*]}"
}

# on_exit: the one way out. Bash runs it on success, on failure and after a signal.
on_exit() {
    local status=$?
    trap '' INT TERM HUP
    trap - EXIT
    # A signal may fall between the start of a process and the line that notes it.
    mapfile -t -O "${#STARTED[@]}" STARTED < <(jobs -pr)
    if ((${#STARTED[@]})); then
        ((status == 0)) || warn "stopping what was started"
        end_all "${STARTED[@]}"
    fi
    wait 2>/dev/null || true  # the last lines of a progress display
    exit "$status"
}

install_traps() {
    trap on_exit EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
}

# start_logged LOG COMMAND... : start in a new session, output to LOG; the id is the last of STARTED.
start_logged() {
    local log=$1
    shift
    setsid "${WITH_US[@]}" "$@" >>"$log" 2>&1 </dev/null &
    STARTED+=("$!")
}

# forget PID : it is over and was waited for.
forget() {
    local pid kept=()
    for pid in "${STARTED[@]}"; do
        [[ $pid == "$1" ]] || kept+=("$pid")
    done
    STARTED=("${kept[@]}")
}

# short_lines : the trainer's log lines with what one wants to see while waiting; other lines as they are.
short_lines() {
    local line part short
    while IFS= read -r line; do
        if [[ $line =~ iteration\ +([0-9]+)/\ *([0-9]+) ]]; then
            short="step ${BASH_REMATCH[1]}/${BASH_REMATCH[2]}"
            while [[ $line == *' | '* ]]; do
                line=${line#*' | '}
                part=${line%%' |'*}
                case $part in
                    loss:* | margin:* | accuracy:* | 'valid pairs:'* | chosen\ * | 'rollout (s):'* | 'judge wait (s):'* | \
                        'train (s):'*) short+=" | $part" ;;
                esac
            done
            line=$short
        fi
        [[ $line == *'resolved configuration'* ]] || printf '         %s\n' "$line"
    done
}

# progress FILTER LOG PID FROM : lines of LOG after line FROM that match FILTER, shortened, until PID ends.
progress() {
    tail -n "+$(($4 + 1))" -F --pid="$3" --sleep-interval=0.5 "$2" 2>/dev/null |
        grep --line-buffered -E "$1" | short_lines || true
}

# log_end LOG FROM : the last lines of LOG after line FROM, without what torchrun says of its workers' end.
log_end() {
    tail -n "+$(($2 + 1))" "$1" | sed '/multiprocessing\/api.py.* failed /,$d' | tail -n 25 | sed 's/^/    /' >&2
}

# await_logged NAME LOG PID FROM : wait for the end of PID, which start_logged began when LOG had FROM lines. A failure
# shows the end of the log and ends the script.
await_logged() {
    local status=0
    wait "$3" || status=$?
    forget "$3"
    if ((status)); then
        # The lines themselves may be gone from the screen by now, so the end of the log stands here too.
        warn "$1 failed with status $status; the end of $2:"
        log_end "$2" "$4"
        exit 1
    fi
}

# lines_of LOG : how many lines it has so far; none where it is not there yet.
lines_of() { if [[ -f $1 ]]; then wc -l <"$1"; else echo 0; fi; }

# run_logged NAME LOG FILTER COMMAND... : run to the end with progress on the console.
run_logged() {
    local name=$1 log=$2 filter=$3 pid follower from
    shift 3
    from=$(lines_of "$log")
    touch "$log"
    start_logged "$log" "$@"
    pid=${STARTED[-1]}
    progress "$filter" "$log" "$pid" "$from" &
    follower=$!
    # The progress ends with the process, and its last lines come before what is said of a failure.
    wait "$follower" || true
    await_logged "$name" "$log" "$pid" "$from"
}
