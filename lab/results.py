"""What the commands of lab share: flags, tables, numbers on file, mistakes in one line (ours)."""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
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
        if not low <= getattr(flags, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} {getattr(flags, name)}: give a number "
                             f"from {low:g} to {high:g}")


def print_table(rows: list[dict]) -> None:
    """Print rows of the same keys under these, numbers on the right of their columns."""
    table = [[str(key) for key in row] for row in rows[:1]]
    for row in rows:
        formats = {float: "{:,.3f}", int: "{:,}"}
        table.append([formats.get(type(value), "{}").format(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *cells in table:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


def write_results(path: Path, flags: argparse.Namespace, found: dict) -> None:
    """Write numbers as JSON, with the flags and the commit of the code; NaN becomes null."""
    results = {"flags": vars(flags), "commit": commit(), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
    print(f"numbers: {path}")


def finite(value):
    """Replace every NaN and infinity in nested dicts and lists by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit() -> str | None:
    """Return the commit of this code, "-dirty" if files have changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None
