"""Training: its stages, the files it writes, stopping and going on, and that it learns."""

import importlib.util
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cascade
import runs
import sample
import stages
import train
from clip_files import write_clip
from conftest import close, tinier
from data import ShapePictures, ShapesDataset
from magicvideo import PRESETS, MagicVideo, MagicVideoConfig
from runs import EMA, InputError, load_checkpoint
from unet3d import is_video_parameter

ROOT = Path(__file__).parent.parent
TINIER = tinier()
SHORT = ["--vae-steps", "2", "--image-steps", "2", "--video-steps", "2",
         "--interpolate-steps", "2", "--upscale-steps", "2", "--cache", "4", "--batch-size", "2",
         "--vae-batch-size", "8", "--device", "cpu", "--sample-every", "0"]
DRAWN = [*SHORT, "--sample-every", "500"]  # with pictures and held-out losses
RUN = {}


@pytest.fixture(autouse=True)
def tinier_preset(monkeypatch, tmp_path, request):
    """Runs go to an empty folder, with a tiny preset that is tinier still; one draws its losses."""
    monkeypatch.chdir(tmp_path)
    if "without_flags" not in request.node.name:
        monkeypatch.setattr(train, "plot_losses", lambda rows, picture: None)
    monkeypatch.setitem(PRESETS, "tiny", MagicVideoConfig(**TINIER))
    monkeypatch.setitem(PRESETS, "laptop", MagicVideoConfig(**{**TINIER, "preset": "laptop"}))


@pytest.fixture
def whole(tmp_path_factory):
    """The folder of an undisturbed run, trained once."""
    if not RUN:
        RUN["out"] = tmp_path_factory.mktemp("whole") / "run"
        train.main([*SHORT, "--out", str(RUN["out"])])
    return RUN["out"]


def weights(path):
    return MagicVideo.load(path).state_dict()


