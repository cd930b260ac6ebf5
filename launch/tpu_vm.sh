#!/usr/bin/env bash
# A run on a Cloud TPU VM, single- or multi-host. See --help.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh --name NAME --zone ZONE --type TYPE [options] -- ARGS
       launch/tpu_vm.sh --name NAME --zone ZONE --logs | --stop | --delete

Creates the Cloud TPU VM (or reuses it if it is READY), copies this checkout to all of its hosts,
installs it there, and runs `python -m dpr_jax.main ARGS` on every host. The run does not end with
your connection; what you see is the log of worker 0, and its exit code is the exit code.
Nothing is deleted for you: end with --delete.

  --name NAME          of the TPU VM
  --zone ZONE          such as europe-west4-b
  --type TYPE          accelerator type, such as v5litepod-16, v5p-8 or v6e-8
  --version VERSION    runtime version; default: the one for TYPE
  --project PROJECT    default: gcloud's own
  --spot               a spot VM, cheaper and preemptible
  --extras EXTRAS      of the package; default: tpu,gcp
  --dry-run            print every command, ready to be pasted, and run nothing
  --logs               follow the log of worker 0 again
  --stop               end the run on every host: SIGTERM, upon which a stage that trains saves and
                       ends, then SIGKILL a minute later; rerun the same command to resume
  --delete             delete the VM

ARGS are those of dpr_jax.main. The workdir of several hosts must be one that all of them reach: a
bucket, gs://BUCKET/RUN, or a folder such as a Filestore share.

example:
  launch/tpu_vm.sh --name dpr --zone europe-west4-b --type v5litepod-16 -- \
    --config=configs/smoke.py --workdir=gs://BUCKET/run
EOF
}

die() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

name='' zone='' type='' version='' project='' extras=tpu,gcp spot=0 dry_run=0 mode=run args=()
while (($#)); do
  case $1 in
    --name | --zone | --type | --version | --project | --extras)
      (($# > 1)) && [[ -n $2 && $2 != -* ]] || die "$1 needs a value; see --help"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) spot=1; shift ;;
    --dry-run) dry_run=1; shift ;;
    --logs | --stop | --delete)
      [[ $mode == run ]] || die "--$mode and $1 exclude each other"
      mode=${1#--}; shift
      ;;
    -h | --help) usage; exit 0 ;;
    --) shift; args=("$@"); break ;;
    *) die "unknown argument '$1'; the arguments of dpr_jax.main come after --, see --help" ;;
  esac
