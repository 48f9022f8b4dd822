"""Grade submissions: `python -m course.grade SUBMISSION...` (ours).

Each exercise runs in a separate process with limits of time and memory, in a fresh copy of this
repository where only the exercise's file is the student's; the last exercise has all files. What
ends early, or says nothing, has failed. This is no sandbox: against code that sets out to harm the
machine use a container (docs/teaching.md).
"""

import argparse
import gc
import gzip
import importlib
import json
import os
import secrets
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from pathlib import Path

import pytest
import torch

from course.assignment import EXERCISES, ROOT, Exercise, build_copy, write_files
from runs import InputError
from runs import run_command

SECONDS = 12  # of processor time for a submission, more where this repository itself needs 8
MEMORY = 6 * 2**30  # bytes of address space
GRADERS = Path("tests/test_exercises.py")
HIDDEN = Path("tests/test_hidden.py")  # the same graders with other inputs
HIDDEN_NUMBERS = ROOT / "course/hidden.json.gz"
torch.ones(1, device="meta") * 1  # imports what every process would import again


def spoiled(function: Callable) -> Callable:
    """Return a function with wrong results: graders that pass it have been patched."""
    def wrong(*args, **kwargs):
        try:
            found = [function(*args, **kwargs) for _ in range(2)][1]  # of a step, one too many
        except Exception:
            return None
        if isinstance(found, torch.Tensor):
            return found + 1
        return [*found, "wrong"] if isinstance(found, list) else found and (found[0] + 1, found[1])
    return wrong


class Recorder:
    """pytest plugin: send what each test says through a pipe, marked by a secret."""

    def __init__(self, pipe: int, secret: str, exercise: Exercise, first_only: bool):
        self.send = lambda *record: os.write(pipe, f"{secret}{json.dumps(record)}\n".encode())
        self.exercise = exercise if exercise.file else EXERCISES[7]
        self.first_only = first_only

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.send(item.nodeid, None)  # it has not run
        for path in Path("tests").glob("*"):
            path.unlink()  # they are read, the student's file is not yet

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        """Send what a test says, and whether it fails with spoiled results, as it must."""
        *classes, name = self.exercise.name.split(".")
        try:
            yield
            module = importlib.import_module(self.exercise.file.removesuffix(".py"))
            place = reduce(getattr, classes, module)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, name, spoiled(getattr(place, name)))
                try:
                    pyfuncitem.obj(**{argument: pyfuncitem.funcargs[argument]
                                      for argument in pyfuncitem._fixtureinfo.argnames})
                    words = "it passes with wrong results too: the graders were patched"
                except BaseException:
                    words = ""
        except BaseException as error:
            words = str(error) or type(error).__name__
        self.send(pyfuncitem.nodeid, words[:1000])
        pyfuncitem.session.shouldstop = self.first_only and words
        return True


def run_in_child(folder: str, recorder: Recorder, number: int, seconds: float) -> None:
    """Run the graders of an exercise on the copy in `folder`, in a process that was just forked."""
    import resource  # Windows has none
    os.setsid()
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    for limit, value in ((resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_AS, MEMORY),
                         (resource.RLIMIT_FSIZE, 2**26)):
        resource.setrlimit(limit, (value, value))
    os.chdir(folder)
    for path in (*ROOT.glob("*.py"), GRADERS):
        sys.modules.pop(path.stem, None)
    sys.path[:] = [folder] + [p for p in sys.path if Path(p).resolve() != ROOT]
    without = ["-pno:terminal", "-pno:cacheprovider", "-pno:unraisableexception"]
    pytest.main(["tests", "-k", f"exercise_{number:02d}", "-o", "addopts=", "--assert=plain", "-s",
                 *without], plugins=[recorder])


