"""Training: its stages, the files it writes, stopping and going on, and that it learns."""

import csv
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cascade
import runs
import train
from clip_text import CLIPTextConfig
from conftest import close
from data import ShapesDataset
from runs import InputError
from magicvideo import PRESETS, MagicVideo, MagicVideoConfig
from runs import load_checkpoint
from clip_files import write_clip
from stable_diffusion import is_video_parameter
from tiny import VDiffusion, set_learning_rates
from unet3d import Level, UNet3D, UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).parent.parent
TINIER = dict(
    size=32, preset="tiny", staggered=True,
    text=CLIPTextConfig(vocab_size=560, context_length=12, width=32, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 16), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, groups=4,
                    context_width=32, frames=4))
SHORT = ["--vae-steps", "2", "--image-steps", "2", "--video-steps", "2",
         "--interpolate-steps", "2", "--upscale-steps", "2", "--cache", "4", "--batch-size", "2",
         "--vae-batch-size", "8", "--device", "cpu"]
RUN = {}


@pytest.fixture(autouse=True)
def tinier_preset(monkeypatch, tmp_path):
    """Runs go to an empty folder, with a tiny preset that is tinier still."""
    monkeypatch.chdir(tmp_path)
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
    with open(Path(out) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def items_of(stage, size=4, frames=4, s=None):
    """A model, and the arguments of a stage's loss."""
    s = s or train.Settings()
    torch.manual_seed(0)
    model = MagicVideo.from_preset("tiny")
    clips = ShapesDataset("train", 4, 32)
    items, random = train.read_batch(clips, size, 0, stage, s)
    network = model.vae if stage == "vae" else model.unet
    return model, train.StageLoss(model, network, stage, s), items, random


# --------------------------------------------------------------------------------------------------
# What a run leaves


def test_without_flags_every_stage_runs_and_the_last_line_says_where_everything_is(capsys):
    train.main(SHORT)
    out = Path("runs/shapes")
    drawn = {"loss.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {p.name for p in out.iterdir()} == {"model.pt", "checkpoint.pt", "log.csv",
                                               "samples"} | drawn
    stages = train.BASE_STAGES
    assert {p.name for p in (out / "samples").iterdir()} == {f"{s}-000002.png" for s in stages}
    assert [(r["stage"], r["step"]) for r in rows(out)] == [(s, n) for s in stages for n in "12"]
    assert all(math.isfinite(float(row["loss"])) for row in rows(out))
    assert all(math.isfinite(float(row["held_out_loss"])) for row in rows(out)[1::2])
    said = capsys.readouterr().out.strip().splitlines()
    assert "runs/shapes/model.pt" in said[-2] and said[-1].startswith("next: python sample.py 'a ")
    train.main(SHORT)
    assert (Path("runs/shapes-2") / "model.pt").is_file()


def test_it_says_how_long_a_run_will_take_and_which_flag_makes_it_shorter(monkeypatch, capsys):
    taken = {"vae": 0.4, "image": 0.3, "video": 3.1}
    monkeypatch.setattr(train, "estimate_minutes", lambda model, clips, stage, s: taken[stage])
    monkeypatch.setattr(train, "train_stage", lambda *arguments: None)
    train.main([*SHORT[:4], "--video-steps", "200", *SHORT[6:]])
    said = capsys.readouterr().out
    assert "about 4 minutes on this machine; fewer --video-steps make it shorter" in said
    assert "stage video: about 3.1 minutes" in said


@pytest.mark.parametrize("stage", train.ALL_STAGES)
def test_a_stages_time_is_that_of_its_steps_and_timing_changes_no_weight(stage):
    model, _, _, _ = items_of(stage)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    scale = cascade.SCALE if stage == "upscale" else 1
    clips = ShapesDataset("train", 5 if stage == "interpolate" else 4, 32 * scale)
    s = train.Settings(batch_size=2, **{f"{stage}_steps": 10**6})
    assert train.estimate_minutes(model, clips, stage, s) > 10  # a step takes more than 0.6 ms
    assert equal(before, model.state_dict()) and all(p.grad is None for p in model.parameters())


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
    train.main([*SHORT, "--stage", "vae", "--out", "vae", "--save-every", "1"])
    assert len(seen) == 3 and 0.18215 not in seen
    model = MagicVideo.load("vae")
    clips = ShapesDataset("train", 4, 32)
    z = torch.cat([model.encode(clips[i]["video"][None]) for i in range(64)])
    assert z.std().item() == pytest.approx(1, abs=0.05)


# --------------------------------------------------------------------------------------------------
# Stopping and going on


@pytest.mark.parametrize("stop", [1, 2, 3, 6])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
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
    assert Path("run/log.csv").read_bytes() == log

    def locked(*arguments):
        raise PermissionError(13, "a spreadsheet has it open")

    monkeypatch.setattr(train, "append_log", locked)
    monkeypatch.setattr(train, "write_clip", locked)
    train.main([*SHORT, "--out", "locked"])
    said = capsys.readouterr().err
    assert "row 2 of locked/log.csv is left out: [Errno 13] a spreadsheet" in said
    assert "samples/vae-000002.png is left out" in said
    assert equal(weights(whole), weights("locked"))


def test_two_trainings_at_once_do_not_share_a_folder():
    first, log = runs.claim_folder(None, "shapes")
    second, other = runs.claim_folder(None, "shapes")
    assert (first, second) == (Path("runs/shapes"), Path("runs/shapes-2"))
    with pytest.raises(InputError, match="--out runs/shapes: another training writes there"):
        train.main([*SHORT, "--out", "runs/shapes"])
    log.close()
    other.close()


def test_a_folder_of_clips_is_described_and_what_does_not_change_a_run_may_change(
        monkeypatch, capsys):
    monkeypatch.setitem(train.PRESET_SETTINGS, "laptop", {"vae_steps": 8})
    for n in range(4):
        write_clip(f"clips/{n}.gif", ShapesDataset("train", 8, 32)[n]["video"], 8)
        Path(f"clips/{n}.txt").write_text(["long " * 80, "short", "short", ""][n])
    train.main(["--data", "clips", "--out", "run", *SHORT[2:]])
    said = capsys.readouterr().out
    assert "clips: 4 clips (0 folders of pictures), decoded once to runs/frames/" in said
    assert "captions: 1 missing, 1 the same as another, 1 cut at 77 tokens; 1 clips held" in said
    assert "preset laptop: 2 steps of stage vae, 2 steps of stage image, 2 steps" in said
    assert "stage video: the held-out loss was lowest at step 2" in said
    finished = weights("run")
    Path("clips").rename("moved")
    train.main(["--resume", "--out", "run", "--data", "moved/", "--save-every", "7",
                "--device", "cpu"])
    assert equal(finished, weights("run")) and len([*Path("runs/frames").glob("*.u8")]) == 1
    Path("moved/0.gif").unlink()
    with pytest.raises(InputError, match="--data moved: its clips are not those"):
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

    forward = train.StageLoss.forward
    monkeypatch.setattr(train.StageLoss, "forward", lambda *arguments: (
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
    vae, image, video = (weights(stage) for stage in train.BASE_STAGES)

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


def test_a_start_from_a_model_keeps_its_vae_and_its_presets_settings(monkeypatch, whole, capsys):
    model = MagicVideo.load(whole)
    model.config.preset = "small"
    model.save("small.pt")
    seen = []
    monkeypatch.setattr(train, "train_stage", lambda *arguments: seen.append(arguments[4:6]))
    train.main(["--init-from", "small.pt", "--out", "run", "--device", "cpu"])
    assert [stage for stage, _ in seen] == ["image", "video"]
    assert "VAE of small.pt stays" in capsys.readouterr().out
    s = seen[0][1]
    assert (s.preset, s.lr, s.muon_lr, s.batch_size) == ("small", 2e-4, 0.0, 8)


def test_a_model_of_other_frames_is_refused_and_data_is_cut_to_the_models(monkeypatch, whole):
    with pytest.raises(InputError, match="--frames 6.*makes 4"):
        train.main([*SHORT, "--init-from", str(whole), "--frames", "6"])
    seen = []
    monkeypatch.setattr(train, "train_stage", lambda model, clips, *_: seen.append(clips.frames))
    train.main([*SHORT, "--init-from", str(whole), "--out", "run"])
    assert seen == [4, 4]


@pytest.mark.parametrize("stage", cascade.CASCADE_STAGES)
def test_a_cascade_stage_adds_its_network_and_leaves_the_model_as_it_was(stage, whole):
    train.main([*SHORT, "--stage", stage, "--init-from", str(whole), "--out", stage])
    model = MagicVideo.load(stage)
    assert list(model.cascade) == [stage] and equal(model.state_dict(), weights(whole))
    untrained = cascade.build(MagicVideo.load(whole), stage).state_dict()
    assert not equal(untrained, cascade.build(model, stage).state_dict())
    assert [(r["stage"], r["step"]) for r in rows(stage)] == [(stage, "1"), (stage, "2")]


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_start_from_stable_diffusion_keeps_the_text_encoder_and_the_vae_as_they_are(pretrained):
    model = MagicVideo.from_preset("tiny")
    model.config.pretrained = pretrained
    parts = {}
    for stage, network in (("vae", model.vae), ("image", model.unet), ("video", model.unet)):
        groups = train.parameter_groups(model, network, stage, train.Settings())
        parts[stage] = {id(p) for group in groups for p in group["params"]}
    text = {id(p) for p in model.text_encoder.parameters()}
    encoder = {id(p) for p in model.vae.encoder.parameters()}
    temporal = {id(p) for name, p in model.vae.named_parameters() if "temporal" in name}
    assert (text <= parts["video"], encoder <= parts["vae"]) == (not pretrained,) * 2
    assert not pretrained or parts["vae"] == temporal and not text & parts["image"]


def test_trainable_chooses_weights_by_name_and_refuses_what_matches_nothing():
    train.main([*SHORT, "--out", "run", "--stage", "vae", "--trainable", "decoder"])
    torch.manual_seed(0)
    before = MagicVideo.from_preset("tiny").state_dict()
    changed = {name for name, p in weights("run").items() if not torch.equal(p, before[name])}
    assert changed and all("decoder" in name or "quant_conv.bias" in name for name in changed)
    assert MagicVideo.load("run").config.vae.scaling_factor == 0.18215  # latents mean what they did
    with pytest.raises(InputError, match='--trainable "adapter": matches nothing'):
        train.main([*SHORT, "--out", "other", "--trainable", "adapter"])


# --------------------------------------------------------------------------------------------------
# A step


def test_the_image_stage_reads_single_frames_without_fps_and_the_video_stage_clips(monkeypatch):
    for stage, frames, shape in (("image", 1, (4, 1)), ("video", 4, (4, 4))):
        model, stage_loss, items, random = items_of(stage)
        seen = {}
        monkeypatch.setattr(model.diffusion, "loss", lambda network, z0, context, fps, t, eps: (
            seen.update(z0=z0, fps=fps, t=t, eps=eps) or z0.mean((1, 2, 3, 4))))
        stage_loss(items, random, frames)
        assert seen["z0"].shape == seen["eps"].shape == (*shape, 4, 4, 4)
        assert seen["fps"] is None if stage == "image" else seen["fps"].shape == (4,)
        assert seen["t"].shape == (4,) and seen["z0"].std() > 0.01


def test_the_loss_that_trains_is_the_diffusions_own():
    model, stage_loss, items, random = items_of("video")
    errors, t = stage_loss(items, random, 4)
    _, again = train.read_batch(ShapesDataset("train", 4, 32), 4, 0, "video", train.Settings())
    again(lambda shape, generator: torch.randint(1, shape, generator=generator))
    keep = again(torch.rand) >= train.Settings().text_dropout
    captions = [item["caption"] if kept else "" for item, kept in zip(items, keep)]
    assert torch.equal(again(lambda shape, generator: torch.randint(1000, shape,
                                                                    generator=generator)), t)
    z0 = model.encode(torch.stack([item["video"] for item in items]))
    fps = torch.tensor([item["fps"] for item in items])
    expected = model.diffusion.loss(model.unet, z0, model.encode_text(captions), fps, t,
                                    again(torch.randn, *z0.shape[1:]))
    assert torch.equal(errors, expected)


def test_captions_are_dropped_as_often_as_asked(monkeypatch):
    model, stage_loss, items, random = items_of("video", 200, s=train.Settings(text_dropout=0.25))
    seen = []
    monkeypatch.setattr(model, "encode_text", lambda captions: seen.extend(captions) or (
        torch.zeros(len(captions), 1, 32)))
    with torch.no_grad():
        stage_loss(items, random, 4)
    assert 0.15 < seen.count("") / 200 < 0.35


def test_the_vae_loss_is_the_squared_error_and_the_divergence_of_its_posterior(monkeypatch):
    s = train.Settings(kl_weight=0.5)
    model, stage_loss, items, random = items_of("vae", s=s)
    seen = {}
    encode, decode = model.vae.encode, model.vae.decode
    monkeypatch.setattr(model.vae, "encode", lambda video: seen.setdefault(
        "posterior", encode(seen.setdefault("video", video))))
    monkeypatch.setattr(model.vae, "decode", lambda z: seen.setdefault("decoded", decode(z)))
    errors, t = stage_loss(items, random, 1)
    mean, logvar = seen["posterior"]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0, 1))
    expected = (seen["decoded"] - seen["video"]).square().mean() + 0.5 * kl.mean()
    assert t is None and torch.allclose(errors.mean(), expected, rtol=1e-5)


def test_temporal_layers_of_the_vae_start_at_their_peak_rate_when_clips_begin():
    model = MagicVideo.from_preset("tiny")
    s = train.Settings(vae_steps=100, warmup=1)
    optimizers, _ = train.prepare(model, model.vae, "vae", s, None)
    image, video = optimizers[0].param_groups
    assert video["start"] == 80 and image["start"] == 0
    set_learning_rates(optimizers, (s.lr, s.muon_lr), 80, 100, s.warmup)
    assert video["lr"] == pytest.approx(s.lr)
    assert image["lr"] < 0.1 * s.lr
    set_learning_rates(optimizers, (s.lr, s.muon_lr), 80, 100, warmup=10)
    assert video["lr"] == pytest.approx(0.1 * s.lr)  # a warm-up of their own


def test_bf16_trains_weights_that_stay_in_float32_near_those_of_fp32(whole):
    train.main([*SHORT, "--out", "bf16", "--precision", "bf16"])
    one, other = weights(whole), weights("bf16")
    assert {p.dtype for p in other.values()} == {torch.float32} and not equal(one, other)
    assert max((one[key] - other[key]).abs().max().item() for key in one) < 0.02


def test_gradient_checkpointing_keeps_less_and_trains_the_same_weights(whole, monkeypatch):
    kept = {}
    forward = train.StageLoss.forward

    def counted(*arguments):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            loss = forward(*arguments)
        kept[out] = sum(sizes)
        return loss

    monkeypatch.setattr(train.StageLoss, "forward", counted)
    for out, flags in (("kept", []), ("again", ["--gradient-checkpointing"])):
        train.main([*SHORT, "--out", out, "--sample-every", "0", *flags])
    assert kept["again"] < 0.5 * kept["kept"]
    assert equal(weights("kept"), weights("again"))


def test_every_item_comes_up_once_an_epoch_in_a_new_order():
    items = [{"n": n} for n in range(10)]
    seen = [item["n"] for step in range(6)
            for item in train.read_batch(items, 5, step, "video", train.Settings())[0]]
    epochs = [seen[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_one_clip_can_be_learned_by_heart():
    torch.manual_seed(0)
    unet = UNet3D(UNetConfig(channels=(32, 32), attention=(True, True), layers=1, heads=2, groups=4,
                             context_width=8, frames=4))
    diffusion = VDiffusion()
    z0, context = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 2, 8)
    batch = z0.expand(8, -1, -1, -1, -1), context.expand(8, -1, -1), torch.full((8,), 8.0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        loss = diffusion.loss(unet, *batch, generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.25 * losses[0]
    sampled = diffusion.sample(unet, z0.shape, context, context, torch.full((1,), 8.0), steps=25,
                               guidance=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.corrcoef(torch.stack([sampled.flatten(), z0.flatten()]))[0, 1] > 0.9


# --------------------------------------------------------------------------------------------------
# Processes


def run_ranks(out, count, *flags, kill_rank=None):
    """Train the tinier preset in float64 by `count` processes."""
    script = (
        "import os, sys, torch\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "torch.set_default_dtype(torch.float64)\n"
        "import train, runs\n"
        "from test_train import PRESETS, TINIER, MagicVideoConfig\n"
        "PRESETS['tiny'] = MagicVideoConfig(**TINIER)\n"
        f"if train.rank() == {kill_rank}:\n"
        "    loss = train.StageLoss.forward\n"
        "    train.StageLoss.forward = lambda self, *a: (\n"
        "        os._exit(9) if self.stage == 'image' else loss(self, *a))\n"
        "torch.set_num_threads(1)\n"
        "try:\n"
        "    train.main(sys.argv[1:], __file__)\n"
        "except train.InputError as error:\n"
        "    if train.rank() == 0:\n"
        "        print(error, file=sys.stderr)\n"
        "    sys.exit(2)\n")
    Path("ranks.py").write_text(script)
    flags = ["--vae-steps", "3", "--image-steps", "2", "--video-steps", "2", "--cache", "6",
             "--batch-size", "4", "--vae-batch-size", "8", "--muon-lr", "0", "--sample-every", "0",
             "--save-every", "1", "--device", "cpu", *flags]
    return subprocess.run([sys.executable, "ranks.py", *flags, "--out", out, "--ranks", str(count)],
                          capture_output=True, text=True, timeout=300)


def test_two_processes_of_two_micro_batches_train_as_one_of_one_does():
    for count in (1, 2):
        done = run_ranks(f"ranks{count}", count, "--accumulate", str(count))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done in") == 1
    one, two = stored("ranks1"), stored("ranks2")
    assert all(close(one[key], two[key], 1e-9) for key in one)
    assert [r["loss"] for r in rows("ranks1")] == [r["loss"] for r in rows("ranks2")]


def test_where_a_process_dies_the_others_end_in_one_line_and_the_run_goes_on():
    done = run_ranks("run", 2, kill_rank=1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"another process has ended; go on with --resume --out run", done.stderr)
    assert load_checkpoint("run/checkpoint.pt", "magicvideo-training")["step"] == 3
    done = run_ranks("run", 2, "--resume")
    assert done.returncode == 0, done.stderr
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
