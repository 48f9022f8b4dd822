"""Training: the stages, the files they write, stopping and going on, and that it learns."""

import csv
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import train
from clip_text import CLIPTextConfig
from conftest import randn, shaken
from data import InputError, ShapesDataset, write_clip
from diffusion import Diffusion, DiffusionConfig
from magicvideo import PRESETS, MagicVideo, MagicVideoConfig
from unet3d import Level, UNet3D, UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).parent.parent
SHORT = ["--vae-steps", "2", "--image-steps", "2", "--video-steps", "2", "--cache", "4", "--batch-size", "2",
         "--vae-batch-size", "1", "--device", "cpu"]
WHOLE = {}


@pytest.fixture(autouse=True)
def smallest_preset(monkeypatch, tmp_path):
    """Runs go to an empty folder, with a tiny preset that is tinier still."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", MagicVideoConfig(
        size=32, text=CLIPTextConfig(vocab_size=560, context_length=12, width=32, layers=1, heads=2),
        vae=VAEConfig(channels=(8, 8, 8, 16), layers=1, groups=4),
        unet=UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, groups=4, context_width=32,
                        frames=4)))


@pytest.fixture
def whole(smallest_preset, tmp_path_factory):
    """The weights that an undisturbed run ends with."""
    if not WHOLE:
        out = tmp_path_factory.mktemp("whole") / "run"
        train.main([*SHORT, "--out", str(out)])
        WHOLE.update(weights(out / "model.pt"))
    return WHOLE


def weights(path):
    return MagicVideo.load(path).state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_without_flags_every_stage_runs_and_the_last_line_says_where_everything_is(tmp_path, capsys):
    train.main(SHORT)
    out = Path("runs/shapes")
    drawn = {"loss.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {p.name for p in out.iterdir()} == {"model.pt", "checkpoint.pt", "log.csv", "samples", "latents.pt"} | drawn
    assert {p.name for p in (out / "samples").iterdir()} == {f"{stage}-000002.png" for stage in train.STAGES}
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, n) for stage in train.STAGES for n in "12"]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    last = capsys.readouterr().out.strip().splitlines()
    assert "runs/shapes/model.pt" in last[-2] and last[-1].startswith('next: python sample.py "a ')


def test_a_second_run_takes_a_folder_of_its_own(tmp_path):
    assert train.new_folder("shapes") == Path("runs/shapes")
    Path("runs/shapes").mkdir(parents=True)
    Path("runs/shapes-2").mkdir()
    assert train.new_folder("shapes") == Path("runs/shapes-3")


@pytest.mark.parametrize("stop", [1, 2, 3, 6])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_ends_with_the_very_weights_of_an_undisturbed_one(stop, by, whole, monkeypatch):
    counted, clip_grad_norm = iter(range(1, 100)), torch.nn.utils.clip_grad_norm_

    def signalled(*arguments):  # in the middle of a step
        if next(counted) == stop:
            os.kill(os.getpid(), by)
        return clip_grad_norm(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", signalled)
    with pytest.raises(InputError, match="--resume --out stopped"):
        train.main([*SHORT, "--out", "stopped"])
    assert len(Path("stopped/log.csv").read_text().splitlines()) == stop + 1  # the step at hand is finished and saved
    train.main(["--resume", "--out", "stopped", "--device", "cpu"])
    assert equal(whole, weights("stopped/model.pt"))


@pytest.mark.parametrize("drawn", [3, 4, 6])
def test_a_signal_while_a_picture_is_drawn_loses_no_step(drawn, whole, monkeypatch):
    pictures, picture = iter(range(1, 100)), train.picture

    def signalled(*arguments):  # when it is settled already whether this step is saved
        if next(pictures) == drawn:
            os.kill(os.getpid(), signal.SIGTERM)
        picture(*arguments)

    monkeypatch.setattr(train, "picture", signalled)
    with pytest.raises(InputError, match="--resume --out stopped"):
        train.main([*SHORT, "--out", "stopped", "--sample-every", "1"])
    checkpoint = train.read_checkpoint("stopped/checkpoint.pt", "magicvideo-training")
    last = Path("stopped/log.csv").read_text().splitlines()[-1]
    assert last.startswith(f"{checkpoint['stage']},{checkpoint['step']},")
    train.main(["--resume", "--out", "stopped", "--device", "cpu"])
    assert equal(whole, weights("stopped/model.pt"))


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_its_log_says_every_step_once(whole, monkeypatch):
    counted, log = iter(range(1, 100)), train.log

    def killed(*arguments):
        log(*arguments)
        if next(counted) == 4:
            raise SystemExit("killed")

    monkeypatch.setattr(train, "log", killed)
    with pytest.raises(SystemExit):
        train.main([*SHORT, "--out", "run"])
    monkeypatch.setattr(train, "log", log)
    assert len(Path("run/log.csv").read_text().splitlines()) == 5
    train.main(["--resume", "--out", "run", "--device", "cpu"])
    rows = list(csv.DictReader(open("run/log.csv")))
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, n) for stage in train.STAGES for n in "12"]
    assert equal(whole, weights("run/model.pt"))


def test_a_finished_run_resumes_to_itself(whole):
    train.main([*SHORT, "--out", "mine"])
    train.main(["--resume", "--out", "mine", "--device", "cpu"])
    assert equal(whole, weights("mine/model.pt"))


def test_a_stop_before_the_first_step_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_stage", interrupted)
    with pytest.raises(InputError, match="nothing was written"):
        train.main(SHORT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said, error", [
    ("DataLoader worker (pid 7) is killed by signal: Terminated.", InputError), ("other", RuntimeError)])
def test_a_reader_that_is_ended_is_one_line_and_other_errors_stay_what_they_are(said, error, monkeypatch):
    def ended(*arguments):
        raise RuntimeError(said)

    monkeypatch.setattr(train, "train_stage", ended)
    with pytest.raises(error, match=re.escape(said)) as caught:
        train.main(SHORT)
    assert type(caught.value) is error and (error is RuntimeError or "--resume --out" in str(caught.value))


def test_the_same_seed_makes_the_same_model_and_another_seed_another():
    for out, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        train.main([*SHORT, "--out", out, "--seed", seed])
    assert equal(weights("one/model.pt"), weights("two/model.pt"))
    assert not equal(weights("one/model.pt"), weights("three/model.pt"))


def test_a_stage_trains_its_own_parts_and_no_others():
    train.main([*SHORT, "--out", "vae", "--stage", "vae"])
    train.main([*SHORT, "--out", "image", "--stage", "image", "--init-from", "vae/model.pt"])
    train.main([*SHORT, "--out", "video", "--stage", "video", "--init-from", "image/model.pt"])
    steps = [weights(f"{stage}/model.pt") for stage in train.STAGES]

    def changed(before, after, part):
        return {key for key in before if part(key) and not torch.equal(before[key], after[key])}

    def video_part(key):
        return key.startswith("unet.") and train.is_new_part(key)

    def image_part(key):
        return key.startswith("unet.") and not train.is_new_part(key)

    assert not changed(steps[0], steps[1], lambda key: key.startswith("vae."))
    assert not changed(steps[0], steps[1], video_part) and len(changed(steps[0], steps[1], image_part)) > 100
    assert changed(steps[0], steps[1], lambda key: key.startswith("text_encoder."))
    assert not changed(steps[1], steps[2], lambda key: key.startswith("vae."))
    assert len(changed(steps[1], steps[2], video_part)) > 30 and len(changed(steps[1], steps[2], image_part)) > 100


def test_bf16_trains_weights_that_stay_in_float32_near_those_of_fp32():
    for precision in ("fp32", "bf16"):
        train.main([*SHORT, "--out", precision, "--precision", precision])
    one, other = weights("fp32/model.pt"), weights("bf16/model.pt")
    assert {p.dtype for p in other.values()} == {torch.float32}
    assert not equal(one, other)
    assert max((one[key] - other[key]).abs().max().item() for key in one) < 0.02  # lr 2.5e-3, new parts x 5


def test_gradient_checkpointing_gives_equal_gradients():
    torch.manual_seed(0)
    unet, gradients = shaken(UNet3D(PRESETS["tiny"].unet)), []
    inputs = randn(2, 4, 4, 4, 4), torch.tensor([7, 900]), randn(2, 5, 32), torch.tensor([8.0, 12.0])
    for asked in (False, True):
        for module in unet.modules():
            if isinstance(module, Level):
                module.checkpointing = asked
        unet.zero_grad()
        unet(*inputs).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_the_papers_sizes_take_a_step_of_two_frames():
    """The new parts alone, in 6 GB; all weights need 21 GB (`train.py --preset paper --frames 2`, see README)."""
    if not hasattr(os, "sysconf") or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 10e9:
        pytest.skip("less than 10 GB of memory are free: the paper's sizes would not fit")
    model, torch_threads = MagicVideo.from_preset("paper", frames=2), torch.get_num_threads()
    s = train.Settings(**{**train.PRESET_SETTINGS["paper"], "train": "new", "stage": "video"})
    parameters = [p for group in train.trained_parts(model, "video", s) for p in group["params"]]
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    for module in model.unet.modules():
        if isinstance(module, Level):
            module.checkpointing = s.gradient_checkpointing
    torch.set_num_threads(os.cpu_count())
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss, _ = unet_loss(model, ShapesDataset("train", 2, 64), 0, s, "video")  # all weights, few pixels
        loss.backward()
    finally:
        torch.set_num_threads(torch_threads)
    assert math.isfinite(loss.item()) and sum(p.numel() for p in parameters) == 51_883_856
    torch.optim.AdamW(parameters, lr=1e-4).step()
    assert all(p.isfinite().all() for p in parameters)


def unet_loss(model, clips, step, s, stage):
    """The loss of a whole batch and its bands."""
    source = train.Frames(clips) if stage == "image" and isinstance(clips, train.Latents) else clips
    items = train.latents_of(model, step_items(model, source, step, s, stage), stage)
    return train.unet_loss(model, items, step, s, stage)


def step_items(model, source, step, s, stage):
    """What a step reads."""
    return next(train.read(source, train.step_batches(model, source, stage, s, step), workers=0))


def vae_loss(model, clips, step, s):
    return train.vae_loss(model, step_items(model, clips, step, s, "vae"), step, s)


def test_gradient_checkpointing_is_asked_for_by_its_flag_and_keeps_less(monkeypatch):
    kept = {}
    step = train.unet_loss

    def counted(*arguments):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = step(*arguments)
        kept.setdefault(out, []).append(sum(sizes))
        return loss

    monkeypatch.setattr(train, "unet_loss", counted)
    for out, flag in (("kept", "--no-gradient-checkpointing"), ("again", "--gradient-checkpointing")):
        train.main([*SHORT, "--out", out, flag])
    assert kept["again"][-1] < 0.5 * kept["kept"][-1]
    assert equal(weights("kept/model.pt"), weights("again/model.pt"))


def test_the_image_stage_reads_no_fps_and_the_video_stage_does(monkeypatch):
    model = MagicVideo.from_preset("tiny")
    clips = ShapesDataset("train", 4, 32)
    seen = {}
    monkeypatch.setattr(model.diffusion, "errors", lambda unet, z0, context, fps, generators: seen.update(
        shape=z0.shape, fps=fps) or (z0.sum((2, 3, 4)), torch.zeros(z0.shape[:2], dtype=torch.long)))
    unet_loss(model, clips, 0, train.Settings(batch_size=2), "image")
    assert seen["shape"] == (8, 1, 4, 4, 4) and seen["fps"] is None
    unet_loss(model, train.Latents(model, clips, 8), 0, train.Settings(batch_size=2), "image")
    assert seen["shape"] == (8, 1, 4, 4, 4) and seen["fps"] is None
    unet_loss(model, clips, 0, train.Settings(batch_size=2), "video")
    assert seen["shape"] == (2, 4, 4, 4, 4) and seen["fps"].shape == (2,)


def test_bf16_reaches_the_threads_that_compute_parts(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "unet_loss", lambda model, *_: seen.append(torch.is_autocast_enabled("cpu")) or (
        model.unet.conv_in.weight.square().sum(), [None] * 4))
    for precision in ("fp32", "bf16"):
        train.main([*SHORT, "--out", precision, "--precision", precision, "--sample-every", "0"])
    assert seen == [False] * 8 + [True] * 8  # two stages of two steps in two parts


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_start_from_stable_diffusion_keeps_the_text_encoder_and_the_vae_as_they_are(pretrained):
    model = MagicVideo.from_preset("tiny")
    model.config.pretrained = pretrained
    parts = {stage: {id(p) for group in train.trained_parts(model, stage, train.Settings()) for p in group["params"]}
             for stage in train.STAGES}
    text = {id(p) for p in model.text_encoder.parameters()}
    encoder = {id(p) for p in model.vae.encoder.parameters()}
    temporal = {id(p) for name, p in model.vae.named_parameters() if "temporal" in name}
    assert (text <= parts["video"], encoder <= parts["vae"]) == (not pretrained,) * 2
    assert not pretrained or (parts["vae"] == temporal and not text & parts["image"] and temporal)


def test_frozen_words_name_weights_that_stay_as_they_are_in_every_stage(tmp_path):
    train.main([*SHORT, "--out", "run", "--freeze", "adaptor,temporal", "--seed", "3"])
    torch.manual_seed(3)
    start, after = MagicVideo.from_preset("tiny").state_dict(), MagicVideo.load("run/model.pt").state_dict()
    frozen = {name for name in start if "adaptor" in name or "temporal" in name}
    same = {name for name in start if torch.equal(start[name], after[name])}
    assert frozen <= same and len(frozen) > 20 and len(same) < 0.5 * len(start)
    for words, mistake in (("adapter", '--freeze "adapter": no weight'), ("coder,quant", "leaves nothing to train")):
        with pytest.raises(InputError, match=mistake):
            train.main([*SHORT, "--out", "other", "--freeze", words])


def test_captions_are_left_out_as_often_as_asked(monkeypatch):
    model = MagicVideo.from_preset("tiny")
    seen = []
    encode_text = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda captions: seen.extend(captions) or encode_text(captions))
    clips = train.Latents(model, ShapesDataset("train", 4, 32), 4)
    with torch.no_grad():
        for step in range(25):
            unet_loss(model, clips, step, train.Settings(batch_size=40, text_dropout=0.25), "video")
    assert 0.2 < seen.count("") / len(seen) < 0.3


def test_latents_after_the_vae_stage_have_standard_deviation_one():
    model = MagicVideo.from_preset("tiny")
    clips = ShapesDataset("train", 4, 32)
    items = [train.encode(model, clips[i]) for i in range(64)]
    mean, logvar = (torch.stack([item[name] for item in items]) for name in ("mean", "logvar"))
    for noise in (0, 1):
        model.config.vae.scaling_factor = train.measure_scaling(model, clips, train.Settings(latent_noise=noise))
        latents = model.vae.sample_latents(mean, logvar, noise * torch.randn_like(mean))
        assert latents.std().item() == pytest.approx(1, abs=0.05)


def test_every_setting_and_every_size_is_read_somewhere():
    source = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for config in (train.Settings, MagicVideoConfig, UNetConfig, VAEConfig, CLIPTextConfig, DiffusionConfig):
        for f in fields(config):
            assert re.search(rf"(\bs|config|model|diffusion|self)\.{f.name}\b", source), f"{config.__name__}.{f.name}"


@pytest.mark.parametrize("thumbnail", [0, 0.7])
def test_the_vae_loss_is_the_squared_error_the_divergence_of_its_posterior_and_the_thumbnail(thumbnail, monkeypatch):
    model, clips = MagicVideo.from_preset("tiny"), ShapesDataset("train", 4, 32)
    seen = {}
    encode, decode = model.vae.encode, model.vae.decode
    monkeypatch.setattr(model.vae, "encode", lambda video: seen.setdefault(
        "posterior", encode(seen.setdefault("video", video))))
    monkeypatch.setattr(model.vae, "decode", lambda z, temporal: seen.setdefault("decoded", decode(z)))
    loss = vae_loss(model, clips, 0, train.Settings(kl_weight=0.5, thumbnail=thumbnail))
    mean, logvar = seen["posterior"]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0, 1)).mean()
    small = seen["video"].unflatten(-2, (4, 8)).unflatten(-1, (4, 8)).mean((-3, -1))  # 8 x 8 pixels each
    pull = (mean[:, :, :3] - 3 * (small - small.mean((0, 1, 3, 4))[:, None, None])).square().mean()
    numbers = mean.movedim(2, 0).flatten(1)
    pull = pull + (torch.cov(numbers)[3] - torch.tensor([0, 0, 0, 1.0])).square().mean()
    expected = (seen["decoded"] - seen["video"]).square().mean() + 0.5 * kl + thumbnail * pull
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_vae_sees_single_frames_first_and_whole_clips_last_unless_its_image_part_is_frozen(frozen):
    model, clips, s = MagicVideo.from_preset("tiny"), ShapesDataset("train", 4, 32), train.Settings(vae_steps=10)
    for name, p in model.vae.named_parameters():
        p.requires_grad_("temporal" in name or not frozen)
    shapes = []
    zeros = torch.zeros
    model.vae.encode = lambda video: shapes.append(tuple(video.shape[:2])) or (zeros(*video.shape[:2], 4, 4, 4),) * 2
    for step in range(10):
        vae_loss(model, clips, step, s)
    assert shapes == ([(3, 4)] * 10 if frozen else [(12, 1)] * 8 + [(3, 4)] * 2)


def test_the_vaes_temporal_layers_learn_from_clips_and_its_image_part_alone_from_single_frames():
    model, clips, s = MagicVideo.from_preset("tiny"), ShapesDataset("train", 4, 32), train.Settings(vae_steps=10)
    for p in model.vae.decoder.temporal_attentions.parameters():
        torch.nn.init.normal_(p)  # else most gradients are zero
    for step, moved in ((0, False), (9, True)):
        model.zero_grad()
        vae_loss(model, clips, step, s).backward()
        assert all((p.grad is not None) == moved for p in model.vae.decoder.temporal_attentions.parameters())
        assert model.vae.decoder.conv_out.weight.grad.abs().sum() > 0


def test_frames_of_one_clip_are_no_measure_of_how_latents_vary():
    model, clips = MagicVideo.from_preset("tiny"), ShapesDataset("train", 4, 32)
    for step, counts in ((0, True), (9, False)):
        losses = [vae_loss(model, clips, step, train.Settings(vae_steps=10, thumbnail=x)) for x in (0.0, 1.0)]
        assert (losses[0] != losses[1]) == counts


def test_one_clip_can_be_learned_by_heart():
    """The loss falls far below its start, and sampling gives back the clip."""
    torch.manual_seed(0)
    unet = UNet3D(UNetConfig(channels=(32, 32), attention=(True, True), layers=1, heads=2, groups=4, context_width=8,
                             frames=4))
    diffusion = Diffusion(DiffusionConfig(prediction="v_prediction"))
    z0, context = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 2, 8)
    batch = z0.expand(8, -1, -1, -1, -1), context.expand(8, -1, -1), torch.full((8,), 8.0)
    optimizer, generator, losses = torch.optim.AdamW(unet.parameters(), lr=3e-3), torch.Generator().manual_seed(0), []
    for step in range(150):
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, 150, 3e-3, 10)
        loss = diffusion.loss(unet, *batch, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.25 * losses[0]
    sampled = diffusion.sample(unet, z0.shape, context, context, torch.full((1,), 8.0), steps=25, guidance=1.0,
                               generator=torch.Generator().manual_seed(1))
    assert torch.corrcoef(torch.stack([sampled.flatten(), z0.flatten()]))[0, 1] > 0.9


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_flag(monkeypatch):
    monkeypatch.setattr(train, "vae_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(InputError, match="nan at step 0 of stage vae: lower --vae-lr"):
        train.main([*SHORT, "--out", "bad"])
    assert not Path("bad/model.pt").exists()


def test_a_folder_of_clips_trains_and_names_the_next_command(capsys):
    Path("clips").mkdir()
    for i, item in enumerate(ShapesDataset("train", 8, 48, length=3)):
        write_clip(f"clips/{i}.gif", item["video"], 8)
        Path(f"clips/{i}.txt").write_text(item["caption"])
        if i == 2:
            break
    train.main([*SHORT, "--data", "clips", "--out", "mine"])
    assert "mine/model.pt" in capsys.readouterr().out
    assert MagicVideo.load("mine/model.pt").sample("a red circle", steps=2).shape == (1, 4, 3, 32, 32)


@pytest.mark.parametrize("flags, words", [
    (["--preset", "huge"], '--preset "huge".*tiny, small, paper'),
    (["--stage", "audio"], '--stage "audio".*vae, image, video'),
    (["--stage", "video"], "--stage video needs.*--init-from"),
    (["--init-from", "nowhere.pt"], "nowhere.pt"),
    (["--data", "nowhere"], "nowhere"),
    (["--batch-size", "0"], "--batch-size 0.*at least 1"),
    (["--vae-steps", "-1"], "--vae-steps -1.*at least 0"),
    (["--lr", "nan"], "--lr nan"),
    (["--ema", "1.5"], "--ema 1.5.*at most 1"),
    (["--resume"], "--resume.*--out"),
    (["--resume", "--out", "empty"], "--resume.*checkpoint.pt.*empty"),
    (["--device", "abacus"], "--device abacus"),
    (["--frames", "-3"], "--frames -3"),
    (["--check-data"], "--check-data.*--data FOLDER"),
    (["--check-data", "--data", "nowhere"], "nowhere: no such folder"),
])
def test_wrong_flags_are_one_line_and_write_nothing(tmp_path, flags, words):
    with pytest.raises(InputError) as error:
        train.main([*SHORT, *flags])
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_check_data_names_what_is_bad_and_trains_nothing(capsys):
    Path("clips").mkdir()
    write_clip("clips/good.gif", ShapesDataset("train", 8, 32)[0]["video"], 8)
    train.main(["--data", "clips", "--frames", "4", "--check-data"])
    assert "every clip can be decoded" in capsys.readouterr().out
    Path("clips/bad.gif").write_bytes(b"nothing")
    with pytest.raises(InputError, match="--check-data: clips cannot be used as it is"):
        train.main(["--data", "clips", "--frames", "4", "--check-data"])
    assert "bad.gif: cannot be read" in capsys.readouterr().out and not Path("runs").exists()


def test_a_folder_that_holds_a_run_is_refused_and_other_settings_do_not_resume_it():
    train.main([*SHORT, "--out", "mine"])
    before = weights("mine/model.pt")
    with pytest.raises(InputError, match="mine holds a run.*--resume"):
        train.main([*SHORT, "--out", "mine"])
    with pytest.raises(InputError, match="--batch-size 3.*started with 2"):
        train.main(["--resume", "--out", "mine", "--batch-size", "3"])
    assert equal(before, weights("mine/model.pt"))


def test_the_command_ends_with_status_2_and_no_traceback_for_a_user_s_mistake():
    mistakes = ("train.py", ["--preset", "huge"]), ("train.py", ["--nonsense"]), ("sample.py", ["a", "--steps", "x"])
    for script, flags in mistakes:
        run = subprocess.run([sys.executable, ROOT / script, *flags], capture_output=True, text=True)
        assert run.returncode == 2 and "Traceback" not in run.stderr and run.stderr.strip().count("\n") < 40


def test_a_compiled_run_saves_a_model_like_any_other(monkeypatch, whole):
    compiled = []
    monkeypatch.setattr(UNet3D, "compile", lambda self: compiled.append(self))
    train.main([*SHORT, "--out", "run", "--compile", "--parts", "2"])
    assert len(compiled) == 1 and equal(whole, weights("run/model.pt"))
