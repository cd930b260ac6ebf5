"""What holds for every script under launch/."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPTS = sorted((pathlib.Path(__file__).resolve().parents[2] / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_is_strict_executable_and_helpful(script):
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
  assert os.access(script, os.X_OK)
  done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and done.stdout.startswith("usage: ") and done.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
  beside = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
  shellcheck = beside or shutil.which("shellcheck")
  if not shellcheck:
    pytest.skip("shellcheck is not installed")
  done = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stdout
