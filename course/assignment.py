"""Write a student's copy of this repository: `python -m course.assignment OUT` (ours).

The bodies of the functions in `course/exercises.md` become one line that raises
NotImplementedError; signature and docstring stay. Nothing in the code marks them: they are found by
name. The copy has that file's sections as EXERCISES.md, and the graders. Read `course/grade.py`
next: how submissions are graded.
"""

import argparse
import ast
import re
from collections import namedtuple
from pathlib import Path

from runs import InputError, run_command

ROOT = Path(__file__).parent.parent
# what a copy has; all other tests, course/ and lab/ stay here: they hold solutions
COPIED = ("*.py", "requirements.txt", "checkpoints/shapes.pt", "tests/test_exercises.py",
          "tests/test_exercises.json.gz")
GRADERS = Path("tests/test_exercises.py")
EXPERIMENT = "overfit.py"  # in course/, and at the root of a copy
HEADING = re.compile(r"## (\d+)\. (.+)\n(?:`([\w.]+): ([\w.]+)`|no single function) · (.+) · "
                     r"(\d+) minutes · (\d+) points\n")


# a section of exercises.md; "All together" has no single function, its file is None
Exercise = namedtuple("Exercise", "number title file name source points text")


def read_exercises() -> tuple[str, list[Exercise]]:
    """Read exercises.md: its introduction, and the exercises."""
    text = (ROOT / "course/exercises.md").read_text("utf-8")
    introduction, *sections = re.split("^(?=## )", text, flags=re.MULTILINE)
    exercises = []
    for section in sections:
        heading = HEADING.match(section)
        if not heading or int(heading[1]) != len(exercises) + 1:
            raise InputError(f"course/exercises.md: correct {section.splitlines()[:2]}")
        number, *fields, _, points = heading.groups()
        exercises.append(Exercise(int(number), *fields, int(points), section))
    return introduction, exercises


INTRODUCTION, EXERCISES = read_exercises()


def find(source: str, exercise: Exercise) -> ast.FunctionDef:
    """Find the exercise's function in its file's text.

    Raises InputError if it is not there, or has no docstring: a student has nothing else to go by.
    """
    node = ast.parse(source)
    for part in exercise.name.split("."):
        named = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part]
        if not named:
            raise InputError(f"{exercise.file}: no {exercise.name} in it; correct exercises.md")
        node = named[0]
    if ast.get_docstring(node) is None:
        raise InputError(f"{exercise.file}: {exercise.name} has no docstring; write one")
    return node


def split(source: str, exercise: Exercise) -> tuple[str, str, str]:
    """Split a file's text: up to the end of a function's docstring, its body, what follows."""
    function = find(source, exercise)
    lines = source.splitlines(keepends=True)
    start = function.body[0].end_lineno
    parts = lines[:start], lines[start : function.end_lineno], lines[function.end_lineno :]
    return tuple("".join(part) for part in parts)


def build_copy(numbers: list[int]) -> dict[Path, bytes]:
    """Return the files of a student's copy by relative path, with blanks for some exercises."""
    paths = [path for pattern in COPIED for path in ROOT.glob(pattern)]
    files = {path.relative_to(ROOT): path.read_bytes() for path in paths}
    files[Path(EXPERIMENT)] = (ROOT / "course" / EXPERIMENT).read_bytes()
    tiny = files[Path("tiny.py")]
    files[Path("tiny.py")] = re.sub(rb"\s\(docs/.*?\)", b"", tiny)  # that page is not in the copy
    chosen = [EXERCISES[number - 1] for number in numbers]
    for exercise in [exercise for exercise in chosen if exercise.file]:
        before, body, after = split(files[Path(exercise.file)].decode(), exercise)
        indent = body[: len(body) - len(body.lstrip())]
        error = f'NotImplementedError("exercise {exercise.number}: {exercise.source}")'
        files[Path(exercise.file)] = f"{before}{indent}raise {error}\n{after}".encode()
    handout = INTRODUCTION + "".join(exercise.text for exercise in chosen)
    asked = " or ".join(f"exercise_{exercise.number:02d}" for exercise in chosen)
    settings = (ROOT / "pytest.ini").read_bytes()
    settings += f'addopts = -q --tb=short -k "{asked}"\n'.encode()
    return {**files, Path("EXERCISES.md"): handout.encode(), Path("pytest.ini"): settings,
            Path("README.md"): (ROOT / "course/student.md").read_bytes()}


def write_files(files: dict[Path, bytes], folder: Path) -> None:
    """Write files by relative path."""
    for name, contents in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)


def exercise_numbers(only: str) -> list[int]:
    """Parse --only: "4,5" -> [4, 5]. Raises InputError for what is no exercise."""
    parts = [part.strip() for part in only.split(",")]
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= len(EXERCISES):
            raise InputError(f"--only {only}: {part or 'nothing'} is no exercise; give numbers "
                             f"from 1 to {len(EXERCISES)}, commas between")
    return sorted({int(part) for part in parts})


def main(arguments: list[str] | None = None) -> None:
    """Write the copy into a new or empty folder. InputError for what cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m course.assignment",
        description="Writes a student's copy of this repository, with exercises.")
    parser.add_argument("out", metavar="OUT", help="folder of the copy, new or empty")
    parser.add_argument("--only", metavar="4,5", help="numbers of exercises (default: all)",
                        default=",".join(str(n + 1) for n in range(len(EXERCISES))))
    flags = parser.parse_args(arguments)
    numbers = exercise_numbers(flags.only)
    out = Path(flags.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; name a new or empty folder")
    try:
        write_files(build_copy(numbers), out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); name another "
                         f"folder") from error
    print(f"{out}: {len(numbers)} exercise{'s' * (len(numbers) > 1)}, read EXERCISES.md there")


if __name__ == "__main__":
    run_command("course.assignment", main)
