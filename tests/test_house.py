"""The house keeps its order: who imports whom, and settings that are read."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {path: ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.glob("*.py"))}

def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_root_files_import_neither_lab_nor_course_nor_at_their_head_what_is_optional():
    packages = {"torch", "numpy", "tqdm", "PIL", "ftfy", "regex"}  # of requirements.txt
    packages |= {*sys.stdlib_module_names, *(path.stem for path in SOURCES)}
    for path, tree in SOURCES.items():
        everywhere = {*imports(ast.walk(tree))}
        assert not everywhere & {"lab", "course", "tests"}, path
        assert everywhere <= packages | {"av", "matplotlib", "safetensors"}, path
        assert {*imports(tree.body)} <= packages, path


def test_imports_go_down_without_a_circle_and_the_demo_is_nobodys_ground():
    below = {path.stem: {*imports(ast.walk(tree))} & {p.stem for p in SOURCES}
             for path, tree in SOURCES.items()}
    assert not any("sample" in names or "train" in names for names in below.values())
    while below:
        free = [name for name, names in below.items() if not names & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        below = {name: names for name, names in below.items() if name not in free}


def test_train_asks_no_stage_for_its_name():
    names = {"vae", "image", "video", "interpolate", "upscale"}
    compared = [part.value for node in ast.walk(SOURCES[ROOT / "train.py"])
                if isinstance(node, ast.Compare) for part in ast.walk(node)
                if isinstance(part, ast.Constant)]
    assert compared and not names & {*compared}


def test_every_field_of_every_config_is_read_somewhere():
    nodes = [node for tree in SOURCES.values() for node in ast.walk(tree)]
    read = {node.attr for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    configs = [node for node in nodes if isinstance(node, ast.ClassDef)
               and any(getattr(d, "id", "") == "dataclass" for d in node.decorator_list)]
    assert len(configs) >= 6
    for config in configs:
        names = {line.target.id for line in config.body if isinstance(line, ast.AnnAssign)}
        if config.name == "Settings":  # getattr(s, f"{stage}_steps") reads these
            names = {name for name in names if not name.endswith("_steps")}
        assert names <= read, config.name
