"""The student's copy, what the graders catch and what not, and the grading of submissions."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from course import assignment, grade, mistakes
from course.assignment import EXERCISES, EXPERIMENT, ROOT
from magicvideo import MagicVideo
from runs import InputError

NUMBERS = [e.number for e in EXERCISES if e.file not in (None, EXPERIMENT)]  # with a function
BY_FILE = assignment.build_copy([])
FILES = {str(path): text.decode() for path, text in BY_FILE.items()
         if str(path) in {e.file for e in EXERCISES}}


@pytest.fixture(scope="module")
def worker():
    with grade.Worker(grade.load_graders()) as worker:
        yield worker


@pytest.fixture(scope="module")
def right(worker):
    return grade.expect(worker, EXERCISES)


def test_the_copy_has_blanks_and_no_solution_and_nothing_it_names_is_missing(tmp_path):
    assignment.main([str(tmp_path)])
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert names == {*(path.name for path in ROOT.glob("*.py")), "README.md", "EXERCISES.md",
                     "overfit.py", "pytest.ini", "requirements.txt", "checkpoints/shapes.pt",
                     "tests/test_exercises.py", "tests/test_exercises.json.gz"}
    texts = {name: (tmp_path / name).read_text("utf-8") for name in names if name[-2:] in "py md"}
    for name, text in texts.items():
        for file in re.findall(r"[\w/]+\.(?:py|md)\b", text):
            assert {file, f"tests/{file}"} & names or file == "ANSWERS.md", f"{name} names {file}"
        assert not re.search(r"\b(course|lab)[./]", text), name
    for exercise in [e for e in EXERCISES if e.file]:
        whole = assignment.find(FILES[exercise.file], exercise)
        blank = assignment.find(texts[exercise.file], exercise)
        for have, had in ((blank.args, whole.args), (blank.body[0], whole.body[0])):
            assert ast.unparse(have) == ast.unparse(had)
        assert f"NotImplementedError('exercise {exercise.number}: " in ast.unparse(blank.body[1:])
        lines = FILES[exercise.file].splitlines()[whole.body[1].lineno - 1 : whole.end_lineno]
        for line in lines:
            assert len(line.strip()) < 30 or line.strip() not in "".join(texts.values()), line


def test_the_handout_has_equations_questions_minutes_and_100_points():
    text = assignment.build_copy([e.number for e in EXERCISES])[Path("EXERCISES.md")].decode()
    assert text.count("\n$$") == text.count("*Question.*") == text.count("\n## ") == len(EXERCISES)
    assert sum(exercise.points for exercise in EXERCISES) == 100
    assert len(re.findall(r"\d+ minutes", text)) == len(EXERCISES)
    answers = (ROOT / "course/answers.md").read_text("utf-8")
    assert len(re.findall(r"^\d+\. ", answers, re.MULTILINE)) == len(EXERCISES)
    some = assignment.build_copy(assignment.exercise_numbers("4, 14"))
    found = re.findall(rb'NotImplementedError\("exercise (\d+)', b"".join(some.values()))
    assert found == [b"4", b"14"] and some[Path("EXERCISES.md")].count(b"\n## ") == 2


@pytest.mark.parametrize("flags, words", [
    (["out", "--only", "0"], f"--only 0: 0 is no exercise; give numbers from 1 to "
                             f"{len(EXERCISES)}"),
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


@pytest.mark.parametrize("command", ["assignment tests", "mistakes 99", "grade . --only 99"])
def test_errors_have_no_traceback(command):
    done = subprocess.run([sys.executable, "-m", *f"course.{command}".split()], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and re.fullmatch(r"course.\w+: .*; .*\n", done.stderr)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_mistake_is_caught_in_words_and_what_is_right_in_another_way_is_not(
        worker, right, number):
    caught = {name: mistakes.first_words(worker, right, n, *texts)
              for n, name, *texts in mistakes.MISTAKES if n == number}
    assert len(caught) >= 10
    for name, words in caught.items():
        assert len(words) > 40 and "NameError" not in words and "SyntaxError" not in words, name
    for n, name, *texts in mistakes.ANOTHER_WAY:
        assert n != number or not mistakes.first_words(worker, right, n, *texts), name


def verdicts(worker, right, files, number: int) -> dict[str, str]:
    exercise = EXERCISES[number - 1]
    return grade.judge(worker, right, worker.run(files, exercise), exercise)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_blank_fails_all_its_graders_and_exercise_15_and_nothing_else(worker, right, number):
    others = assignment.build_copy([n for n in NUMBERS if n != number])
    alone = assignment.build_copy([number])
    assert not any(verdicts(worker, right, others, number).values())
    assert all("not written yet" in words for words in
               verdicts(worker, right, alone, number).values())
    assert any(verdicts(worker, right, alone, 15).values())


@pytest.mark.parametrize("number", NUMBERS)
def test_what_does_nothing_has_no_points(worker, right, number):
    function = assignment.find(FILES[EXERCISES[number - 1].file], EXERCISES[number - 1])
    first = [argument.arg for argument in function.args.args if argument.arg != "self"]
    for body in ("raise ValueError", f"return {(first or [None])[0]}", "return None"):
        files = mistakes.change(number, " " * function.body[0].col_offset + body)
        assert all(verdicts(worker, right, files, number).values()), body


def test_a_blank_is_one_line_in_the_copy_and_the_first_failure_is_alone(tmp_path):
    assignment.main([str(tmp_path / "copy")])
    done = subprocess.run([sys.executable, "-m", "pytest", "-k", "exercise_06"], text=True,
                          cwd=tmp_path / "copy", capture_output=True)
    assert len(done.stdout.splitlines()) < 12 and "1 failed" in done.stdout, done.stdout
    assert "unet3d.py: not written yet, exercise 6" in done.stdout


def test_what_is_right_and_slow_is_right(worker, right):
    slowly = "        end = time.process_time() + 0.02\n        while time.process_time() < end:\n" \
             "            pass\n"
    before = "        frames = len(self.scale)\n"
    assert before in FILES["unet3d.py"]
    text = FILES["unet3d.py"].replace(before, slowly + before)
    ran = worker.run({**BY_FILE, Path("unet3d.py"): f"import time\n{text}".encode()}, EXERCISES[3])
    assert ran["seconds"] > 4 and not any(grade.judge(worker, right, ran, EXERCISES[3]).values())


def test_a_loop_that_never_ends_is_named_and_waits_once(worker, right, tmp_path, monkeypatch):
    monkeypatch.setattr(worker.graders, "LIMIT", 2)
    (tmp_path / "unet3d.py").write_text("while True: pass")
    tests = grade.grade(worker, right, tmp_path, [4, 5])["tests"]
    assert all("stopped after 3 s of processor time: does your loop end?" in test["output"]
               for test in tests) and "import of unet3d.py" in tests[1]["output"]
    (tmp_path / "unet3d.py").write_text("import time; time.sleep(999)")
    monkeypatch.setattr(worker.graders, "LIMIT", 1)
    (test,) = grade.grade(worker, right, tmp_path, [4])["tests"]
    assert "of processor time: does it wait for something?" in test["output"]


# what a hostile file does when it is imported, and then instead of the adaptor
CHEATS = {
    "imports the instructor's file": f"""
