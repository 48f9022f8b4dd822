"""The VideoVAE: Stable Diffusion's image VAE at the start, whose decoder alone learns to see the clip.

Tests that compare with diffusers skip with a reason where it is not installed.
"""

import pytest
import torch

from conftest import changed, close, randn, shaken
from vae import VAEConfig, VideoVAE

FRAMES = 5
TINY = dict(channels=(8, 16), layers=1, groups=4)           # two levels: frames are halved once


def is_new(name):
    """Whether a weight is the VideoVAE's own and not the image VAE's."""
    return "temporal" in name


def image_started(config, seed=0):
    """The VideoVAE as its training starts: a trained image part (here: random), temporal layers as they are born."""
    vae = VideoVAE(config)
    born = {name: weight.clone().double() for name, weight in vae.state_dict().items() if is_new(name)}
    shaken(vae, seed).load_state_dict(born, strict=False)
    return vae


@pytest.fixture(scope="module")
def vae():
    return shaken(VideoVAE(VAEConfig(**TINY)))


@pytest.fixture(scope="module")
def video():
    return randn(2, FRAMES, 3, 8, 12)


@pytest.fixture(scope="module")
def latents():
    return randn(2, FRAMES, 4, 4, 6)


# ---------------------------------------------------------------------------------------------------------------------
# The image VAE inside


@torch.no_grad()
@pytest.mark.parametrize("new", [dict(), dict(temporal_conv=True), dict(temporal_attention=False, temporal_conv=True)])
def test_training_starts_from_the_image_vae_exactly(latents, new):
    started = image_started(VAEConfig(**TINY, **new))
    image = VideoVAE(VAEConfig(**TINY, temporal_attention=False)).double()
    missing, unexpected = image.load_state_dict(started.state_dict(), strict=False)
    assert not missing and unexpected and all(is_new(name) for name in unexpected)
    assert torch.equal(started.decode(latents), image.decode(latents))
    alone = [started.decode(latents[:, i : i + 1]) for i in range(FRAMES)]
    assert close(started.decode(latents), torch.cat(alone, 1), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("frame", range(FRAMES))
def test_the_encoder_reads_every_frame_by_itself(vae, video, frame):
    for before, after in zip(vae.encode(video), vae.encode(changed(video, frame))):
        differs = (before != after).all(-1).all(-1).all(-1)                                # (b, f)
        assert differs[:, frame].all() and differs.sum() == 2
        others = [i for i in range(FRAMES) if i != frame]
        assert torch.equal(before[:, others], after[:, others])


def test_no_weight_of_the_encoder_is_new():
    vae = VideoVAE(VAEConfig(**TINY, temporal_conv=True))
    assert {name.split(".")[0] for name in vae.state_dict() if is_new(name)} == {"decoder"}


# ---------------------------------------------------------------------------------------------------------------------
# The temporal layers of the decoder


@torch.no_grad()
@pytest.mark.parametrize("frame", range(FRAMES))
def test_trained_temporal_attention_carries_every_frame_forward_and_none_back(vae, latents, frame):
    before, after = vae.decode(latents), vae.decode(changed(latents, frame))
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert (before[:, frame:] != after[:, frame:]).all()


@torch.no_grad()
@pytest.mark.parametrize("frame", range(FRAMES))
def test_each_temporal_convolution_reaches_one_frame_back_and_one_forward(latents, frame):
    vae = shaken(VideoVAE(VAEConfig(**TINY, temporal_attention=False, temporal_conv=True)))
    differs = vae.decode(latents) != vae.decode(changed(latents, frame))
    near = [abs(i - frame) <= 2 for i in range(FRAMES)]     # two of them, one after another
    assert differs.any(-1).any(-1).any(-1).tolist() == [near, near]


@torch.no_grad()
def test_clips_of_a_batch_do_not_mix(vae, video, latents):
    assert close(vae.decode(latents)[1:], vae.decode(latents[1:]), 1e-12)
    assert close(vae.encode(video)[0][1:], vae.encode(video[1:])[0], 1e-12)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("conv", [True, False])
def test_two_layers_of_each_kind_are_there_where_switched_on(attention, conv):
    decoder = VideoVAE(VAEConfig(**TINY, temporal_attention=attention, temporal_conv=conv)).decoder
    assert (len(decoder.temporal_attentions), len(decoder.temporal_convs)) == (2 * attention, 2 * conv)


def test_gradients_reach_every_weight(video):
    vae = shaken(VideoVAE(VAEConfig(**TINY, temporal_conv=True)))
    mean, logvar = vae.encode(video)
    vae.decode(vae.sample_latents(mean, logvar, randn(*mean.shape, seed=1))).square().sum().backward()
    for name, p in vae.named_parameters():
        if not name.endswith("to_k.bias"):                  # a shift of all keys cancels in the softmax
            assert p.grad.any(), name


# ---------------------------------------------------------------------------------------------------------------------
# Latents


@torch.no_grad()
def test_logvar_is_clamped_and_the_mean_is_not(video):
    vae = shaken(VideoVAE(VAEConfig(**TINY)))
    vae.quant_conv.weight *= 1000
    mean, logvar = vae.encode(video)
    assert (logvar.min(), logvar.max()) == (-30, 20) and mean.min() < -30 and mean.max() > 20


def test_latents_are_a_draw_from_the_posterior_in_units_of_the_scaling_factor():
    vae = VideoVAE(VAEConfig(**TINY))
    mean, logvar, eps = (randn(2, 3, 4, 5, 6, seed=seed) for seed in range(3))
    assert close(vae.sample_latents(mean, logvar, eps), 0.18215 * (mean + logvar.exp().sqrt() * eps), 1e-12)


@torch.no_grad()
def test_decoding_takes_latents_as_sample_latents_gives_them(vae, video):
    mean, logvar = vae.encode(video)
    unscaled = shaken(VideoVAE(VAEConfig(**TINY, scaling_factor=1.0)))
    scaled = vae.sample_latents(mean, logvar, torch.zeros_like(mean))
    assert close(scaled, 0.18215 * mean, 1e-12)
    assert close(vae.decode(scaled), unscaled.decode(mean), 1e-9)


@pytest.mark.parametrize("size", [(12, 16), (16, 12), (7, 8)])
def test_frames_that_cannot_be_halved_are_refused_with_their_size(size):
    vae = VideoVAE(VAEConfig(channels=(4, 4, 4, 4), layers=1, groups=2))
    with pytest.raises(ValueError, match="{} x {}.*multiples of 8".format(*size)):
        vae.encode(torch.zeros(1, 2, 3, *size))


# ---------------------------------------------------------------------------------------------------------------------
# Stable Diffusion's weights


def diffusers_vae(config):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to compare with")
    levels = len(config.channels)
    return diffusers.AutoencoderKL(
        block_out_channels=config.channels, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=config.layers,
        latent_channels=config.latent_channels, norm_num_groups=config.groups)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [TINY, dict(channels=(8, 12, 16, 16), layers=2, groups=4, latent_channels=3)])
