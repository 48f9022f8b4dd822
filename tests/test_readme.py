"""The README keeps its word: names, files, flags and links in it are there."""

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


def thing(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_the_map_is_there():
    assert len(NAMES) > 15 and len(COMMANDS) > 5


@pytest.mark.parametrize("module, name", NAMES)
def test_every_name_in_the_map_exists_and_cites_the_paper(module, name):
    assert re.search(r"paper|§3", thing(module, name).__doc__)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_every_picture_and_link_leads_to_a_file(link):
    assert (ROOT / link).is_file()


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`([\w/-]+\.(?:py|txt|md))`", DOCS))))
def test_every_file_that_is_named_exists(file):
    assert file in ("NAME.txt", "EXERCISES.md", "clips/held_out.txt") or (ROOT / file).is_file()


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
