"""Grade submissions: `python -m course.grade SUBMISSION...` (ours).

A student's file runs in another process (`isolated.py`, read it next), in a folder where all else
is this repository with blanks: nothing to copy from. That process sends what the graders find; what
is right is known here alone, compared here, and written when that process is gone. What only a
container can stop: docs/teaching.md.
"""

import argparse
import gzip
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path

from course.assignment import (EXERCISES, EXPERIMENT, GRADERS, ROOT, Exercise, build_copy,
                               exercise_numbers, write_files)
from course.isolated import CREATE, landlock
from runs import InputError, run_command

SEED = 1  # of the inputs, that of a student's copy is 0
SENT = 2**25  # bytes that an exercise's graders may send
WEIGHTS = Path("overfit.pt")
INSTALLED = {"venv", "env", "site-packages", "dist-packages", "node_modules", "__pycache__",
             "__MACOSX"}  # folders that no student wrote


def load_graders():
    """Import tests/test_exercises.py, for what it compares with."""
    spec = importlib.util.spec_from_file_location("graders", ROOT / GRADERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Worker:
    """The process of isolated.py, started when it is needed and again when it was lost."""

    def __init__(self, graders, secret: list[Path] = (), seed: int = SEED):
        self.graders = graders
        self.start = {"source": (ROOT / GRADERS).read_text("utf-8"), "seed": seed,
                      "secret": [str(path.resolve()) for path in (ROOT, *secret)]}
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.communicate()
            os.close(self.pipe)
            self.process = None

    def ask(self, request: dict) -> None:
        """Send a request to the process, a new one if there is none."""
        if self.process and self.process.poll() is not None:
            self.__exit__()
        if not self.process:
            self.pipe, end = os.pipe()
            own = [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep)
                   if name and Path(name).resolve() != ROOT]
            keep = {name: text for name, text in os.environ.items() if name[:6] != "PYTEST"}
            self.process = subprocess.Popen(
                [sys.executable, "-c", (ROOT / "course/isolated.py").read_text("utf-8"), str(end)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[end],
                cwd="/", start_new_session=True,
                env={**keep, "PYTHONPATH": os.pathsep.join(own), "CUDA_VISIBLE_DEVICES": "",
                     "OMP_NUM_THREADS": "1"})
            os.close(end)
            self.process.stdin.write(json.dumps(self.start) + "\n")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def run(self, files: dict[Path, bytes], exercise: Exercise, wait: float = 0) -> dict:
        """Run an exercise's graders -> what each found, how it ended, in words, and seconds.

        "imported" tells whether the import of the exercise's file came to an end.
        The limit of processor time is above that in a student's copy; a machine may be busy, so a
        process that does not end has four times as long, or `wait` seconds.
        """
        limit = 3 * self.graders.LIMIT // 2
        wait = wait or 4 * limit
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            files = {path: contents for path, contents in files.items()
                     if path.suffix != ".pt" or exercise.file in (None, EXPERIMENT)}
            write_files(files, Path(folder))
            os.chmod(folder, 0o755)
            self.ask({"folder": str(Path(folder).resolve()), "seconds": limit, "wait": wait,
                      "exercise": f"exercise_{exercise.number:02d}",
                      "module": Path(exercise.file or "magicvideo.py").stem})
            text, answer = bytearray(), ""
            deadline = time.monotonic() + wait + 60
            while not answer and time.monotonic() < deadline and len(text) < SENT:
                ready = select.select([self.pipe, self.process.stdout], [], [], 1)[0]
                if self.pipe in ready:
                    text += os.read(self.pipe, 2**20)
                if self.process.stdout in ready:
                    answer = self.process.stdout.readline() or "lost"
            while answer and select.select([self.pipe], [], [], 0)[0]:
                more = os.read(self.pipe, 2**20)
                text += more
                if not more or len(text) > SENT:
                    break
        try:
            status, seconds = json.loads(answer)
            ending = f"the process ended by itself (status {os.waitstatus_to_exitcode(status)})"
            if os.WIFSIGNALED(status):
                ending = f"stopped by signal {os.WTERMSIG(status)}"
                if seconds > 0.9 * limit:
                    ending = f"stopped after {limit} s of processor time: does your loop end?"
                elif os.WTERMSIG(status) == 9:
                    ending = (f"stopped after {wait:.0f} s, {seconds:.0f} s of them of processor "
                              f"time: does it wait for something?")
        except ValueError:
            self.__exit__()
            seconds, ending = limit, "it sent too much, or ended the process that runs it"
        tests = read_records(text)
        imported = bool(tests.pop("", None))
        return {"tests": tests, "imported": imported, "ending": ending, "seconds": seconds}


def read_records(text: bytes) -> dict[str, dict]:
    """Sort what the graders sent by grader: rows found, whether it is done, what was raised."""
    tests = {}
    for line in text.decode(errors="replace").splitlines():
        with suppress(ValueError, TypeError, LookupError, RecursionError):  # it can be anything
            name, kind, *record = json.loads(line)
            test = tests.setdefault(name, {"rows": {}, "done": False, "raised": ""})
            if kind == "found":
                says, suffix, *row = record
                test["rows"].setdefault((says, suffix), row)  # found, right, within
            elif kind == "done":
                test["done"] = True
            else:
                test["raised"] = str(record[0])[:1000]
    return tests


def expect(worker: Worker, exercises: list[Exercise]) -> dict[str, dict]:
    """Run the graders on this repository -> what is right, by grader. InputError if it is not."""
    files = build_copy([])
    right = {}
    numbers = {}
    for exercise in exercises:
        ran = worker.run(files, exercise)
        for name, test in ran["tests"].items():
            rows = right[name] = {}
            for (says, suffix), (found, known, within) in test["rows"].items():
                value = numbers.setdefault(says, found) if known is None else known
                rows[says, suffix] = value, within
                words = worker.graders.differs(found, value, within)
                if words and exercise.file != EXPERIMENT:  # its weights are not kept
                    raise InputError(f"{name}: {says}{suffix} {words}: this repository fails its "
                                     f"own graders; correct it")
            if test["raised"]:
                raise InputError(f"{name}: {test['raised']}: this repository fails; correct it")
        if not ran["tests"]:
            raise InputError(f"exercise {exercise.number}: {ran['ending']}, no grader ran; "
                             f"write one in {GRADERS}")
    return right


def judge(worker: Worker, right: dict[str, dict], ran: dict, exercise: Exercise) -> dict[str, str]:
    """Compare what was found with what is right -> for each grader what is wrong, or ""."""
    verdicts = {}
    for name, rows in right.items():
        if not name.startswith(f"exercise_{exercise.number:02d}"):
            continue
        test = ran["tests"].get(name, {"rows": {}, "done": False, "raised": ""})
        words = "" if test["done"] else test["raised"] or ran["ending"]
        for (says, suffix), (value, within) in rows.items():
            if (says, suffix) not in test["rows"]:
                words = words or "a grader did not run to its end"
                break
            try:
                wrong = worker.graders.differs(test["rows"][says, suffix][0], value, within)
            except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError):
                wrong = "cannot be read"
            if wrong:
                words = f"{says}{suffix} {wrong}"
                break
        verdicts[name] = words[:1000]
    return verdicts


