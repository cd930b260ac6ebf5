"""launch/tpu_vm.sh against a gcloud that logs its arguments and runs commands on this machine."""

import os
import pathlib
import shlex
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "tpu_vm.sh"
HOSTS = 2

# Logs every call as one line of %q words. A host is a folder, which is HOME of what runs there.
GCLOUD = r"""#!/usr/bin/env bash
set -euo pipefail
{ printf '%q ' "$@"; echo; } >>"$FAKE/log"
[[ "$1 $2 $3" == "compute tpus tpu-vm" ]]
verb=$4 name=$5
shift 5
worker=all command=''
for argument in "$@"; do
  case $argument in
    --worker=*) worker=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
  esac
done
case $verb in
  describe) [[ -f $FAKE/state ]] || { echo "NOT_FOUND" >&2; exit 1; }; cat "$FAKE/state" ;;
  create) [[ ! -f $FAKE/state ]]; echo READY >"$FAKE/state" ;;
  delete) rm "$FAKE/state" ;;
  scp) for host in "$FAKE"/hosts/*; do cp "$name" "$host/${1#*:}"; done ;;
  ssh)
    for host in "$FAKE"/hosts/*; do
      [[ $worker == all || $worker == "${host##*/}" ]] || continue
      (cd "$host" && HOME=$host exec bash -c "$command")
    done
    ;;
esac
"""
PYTHON3 = r"""#!/usr/bin/env bash
echo "python3 $*" >>"$HOME/installed"
mkdir -p "$HOME/.local/bin"
cp "$FAKE/uv" "$HOME/.local/bin/uv"
"""
UV = r"""#!/usr/bin/env bash
echo "uv $*" >>"$HOME/installed"
if [[ $1 == venv ]]; then
  mkdir -p "${*: -1}/bin"
  cp "$FAKE/python" "${*: -1}/bin/python"
fi
"""
# Stands for the run: it shows what it was given, waits as long as told, and exits as told.
PYTHON = r"""#!/usr/bin/env bash
trap 'echo "saving on $(basename "$HOME")"; exit 143' TERM
echo "host $(basename "$HOME") distributed $DPR_DISTRIBUTED in ${PWD#"$HOME"/}"
printf 'argument <%s>\n' "$@"
[[ -f dpr_jax/main.py || -f setup.py ]] && echo "checkout is here"
for ((i = 0; i < $(cat "$FAKE/tenths"); i++)); do sleep 0.1; done
echo "done" >&2
exit "$(cat "$FAKE/code")"
"""


