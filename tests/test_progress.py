"""What a training leaves for a person to look at: the log, the loss by band of t, the curves, the samples."""

import builtins
import csv

import pytest
import torch

import progress
from data import read_clip


def test_the_loss_is_kept_by_band_of_t_and_a_band_without_frames_is_empty():
    errors, t = torch.tensor([[1.0, 3.0], [5.0, 100.0]]), torch.tensor([[0, 249], [250, -1]])
    assert progress.by_band(errors, t, 1000) == [2, 5, None, None]
    errors, t = torch.arange(1000.0), torch.arange(1000)
    assert progress.by_band(errors, t, 1000) == [124.5, 374.5, 624.5, 874.5]


def test_the_bands_of_parts_are_averaged_and_a_band_that_no_part_has_stays_empty():
    assert progress.mean_bands([[1.0, None, 3.0, None], [2.0, 5.0, 4.0, None]]) == [1.5, 5.0, 3.5, None]
    assert progress.mean_bands([[]]) == []


def test_the_log_is_a_table_with_one_line_a_step(tmp_path):
    path = tmp_path / "new" / "log.csv"
    progress.log(path, "vae", 1, 0.5, 1e-3, 2.0)
    progress.log(path, "image", 1, 0.25, 1e-3, 2.0, [0.1, None, 0.3, 0.4])
    rows = list(csv.DictReader(open(path)))
    assert [row["stage"] for row in rows] == ["vae", "image"] and float(rows[1]["loss"]) == 0.25
    assert [rows[1][f"loss_band_{i}"] for i in range(4)] == ["0.100000", "", "0.300000", "0.400000"]
    assert not rows[0]["loss_band_0"]


def test_smoothing_keeps_the_mean_and_no_more_than_100_points():
    points = [(i, 2.0 * i) for i in range(1000)]
    smooth = progress.smoothed(points)
    assert len(smooth) == 100 and smooth[0] == (4.5, 9.0)
    assert progress.smoothed(points[:7]) == points[:7]


def write_log(path):
    for step in range(40):
        progress.log(path, "vae", step, 1 / (step + 1), 1e-3, 0)
    for step in range(300):
        progress.log(path, "video", step, 1 / (step + 1), 1e-3, 0, [0.1, 0.2, None, 0.4])


def test_curves_show_every_stage(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    write_log(tmp_path / "log.csv")
    assert progress.curves(tmp_path / "log.csv", tmp_path / "loss.png")
    frames, _ = read_clip(tmp_path / "loss.png")
    assert frames.shape == (1, 600, 1000, 3) and frames.std() > 10
    assert {p.name for p in tmp_path.iterdir()} == {"log.csv", "loss.png"}


def test_without_matplotlib_no_curves_are_drawn_and_nothing_fails(tmp_path, monkeypatch):
    write_log(tmp_path / "log.csv")
    real = builtins.__import__

    def missing(name, *arguments, **words):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **words)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert not progress.curves(tmp_path / "log.csv", tmp_path / "loss.png")
    assert {p.name for p in tmp_path.iterdir()} == {"log.csv"}
