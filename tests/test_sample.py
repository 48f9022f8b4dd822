"""sample.py: what a command line writes, which model it takes, what it says to mistakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cascade
import sample
from conftest import clip_of_bytes, shaken, small_model
from data import ShapesDataset
from runs import InputError
from magicvideo import MagicVideo
from clip_files import film_strip, grid, read_clip, write_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a model of 4 frames of 16 x 16 that has both networks of the cascade."""
    model = small_model()
    for stage in cascade.CASCADE_STAGES:
        model.cascade[stage] = shaken(cascade.build(model, stage)).float().state_dict()
    path = tmp_path_factory.mktemp("model") / "model.pt"
    model.save(path)
    return str(path)


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "SHIPPED", tmp_path / "nothing.pt")


def run(model, *arguments):
    sample.main([*arguments, "--checkpoint", model, "--steps", "1"])


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4"])
def test_a_prompt_ends_as_a_clip_of_every_format_without_the_cascade(
        model, suffix, capsys, monkeypatch):
    if suffix == ".mp4":
        pytest.importorskip("av", reason="writing .mp4 needs av")
    monkeypatch.setitem(sys.modules, "cascade", None)  # whoever imports it fails
    out = f"folder/clip{suffix}"
    run(model, "a red circle moving left", "--out", out)
    pictures, rate = read_clip(out)
    assert pictures.shape == (4, 16, 16, 3) and rate == pytest.approx(8, rel=0.05)
    said = capsys.readouterr().out
    assert model in said and f"wrote {out}: 1 clip of 4 frames, 16 x 16" in said


@pytest.mark.parametrize("prompt", ["a " * 10_000, "\ud800", "ｗｉｄｅ 🎈", "<|endoftext|>", "  "])
def test_odd_prompts_are_prompts_and_several_make_one_grid(model, prompt):
    run(model, prompt, "a red circle", "", "--out", "grid.png")
    assert Image.open("grid.png").size == (2 * 16 + 2, 2 * 16 + 2)


def test_one_seed_writes_one_file_and_another_seed_another(model):
    for out, seed in (("one.png", "1"), ("two.png", "1"), ("three.png", "2")):
        run(model, "a red circle", "--seed", seed, "--out", out)
    one, two, three = (Path(f"{name}.png").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_key_frames_are_interpolated_and_enlarged_also_with_the_highest_seed(model):
    seed = str(2**32 - 1)
    run(model, "a red circle", "a blue square", "--out", "all.webp", "--seed", seed,
        "--interpolate", "--upscale")
    pictures, rate = read_clip("all.webp")
    assert pictures.shape == (13, 64, 2 * 64 + 2, 3) and rate == pytest.approx(32, rel=0.02)


def test_without_checkpoint_the_newest_run_is_taken_and_without_runs_the_way_is_said(model, capsys):
    with pytest.raises(InputError, match="python train.py"):
        sample.main(["a red circle"])
    for age, name in enumerate(["newest", "older"]):
        path = Path("runs") / name / "model.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(Path(model).read_bytes())
        os.utime(path, (1e9 - age, 1e9 - age))
    sample.main(["a red circle", "--steps", "1"])
    assert "model: runs/newest/model.pt" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("--steps 0", "--steps 0.*1 to 1000"), ("--steps 1001", "--steps 1001.*1 to 1000"),
    ("--fps 0", "--fps 0"), ("--fps nan", "--fps nan"), ("--fps 51", "--fps 51.*50.*gif"),
    ("--fps 30 --interpolate", "--fps 30.* 12.5 .*gif.*--interpolate"),
    ("--seed -1", "--seed -1"), ("--seed 4294967296", "--seed 4294967296.* 4294967295"),
    ("--guidance inf", "--guidance inf"), ("--out clip.txt", "clip.txt.*gif"),
    ("--sampler euler", "euler.*ddim or ddpm"),
    ("--out folder.gif", "folder.gif: cannot be written .*directory.*choose another"),
    ("--out file/a.gif", "file/a.gif: cannot be written"),
    (f"--out {'a' * 252}.gif", "aaa.gif: cannot be written .*too long"),
])
def test_wrong_flags_are_one_line_before_the_model_is_loaded(flags, words, monkeypatch):
    Path("folder.gif").mkdir()
    Path("file").touch()
    monkeypatch.setattr(MagicVideo, "load", lambda *_: pytest.fail("loaded first"))
    with pytest.raises(InputError) as error:
        sample.main(["a red circle", *flags.split()])
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)


