"""Cuts a student's copy out of this repository: `python assignment.py OUT` (ours).

The bodies of thirteen functions, those in which the paper and diffusion itself live, become one line that raises
NotImplementedError; signature and docstring stay. Nothing in the code marks them: they are found by name. The copy has
EXERCISES.md, which says what to write and how each is graded, and the graders, `tests/test_exercises.py`.
"""

import argparse
import ast
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from data import InputError

ROOT = Path(__file__).parent


@dataclass
class Exercise:
    """A function to write: where it is, what the paper calls it, what a student is told beyond its docstring."""

    file: str
    name: str
    paper: str
    title: str
    task: str


EXERCISES = [
    Exercise("clip_text.py", "Tokenizer._merge", "§3, CLIP text encoder", "byte-pair encoding",
             "Begin with single characters, the last one with `</w>` behind it. Again and again, of all neighbours "
             "that are in `self._rank`, join those with the lowest rank, the leftmost first. A loop that looks through "
             "the whole word each time is enough. START and END are symbols of their own."),
    Exercise("clip_text.py", "Tokenizer.__call__", "§3, CLIP text encoder", "ids of a caption",
             "Cut the caption's ids, not the end token, and fill up with the end token, as Stable Diffusion does."),
    Exercise("diffusion.py", "Diffusion.add_noise", "§3.2, loss", "noise of step t",
             "One line with what `self.coefficients(t, z0)` returns."),
    Exercise("unet3d.py", "FrameAdaptor.forward", "§3.2.1, adaptor", "a scale and a shift for each frame",
             "`self.scale` and `self.shift` are (f, c). Frames are the second axis of z, channels the third of "
             "(b, f, c, h, w) and the last of tokens (b, f, n, c). Refuse another number of frames by ValueError."),
    Exercise("unet3d.py", "directed_attention", "§3.2.2, directed attention", "attention that never looks ahead",
             "Three masks. Where does each go: before the softmax, after it, nowhere? Rows are queries."),
    Exercise("unet3d.py", "DirectedTemporalAttention.forward", "§3.2.2, T-Attn", "one sequence of frames per pixel",
             "Norm over the channels, then a batch of b*h*w sequences of f tokens; heads by `split_heads` and "
             "`merge_heads`; back to (b, f, c, h, w). Mind which axes you reshape into which."),
    Exercise("unet3d.py", "sinusoid", "§3.2, FPS: Sin(v)", "a number as waves",
             "width/2 frequencies, 10000^(-k / (width/2)) for k = 0, 1, ...; cosines first."),
    Exercise("diffusion.py", "Diffusion.ddim_step", "§3, sampling", "a step of DDIM",
             "`self.alpha_bar(t, z)` and `self.split(z, output, t)` give what eq. 12 of Song et al. 2021 needs. "
             "Compute in float64 and bring the three factors to z's type."),
    Exercise("diffusion.py", "Diffusion.ddpm_step", "§3, sampling", "a step of DDPM",
             "The posterior of Ho et al. 2020, eq. 7, for a stride from t to `previous`: beta is 1 minus the ratio of "
             "their alpha_bar, and `done=1.0` is alpha_bar once a frame is clean."),
    Exercise("diffusion.py", "Diffusion.guided", "§3, sampling", "classifier-free guidance",
             "One call of the network for both halves, the unconditional first. Then `guidance_power`, and "
             "`guidance_rescale` (Lin et al. 2023, section 3.4), where the configuration has them."),
    Exercise("vae.py", "VideoVAE.sample_latents", "§3, VideoVAE", "the reparametrisation",
             "Mean and log-variance to a sample, in the latents' scale."),
    Exercise("data.py", "sample_frames", "§3.2, FPS", "how a clip is cut",
             "A stride, a start, and what they make of the rate. Draw from `rng` in this order: the stride (unless fps "
             "is given), then the start."),
    Exercise("optim.py", "MovingAverage.update", "is silent", "a moving average that warms up",
             "Count the step, then move each average by 1 - decay towards its weight, without gradients and in place."),
]


