"""What the commands of lab share: flags in range, numbers on file, mistakes in one line (ours)."""

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from data import InputError


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a mistake of the user's ends it with one line and exit status 2."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"lab.{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


def check_ranges(flags: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """Raise InputError that names the first flag outside its (lowest, highest)."""
    for name, (low, high) in ranges.items():
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: give a number from {low:g} to "
                             f"{high:g}")


def write_results(path: str | Path, flags: argparse.Namespace, found: dict) -> None:
    """Write `found` as JSON, with the command and the code that it came from; NaN becomes null."""
    command = shlex.join(["python", "-m", f"lab.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    results = {"command": command, "commit": commit(), "date": date, "flags": vars(flags), **found}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
    print(f"numbers: {path}")


def finite(value):
    """Replace every NaN and infinity in nested dicts and lists by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit() -> str | None:
    """Return the commit of this code, "-dirty" if files have changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return None
