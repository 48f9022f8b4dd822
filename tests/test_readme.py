"""The README keeps its word: every name in its map exists, every file and flag that it names is there."""

import ast
import importlib
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BOTH = README + (ROOT / "docs" / "measurements.md").read_text("utf-8")
NAMES = sorted(set(re.findall(r"`(\w+)\.py: ([\w.]+)`", README)))
COMMANDS = re.findall(r"^(?:python|torchrun) .*$", README, re.MULTILINE)


def test_the_map_is_there():
    assert len(NAMES) > 15 and len(COMMANDS) > 5


@pytest.mark.parametrize("row", re.findall(r"^\| (.*\.py: .*) \|$", README, re.MULTILINE))
def test_the_way_back_every_name_in_the_map_cites_its_place_in_the_paper(row):
    place, names = row.split(",", 1)[0], re.findall(r"`(\w+)\.py: ([\w.]+)`", row)
    assert names
    for module, name in names:
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
        assert re.search(rf"paper.*{place}(?![.\d])", " ".join(thing.__doc__.split()), re.IGNORECASE), name


@pytest.mark.parametrize("module, name", NAMES)
def test_every_name_in_the_map_exists(module, name):
    thing = importlib.import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)
    assert thing.__doc__


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_every_picture_and_link_leads_to_a_file(link):
    assert (ROOT / link).is_file()


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`([\w/-]+\.(?:py|txt|md|json))`", BOTH))))
def test_every_file_that_is_named_exists(file):
    examples = ("metadata.json", "NAME.txt", "EXERCISES.md")
    assert file in examples or (ROOT / file).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_in_a_command_is_one_of_its_script(command):
    if command.startswith("python -m"):
        return
    script = re.search(r"[\w/]+\.py", command)[0]
    command = command.split(script, 1)[1]  # before it are torchrun's own flags
    source = (ROOT / {"train.py": "settings.py"}.get(script, script)).read_text("utf-8")  # where its flags are made
    flags = {"--" + f.name.replace("_", "-") for f in fields(train.Settings)} if script == "train.py" else set()
    for flag in re.findall(r"(?<=\s)--[\w-]+", command):
        assert flag in flags or f'add_argument("{flag}"' in source


def test_the_package_lists_hold_what_the_code_imports():
    listed = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-extra.txt").read_text()
    names = {re.split(r"[<>=\s#]", line)[0] for line in listed.splitlines() if line and line[0] != "#"}
    imported = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    peers = {"diffusers", "video_diffusion_pytorch"}  # which benchmark.py compares with where they are installed
    foreign = imported - set(sys.stdlib_module_names) - {path.stem for path in ROOT.glob("*.py")} - peers
    assert {"PIL" if name == "pillow" else name for name in names} >= foreign
