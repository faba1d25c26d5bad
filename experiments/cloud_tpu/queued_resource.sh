#!/usr/bin/env bash
# An experiment on Cloud TPU VMs, asked for as a queued resource; see README.md here.
#
#   queued_resource.sh create          ask for the TPU
#   queued_resource.sh run ARGS...     install this commit on all workers once the TPU is there, and start the
#                                      experiment; ARGS are those of longrope_jax.main, --config=... among them
#   queued_resource.sh logs            follow what worker 0 says
#   queued_resource.sh status          the resource's state; exit statuses of the workers, once it has ended
#   queued_resource.sh delete          give everything back; the work directory stays
#
# From the environment:
#   NAME, PROJECT, ZONE, ACCELERATOR   such as longrope, my-project, us-east5-a, v5p-64
#   WORKDIR                            run: gs://bucket/folder, which the TPU's service account can write to
#   SPOT=1 or RESERVED=1               create: cheap and taken away at any time, or of a reservation; else on demand
#   RUNTIME                            create: the VMs' software, by default what goes with the accelerator
#   DRY_RUN=1                          print the commands instead (--dry-run as the first argument does the same)
# shellcheck disable=SC2153  # names in capitals come from the environment
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
FOLDER=longrope_jax # in the home directory of the workers

fail() {
    echo "error: $*" >&2
    exit 2
}

need() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || fail "$name is not set; $COMMAND needs it in the environment"
    done
}

# Runs a command, or prints it so that it could be pasted into a shell.
do_it() {
    if [[ ${DRY_RUN:-} == 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

on_workers() {
    do_it gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}

runtime() {
    case $ACCELERATOR in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v4-*) echo tpu-ubuntu2204-base ;;
        *) fail "ACCELERATOR = $ACCELERATOR is none of v4-*, v5litepod-*, v5p-*, v6e-*; set RUNTIME too for another" ;;
    esac
}

create() {
    local software options=()
    software=${RUNTIME:-$(runtime)}
    [[ ${SPOT:-} != 1 || ${RESERVED:-} != 1 ]] || fail "SPOT=1 and RESERVED=1 exclude each other"
    [[ ${SPOT:-} == 1 ]] && options+=(--spot)
    [[ ${RESERVED:-} == 1 ]] && options+=(--reserved)
    do_it gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE" --node-id="$NAME" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$software" \
        --scopes=https://www.googleapis.com/auth/cloud-platform ${options[@]+"${options[@]}"}
}

describe() {
    do_it gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
        --format="value(state.state)"
}

wait_until_active() {
    local state
    [[ ${DRY_RUN:-} == 1 ]] && { describe; return; }
    while true; do
        state=$(describe)
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED) fail "$NAME is $state: delete it, create it again, and run the same command" ;;
        esac
        echo "$NAME is $state" >&2
        sleep 30
    done
}

run() {
    local arguments
    [[ " $* " == *" --config="* ]] || fail "run needs --config=FILE, such as run --config=experiments/quickstart.py"
    [[ $WORKDIR == gs://* ]] || fail "WORKDIR = $WORKDIR must begin with gs://: all workers need it, and a later TPU too"
    wait_until_active
    PACKED=$(mktemp -d)
    trap 'rm -rf "$PACKED"' EXIT
    do_it git -C "$REPOSITORY" archive --format=tar.gz --output="$PACKED/$FOLDER.tar.gz" HEAD
    do_it gcloud compute tpus tpu-vm scp "$PACKED/$FOLDER.tar.gz" "$NAME:" --project="$PROJECT" --zone="$ZONE" --worker=all
    # The VMs' own Python is too old; uv brings one.
    on_workers all "mkdir -p $FOLDER && tar -xzf $FOLDER.tar.gz -C $FOLDER && cd $FOLDER && python3 -m pip install --quiet \
--user uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv && ~/.local/bin/uv pip install --quiet \
--python .venv -r requirements-tpu.txt"
    printf -v arguments ' %q' "$@" "--workdir=$WORKDIR" --coordinator=auto
    # It goes on when the connection ends.
    on_workers all "cd $FOLDER && rm -f exit_status && (nohup sh -c '.venv/bin/python -m longrope_jax.main \"\$@\"; echo \$? \
> exit_status' run$arguments > run.log 2>&1 < /dev/null &)"
}

delete() {
    do_it gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
}

if [[ ${1:-} == --dry-run ]]; then
    DRY_RUN=1
    shift
fi
COMMAND=${1:-}
case $COMMAND in
    create) need NAME PROJECT ZONE ACCELERATOR && create ;;
    run) need NAME PROJECT ZONE WORKDIR && run "${@:2}" ;;
    logs) need NAME PROJECT ZONE && on_workers 0 "tail -n 50 -F $FOLDER/run.log" ;;
    status)
        need NAME PROJECT ZONE && describe
        on_workers all "cat $FOLDER/exit_status 2> /dev/null || echo has not ended"
        ;;
    delete) need NAME PROJECT ZONE && delete ;;
    *) fail "'$COMMAND' is none of create, run, logs, status, delete" ;;
esac
