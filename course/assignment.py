"""Write a student's copy of this repository: `python -m course.assignment OUT` (ours).

The bodies of fourteen functions, in which the paper and diffusion itself live, become one line that
raises NotImplementedError; signature and docstring stay. Nothing in the code marks them: they are
found by name. The copy has EXERCISES.md, which says what to write, and `tests/test_exercises.py`,
the graders. Read `course/mistakes.py` next: what the graders catch.
"""

import argparse
import ast
import sys
from dataclasses import dataclass
from pathlib import Path

from data import InputError

ROOT = Path(__file__).parent.parent
# what a copy has; all other tests, course/ and lab/ stay here: they hold solutions
COPIED = ("*.py", "requirements*.txt", "pytest.ini", "README.md", "docs/**/*", "checkpoints/**/*",
          "tests/conftest.py", "tests/test_exercises.py")


@dataclass
class Exercise:
    """A function to write: its place, its source, and what a student reads beside its docstring."""

    file: str
    name: str
    source: str
    title: str
    task: str


EXERCISES = [
    Exercise("clip_text.py", "Tokenizer._merge", "paper §3, CLIP text encoder",
             "byte-pair encoding",
             "Begin with single characters, the last one with `</w>` appended. As long as "
             "neighbours are in `self._rank`, join the pair of the lowest rank. `join_pair`, above "
             "the class, joins one pair everywhere in a word and is yours to use. START and END "
             "are symbols of their own."),
    Exercise("clip_text.py", "Tokenizer.__call__", "paper §3, CLIP text encoder",
             "ids of a caption",
             "Truncate the caption's ids, not the end token; pad with the end token, as SD does."),
    Exercise("diffusion.py", "Diffusion.add_noise", "paper §3.2, loss", "noise of step t",
             "`self.alpha_bar(t)` is float64 and has the shape to multiply z0, whether t is (b,) "
             "or (b, f); `cast(factor, z0)` brings a factor to z0's type."),
    Exercise("unet3d.py", "FrameAdaptor.forward", "paper §3.2.1, adaptor",
             "a scale and a shift for each frame",
             "`self.scale` and `self.shift` are (f, c). Frames are the second axis of z, channels "
             "the third of (b, f, c, h, w) and the last of tokens (b, f, n, c). Raise ValueError "
             "for another number of frames."),
    Exercise("unet3d.py", "directed_attention", "paper §3.2.2, directed attention",
             "attention that never looks ahead",
             "Three masks. Where does each go: before the softmax, after it, nowhere? Rows are "
             "queries."),
    Exercise("unet3d.py", "DirectedTemporalAttention.forward", "paper §3.2.2, T-Attn",
             "one sequence of frames per pixel",
             "Norm over the channels, then a batch of b*h*w sequences of f tokens; heads by "
             "`split_heads` and `merge_heads`; back to (b, f, c, h, w). Mind which axes you "
             "reshape into which."),
    Exercise("unet3d.py", "sinusoid", "paper §3.2, FPS: Sin(v)", "a number as waves",
             "width/2 frequencies, 10000^(-k / (width/2)) for k = 0, 1, ...; cosines first."),
    Exercise("diffusion.py", "Diffusion.ddim_step", "paper §3, sampling", "a step of DDIM",
             "`self.alpha_bar` and `self.predict_z0_eps(z, output, t)` give what eq. 12 of Song et "
             "al. 2021 needs. Compute the three factors in float64, then `cast` them to z's type."),
    Exercise("diffusion.py", "Diffusion.ddpm_step", "paper §3, sampling", "a step of DDPM",
             "The posterior of Ho et al. 2020, eq. 7, for a stride from t to t_prev: beta is 1 "
             "minus the ratio of their alpha_bar, and after the last step alpha_bar is 1: "
             "`self.alpha_bar(t_prev, after_last=1.0)`."),
    Exercise("diffusion.py", "Diffusion.guided_output", "paper §3, sampling",
             "classifier-free guidance",
             "One call of the network for both halves of a batch, the unconditional half first; "
             "with guidance 1 one call with the text alone."),
    Exercise("vae.py", "VideoVAE.sample_latents", "paper §3, VideoVAE", "the reparametrisation",
             "Mean and log-variance to a sample, in the latents' scale."),
    Exercise("data.py", "sample_frames", "paper §3.2, FPS", "how a clip is cut",
             "A stride, a start, and what they make of the rate. Draw from `rng` in this order: "
             "the stride (unless fps is given), then the start."),
    Exercise("tiny.py", "EMA.update", "ours: the paper is silent", "a moving average that warms up",
             "Count the step, then move each average in `self.shadow` by 1 - decay towards its "
             "weight in `self.parameters`, in place. The decay of step n is (1 + n) / (10 + n), at "
             "most `self.decay`."),
    Exercise("unet3d.py", "Level.layer", "paper §3.2.2, ST block", "space and time side by side",
             "The resnet, then z_out = S-Attn(z) + T-Attn(z): both read the resnet's output, and "
             "the spatial transformer has its residual inside. Without `video` there are no "
             "adaptors and no T-Attn. Layers beyond `self.attentions` have no ST block."),
]


