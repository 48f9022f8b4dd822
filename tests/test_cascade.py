"""What follows the key frames: interpolation and super-resolution, their losses and samples."""

import pytest
import torch

import cascade
from cascade import LATENT_SCALE, Interpolator, Upscaler, upsample_bicubic
from conftest import NoFloat64, close, randn, recorded, seeded, shaken, small_model
from magicvideo import PRESETS
from stages import Draw
from unet3d import FrameAdaptor

TEXT = randn(2, 4, 16)  # of two clips


@pytest.fixture(scope="module")
def model():
    return small_model().double()


@pytest.fixture(scope="module")
def interpolator(model):
    return shaken(Interpolator(model), seed=1)


@pytest.fixture(scope="module")
def upscaler(model):
    return shaken(Upscaler(model), seed=1)


def draw():
    """Make the random numbers of a batch of two, the same at every call."""
    return Draw(seeded(3), 2)


def test_interpolation_starts_as_the_key_frames_network_with_mean_adaptors_blind_to_the_keys(model):
    network = Interpolator(model).double().unet
    z = randn(2, 3, 12, 4, 4)
    rest = (torch.tensor([981, 3]), TEXT, torch.tensor([8.0, 24.0]))
    theirs = small_model().double().unet
    for adaptor in [module for module in theirs.modules() if isinstance(module, FrameAdaptor)]:
        adaptor.scale.data = adaptor.scale.mean(0, keepdim=True).repeat(3, 1)
        adaptor.shift.data = adaptor.shift.mean(0, keepdim=True).repeat(3, 1)
    for module in theirs.modules():
        if hasattr(module, "mask"):
            module.mask = "bidirectional"
    started = network(z, *rest)
    assert close(started, theirs(z[:, :, :4], *rest), 1e-5)  # the means are rounded to float32
    z[:, :, 4:] += 1
    assert torch.equal(network(z, *rest), started)


@pytest.mark.parametrize("frame, channels", [
    (0, slice(0, 4)), (2, slice(0, 4)), (1, slice(4, 8)), (1, slice(8, 12))])
def test_a_frame_between_feels_the_frames_and_the_keys_on_both_sides(interpolator, frame, channels):
    z = randn(1, 3, 12, 4, 4)
    rest = (torch.tensor([500]), TEXT[:1], torch.tensor([8.0]))
    before = interpolator.unet(z, *rest)[0, 1]
    z[0, frame, channels] += 1
    assert not close(interpolator.unet(z, *rest)[0, 1], before, 1e-6)


def test_key_frames_stay_bit_for_bit_and_each_gap_reads_its_own_two_text_and_rate(model):
    calls = []
    interpolator = Interpolator(model)
    interpolator.unet.forward = recorded(lambda z, *_: 0.1 * z[:, :, :4], calls)
    keys = randn(2, 5, 4, 4, 4)
    clips = interpolator.sample(keys, TEXT, fps=8, steps=3)
    assert clips.shape == (2, 17, 4, 4, 4) and torch.equal(clips[:, ::4], keys)
    assert len(calls) == 2 * 3  # clip by clip all gaps in one batch, without guidance
    for clip in range(2):
        z, _, context, fps = calls[3 * clip]
        assert z.shape == (4, 3, 12, 4, 4) and fps.tolist() == [8.0] * 4
        for gap in range(4):
            pair = torch.cat([keys[clip, gap], keys[clip, gap + 1]])
            assert all(torch.equal(z[gap, i, 4:], pair) for i in range(3))
            assert torch.equal(context[gap], TEXT[clip])