done
[[ -n $name ]] || die "--name is missing; see --help"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  die "--name '$name' must be lower-case letters, digits and hyphens, beginning with a letter"
[[ -n $zone ]] || die "--zone is missing; see --help"
[[ $extras =~ ^[a-z0-9]+(,[a-z0-9]+)*$ ]] || die "--extras '$extras' must be names, as in tpu,gcp"
if [[ $mode == run ]]; then
  [[ -n $type ]] || die "--type is missing, such as v5litepod-16; see --help"
  ((${#args[@]})) || die "no arguments for dpr_jax.main after --; see --help"
  if [[ -z $version ]]; then
    case $type in
      v2-* | v3-* | v4-*) version='tpu-ubuntu2204-base' ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      *) die "no runtime version is known for --type '$type'; give --version" ;;
    esac
  fi
elif ((${#args[@]})); then
  die "--$mode takes no arguments after --"
fi

place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")
tpu=(gcloud compute tpus tpu-vm)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
archive=${TMPDIR:-/tmp}/dpr_jax-$name.tar.gz

quoted() { # A command line that a shell reads as these words.
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

run() { # Prints a command; runs it unless --dry-run.
  if ((dry_run)); then
    quoted "$@"
  else
    "$@"
  fi
}

on_workers() { # on_workers all|0 COMMAND
  run "${tpu[@]}" ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"
}

# --- What runs on the hosts ----------------------------------------------------------------------

check=$(cat <<'EOF'
if [ -f "$HOME/dpr_jax_run/pid" ] && kill -0 "$(cat "$HOME/dpr_jax_run/pid")" 2>/dev/null; then
  echo "a run is going on here: --logs follows it, --stop ends it" >&2
  exit 1
fi
EOF
)

# Python comes from uv, because the images of TPU VMs carry 3.10.
setup=$(cat <<'EOF'
set -e
rm -rf "$HOME/dpr_jax"
mkdir -p "$HOME/dpr_jax"
tar -xzf "$HOME/dpr_jax.tar.gz" -C "$HOME/dpr_jax"
[ -x "$HOME/.local/bin/uv" ] || python3 -m pip install --quiet --user uv
[ -x "$HOME/dpr_jax_env/bin/python" ] ||
  "$HOME/.local/bin/uv" venv --quiet --python 3.12 "$HOME/dpr_jax_env"
cd "$HOME/dpr_jax"
"$HOME/.local/bin/uv" pip install --quiet --python "$HOME/dpr_jax_env/bin/python" -e
EOF
)" '.[$extras]'"

# The shell around the run outlives SIGTERM, so that the exit code is written in any case.
start=$(cat <<'EOF'
mkdir -p "$HOME/dpr_jax_run"
rm -f "$HOME/dpr_jax_run/code"
setsid nohup bash -c '
  trap : TERM
  cd "$HOME/dpr_jax" && DPR_DISTRIBUTED=1 "$HOME/dpr_jax_env/bin/python" -m dpr_jax.main "$@"
  echo $? >"$HOME/dpr_jax_run/code"
' run
EOF
)" $(quoted ${args[@]+"${args[@]}"}) "$(cat <<'EOF'
>"$HOME/dpr_jax_run/log" 2>&1 </dev/null &
echo $! >"$HOME/dpr_jax_run/pid"
EOF
)

follow=$(cat <<'EOF'
touch "$HOME/dpr_jax_run/log"
tail -n +1 -F --pid="$(cat "$HOME/dpr_jax_run/pid")" "$HOME/dpr_jax_run/log"
[ -f "$HOME/dpr_jax_run/code" ] || { echo "the run was killed" >&2; exit 137; }
exit "$(cat "$HOME/dpr_jax_run/code")"
EOF
)

stop=$(cat <<'EOF'
pid=$(cat "$HOME/dpr_jax_run/pid") && kill -0 "$pid" && kill -s TERM -- "-$pid" || exit 1
for _ in {1..60}; do kill -0 "$pid" 2>/dev/null || exit 0; sleep 1; done
kill -s KILL -- "-$pid"
EOF
)

# --- The commands --------------------------------------------------------------------------------

case $mode in
  logs) on_workers 0 "$follow"; exit ;;
  stop) on_workers all "$stop"; exit ;;
  delete) run "${tpu[@]}" delete "$name" "${place[@]}" --quiet; exit ;;
esac

describe=("${tpu[@]}" describe "$name" "${place[@]}" '--format=value(state)')
create=("${tpu[@]}" create "$name" "${place[@]}" "--accelerator-type=$type" "--version=$version")
((spot == 0)) || create+=(--spot)
if ((dry_run)); then
  run "${describe[@]}"
  run "${create[@]}"
else
  state=$("${describe[@]}" 2>/dev/null) || state=''
  case $state in
    '') run "${create[@]}" ;;
    READY) echo "tpu_vm.sh: reusing $name, which is READY" >&2 ;;
    *) die "$name is $state, not READY; wait, or delete it with --delete and start again" ;;
  esac
fi
on_workers all "$check"

# What git tracks or would track: no builds, environments or runs.
list=(git -C "$root" ls-files -z --cached --others --exclude-standard)
pack=(tar -C "$root" --null -T - -czf "$archive")
if ((dry_run)); then
  echo "$(quoted "${list[@]}") | $(quoted "${pack[@]}")"
else
  "${list[@]}" | "${pack[@]}" ||
    die "cannot pack the checkout $root: it must be a git checkout, and no tracked file missing"
fi
run "${tpu[@]}" scp "$archive" "$name:dpr_jax.tar.gz" "${place[@]}" --worker=all
((dry_run)) || rm -f "$archive"
on_workers all "$setup"
on_workers all "$start"
on_workers 0 "$follow"