import importlib.util, sys
for place in ("unet3d", "cheat"):
    spec = importlib.util.spec_from_file_location(place, "{ROOT}/unet3d.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    FrameAdaptor.forward = module.FrameAdaptor.forward""",
    "reads it by a path of torch's": f"""
import torch
text = bytes(torch.from_file("{ROOT}/unet3d.py", size=9999, dtype=torch.uint8).tolist()).decode()
scope = {{"__name__": "cheat"}}; exec(text[: text.index("class DirectedT")], scope)
FrameAdaptor.forward = scope["FrameAdaptor"].forward""",
    "finds it by /proc": """
import glob, os
for path in glob.glob("/proc/[0-9]*/cwd/unet3d.py"):
    scope = {"__name__": "cheat"}; exec(open(path).read(), scope)
    FrameAdaptor.forward = scope["FrameAdaptor"].forward""",
    "reads other submissions": """
import glob
for path in glob.glob("{out}/*/unet3d.py"):
    if "/cheat/" not in path:
        scope = {"__name__": "cheat"}; exec(open(path).read(), scope)
        FrameAdaptor.forward = scope["FrameAdaptor"].forward""",
    "replaces the graders": """
import gc, sys
for x in [x for x in gc.get_objects() if isinstance(x, dict) and "GRADERS" in x]:
    x["same"] = x["report"] = lambda *a, **k: None
    x["differs"] = lambda *a: ""; x["call"] = lambda *a: None""",
    "has results equal to all": """
class Equal:
    dtype, device, shape, requires_grad = "x", "meta", (), False
    __eq__ = __le__ = __ge__ = lambda *a: True
    __ne__ = lambda *a: False
FrameAdaptor.forward = lambda self, z: Equal()""",
    "says that all is done": """
import json, os
for pipe in range(3, 40):
    for name in ["exercise_04: pictures, values"]:
        try: os.write(pipe, json.dumps([name, "done"]).encode() + b"\\n")
        except OSError: pass
os._exit(0)""",
    "kills": """
import os, signal
for number in [os.getppid(), -1, *range(2, 60000)]:
    try: os.kill(number, signal.SIGKILL)
    except (OSError, OverflowError): pass""",
    "starts others": """
import os, subprocess, threading
for _ in range(99):
    try:
        if not os.fork():
            while True: pass
    except OSError: pass
subprocess.Popen(["sleep", "99"])""",
    "changes the tests": f"""
import pathlib, shutil
for path in ("{ROOT}/tests/test_exercises.py", "test_exercises.py", "{{out}}/right/unet3d.py"):
    try: open(path, "a").write("# changed")
    except OSError: pass
shutil.rmtree("{ROOT}/course", ignore_errors=True)""",
    "writes results": """
import os
for name in ("results.json", "{out}/cheat/results.json"):
    try: open(name, "w").write("mine")
    except OSError: pass
os.kill(os.getpid(), 9)""",
    "leaves something for the next": """
import os, site, sys
for folder in {*sys.path, "/tmp", "/dev/shm", os.path.expanduser("~")}:
    for name in ("sitecustomize", "json"):
        try: open(f"{folder}/{name}.py", "w").write("raise SystemExit")
        except OSError: pass""",
    "takes all memory": "x = bytearray(10**11)",
    "ends": "import sys; sys.exit()",
    "sends without end": """
import os
while True:
    for pipe in range(3, 20):
        try: os.write(pipe, b"x" * 10**6)
        except OSError: pass""",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_has_no_points_and_harms_nobody(worker, right, tmp_path, cheat):
    blank = assignment.build_copy([4])[Path("unet3d.py")].decode()
    for name, text in (("cheat", f"{blank}\n{CHEATS[cheat].replace('{out}', str(tmp_path))}\n"),
                       ("right", FILES["unet3d.py"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unet3d.py").write_text(text)
    before = [path.read_bytes() for path in sorted(ROOT.glob("tests/test_e*"))]
    worker.start["secret"] = [str(ROOT), str(tmp_path / "cheat"), str(tmp_path / "right")]
    (test,) = grade.grade(worker, right, tmp_path / "cheat", [4])["tests"]
    assert test["score"] == 0, test["output"]
    assert before == [path.read_bytes() for path in sorted(ROOT.glob("tests/test_e*"))]
    if "next" in cheat:
        worker.__exit__()  # the next process starts where something may have been left
    (test,) = grade.grade(worker, right, tmp_path / "right", [4])["tests"]
    for folder in ("/tmp", "/dev/shm"):
        for name in ("sitecustomize", "json"):
            Path(folder, f"{name}.py").unlink(missing_ok=True)
    assert test["score"] == test["max_score"]
    assert not [*tmp_path.glob("*/results.json")]


FOLDERS = {  # what was handed in -> what is taken, and a word of the notes
    "unet3d.py": ("unet3d.py", "unet3d.py: taken"),
    "a/b/unet3d.py": ("unet3d.py", "a/b/unet3d.py: taken"),
    "unet3d-1.py": ("unet3d.py", "unet3d-1.py: taken"),
    "unet3d (2).py": ("unet3d.py", "taken"),
    "unet3d(1).py": ("unet3d.py", "taken"),
    "UNet3D.py": ("unet3d.py", "taken"),
    "doejane_LATE_123_456_clip_text-2.py": ("clip_text.py", "taken"),
    "doe_jane_123_456_data.py": ("data.py", "taken"),
    "Jane Doe_123_assignsubmission_file_/vae.py": ("vae.py", "taken"),
    "Jane Doe_123_assignsubmission_file_vae.py": ("vae.py", "taken"),
    "tests/test_data.py": (None, "no file"),
    ".venv/lib/data.py": (None, "no file"),
    ".git/data.py": (None, "no file"),
    "myenv/lib/data.py": (None, "no file"),
    "__MACOSX/unet3d.py": (None, "no file"),
    "lib/python3.11/site-packages/data.py": (None, "no file"),
    "mydata.py": (None, "no file"),
    "unet3d.ipynb": (None, "unet3d.ipynb: not read, only Python files are"),
    "all.zip": (None, "all.zip: not read"),
    "unet3d.py.txt": (None, "unet3d.py.txt: not read"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_files_are_found_under_the_names_that_platforms_give_them(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x = 1")
    (tmp_path / "myenv").mkdir(exist_ok=True)
    (tmp_path / "myenv/pyvenv.cfg").touch()
    files, notes = grade.find_files(tmp_path)
    taken, words = FOLDERS[name]
    assert [*map(str, files)] == ([taken] if taken else [])
    assert words in "\n".join(notes or ["no file"])


def test_of_two_copies_the_upper_is_taken_and_both_are_named(tmp_path):
    for name, text in (("unet3d.py", "upper"), ("old/unet3d.py", "lower"), ("a/data.py", "same"),
                       ("b/data.py", "same")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    files, notes = grade.find_files(tmp_path)
    assert files == {Path("unet3d.py"): b"upper", Path("data.py"): b"same"}
    assert "old/unet3d.py: not taken, it is another copy of unet3d.py" in notes and len(notes) == 3


def test_what_cannot_be_graded_or_written_is_one_line():
    for flags in (["99"], ["--gradescope", str(ROOT / "README.md")]):
        with pytest.raises(InputError, match="no such folder; name one|exists already; name a new"):
            grade.main(flags)


def test_links_are_refused(tmp_path):
    (tmp_path / "unet3d.py").symlink_to(ROOT / "unet3d.py")
    (tmp_path / "mine").write_text("x = 1")
    (tmp_path / "data.py").hardlink_to(tmp_path / "mine")
    (tmp_path / "folder").symlink_to(ROOT)
    files, notes = grade.find_files(tmp_path)
    assert not files and notes == ["data.py: not taken, it is a link",
                                   "unet3d.py: not taken, it is a link"]


def test_the_command_grades_folders_passes_over_strays_and_loses_no_results(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--color=yes")
    for name, numbers in (("a/submission", []), ("b/submission", [4])):
        (tmp_path / name).mkdir(parents=True)
        text = assignment.build_copy(numbers)[Path("unet3d.py")]
        (tmp_path / name / "unet3d.py").write_bytes(text)
    (tmp_path / "b/submission/results.json").symlink_to(tmp_path / "victim")
    (tmp_path / "stray.txt").touch()
    folders = [str(tmp_path / name) for name in ("a/submission", "b/submission", "stray.txt")]
    grade.main([*folders, "--only", "4,5", "--out", str(tmp_path / "out")])
    grade.main([folders[1], "--only", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert "stray.txt: passed over" in lines[0] and lines[-1].split()[1:] == ["0.0", "0.0"]
    four, five = (exercise.points for exercise in EXERCISES[3:5])
    assert [[float(word) for word in line.split()[1:]] for line in lines[2:4]] == [
        [four, five, four + five], [0, five, five]]
    for name, score in (("out/a", four), ("out/b", 0), ("b", 0)):
        results = json.loads((tmp_path / name / "submission/results.json").read_text())
        assert results["tests"][0]["score"] == score and "unet3d.py: taken" in results["output"]
    assert not (tmp_path / "victim").exists()


def test_exercise_15_has_points_only_when_all_files_are_handed_in(worker, right, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    scores = {}
    for missing in ("overfit.py", "vae.py"):  # overfit.py is not needed, its weights are graded
        (tmp_path / missing).unlink()
        tests = grade.grade(worker, right, tmp_path, [11, 15, 16])["tests"]
        scores[missing] = [test["score"] for test in tests]
    posterior, whole = EXERCISES[10].points, EXERCISES[14].points
    assert scores == {"overfit.py": [posterior, whole, 0], "vae.py": [0, 0, 0]}
    assert "vae.py not handed in" in tests[1]["output"]


def test_the_experiment_is_graded_by_its_loss(worker, right, tmp_path):
    (tmp_path / "overfit.pt").write_bytes(b"no weights")
    (test,) = grade.grade(worker, right, tmp_path, [16])["tests"]
    assert test["score"] == 0 and "raises" in test["output"]
    weights = MagicVideo.load(ROOT / "checkpoints/shapes.pt").unet.state_dict()
    torch.save(weights, tmp_path / "overfit.pt")
    (test,) = grade.grade(worker, right, tmp_path, [16])["tests"]
    assert test["score"] == 0 and "not reached, it is 0.0" in test["output"]


def test_the_bundle_for_gradescope_grades_by_itself(tmp_path):
    grade.main(["--gradescope", str(tmp_path / "out.zip"), "--only", "4"])
    with zipfile.ZipFile(tmp_path / "out.zip") as bundle:
        bundle.extractall(tmp_path / "source")
        modes = {info.filename: info.external_attr >> 16 for info in bundle.infolist()}
    assert modes["setup.sh"] == modes["run_autograder"] == 0o755
    assert "course/answers.md" not in modes
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission/unet3d.py").write_text(FILES["unet3d.py"])
    (tmp_path / "results").mkdir()
    script = (tmp_path / "source/run_autograder").read_text()
    script = script.replace("/autograder", str(tmp_path))
    script = script.replace("/opt/grade/bin/python", sys.executable)
    subprocess.run(["bash", "-e"], input=script, text=True, check=True)
    (test,) = json.loads((tmp_path / "results/results.json").read_text())["tests"]
    assert test["score"] == test["max_score"]


def test_results_that_may_not_be_written_stop_nobody(worker, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unet3d.py").write_text(FILES["unet3d.py"])
    (tmp_path / "one/results.json").mkdir()
    grade.main([str(tmp_path / "one"), str(tmp_path / "two"), "--only", "4"])
    assert "no results.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "two/results.json").read_text())["tests"][0]["score"] == EXERCISES[3].points
    assert len([*(tmp_path / "one").iterdir()]) == 2
