"""The README keeps its word: names, files, flags, links and the reading path in it are there."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import sample
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCS = README + "".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))
NAMES = sorted(set(re.findall(r"`(\w+)\.py: ([\w.]+)`", README)))
COMMANDS = re.findall(r"^(?:python|torchrun) .*$", README, re.MULTILINE)
PATH = re.findall(r"^\| \d+ \| `(\w+\.py)` \|", README, re.MULTILINE)
MINUTES = re.findall(r"^\| (\d+) \| `", README, re.MULTILINE)
FILES = README.partition("## The files")[2].partition("##")[0]
TREE = re.findall(r"^([\w.]+/?) {2,}\S", FILES, re.MULTILINE)


def thing(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_map_the_tree_and_the_reading_path_are_there():
    assert len(NAMES) > 15 and len(COMMANDS) > 5 and len(TREE) > 15 and len(PATH) > 5


@pytest.mark.parametrize("name", TREE)
def test_everything_in_the_tree_exists(name):
    assert (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file()


def test_every_file_of_code_at_the_root_is_in_the_tree():
    assert {path.name for path in ROOT.glob("*.py")} <= {*TREE}


@pytest.mark.parametrize("file, following", [*zip(PATH, PATH[1:])])
def test_each_file_of_the_reading_path_names_the_next(file, following):
    head = ast.get_docstring(ast.parse((ROOT / file).read_text("utf-8")))
    assert re.findall(r"Read `(\w+\.py)` next", " ".join(head.split())) == [following]


def test_the_minutes_of_the_reading_path_add_up():
    assert "## Read it in two hours" in README
    assert sum(map(int, MINUTES)) == 120


@pytest.mark.parametrize("module, name", NAMES)
def test_every_name_in_the_map_exists_and_cites_the_paper(module, name):
    assert re.search(r"paper|§3", thing(module, name).__doc__)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_every_picture_and_link_leads_to_a_file(link):
    assert (ROOT / link).is_file()


def test_every_link_within_the_page_leads_to_a_heading():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert {*re.findall(r"\]\(#([^)]+)\)", README)} <= anchors


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`([\w/-]+\.(?:py|txt|md))`", DOCS))))
def test_every_file_that_is_named_exists(file):
    examples = ("unet3d-1.py", "Name_123_456_unet3d.py", "NAME.txt", "EXERCISES.md",
                "clips/held_out.txt", "combinations.txt", "standing_still.txt")
    assert file in examples or (ROOT / file).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    words = shlex.split(command)
    if "train.py" in words:
        train.read_flags([w for w in words[words.index("train.py") + 1 :] if w != "..."])
    elif "sample.py" in words:
        sample.read_flags(words[words.index("sample.py") + 1 :])
    elif words[2] != "pytest":
        assert words[1] == "-m" and (ROOT / f"{words[2].replace('.', '/')}.py").is_file()


def test_the_package_lists_hold_what_the_root_imports():
    listed = "".join((ROOT / f"requirements{kind}.txt").read_text() for kind in ("", "-extra"))
    names = {re.split(r"[<>=\s#]", line)[0] for line in listed.splitlines()}
    imported = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {path.stem for path in ROOT.glob("*.py")}
    assert {"PIL" if name == "pillow" else name for name in names} >= foreign
