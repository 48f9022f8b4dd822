"""Each stage: what a step reads, which weights learn, what it minimises, draws and hands on."""

import re

import pytest
import torch
from torch import nn

from conftest import close, tinier
from data import ClipDataset, ShapePictures, ShapesDataset
from magicvideo import PRESETS, MagicVideo, MagicVideoConfig
from runs import InputError, set_learning_rates
from stages import STAGES, Draw, encode_clips, mix, spread
from train import Settings, make_optimizers_and_average
from unet3d import UNet3D, UNetConfig, is_video_parameter


@pytest.fixture(autouse=True)
def tinier_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", MagicVideoConfig(**tinier()))


def make(name, **settings):
    """Make a stage of an untrained model, and clips that it can train on."""
    torch.manual_seed(0)
    stage = STAGES[name](MagicVideo.from_preset("tiny"), Settings(**settings))
    return stage, ShapesDataset("train", stage.clip_frames or 4, 32 * stage.scale)


def read(stage, clips, step=0, size=4):
    """Read a whole batch, as many frames as the stage does in that step."""
    _, frames = stage.plan_batch(step, clips.frames)
    return stage.read([clips], step, size, frames, slice(None))


# --------------------------------------------------------------------------------------------------
# What a step reads


def test_a_shard_of_random_numbers_is_that_part_of_the_whole_batchs():
    def drawn(shard):
        draw = Draw(torch.Generator().manual_seed(3), 6, shard)
        return draw.normal(2), draw.uniform(), draw.integers(1000), draw.integers(9, 2)

    for whole, part in zip(drawn(slice(None)), drawn(slice(1, None, 2))):
        assert torch.equal(whole[1::2], part) and len(whole) == 6
    normal, uniform, integers, pairs = drawn(slice(None))
    assert normal.shape == (6, 2) and uniform.shape == (6,) and pairs.shape == (6, 2)
    assert ((uniform >= 0) & (uniform < 1)).all() and integers.dtype == torch.int64
    many = Draw(torch.Generator().manual_seed(0), 1000)
    assert {*many.integers(3).tolist()} == {0, 1, 2} and abs(many.normal().std() - 1) < 0.1