def test_a_link_to_the_script_finds_the_shipped_model(tmp_path):
    link = tmp_path / "draw.py"
    link.symlink_to(sample.__file__)
    done = subprocess.run([sys.executable, link, "a red circle", "--steps", "1"],
                          capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "checkpoints/shapes.pt" in done.stdout


def test_a_prompt_that_is_too_long_is_said_to_be_cut(model, capsys):
    sample.main(["a red circle " * 9, "a red circle", "--checkpoint", model, "--steps", "1"])
    said = capsys.readouterr().out
    assert said.count("too long") == 1 and 'of it is read: "a red circle a red circle"' in said


def test_mp4_without_av_and_other_devices_and_models_say_what_helps(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    small_model().save("plain.pt")
    for flags, words in (("--out a.mp4", "a.mp4: pip install av"),
                         ("--device abacus", "abacus.*cpu"),
                         ("--checkpoint none.pt", "none.pt: no such file.*train.py"),
                         ("--checkpoint plain.pt --interpolate", "train.py --stage interpolate"),
                         ("--checkpoint plain.pt --upscale", "train.py --stage upscale")):
        with pytest.raises(InputError, match=words):
            sample.main(["a red circle", "--checkpoint", model, *flags.split()])
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pt"]


VIDEO = clip_of_bytes()


def to_bytes(video):
    return ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("fps", [4, 12.5, 24])
def test_a_clip_is_read_back_as_it_was_written_equal_neighbours_too(tmp_path, suffix, fps):
    for frames in (-VIDEO, VIDEO[:1]):  # a clip takes the place of an older one
        write_clip(tmp_path / f"clip{suffix}", frames, fps)
    assert np.array_equal(read_clip(tmp_path / f"clip{suffix}")[0], to_bytes(VIDEO[:1]))
    write_clip(tmp_path / f"clip{suffix}", VIDEO, fps)
    pictures, rate = read_clip(tmp_path / f"clip{suffix}")
    assert np.array_equal(pictures, to_bytes(VIDEO))
    assert abs(8 / rate - 8 / fps) <= (0.0051 if suffix == ".gif" else 0.00051)
    assert [path.name for path in tmp_path.iterdir()] == [f"clip{suffix}"]


@pytest.mark.parametrize("h, w", [(64, 64), (63, 47)])
def test_an_mp4_is_read_back_nearly_and_grows_to_even_sizes(tmp_path, h, w):
    pytest.importorskip("av", reason="writing .mp4 needs av")
    video = ShapesDataset()[0]["video"][..., :h, :w]
    path = tmp_path / "10:30:15" / "clip.mp4"  # a file, no protocol
    write_clip(path, video, fps=8)
    pictures, rate = read_clip(path)
    assert pictures.shape == (8, h + h % 2, w + w % 2, 3) and rate == 8
    assert np.abs(pictures[:, :h, :w].astype(int) - to_bytes(video)).mean() < 4


def test_the_plain_background_of_a_gif_of_many_colors_stays_plain_and_still(tmp_path):
    clips = grid(torch.stack([ShapesDataset()[i]["video"] for i in range(0, 120, 14)]))
    write_clip(tmp_path / "grid.gif", clips, 8)
    pictures = read_clip(tmp_path / "grid.gif")[0].astype(int)
    truth = to_bytes(clips)
    background = (truth == truth[0, 0, 0]).all(-1)
    assert len(np.unique(pictures[background], axis=0)) == 1
    assert np.abs(pictures - truth)[background].max() <= 2 and np.abs(pictures - truth).mean() < 2


def test_writing_fails_whole_and_says_why(tmp_path, monkeypatch):
    def fill_disk(self, path, **options):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "old.gif").write_text("old")
    monkeypatch.setattr(Image.Image, "save", fill_disk)
    for path, words in (("old.gif", "old.gif.*No space left.*choose another"),
                        ("old.gif/a.gif", "old.gif/a.gif.*choose another")):
        with pytest.raises(InputError, match=words):
            write_clip(tmp_path / path, VIDEO, 8)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_grid_shows_every_clip_and_a_strip_every_frame():
    videos = torch.rand(5, 4, 3, 8, 10)
    tiled = grid(videos)
    assert tiled.shape == (4, 3, 2 * 8 + 2, 3 * 10 + 4)
    assert torch.equal(tiled[..., :8, 12:22], videos[1])
    assert torch.equal(tiled[..., 10:, 12:22], videos[4])
    assert (tiled[..., 8:10, :] == 1).all() and (tiled[..., 10:, 24:] == 1).all()
    picture = film_strip(videos)
    assert picture.shape == (3, 5 * 8 + 8, 4 * 10 + 6)
    assert torch.equal(picture[:, 20:28, 36:46], videos[2, 3])
