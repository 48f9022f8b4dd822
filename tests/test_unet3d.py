"""The 3D U-Net: an image model at the start, causal in the frames, and Stable Diffusion's where it is only that.

Tests that compare with diffusers skip with a reason where it is not installed.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import changed, close, randn, shaken
from unet3d import (MASKS, DirectedTemporalAttention, FPSEmbedding, FrameAdaptor, SpatialTransformer, TransformerBlock,
                    UNet3D, UNetConfig, directed_attention, sinusoid)

FRAMES = 5
TINY = dict(channels=(8, 16), attention=(True, False), layers=1, heads=2, groups=4, context_width=12, frames=FRAMES)


def is_new(name):
    """Whether a weight is MagicVideo's own and not the image model's."""
    return any(part in name for part in ("adaptor", "temporal_attentions", "fps_embedding"))


def image_started(config, seed=0):
    """The U-Net at the start of video training: a trained image part (here: random), new parts as they are born."""
    unet = UNet3D(config)
    born = {name: weight.clone().double() for name, weight in unet.state_dict().items() if is_new(name)}
    shaken(unet, seed).load_state_dict(born, strict=False)
    return unet


@pytest.fixture(scope="module")
def unet():
    return shaken(UNet3D(UNetConfig(**TINY)))


@pytest.fixture(scope="module")
def clips():
    """z, t, context, fps of two clips that differ in all of them."""
    return randn(2, FRAMES, 4, 4, 6), torch.tensor([981, 3]), randn(2, 7, 12, seed=1), torch.tensor([8.0, 24.0])


# ---------------------------------------------------------------------------------------------------------------------
# The image model inside


@torch.no_grad()
@pytest.mark.parametrize("mask", ["strict", "literal"])
@pytest.mark.parametrize("fps", [1, 8, 24.5])
def test_video_training_starts_from_the_image_model_exactly(clips, fps, mask):
    z, t, context, _ = clips
    unet = image_started(UNetConfig(**TINY, mask=mask))
    assert torch.equal(unet(z, t, context, torch.full((2,), fps)), unet(z, t, context))


@torch.no_grad()
def test_without_fps_every_frame_is_an_image_by_itself(unet, clips):
    z, t, context, _ = clips
    alone = [unet(z[:, i : i + 1], t, context) for i in range(FRAMES)]
    assert close(unet(z, t, context), torch.cat(alone, 1), 1e-12)


@torch.no_grad()
def test_with_a_step_for_each_frame_every_frame_is_the_image_model_at_its_own(clips):
    z, _, context, fps = clips
    t, unet = torch.randint(1000, (2, FRAMES), generator=torch.Generator().manual_seed(0)), image_started(
        UNetConfig(**TINY))
    alone = torch.cat([unet(z[:, i : i + 1], t[:, i], context) for i in range(FRAMES)], 1)
    assert close(unet(z, t, context, fps), alone, 1e-12)
    assert close(unet(z, t[:, :1].expand(2, FRAMES), context, fps), unet(z, t[:, 0], context, fps), 1e-12)


@torch.no_grad()
def test_the_image_model_takes_any_number_of_frames(unet, clips):
    _, t, context, _ = clips
    for frames in (1, FRAMES - 1, FRAMES + 3):
        assert unet(randn(2, frames, 4, 4, 4), t, context).shape == (2, frames, 4, 4, 4)


def test_the_image_model_uses_every_image_weight_and_no_new_one(clips):
    z, t, context, _ = clips
    unet = shaken(UNet3D(UNetConfig(**TINY)))
    unet(z, t, context).square().sum().backward()
    for name, p in unet.named_parameters():
        assert p.grad is None if is_new(name) else p.grad.any(), name


def test_the_video_model_uses_every_weight(clips):
    unet = shaken(UNet3D(UNetConfig(**TINY)))
    unet(*clips).square().sum().backward()
    for name, p in unet.named_parameters():
        assert p.grad.any(), name


@torch.no_grad()
def test_every_clip_of_a_batch_has_its_own_step_text_and_fps(unet, clips):
    alone = [unet(*(x[i : i + 1] for x in clips)) for i in range(2)]
    assert close(unet(*clips), torch.cat(alone), 1e-12)
    for i in (1, 2, 3):
        exchanged = [x.flip(0) if i == j else x for j, x in enumerate(clips)]
        assert (unet(*exchanged) != unet(*clips)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Adaptors


def test_an_adaptor_is_one_scale_and_one_shift_per_frame_and_channel():
    adaptor = shaken(FrameAdaptor(3, 2))
    assert adaptor.scale.shape == adaptor.shift.shape == (3, 2)
    z, tokens = randn(2, 3, 2, 4, 5), randn(2, 3, 6, 2)
    for i in range(3):
        for c in range(2):
            scale, shift = adaptor.scale[i, c], adaptor.shift[i, c]
            assert close(adaptor(z)[:, i, c], scale * z[:, i, c] + shift, 1e-12)
            assert close(adaptor(tokens)[:, i, :, c], scale * tokens[:, i, :, c] + shift, 1e-12)


def test_training_on_one_frame_moves_the_scale_and_shift_of_that_frame_alone():
    adaptor = FrameAdaptor(3, 2)
    optimizer = torch.optim.SGD(adaptor.parameters(), lr=0.1)
    adaptor(torch.ones(1, 3, 2, 4, 4))[:, 1].sum().backward()
    optimizer.step()
    assert (adaptor.scale != 1).any(1).tolist() == (adaptor.shift != 0).any(1).tolist() == [False, True, False]


@torch.no_grad()
def test_every_3x3_convolution_and_every_self_attention_hands_its_output_to_an_adaptor_of_its_own(unet, clips):
    makers = [module for module in unet.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    makers += [module.attn1 for module in unet.modules() if isinstance(module, TransformerBlock)]
    calls = []                                              # (module, where the tensor it hands on lies in memory)
    hooks = [maker.register_forward_hook(lambda m, args, out: calls.append((m, out.data_ptr()))) for maker in makers]
    hooks += [adaptor.register_forward_pre_hook(lambda m, args: calls.append((m, args[0].data_ptr())))
              for adaptor in unet.modules() if isinstance(adaptor, FrameAdaptor)]
    unet(*clips)
    for hook in hooks:
        hook.remove()
    makers, adaptors = calls[0::2], calls[1::2]
    assert [address for _, address in makers] == [address for _, address in adaptors]
    assert all(isinstance(adaptor, FrameAdaptor) for adaptor, _ in adaptors)
    assert len({id(adaptor) for adaptor, _ in adaptors}) == len(adaptors) == len(makers)
    assert len(adaptors) == sum(isinstance(module, FrameAdaptor) for module in unet.modules())


def test_there_are_as_many_adaptors_as_3x3_convolutions_and_spatial_attentions(unet):
    count = lambda kind: sum(isinstance(module, kind) for module in unet.modules())
    convolutions = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in unet.modules())
    assert count(FrameAdaptor) == convolutions + count(SpatialTransformer)
    assert count(DirectedTemporalAttention) == count(SpatialTransformer)


def test_no_two_layers_share_a_weight(unet):
    weights = list(unet.named_parameters(remove_duplicate=False))
    assert len({p.data_ptr() for _, p in weights}) == len(weights)


@torch.no_grad()
def test_another_number_of_frames_than_trained_is_refused_with_both_numbers(unet, clips):
    z, t, context, fps = clips
    with pytest.raises(ValueError, match=f"^3 frames.*of {FRAMES} frames"):
        unet(z[:, :3], t, context, fps)


@pytest.mark.parametrize("size", [(5, 6), (6, 5)])
def test_latents_that_cannot_be_halved_are_refused_with_their_size(unet, clips, size):
    with pytest.raises(ValueError, match="{} x {}.*multiples of 2".format(*size)):
        unet(randn(2, FRAMES, 4, *size), *clips[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Directed temporal attention


@pytest.fixture(scope="module", params=["strict", "literal"])
def temporal(request):
    return shaken(DirectedTemporalAttention(6, heads=2, mask=request.param))


@pytest.fixture(scope="module")
def qkv():
    """Three tensors (n, heads, f, d) with d = f, so that an identity matrix fits in the place of v."""
    return [randn(3, 2, FRAMES, FRAMES, seed=seed) for seed in range(3)]


def explicit(q, k, v, mask):
    """A v as the formula stands: rows are queries, the lower triangle with the diagonal is seen."""
    if mask == "bidirectional":
        return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    scores, seen = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), torch.ones(q.shape[-2], q.shape[-2]).tril().bool()
    a = scores.masked_fill(~seen, -math.inf).softmax(-1) if mask == "strict" else scores.softmax(-1) * seen
    return a @ v


def rows(q, k, mask):
    """The attention matrix itself, (n, heads, f, f), read off by giving every frame its own unit vector as value."""
    return directed_attention(q, k, torch.eye(q.shape[-2], dtype=q.dtype).expand_as(q), mask)


@pytest.mark.parametrize("mask", MASKS)
def test_all_masks_are_their_formula_written_out(qkv, mask):
    assert close(directed_attention(*qkv, mask), explicit(*qkv, mask), 1e-12)


@torch.no_grad()
def test_temporal_attention_is_the_formula_written_out(temporal):
    z = randn(2, FRAMES, 6, 3, 2)
    for b, y, x in ((0, 0, 1), (1, 2, 0)):
        tokens = F.layer_norm(z[b, :, :, y, x], (6,), temporal.norm.weight, temporal.norm.bias, eps=1e-5)   # (f, c)
        q, k, v = tokens @ temporal.to_q.weight.T, tokens @ temporal.to_k.weight.T, tokens @ temporal.to_v.weight.T
        heads = [explicit(q[:, h], k[:, h], v[:, h], temporal.mask) for h in (slice(0, 3), slice(3, 6))]
        expected = torch.cat(heads, -1) @ temporal.to_out.weight.T + temporal.to_out.bias
        assert close(temporal(z)[b, :, :, y, x], expected, 1e-12)


@torch.no_grad()
def test_spatial_and_temporal_attention_read_the_same_tensor_and_their_outputs_are_summed(unet, clips):
    calls = []                                              # (module, the tensor it read, the tensor it wrote)
    hooks = [module.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out)))
             for module in unet.modules() if isinstance(module, (SpatialTransformer, DirectedTemporalAttention))]
    unet(*clips)
    assert len(calls) == 2 * 4                              # one ST block down, one in the middle, two up
    for (spatial, z, _), (directed, same, _) in zip(calls[0::2], calls[1::2]):
        assert isinstance(spatial, SpatialTransformer) and isinstance(directed, DirectedTemporalAttention)
        assert z is same

    calls.clear()
    summed = unet.mid_block.layer(0, randn(2, FRAMES, 16, 2, 3), randn(2, 1, 32), clips[2], video=True)
    for hook in hooks:
        hook.remove()
    assert torch.equal(summed, calls[0][2] + calls[1][2])


@torch.no_grad()
def test_frames_mix_at_equal_places_only(temporal):
    z = randn(2, FRAMES, 6, 3, 4)
    moved = z.clone()
    moved[0, 0, :, 1, 2] = randn(6, seed=9)                 # one pixel of the first frame of the first clip
    differs = (temporal(z) != temporal(moved)).any(2)       # (b, f, h, w)
    assert differs[0, :, 1, 2].all()
    assert differs.sum() == FRAMES


@torch.no_grad()
@pytest.mark.parametrize("frame", range(FRAMES))
def test_strict_changing_a_frame_leaves_earlier_frames_bit_identical_and_changes_all_others(frame):
    temporal, z = shaken(DirectedTemporalAttention(6, heads=2)), randn(2, FRAMES, 6, 3, 2)
    before, after = temporal(z), temporal(changed(z, frame))
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert (before[:, frame:] != after[:, frame:]).all()


@pytest.mark.parametrize("frame", range(1, FRAMES))
def test_literal_a_later_key_leaks_through_the_denominator_but_a_later_value_does_not(qkv, frame):
    q, k, v = qkv
    before = directed_attention(q, k, v, "literal")[:, :, :frame]
    new_key, new_value = (changed(x.transpose(1, 2), frame).transpose(1, 2) for x in (k, v))
    assert (directed_attention(q, new_key, v, "literal")[:, :, :frame] != before).all()
    assert torch.equal(directed_attention(q, k, new_value, "literal")[:, :, :frame], before)


@pytest.mark.parametrize("mask", ["strict", "literal"])
def test_no_frame_looks_ahead_and_every_frame_sees_itself(qkv, mask):
    a = rows(*qkv[:2], mask)
    assert not a.triu(1).any() and (a + torch.ones_like(a).triu(1) > 0).all()


def test_strict_rows_sum_to_one_literal_rows_to_less_and_the_last_to_one(qkv):
    strict, literal = rows(*qkv[:2], "strict").sum(-1), rows(*qkv[:2], "literal").sum(-1)
    assert close(strict, torch.ones_like(strict), 1e-12)
    assert (literal[..., :-1] < 1).all() and close(literal[..., -1], strict[..., -1], 1e-12)


def test_literal_rows_divided_by_their_sums_are_the_strict_rows(qkv):
    literal = rows(*qkv[:2], "literal")
    assert close(literal / literal.sum(-1, keepdim=True), rows(*qkv[:2], "strict"), 1e-12)


def test_literal_the_first_of_sixteen_equal_frames_is_damped_to_a_sixteenth():
    q = k = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    assert close(rows(q, k, "literal").sum(-1)[0, 0], torch.arange(1, 17) / 16, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("frame", range(FRAMES))
def test_with_strict_masks_the_whole_network_is_causal_bit_for_bit(unet, clips, frame):
    z, t, context, fps = clips
    before, after = unet(z, t, context, fps), unet(changed(z, frame), t, context, fps)
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert (before[:, frame:] != after[:, frame:]).all()


@torch.no_grad()
def test_with_literal_masks_the_whole_network_is_not_causal(clips):
    z, t, context, fps = clips
    unet = shaken(UNet3D(UNetConfig(**TINY, mask="literal")))
    assert (unet(changed(z, -1), t, context, fps)[:, :-1] != unet(z, t, context, fps)[:, :-1]).all()


@pytest.mark.parametrize("mask", ["Strict", "none", ""])
def test_an_unknown_mask_is_refused(mask):
    with pytest.raises(ValueError, match=f'"{mask}".*strict, literal, bidirectional'):
        UNet3D(UNetConfig(**TINY, mask=mask))


# ---------------------------------------------------------------------------------------------------------------------
# Frames per second


@torch.no_grad()
def test_the_fps_embedding_is_the_formula_written_out():
    embedding = shaken(FPSEmbedding(6))
    v = torch.tensor([8.0, 23.976])
    angles = v[:, None] * torch.tensor([1, 10000 ** -(1 / 3), 10000 ** -(2 / 3)])
    x = torch.cat([angles.cos(), angles.sin()], -1).double() @ embedding.linear_1.weight.T + embedding.linear_1.bias
    expected = (x * x.sigmoid()) @ embedding.linear_2.weight.T + embedding.linear_2.bias
    assert close(embedding(v), expected, 1e-5)              # the waves are float32, as Stable Diffusion's


@torch.no_grad()
def test_fps_has_an_effect_and_zeroing_the_last_layer_removes_it(clips):
    *z_t_context, fps = clips
    unet = shaken(UNet3D(UNetConfig(**TINY)))
    assert (unet(*z_t_context, fps) != unet(*z_t_context, fps + 1)).all()
    nn.init.zeros_(unet.fps_embedding.linear_2.weight)
    nn.init.zeros_(unet.fps_embedding.linear_2.bias)
    assert torch.equal(unet(*z_t_context, fps), unet(*z_t_context, 3 * fps))


def test_waves_are_cosines_then_sines():
    assert sinusoid(torch.zeros(1), 6).tolist() == [[1, 1, 1, 0, 0, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# Stable Diffusion's weights


LAYOUTS = {
    "two_levels": TINY,
    "sd": dict(channels=(8, 16, 24, 24), attention=(True, True, True, False), layers=2, heads=8, groups=4,
               context_width=20, frames=3),
    "interpolation": dict(channels=(8, 16), attention=(True, True), layers=1, heads=4, groups=8, context_width=8,
                          frames=3, in_channels=12),
}


def diffusers_unet(config):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to compare with")
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels, block_out_channels=config.channels,
        down_block_types=["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in config.attention],
        up_block_types=["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(config.attention)],
        layers_per_block=config.layers, attention_head_dim=config.heads,                   # SD's misnomer: 8 heads
        norm_num_groups=config.groups, cross_attention_dim=config.context_width)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_outputs_equal_those_of_diffusers_frame_by_frame_with_its_own_weights(layout, dtype, within):
    config = UNetConfig(**LAYOUTS[layout])
    theirs, ours = shaken(diffusers_unet(config)).to(dtype), image_started(config, seed=1).to(dtype)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and set(missing) == {name for name in ours.state_dict() if is_new(name)}

    z, context = (randn(2, *size).to(dtype) for size in ((config.frames, config.in_channels, 8, 16),
                                                         (7, config.context_width)))
    t, fps = torch.tensor([981, 1]), torch.tensor([8.0, 24.0])
    images = torch.stack([theirs(z[:, i], t, context).sample for i in range(config.frames)], 1)
    assert close(ours(z, t, context), images, within)
    assert close(ours(z, t, context, fps), images, within)


@pytest.fixture(scope="module")
def full_size():
    """Stable Diffusion's sizes without any memory behind them."""
    with torch.device("meta"):
        return UNet3D(UNetConfig())


def test_image_parts_at_full_size_are_stable_diffusions_686_tensors(full_size):
    image = [weight for name, weight in full_size.state_dict().items() if not is_new(name)]
    assert len(image) == 686 and sum(weight.numel() for weight in image) == 859_520_964


def test_names_and_shapes_at_full_size_are_those_of_diffusers(full_size):
    with torch.device("meta"):
        theirs = diffusers_unet(UNetConfig()).state_dict()
    image = {name: weight.shape for name, weight in full_size.state_dict().items() if not is_new(name)}
    assert image == {name: weight.shape for name, weight in theirs.items()}


def test_at_full_size_sixteen_places_are_temporal_and_68_outputs_are_adapted(full_size):
    adaptors = [module for module in full_size.modules() if isinstance(module, FrameAdaptor)]
    assert len(adaptors) == 52 + 16 and all(len(adaptor.scale) == 16 for adaptor in adaptors)
    assert sum(isinstance(module, DirectedTemporalAttention) for module in full_size.modules()) == 16
