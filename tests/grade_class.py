"""Grades a class of 30 as its instructor would: `python tests/grade_class.py`.

25 submissions are right but for the mistakes of one to four exercises, or in an unusual way; five
are hostile. Their points must be what their files deserve, and no hostile one may harm the next.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from course import grade, mistakes  # noqa: E402
from course.assignment import EXERCISES, EXPERIMENT, build_copy, split  # noqa: E402
from test_assignment import CHEATS  # noqa: E402

HOSTILE = ("imports the instructor's file", "kills", "says that all is done", "takes all memory",
           "sends without end")


def replace(files: dict[Path, bytes], number: int, *texts: str) -> None:
    """Change an exercise's function in a student's files as `mistakes.change` does."""
    exercise = EXERCISES[number - 1]
    path = Path(exercise.file)
    _, body, _ = split(mistakes.change(number, *texts)[path].decode(), exercise)
    before, _, after = split(files[path].decode(), exercise)
    files[path] = f"{before}{body}{after}".encode()


def hand_in(folder: Path, rng: random.Random, hostile: str = "") -> set[int]:
    """Write a submission into a folder -> the exercises that are wrong in it."""
    names = {Path(e.file) for e in EXERCISES if e.file} - {Path(EXPERIMENT)}
    files = {path: text for path, text in build_copy([]).items() if path in names}
    wrong = set()
    if hostile:
        cheat = CHEATS[hostile].replace("{out}", str(folder.parent))
        files[Path("unet3d.py")] = build_copy([4])[Path("unet3d.py")] + f"\n{cheat}\n".encode()
        # a file whose import does not come back is worth nothing
        wrong = {n + 1 for n, e in enumerate(EXERCISES) if e.file in ("unet3d.py", None)}
    else:
        for number in rng.sample(range(1, 15), rng.randint(1, 4)):
            is_right = rng.random() < 0.25
            known = [texts for n, _, *texts in
                     (mistakes.ANOTHER_WAY if is_right else mistakes.MISTAKES) if n == number]
            replace(files, number, *rng.choice(known))
            wrong |= set() if is_right else {number}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text)
    return wrong


def main() -> None:
    """Grade the class and print where points are not what they should be; status 1 if any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the class (0)")
    seed = parser.parse_args().seed
    rng = random.Random(seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        wrong = {}
        for i in range(30):
            hostile = HOSTILE[i // 6] if i % 6 == 3 else ""
            place = Path(folder) / f"student-{i:02d}{'-hostile' * bool(hostile)}"
            wrong[place] = hand_in(place, rng, hostile)
        began = time.monotonic()
        grade.main([*map(str, wrong)])
        seconds = time.monotonic() - began
        for place, numbers in wrong.items():
            tests = json.loads((place / "results.json").read_text())["tests"]
            for number, (exercise, test) in enumerate(zip(EXERCISES, tests), 1):
                if exercise.file == EXPERIMENT or (exercise.file is None and numbers):
                    continue  # no weights are handed in; the pipeline may survive a mistake
                full = test["score"] == test["max_score"]
                if full == (number in numbers) and not (
                        "hostile" in place.name and number != 4 and full):
                    failed += 1
                    print(f"{place.name}, exercise {number}: {test['score']} of "
                          f"{test['max_score']}: {test['output']}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"seed {seed}: {failed} marks are wrong; {(used.ru_utime + used.ru_stime) / 30:.1f} s of "
          f"processor time a submission, {seconds:.0f} s in all")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
