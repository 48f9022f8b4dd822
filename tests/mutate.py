"""Would the tests notice? Small changes, one at a time, to the five model files of a copy: `python tests/mutate.py`.

cosmic-ray (`pip install cosmic-ray`) makes the changes: a number by one, plus for minus, an `and` for an `or`, a loop
that is not entered. A sample of each file's is drawn; a change that no test of FILES notices is tried with the whole
suite by `--whole`. What stays unnoticed is printed: a hole in the tests, or no change of what the program does.
"""

import argparse
import difflib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# the tests that know a file, those that fail soonest first
FILES = {
    "unet3d.py": ["unet3d", "exercises", "cascade", "benchmark", "magicvideo", "stable_diffusion"],
    "diffusion.py": ["diffusion", "exercises", "cascade", "magicvideo", "stable_diffusion"],
    "vae.py": ["vae", "exercises", "magicvideo", "stable_diffusion", "train"],
    "clip_text.py": ["clip_text", "exercises", "magicvideo", "stable_diffusion"],
    "magicvideo.py": ["magicvideo", "stable_diffusion", "cascade", "sample", "benchmark", "train"],
}
# one kind of change for each thing that can be changed: the other 20 replacements of a "+" are no harder to notice
KINDS = ("NumberReplacer", "AddNot", "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Mul", "Mod_Add",
         "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "In_NotIn", "NotIn_In", "Is_IsNot", "IsNot_Is",
         "ZeroIterationForLoop", "AndWithOr", "OrWithAnd", "TrueWithFalse", "FalseWithTrue", "Delete_USub",
         "Delete_Not", "RemoveDecorator", "BreakWithContinue", "ContinueWithBreak", "ExceptionReplacer")


def changes(folder: Path) -> list[tuple[str, str, int]]:
    """All changes that cosmic-ray knows for the five files: (file, operator, which of its places)."""
    (folder / "cr.toml").write_text(f'[cosmic-ray]\nmodule-path = {json.dumps(list(FILES))}\ntimeout = 1\n'
                                    'test-command = "false"\nexcluded-modules = []\n'
                                    '[cosmic-ray.distributor]\nname = "local"\n')
    subprocess.run([sys.executable, "-m", "cosmic_ray.cli", "init", "cr.toml", "cr.sqlite"], cwd=folder, check=True)
    rows = sqlite3.connect(folder / "cr.sqlite").execute(
        "SELECT module_path, operator_name, occurrence FROM mutation_specs ORDER BY 1, 2, 3").fetchall()
    return [row for row in rows if row[1].endswith(KINDS)]


def noticed(folder: Path, tests: list[str], seconds: int) -> bool:
    """Whether a test fails, or hangs."""
    try:
        return subprocess.run([sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
                              cwd=folder, capture_output=True, timeout=seconds).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description="A mutation run over a sample of changes.")
    parser.add_argument("--each", type=int, default=30, help="changes of every file")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--whole", action="store_true", help="try what was not noticed with the whole suite too")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "__pycache__", ".git"))
        every, draw, counts = changes(folder), random.Random(flags.seed), {}
        for file, tests in FILES.items():
            known = [f"tests/test_{test}.py" for test in tests]
            assert not noticed(folder, known, 1800), f"{file}: its tests fail before any change"
            of_file = [row for row in every if row[0] == file]
            source, caught = (folder / file).read_text("utf-8"), 0
            sample = draw.sample(of_file, min(flags.each, len(of_file)))
            for _, operator, place in sample:
                subprocess.run([sys.executable, "-m", "cosmic_ray.cli", "apply", file, operator, str(place)],
                               cwd=folder, check=True)
                mutant = (folder / file).read_text("utf-8")
                found = noticed(folder, known, 900) or flags.whole and noticed(folder, [], 3600)
                caught += found
                if not found:
                    print("", *difflib.unified_diff(source.splitlines(), mutant.splitlines(), file, operator, n=0,
                                                    lineterm=""), sep="\n")
                (folder / file).write_text(source, "utf-8")
                print("." if found else "not noticed", end="" if found else "\n", flush=True)
            counts[file] = (caught, len(sample))
            print(f"\n{file}: {caught} of {len(sample)} noticed, drawn from {len(of_file)}", flush=True)
    caught, total = (sum(x) for x in zip(*counts.values()))
    print(f"all: {caught} of {total}, {caught / total:.1%}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
