"""sample.py: what a command line writes, which model it takes, what it says to mistakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cascade
import sample
from clip_files import read_clip
from clip_text import Tokenizer
from conftest import shaken, small_model
from magicvideo import MagicVideo
from runs import InputError


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


def test_key_frames_are_interpolated_and_enlarged_also_with_the_highest_seed(model, monkeypatch):
    seed = str(2**32 - 1)
    seeds = []
    for network in (cascade.Interpolator, cascade.Upscaler):
        monkeypatch.setattr(network, "sample", lambda *given, seed, sample=network.sample: (
            seeds.append(seed) or sample(*given, seed=seed)))
    run(model, "a red circle", "a blue square", "--out", "all.webp", "--seed", seed,
        "--interpolate", "--upscale")
    pictures, rate = read_clip("all.webp")
    assert pictures.shape == (13, 64, 2 * 64 + 2, 3) and rate == pytest.approx(32, rel=0.02)
    assert seeds == [2**32 - 1] * 2


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


def test_models_of_others_under_runs_are_passed_over_and_named(model, capsys, monkeypatch):
    ours = Path(model).read_bytes()
    for age, (name, content) in enumerate({"foreign": b"no", "ours": ours, "old": ours}.items()):
        path = Path("runs") / name / "model.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        os.utime(path, (1e9 - age, 1e9 - age))
    torch.save({"weights": torch.zeros(3)}, "runs/foreign.pt")
    for name, content in (("state", "runs/foreign.pt"), ("gone", None), ("folder", None)):
        (Path("runs") / name).mkdir()
        if content:
            Path(content).rename(Path("runs") / name / "model.pt")
    (Path("runs") / "gone" / "model.pt").symlink_to("nowhere")
    (Path("runs") / "folder" / "model.pt").mkdir()
    sample.main(["a red circle", "--steps", "1"])
    said = capsys.readouterr().out
    assert "model: runs/ours/model.pt" in said and said.count("passed over: ") == 2
    assert "passed over: runs/foreign/model.pt: " in said and "runs/state/model.pt: " in said
    for name in ("ours", "old"):
        (Path("runs") / name / "model.pt").unlink()
    monkeypatch.setattr(sample, "SHIPPED", Path(model))
    sample.main(["a red circle", "--steps", "1"])
    assert f"model: {model}" in capsys.readouterr().out
    with pytest.raises(InputError, match="runs/foreign/model.pt"):  # asked for by name
        sample.main(["a red circle", "--checkpoint", "runs/foreign/model.pt"])


def test_the_steps_and_guidance_are_the_models_own_unless_given(model, monkeypatch):
    given = []

    def sampled(self, prompts, fps, steps, guidance, *rest, **more):
        given.append((prompts, fps, steps, guidance, *rest, more))
        return torch.zeros(1, 4, 4, 2, 2)

    monkeypatch.setattr(MagicVideo, "sample", sampled)
    sample.main(["a", "--checkpoint", model])
    sample.main(["b", "--checkpoint", model, "--steps", "7", "--guidance", "0", "--fps", "9",
                 "--seed", "3", "--sampler", "ddpm"])
    assert given == [(["a"], 8, None, None, "ddim", 0, {"decode": False}),
                     (["b"], 9, 7, 0, "ddpm", 3, {"decode": False})]


def test_where_nothing_can_be_written_is_known_before_and_a_link_is_followed(model):
    Path("file").touch()
    Path("link.gif").symlink_to("missing.gif")
    with pytest.raises(InputError, match="--out file/deep/a.gif: cannot be written"):
        sample.main(["a", "--out", "file/deep/a.gif", "--checkpoint", "none.pt"])
    sample.main(["a", "--checkpoint", model, "--steps", "1", "--out", "link.gif"])
    assert Path("link.gif").is_symlink() and len(read_clip("missing.gif")[0]) == 4


@pytest.mark.parametrize("flags, words", [
    ("--steps 0", "--steps 0.*1 to 1000"), ("--steps 1001", "--steps 1001.*1 to 1000"),
    ("--fps 0", "--fps 0"), ("--fps nan", "--fps nan"), ("--fps 51", "--fps 51.*50.*gif"),
    ("--fps 30 --interpolate", "--fps 30.* 12.5 .*gif.*--interpolate"),
    ("--seed -1", "--seed -1"), ("--seed 4294967296", "--seed 4294967296.* 4294967295"),
    ("--guidance inf", "--guidance inf"), ("--out clip.txt", "clip.txt.*gif"),
    ("--sampler euler", "euler.*ddim or ddpm"),
    ("--out folder.gif", "folder.gif: cannot be written .*directory.*choose another"),
    ("--out file/a.gif", "file/a.gif: cannot be written"),
    ("--picture --interpolate", "--interpolate: needs clips; leave out --picture"),
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


def test_a_prompt_that_is_too_long_is_said_to_be_cut(model, capsys, monkeypatch):
    sample.main(["a red circle " * 9, "a red circle", "--checkpoint", model, "--steps", "1"])
    said = capsys.readouterr().out
    # a token can be as long as a word that was trained on
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "x" * 15_000)
    sample.main(["x" * 15_000, "--checkpoint", model, "--steps", "1"])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 300
    assert said.count("too long; only this part is used: ") == 1
    assert 'is used: "a red circle a red circle"' in said


def test_mp4_without_av_and_other_devices_and_models_say_what_helps(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    small_model().save("plain.pt")
    for flags, words in (("--out a.mp4", "a.mp4: .*pip install 'av>=14.1'"),
                         ("--device abacus", "abacus.*cpu"),
                         ("--checkpoint none.pt", "none.pt: no such file.*train.py"),
                         ("--checkpoint plain.pt --interpolate", "train.py --stage interpolate"),
                         ("--checkpoint plain.pt --upscale", "train.py --stage upscale")):
        with pytest.raises(InputError, match=words):
            sample.main(["a red circle", "--checkpoint", model, *flags.split()])
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pt"]
