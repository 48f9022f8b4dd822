"""The 3D U-Net: an image model at the start, causal in the frames, and Stable Diffusion inside.

Tests that compare with diffusers skip with a reason where it is not installed.
"""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import changed, close, image_started, randn, shaken
from unet3d import (MASKS, Attention, DirectedTemporalAttention, Downsample, FrameAdaptor,
                    ResnetBlock, SpatialTransformer, TimestepEmbedding, TransformerBlock, UNet3D,
                    UNetConfig, Upsample, directed_attention, is_video_parameter)

FRAMES = 5
TINY = dict(channels=(8, 16), attention=(True, False), layers=1, heads=2, groups=4,
            context_width=12, frames=FRAMES)
# two clips that differ in all that the network is given
Z = randn(2, FRAMES, 4, 4, 6)
T = torch.tensor([981, 3])
TEXT = randn(2, 7, 12, seed=1)
FPS = torch.tensor([8.0, 24.0])
CLIPS = (Z, T, TEXT, FPS)


@pytest.fixture(scope="module")
def unet():
    return shaken(UNet3D(UNetConfig(**TINY)))


@pytest.mark.parametrize("mask", ["strict", "literal"])
def test_video_training_starts_from_the_image_model_exactly(mask):
    unet = image_started(UNet3D(UNetConfig(**TINY, mask=mask)))
    assert torch.equal(unet(*CLIPS), unet(Z, T, TEXT))


def test_without_fps_every_frame_of_any_number_is_an_image_by_itself(unet):
    z = randn(2, FRAMES + 3, 4, 4, 6)
    alone = [unet(z[:, i : i + 1], T, TEXT) for i in range(FRAMES + 3)]
    assert close(unet(z, T, TEXT), torch.cat(alone, 1), 1e-12)


def test_with_a_timestep_for_each_frame_every_frame_is_the_image_model_at_its_own():
    t = torch.tensor([[0, 100, 200, 300, 400], [999, 5, 17, 600, 2]])
    unet = image_started(UNet3D(UNetConfig(**TINY)))
    alone = [unet(Z[:, i : i + 1], t[:, i], TEXT) for i in range(FRAMES)]
    assert close(unet(Z, t, TEXT, FPS), torch.cat(alone, 1), 1e-12)


def test_the_video_model_uses_every_weight_and_the_image_model_every_image_weight():
    for inputs in (CLIPS[:3], CLIPS):
        unet = shaken(UNet3D(UNetConfig(**TINY)))
        unet(*inputs).square().sum().backward()
        for name, p in unet.named_parameters():
            is_used = inputs is CLIPS or not is_video_parameter(name)
            assert p.grad.any() if is_used else p.grad is None, name


def test_a_model_of_one_frame_has_every_video_part_and_one_of_none_has_no_video_part():
    none, one, five = ([*UNet3D(UNetConfig(**{**TINY, "frames": frames})).state_dict()]
                       for frames in (0, 1, 5))
    assert one == five and none == [name for name in five if not is_video_parameter(name)]


def test_every_clip_of_a_batch_has_its_own_timestep_text_and_fps(unet):
    alone = [unet(*(x[i : i + 1] for x in CLIPS)) for i in range(2)]
    assert close(unet(*CLIPS), torch.cat(alone), 1e-12)
    for i in (1, 2, 3):
        exchanged = [x.flip(0) if i == j else x for j, x in enumerate(CLIPS)]
        assert (unet(*exchanged) != unet(*CLIPS)).all()


def test_an_adaptor_is_one_scale_and_one_shift_per_frame_and_channel():
    adaptor = shaken(FrameAdaptor(3, 2))
    assert adaptor.scale.shape == adaptor.shift.shape == (3, 2)
    z = randn(2, 3, 2, 4, 5)
    tokens = z.flatten(3).transpose(2, 3)  # (b, f, n, c)
    for i, c in ((0, 0), (1, 1), (2, 0)):
        expected = adaptor.scale[i, c] * z[:, i, c] + adaptor.shift[i, c]
        assert close(adaptor(z)[:, i, c], expected, 1e-12)
        assert close(adaptor(tokens)[:, i, :, c], expected.flatten(1), 1e-12)