def run_graders(files: dict[Path, bytes], exercise: Exercise, seconds: float = SECONDS,
                first_only: bool = False) -> tuple[dict[str, str], float]:
    """Run an exercise's graders -> what each test said, "" if it passed, and seconds used."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        write_files({path: contents for path, contents in files.items()
                     if path.suffix != ".pt" or not exercise.file}, Path(folder))
        secret = secrets.token_hex(16)
        pipe, end = os.pipe()
        gc.freeze()
        child = os.fork()
        if child == 0:
            try:
                run_in_child(folder, Recorder(end, secret, exercise, first_only), exercise.number,
                             seconds)
            finally:
                os._exit(0)
        os.close(end)
        text = b""
        ended = 0
        deadline = time.monotonic() + 5 + 4 * seconds
        while time.monotonic() < deadline:
            if select.select([pipe], [], [], 0.01)[0] and (more := os.read(pipe, 2**16)):
                text = (text + more)[: 2**24]
            elif ended:
                break
            else:
                ended, status, usage = os.wait4(child, os.WNOHANG)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with all that it started
        if not ended:
            _, status, usage = os.wait4(child, 0)
        os.close(pipe)
    said = {}
    for line in text.decode(errors="replace").splitlines():
        if line.startswith(secret):
            said.update([json.loads(line.removeprefix(secret))])
    ending = f"the process ended by itself (exit status {os.waitstatus_to_exitcode(status)})"
    if not ended or os.WIFSIGNALED(status):
        ending = f"stopped after {seconds:.1f} s of processor time: does your loop end?"
    said = {test: ending if words is None else words for test, words in said.items()}
    return said or {"all": ending}, usage.ru_utime + usage.ru_stime


def grade(submission: Path, seconds: float = SECONDS) -> tuple[list[dict], float]:
    """Grade a folder of a student's files -> Gradescope's tests, two an exercise, and time used."""
    files = build_copy([])
    files[HIDDEN] = files[GRADERS]
    files[HIDDEN.with_suffix(".json.gz")] = HIDDEN_NUMBERS.read_bytes()
    handed_in = {}
    for path in sorted(submission.rglob("*.py"), key=lambda path: len(path.parts), reverse=True):
        is_file = path.is_file() and path.stat().st_size < 2**20
        if is_file and path.name in {exercise.file for exercise in EXERCISES}:
            handed_in[Path(path.name)] = path.read_bytes()
    used = 0
    tests = []
    for exercise in EXERCISES:
        said = {"all": f"{exercise.file or 'no file'} was not handed in"}
        mine = {path: contents for path, contents in handed_in.items()
                if exercise.file in (str(path), None)}
        if mine:
            # an endless loop takes nothing of what the exercises that follow need
            share = seconds / (len(EXERCISES) + 1)
            limit = seconds - used - share * (len(EXERCISES) - exercise.number)
            said, more = run_graders({**files, **mine}, exercise, max(limit, share))
            used += more
        for suffix, visibility in (("", "visible"), (", hidden tests", "after_published")):
            part = {test: words for test, words in said.items()
                    if (HIDDEN.name in test) == bool(suffix)} or said
            failures = sorted({words for words in part.values() if words})
            share = sum(words == "" for words in part.values()) / len(part)
            tests.append({"name": f"{exercise.number}. {exercise.title}{suffix}",
                          "score": round(exercise.points / 2 * share, 2),
                          "max_score": exercise.points / 2, "visibility": visibility,
                          "output": "\n".join(failures[:5]) or "right"})
    return tests, used


def store_numbers() -> None:
    """Run the graders on this repository and store its results as the right ones."""
    visible = ROOT / GRADERS.with_suffix(".json.gz")
    before = visible.read_bytes()
    for seed, file in ((1, HIDDEN_NUMBERS), (0, visible)):
        marker = json.dumps({"seed": seed, "storing": True}).encode()
        visible.write_bytes(gzip.compress(marker))
        sys.modules.pop(GRADERS.stem, None)
        if pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / GRADERS)]):
            visible.write_bytes(before)
            raise InputError(f"{GRADERS}: not green, nothing was stored; correct the code first")
        numbers = sys.modules[GRADERS.stem].NUMBERS
        del numbers["storing"]
        file.write_bytes(gzip.compress(json.dumps(numbers).encode(), mtime=0))


def main(arguments: list[str] | None = None) -> None:
    """Grade every submission, write its results.json and print a table."""
    parser = argparse.ArgumentParser(prog="python -m course.grade",
                                     description="Grades folders of students' files.")
    parser.add_argument("folders", metavar="SUBMISSION", nargs="*", help="folder of one student")
    parser.add_argument("--out", help="write OUT/NAME/results.json (default: into the submission)")
    parser.add_argument("--store", action="store_true", help="make the stored numbers again, "
                        "after a change of the graders or of checkpoints/shapes.pt")
    flags = parser.parse_args(arguments)
    if flags.store:
        store_numbers()
    folders = [Path(name).resolve() for name in flags.folders]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"{missing[0]}: no such folder; name one for each student")
    if not hasattr(os, "fork"):
        raise InputError("this system cannot fork; grade on Linux, macOS or WSL")
    if not folders:
        return
    tests, used = grade(ROOT, 10 * SECONDS)
    if failures := [test["name"] for test in tests if test["score"] < test["max_score"]]:
        raise InputError(f"{failures[0]}: this repository fails; python -m course.grade --store")
    print(f"{'student':20}" + "".join(f"{e.number:5}" for e in EXERCISES) + "  total")
    for folder in folders:
        try:
            tests, _ = grade(folder, max(SECONDS, 1.5 * used))
            file = (Path(flags.out) / folder.name if flags.out else folder) / "results.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)  # it could be a link
            file.write_text(json.dumps({"tests": tests}, indent=1))
        except OSError as error:
            print(f"{folder.name[:20]:20} not graded: {error}")
            continue
        scores = [sum(test["score"] for test in tests[n : n + 2]) for n in range(0, len(tests), 2)]
        print(f"{folder.name[:20]:20}" + "".join(f"{score:5.1f}" for score in scores)
              + f"{sum(scores):7.1f}", flush=True)


if __name__ == "__main__":
    run_command("course.grade", main)
