"""The student's copy: bodies are blank, all else is there; a blank fails its own graders; mistakes are caught."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import assignment
from assignment import EXERCISES
from data import InputError
from mistakes import MISTAKES, ROOT, caught, copied

NUMBERS = range(1, len(EXERCISES) + 1)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "copy"
    assignment.main([str(out)])
    return out


@pytest.mark.parametrize("number", NUMBERS)
def test_a_body_becomes_one_line_under_its_signature_and_docstring(copy, number):
    exercise = EXERCISES[number - 1]
    blank, whole = (assignment.find((folder / exercise.file).read_text("utf-8"), exercise.name)
                    for folder in (copy, ROOT))
    assert ast.unparse(blank.args) == ast.unparse(whole.args) and ast.get_docstring(blank) == ast.get_docstring(whole)
    assert len(blank.body) == 2 and isinstance(blank.body[1], ast.Raise)
    assert f"exercise {number}, paper {exercise.paper}" in ast.unparse(blank.body[1])
    assert ast.get_docstring(whole)  # which a student has to go by


def test_nothing_else_is_changed_and_no_solution_is_left(copy):
    for path in ROOT.glob("*.py"):
        if path.name == "assignment.py":
            assert not (copy / path.name).exists()
            continue
        lines, mine = path.read_text("utf-8").splitlines(), (copy / path.name).read_text("utf-8").splitlines()
        ours = [n for n in NUMBERS if EXERCISES[n - 1].file == path.name]
        added = [line for line in mine if line not in lines]
        assert len(added) == len(ours) and all("raise NotImplementedError" in line for line in added)
    names = {path.name for path in (copy / "tests").iterdir()}
    assert "test_exercises.py" in names and not names & {"mistakes.py", "test_planted.py", "test_assignment.py"}
    assert (copy / "checkpoints/shapes.pt").is_file() and (copy / "requirements.txt").is_file()


def test_the_sheet_names_each_exercise_its_place_and_its_grader(copy):
    sheet = (copy / "EXERCISES.md").read_text("utf-8")
    graders = (ROOT / "tests/test_exercises.py").read_text("utf-8")
    for number, exercise in zip(NUMBERS, EXERCISES):
        section = sheet.split(f"## {number}. ")[1].split("## ")[0]
        assert exercise.name in section and exercise.paper in section and f"-k exercise_{number:02d}" in section
        assert re.search(r"About \d+ line", section)
        assert f"def test_exercise_{number:02d}_" in graders


def test_only_some(tmp_path):
    assignment.main([str(tmp_path / "out"), "--only", "4, 5"])
    found = "".join(path.read_text("utf-8") for path in (tmp_path / "out").glob("*.py"))
    assert sorted(re.findall(r'NotImplementedError\("exercise (\d+)', found)) == ["4", "5"]
    assert len((tmp_path / "out/EXERCISES.md").read_text("utf-8").split("## ")) == 3


@pytest.mark.parametrize("flags, words", [
    (["out", "--only", "0"], "--only 0: 0 is no exercise; give numbers from 1 to 13"),
    (["out", "--only", "4,x"], "--only 4,x: x is no exercise"), (["out", "--only", ","], "nothing is no exercise"),
    (["full"], "full: is there already"), (["full/file"], "file: is there already"),
])
def test_wrong_flags_are_one_line_and_write_nothing(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with pytest.raises(InputError, match=words):
        assignment.main(flags)
    assert not Path("out").exists() and Path("full/file").read_text() == "mine"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_blank_fails_its_graders_and_no_others(tmp_path, number):
    exercise = EXERCISES[number - 1]
    copied(tmp_path)
    source = (ROOT / exercise.file).read_text("utf-8")
    (tmp_path / exercise.file).write_text(assignment.blank(source, exercise, number), "utf-8")
    said = subprocess.run([sys.executable, "-m", "pytest", "-q", "--tb=no", "-rA", "-p", "no:cacheprovider",
                           "tests/test_exercises.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300).stdout
    failed, passed = (re.findall(rf"^{word} \S+test_exercise_(\d+)", said, re.MULTILINE)
                      for word in ("FAILED", "PASSED"))
    assert set(failed) == {f"{number:02d}"} and f"{number:02d}" not in passed, said[-2000:]
    assert len(set(passed)) == len(EXERCISES) - 1


def test_there_are_six_mistakes_for_each_exercise_and_all_fit(tmp_path):
    from mistakes import plant

    copied(tmp_path)
    assert list(MISTAKES) == list(NUMBERS) and all(len(names) >= 6 for names in MISTAKES.values())
    assert sum(map(len, MISTAKES.values())) >= 72
    for number, names in MISTAKES.items():
        file = EXERCISES[number - 1].file
        for how, wrong in names.values():
            plant(tmp_path, number, how, wrong)
            found = (tmp_path / file).read_text("utf-8")
            assert found != (ROOT / file).read_text("utf-8")
            compile(found, file, "exec")


# all are planted by `python tests/mistakes.py`, here two
@pytest.mark.parametrize("number", [5, 13])
def test_a_mistake_is_caught_and_named(tmp_path, number):
    said = caught(copied(tmp_path), number, list(MISTAKES[number])[1])
    assert said and len(said) > 40
    assert (tmp_path / EXERCISES[number - 1].file).read_bytes() == (ROOT / EXERCISES[number - 1].file).read_bytes()
