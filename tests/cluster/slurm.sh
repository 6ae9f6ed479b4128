#!/bin/bash
# Everything that wmcache does with SLURM, on a SLURM of one node on loopback. Run it as root on Debian or Ubuntu:
#
#     tests/cluster/slurm.sh
#
# It installs slurm-wlm and munge if they are missing, starts munged, slurmctld and slurmd with a configuration in a temporary folder, works
# only in that folder, and stops what it started. The exit status is 0 only if every check passed. No GPU, no download of weights; four
# minutes on two idle cores.
#
# KEEP=1 keeps the folder. STEPS is the length of the training, which has to be longer than a walltime (default 700).
set -euo pipefail

bin=${BIN:-$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin}
export PATH=$bin:$PATH OMP_NUM_THREADS=1 DEBIAN_FRONTEND=noninteractive
[[ $(id -u) -eq 0 ]] || { echo "munged, slurmctld and slurmd are started for other users; run this as root" >&2; exit 1; }
[[ -x $bin/wmcache ]] || { echo "$bin/wmcache does not exist; make it with: make setup" >&2; exit 1; }
if ! command -v slurmctld slurmd munged >/dev/null; then
    echo "installing slurm-wlm and munge"
    { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge; } >/dev/null
fi

work=$(mktemp -d /tmp/wmcache-slurm.XXXXXX)
chmod 755 "$work" # munged requires that other users cannot replace its socket
began=$SECONDS
daemons=()