def test_interpolation_learns_the_three_frames_between_two_keys_at_the_rate_of_the_keys(model):
    calls = []
    interpolator = Interpolator(model)
    interpolator.unet.forward = recorded(lambda z, *_: 0 * z[:, :, :4], calls)
    z0 = randn(2, 5, 4, 4, 4)
    t = torch.tensor([300, 700])
    loss = interpolator.loss(z0, TEXT, torch.tensor([96.0, 32.0]), t, draw())
    ((z, given_t, context, fps),) = calls
    assert torch.equal(z[:, 1, 4:], z0[:, [0, 4]].flatten(1, 2)) and context is TEXT
    assert torch.equal(given_t, t) and fps.tolist() == [24.0, 8.0]
    eps = draw().normal(3, 4, 4, 4).double()
    fades = [(1 - share) * z0[:, 0] + share * z0[:, 4] for share in (0.25, 0.5, 0.75)]
    residual = LATENT_SCALE * (z0[:, 1:4] - torch.stack(fades, dim=1))
    assert close(z[:, :, :4], interpolator.diffusion.add_noise(residual, eps, t), 1e-12)
    v = interpolator.diffusion.target(residual, eps, t)
    assert close(loss, v.square().mean((1, 2, 3, 4)), 1e-12)


def test_a_network_that_knows_the_residual_samples_the_frames_between(model):
    interpolator = Interpolator(model)
    z0 = randn(2, 5, 4, 4, 4)
    fades = torch.stack([torch.lerp(z0[:, 0], z0[:, 4], i / 4) for i in (1, 2, 3)], dim=1)
    residual = iter(LATENT_SCALE * (z0[:, 1:4] - fades))
    interpolator.unet.forward = lambda *_: -next(residual)[None]  # v of pure noise is -z_0
    sampled = interpolator.sample(z0[:, [0, 4]], TEXT, 8, steps=1)
    assert close(sampled, z0, 0.05)  # a last step ends at t = 0, where there is a little noise


def test_a_clip_is_interpolated_alone_as_in_a_batch(interpolator):
    keys = randn(2, 3, 4, 4, 4)
    both = interpolator.sample(keys, TEXT, 8, steps=2, seed=5)
    assert close(both[1:], interpolator.sample(keys[1:], TEXT[1:], 8, steps=2, seed=6), 1e-9)


def test_the_upscaler_has_no_video_parts_and_is_told_the_noise_level(upscaler):
    assert not any(isinstance(module, FrameAdaptor) for module in upscaler.modules())
    z = randn(2, 1, 6, 8, 8)
    t = torch.tensor([500, 500])
    one, other = (upscaler.unet(z, t, TEXT, torch.tensor(level)) for level in ([1, 1], [1, 20]))
    assert torch.equal(one[0], other[0]) and not close(one[1], other[1], 1e-3)


