"""The VideoVAE: Stable Diffusion's image VAE at the start, whose decoder alone sees the clip.

Tests that compare with diffusers skip with a reason where it is not installed.
"""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F

from conftest import changed, close, image_started, randn, shaken
from unet3d import DirectedTemporalAttention, is_video_parameter
from vae import Decoder, Encoder, Level, MidBlock, VAEConfig, VideoVAE

FRAMES = 5
TINY = dict(channels=(8, 16), layers=1, groups=4)  # two levels: frames are halved once
VIDEO = randn(2, FRAMES, 3, 8, 12)
LATENTS = randn(2, FRAMES, 4, 4, 6)


@pytest.fixture(scope="module")
def vae():
    return shaken(VideoVAE(VAEConfig(**TINY)))


def test_training_starts_from_the_image_vae_exactly():
    vae = image_started(VideoVAE(VAEConfig(**TINY)))
    started = vae.decode(LATENTS)
    for layer in vae.decoder.temporal_attentions:
        layer.forward = torch.zeros_like  # an image VAE has nothing to add
    assert torch.equal(started, vae.decode(LATENTS))


def test_a_clip_of_one_frame_is_the_image_vae_exactly_however_the_temporal_layers_are_trained(
        vae):
    image = image_started(VideoVAE(VAEConfig(**TINY)))
    image.load_state_dict({name: p for name, p in vae.state_dict().items()
                           if not is_video_parameter(name)}, strict=False)
    for i in range(FRAMES):
        frame = LATENTS[:, i : i + 1]
        assert torch.equal(vae.decode(frame), image.decode(frame))
    assert (vae.decode(LATENTS[:, :2]) != image.decode(LATENTS[:, :2])).all()


@pytest.mark.parametrize("frame", range(FRAMES))
def test_the_encoder_reads_every_frame_by_itself(vae, frame):
    for before, after in zip(vae.encode(VIDEO), vae.encode(changed(VIDEO, frame))):
        differs = (before != after).all(-1).all(-1).all(-1)  # (b, f)
        assert differs[:, frame].all() and differs.sum() == 2
        others = [i for i in range(FRAMES) if i != frame]
        assert torch.equal(before[:, others], after[:, others])


@pytest.mark.parametrize("frame", range(FRAMES))
def test_the_decoder_carries_every_frame_forward_and_none_back(vae, frame):
    before = vae.decode(LATENTS)
    after = vae.decode(changed(LATENTS, frame))
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert (before[:, frame:] != after[:, frame:]).all()


@pytest.mark.parametrize("place", [0, 1])
def test_each_temporal_layer_of_the_decoder_adds_one_head_of_strict_attention(vae, place):
    layer = vae.decoder.temporal_attentions[place]
    z = randn(2, FRAMES, 16, 2, 3)
    tokens = z.permute(0, 3, 4, 1, 2)  # (b, h, w, f, c)
    tokens = F.layer_norm(tokens, (16,), layer.norm.weight, layer.norm.bias, eps=1e-5)
    q, k, v = (tokens @ to.weight.T for to in (layer.to_q, layer.to_k, layer.to_v))
    future = torch.ones(FRAMES, FRAMES).triu(1).bool()
    scores = (q @ k.transpose(-1, -2) / math.sqrt(16)).masked_fill(future, -math.inf)
    out = scores.softmax(-1) @ v @ layer.to_out.weight.T + layer.to_out.bias
    expected = (z + out.permute(0, 3, 4, 1, 2)).flatten(0, 1)
    assert close(vae.decoder.temporal(place, z.flatten(0, 1), FRAMES), expected, 1e-12)


def test_every_weight_is_used():
    vae = shaken(VideoVAE(VAEConfig(**TINY)))
    mean, logvar = vae.encode(VIDEO)
    vae.decode(vae.sample_latents(mean, logvar, mean)).square().sum().backward()
    for name, p in vae.named_parameters():
        assert p.grad.any() or name.endswith("to_k.bias"), name  # cancels in the softmax


