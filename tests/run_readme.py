"""Runs every command of the README, as it is written there, in a fresh copy: `python tests/run_readme.py`.

Trainings and measures are cut short by more flags behind the command, unless --whole asks for hours. What the README
takes for granted is made first: a folder `clips`, a list `prompts.txt`, and a Stable Diffusion folder, random weights.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from data import ShapesDataset, write_clip
from test_stable_diffusion import small_pipeline

ROOT = Path(__file__).parent.parent
SHORT = {
    "train.py": "--vae-steps 2 --image-steps 2 --video-steps 2 --interpolate-steps 2 --upscale-steps 2 --batch-size 1 "
                "--vae-batch-size 16 --cache 8",
    "sample.py": "--steps 2 --interpolate-steps 2 --upscale-steps 1",
    "evaluate.py": "--steps 2 --seeds 1 --clips 4",
    "ablation.py": "--seeds 1 --image-steps 2 --video-steps 2 --cache 8",
    "benchmark.py": "--rounds 1",
    "tests/kill_runs.py": "--kills 2",
    "tests/fuzz_readers.py": "--inputs 100",
    "pytest": "--collect-only -q",
}


def shortened(command: str) -> str:
    """A command with the flags of SHORT behind it, and two processes instead of eight."""
    script = next((script for script in SHORT if re.search(rf"(^| ){script}( |$)", command)), None)
    if script is None or "--resume" in command or "--check-data" in command:
        return command
    return f"{command} {SHORT[script]}".replace("--nproc-per-node 8", "--nproc-per-node 2")


def prepare(folder: Path) -> None:
    """What the README's reader has: the repository, clips with captions, prompts, Stable Diffusion."""
    shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "__pycache__", ".git"))
    (folder / "clips").mkdir()
    dataset = ShapesDataset("train", 24, 64)
    clips = [dataset[i] for i in range(4)]
    for i, clip in enumerate(clips):
        write_clip(folder / "clips" / f"{i}.gif", clip["video"], 8)
    lines = [json.dumps({"file_name": f"{i}.gif", "text": clip["caption"]}) for i, clip in enumerate(clips)]
    (folder / "clips" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    small_pipeline().save_pretrained(folder / "stable-diffusion-v1-5")


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the README's commands.")
    parser.add_argument("--whole", action="store_true", help="as they are: hours")
    parser.add_argument("--only", default="", help="commands with these words in them, and no others")
    flags, failed = parser.parse_args(), 0
    commands = [line for block in re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
                for line in block.splitlines() if flags.only in line]
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        bin = str(Path(sys.executable).parent)
        for command in commands:
            if command.startswith("pip") or re.search("run_readme|mutate", command):
                continue  # the packages of the environment that runs this; this script; one that needs another package
            started, run = time.time(), command if flags.whole else shortened(command)
            done = subprocess.run(f'export PATH="{bin}:$PATH"; {run}', shell=True, cwd=name, capture_output=True,
                                  text=True)
            failed += done.returncode != 0
            said = "FAILED" if done.returncode else "ok    "
            print(f"{said} {time.time() - started:6.0f} s  {command}", flush=True)
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    print(f"{failed} commands failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
