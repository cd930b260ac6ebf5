#!/usr/bin/env bash
# Several processes of one run on this machine, on CPU. See --help.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/local_multiprocess.sh N -- COMMAND...

Starts N processes of COMMAND on this machine with JAX_PLATFORMS=cpu and the variables that
dpr_jax.distributed.initialize() reads (DPR_COORDINATOR on a free port, DPR_NUM_PROCESSES,
DPR_PROCESS_ID). Every line they write, on stdout or stderr, comes out on stdout as "[INDEX] line".

When a process fails, the others get SIGTERM, then SIGKILL after DPR_GRACE_SECONDS (default 10),
and its code is the exit code. SIGINT and SIGTERM are passed on; a second one kills.
Needs bash 4.4 or newer.

example: two processes with four devices each
  XLA_FLAGS=--xla_force_host_platform_device_count=4 launch/local_multiprocess.sh 2 -- \
    python -m dpr_jax.main --config=configs/smoke.py --workdir=runs/two
EOF
}

die() {
  echo "local_multiprocess.sh: $1; see --help" >&2
  exit 2
}

[[ ${1:-} == -h || ${1:-} == --help ]] && { usage; exit 0; }
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || die "the first argument must be the number of processes, not '${1:-}'"
[[ ${2:-} == -- ]] || die "expected -- between the number of processes and the command"
n=$1
shift 2
(($#)) || die "no command after --"
grace=${DPR_GRACE_SECONDS:-10}
[[ $grace =~ ^[0-9]+$ ]] || die "DPR_GRACE_SECONDS='$grace' must be a whole number of seconds"

# Below the range from which Linux takes the ports of outgoing connections.
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    # A refused connection: no process listens on the port.
    if ! (exec 9<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  die "found no free port between 20000 and 32000"
}

prefix() {
  trap '' INT TERM # Keeps printing until the last line of a process that is being stopped.
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    # One at a time, because a long line takes several writes. The timeout only matters if the
    # process that had the turn was killed.
    read -r -n 1 -t 5 -u 4 || true
    printf '[%d] %s\n' "$1" "$line"
    printf . >&4
  done
}

# Processes report "INDEX CODE" through a pipe, which unlike `wait -n` loses none when a signal
# arrives in between.
fifo_dir=$(mktemp -d)
mkfifo "$fifo_dir/reports" "$fifo_dir/turn"
exec 3<>"$fifo_dir/reports" 4<>"$fifo_dir/turn"
rm -r "$fifo_dir"
printf . >&4 # The process that takes it may write a line.

port=$(free_port)
export JAX_PLATFORMS=cpu DPR_COORDINATOR=127.0.0.1:$port DPR_NUM_PROCESSES=$n

# Job control gives each process a group of its own, so that its children are signalled with it.
set -m
pids=()
running=()
signalled=0

send() { # send SIGNAL: to the groups of all processes that still run.
  local i
  for i in "${running[@]}"; do kill -s "$1" -- "-${pids[i]}" 2>/dev/null || true; done
}

# shellcheck disable=SC2329 # the traps call it
pass_on() {
  ((signalled += 1))
  if ((signalled == 1)); then send "$1"; else send KILL; fi
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

for ((i = 0; i < n; i++)); do
  (
    trap : INT TERM # Lives on to report; what it starts gets the default handling back.
    code=0
    DPR_PROCESS_ID=$i "$@" </dev/null 2>&1 3>&- 4>&- | prefix "$i" 3>&- || code=$?
    echo "$i $code" >&3
  ) &
  pids[i]=$!
  running[i]=$i
done
disown -a # Bash need not say that it saw one killed.

status=0
deadline=0
while ((${#running[@]})); do
  # A process that is dead now, and has sent no report by the end of `read`, was killed.
  dead=()
  for i in "${running[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null || dead+=("$i")
  done
  reports=()
  if read -r -t 1 i code <&3; then
    reports+=("$i $code")
  else
    for i in "${dead[@]}"; do reports+=("$i 137"); done
  fi
  for report in "${reports[@]}"; do
    read -r i code <<<"$report"
    unset "running[$i]"
    ((code == 0 || status != 0)) && continue
    status=$code
    if ((signalled == 0)); then
      echo "local_multiprocess.sh: process $i exited with $code; ending the others" >&2
      send TERM
      deadline=$((SECONDS + grace))
    fi
  done
  if ((deadline && SECONDS >= deadline)); then send KILL; fi
done
exit "$status"