def test_latents_are_a_draw_from_the_posterior_in_units_of_the_scaling_factor(vae):
    mean, logvar = vae.encode(VIDEO)
    eps = randn(*mean.shape, seed=1)
    z = vae.sample_latents(mean, logvar, eps)
    assert close(z, 0.18215 * (mean + logvar.exp().sqrt() * eps), 1e-12)
    unscaled = shaken(VideoVAE(VAEConfig(**TINY, scaling_factor=1.0)))
    assert close(vae.decode(0.18215 * mean), unscaled.decode(mean), 1e-9)


@pytest.mark.parametrize("size", [(12, 16), (16, 12), (7, 8)])
def test_frames_that_cannot_be_halved_are_refused_with_their_size(size):
    vae = VideoVAE(VAEConfig(channels=(4, 4, 4, 4), layers=1, groups=2))
    with pytest.raises(ValueError, match="{} x {}.*multiples of 8".format(*size)):
        vae.encode(torch.zeros(1, 2, 3, *size))


def diffusers_vae(config):
    diffusers = pytest.importorskip("diffusers", reason="nothing to compare with: no diffusers")
    levels = len(config.channels)
    return diffusers.AutoencoderKL(
        block_out_channels=config.channels, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=config.layers,
        latent_channels=config.latent_channels, norm_num_groups=config.groups)


def test_outputs_equal_those_of_diffusers_frame_by_frame_with_its_own_weights():
    config = VAEConfig(channels=(8, 12, 16, 16), layers=2, groups=4, latent_channels=3)
    theirs = shaken(diffusers_vae(config))
    theirs.quant_conv.weight.data *= 100  # log-variances on both sides of the clamp
    ours = image_started(VideoVAE(config), seed=1)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and {*missing} == {*filter(is_video_parameter, ours.state_dict())}

    video = randn(2, 3, 3, 16, 24)
    mean, logvar = ours.encode(video)
    assert (logvar.min(), logvar.max()) == (-30, 20) and mean.min() < -30 and mean.max() > 20
    decoded = ours.decode(0.18215 * mean)
    for i in range(3):
        posterior = theirs.encode(video[:, i]).latent_dist
        assert close(mean[:, i], posterior.mean, 1e-9)
        assert close(logvar[:, i], posterior.logvar, 1e-9)
        assert close(decoded[:, i], theirs.decode(posterior.mean).sample, 1e-9)


def test_image_parts_at_full_size_are_sds_248_tensors_and_only_the_decoder_has_video_parts():
    with torch.device("meta"):  # no memory behind it
        vae = VideoVAE(VAEConfig())
    weights = vae.state_dict()
    video_parts = {*filter(is_video_parameter, weights)}
    image = [p for name, p in weights.items() if name not in video_parts]
    assert len(image) == 248 and sum(p.numel() for p in image) == 83_653_863
    assert {name.split(".")[0] for name in video_parts} == {"decoder"}
    assert {m.num_groups for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


@pytest.mark.parametrize("half, inputs", [(Encoder, [(16, 3, 256, 256)]),
                                          (Decoder, [(16, 4, 256 // 8, 256 // 8), 16])])
def test_the_table_of_sizes_above_each_half_is_what_its_full_size_runs_through(half, inputs):
    with torch.device("meta"):  # no memory behind it, and nothing is computed
        network = half(VAEConfig())
        inputs = [torch.zeros(x) if isinstance(x, tuple) else x for x in inputs]
    rows = []

    def note(name, module, read, out):
        reads = [resnet.conv1.in_channels for resnet in getattr(module, "resnets", [])]
        channels = ", ".join(str(c) for c in reads or [read.shape[-3]])
        sides = dict.fromkeys([str(read.shape[-1]), str(out.shape[-1])])
        rows.append([name, f"{channels} -> {out.shape[-3]}", " -> ".join(sides),
                     str(read.shape[:-3].numel())])

    for name, module in network.named_modules():
        name = re.sub(r"\.(\d)", r"[\1]", name)
        if isinstance(module, (Level, MidBlock, DirectedTemporalAttention)) or (
                name in ("conv_in", "conv_out")):
            module.register_forward_hook(
                lambda module, read, out, name=name: note(name, module, read[0], out))
    network(*inputs)
    heading, *table = re.findall(r"^    #   (.+)$", inspect.getsource(half), re.MULTILINE)
    assert heading.split() == ["layers", "channels", "side", "frames"]
    assert [re.split("  +", row) for row in table] == rows
