"""The student's copy of `course/assignment.py`, and the graders: what they catch, and what not."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course import assignment
from course.assignment import EXERCISES, ROOT
from data import InputError

NUMBERS = range(1, len(EXERCISES) + 1)
GRADERS = re.findall(r"^def (test_exercise_(\d\d)_\w+)",
                     (ROOT / "tests/test_exercises.py").read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "copy"
    assignment.main([str(out)])
    return out


@pytest.mark.parametrize("number", NUMBERS)
def test_a_body_becomes_one_line_under_its_signature_and_docstring(copy, number):
    exercise = EXERCISES[number - 1]
    whole, blank = (assignment.find((folder / exercise.file).read_text("utf-8"), exercise)
                    for folder in (ROOT, copy))
    assert ast.unparse(blank.args) == ast.unparse(whole.args)
    assert ast.get_docstring(blank) == ast.get_docstring(whole)
    (line,) = blank.body[1:]
    assert ast.unparse(line).startswith(f"raise NotImplementedError('exercise {number}: ")
    section = (copy / "EXERCISES.md").read_text("utf-8").split(f"## {number}. ")[1].split("## ")[0]
    for words in (exercise.file, exercise.name, exercise.task, f"-k exercise_{number:02d}"):
        assert words in section


def test_the_copy_is_complete_and_has_no_solutions(copy):
    names = [path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()]
    assert [name for name in sorted(names) if name.startswith(("tests", "course", "lab", "."))] == [
        "tests/conftest.py", "tests/test_exercises.py"]
    assert {"README.md", "pytest.ini", "requirements.txt", "docs/measurements.md",
            "checkpoints/shapes.pt", *(path.name for path in ROOT.glob("*.py"))} <= {*names}
    for name in {*names} - {"EXERCISES.md"}:
        if (copy / name).read_bytes() != (ROOT / name).read_bytes():
            ours = (ROOT / name).read_text("utf-8").splitlines()
            added = [line for line in (copy / name).read_text("utf-8").splitlines()
                     if line not in ours]
            assert len(added) == sum(exercise.file == name for exercise in EXERCISES)
            assert all("raise NotImplementedError" in line for line in added)


def test_only_some(tmp_path):
    assignment.main([str(tmp_path / "out"), "--only", "4, 14"])
    found = "".join(path.read_text("utf-8") for path in (tmp_path / "out").glob("*.py"))
    assert re.findall(r'NotImplementedError\("exercise (\d+)', found) == ["4", "14"]
    assert (tmp_path / "out/EXERCISES.md").read_text("utf-8").count("\n## ") == 2


@pytest.mark.parametrize("flags, words", [
    (["out", "--only", "0"], "--only 0: 0 is no exercise; give numbers from 1 to 14"),
    (["out", "--only", "4,x"], "--only 4,x: x is no exercise"),
    (["out", "--only", ""], "nothing is no exercise"),
    (["full"], "full: exists already; name a new or empty folder"),
    (["full/file"], "file: exists already"),
    (["full/file/out"], "cannot be written .*; name another folder"),
])
def test_wrong_flags_are_one_line_and_write_nothing(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with pytest.raises(InputError, match=words):
        assignment.main(flags)
    assert not Path("out").exists() and Path("full/file").read_text() == "mine"


def test_a_function_without_a_docstring_or_of_another_name_is_no_exercise(monkeypatch):
    for name, words in (("MLP.forward", "no docstring; write one"), ("MLP.x", "no MLP.x in it")):
        monkeypatch.setattr(EXERCISES[0], "name", name)
        with pytest.raises(InputError, match=f"^clip_text.py: .*{words}"):
            assignment.build_copy([1])


@pytest.mark.parametrize("module", ["assignment", "mistakes"])
def test_errors_have_no_traceback(module):
    done = subprocess.run([sys.executable, "-m", f"course.{module}", "tests"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and re.fullmatch(rf"course.{module}: .*; .*\n", done.stderr)


# --------------------------------------------------------------------------------------------------
# What the graders say

SCRIPT = """
import json
from course.mistakes import FORMULAS, MISTAKES, NUMBERS, grade

def blank(*args, **kwargs):
    raise NotImplementedError

mistakes = {(n, name): function for n in NUMBERS for name, function in MISTAKES[n].items()}
formulas = {(n, "formula"): function for n, function in FORMULAS.items()}
blanks = {(n, "blank"): blank for n in NUMBERS}
for functions in (mistakes, formulas, blanks):
    said = grade(functions, all_graders=functions is blanks)
    print(json.dumps([[*key, messages] for key, messages in said.items()]))
"""


@pytest.fixture(scope="module")
def said():
    """[exercise, name, {grader: message}] of all mistakes, of right formulas and of blanks."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_mistake_is_caught_and_named_and_the_formula_without_it_is_not(said):
    mistakes, formulas, _ = said
    numbers = [number for number, _, _ in mistakes]
    assert len(numbers) >= 110 and min(map(numbers.count, NUMBERS)) >= 6
    for number, name, messages in mistakes:
        # a TypeError, say, is none of the mistake that was meant
        assert any(message.startswith(("AssertionError: ", "Failed: ")) and len(message) > 40
                   for message in messages.values()), f"{number} {name}: {messages}"
    assert formulas and not any(messages for _, _, messages in formulas)


def test_a_blank_fails_all_of_its_graders_and_no_others(said):
    for number, _, messages in said[2]:
        assert {*messages} == {grader for grader, n in GRADERS if int(n) == number}