class Cloud:
  """The fake cloud: its folder, and how to call the script in it."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    for name, text in [("bin/gcloud", GCLOUD), ("bin/python3", PYTHON3), ("uv", UV),
                       ("python", PYTHON)]:
      path = folder / name
      path.parent.mkdir(exist_ok=True)
      path.write_text(text)
      path.chmod(0o755)
    for i in range(HOSTS):
      (folder / "hosts" / str(i)).mkdir(parents=True)
    (folder / "tmp").mkdir()
    self.behave()
    self.env = {**os.environ, "FAKE": str(folder), "TMPDIR": str(folder / "tmp"),
                "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

  def behave(self, tenths: int = 0, code: int = 0):
    (self.folder / "tenths").write_text(str(tenths))
    (self.folder / "code").write_text(str(code))

  def script(self, *arguments: str, **kwargs):
    return subprocess.run([SCRIPT, *arguments], env=self.env, capture_output=True, text=True,
                          timeout=60, **kwargs)

  def calls(self) -> list[list[str]]:
    """The words after "compute tpus tpu-vm" of every call of gcloud so far."""
    log = self.folder / "log"
    if not log.exists():
      return []
    words = subprocess.run(  # bash reads its own %q
      ["bash", "-c", r'while IFS= read -r line; do eval "w=($line)"; '
       r"""printf '%s\0' "${w[@]}"; printf '\0\0'; done <"$1" """, "-", log],
      capture_output=True, text=True, check=True).stdout
    return [call.split("\0")[3:] for call in words.split("\0\0\0")[:-1]]

  def installed(self, host: int) -> list[str]:
    return (self.folder / "hosts" / str(host) / "installed").read_text().splitlines()


@pytest.fixture
def cloud(tmp_path):
  made = Cloud(tmp_path)
  yield made
  made.script("--name", "dpr", "--zone", "eu-b", "--stop")


VM = ["--name", "dpr", "--zone", "eu-b"]
NEW = [*VM, "--type", "v5litepod-16"]
ARGS = ["--config=configs/smoke.py", "--config.data.demos=a b'c\"d", "--workdir=gs://b/$HOME", "*"]


def test_a_run_from_nothing(cloud):
  done = cloud.script(*NEW, "--project", "p-1", "--spot", "--", *ARGS)
  assert done.returncode == 0, done.stderr
  # The log of worker 0, whole, with the arguments as they were given.
  lines = done.stdout.splitlines()
  assert lines == ["host 0 distributed 1 in dpr_jax", "argument <-m>", "argument <dpr_jax.main>",
                   *(f"argument <{a}>" for a in ARGS), "checkout is here", "done"]
  # The same happened on worker 1.
  other = (cloud.folder / "hosts/1/dpr_jax_run/log").read_text().splitlines()
  assert other == [lines[0].replace("host 0", "host 1"), *lines[1:]]
  for host in range(HOSTS):
    home = cloud.folder / "hosts" / str(host)
    assert cloud.installed(host) == [
      "python3 -m pip install --quiet --user uv",
      f"uv venv --quiet --python 3.12 {home}/dpr_jax_env",
      f"uv pip install --quiet --python {home}/dpr_jax_env/bin/python -e .[tpu,gcp]"]
    assert (home / "dpr_jax/setup.py").read_bytes() == (ROOT / "setup.py").read_bytes()
    assert not (home / "dpr_jax/.git").exists()
  calls = cloud.calls()
  assert [c[0] for c in calls] == ["describe", "create", "ssh", "scp", "ssh", "ssh", "ssh"]
  assert calls[1] == ["create", "dpr", "--zone=eu-b", "--project=p-1",
                      "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
  for call in calls:
    assert "--zone=eu-b" in call and "--project=p-1" in call
  assert not list((cloud.folder / "tmp").iterdir())  # the archive is gone


def test_a_second_run_reuses_the_machine_and_gives_the_exit_code(cloud):
  cloud.script(*NEW, "--", "--first")
  cloud.behave(code=3)
  done = cloud.script(*NEW, "--extras", "tpu,gcp", "--", "--second")
  assert done.returncode == 3
  assert "reusing dpr, which is READY" in done.stderr
  assert "argument <--second>" in done.stdout and "--first" not in done.stdout
  assert [c[0] for c in cloud.calls()].count("create") == 1
  assert [line.split()[:2] for line in cloud.installed(0)] == [
    ["python3", "-m"], ["uv", "venv"], ["uv", "pip"], ["uv", "pip"]]
  assert cloud.installed(0)[-1].endswith("-e .[tpu,gcp]")


def test_a_dry_run_prints_what_a_run_does(cloud):
  done = cloud.script(*NEW, "--spot", "--dry-run", "--", *ARGS)
  assert done.returncode == 0 and done.stderr == ""
  assert cloud.calls() == [] and not list((cloud.folder / "tmp").iterdir())
  # Pasted into a shell, it does what the script would have done, to the last argument.
  pasted = subprocess.run(["bash"], input=done.stdout, env=cloud.env, capture_output=True,
                          text=True, timeout=60)
  assert pasted.returncode == 0, pasted.stderr
  by_hand = cloud.calls()
  (cloud.folder / "log").unlink()
  (cloud.folder / "state").unlink()
  real = cloud.script(*NEW, "--spot", "--", *ARGS)
  assert real.returncode == 0
  assert cloud.calls() == by_hand and len(by_hand) == 7
  assert pasted.stdout == real.stdout
  for mode in ("--logs", "--stop", "--delete"):
    (cloud.folder / "log").unlink(missing_ok=True)
    done = cloud.script(*VM, mode, "--dry-run")
    assert cloud.calls() == [] and done.stdout.startswith("gcloud compute tpus tpu-vm ")
    assert shlex.split(done.stdout)[4] == ("delete" if mode == "--delete" else "ssh")


def wait_for(path: pathlib.Path, text: str):
  deadline = time.monotonic() + 30
  while not (path.exists() and text in path.read_text()):
    assert time.monotonic() < deadline, f"{path} never had {text!r}"
    time.sleep(0.05)


def test_a_lost_connection_does_not_end_the_run(cloud):
  cloud.behave(tenths=30, code=4)
  log = cloud.folder / "hosts/0/dpr_jax_run/log"
  # Under nohup, what this process ignores would be ignored by the script too.
  heed = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
  with subprocess.Popen([SCRIPT, *NEW, "--", "--x"], env=cloud.env, start_new_session=True,
                        preexec_fn=heed, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE) as process:
    wait_for(log, "checkout is here")
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=30)
  assert process.returncode == -signal.SIGHUP
  assert "done" not in log.read_text()
  # While it goes on, another cannot be started over it.
  second = cloud.script(*NEW, "--", "--y")
  assert second.returncode == 1 and "a run is going on here" in second.stderr
  again = cloud.script(*VM, "--logs")
  assert again.returncode == 4
  assert again.stdout == log.read_text() and again.stdout.endswith("done\n")


def test_stop_lets_every_host_save(cloud):
  cloud.behave(tenths=600)
  with subprocess.Popen([SCRIPT, *NEW, "--", "--x"], env=cloud.env, text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    for host in range(HOSTS):
      wait_for(cloud.folder / f"hosts/{host}/dpr_jax_run/log", "checkout is here")
    assert cloud.script(*VM, "--stop").returncode == 0
    out, _ = process.communicate(timeout=30)
  assert process.returncode == 143
  assert out.endswith("saving on 0\n")
  wait_for(cloud.folder / "hosts/1/dpr_jax_run/code", "143")


def test_delete(cloud):
  cloud.script(*NEW, "--", "--x")
  assert cloud.script(*VM, "--project", "p-1", "--delete").returncode == 0
  assert cloud.calls()[-1] == ["delete", "dpr", "--zone=eu-b", "--project=p-1", "--quiet"]
  assert not (cloud.folder / "state").exists()


def test_a_machine_that_is_not_ready_is_not_used(cloud):
  (cloud.folder / "state").write_text("PREEMPTED\n")
  done = cloud.script(*NEW, "--", "--x")
  assert done.returncode == 2 and "dpr is PREEMPTED, not READY" in done.stderr
  assert [c[0] for c in cloud.calls()] == ["describe"]


@pytest.mark.parametrize("kind, version", [
  ("v4-8", "tpu-ubuntu2204-base"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")])
def test_runtime_versions(cloud, kind, version):
  done = cloud.script(*VM, "--type", kind, "--dry-run", "--", "--x")
  assert f"--version={version}\n" in done.stdout
  done = cloud.script(*VM, "--type", kind, "--version", "mine", "--dry-run", "--", "--x")
  assert "--version=mine\n" in done.stdout


@pytest.mark.parametrize("arguments, pattern", [
  ([], "--name is missing"),
  (["--name", "dpr"], "--zone is missing"),
  (["--name", "Dpr_1", "--zone", "z"], "--name 'Dpr_1' must be lower-case"),
  (VM, "--type is missing, such as v5litepod-16"),
  (NEW, "no arguments for dpr_jax.main after --"),
  ([*VM, "--type", "v9-8", "--", "--x"], "no runtime version is known for --type 'v9-8'"),
  ([*NEW, "--config=x"], "unknown argument '--config=x'"),
  ([*NEW, "--project", "--", "--x"], "--project needs a value"),
  ([*NEW, "--extras", "tpu]; rm", "--", "--x"], "--extras 'tpu]; rm' must be names"),
  ([*VM, "--delete", "--", "--x"], "--delete takes no arguments"),
  ([*VM, "--delete", "--stop"], "--delete and --stop exclude each other"),
])
def test_usage(cloud, arguments, pattern):
  done = cloud.script(*arguments)
  assert done.returncode == 2 and pattern in done.stderr and done.stderr.count("\n") == 1
  assert cloud.calls() == []