def test_every_item_comes_up_once_an_epoch_in_a_new_order():
    stage, _ = make("video")
    items = [{"z0": torch.zeros(1, 1, 1, 1), "caption": str(n), "fps": 8.0} for n in range(10)]
    seen = [int(caption) for step in range(6)
            for caption in stage.read([items], step, 5, 1, slice(None))[0].captions]
    epochs = [seen[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = STAGES["image"](stage.model, Settings())
    assert seen[:5] != [int(c) for c in other.read([items], 0, 5, 1, slice(None))[0].captions]


def test_clips_of_later_epochs_are_cut_anew():
    stage, clips = make("video", image_steps=1)
    clips.length = 4
    first, again = (read(stage, clips, step)[0] for step in (0, 1))
    order = [first.captions.index(caption) for caption in again.captions]
    assert sorted(order) == [0, 1, 2, 3] and not torch.equal(first.clips[order], again.clips)


def test_stage_image_reads_first_frames_without_fps_and_stage_video_whole_clips():
    for name, size, frames in (("image", 128, 1), ("video", 32, 4)):
        stage, clips = make(name)
        assert stage.plan_batch(0, 4) == (size, frames)
        batch, _ = read(stage, clips)
        assert batch.clips.shape == (4, frames, 4, 4, 4) and batch.clips.std() > 0.01
        assert batch.fps is None if name == "image" else batch.fps.shape == (4,)
        for key in ("z0", "video"):
            items = [{key: torch.arange(4.0).view(4, 1, 1, 1), "caption": "", "fps": 8.0}] * 20
            stage.reads_latents = key == "z0"
            kept, _ = stage.read([items], 0, 20, frames, slice(None))
            assert kept.clips.flatten(1).tolist() == [[0.0, 1.0, 2.0, 3.0][:frames]] * 20


def test_stage_vae_reads_single_frames_and_in_its_last_fifth_clips_of_as_many_frames_at_most(
        monkeypatch):
    stage, _ = make("vae", vae_steps=100, vae_batch_size=16)
    assert [stage.plan_batch(step, 8) for step in (0, 79, 80, 99)] == [(16, 1), (16, 1), (2, 8),
                                                                       (2, 8)]
    assert stage.plan_batch(80, 20) == (1, 16)  # no step reads more than --vae-batch-size frames
    assert stage.fewest_clips(stage.s, 8) == 2 and stage.fewest_clips(stage.s, 20) == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert stage.plan_batch(80, 8) == (8, 8)  # but each process reads a clip
    stage, clips = make("vae", vae_batch_size=16)
    assert read(stage, clips)[0].clips.shape == (4, 1, 3, 32, 32)


def test_single_frames_come_of_clips_and_of_pictures_in_turn_and_whole_clips_alone():
    clips = [{"z0": torch.arange(4.0).view(4, 1, 1, 1), "caption": f"c{n}", "fps": 8.0}
             for n in range(5)]
    pictures = [{"z0": torch.full((1, 1, 1, 1), 9.0), "caption": f"p{n}", "fps": 8.0}
                for n in range(3)]
    for name, frames, found in (("image", 1, {0.0, 9.0}), ("vae", 1, {0.0, 1.0, 2.0, 3.0, 9.0}),
                                ("video", 4, {0.0, 1.0, 2.0, 3.0})):
        stage, _ = make(name)
        sources = mix(clips, pictures, frames)
        assert sources == ([clips, pictures] if frames == 1 else [clips])
        read = [stage.read(sources, step, 10, frames, slice(None))[0] for step in range(3)]
        captions = [caption for batch in read for caption in batch.captions]
        assert {*torch.cat([batch.clips for batch in read]).flatten().tolist()} == found
        if frames == 1:
            assert [caption[0] for caption in captions] == ["c", "p"] * 15
            assert sorted(captions[:10:2]) == [f"c{n}" for n in range(5)]  # once an epoch
            assert sorted(captions[1:6:2]) == [f"p{n}" for n in range(3)]
            halves = [stage.read(sources, 2, 10, frames, slice(rank, None, 2))[0].captions
                      for rank in (0, 1)]
            assert [c for pair in zip(*halves) for c in pair] == captions[20:]
    assert mix(clips, None, 1) == [clips]


def test_one_step_in_four_of_stage_video_is_on_as_many_pictures_as_clips_have_frames():
    def sources(name, step=0, pictures="pictures", **settings):
        """Return what a step reads."""
        return make(name, **settings)[0].plan(step, 4, "clips", pictures)[0]

    assert [sources("video", step, picture_every=4) == ["pictures"] for step in range(6)] == [
        True, False, False, False, True, False]
    stage, clips = make("video", picture_every=4)
    assert stage.plan(0, 4, clips, "pictures")[1:] == (128, 1)
    assert stage.plan(1, 4, clips, "pictures") == ([clips], 32, 4)
    batch, draw = stage.read([clips], 0, 4, 1, slice(None))
    assert batch.fps is None and batch.clips.shape[:2] == (4, 1)
    stage(batch, draw)[0].mean().backward()
    assert stage.network.conv_in.weight.grad.abs().sum() > 0
    assert sources("image", picture_every=1) == ["clips", "pictures"]
    assert sources("video", picture_every=0) == ["clips"]
    assert sources("video", pictures=None, picture_every=1) == ["clips"]
    # on a still what is MagicVideo's own has no effect, and could not learn
    assert sources("video", picture_every=1, trainable="adaptor|temporal|fps") == ["clips"]
    assert sources("video", picture_every=1, trainable="adaptor|conv_in") == ["pictures"]


def test_a_clip_of_a_model_of_one_frame_keeps_its_fps():
    stage, clips = make("video")
    stage.model.config.unet.frames = 1
    assert stage.read([clips], 1, 4, 1, slice(None))[0].fps.shape == (4,)
    stage = STAGES["image"](stage.model, Settings())
    assert stage.read([clips], 1, 4, 1, slice(None))[0].fps is None


def test_a_picture_is_encoded_once_and_a_clip_as_often_as_it_is_cut():
    stage, _ = make("video")
    pictures = ShapePictures(size=32, length=3)
    pictures.captions = pictures.captions[:3]
    assert [item["caption"] for item in encode_clips(stage.model, pictures, 7)] == pictures.captions
    clips = ShapesDataset(frames=4, size=32, length=2, captions=["a red circle growing"] * 2)
    assert len(encode_clips(stage.model, clips, 1)) == 2


def test_single_frames_of_stage_vae_come_from_anywhere_in_a_clip():
    stage, _ = make("vae")
    items = [{"video": torch.arange(4.0).view(4, 1, 1, 1), "caption": "", "fps": 8.0}] * 60
    batch, _ = stage.read([items], 0, 60, 1, slice(None))
    assert {*batch.clips.flatten().tolist()} == {0.0, 1.0, 2.0, 3.0}


def test_captions_are_dropped_as_often_as_asked(monkeypatch):
    for name in ("video", "interpolate"):
        stage, _ = make(name, text_dropout=0.25)
        seen = []
        monkeypatch.setattr(stage.model, "encode_text", seen.extend)
        stage.context(["a"] * 400, Draw(torch.Generator().manual_seed(0), 400))
        assert 0.2 < seen.count("") / 400 < 0.3


def test_what_is_chosen_from_a_data_set_is_spread_over_its_captions():
    for split, count in (("train", 64), ("test", 24)):
        captions = [item["caption"] for item in spread([ShapesDataset(split, 2, 16)], count)]
        words = {word for caption in captions for word in caption.split()}
        assert len({*captions}) == count
        assert words == {w for c in ShapesDataset(split).captions for w in c.split()}
    assert [item["caption"] for item in spread([ShapesDataset("test", 2, 16)], 4)] == [
        ShapesDataset("test").captions[i] for i in (0, 6, 12, 18)]


def test_latents_kept_are_the_scaled_means_of_the_clips_each_epoch_cut_anew():
    stage, _ = make("video")
    clips = ShapesDataset(frames=4, size=32, length=3)
    clips.captions = clips.captions[:3]
    kept = encode_clips(stage.model, clips, 7)
    assert len(kept) == 7 and not torch.equal(kept[0]["z0"], kept[3]["z0"])
    for n in range(7):
        clips.set_epoch(n // 3)
        item = clips[n % 3]
        assert (kept[n]["caption"], kept[n]["fps"]) == (item["caption"], item["fps"])
        mean, _ = stage.model.vae.encode(item["video"][None])
        assert torch.equal(kept[n]["z0"], 0.18215 * mean[0])


def test_latents_and_clips_are_read_alike():
    stage, clips = make("video")
    clips.length = 4
    items = [{**clips[i], "z0": stage.model.encode(clips[i]["video"][None])[0]} for i in range(4)]
    for item in items:
        del item["video"]
    batch, _ = read(stage, clips)
    kept, _ = stage.read([items], 0, 4, 4, slice(None))
    assert kept.captions == batch.captions and close(kept.clips, batch.clips, 1e-6)
    assert isinstance(clips, ClipDataset) and torch.equal(kept.fps, batch.fps)


# --------------------------------------------------------------------------------------------------
# Which weights learn


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_start_from_stable_diffusion_keeps_the_text_encoder_and_the_vae_as_they_are(pretrained):
    torch.manual_seed(0)
    model = MagicVideo.from_preset("tiny")
    model.config.pretrained = pretrained
    parts = {}
    for name in ("vae", "image", "video"):
        groups = STAGES[name](model, Settings()).parameter_groups()
        parts[name] = {id(p) for group in groups for p in group["params"]}
    text = {id(p) for p in model.text_encoder.parameters()}
    encoder = {id(p) for p in model.vae.encoder.parameters()}
    temporal = {id(p) for name, p in model.vae.named_parameters() if "temporal" in name}
    assert (text <= parts["video"], encoder <= parts["vae"]) == (not pretrained,) * 2
    assert not pretrained or parts["vae"] == temporal and not text & parts["image"]
    image = {id(p) for name, p in model.unet.named_parameters() if not is_video_parameter(name)}
    assert parts["image"] - text == image
    assert parts["video"] - text == {id(p) for p in model.unet.parameters()}
    clips_alone = STAGES["vae"](model, Settings()).plan_batch(0, 4) == (4, 4)
    assert clips_alone == pretrained


def test_image_and_video_weights_are_groups_of_their_own_and_trainable_chooses_among_them():
    stage, _ = make("video", trainable="adaptor|conv_in")
    image, video = (group["params"] for group in stage.parameter_groups())
    named = {id(p): name for name, p in stage.model.unet.named_parameters()}
    assert {named[id(p)] for p in image} == {"conv_in.weight", "conv_in.bias"}
    assert video and all("adaptor" in named[id(p)] for p in video)
    stage, _ = make("image", trainable="adaptor")
    with pytest.raises(InputError, match='--trainable "adaptor": matches nothing that stage image'):
        stage.chosen()


def test_temporal_layers_of_the_vae_start_at_their_peak_rate_when_clips_begin():
    s = Settings(vae_steps=100, warmup=1)
    stage, _ = make("vae", vae_steps=100, warmup=1)
    optimizers, _ = make_optimizers_and_average(stage, None)
    image, video = optimizers[0].param_groups
    assert video["start"] == 80 and image["start"] == 0
    set_learning_rates(optimizers, (s.lr, s.muon_lr), 80, 100, s.warmup)
    assert video["lr"] == pytest.approx(s.lr)
    assert image["lr"] < 0.1 * s.lr
    set_learning_rates(optimizers, (s.lr, s.muon_lr), 80, 100, warmup=10)
    assert video["lr"] == pytest.approx(0.1 * s.lr)  # a warm-up of their own


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_keeps_less_and_has_the_same_gradients(precision):
    found = []
    for asked in (False, True):
        stage, clips = make("video", gradient_checkpointing=asked, precision=precision)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            errors, _ = stage(*read(stage, clips))
        errors.mean().backward()
        found.append((sum(sizes), [p.grad for p in stage.model.unet.parameters()]))
    (kept, gradients), (kept_less, same) = found
    assert kept_less < 0.5 * kept
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, same))


# --------------------------------------------------------------------------------------------------
# What it minimises


@pytest.mark.parametrize("name", ["image", "video"])
def test_the_loss_that_trains_is_the_diffusions_own(name):
    stage, clips = make(name)
    batch, draw = read(stage, clips)
    errors, t = stage(batch, draw)
    _, again = read(stage, clips)
    keep = again.uniform() >= Settings().text_dropout
    captions = [caption if kept else "" for caption, kept in zip(batch.captions, keep)]
    assert torch.equal(again.integers(1000), t)
    expected = stage.model.diffusion.loss(
        stage.model.unet, batch.clips, stage.model.encode_text(captions), batch.fps, t,
        again.normal(*batch.clips.shape[1:]))
    assert torch.equal(errors, expected) and errors.shape == (4,)
    assert (batch.fps is None) == (name == "image")


def test_the_vae_loss_is_the_squared_error_and_the_divergence_of_its_posterior(monkeypatch):
    stage, clips = make("vae", kl_weight=0.5)
    seen = {}
    vae = stage.model.vae
    encode, decode, sample = vae.encode, vae.decode, vae.sample_latents
    monkeypatch.setattr(vae, "encode", lambda video: seen.setdefault("posterior", encode(video)))
    monkeypatch.setattr(vae, "decode", lambda z: seen.setdefault("decoded", decode(z)))
    monkeypatch.setattr(vae, "sample_latents", lambda *args: seen.setdefault("z", sample(
        *seen.setdefault("drawn", args))))
    batch, draw = read(stage, clips)
    errors, t = stage(batch, draw)
    mean, logvar = seen["posterior"]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0, 1))
    expected = (seen["decoded"] - batch.clips).square().mean() + 0.5 * kl.mean()
    assert t is None and torch.allclose(errors.mean(), expected, rtol=1e-5)
    assert seen["drawn"][2].std() > 0.8  # a sample of the posterior, not its mean