@pytest.mark.parametrize("missing", [0.0, 0.8])
def test_what_the_bicubic_frame_lacks_is_added_and_nothing_else(model, missing):
    upscaler = Upscaler(model)
    calls = []

    def oracle(z, t, context, level):
        z0 = torch.full_like(z[:, :, :3], missing)
        alpha_bar = upscaler.diffusion.alpha_bar(t)
        eps = (z[:, :, :3] - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
        return upscaler.diffusion.target(z0, eps, t)

    upscaler.unet.forward = recorded(oracle, calls)
    video = 0.5 * randn(1, 2, 3, 8, 8).clamp(-1, 1)
    clip = upscaler.sample(video, TEXT[:1])
    low = torch.cat([calls[i][0][:, 0, 3:] for i in (0, 2)])  # of two frames, two steps each
    # what DDIM's last step leaves of the noise
    assert close(clip[0], (low + missing / cascade.RESIDUAL_SCALE).clamp(-1, 1), 0.03)
    assert 0 < (low - upsample_bicubic(video)[0]).abs().mean() < 0.05  # noised a little
    assert {int(level) for *_, level in calls} == {cascade.SAMPLE_AUG_LEVEL}
    assert torch.equal(calls[0][2], TEXT[:1])


def test_super_resolution_learns_what_a_crop_has_and_the_bicubic_one_lacks(model):
    calls = []
    upscaler = Upscaler(model)
    upscaler.unet.forward = recorded(lambda z, *_: 0 * z[:, :, :3], calls)
    frames = randn(2, 1, 3, 32, 32).clamp(-1, 1)
    t = torch.tensor([0, 999])
    loss = upscaler.loss(frames, TEXT, torch.ones(2), t, draw())
    ((z, _, _, level),) = calls
    assert z.shape == (2, 1, 6, 8, 8) and (level < 20).all()
    drawn = draw()
    eps, _ = (drawn.normal(1, 3, 8, 8).double() for _ in range(2))
    drawn.integers(20)
    corners = drawn.integers(25, 2).tolist()
    assert any(top != left for top, left in corners)
    for i, (top, left) in enumerate(corners):
        low = z[i, 0, 3:]
        crops = frames[i, 0].unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        errors = []  # of every crop, as if it were the one
        for crop in crops:
            z0 = cascade.RESIDUAL_SCALE * (crop - low)[None, None]
            v = upscaler.diffusion.target(z0, eps[i : i + 1], t[i : i + 1])
            errors.append(abs(v.square().mean() - loss[i]).item())
        assert errors[25 * top + left] < 1e-6 and sum(error < 1e-6 for error in errors) == 1


def test_a_frame_is_enlarged_alone_as_in_a_clip_also_with_the_highest_seed(upscaler):
    videos = randn(2, 3, 3, 8, 8).clamp(-1, 1)
    clips = upscaler.sample(videos, TEXT, steps=2, seed=2**32 - 1)
    assert clips.shape == (2, 3, 3, 32, 32) and clips.abs().max() <= 1
    alone = upscaler.sample(videos[1:, :1], TEXT[1:], steps=2, seed=2**32)
    assert close(alone, clips[1:, :1], 1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_few_steps_start_at_pure_noise_in_every_preset(preset):
    model = small_model()
    model.config.preset = preset
    model.config.staggered = PRESETS[preset].staggered
    model.config.diffusion = PRESETS[preset].diffusion
    calls = []
    networks = Interpolator(model), Upscaler(model)
    networks[0].unet.forward = recorded(lambda z, *_: z[:, :, :4], calls)
    networks[1].unet.forward = recorded(lambda z, *_: z[:, :, :3], calls)
    networks[0].sample(torch.zeros(1, 2, 4, 4, 4), TEXT[:1].float(), 8, steps=4)
    networks[1].sample(torch.zeros(1, 1, 3, 8, 8), TEXT[:1].float())  # 2 steps by default
    assert [int(t[0]) for _, t, *_ in calls] == [999, 749, 499, 249, 999, 499]
    assert all(network.diffusion.alphas_cumprod[-1] == 0 for network in networks)


def test_another_number_of_texts_than_clips_and_a_single_key_frame_are_refused(
        interpolator, upscaler):
    keys = torch.zeros(2, 3, 4, 4, 4)
    with pytest.raises(ValueError, match="1 texts for 2 clips"):
        interpolator.sample(keys, TEXT[:1], 8)
    with pytest.raises(ValueError, match="^1 key frames"):
        interpolator.sample(keys[:, :1], TEXT, 8)
    with pytest.raises(ValueError, match="3 texts for 2 clips"):
        upscaler.sample(torch.zeros(2, 1, 3, 4, 4), torch.cat([TEXT, TEXT[:1]]))


def test_build_loads_what_is_saved_in_the_model(interpolator):
    model = small_model()
    model.cascade["interpolate"] = interpolator.state_dict()
    built = cascade.build(model, "interpolate").double().state_dict()
    assert all(close(p, interpolator.state_dict()[name], 1e-6) for name, p in built.items())


def test_from_prompt_to_large_pixels_and_in_both_losses_float64_never_reaches_the_device():
    model = small_model()
    networks = Interpolator(model).to("meta"), Upscaler(model).to("meta")
    model = model.to("meta")
    with NoFloat64():
        z = model.sample(["a red circle", "a blue square"], steps=2, decode=False)
        text = model.encode_text(["a red circle", "a blue square"])
        t = torch.tensor([3, 4])
        fps = torch.zeros(2, device="meta")
        z = networks[0].sample(z, text, 8.0, steps=2)
        video = networks[1].sample(model.decode(z[:, :2]), text, steps=2)
        assert networks[0].loss(z[:, :5], text, fps, t, draw()).is_meta
        assert networks[1].loss(video[:, :1], text, fps, t, draw()).is_meta
    assert video.is_meta and video.shape == (2, 2, 3, 64, 64) and video.dtype == torch.float32
