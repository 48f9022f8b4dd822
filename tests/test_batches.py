"""What a step of training sees."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import batches
import data
from conftest import randn
from data import ClipFolder, InputError, ShapesDataset
from magicvideo import MagicVideo


def test_every_item_is_seen_once_an_epoch_in_a_new_order():
    seen = [pair for step in range(6) for pair in batches.indices(10, 5, step, seed=0, stage=1)]
    epochs = [[i for epoch, i in seen if epoch == n] for n in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_item_is_seen_once_an_epoch_whatever_the_number_of_ranks(ranks, monkeypatch):
    seen = []
    monkeypatch.setattr(batches, "world", lambda: ranks)
    for step in range(4):
        for rank in range(ranks):
            monkeypatch.setattr(batches, "rank", lambda: rank)
            seen += batches.share(batches.indices(12 * ranks, 3 * ranks, step, seed=0, stage=1))
    assert sorted(i for _, (_, i) in seen) == list(range(12 * ranks))
    assert sorted(place for place, _ in seen) == sorted([*range(3 * ranks)] * 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_change_neither_order_nor_items(workers):
    clips, wanted = ShapesDataset("train", 2, 16), [[(0, (0, 5)), (1, (3, 2))], [(0, (1, 5))]]
    got = list(batches.read(clips, wanted, workers))
    assert [[place for place, _ in items] for items in got] == [[0, 1], [0]]
    for (epoch, i), item in zip([(0, 5), (3, 2), (1, 5)], [item for items in got for _, item in items]):
        clips.set_epoch(epoch)
        assert torch.equal(clips[i]["video"], item["video"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_that_proves_damaged_while_training_is_named(workers, tmp_path):
    for name in "ab":
        data.write_clip(tmp_path / f"{name}.gif", randn(4, 3, 8, 8).clamp(-1, 1).float(), 8)
    clips = ClipFolder(tmp_path, frames=4, size=8)
    (tmp_path / "b.gif").write_bytes((tmp_path / "b.gif").read_bytes()[:100])
    reader = batches.read(clips, [[(0, (0, 0))], [(0, (0, 1))]], workers)
    assert len(next(reader)) == 1
    with pytest.raises(InputError) as error:
        next(reader)
    assert "b.gif: cannot be read" in str(error.value) and "\n" not in str(error.value)


def test_readers_end_with_the_program():
    code = f"""
import sys
sys.path.insert(0, {str(Path(batches.__file__).parent)!r})
import batches
from data import ShapesDataset
reader = batches.read(ShapesDataset("train", 2, 16), ([(0, (0, i))] for i in range(100_000)), 2)
next(reader)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MagicVideo.from_preset("tiny").eval()


def test_latents_on_disk_are_taken_if_all_that_they_depend_on_is_the_same(model, tmp_path, monkeypatch):
    path, clips = tmp_path / "latents.pt", ShapesDataset("train", 8, 64)
    first = batches.Latents(model, clips, 3, path)
    encode, calls = batches.encode, []
    monkeypatch.setattr(batches, "encode", lambda *arguments: calls.append(1) or encode(*arguments))
    again = batches.Latents(model, clips, 3, path)
    assert not calls and len(again) == 3
    assert all(torch.equal(first[i]["mean"], again[i]["mean"]) and first[i]["fps"] == again[i]["fps"] for i in range(3))
    other = ShapesDataset("train", 8, 64, seed=1)
    for model_, clips_, count in ((model, clips, 2), (model, other, 3), (shifted(model), clips, 3)):
        calls.clear()
        found = batches.Latents(model_, clips_, count, path)
        assert len(calls) == len(found) == count
        truth = encode(model_, clips_[1])
        assert torch.equal(found[1]["mean"], truth["mean"]) and found[1]["caption"] == truth["caption"]


def shifted(model):
    with torch.no_grad():
        model.vae.encoder.conv_in.bias[0] += 0.01
    return model


def test_latents_of_a_folder_are_stale_when_one_of_its_clips_is_another(tmp_path):
    for name in "ab":
        data.write_clip(tmp_path / f"{name}.gif", randn(4, 3, 8, 8).clamp(-1, 1).float(), 8)
    before = ClipFolder(tmp_path, frames=4, size=8).identity()
    assert ClipFolder(tmp_path, frames=4, size=8).identity() == before
    data.write_clip(tmp_path / "b.gif", randn(4, 3, 8, 8, seed=1).clamp(-1, 1).float(), 8)
    changed = ClipFolder(tmp_path, frames=4, size=8).identity()
    (tmp_path / "b.txt").write_text("words")
    named = ClipFolder(tmp_path, frames=4, size=8).identity()
    (tmp_path / "c").mkdir()
    for k in range(4):
        data.write_image(tmp_path / "c" / f"{k}.png", randn(3, 8, 8).clamp(-1, 1).float())
    added = ClipFolder(tmp_path, frames=4, size=8).identity()
    with open(tmp_path / "c" / "2.png", "r+b") as file:  # in place: the folder itself does not change
        content = file.read()
        file.seek(0)
        file.write(content)
    again = ClipFolder(tmp_path, frames=4, size=8).identity()
    assert len({before, changed, named, added, again}) == 5


def test_a_damaged_file_of_latents_is_made_anew(model, tmp_path):
    path, clips = tmp_path / "latents.pt", ShapesDataset("train", 8, 64)
    first = batches.Latents(model, clips, 2, path)
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(batches.Latents(model, clips, 2, path)[1]["mean"], first[1]["mean"])


def test_frames_of_latents_are_each_by_itself(model):
    latents = batches.Latents(model, ShapesDataset("train", 8, 64), 2)
    frames = batches.Frames(latents)
    assert len(frames) == 16 and frames[11]["mean"].shape == (1, 4, 8, 8)
    assert torch.equal(frames[11]["mean"][0], latents[1]["mean"][3]) and frames[11]["caption"] == latents[1]["caption"]