def stored(out):
    """The weights of a run in the precision that they were saved in."""
    return load_checkpoint(Path(out) / "model.pt", "magicvideo")["model"]["weights"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def rows(out):
    return runs.read_log(Path(out) / "log.csv")


# --------------------------------------------------------------------------------------------------
# What a run leaves


def test_without_flags_every_stage_runs_and_the_last_line_says_where_everything_is(capsys):
    train.main(DRAWN)
    out = Path("runs/shapes")
    drawn = {"loss.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {p.name for p in out.iterdir()} == {"model.pt", "checkpoint.pt", "log.csv",
                                               "samples"} | drawn
    names = stages.BASE_STAGES
    assert {p.name for p in (out / "samples").iterdir()} == {f"{s}-000002.png" for s in names}
    assert [(r["stage"], r["step"]) for r in rows(out)] == [(s, n) for s in names for n in "12"]
    assert all(math.isfinite(float(row["loss"])) for row in rows(out))
    assert all(math.isfinite(float(row["held_out_loss"])) for row in rows(out)[1::2])
    said = capsys.readouterr().out.strip().splitlines()
    assert "runs/shapes/model.pt" in said[-2] and said[-1].startswith("next: python sample.py 'a ")
    train.main(SHORT)
    assert (Path("runs/shapes-2") / "model.pt").is_file()


def test_it_says_how_long_a_run_will_take_and_which_flag_makes_it_shorter(monkeypatch, capsys):
    taken = {"vae": 0.4, "image": 0.3, "video": 3.1}
    monkeypatch.setattr(train, "estimate_minutes", lambda stage, clips: taken[stage.name])
    monkeypatch.setattr(train, "train_stage", lambda *arguments: None)
    train.main([*SHORT[:4], "--video-steps", "200", *SHORT[6:]])
    said = capsys.readouterr().out
    assert "about 4 minutes on this machine; fewer --video-steps make it shorter" in said
    assert "stage video: about 3.1 minutes" in said


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_stages_minutes_are_those_of_its_steps_and_timing_changes_no_weight(name, monkeypatch):
    torch.manual_seed(0)
    model = MagicVideo.from_preset("tiny")
    stage = stages.STAGES[name](model, train.Settings(batch_size=2, accumulate=2,
                                                      **{f"{name}_steps": 600}))
    before = {key: p.clone() for key, p in model.state_dict().items()}
    clips = ShapesDataset("train", stage.clip_frames or 4, 32 * stage.scale)
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(train.time, "time", lambda: next(clock))  # a micro-batch takes 3 seconds
    micro = 2 if name != "vae" else 2
    assert train.estimate_minutes(stage, clips) == 3 * micro * 600 / 60
    assert equal(before, model.state_dict()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", stages.STAGES)
def test_memory_is_estimated_from_one_item_and_grows_with_the_micro_batch(name):
    model = MagicVideo.from_preset("tiny")

    def needed(**settings) -> float:
        stage = stages.STAGES[name](model, train.Settings(batch_size=8, vae_batch_size=32,
                                                          **settings))
        train.make_optimizers_and_average(stage, None)
        clips = ShapesDataset("train", stage.clip_frames or 4, 32 * stage.scale)
        return train.estimate_memory(stage, clips)

    whole, less = needed(), needed(accumulate=4)
    weights = needed(trainable="conv_in.weight")  # hardly any: the rest is of the backward pass
    assert 0 < less < whole and weights < whole
    assert all(p.grad is None for p in model.parameters())
    if name in ("image", "video"):  # the levels of the U-Net compute their tensors again
        assert needed(gradient_checkpointing=True) < 0.8 * whole


def test_super_resolution_reads_the_first_frames_of_a_clip_unless_told_otherwise():
    MagicVideo.from_preset("tiny").save("model.pt")
    for stage, told, read in (("interpolate", {}, 1000), ("upscale", {}, 8),
                              ("upscale", {"max_frames": 3}, 3)):
        settings, _ = train.start({"stage": stage, "init_from": "model.pt", **told})
        assert settings.max_frames == read


@pytest.mark.parametrize("free, is_said", [(100.0, False), (1e-4, True)])
def test_a_run_that_will_not_fit_says_which_flags_take_less(free, is_said, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_stage", lambda *arguments: None)
    monkeypatch.setattr(train, "free_memory", lambda device: free)
    train.main([*SHORT[:4], "--video-steps", "200", *SHORT[6:]])
    assert ("less takes --accumulate 2 or more" in capsys.readouterr().out) == is_said


def test_the_next_command_is_a_shell_line_whatever_the_caption_holds(capsys):
    caption = """it's a "cat" `touch hacked` $HOME"""
    Path("clips").mkdir()
    write_clip("clips/a.gif", ShapesDataset("train", 8, 32)[0]["video"], 8)
    Path("clips/a.txt").write_text(caption)
    train.main([*SHORT, "--data", "clips", "--out", "with blank"])
    command = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("next: ")
    assert shlex.split(command) == ["python", "sample.py", caption, "--checkpoint",
                                    "with blank/model.pt"]
    model = MagicVideo.load("with blank")
    assert model.sample(caption, steps=2).shape == (1, 4, 3, 32, 32)


def test_the_same_seed_makes_the_same_model_and_another_seed_another(whole):
    train.main([*SHORT, "--out", "again"])
    train.main([*SHORT, "--out", "other", "--seed", "4"])
    assert equal(weights(whole), weights("again/model.pt"))
    assert not equal(weights(whole), weights("other/model.pt"))


def test_model_pt_written_in_the_middle_of_stage_vae_has_its_measured_scale(monkeypatch):
    seen = []
    save = MagicVideo.save
    monkeypatch.setattr(MagicVideo, "save", lambda model, path: seen.append(
        model.config.vae.scaling_factor) or save(model, path))
    trained = []
    forward = stages.Vae.forward
    monkeypatch.setattr(stages.Vae, "forward", lambda stage, *given: trained.append(
        stage.model.config.vae.scaling_factor) or forward(stage, *given))
    train.main([*SHORT, "--stage", "vae", "--out", "vae", "--save-every", "1"])
    assert len(seen) == 3 and 0.18215 not in seen and trained == [0.18215] * 2
    model = MagicVideo.load("vae")
    clips = ShapesDataset("train", 4, 32)
    z = torch.cat([model.encode(item["video"][None]) for item in stages.spread([clips], 64)])
    assert z.std().item() == pytest.approx(1, abs=0.05)


# --------------------------------------------------------------------------------------------------
# Stopping and going on


@pytest.mark.parametrize("stop, by", [
    (1, signal.SIGTERM), (2, signal.SIGINT), (3, signal.SIGTERM), (6, signal.SIGINT)])
def test_a_stopped_and_resumed_run_ends_with_the_very_weights_of_an_undisturbed_one(
        stop, by, whole, monkeypatch):
    counted = iter(range(1, 100))
    clip_grad_norm = torch.nn.utils.clip_grad_norm_

    def signalled(*arguments):  # in the middle of a step
        if next(counted) == stop:
            os.kill(os.getpid(), by)
        return clip_grad_norm(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", signalled)
    with pytest.raises(InputError, match="stopped; go on with: .*--resume --out stopped"):
        train.main([*SHORT, "--out", "stopped"])
    assert len(rows("stopped")) == stop  # the step at hand is finished and saved
    train.main(["--resume", "--out", "stopped", "--device", "cpu"])
    assert equal(weights(whole), weights("stopped"))
    assert [r["loss"] for r in rows("stopped")] == [r["loss"] for r in rows(whole)]


@pytest.mark.parametrize("stop, drawn", [(1, []), (2, [2])])
def test_who_stops_a_run_waits_for_no_picture_but_the_last_of_a_stage(stop, drawn, monkeypatch):
    steps = []
    pictures = []
    monkeypatch.setattr(train, "loss_by_timestep_bin", lambda *_: (
        steps.append(0), len(steps) == stop and os.kill(os.getpid(), signal.SIGTERM),
        torch.zeros(2, runs.BINS))[2])
    monkeypatch.setattr(train, "held_out_loss", lambda *_: 0.0)
    monkeypatch.setattr(train, "draw_picture", lambda path, *_: pictures.append(path.name))
    with pytest.raises(InputError, match="stopped; go on"):
        train.main([*SHORT, "--sample-every", "1", "--out", "stopped"])
    assert pictures[stop - 1 :] == [f"vae-{step:06d}.png" for step in drawn]


def test_a_stop_while_the_last_step_of_a_stage_is_saved_is_heard(whole, monkeypatch):
    save_run = train.save_run

    def stopped(out, stage, step, *rest):
        save_run(out, stage, step, *rest)
        if (stage.name, step) == ("image", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(InputError, match="stopped; go on"):
        patched.setattr(train, "save_run", stopped)
        train.main([*SHORT, "--out", "stopped"])
    train.main(["--resume", "--out", "stopped", "--device", "cpu"])
    assert equal(weights(whole), weights("stopped"))


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_its_log_says_every_step_once(
        whole, monkeypatch):
    append_log = train.append_log
    counted = iter(range(1, 100))

    def killed(*arguments):
        append_log(*arguments)
        if next(counted) == 4:
            raise SystemExit("killed")

    monkeypatch.setattr(train, "append_log", killed)
    with pytest.raises(SystemExit):
        train.main([*SHORT, "--out", "run"])
    monkeypatch.setattr(train, "append_log", append_log)
    assert len(rows("run")) == 4
    train.main(["--resume", "--out", "run", "--device", "cpu"])
    assert [r["loss"] for r in rows("run")] == [r["loss"] for r in rows(whole)]
    assert equal(weights(whole), weights("run"))


def test_a_run_goes_on_with_smaller_micro_batches_where_memory_was_short(whole, monkeypatch):
    train_stage = train.train_stage

    def killed(stage, *arguments):
        if stage.name == "image":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        train_stage(stage, *arguments)

    with monkeypatch.context() as patched, pytest.raises(InputError, match="not enough memory"):
        patched.setattr(train, "train_stage", killed)
        train.main([*SHORT, "--out", "run"])
    less = ["--accumulate", "2", "--gradient-checkpointing"]
    train.main(["--resume", "--out", "run", "--device", "cpu", *less])
    pairs = zip(weights(whole).values(), weights("run").values())
    assert all(close(one, other, 1e-2) for one, other in pairs)
    with pytest.raises(InputError, match="--batch-size 4: the run in run was started with"):
        train.main(["--resume", "--out", "run", "--batch-size", "4"])


def test_a_picture_that_cannot_be_written_ends_no_run(whole, monkeypatch, capsys):
    def full(*arguments):
        raise InputError("--out samples: No space left on device")

    monkeypatch.setattr(train, "draw_picture", full)
    train.main([*SHORT, "--sample-every", "2", "--out", "run"])
    assert equal(weights(whole), weights("run"))
    assert "run/samples/vae-000002.png is not written: " in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["", "CUDA out of memory. Tried to allocate 9.00 GiB"])
def test_a_run_that_does_not_fit_names_the_flags_that_take_less_memory(monkeypatch, reason):
    def forward(*arguments):
        if reason:
            raise torch.cuda.OutOfMemoryError(reason)
        torch.empty(10**17)

    monkeypatch.setattr(stages.Vae, "forward", forward)
    with pytest.raises(InputError, match="not enough memory; --accumulate 2 .*--batch-size"):
        train.main(SHORT)


def test_a_stop_before_the_first_checkpoint_says_so(monkeypatch, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_stage", interrupted)
    with pytest.raises(InputError, match="stopped, nothing saved"):
        train.main(SHORT)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["log.csv"]


def test_a_run_killed_before_its_first_checkpoint_starts_anew_with_a_log_of_its_own(whole):
    Path("run").mkdir()
    Path("run/log.csv").write_text("stage,step,loss\nvae,1,0.5\nva")
    train.main([*SHORT, "--out", "run"])
    assert [r["loss"] for r in rows("run")] == [r["loss"] for r in rows(whole)]


def test_a_log_cut_off_by_a_kill_is_mended_and_one_that_cannot_be_written_ends_no_run(
        whole, monkeypatch, capsys):
    shutil.copytree(whole, "run")
    log = Path("run/log.csv").read_bytes()
    Path("run/log.csv").write_bytes(log + b"video,3,0.1")
    train.main(["--resume", "--out", "run", "--device", "cpu"])
    assert runs.read_log(Path("run/log.csv")) == rows(whole)

    def locked(*arguments):
        raise PermissionError(13, "a spreadsheet has it open")

    monkeypatch.setattr(train, "append_log", locked)
    train.main([*SHORT, "--out", "locked"])
    assert "locked/log.csv is not written: [Errno 13] a spreadsheet" in capsys.readouterr().err
    assert equal(weights(whole), weights("locked"))


def test_a_folder_of_clips_is_described_and_what_does_not_change_a_run_may_change(
        monkeypatch, capsys):
    monkeypatch.setitem(train.PRESET_SETTINGS, "laptop", {"vae_steps": 8})
    for n in range(4):
        write_clip(f"clips/{n}.gif", ShapesDataset("train", 8, 32)[n]["video"], 8)
        Path(f"clips/{n}.txt").write_text(["long " * 80, "short", "short", ""][n])
    train.main(["--data", "clips", "--out", "run", *DRAWN[2:]])
    said = capsys.readouterr().out
    assert "clips: 4 clips (0 folders of pictures), decoded once to runs/frames/" in said
    assert "captions: 1 missing, 1 the same as another, 1 cut at 77 tokens; 1 clips held" in said
    assert "preset laptop: 2 steps of stage vae, 2 steps of stage image, 2 steps" in said
    assert "stage video: the held-out loss was lowest at step 2" in said
    finished = weights("run")
    Path("clips").rename("moved")
    train.main(["--resume", "--out", "run", "--data", "moved/", "--save-every", "7",
                "--device", "cpu"])
    assert equal(finished, weights("run")) and len([*Path("runs/frames").glob("*.u8")]) == 2
    Path("moved/0.gif").unlink()
    with pytest.raises(InputError, match="--data moved: these are not the clips this run"):
        train.main(["--resume", "--out", "run", "--data", "moved", "--device", "cpu"])


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_is_not_saved_and_names_the_rates(monkeypatch, place):
    class Broken(torch.autograd.Function):
        """Pass the loss on, and NaN back."""

        @staticmethod
        def forward(ctx, x):
            return x * math.nan if place == "loss" else x * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    forward = stages.Vae.forward
    monkeypatch.setattr(stages.Vae, "forward", lambda *arguments: (
        Broken.apply(forward(*arguments)[0]), None))
    with pytest.raises(InputError, match="stage vae, step 0: .*nan.*lower --lr and --muon-lr"):
        train.main([*SHORT, "--out", "bad", "--save-every", "1"])
    assert not Path("bad/model.pt").exists()


def test_a_folder_that_holds_a_run_is_refused_and_other_settings_do_not_resume_it(whole):
    before = weights(whole)
    with pytest.raises(InputError, match="holds a run.*--resume"):
        train.main([*SHORT, "--out", str(whole)])
    with pytest.raises(InputError, match="--batch-size 3.*started with 2"):
        train.main(["--resume", "--out", str(whole), "--batch-size", "3"])
    train.main(["--resume", "--out", str(whole), "--device", "cpu"])  # a finished run stays
    assert equal(before, weights(whole))


# --------------------------------------------------------------------------------------------------
# Stages


def test_a_stage_trains_its_own_parts_and_no_others(capsys):
    train.main([*SHORT, "--out", "vae", "--stage", "vae"])
    train.main([*SHORT, "--out", "image", "--stage", "image", "--init-from", "vae/model.pt"])
    train.main([*SHORT, "--out", "video", "--stage", "video", "--init-from", "image"])
    vae, image, video = (weights(stage) for stage in stages.BASE_STAGES)

    def changed(before, after):
        return {key for key in before if not torch.equal(before[key], after[key])}

    by_image = changed(vae, image)
    by_video = changed(image, video)
    assert not any(key.startswith("vae.") or is_video_parameter(key) for key in by_image)
    assert sum(key.startswith("unet.") for key in by_image) > 100
    assert sum(key.startswith("text_encoder.") for key in by_image) > 10
    assert not any(key.startswith("vae.") for key in by_video)
    assert sum(is_video_parameter(key) for key in by_video) > 30
    assert sum(key.startswith("unet.") and not is_video_parameter(key) for key in by_video) > 100


@pytest.fixture
def pictures(tmp_path):
    """A folder of captioned stills."""
    (tmp_path / "pictures").mkdir()
    for n in range(12):
        Image.new("RGB", (32, 32), (20 * n, 0, 0)).save(tmp_path / f"pictures/{n}.jpg")
        (tmp_path / f"pictures/{n}.txt").write_text(f"red number {n}")
    return tmp_path / "pictures"


def test_pictures_train_stages_vae_and_image_and_every_nth_step_of_stage_video(
        pictures, monkeypatch, capsys):
    seen = []
    read = stages.Stage.read

    def spy(self, *arguments):
        batch, draw = read(self, *arguments)
        seen.append((self.name, ["number" in caption for caption in batch.captions]))
        return batch, draw

    captions = []
    new_model = train.new_model
    monkeypatch.setattr(stages.Stage, "read", spy)
    monkeypatch.setattr(train, "new_model", lambda s, c: captions.append(c) or new_model(s, c))
    steps = ["--vae-steps", "5", "--image-steps", "2", "--video-steps", "5"]
    train.main([*SHORT, "--images", "pictures", "--data", "shapes", "--out", "run", *steps,
                "--picture-every", "4"])
    said = capsys.readouterr().out
    assert "pictures: 12 pictures, decoded once" in said and "1 pictures held out" in said
    mixed, pictured, moving = [False, True] * 4, [True] * 8, [False] * 2
    assert seen == [("vae", mixed)] * 4 + [("vae", moving)] + [("image", mixed)] * 2 + [
        ("video", pictured), *[("video", moving)] * 3, ("video", pictured)]
    assert "preset laptop" in said
    assert {"red number 3", "a red circle growing"} <= {*captions[0]}  # the tokenizer learns both


def test_pictures_alone_train_super_resolution(pictures, whole):
    train.main([*SHORT, "--images", "pictures", "--stage", "upscale", "--init-from", str(whole),
                "--upscale-steps", "1", "--out", "run"])
    assert [*MagicVideo.load("run").cascade] == ["upscale"]


def test_a_run_with_pictures_goes_on_exactly_and_with_no_others(pictures, monkeypatch):
    flags = [*SHORT, "--images", "pictures", "--data", "shapes", "--save-every", "1"]
    train.main([*flags, "--out", "undisturbed"])
    append_log = train.append_log

    def stop(path, row):
        append_log(path, row)
        if (row["stage"], row["step"]) == ("video", 1):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "append_log", stop)
    with pytest.raises(InputError, match="go on with"):
        train.main([*flags, "--out", "run"])
    monkeypatch.setattr(train, "append_log", append_log)
    (pictures / "3.jpg").rename("3.jpg")
    with pytest.raises(InputError, match="not the clips this run started with"):
        train.main(["--resume", "--out", "run", "--device", "cpu"])
    Path("3.jpg").rename(pictures / "3.jpg")
    train.main(["--resume", "--out", "run", "--device", "cpu"])
    assert equal(weights("undisturbed"), weights("run"))


def test_pictures_alone_make_a_model_of_pictures(pictures, capsys):
    Path("names.txt").write_text("3.jpg\n")
    train.main([*SHORT, "--images", "pictures", "--stage", "image", "--out", "run", "--held-out",
                "names.txt"])
    assert [r["stage"] for r in rows("run")] == ["vae"] * 2 + ["image"] * 2
    trained = load_checkpoint("run/checkpoint.pt", "magicvideo-training")["clips"]
    assert trained and "3.jpg" not in trained
    assert capsys.readouterr().out.strip().endswith("run/model.pt --picture --out picture.png")
    sample.main(["red number 3", "--checkpoint", "run", "--picture", "--steps", "2",
                 "--out", "picture.png"])
    with Image.open("picture.png") as picture:
        assert picture.size == (32, 32) and not getattr(picture, "is_animated", False)
    train.main([*SHORT, "--images", "pictures", "--stage", "image", "--init-from", "run"])
    assert [r["stage"] for r in rows("runs/pictures")] == ["image"] * 2
    for stage in ([], ["--stage", "video"], ["--stage", "interpolate"]):
        with pytest.raises(InputError, match="--images pictures: .*add --data FOLDER"):
            train.main([*SHORT, "--images", "pictures", *stage])


def test_a_start_from_a_model_keeps_its_vae_and_its_presets_settings(monkeypatch, whole, capsys):
    model = MagicVideo.load(whole)
    model.config.preset = "small"
    model.save("small.pt")
    seen = []
    monkeypatch.setattr(train, "train_stage", lambda stage, *_: seen.append(stage))
    train.main(["--init-from", "small.pt", "--data", "shapes", "--out", "run", "--device", "cpu"])
    assert [stage.name for stage in seen] == ["image", "video"]
    assert "stage vae is left out: small.pt has been through it" in capsys.readouterr().out
    s = seen[0].s
    assert (s.preset, s.lr, s.muon_lr, s.batch_size) == ("small", 2e-4, 0.0, 8)


def test_a_model_of_other_frames_is_refused_and_data_is_cut_to_the_models(monkeypatch, whole):
    with pytest.raises(InputError, match="--frames 6.*makes 4"):
        train.main([*SHORT, "--init-from", str(whole), "--frames", "6"])
    seen = []
    monkeypatch.setattr(train, "train_stage", lambda stage, data, *_: seen.append(data.clips.frames))
    train.main([*SHORT, "--init-from", str(whole), "--out", "run"])
    assert seen == [4, 4]


@pytest.mark.parametrize("stage", cascade.CASCADE_STAGES)
def test_a_cascade_stage_adds_its_network_and_leaves_the_model_as_it_was(stage, whole):
    train.main([*DRAWN, "--stage", stage, "--init-from", str(whole), "--out", stage])
    model = MagicVideo.load(stage)
    assert list(model.cascade) == [stage] and equal(model.state_dict(), weights(whole))
    untrained = cascade.build(MagicVideo.load(whole), stage).state_dict()
    assert not equal(untrained, cascade.build(model, stage).state_dict())
    assert [(r["stage"], r["step"]) for r in rows(stage)] == [(stage, "1"), (stage, "2")]


def test_trainable_chooses_weights_by_name_and_refuses_what_matches_nothing():
    train.main([*SHORT, "--out", "run", "--stage", "vae", "--trainable", "decoder"])
    torch.manual_seed(0)
    before = MagicVideo.from_preset("tiny").state_dict()
    changed = {name for name, p in weights("run").items() if not torch.equal(p, before[name])}
    assert changed and all("decoder" in name or "quant_conv.bias" in name for name in changed)
    assert MagicVideo.load("run").config.vae.scaling_factor == 0.18215  # latents mean what they did
    with pytest.raises(InputError, match='--trainable "adapter": matches nothing'):
        train.main([*SHORT, "--out", "other", "--trainable", "adapter"])


def test_bf16_trains_weights_that_stay_in_float32_near_those_of_fp32(whole):
    train.main([*SHORT, "--out", "bf16", "--precision", "bf16"])
    one, other = weights(whole), weights("bf16")
    assert {p.dtype for p in other.values()} == {torch.float32} and not equal(one, other)
    assert max((one[key] - other[key]).abs().max().item() for key in one) < 0.02


# --------------------------------------------------------------------------------------------------
# The loop


def make_stage(name, **settings):
    """Make a stage of an untrained model, and clips that it can train on."""
    torch.manual_seed(0)
    s = train.Settings(**{"batch_size": 2, "vae_batch_size": 8, f"{name}_steps": 3,
                          "sample_every": 0, **settings})
    return stages.STAGES[name](MagicVideo.from_preset("tiny"), s), ShapesDataset("train", 4, 32)


def train_it(stage, clips, out="run"):
    log = Path(out)
    log.mkdir(exist_ok=True)
    data = train.Data(clips, ShapesDataset("test", 4, 32))
    train.train_stage(stage, data, [], log)


def test_the_moving_average_is_what_a_stage_leaves_what_model_pt_holds_and_what_is_judged(
        monkeypatch):
    stage, clips = make_stage("video", save_every=2, sample_every=2)
    averages, judged = [], []
    update, held_out_loss = EMA.update, train.held_out_loss
    monkeypatch.setattr(EMA, "update", lambda self: update(self) or averages.append(
        [p.clone() for p in self.shadow]))
    monkeypatch.setattr(train, "held_out_loss", lambda *arguments: judged.append(
        [p.detach().clone() for p in stage.chosen().values()]) or held_out_loss(*arguments))
    order = [*stage.chosen()]
    train_it(stage, clips)
    groups = [name for name in order if not is_video_parameter(name)]
    groups += [name for name in order if is_video_parameter(name)]  # the order of the averages
    last = dict(zip(groups, averages[-1]))
    saved = MagicVideo.load("run/model.pt")
    saved = {**dict(saved.unet.named_parameters()),
             **{f"text_encoder.{name}": p for name, p in saved.text_encoder.named_parameters()}}
    assert len(averages) == 3 and len(judged) == 2
    for name, p in stage.chosen().items():
        assert torch.equal(p, last[name]) and torch.equal(saved[name], last[name])
    second = dict(zip(groups, averages[1]))
    assert all(torch.equal(p, second[name]) for name, p in zip(order, judged[0]))
    weights = load_checkpoint("run/checkpoint.pt", "magicvideo-training")["network"]
    assert not all(torch.equal(weights[name], last[name]) for name in weights)


def test_gradients_of_a_norm_above_one_are_scaled_to_one(monkeypatch):
    seen = []
    forward = stages.Video.forward
    monkeypatch.setattr(stages.Video, "forward", lambda self, *a: (
        1000 * forward(self, *a)[0], forward(self, *a)[1]))
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(torch.stack([
        p.grad.norm() for g in self.param_groups for p in g["params"]
        if p.grad is not None]).norm()) or step(self))
    train_it(*make_stage("video", muon_lr=0.0))
    assert seen and all(norm == pytest.approx(1, abs=1e-3) for norm in seen)


def test_a_bin_of_timesteps_has_the_mean_error_of_the_frames_that_count(monkeypatch):
    stage, _ = make_stage("video")
    t = torch.arange(1000)
    weights = stage.diffusion.loss_weight(t, 8)  # what an error of 1 everywhere reads
    bins = train.loss_by_timestep_bin(stage, weights.double(), t, 8)
    row = train.describe_bins(bins)
    assert [float(row[f"loss_bin_{i}"]) for i in range(4)] == pytest.approx([1] * 4)
    bins = train.loss_by_timestep_bin(stage, 3 * weights[:500], t[:500], 8)
    assert [*train.describe_bins(bins).values()] == ["3.000000", "3.000000", "", ""]
    vae, _ = make_stage("vae")
    assert [*train.describe_bins(train.loss_by_timestep_bin(vae, weights, None, 8)).values()] == [
        ""] * 4


def test_the_bins_of_a_step_count_all_of_its_micro_batches(monkeypatch):
    for accumulate in (1, 4):
        stage, clips = make_stage("video", batch_size=4, accumulate=accumulate, video_steps=1)
        train_it(stage, clips, f"run{accumulate}")
    one, four = (rows(f"run{accumulate}")[0] for accumulate in (1, 4))
    names = [name for name in one if name.startswith("loss_bin")]
    assert [bool(one[name]) for name in names] == [bool(four[name]) for name in names]
    for name in names:
        assert not one[name] or float(one[name]) == pytest.approx(float(four[name]), abs=1e-5)
    assert float(one["loss"]) == pytest.approx(float(four["loss"]), abs=1e-5)


def test_the_held_out_loss_is_the_mean_of_24_clips_in_micro_batches_of_a_steps_size(monkeypatch):
    sizes, losses = [], []
    for batch_size, accumulate in ((24, 1), (6, 2)):
        stage, clips = make_stage("video", batch_size=batch_size, accumulate=accumulate)
        held_out = ShapesDataset("test", 4, 32)
        forward = stage.forward
        stage.forward = lambda batch, draw, forward=forward: sizes.append(
            len(batch.clips)) or forward(batch, draw)
        losses.append(train.held_out_loss(stage, train.Data(clips, held_out), 0))
    assert sizes == [24] + 8 * [3]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_held_out_loss_of_single_frames_is_that_of_clips_and_of_pictures():
    captions = []
    for name in ("image", "video"):
        stage, clips = make_stage(name, batch_size=24)
        forward = stage.forward
        stage.forward = lambda batch, draw, forward=forward: captions.extend(
            batch.captions) or forward(batch, draw)
        data = train.Data(clips, ShapesDataset("test", 4, 32), clips, ShapePictures("test", 32))
        train.held_out_loss(stage, data, 0)
    words = [len(caption.split()) for caption in captions]  # "a red circle", "... growing"
    assert len(words) == 48 and words[:24].count(3) == 12 and words[24:].count(3) == 0


@pytest.mark.parametrize("size, count, processes, sizes", [
    (8, 1, 1, [[8]]), (8, 2, 2, [[2, 2], [2, 2]]), (7, 2, 1, [[4, 3]]), (3, 4, 2, [[2], [1]]),
    (9, 2, 4, [[2, 1], [1, 1], [1, 1], [1, 1]])])
def test_micro_batches_share_a_step_and_every_process_has_equally_many(
        monkeypatch, size, count, processes, sizes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    seen = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        shards = [[*range(size)[shard]] for shard in train.micro_batches(size, count)]
        assert [*map(len, shards)] == sizes[rank]
        seen += sum(shards, [])
    assert sorted(seen) == [*range(size)]


def test_how_many_processes_train_follows_the_cores_and_the_stages_that_run(monkeypatch):
    vae, video, interpolate = (stages.STAGES[name] for name in ("vae", "video", "interpolate"))
    for cores, chosen, settings, count in (
            (2, [vae, video], {}, 2), (64, [vae, video], {}, 2), (64, [video], {}, 4),
            (1, [video], {}, 1), (64, [interpolate], {}, 4), (64, [video], {"batch_size": 6}, 2),
            (64, [video], {"batch_size": 6, "accumulate": 3}, 2),
            (64, [video], {"batch_size": 1, "accumulate": 2}, 1)):
        monkeypatch.setattr(train, "usable_cores", lambda cores=cores: cores)
        s = train.Settings(**settings)
        assert train.count_processes(s, chosen, 8) == count, (cores, chosen, settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_eight_processes_train_every_preset_by_its_defaults(preset, capsys):
    s = train.Settings(**train.PRESET_SETTINGS.get(preset, {}))
    fitted = train.fit_batch(s, {}, 8)
    assert fitted.batch_size % 8 == 0 and fitted.batch_size <= max(s.batch_size, 8)
    assert ("--batch-size 8: one clip" in capsys.readouterr().out) == (s.batch_size < 8)
    with pytest.raises(InputError, match="--batch-size 1, --accumulate 1: give multiples of 8"):
        train.fit_batch(train.Settings(batch_size=1), {"batch_size": 1}, 8)


def test_mistakes_of_any_stage_are_told_before_the_first_and_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match='--trainable "adaptor": matches nothing that stage'):
        train.main([*SHORT, "--trainable", "adaptor"])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# Processes


MANY = ["--vae-steps", "3", "--image-steps", "2", "--video-steps", "2", "--cache", "6",
        "--batch-size", "4", "--vae-batch-size", "8", "--muon-lr", "0", "--sample-every", "0",
        "--save-every", "1", "--device", "cpu"]


def train_rank(rank, count, port, folder, arguments, dtype, prepare):
    """Be one of the processes that torchrun starts."""
    os.chdir(folder)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    PRESETS["tiny"] = MagicVideoConfig(**TINIER)
    prepare()
    train.main(arguments)


def train_by(count, *arguments, dtype=torch.float64, prepare=bool):
    """Train by `count` processes, forked from one that has imported torch and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=train_rank, args=(rank, count, port, os.getcwd(),
                                                          arguments, dtype, prepare))
                 for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * count


def test_two_processes_of_two_micro_batches_train_as_one_of_one_does():
    # 9 single frames and then 2 clips a step: the shares are not equal
    for count in (1, 2):
        train_by(count, *MANY, "--accumulate", str(count), "--vae-batch-size", "9", "--out",
                 f"ranks{count}")
    one, two = stored("ranks1"), stored("ranks2")
    assert all(close(one[key], two[key], 1e-9) for key in one)
    assert [{**row, "seconds": ""} for row in rows("ranks1")] == [
        {**row, "seconds": ""} for row in rows("ranks2")]


def keep_a_copy():
    """Keep a copy of the run as it is after its third step."""
    save = train.save_run
    train.save_run = lambda out, stage, step, *rest: (
        save(out, stage, step, *rest), step == 3 and shutil.copytree(out, "half"))


def test_a_resumed_run_of_four_processes_ends_with_the_very_weights():
    train_by(4, *MANY, "--vae-steps", "1", "--image-steps", "6", "--video-steps", "0",
             "--save-every", "3", "--out", "whole", dtype=torch.float32, prepare=keep_a_copy)
    train_by(4, "--resume", "--out", "half", dtype=torch.float32)
    assert equal(stored("whole"), stored("half"))


def test_where_processes_are_stopped_none_leaves_before_the_run_is_saved():
    Path("slow.py").write_text(
        "import os, sys, time, signal\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import train\n"
        "from test_train import PRESETS, TINIER, MagicVideoConfig\n"
        "PRESETS['tiny'] = MagicVideoConfig(**TINIER)\n"
        "save = train.save_run\n"
        "train.save_run = lambda *a: (time.sleep(2), save(*a), print('saved', flush=True))\n"
        "check = train.check_finite\n"
        "train.check_finite = lambda stage, step, *a: (\n"
        "    step == 2 and os.kill(os.getpid(), signal.SIGTERM), check(stage, step, *a))\n"
        "try:\n"
        "    train.main(sys.argv[1:], __file__)\n"
        "except train.InputError as error:\n"
        "    print('left', flush=True)\n"
        "    sys.exit(2)\n")
    done = subprocess.run([sys.executable, "slow.py", *SHORT, "--stage", "vae", "--vae-steps", "99",
                           "--out", "run", "--ranks", "2"], capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 2, done.stderr
    said = done.stdout  # of both processes, whose lines may run into each other
    assert -1 < said.find("saved") < said.find("left"), said + done.stderr
    assert load_checkpoint("run/checkpoint.pt", "magicvideo-training")["step"] in (3, 4)


def test_where_a_process_dies_the_others_end_in_one_line_and_the_run_goes_on():
    Path("ranks.py").write_text(
        "import os, sys, torch\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import train, stages\n"
        "from test_train import PRESETS, TINIER, MagicVideoConfig\n"
        "PRESETS['tiny'] = MagicVideoConfig(**TINIER)\n"
        "torch.set_num_threads(1)\n"
        "if train.process_rank() == 1:\n"
        "    stages.Image.forward = lambda *arguments: os._exit(9)\n"
        "train.run_command('train.py', lambda: train.main(sys.argv[1:], __file__))\n")
    done = subprocess.run([sys.executable, "ranks.py", *MANY, "--out", "run", "--ranks", "2"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"another process has ended; go on with --resume --out run", done.stderr)
    assert load_checkpoint("run/checkpoint.pt", "magicvideo-training")["step"] == 3
    train_by(2, *MANY, "--resume", "--out", "run", dtype=torch.float32)
    assert [r["stage"] for r in rows("run")] == ["vae"] * 3 + ["image"] * 2 + ["video"] * 2


# --------------------------------------------------------------------------------------------------
# Mistakes of users


@pytest.mark.parametrize("flags, words", [
    (["--preset", "huge"], '--preset "huge".*tiny, laptop, small, paper'),
    (["--stage", "audio"], '--stage "audio".*vae, image, video'),
    (["--stage", "video"], "--stage video.*--init-from"),
    (["--init-from", "owner/name"], "owner/name: no such file .* nothing is downloaded"),
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--held-out", "nowhere.txt"], "--held-out nowhere.txt: no such file"),
    (["--out", "/dev/null"], "--out /dev/null: cannot be written"),
    (["--batch-size", "0"], "--batch-size 0: give 1"),
    (["--batch-size", "3", "--accumulate", "2"], "--batch-size 3, .*: give multiples of"),
    (["--lr", "nan"], "--lr nan"),
    (["--vae-steps", "0", "--image-steps", "0", "--video-steps", "0"], "--video-steps 0: trains"),
    (["--ema", "1.5"], "--ema 1.5: give 0 to 1"),
    (["--seed", str(2**32)], "--seed 4294967296: give 0 to 4294967295"),
    (["--precision", "fp8"], '--precision "fp8": use fp32, bf16'),
    (["--trainable", "("], r'--trainable "\(": '),
    (["--resume"], "--resume: name the run's folder with --out"),
    (["--max-frames", "0"], "--max-frames 0: give 1"),
    (["--images", "shapes", "--data", "shapes", "--picture-every", "1"], "no step for clips"),
    (["--stage", "upscale", "--images", "shapes"], "--stage upscale: needs a trained model"),
    (["--init-from", str(ROOT / "checkpoints/animations.pt")], "animations.pt: add --data FOLDER"),
    (["--resume", "--out", "empty"], "--resume: no checkpoint.pt in empty"),
])
def test_wrong_flags_are_one_line_and_write_nothing(tmp_path, flags, words):
    with pytest.raises(InputError) as error:
        train.main([*SHORT, *flags])
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_code_says_how_to_go_on(whole):
    contents = load_checkpoint(whole / "checkpoint.pt", "magicvideo-training")
    settings = {**json.loads(contents["settings"]), "levers": 3}
    runs.save_checkpoint("old/checkpoint.pt", {**contents, "settings": json.dumps(settings)})
    with pytest.raises(InputError, match="old/checkpoint.pt: .*--init-from old/model.pt"):
        train.main(["--resume", "--out", "old"])


def test_the_command_ends_with_status_2_and_no_traceback_for_a_users_mistake():
    for script, flags in (("train.py", ["--preset", "huge"]), ("sample.py", ["a", "--steps", "0"])):
        done = subprocess.run([sys.executable, ROOT / script, *flags], capture_output=True,
                              text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{script}: --")