def find(source: str, exercise: Exercise) -> ast.FunctionDef:
    """Find the exercise's function in its file's text.

    Raises InputError if it is not there, or has no docstring: a student has nothing else to go by.
    """
    node = ast.parse(source)
    for part in exercise.name.split("."):
        named = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part]
        if not named:
            raise InputError(f"{exercise.file}: no {exercise.name} in it; correct EXERCISES in "
                             f"course/assignment.py")
        node = named[0]
    if ast.get_docstring(node) is None:
        raise InputError(f"{exercise.file}: {exercise.name} has no docstring; write one")
    return node


def blank(source: str, exercise: Exercise, number: int) -> str:
    """Replace a function's body behind its docstring by a line that names the exercise."""
    function = find(source, exercise)
    docstring = function.body[0]
    lines = source.splitlines(keepends=True)
    error = f'NotImplementedError("exercise {number}: {exercise.source}")'
    line = f'{" " * docstring.col_offset}raise {error}\n'
    return "".join([*lines[: docstring.end_lineno], line, *lines[function.end_lineno :]])


def sheet(numbers: list[int]) -> str:
    """Write EXERCISES.md: a section for each exercise."""
    text = ["# Exercises\n",
            "Each is the body of one function; its docstring and the paper say what it does. "
            "`python -m pytest -k exercise` grades all of them, and what a grader says names the "
            "property that broke.\n"]
    for number in numbers:
        exercise = EXERCISES[number - 1]
        function = find((ROOT / exercise.file).read_text("utf-8"), exercise)
        lines = sum(len(ast.unparse(node).splitlines()) for node in function.body[1:])
        title = exercise.title[0].upper() + exercise.title[1:]
        text += [f"## {number}. {title}\n",
                 f"`{exercise.file}`: `{exercise.name}` ({exercise.source}). About {lines} "
                 f"line{'s' * (lines > 1)}.\n",
                 f"{exercise.task}\n",
                 f"Grader: `python -m pytest -k exercise_{number:02d}`\n"]
    return "\n".join(text)


def build_copy(numbers: list[int]) -> dict[Path, bytes]:
    """Return the files of a student's copy by relative path, with blanks and EXERCISES.md."""
    files = {Path("EXERCISES.md"): sheet(numbers).encode()}
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_file():
                files[path.relative_to(ROOT)] = path.read_bytes()
    for number in numbers:
        exercise = EXERCISES[number - 1]
        file = Path(exercise.file)
        files[file] = blank(files[file].decode(), exercise, number).encode()
    return files


def exercise_numbers(only: str) -> list[int]:
    """Parse --only: "4,5" -> [4, 5]. Raises InputError for what is no exercise."""
    parts = [part.strip() for part in only.split(",")]
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= len(EXERCISES):
            raise InputError(f"--only {only}: {part or 'nothing'} is no exercise; give numbers "
                             f"from 1 to {len(EXERCISES)}, commas between")
    return sorted({int(part) for part in parts})


def main(arguments: list[str] | None = None) -> None:
    """Write the copy into a new or empty folder. InputError for what cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m course.assignment",
        description="Writes a student's copy of this repository, with exercises.")
    parser.add_argument("out", metavar="OUT", help="folder of the copy, new or empty")
    parser.add_argument("--only", metavar="4,5", help="numbers of exercises (default: all)",
                        default=",".join(str(n + 1) for n in range(len(EXERCISES))))
    flags = parser.parse_args(arguments)
    numbers = exercise_numbers(flags.only)
    out = Path(flags.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; name a new or empty folder")
    files = build_copy(numbers)
    try:
        for name, contents in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(contents)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); name another "
                         f"folder") from error
    print(f"{out}: {len(numbers)} exercise{'s' * (len(numbers) > 1)}, read EXERCISES.md there")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"course.assignment: {error}", file=sys.stderr)
        sys.exit(2)