@pytest.mark.parametrize("name", ["interpolate", "upscale"])
def test_a_cascade_stage_minimises_the_loss_of_its_network(name):
    stage, clips = make(name)
    batch, draw = read(stage, clips)
    errors, t = stage(batch, draw)
    _, again = read(stage, clips)
    context = stage.context(batch.captions, again)
    assert torch.equal(again.integers(1000), t) and errors.shape == (4,)
    expected = stage.network.loss(batch.clips, context, batch.fps, t, again)
    assert torch.equal(errors, expected)
    shape = (4, 5, 4, 4, 4) if name == "interpolate" else (4, 1, 3, 128, 128)
    assert batch.clips.shape == shape


def test_one_clip_can_be_memorized():
    torch.manual_seed(0)
    unet = UNet3D(UNetConfig(channels=(32, 32), attention=(True, True), layers=1, heads=2, groups=4,
                             context_width=8, frames=4))
    diffusion = STAGES["interpolate"](MagicVideo.from_preset("tiny"), Settings()).diffusion
    z0, context = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 2, 8)
    batch = z0.expand(8, -1, -1, -1, -1), context.expand(8, -1, -1), torch.full((8,), 8.0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    draw = Draw(torch.Generator().manual_seed(0), 8)
    losses = []
    for _ in range(150):
        loss = diffusion.loss(unet, *batch, draw.integers(1000), draw.normal(4, 4, 4, 4)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.25 * losses[0]
    sampled = diffusion.sample(unet, z0.shape, context, context, torch.full((1,), 8.0), steps=25,
                               guidance=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.corrcoef(torch.stack([sampled.flatten(), z0.flatten()]))[0, 1] > 0.9


# --------------------------------------------------------------------------------------------------
# What it draws and hands on


@pytest.mark.parametrize("name, shape", [
    ("vae", (8, 4, 3, 32, 32)), ("image", (4, 1, 3, 32, 32)), ("video", (4, 4, 3, 32, 32)),
    ("interpolate", (8, 5, 3, 32, 32)), ("upscale", (4, 3, 3, 128, 128))])
def test_every_stage_draws_a_picture_of_held_out_clips(name, shape):
    stage, _ = make(name)
    clips = ShapesDataset("test", stage.clip_frames or 4, 32 * stage.scale)
    items = spread([clips], 4)
    with torch.no_grad():
        rows = stage.picture(items)
    assert rows.shape == shape and rows.abs().max() <= 1 + 1e-6
    if name in ("vae", "interpolate"):
        assert torch.equal(rows[:4], torch.stack([item["video"] for item in items]))
        assert not torch.equal(rows[:4], rows[4:])
    if name == "upscale":
        assert torch.equal(rows[:, 2], torch.stack([item["video"][0] for item in items]))


def test_new_frames_are_drawn_at_the_rate_of_the_keys_a_quarter_of_the_clips():
    stage, _ = make("interpolate")
    assert stage.rate_multiplier == 4
    rates = []
    sample = stage.network.sample
    stage.network.sample = lambda keys, context, fps: rates.append(fps) or sample(
        keys, context, fps, steps=1)
    with torch.no_grad():
        stage.picture([{**ShapesDataset("test", 5, 32, rate_multiplier=4)[0], "fps": 32.0}])
    assert rates == [8.0]


def test_stage_vae_hands_on_latents_of_standard_deviation_one_and_others_no_scale():
    stage, clips = make("vae")
    stage.finish(clips)
    z = torch.cat([stage.model.encode(item["video"][None]) for item in spread([clips], 64)])
    assert z.std().item() == pytest.approx(1, abs=1e-4)
    for name, settings in (("vae", {"trainable": "decoder"}), ("video", {})):
        stage, clips = make(name, **settings)
        stage.finish(clips)
        assert stage.model.config.vae.scaling_factor == 0.18215 and not stage.model.cascade


def test_a_cascade_stage_hands_its_network_on():
    stage, clips = make("upscale")
    nn.init.normal_(stage.network.unet.conv_out.weight)
    stage.finish(clips)
    again = STAGES["upscale"](stage.model, Settings())
    assert torch.equal(again.network.unet.conv_out.weight, stage.network.unet.conv_out.weight)


def test_every_class_says_what_the_paper_says_of_its_stage():
    for stage in STAGES.values():
        assert re.search(r"paper §3", stage.__doc__)