def test_every_3x3_convolution_and_self_attention_hands_its_output_to_an_adaptor_of_its_own(
        unet):
    makers = [module for module in unet.modules()
              if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    makers += [module.attn1 for module in unet.modules() if isinstance(module, TransformerBlock)]
    readers = [module for module in unet.modules() if isinstance(module, FrameAdaptor)]
    calls = []  # (module, where the tensor that it hands on or reads lies in memory)
    hooks = [module.register_forward_hook(lambda m, _, out: calls.append((m, out.data_ptr())))
             for module in makers]
    hooks += [module.register_forward_pre_hook(lambda m, z: calls.append((m, z[0].data_ptr())))
              for module in readers]
    unet(*CLIPS)
    for hook in hooks:
        hook.remove()
    assert [place for _, place in calls[0::2]] == [place for _, place in calls[1::2]]
    names = {module: name for name, module in unet.named_modules()}
    for (maker, _), (reader, _) in zip(calls[0::2], calls[1::2]):
        # resnets.1.conv2 -> resnet_adaptors.1.1, attentions.0... -> attention_adaptors.0, and so on
        name = re.sub(r"(resnet|attention|downsampler|upsampler)s", r"\1_adaptors", names[maker])
        name = re.sub(r"\.transformer_blocks\.0\.attn1|\.conv$", "", name)
        name = name.replace(".conv1", ".0").replace(".conv2", ".1")
        name = re.sub(r"^(conv_in|conv_out)$", r"\1_adaptor", name)
        assert names[reader] == name
    assert {module for module, _ in calls[0::2]} == {*makers}
    assert {module for module, _ in calls[1::2]} == {*readers}
    assert len(calls) == 2 * len(makers) == 2 * len(readers)


def test_another_number_of_frames_than_trained_is_refused_with_both_numbers(unet):
    with pytest.raises(ValueError, match=f"^3 frames.*of {FRAMES} frames"):
        unet(Z[:, :3], T, TEXT, FPS)


def test_under_autocast_adaptors_keep_activations_bfloat16():
    unet = UNet3D(UNetConfig(**TINY))
    types = []
    for module in unet.modules():
        if isinstance(module, FrameAdaptor):
            module.register_forward_hook(lambda _, z, out: types.append((z[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        unet(*(x.float() for x in CLIPS))
    assert types == [(torch.bfloat16, torch.bfloat16)] * len(types) and len(types) > 10


@pytest.fixture(scope="module", params=["strict", "literal"])
def temporal(request):
    return shaken(DirectedTemporalAttention(6, heads=2, mask=request.param))


@pytest.fixture(scope="module")
def qkv():
    """Three tensors (n, heads, f, d) with d = f, so that an identity matrix fits as v."""
    return [randn(3, 2, FRAMES, FRAMES, seed=seed) for seed in range(3)]


def explicit(q, k, v, mask):
    """A v as the formula stands: rows are queries, the lower triangle with the diagonal is seen."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    seen = torch.ones(q.shape[-2], q.shape[-2]).tril().bool()
    if mask == "strict":
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
    if mask == "literal":
        return (scores.softmax(-1) * seen) @ v
    return scores.softmax(-1) @ v


def rows(q, k, mask):
    """The attention matrix itself, (n, heads, f, f): every frame has a unit vector as value."""
    return directed_attention(q, k, torch.eye(q.shape[-2], dtype=q.dtype).expand_as(q), mask)


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_is_its_formula_written_out(qkv, mask):
    assert close(directed_attention(*qkv, mask), explicit(*qkv, mask), 1e-12)


def test_temporal_attention_is_the_formula_written_out(temporal):
    z = randn(2, FRAMES, 6, 3, 2)
    for b, y, x in ((0, 0, 1), (1, 2, 0)):
        norm = temporal.norm
        tokens = F.layer_norm(z[b, :, :, y, x], (6,), norm.weight, norm.bias, eps=1e-5)  # (f, c)
        q = tokens @ temporal.to_q.weight.T
        k = tokens @ temporal.to_k.weight.T
        v = tokens @ temporal.to_v.weight.T
        heads = [explicit(q[:, h], k[:, h], v[:, h], temporal.mask)
                 for h in (slice(0, 3), slice(3, 6))]
        expected = torch.cat(heads, -1) @ temporal.to_out.weight.T + temporal.to_out.bias
        assert close(temporal(z)[b, :, :, y, x], expected, 1e-12)


def test_spatial_and_temporal_attention_read_the_same_tensor_and_their_outputs_are_summed(
        unet):
    kinds = (SpatialTransformer, DirectedTemporalAttention)
    calls = []  # (kind, the tensor it read, the tensor it wrote)
    hooks = [module.register_forward_hook(lambda m, z, out: calls.append((type(m), z[0], out)))
             for module in unet.modules() if isinstance(module, kinds)]
    unet(*CLIPS)
    pairs = [*zip(calls[0::2], calls[1::2])]
    calls.clear()
    z = randn(2, FRAMES, 16, 2, 3)
    summed = unet.mid_block.layer(0, z, randn(2, 1, 32), TEXT, video=True)
    for hook in hooks:
        hook.remove()
    assert len(pairs) == 4  # one ST block down, one in the middle, two up
    for (spatial, read, _), (directed, also_read, _) in pairs:
        assert (spatial, directed) == kinds and read is also_read
    assert torch.equal(summed, calls[0][2] + calls[1][2])


def test_frames_mix_at_equal_places_only(temporal):
    z = randn(2, FRAMES, 6, 3, 4)
    moved = z.clone()
    moved[0, 0, :, 1, 2] = randn(6, seed=9)  # one pixel of the first frame of the first clip
    differs = (temporal(z) != temporal(moved)).any(2)  # (b, f, h, w)
    assert differs[0, :, 1, 2].all() and differs.sum() == FRAMES


@pytest.mark.parametrize("frame", range(1, FRAMES))
def test_literal_a_later_key_leaks_through_the_denominator_but_a_later_value_does_not(qkv, frame):
    q, k, v = qkv
    before = directed_attention(q, k, v, "literal")[:, :, :frame]
    new_k = changed(k.transpose(1, 2), frame).transpose(1, 2)
    new_v = changed(v.transpose(1, 2), frame).transpose(1, 2)
    assert (directed_attention(q, new_k, v, "literal")[:, :, :frame] != before).all()
    assert torch.equal(directed_attention(q, k, new_v, "literal")[:, :, :frame], before)


def test_literal_rows_sum_to_less_than_one_the_last_to_one_and_renormalised_are_strict(qkv):
    strict = rows(*qkv[:2], "strict")
    literal = rows(*qkv[:2], "literal")
    sums = literal.sum(-1, keepdim=True)
    assert (sums[..., :-1, :] < 1).all()
    assert close(sums[..., -1, :], torch.ones_like(sums[..., -1, :]), 1e-12)
    assert close(literal / sums, strict, 1e-12)
    for a in (strict, literal):
        assert not a.triu(1).any() and (a + torch.ones_like(a).triu(1) > 0).all()


def test_an_unknown_mask_is_refused_with_the_names_of_those_that_exist():
    with pytest.raises(ValueError, match='"casual" is unknown: use strict, literal, bidirectional'):
        DirectedTemporalAttention(6, heads=2, mask="casual")


@pytest.mark.parametrize("mask", MASKS)
def test_temporal_attention_everywhere_has_the_heads_and_the_mask_of_the_config(mask):
    unet = UNet3D(UNetConfig(**TINY, mask=mask))
    layers = [m for m in unet.modules() if isinstance(m, DirectedTemporalAttention)]
    assert {(layer.heads, layer.mask) for layer in layers} == {(2, mask)} and len(layers) == 4


@pytest.mark.parametrize("frame", range(FRAMES))
def test_with_strict_masks_the_whole_network_is_causal_bit_for_bit(unet, frame):
    before = unet(*CLIPS)
    after = unet(changed(Z, frame), T, TEXT, FPS)
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert (before[:, frame:] != after[:, frame:]).all()


def test_without_adaptors_and_mask_the_network_cannot_tell_the_order_of_frames():
    order = torch.tensor([3, 0, 4, 2, 1])

    def moves_with_its_frames(mask, has_adaptors):
        unet = shaken(UNet3D(UNetConfig(**TINY, mask=mask)))
        for module in unet.modules():
            if isinstance(module, FrameAdaptor) and not has_adaptors:
                nn.init.ones_(module.scale)
                nn.init.zeros_(module.shift)
        return close(unet(Z[:, order], T, TEXT, FPS), unet(*CLIPS)[:, order], 1e-12)

    assert moves_with_its_frames("bidirectional", False)  # left and right are a coin's toss
    assert not moves_with_its_frames("bidirectional", True)
    assert not moves_with_its_frames("strict", False)


def test_fps_has_an_effect_and_zeroing_the_last_layer_removes_it():
    unet = shaken(UNet3D(UNetConfig(**TINY)))
    assert (unet(*CLIPS) != unet(Z, T, TEXT, FPS + 1)).all()
    nn.init.zeros_(unet.fps_embedding.linear_2.weight)
    nn.init.zeros_(unet.fps_embedding.linear_2.bias)
    assert torch.equal(unet(*CLIPS), unet(Z, T, TEXT, 3 * FPS))


def test_with_bfloat16_weights_neighbouring_timesteps_stay_apart():
    embedding = TimestepEmbedding(8).bfloat16()
    first, second = embedding(torch.tensor([980, 981]))  # both are 980 when rounded to bfloat16
    assert (first != second).any()


def diffusers_unet(config):
    diffusers = pytest.importorskip("diffusers", reason="nothing to compare with: no diffusers")
    down = ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in config.attention]
    up = ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(config.attention)]
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=config.channels, down_block_types=down, up_block_types=up,
        layers_per_block=config.layers, norm_num_groups=config.groups,
        attention_head_dim=config.heads,  # SD's misnomer: 8 heads
        cross_attention_dim=config.context_width)


def test_outputs_equal_those_of_diffusers_frame_by_frame_with_its_own_weights():
    config = UNetConfig(channels=(8, 16, 24, 24), attention=(True, True, True, False), layers=2,
                        heads=8, groups=4, context_width=20, frames=3)
    theirs = shaken(diffusers_unet(config))
    ours = image_started(UNet3D(config), seed=1)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and {*missing} == {*filter(is_video_parameter, ours.state_dict())}

    z = randn(2, 3, 4, 8, 16)
    context = randn(2, 7, 20)
    images = torch.stack([theirs(z[:, i], T, context).sample for i in range(3)], 1)
    assert close(ours(z, T, context), images, 1e-9)
    assert close(ours(z, T, context, FPS), images, 1e-9)


def test_at_full_size_16_places_are_temporal_68_adapted_and_the_image_parts_are_sds():
    with torch.device("meta"):  # no memory behind it
        full_size = UNet3D(UNetConfig())
    image = [p for name, p in full_size.state_dict().items() if not is_video_parameter(name)]
    assert len(image) == 686 and sum(p.numel() for p in image) == 859_520_964
    adaptors = [m for m in full_size.modules() if isinstance(m, FrameAdaptor)]
    temporal = [m for m in full_size.modules() if isinstance(m, DirectedTemporalAttention)]
    assert len(adaptors) == 52 + 16 and {len(m.scale) for m in adaptors} == {16}
    assert len(temporal) == 16
    modules = [*full_size.modules()]
    assert {m.heads for m in modules if isinstance(m, Attention | DirectedTemporalAttention)} == {8}
    assert {m.num_groups for m in modules if isinstance(m, nn.GroupNorm)} == {32}


def test_the_table_of_sizes_above_the_network_is_what_its_full_size_runs_through():
    with torch.device("meta"):  # no memory behind it, and nothing is computed
        network = UNet3D(UNetConfig())
        z = torch.zeros(1, 16, 4, 256 // 8, 256 // 8)
        inputs = (z, torch.zeros(1), torch.zeros(1, 77, 768), torch.zeros(1))
    calls = {}  # layers -> what ran there: (module, shape that it read, shape that it wrote)
    for name, module in network.named_modules():
        kinds = (ResnetBlock, DirectedTemporalAttention, Downsample, Upsample)
        if isinstance(module, kinds) or name in ("conv_in", "conv_out"):
            layers = re.match(r"(?:down|up)_blocks\.\d|\w+", name)[0]  # with an index, or without
            layers = re.sub(r"\.(\d)", r"[\1]", layers)
            module.register_forward_hook(lambda module, read, out, layers=layers: calls.setdefault(
                layers, []).append((module, read[0].shape, out.shape)))
    network(*inputs)
    rows = []
    for layers, ran in calls.items():
        reads = [read for module, read, _ in ran if isinstance(module, (nn.Conv2d, ResnetBlock))]
        wrote = ran[-1][2]
        channels = ", ".join(str(read[-3]) for read in reads)
        sides = dict.fromkeys([str(reads[0][-1]), str(wrote[-1])])
        temporal = sum(isinstance(module, DirectedTemporalAttention) for module, _, _ in ran)
        rows.append([layers, f"{channels} -> {wrote[-3]}", " -> ".join(sides),
                     str(reads[0][:-3].numel()), str(temporal)])
    heading, *table = re.findall(r"^    #   (.+)$", inspect.getsource(UNet3D), re.MULTILINE)
    assert heading.split() == ["layers", "channels", "side", "frames", "ST", "blocks"]
    assert [re.split("  +", row) for row in table] == rows