# --------------------------------------------------------------------------------------------------
# What was handed in


def find_files(submission: Path) -> tuple[dict[Path, bytes], list[str]]:
    """Take a student's files, at any depth -> contents by name, and notes on what was taken.

    Learning platforms and browsers write unet3d-1.py, unet3d (1).py or Name_123_456_unet3d.py. Of
    several copies that nearest to the top is taken, with its plain name first.
    """
    wanted = {exercise.file for exercise in EXERCISES if exercise.file} | {str(WEIGHTS)}
    names_of_files = "|".join(Path(name).stem for name in wanted)
    found = []
    notes = []
    for folder, folders, names in os.walk(submission):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in INSTALLED
                            and not (Path(folder) / name / "pyvenv.cfg").exists())
        for name in sorted(names):
            path = Path(folder) / name
            match = re.fullmatch(rf"(?:.*_\d+_(?:.*_)?|copy of )?({names_of_files})"
                                 r"(?:[-_ ]?\(?\d+\)?| (?:- )?copy)?(\.py|\.pt)", name.lower())
            known = match and match[1] + match[2]
            if known in wanted:
                found.append((len(path.parts), name != known, str(path), known))
            elif path.suffix.lower() in (".ipynb", ".zip", ".gz", ".rar", ".7z", ".txt") and (
                    name.lower() != "requirements.txt"):
                notes.append(f"{path.relative_to(submission)}: not read, only Python files are")
    files = {}
    for *_, text, known in sorted(found):
        path = Path(text)
        place = path.relative_to(submission)
        try:
            is_link = path.is_symlink() or path.stat().st_nlink > 1
            if is_link or not path.is_file() or path.stat().st_size > 2**24:
                words = "a link" if is_link else "no file, or too large"
                notes.append(f"{place}: not taken, it is {words}")
            elif Path(known) not in files:
                files[Path(known)] = path.read_bytes()
                notes.append(f"{place}: taken")
            elif path.read_bytes() != files[Path(known)]:
                notes.append(f"{place}: not taken, it is another copy of {known}")
        except OSError as error:
            notes.append(f"{place}: cannot be read ({error.strerror})")
    return files, notes