@pytest.mark.parametrize("new", [dict(temporal_attention=False), dict(temporal_conv=True)])
@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_outputs_equal_those_of_diffusers_frame_by_frame_with_its_own_weights(sizes, new, dtype, within):
    config = VAEConfig(**sizes, **new)
    theirs, ours = shaken(diffusers_vae(config)).to(dtype), image_started(config, seed=1).to(dtype)
    if dtype == torch.float64:                              # in float32 1e-5 is for numbers of about one
        theirs.quant_conv.weight *= 100                     # log-variances on both sides of the clamp
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and set(missing) == {name for name in ours.state_dict() if is_new(name)}

    video = randn(2, 3, 3, 16, 24).to(dtype)
    mean, logvar = ours.encode(video)
    assert dtype == torch.float32 or logvar.min() == -30 and logvar.max() == 20
    for i in range(3):
        posterior = theirs.encode(video[:, i]).latent_dist
        assert close(mean[:, i], posterior.mean, within)
        assert close(logvar[:, i], posterior.logvar, within)
        assert close(ours.decode(mean * 0.18215)[:, i], theirs.decode(posterior.mean).sample, within)


@pytest.fixture(scope="module")
def full_size():
    """Stable Diffusion's sizes without any memory behind them."""
    with torch.device("meta"):
        return VideoVAE(VAEConfig(temporal_conv=True))


def test_image_parts_at_full_size_are_stable_diffusions_248_tensors(full_size):
    image = [weight for name, weight in full_size.state_dict().items() if not is_new(name)]
    assert len(image) == 248 and sum(weight.numel() for weight in image) == 83_653_863


def test_names_and_shapes_at_full_size_are_those_of_diffusers(full_size):
    with torch.device("meta"):
        theirs = diffusers_vae(VAEConfig()).state_dict()
    image = {name: weight.shape for name, weight in full_size.state_dict().items() if not is_new(name)}
    assert image == {name: weight.shape for name, weight in theirs.items()}


def test_latents_start_almost_without_noise():
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(channels=(8, 8), groups=4, layers=1))
    _, logvar = vae.encode(torch.rand(2, 3, 3, 16, 16) * 2 - 1)
    assert abs(logvar.mean().item() + 6) < 0.5 and logvar.max() < -4  # sigma about 0.05
