"""A short version of the script that damages files (the long one: docs/measurements.md)."""

from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited as on Linux")
def test_damaged_files_are_read_or_refused_in_one_line(capsys):
    pytest.importorskip("av", reason="reading .mp4 needs av")
    import fuzz_readers

    wrong = fuzz_readers.main(["--inputs", "260", "--seed", "1"])
    said = capsys.readouterr()
    assert wrong == 0 and "260 inputs, 0 went wrong" in said.out, said.err
