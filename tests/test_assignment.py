"""The student's copy, what the graders catch and what not, and the grading of submissions."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course import assignment, grade, mistakes
from course.assignment import EXERCISES, ROOT
from runs import InputError

NUMBERS = range(1, len(EXERCISES))  # those with a function
FILES = {name: (ROOT / name).read_text("utf-8") for name in {e.file for e in EXERCISES[:-1]}}


def test_the_copy_has_blanks_and_no_solution_and_nothing_it_names_is_missing(tmp_path):
    assignment.main([str(tmp_path)])
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert names == {*(path.name for path in ROOT.glob("*.py")), "README.md", "EXERCISES.md",
                     "pytest.ini", "requirements.txt", "checkpoints/shapes.pt",
                     "tests/test_exercises.py", "tests/test_exercises.json.gz"}
    texts = {name: (tmp_path / name).read_text("utf-8") for name in names if name[-2:] in "py md"}
    for name, text in texts.items():
        for file in re.findall(r"[\w/]+\.(?:py|md)\b", text):
            assert {file, f"tests/{file}"} & names or file == "ANSWERS.md", f"{name} names {file}"
        assert not re.search(r"\b(course|lab)[./]", text), name
    for exercise in EXERCISES[:-1]:
        whole = assignment.find(FILES[exercise.file], exercise)
        blank = assignment.find(texts[exercise.file], exercise)
        for have, had in ((blank.args, whole.args), (blank.body[0], whole.body[0])):
            assert ast.unparse(have) == ast.unparse(had)
        assert f"NotImplementedError('exercise {exercise.number}: " in ast.unparse(blank.body[1:])
        lines = FILES[exercise.file].splitlines()[whole.body[1].lineno - 1 : whole.end_lineno]
        for line in lines:
            assert len(line.strip()) < 30 or line.strip() not in "".join(texts.values()), line


def test_the_handout_has_equations_questions_points_and_six_to_eight_hours():
    text = assignment.build_copy([*NUMBERS, 15])[Path("EXERCISES.md")].decode()
    assert text.count("\n$$") == text.count("*Question.*") == text.count("\n## ") == len(EXERCISES)
    assert sum(exercise.points for exercise in EXERCISES) == 100
    assert 6 * 60 <= sum(map(int, re.findall(r"(\d+) minutes", text))) <= 8 * 60
    answers = (ROOT / "course/answers.md").read_text("utf-8")
    assert len(re.findall(r"^\d+\. ", answers, re.MULTILINE)) == len(EXERCISES)
    some = assignment.build_copy(assignment.exercise_numbers("4, 14"))
    found = re.findall(rb'NotImplementedError\("exercise (\d+)', b"".join(some.values()))
    assert found == [b"4", b"14"] and some[Path("EXERCISES.md")].count(b"\n## ") == 2


@pytest.mark.parametrize("flags, words", [
    (["out", "--only", "0"], "--only 0: 0 is no exercise; give numbers from 1 to 15"),
    (["out", "--only", "4,"], "--only 4,: nothing is no exercise"),
    (["full"], "full: exists already; name a new or empty folder"),
    (["full/file/out"], "cannot be written .*; name another folder")])
def test_wrong_flags_are_one_line_and_write_nothing(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with pytest.raises(InputError, match=words):
        assignment.main(flags)
    assert not Path("out").exists() and Path("full/file").read_text() == "mine"


def test_a_function_without_a_docstring_or_of_another_name_is_no_exercise(monkeypatch):
    for name, words in (("MLP.forward", "no docstring; write one"), ("MLP.x", "no MLP.x in it")):
        monkeypatch.setattr(assignment, "EXERCISES", [EXERCISES[0]._replace(name=name)])
        with pytest.raises(InputError, match=f"^clip_text.py: .*{words}"):
            assignment.build_copy([1])


@pytest.mark.parametrize("command", ["assignment tests", "mistakes 99", "grade 99"])
def test_errors_have_no_traceback(command):
    done = subprocess.run([sys.executable, "-m", *f"course.{command}".split()], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and re.fullmatch(r"course.\w+: .*; .*\n", done.stderr)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_mistake_is_caught_in_words_and_what_is_right_in_another_way_is_not(number):
    caught = [mistakes.first_words(n, *texts)
              for n, _, *texts in mistakes.MISTAKES if n == number]
    assert len(caught) >= 6 and min(map(len, caught)) > 40 and "NameError" not in str(caught)
    for n, name, *texts in mistakes.ANOTHER_WAY:
        assert n != number or not mistakes.first_words(n, *texts), name


@pytest.mark.parametrize("number", NUMBERS)
def test_a_blank_fails_all_its_graders_and_the_last_exercise_and_nothing_else(number):
    others = assignment.build_copy([n for n in NUMBERS if n != number])
    alone = assignment.build_copy([number])
    for files, n, is_red in ((others, number, False), (alone, number, True), (alone, 15, True)):
        said, _ = grade.run_graders(files, EXERCISES[n - 1])
        assert said and all(bool(words) == is_red for words in said.values()), said


HOSTILE = {  # file -> what is put before a line of it: the exercise of that line fails, no other
    "clip_text.py": ("        if word in (START, END):", "        while True: pass"),
    "diffusion.py": ("        return cast(alpha_bar.sqrt(), z0)", "        import os; os._exit(0)"),
    "vae.py": ("        return (mean +", "        bytearray(10**10)"),
    "data.py": ("    if total < frames:", "    import pytest; pytest.fail = lambda *a, **k: 0"),
    "tiny.py": ("        self.count += 1", "        while True: print('x' * 10**6)"),
}


def test_what_is_hostile_costs_its_author_those_points_alone(tmp_path, capsys):
    for name, text in FILES.items():
        line, code = HOSTILE.get(name, ("", ""))
        text = text.replace(line, f"{code}\n{line}", 1)
        (tmp_path / name).write_text(f"import shutil; shutil.rmtree('tests')\n{text}", "utf-8")
    grade.main([str(tmp_path), "--out", str(tmp_path / "out")])
    (results,) = (tmp_path / "out").glob("*/results.json")
    tests = json.loads(results.read_text())["tests"]
    assert sum(test["max_score"] for test in tests) == 100
    for test in tests:
        fails = int(test["name"].split(".")[0]) in (1, 3, 11, 12, 13, 15)
        assert test["score"] == (0 if fails else test["max_score"]), test
        assert (test["output"] == "right") == (not fails)
        assert test["visibility"] == ("after_published" if "hidden" in test["name"] else "visible")
    assert capsys.readouterr().out.splitlines()[1].endswith(" 67.0")
