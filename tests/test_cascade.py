"""What follows the key frames: interpolation and super-resolution, as functions, as stages, in sample.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cascade
import figure
import losses
import sample
import train
from config import PRESETS
from data import InputError, ShapesDataset, read_clip, write_clip
from diffusion import Diffusion, DiffusionConfig
from magicvideo import MagicVideo
from unet3d import FrameAdaptor, UNet3D, UNetConfig

UNET = UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, groups=8, context_width=24, frames=5)
UPSCALE = UNetConfig(6, 3, (8, 16), (False, False), layers=1, heads=2, groups=4, context_width=24, frames=0,
                     noise_level=True)
SHORT = ["--batch-size", "2", "--interpolate-steps", "4", "--upscale-steps", "4", "--cache", "6", "--save-every", "2",
         "--sample-every", "4", "--muon-lr", "0"]


def randomised(config, seed=0):
    torch.manual_seed(seed)
    network = UNet3D(config).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return network


def inputs(network, b=2):
    torch.manual_seed(1)
    c = network.config
    return (torch.randn(b, c.frames or 1, c.in_channels, 8, 8).double(), torch.randint(1000, (b,)),
            torch.randn(b, 4, c.context_width).double(), torch.rand(b).double() * 20)


@pytest.fixture(scope="module")
def key_model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("keys") / "model.pt"
    model = MagicVideo.from_preset("tiny")
    model.config.size, model.config.upscale = 16, replace(UPSCALE, context_width=96)
    model.save(path)
    return str(path)


@pytest.fixture(scope="module")
def trained(key_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("later")
    train.main(["--stage", "interpolate", "--init-from", key_model, "--out", str(out / "i"), *SHORT])
    train.main(["--stage", "upscale", "--init-from", str(out / "i" / "model.pt"), "--out", str(out / "u"), *SHORT])
    return out


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "SHIPPED", tmp_path / "nothing.pt")


# ----------------------------------------------------------------------------------------------------------------------
# Interpolation


def test_interpolation_starts_as_the_key_frame_network_and_blind_to_the_keys():
    keys = randomised(UNET)
    network = cascade.start_interpolation(keys)
    z, t, context, fps = inputs(network)
    of_three = UNet3D(replace(UNET, frames=3, mask="bidirectional")).double()
    of_three.load_state_dict({name: weight if weight.shape == of_three.state_dict()[name].shape else weight.mean(
        0, keepdim=True).expand(3, -1) for name, weight in keys.state_dict().items()})
    expected = of_three(z[:, :, :4], t, context, fps)
    assert torch.equal(network(z, t, context, fps), expected)  # whatever the keys are
    z[:, :, 4:] += 1
    assert torch.equal(network(z, t, context, fps), expected)
    torch.nn.init.normal_(network.conv_in.weight)
    assert not torch.allclose(network(z, t, context, fps), expected, atol=1e-3)


def test_the_adaptors_of_the_frames_between_start_as_the_mean_of_those_of_the_key_frames():
    keys = randomised(UNET)
    network = cascade.start_interpolation(keys)
    pairs = [(a, b) for a, b in zip(keys.modules(), network.modules()) if isinstance(a, FrameAdaptor)]
    assert len(pairs) > 10
    for a, b in pairs:
        assert b.scale.shape[0] == 3 and torch.equal(b.shift, a.shift.mean(0, keepdim=True).expand(3, -1))


def test_a_frame_between_feels_both_of_its_neighbours_and_the_keys_on_both_sides():
    network = randomised(cascade.interpolation_config(UNET))
    z, t, context, fps = inputs(network, 1)
    before = network(z, t, context, fps)
    for place in ((0, 2, slice(0, 4)), (0, 0, slice(0, 4)), (0, 1, slice(4, 8)), (0, 1, slice(8, 12))):
        other = z.clone()
        other[place] += 1
        assert not torch.allclose(network(other, t, context, fps)[0, 1], before[0, 1], atol=1e-6)


def test_key_frames_stay_bit_for_bit_and_each_gap_reads_the_two_around_it():
    keys, context, fps = torch.randn(2, 5, 4, 8, 8), torch.randn(2, 4, 24), torch.tensor([4.0, 8.0])
    seen = []

    def network(z, t, context, fps, level):
        seen.append((z.shape, z[:, :, 4:], context, fps))
        return z[:, :, :4] * 0.1

    clip = cascade.interpolate(network, Diffusion(), keys, context, fps, steps=3)
    assert clip.shape == (2, 17, 4, 8, 8) and torch.equal(clip[:, ::4], keys)
    assert len(seen) == 3  # all gaps of all clips in one batch, without guidance
    shape, around, text, rates = seen[0]
    assert shape == (8, 3, 12, 8, 8) and rates.tolist() == [4.0] * 4 + [8.0] * 4
    for gap in range(8):
        clip, k = divmod(gap, 4)
        for frame in range(3):
            assert torch.equal(around[gap, frame], torch.cat([keys[clip, k], keys[clip, k + 1]]))
        assert torch.equal(text[gap], context[clip])


def test_a_clip_is_interpolated_alone_as_in_a_batch():
    network = randomised(cascade.interpolation_config(UNET))
    keys, context = torch.randn(2, 5, 4, 8, 8).double(), torch.randn(2, 4, 24).double()
    rate = torch.tensor([8.0, 8.0]).double()

    def clips(part):
        generators = [torch.Generator().manual_seed(i) for i in range(2)][part]
        return cascade.interpolate(network, Diffusion(), keys[part], context[part], rate[part], 2, generators)

    assert torch.allclose(clips(slice(0, 2))[1:], clips(slice(1, 2)), rtol=0, atol=1e-9)


def test_what_follows_the_key_frames_has_no_lag():
    assert cascade.later_diffusion(DiffusionConfig(frame_lag=50)).config == DiffusionConfig(frame_lag=0)


# ----------------------------------------------------------------------------------------------------------------------
# Super-resolution


def test_small_frames_are_true_frames_of_that_size():
    small, large = (ShapesDataset("test", 4, size)[3]["video"][None] for size in (64, 256))
    assert (cascade.shrink(large) - small).abs().max() < 0.1  # both anti-aliased, of the same object
    assert (cascade.shrink(large) - small).square().mean() < 1e-4


def test_a_network_of_frames_has_no_video_parts_and_is_told_the_noise_level():
    network = randomised(UPSCALE)
    assert not any(p.numel() for name, p in network.named_parameters() if "adaptor" in name or "temporal" in name)
    z, t, context, _ = inputs(network)
    one, other = (network(z, t, context, None, torch.tensor(level)) for level in ([1, 1], [1, 50]))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1], atol=1e-3)


def test_noise_augmentation_is_that_of_the_schedule_for_each_frame():
    diffusion, small = Diffusion(), torch.rand(2, 1, 3, 8, 8).double()
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noisy = cascade.noised(small, torch.tensor([5, 90]), diffusion, generators)
    eps = [torch.randn(small.shape[1:], generator=torch.Generator().manual_seed(i)).double() for i in range(2)]
    for i, level in enumerate((5, 90)):
        alpha = diffusion.alphas_cumprod[level]
        expected = alpha.sqrt() * small[i] + (1 - alpha).sqrt() * eps[i]
        assert torch.allclose(noisy[i], expected, rtol=0, atol=1e-9)


def test_where_nothing_is_missing_the_enlarged_frame_stays_and_what_is_missing_is_added():
    video, text = torch.rand(2, 3, 8, 8).double() - 0.5, torch.randn(1, 4, 24).double()
    diffusion, asked = Diffusion(), []

    def network(z, t, *_):  # eps for which z_0 is `missing` everywhere
        asked.append(z[:, :, 3:])
        alpha = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
        return (z[:, :, :3] - alpha.sqrt() * missing) / (1 - alpha).sqrt()

    for missing in (0.0, 0.8):
        clip = cascade.upscale(network, diffusion, video, text, steps=3)
        seen = torch.cat(asked[:2])[:, 0]
        assert (clip - seen - missing / cascade.GAIN).abs().max() < 0.02  # what the last step leaves of the noise
        assert 0 < (seen - cascade.enlarge(video[:, None])[:, 0]).abs().mean() < 0.05  # noised a little


def test_super_resolution_learns_what_the_crop_has_and_the_enlarged_one_lacks(key_model):
    model = MagicVideo.load(key_model)
    model.add_later("upscale")
    items = [(i, ShapesDataset("train", 1, 64)[i]) for i in range(3)]
    network, z0 = losses.upscaling(model, items, [torch.Generator().manual_seed(i) for i in range(3)])
    seen = []
    model.upscaler.forward = lambda z, *_: seen.append(z[:, :, 3:]) or z[:, :, :3]
    network(z0, torch.zeros(3), torch.zeros(3, 4, 96), None)
    crops = seen[0] + z0 / cascade.GAIN  # (3, 1, 3, 16, 16)
    for (_, item), crop in zip(items, crops):
        squares = item["video"].unfold(2, 16, 1).unfold(3, 16, 1)  # (1, 3, 49, 49, 16, 16)
        assert (squares.sub(crop[:, :, None, None]).abs().amax((0, 1, 4, 5)) < 1e-5).any()
    assert 0.1 < z0.abs().mean() < 3


@pytest.mark.parametrize("same", [False, True])
def test_same_noise_makes_equal_frames_of_equal_frames(same):
    network = randomised(UPSCALE).float()
    still = torch.rand(1, 3, 8, 8).expand(3, -1, -1, -1)
    clip = cascade.upscale(network, Diffusion(), still, torch.randn(1, 4, 24), steps=2, same_noise=same)
    assert clip.shape == (3, 3, 32, 32) and clip.abs().max() <= 1
    assert torch.equal(clip[0], clip[1]) is same and torch.equal(clip[0], clip[2]) is same


def test_a_frame_is_enlarged_alone_as_in_a_clip():
    network, video, text = randomised(UPSCALE), torch.rand(3, 3, 8, 8).double(), torch.randn(1, 4, 24).double()
    clip = cascade.upscale(network, Diffusion(), video, text, steps=2, seed=7)
    assert torch.allclose(cascade.upscale(network, Diffusion(), video[:1], text, steps=2, seed=7), clip[:1], atol=1e-9)


@pytest.mark.parametrize("size, tile", [((24, 40), 8), ((20, 32), 12), ((16, 64), 16), ((9, 30), 8), ((8, 8), 16)])
def test_tiles_cover_everything_once_and_fade_into_each_other(size, tile):
    x, seen = torch.randn(2, 1, 3, *size).double(), []

    def run(part):
        seen.append(part.shape[-2:])
        return 2 * part + 1

    assert torch.allclose(cascade.tiled(run, x, tile), 2 * x + 1, rtol=0, atol=1e-9)
    assert all(max(shape) <= max(tile, 1) for shape in seen) and len(seen) >= 1
    assert len(seen) == 1 or max(size) > tile


def test_a_seam_is_no_step():
    tiles = iter([0.0, 1.0, 0.0])  # tiles that disagree as much as they can
    x = torch.zeros(1, 1, 1, 8, 16)
    row = cascade.tiled(lambda part: torch.full_like(part, next(tiles)), x, 8)[0, 0, 0, 0]
    assert row[0] == 0 and row.diff().abs().max() < 0.35


# ----------------------------------------------------------------------------------------------------------------------
# As stages of training


def contents(path):
    return torch.load(path, weights_only=True)["model"]["weights"]


def test_a_later_stage_changes_its_own_network_alone(trained, key_model):
    keys, first, both = (contents(path) for path in (key_model, trained / "i/model.pt", trained / "u/model.pt"))
    assert all(torch.equal(both[name], weight) for name, weight in keys.items())
    assert all(torch.equal(both[name], weight) for name, weight in first.items())
    started = cascade.start_interpolation(MagicVideo.load(key_model).unet).state_dict()
    moved = [name for name, weight in started.items() if not torch.equal(first[f"interpolator.{name}"], weight)]
    assert len(moved) > 0.8 * len(started) and first["interpolator.conv_in.weight"][:, 4:].abs().max() > 0
    assert any(name.startswith("upscaler.") for name in both) and (trained / "u/samples/upscale-000004.png").is_file()
    assert Image.open(trained / "u/samples/upscale-000004.png").width == 3 * 64 + 2 * 2


def test_training_the_key_frames_again_says_what_must_follow(trained, capsys):
    start = ["--init-from", str(trained / "u/model.pt")]
    train.main(["--stage", "video", *start, "--out", "k", "--video-steps", "1", *SHORT])
    said = capsys.readouterr().out
    assert "interpolate, upscale: learned with the text and latents of before; train them anew" in said
    train.main(["--stage", "vae", "--decoder-only", *start, "--out", "d", "--vae-steps", "1", "--sample-every", "0"])
    assert "learned with" not in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["interpolate", "upscale"])
def test_a_later_stage_goes_on_as_if_it_had_not_been_stopped(trained, key_model, stage, monkeypatch):
    log = train.log

    def killed(path, stage, step, *rest):
        log(path, stage, step, *rest)
        if step == 3:
            raise SystemExit

    start = key_model if stage == "interpolate" else str(trained / "i/model.pt")
    monkeypatch.setattr(train, "log", killed)
    with pytest.raises(SystemExit):
        train.main(["--stage", stage, "--init-from", start, "--out", "cut", *SHORT])
    monkeypatch.setattr(train, "log", log)
    train.main(["--resume", "--out", "cut"])
    whole, cut = contents(trained / stage[0] / "model.pt"), contents("cut/model.pt")
    assert all(torch.equal(whole[name], weight) for name, weight in cut.items())


def test_interpolation_learns_from_clips_at_four_times_the_rate_and_reads_the_rate_of_the_keys(monkeypatch, key_model):
    model, items = MagicVideo.load(key_model), []
    model.add_later("interpolate")
    clips = ShapesDataset("train", 5, 64, between=3)
    assert clips.rate == 96 and {clips[i]["fps"] for i in range(40)} <= {96 / n for n in range(1, 7)}
    items = train.latents_of(model, [(0, clips[0]), (1, clips[1])], "interpolate")
    seen = {}

    def errors(network, z0, context, fps, generators):
        seen.update(z0=z0, fps=fps)
        return z0.sum((2, 3, 4)), torch.zeros(z0.shape[:2], dtype=torch.long)

    monkeypatch.setattr(model.later_diffusion, "errors", errors)
    train.unet_loss(model, items, 0, train.Settings(), "interpolate")
    assert seen["z0"].shape == (2, 3, 4, 8, 8)
    assert seen["fps"].tolist() == [clips[0]["fps"] / 4, clips[1]["fps"] / 4]
    middle = model.config.vae.scaling_factor * items[1][1]["mean"][1:4]
    assert torch.allclose(seen["z0"][1], middle)


def test_the_same_clip_at_a_higher_rate_is_the_same_clip():
    keys = ShapesDataset("test", 8, 64, fps=8, length=48)
    fine = ShapesDataset("test", 29, 64, fps=32, length=48, between=3)
    assert fine[0]["fps"] == 32 and keys.identity() != fine.identity()
    for clip in (fine[i]["video"] for i in range(24)):
        area = (clip > 0).any(1).sum((1, 2)).float()
        assert (area > 0).all() and (clip[1:] - clip[:-1]).abs().amax((1, 2, 3)).min() > 0.05  # it moves in each frame


def test_decoder_only_leaves_the_encoder_and_the_scale_of_the_latents(key_model):
    train.main(["--stage", "vae", "--decoder-only", "--init-from", key_model, "--vae-steps", "2", "--vae-batch-size",
                "8", "--out", "d", "--sample-every", "0"])
    before, after = contents(key_model), contents("d/model.pt")
    for name in before:
        moves = name.startswith(("vae.decoder", "vae.post_quant_conv"))
        assert moves or torch.equal(before[name], after[name])
    assert not torch.equal(before["vae.decoder.conv_in.weight"], after["vae.decoder.conv_in.weight"])
    assert not torch.equal(before["vae.decoder.temporal_attentions.0.to_out.weight"],
                           after["vae.decoder.temporal_attentions.0.to_out.weight"])
    scale = [MagicVideo.load(path).config.vae.scaling_factor for path in (key_model, "d/model.pt")]
    assert scale[0] == scale[1]


@pytest.mark.parametrize("flags, words", [
    (["--stage", "interpolate"], "--stage interpolate.*--init-from"),
    (["--stage", "upscale"], "--stage upscale.*--init-from"),
    (["--decoder-only"], "--decoder-only.*--stage vae"),
    (["--decoder-only", "--stage", "vae"], "--decoder-only.*--init-from"),
])
def test_later_stages_say_what_they_start_from(flags, words):
    with pytest.raises(InputError, match=words):
        train.main(flags)
    assert not Path("runs").exists()


# ----------------------------------------------------------------------------------------------------------------------
# sample.py


def test_all_stages_of_a_prompt_are_written(trained, capsys):
    sample.main(["a red circle", "--checkpoint", str(trained / "u/model.pt"), "--steps", "1", "--interpolate",
                 "--interpolate-steps", "1", "--upscale", "--upscale-steps", "1", "--tile", "32", "--same-noise",
                 "--save-stages", "--out", "c.webp"])
    for name, shape, rate in (("c-keys", (8, 16, 16, 3), 8), ("c-interpolated", (29, 16, 16, 3), 32),
                              ("c", (29, 64, 64, 3), 32)):
        pictures, found = read_clip(f"{name}.webp")
        assert pictures.shape == shape and found == pytest.approx(rate, rel=0.02)
    keys, all_frames = read_clip("c-keys.webp")[0], read_clip("c-interpolated.webp")[0]
    assert abs(all_frames[::4].astype(int) - keys).max() <= 1  # the decoder's temporal layers are zero at the start
    assert "29 frames, 64 x 64" in capsys.readouterr().out


def test_a_grid_of_prompts_goes_through_all_stages(trained):
    sample.main(["a red circle", "a blue square", "--checkpoint", str(trained / "u/model.pt"), "--steps", "1",
                 "--upscale", "--upscale-steps", "1", "--out", "c.webp"])
    assert read_clip("c.webp")[0].shape == (8, 64, 2 * 64 + 2, 3)


@pytest.mark.parametrize("flags, words", [
    (["--interpolate"], "--interpolate.*train it: python train.py --stage interpolate"),
    (["--upscale"], "--upscale.*train it: python train.py --stage upscale"),
    (["--tile", "64"], "--tile.*add --upscale"),
    (["--same-noise"], "--same-noise.*add --upscale"),
    (["--save-stages"], "--save-stages.*add --interpolate or --upscale"),
])
def test_a_model_without_a_stage_says_which_command_trains_it(key_model, flags, words):
    with pytest.raises(InputError, match=words):
        sample.main(["a red circle", "--checkpoint", key_model, *flags])
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("flags, words", [
    (["--upscale", "--tile", "-4"], "--tile -4.*multiple of 2"), (["--upscale", "--tile", "5"], "--tile 5.*multiple"),
    (["--upscale", "--upscale-steps", "0"], "--upscale-steps 0.*1 to 1000"),
    (["--interpolate", "--interpolate-steps", "1001"], "--interpolate-steps 1001.*1 to 1000"),
])
def test_settings_out_of_range_are_one_line_before_any_work(trained, flags, words, monkeypatch):
    monkeypatch.setattr(MagicVideo, "sample_latents", lambda *_: pytest.fail("worked first"))
    with pytest.raises(InputError, match=words):
        sample.main(["a red circle", "--checkpoint", str(trained / "u/model.pt"), *flags])


def test_one_key_frame_has_nothing_beside_it(trained):
    model = MagicVideo.load(trained / "i/model.pt")
    with pytest.raises(InputError, match="one key frame"):
        model.interpolate(torch.zeros(1, 1, 4, 8, 8), ["a red circle"], 8)
    with pytest.raises(ValueError, match="one key frame"):
        cascade.interpolate(model.interpolator, model.later_diffusion, torch.zeros(1, 1, 4, 8, 8),
                            torch.zeros(1, 4, 96), torch.ones(1))


def test_too_little_memory_names_the_flag_that_needs_less(trained, monkeypatch):
    model = MagicVideo.load(trained / "u/model.pt")

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 999 bytes")

    monkeypatch.setattr(model.upscaler, "forward", full)
    with pytest.raises(InputError, match="256 x 256 pixels do not fit the memory; add --tile 128"):
        model.upscale(torch.zeros(1, 1, 3, 64, 64), ["a red circle"], tile=256)
    with pytest.raises(InputError, match="add --tile 256"):
        model.upscale(torch.zeros(1, 1, 3, 64, 64), ["a red circle"])


def test_both_networks_of_the_paper_preset_run_at_its_sizes():
    config = PRESETS["paper"]
    with torch.device("meta"):
        interpolator = UNet3D(cascade.interpolation_config(config.unet))
        upscaler = UNet3D(config.upscale)
        of_gap = interpolator(torch.empty(1, 3, 12, 32, 32), torch.empty(1), torch.empty(1, 77, 768), torch.empty(1))
        of_frame = upscaler(torch.empty(1, 1, 6, 1024, 1024), torch.empty(1), torch.empty(1, 77, 768), None,
                            torch.empty(1))
    assert of_gap.shape == (1, 3, 4, 32, 32) and of_frame.shape == (1, 1, 3, 1024, 1024)


def test_the_pipeline_is_drawn_from_what_sample_wrote():
    for name, frames, side in (("c-keys", 8, 16), ("c-interpolated", 29, 16), ("c", 29, 64)):
        write_clip(f"{name}.webp", torch.linspace(-1, 1, frames).view(-1, 1, 1, 1).expand(-1, 3, side, side), 8)
    sheet = np.asarray(figure.pipeline(Path("c.webp")).convert("L"))
    assert sheet.shape == (3 * 44 + 2 * 16 + 64, 29 * 18)
    keys, between = sheet[44 + 8, 8::18], sheet[2 * 44 + 16 + 8, 8::18]
    assert keys[0] == 0 and keys[28] == 255 and keys[1] == 255 and keys[4] == 36  # at their places, white between
    assert between[0] == 0 and between[28] == 255 and (np.diff(between.astype(int)) > 0).all()
