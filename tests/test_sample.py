"""The command line of sample.py: what it writes, which model it takes, what it says to mistakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from data import InputError, read_clip
from magicvideo import MagicVideo


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    MagicVideo.from_preset("tiny").save(path)
    return str(path)


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "SHIPPED", tmp_path / "nothing.pt")


def test_a_prompt_ends_as_a_clip_gif_with_every_frame(model, capsys):
    sample.main(["a red circle moving left", "--checkpoint", model, "--steps", "2"])
    pictures, rate = read_clip("clip.gif")
    assert pictures.shape == (8, 64, 64, 3) and rate == pytest.approx(8, rel=0.05)
    said = capsys.readouterr().out
    assert model in said and "clip.gif" in said


def test_several_prompts_make_one_grid(model):
    sample.main(["a red circle", "a blue square", "", "--checkpoint", model, "--steps", "1", "--out", "grid.png"])
    assert Image.open("grid.png").size == (2 * 64 + 2, 2 * 64 + 2)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4"])
def test_every_format_is_written(model, suffix):
    if suffix == ".mp4":
        pytest.importorskip("av", reason="pip install av, from requirements-extra.txt")
    sample.main(["a red circle", "--checkpoint", model, "--steps", "1", "--out", f"folder/clip{suffix}"])
    pictures, rate = read_clip(f"folder/clip{suffix}")
    assert pictures.shape == (8, 64, 64, 3) and rate == pytest.approx(8, rel=0.05)


def test_same_seed_writes_the_same_file_and_another_seed_another(model):
    for out, seed in (("one.png", "1"), ("two.png", "1"), ("three.png", "2")):
        sample.main(["a red circle", "--checkpoint", model, "--steps", "1", "--seed", seed, "--out", out])
    one, two, three = (open(f"{name}.png", "rb").read() for name in ("one", "two", "three"))
    assert one == two != three


def test_without_checkpoint_the_newest_run_is_taken_and_said(model, capsys, tmp_path):
    for age, run in enumerate(["newest", "older"]):
        place = tmp_path / "runs" / run / "model.pt"
        place.parent.mkdir(parents=True)
        place.write_bytes(open(model, "rb").read())
        os.utime(place, (1e9 - age, 1e9 - age))
    sample.main(["a red circle", "--steps", "1"])
    assert "newest" in capsys.readouterr().out


def test_all_thousand_steps_are_a_valid_number(model, monkeypatch):
    monkeypatch.setattr("unet3d.UNet3D.forward", lambda self, z, t, context, fps=None: 0.1 * z)
    sample.main(["a red circle", "--checkpoint", model, "--steps", "1000"])
    assert read_clip("clip.gif")[0].shape == (8, 64, 64, 3)


@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], "--steps 0.*1 to 1000"),
    (["--steps", "1001"], "--steps 1001.*1 to 1000"),
    (["--frames", "16"], "--frames 16.*8 frames.*adaptors"),
    (["--fps", "0"], "--fps 0"),
    (["--eta", "-1"], "--eta -1"),
    (["--seed", "-1"], "--seed -1"),
    (["--guidance", "nan"], "--guidance nan"),
    (["--out", "clip.txt"], "clip.txt.*gif"),
    (["--device", "abacus"], "--device abacus"),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt.*train.py"),
])
def test_wrong_flags_are_one_line_and_write_nothing(model, tmp_path, flags, words):
    with pytest.raises(InputError) as error:
        sample.main(["a red circle", "--checkpoint", model, *flags])
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_without_any_model_the_way_to_one_is_said():
    with pytest.raises(InputError, match="python train.py"):
        sample.main(["a red circle"])


@pytest.mark.parametrize("prompt", ["a " * 10_000, "\ud800 broken", "ｆｕｌｌ ｗｉｄｔｈ 🎈", "<|endoftext|>", "  "])
def test_odd_prompts_are_prompts(model, prompt):
    sample.main([prompt, "--checkpoint", model, "--steps", "1"])
    assert read_clip("clip.gif")[0].shape == (8, 64, 64, 3)


def test_a_file_of_prompts_makes_a_clip_each_and_none_again(model, capsys, monkeypatch):
    Path("prompts.txt").write_text("a red circle\na blue square\na white triangle\n")
    flags = ["--prompts", "prompts.txt", "--checkpoint", model, "--steps", "1", "--out", "set/c.png"]
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    sample.main(flags)
    assert [path.name for path in Path("set").iterdir()] == ["c-00002.png"]
    before = Path("set/c-00002.png").stat().st_mtime_ns
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    sample.main(flags)
    assert sorted(path.name for path in Path("set").iterdir()) == [f"c-0000{k}.png" for k in (1, 2, 3)]
    assert Path("set/c-00002.png").stat().st_mtime_ns == before
    assert "c-00002.png is there already" in capsys.readouterr().out
    sample.main(["a blue square", "--checkpoint", model, "--steps", "1", "--out", "one.png", "--seed", "1"])
    assert Path("one.png").read_bytes() == Path("set/c-00002.png").read_bytes()


@pytest.mark.parametrize("flags, words", [
    ([], "give prompts, or a file"), (["a", "--prompts", "p.txt"], "give prompts, or a file"),
    (["--prompts", "none.txt"], "--prompts none.txt: cannot be read"),
    (["--prompts", "empty.txt"], "no prompts in it")])
def test_mistakes_with_prompts_are_one_line(model, flags, words):
    Path("empty.txt").write_text("")
    with pytest.raises(InputError, match=words) as error:
        sample.main([*flags, "--checkpoint", model])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script", ["sample.py", "train.py", "evaluate.py"])
def test_torch_starts_with_threads_that_wait_without_spinning(tmp_path, script):
    # a torch that only says what it finds: the policy is read once, when the library is loaded
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, sys; sys.exit(os.environ['OMP_WAIT_POLICY'])")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("OMP_WAIT_POLICY", None)
    run = [sys.executable, str(Path(sample.__file__).parent / script)]
    found = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert found.stderr.strip() == "PASSIVE"
    found = subprocess.run(run, env={**environment, "OMP_WAIT_POLICY": "ACTIVE"}, capture_output=True, text=True,
                           timeout=60)
    assert found.stderr.strip() == "ACTIVE"