step() { printf '\n[%3d s] %s\n' $((SECONDS - began)) "$*"; }
ok() { printf '        ok: %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
# shellcheck disable=SC2317
leave() {
    status=$?
    trap - EXIT
    [[ $status -eq 0 ]] || tail -n 15 "$work"/slurm*.log "$work"/*/logs/*.log >&2 || true
    scancel --user=root 2>/dev/null || true
    for ((i = 0; i < 60; i++)); do # a job outlives its slurmd
        [[ -n $(squeue --noheader 2>/dev/null) ]] || break
        sleep 0.5
    done
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
        { kill "${daemons[i]}" && wait "${daemons[i]}"; } 2>/dev/null || true
    done
    if [[ -n ${KEEP:-} ]]; then echo "kept: $work"; else rm -rf "$work"; fi
    exit "$status"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Print a command, run it, and print its output without progress bars.
run() {
    printf '        $ %s\n' "$(shown "$@")"
    "$@" 2>"$work/stderr" | indent || { status=$?; indent <"$work/stderr"; return "$status"; }
}
shown() { local word line=""; for word in "$@"; do line+=" ${word@Q}"; done; sed -E "s/'([A-Za-z0-9_.,:/=+-]+)'/\1/g; s/^ //" <<<"${line//$work/WORK}"; }
indent() { sed "s#$work#WORK#g; s/^/          /"; }
# Poll until a command succeeds: until_true SECONDS WHAT COMMAND...
until_true() {
    local patience=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        ((SECONDS < patience)) || fail "$what: it did not happen"
        sleep 0.3
    done
}
json() { python -c "import json, sys; print(json.load(sys.stdin)$1)"; }
# Run the line that wmcache sbatch prints; options of sbatch come before the script.
submit() { eval "sbatch --parsable ${*:2} ${1#sbatch }"; }
field() { scontrol show job "$1" --oneliner 2>/dev/null | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1; }
is() { [[ $(field "$1" "$2") == "$3" ]]; }
gone() { [[ -z $(squeue --noheader --jobs="$1" 2>/dev/null) ]]; }
files_of() { find "$1/tokens" -name 'c.*' 2>/dev/null | wc -l; }
more_than() { [[ $(files_of "$store") -gt $1 ]]; }
# A running task that has written a shard since the first check.
in_the_middle_of() {
    until_true 120 "$1 runs" is "$1" JobState RUNNING
    until_true 120 "$1 commits a shard" more_than "$(files_of "$store")"
    is "$1" JobState RUNNING || fail "$1 has ended before it could be disturbed; let it have more to do"
}
require_equal() {
    python - "$1" "$2" <<'PYTHON' || fail "$1 and $2 differ"
import sys
from pathlib import Path
import numpy as np
from wmcache.cache import TokenStore
one, other = (TokenStore.open(path) for path in sys.argv[1:])
frames = np.arange(one.card.frames)
assert one.complete and other.complete and one.identity == other.identity
assert np.array_equal(one.gather(frames), other.gather(frames)), "tokens"
shards = [{file.name: file.read_bytes() for file in Path(root, "tokens").glob("c.*")} for root in sys.argv[1:]]
assert shards[0] == shards[1] and len(shards[0]) == one.card.num_shards, "files"
print(f"        ok: {len(shards[0])} token shards, {len(frames)} frames: the same bytes as the serial store's")
PYTHON
}

step "SLURM: munged, slurmctld and slurmd on loopback"
read -r port1 port2 < <(python -c "
import socket
ports = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]
print(*(port.getsockname()[1] for port in ports))")
mkdir "$work/state" "$work/spool"
install -d -o munge -g munge -m 755 "$work/munge"
install -d -o munge -g munge -m 700 "$work/munge/own"
install -o munge -g munge -m 400 <(head -c 128 /dev/urandom) "$work/munge/own/key"
cat >"$work/slurm.conf" <<END
ClusterName=wmcache
SlurmctldHost=localhost
SlurmctldPort=$port1
SlurmdPort=$port2
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
# How long a requeued job waits, too; two minutes by default.
AuthInfo=socket=$work/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=bf_interval=1
JobRequeue=1
ReturnToService=2
MailProg=/bin/true
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$(free --mebi | awk '/^Mem/ { print $2 }')
PartitionName=short Nodes=localhost Default=YES
END
export SLURM_CONF=$work/slurm.conf
runuser -u munge -- munged --foreground --socket="$work/munge/socket" --key-file="$work/munge/own/key" --pid-file="$work/munge/pid" \
    --log-file="$work/munge/own/log" --seed-file="$work/munge/own/seed" &>"$work/munged.log" &
daemons+=($!)
until_true 20 "munged answers" test -S "$work/munge/socket"
slurmctld -D &>/dev/null &
daemons+=($!)
slurmd -D -N localhost &>/dev/null &
daemons+=($!)
idle() { [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]]; }
until_true 30 "the node is idle" idle
ok "$(slurmctld -V), $(munged --version | cut -d' ' -f1): $(sinfo --noheader --format='partition %P, %D node, %c CPUs, %T')"

home="$work/my home"
export WMCACHE_HOME=$home
mkdir -p "$home/profiles"
cat >"$home/profiles/array.toml" <<END
partition = "short"
cores = 1
memory = "1GB"
walltime = "00:30:00"
jobs = 4
END
sed 's/00:30/00:02/' "$home/profiles/array.toml" >"$home/profiles/brief.toml"
# Dask ends a worker that takes more than its memory.
{ sed 's/jobs = 4/jobs = 2/; s/1GB/3GB/' "$home/profiles/array.toml"; echo 'interface = "lo"'; } >"$home/profiles/dask.toml"
serial=$home/serial.zarr store=$home/array.zarr
encoder=(--encoder random-vit --image-size 224 --batch-size 8 --device cpu)
cd "$work"

step "A dataset of 640 frames in 16 shards, and its serial extraction in this process"
run wmcache collect --episodes 8 --length 80 --image-size 64 --frames-per-shard 40 --cluster local:1
run wmcache extract "${encoder[@]}" --cluster local:1 --out "$serial"

step "A training of two minutes' walltime, which is too short for it: SLURM sends USR1 before the end, and the script requeues itself"
train=$(wmcache sbatch --profile brief wmtrain --cache "$serial" --width 64 --depth 2 --heads 2 --dropout 0 --batch-size 8 \
    --steps "${STEPS:-700}" --checkpoint-every 50 --out "$home/run" --device cpu 2>"$work/stderr")
indent <"$work/stderr"
printf '        $ %s\n' "${train//$work/WORK}"
training=$(submit "$train")
ok "job $training is in the queue"

step "The extraction's array: the script, and its submission"
line=$(wmcache sbatch --profile array extract "${encoder[@]}" --out "$store" 2>/dev/null)
sed 's/^/        | /' "$home/jobs/extract.sh" | sed "s#$work#WORK#g"
bash -n "$home/jobs/extract.sh"
printf '        $ %s\n' "${line//$work/WORK}"
array=$(submit "$line")
ok "array $array: $(squeue --noheader --jobs="$array" --array | wc -l) tasks"

step "While they run: task 0 is cancelled, task 1 requeued, task 2 gets the signal of its walltime"
in_the_middle_of "${array}_0"
run scancel "${array}_0"
in_the_middle_of "${array}_1"
run scontrol requeue "${array}_1"
in_the_middle_of "${array}_2"
run scancel --batch --signal=USR1 "${array}_2"
until_true 300 "the array ends" gone "$array"
is "${array}_0" JobState CANCELLED || fail "task 0 is $(field "${array}_0" JobState)"
ok "task 0 stays cancelled: exit status $(field "${array}_0" ExitCode), as of a stopped job"
for task in 1 2; do
    [[ $(field "${array}_$task" JobState),$(field "${array}_$task" Restarts) == COMPLETED,1 ]] || fail "task $task"
    ok "task $task: completed, restarted once"
done
[[ $(field "${array}_3" JobState),$(field "${array}_3" Restarts) == COMPLETED,0 ]] || fail "task 3"
ok "task 3, undisturbed: completed"
grep -h "stopped; go on with" "$home/logs/wmcache-extract-${array}_"[012].log | indent
if wmcache verify "$store" >/dev/null 2>"$work/stderr"; then fail "the store is complete without task 0"; fi
grep '^Error' "$work/stderr" | indent
shards=$(wmcache verify "$store" --json 2>/dev/null | json "['shards_done']" || true)
[[ $shards -lt 16 ]] || fail "nothing was lost by the cancelling"
ok "$shards of 16 shards are done"

step "What was cancelled is submitted again; the last one finalises"
again=$(submit "$line" --array=0)
until_true 300 "task 0 ends" gone "$again"
is "${again}_0" JobState COMPLETED || fail "task 0 is $(field "${again}_0" JobState)"
ok "job $again: completed"
find "$store" -type f -exec sha256sum {} + | sort >"$work/before"
run wmcache finalize "$store"
find "$store" -type f -exec sha256sum {} + | sort | diff "$work/before" - || fail "finalize changed a complete store"
ok "there was nothing left to finalise: no byte has changed"
run wmcache verify "$store"
require_equal "$serial" "$store"

step "The same through Dask: two jobs of dask-jobqueue, which meet a scheduler in this process over lo"
run wmcache extract "${encoder[@]}" --cluster slurm:dask --out "$home/dask.zarr"
run wmcache verify "$home/dask.zarr"
require_equal "$serial" "$home/dask.zarr"

step "A failing job of a user whose home has every character that is special to a shell or SLURM"
odd="$work/100% \"o'k\" \$(touch x) #1"
mkdir -p "$odd/pointmaze-umaze"
touch "$odd/pointmaze-umaze/dataset.json" # wmcache sbatch refuses a missing dataset; this one is removed before the job starts
line=$(WMCACHE_HOME=$odd wmcache sbatch --jobs 1 --profile "$home/profiles/array.toml" extract --encoder pixels 2>/dev/null)
rm -r "$odd/pointmaze-umaze"
lost=$(submit "$line")
until_true 120 "job $lost ends" gone "$lost"
[[ $(field "${lost}_0" JobState),$(field "${lost}_0" ExitCode) == FAILED,1:0 ]] || fail "job $lost is $(field "${lost}_0" JobState)"
indent <"$odd/logs/wmcache-extract-${lost}_0.log"
ok "job $lost: failed with exit status 1, one line in its log"

step "The training"
until_true 400 "the training ends" gone "$training"
is "$training" JobState COMPLETED || fail "the training is $(field "$training" JobState)"
[[ $(field "$training" Restarts) -ge 1 ]] || fail "the training ended before its walltime; run this again with more STEPS"
tr '\r' '\n' <"$home/logs/wmcache-wmtrain-$training.log" | grep -E "steps [0-9]+ to|trained;" | indent
ok "job $training: completed, restarted $(field "$training" Restarts) times by its walltime"

step "All checks passed"