def grade(worker: Worker, right: dict, submission: Path, numbers: list[int]) -> dict:
    """Grade a folder of a student's files -> results as Gradescope reads them, a test an exercise.

    The points of an exercise are shared equally among its graders, each of which is a property.
    """
    handed_in, notes = find_files(submission)
    blank = build_copy(numbers)
    asked = {EXERCISES[n - 1].file for n in numbers if EXERCISES[n - 1].file} - {EXPERIMENT}
    needed = {None: asked, EXPERIMENT: {str(WEIGHTS)}}
    tests = []
    stuck = {}  # files whose import does not end -> why
    started = time.monotonic()
    for exercise in (EXERCISES[n - 1] for n in numbers):
        names = needed.get(exercise.file, {exercise.file})
        missing = sorted(names - {str(path) for path in handed_in})
        files = {**blank, **{Path(name): handed_in[Path(name)] for name in names - {*missing}}}
        if exercise.file == EXPERIMENT:  # no function of a student runs here
            files = {**build_copy([]), WEIGHTS: handed_in.get(WEIGHTS, b"")}
        if missing:
            others = [note for note in notes if "not read" in note or "not taken" in note]
            verdicts = {"all": "; ".join([f"{', '.join(missing)} not handed in", *others])}
        elif stuck.keys() & names:
            verdicts = {"all": f"import of {[*stuck.keys() & names][0]}: {[*stuck.values()][0]}"}
        else:
            late = time.monotonic() - started > 600  # a file that waits for ever, again and again
            ran = worker.run(files, exercise, 20 * late)
            verdicts = judge(worker, right, ran, exercise)
            if exercise.file and not ran["imported"]:
                stuck[exercise.file] = ran["ending"]
        failures = [*dict.fromkeys(words for words in verdicts.values() if words)]
        share = sum(not words for words in verdicts.values()) / len(verdicts)
        output = "right"
        if failures:
            output = "\n".join([f"{len(verdicts) - round(share * len(verdicts))} of "
                                f"{len(verdicts)} properties fail; the first:", *failures[:3]])
        tests.append({"name": f"{exercise.number}. {exercise.title}",
                      "score": round(exercise.points * share, 2), "max_score": exercise.points,
                      "visibility": "visible", "output": output})
    return {"tests": tests, "output": "\n".join(notes) or "no file of the exercises was found"}


# --------------------------------------------------------------------------------------------------
# The command


def store_numbers() -> None:
    """Run the graders on this repository and store its results as the right ones."""
    graders = load_graders()
    with Worker(graders, seed=0) as worker:
        right = expect(worker, EXERCISES)
    numbers = {says: value for rows in right.values() for (says, _), (value, _) in rows.items()}
    for value in numbers.values():
        if isinstance(value, dict):
            value["values"] = [float(f"{x:.7g}") for x in value["values"]]
    text = json.dumps(numbers).encode()
    (ROOT / GRADERS).with_suffix(".json.gz").write_bytes(gzip.compress(text, mtime=0))


SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, when the image is built.
set -e
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv /opt/grade
/opt/grade/bin/pip install -r /autograder/source/requirements.txt
"""
RUN = """#!/usr/bin/env bash
# Gradescope runs this for each submission.
chmod -R go= /autograder/source /autograder/submission
cd /autograder/source
/opt/grade/bin/python -m course.grade /autograder/submission --out /autograder/results{only}
mv /autograder/results/submission/results.json /autograder/results/results.json
"""


def write_bundle(path: Path, only: str | None) -> None:
    """Write the zip file that Gradescope's autograder is made from."""
    if path.exists():
        raise InputError(f"{path}: exists already; name a new file")
    files = {name: contents for name, contents in build_copy([]).items()
             if name.name not in ("README.md", "EXERCISES.md")}
    for file in sorted((ROOT / "course").glob("*")):
        if file.suffix in (".py", ".md") and file.name != "answers.md":
            files[file.relative_to(ROOT)] = file.read_bytes()
    files[Path("setup.sh")] = SETUP.encode()
    files[Path("run_autograder")] = RUN.format(only=f" --only {only}" if only else "").encode()
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, contents in files.items():
                info = zipfile.ZipInfo(name.as_posix(), (2026, 1, 1, 0, 0, 0))
                info.external_attr = (0o755 if name.suffix in (".sh", "") else 0o644) << 16
                bundle.writestr(info, contents, zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another") from error
    print(f"{path}: upload it to Gradescope as the autograder's zip file")


def results_folders(submissions: list[Path], out: str | None) -> list[Path]:
    """Return where the results of each submission go: no two of them into one folder."""
    if not out:
        return submissions
    names = [Path(submission.name) for submission in submissions]
    if len({*names}) < len(names):  # a/submission and b/submission
        top = os.path.commonpath(submissions)
        names = [submission.relative_to(top) for submission in submissions]
    return [Path(out).resolve() / name for name in names]


def write_results(results: dict, folder: Path) -> None:
    """Write results.json whole; a link of that name is replaced, not followed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        json.dump(results, file, indent=1)
    os.chmod(file.name, 0o644)
    try:
        os.replace(file.name, folder / "results.json")
    except OSError:
        os.unlink(file.name)
        raise


def main(arguments: list[str] | None = None) -> None:
    """Grade every submission, write its results.json and print a table."""
    parser = argparse.ArgumentParser(prog="python -m course.grade",
                                     description="Grades folders of students' files.")
    parser.add_argument("folders", metavar="SUBMISSION", nargs="*", help="folder of one student")
    parser.add_argument("--out", help="write OUT/NAME/results.json (default: into the submission)")
    parser.add_argument("--only", metavar="4,5", help="grade these exercises (default: all)")
    parser.add_argument("--gradescope", metavar="OUT.zip", help="write an autograder instead")
    parser.add_argument("--store", action="store_true", help="store what is right for students' "
                        "copies, after a change of the graders or of checkpoints/shapes.pt")
    flags = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        raise InputError("this system cannot fork; grade on Linux, macOS or WSL")
    numbers = exercise_numbers(flags.only) if flags.only else [e.number for e in EXERCISES]
    if flags.store:
        store_numbers()
    if flags.gradescope:
        write_bundle(Path(flags.gradescope), flags.only)
    submissions = [*dict.fromkeys(Path(name).resolve() for name in flags.folders)]
    if missing := [path for path in submissions if not path.exists()]:
        raise InputError(f"{missing[0]}: no such folder; name one for each student")
    for path in [path for path in submissions if not path.is_dir()]:
        print(f"{path.name}: passed over, a submission is a folder")
    submissions = [path for path in submissions if path.is_dir()]
    if not submissions:
        return
    if os.geteuid() and landlock(CREATE, None, 0, 1) < 1:
        print("this system cannot shut submissions in; of people whom you do not know grade them "
              "in a container (docs/teaching.md)")
    graders = load_graders()
    with Worker(graders, submissions) as worker:
        right = expect(worker, [EXERCISES[n - 1] for n in numbers])
        print(f"{'student':20}" + "".join(f"{n:5}" for n in numbers) + "  total")
        for submission, folder in zip(submissions, results_folders(submissions, flags.out)):
            row = f"{submission.name[:20]:20}"
            try:
                results = grade(worker, right, submission, numbers)
                scores = [test["score"] for test in results["tests"]]
                row += "".join(f"{score:5.1f}" for score in scores) + f"{sum(scores):7.1f}"
                write_results(results, folder)
            except OSError as error:
                row += f"  no results.json: {error}"
            print(row, flush=True)


if __name__ == "__main__":
    run_command("course.grade", main)