def find(source: str, name: str) -> ast.FunctionDef:
    """The function "name" or "Class.name" in a file's text."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part)
    return node


def body_lines(source: str, name: str) -> tuple[int, int]:
    """First and last line of a function's body behind its docstring, which every exercise has, counted from 1."""
    _, *statements = find(source, name).body
    return statements[0].lineno, statements[-1].end_lineno


def blank(source: str, exercise: Exercise, number: int) -> str:
    """A file's text with one body, and the comments before it, replaced by a line that says which exercise it is."""
    lines, docstring = source.splitlines(keepends=True), find(source, exercise.name).body[0]
    says = f'raise NotImplementedError("exercise {number}, paper {exercise.paper}: {exercise.title}")'
    _, last = body_lines(source, exercise.name)
    return "".join([*lines[: docstring.end_lineno], " " * docstring.col_offset, says, "\n", *lines[last:]])


def sheet(numbers: list[int]) -> str:
    """EXERCISES.md: a section for each exercise."""
    text = ["# Exercises\n", "Each is the body of one function; its docstring and the paper say what it does. "
            "`python -m pytest -k exercise` grades all of them, and what a grader says names the property that "
            "broke.\n"]
    for n in numbers:
        e = EXERCISES[n - 1]
        source = (ROOT / e.file).read_text("utf-8")
        first, last = body_lines(source, e.name)
        lines = sum(bool(line.strip()) and line.strip()[0] != "#" for line in source.splitlines()[first - 1 : last])
        text.append(f"## {n}. {e.title[0].upper()}{e.title[1:]}\n\n`{e.file}`: `{e.name}`. Paper: {e.paper}. About "
                    f"{lines} line{'s' * (lines > 1)}.\n\n{e.task}\n\nGrader: `python -m pytest -k exercise_{n:02d}`\n")
    return "\n".join(text)


def write_copy(out: Path, numbers: list[int]) -> None:
    """The repository without solutions: code with blanks, tests, what is installed, what is shown."""
    names = [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "pytest.ini", ROOT / "README.md"]
    for path in names:
        if path.name == Path(__file__).name:
            continue
        source = path.read_text("utf-8")
        # from the last to the first in a file, so that lines keep their numbers
        for n in sorted(numbers, reverse=True):
            if EXERCISES[n - 1].file == path.name:
                source = blank(source, EXERCISES[n - 1], n)
        (out / path.name).write_text(source, "utf-8")
    for folder in ("tests", "docs", "checkpoints"):
        shutil.copytree(ROOT / folder, out / folder, ignore=shutil.ignore_patterns(
            "__pycache__", "mistakes.py", "test_planted.py", "test_assignment.py", "test_readme.py"))
    (out / "EXERCISES.md").write_text(sheet(numbers), "utf-8")


def chosen(only: str | None) -> list[int]:
    """ "4,5" -> [4, 5]; all without it. Raises InputError for what is no number of an exercise."""
    parts = only.split(",") if only else [str(n) for n in range(1, len(EXERCISES) + 1)]
    for part in parts:
        if not part.strip().isdecimal() or not 1 <= int(part) <= len(EXERCISES):
            raise InputError(f"--only {only}: {part.strip() or 'nothing'} is no exercise; give numbers from 1 to "
                             f"{len(EXERCISES)}, commas between")
    return sorted({int(part) for part in parts})


def main(arguments: list[str] | None = None) -> None:
    """Writes the copy into a new or empty folder."""
    parser = argparse.ArgumentParser(description="Writes a student's copy of this repository, with exercises.")
    parser.add_argument("out", metavar="OUT", help="folder of the copy, new or empty")
    parser.add_argument("--only", metavar="4,5", help="numbers of exercises (default: all)")
    flags = parser.parse_args(arguments)
    numbers, out = chosen(flags.only), Path(flags.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; name a new or empty folder")
    if out.resolve().is_relative_to(ROOT.resolve() / "tests"):
        raise InputError(f"{out}: is in what is copied; name a folder elsewhere")
    out.mkdir(parents=True, exist_ok=True)
    write_copy(out, numbers)
    print(f"{out}: {len(numbers)} exercise{'s' * (len(numbers) > 1)}, read EXERCISES.md there")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"assignment.py: {error}", file=sys.stderr)
        sys.exit(2)
