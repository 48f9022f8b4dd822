"""Short versions of the scripts that kill trainings and damage files (the long ones: docs/measurements.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/statm").exists(),
                                reason="processes are forked and limited as on Linux")


def script(name, *flags, folder):
    return subprocess.run([sys.executable, str(HERE / name), *flags], cwd=folder, capture_output=True, text=True,
                          timeout=600)


def test_killed_filled_and_stopped_runs_end_as_the_undisturbed_one(tmp_path):
    done = script("kill_runs.py", "--kills", "2", folder=tmp_path)
    assert done.returncode == 0 and "5 of 5 runs ended as the undisturbed one did" in done.stdout, done.stdout


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    pytest.importorskip("av", reason="reading .mp4 needs av")
    done = script("fuzz_readers.py", "--inputs", "220", "--seed", "1", folder=tmp_path)
    assert done.returncode == 0 and "220 inputs, 0 went wrong" in done.stdout, done.stdout + done.stderr


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    code = """
import pickle, sys
sys.path.insert(0, {root!r})
class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))
pickle.dump({{"format": "magicvideo", "model": Evil()}}, open("evil.pt", "wb"))
import torch
torch.save({{"format": "magicvideo", "model": Evil()}}, "evil2.pt")
import sample, train, batches
for name in ("evil.pt", "evil2.pt"):
    for call in (lambda: sample.main(["a", "--checkpoint", name]), lambda: train.main(["--init-from", name]),
                 lambda: train.read_checkpoint(name, "magicvideo-latents", mmap=True)):
        try:
            call()
        except train.InputError as error:
            print("refused:", error)
""".format(root=str(HERE.parent))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("refused: ") == 6, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt", "evil2.pt"]
