"""The graders of the exercises: each says which property of the paper broke, and by how much.

They call one function each, with everything else replaced where it is another exercise: what is
wrong in one does not turn the graders of another red.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

import data
import unet3d
from clip_text import Tokenizer
from conftest import randn
from diffusion import Diffusion
from tiny import EMA, VDiffusion
from unet3d import DirectedTemporalAttention, FrameAdaptor, Level, UNetConfig
from vae import VAEConfig, VideoVAE


def same(found, expected, says: str, within: float = 1e-9) -> None:
    """Fail with what should have been so, and how far it is from it."""
    assert found.shape == expected.shape, f"{says}: {found.shape}, not {expected.shape}"
    assert found.isfinite().all(), f"{says}: there are values that are no finite numbers"
    off = (found.double() - expected.double()).abs().max().item()
    assert off <= within, f"{says}: off by as much as {off:.3g}"


# --------------------------------------------------------------------------------------------------
# 1 and 2: the tokenizer

MERGES = [("b", "c"), ("a", "b"), ("a", "a"), ("ab", "c</w>"), ("h", "o"), ("r", "s"),
          ("rs", "e</w>"), ("ho", "rse</w>"), ("b", "c</w>")]


@pytest.mark.parametrize("word, symbols, says", [
    ("abcd", ["a", "bc", "d</w>"], "what was learned first is joined first: b + c before a + b"),
    ("abd", ["ab", "d</w>"], "neighbours that are in the list of merges are joined"),
    ("aaab", ["aa", "a", "b</w>"], "of equal pairs the leftmost is joined first"),
    ("aaaaa", ["aa", "aa", "a</w>"], "a merge is applied to every place in the word"),
    ("horse", ["horse</w>"], "merging goes on with what was merged, until no pair is in the list"),
    ("abc", ["abc</w>"], "one merge makes room for another: ab and c</w> are a pair in the list"),
    ("xbc", ["x", "bc</w>"], "the last symbol has </w> and is another than the same without"),
    ("a", ["a</w>"], "a word of one letter is one symbol, and ends with </w>"),
    ("<|endoftext|>", ["<|endoftext|>"], "start and end tokens are symbols of their own"),
])
def test_exercise_01_words_become_the_symbols_that_were_learned(word, symbols, says):
    found = Tokenizer(MERGES)._merge(word)
    assert found == symbols, f"{says}: {word!r} became {found}, not {symbols}"


@pytest.fixture
def tokenizer(monkeypatch):
    """A tokenizer of eight tokens that joins nothing."""
    monkeypatch.setattr(Tokenizer, "_merge",
                        lambda self, word: [*word[:-1], word[-1] + "</w>"])  # exercise 1
    return Tokenizer([], context_length=8)


@pytest.mark.parametrize("caption, ids, says", [
    ("ab", [64, 65 + 256], "start, caption, then end tokens to the last, as SD pads"),
    ("", [], "an empty caption is start, then end tokens"),
    ("abcdefghijkl", [64, 65, 66, 67, 68, 69], "too long a caption loses its last tokens, not end"),
])
def test_exercise_02_a_caption_stands_between_start_and_end(tokenizer, caption, ids, says):
    expected = [tokenizer.start, *ids] + [tokenizer.end] * (7 - len(ids))
    for found in (tokenizer(caption), tokenizer(["ab", caption])[1:]):
        assert found.tolist() == [expected], f"{says}: {found.tolist()}, not {[expected]}"
        assert found.dtype == torch.int64, f"ids are int64, not {found.dtype}"


# --------------------------------------------------------------------------------------------------
# 3: noise

DIFFUSION = Diffusion()


def latents(*seeds: int, shape=(2, 3, 4, 2, 2)) -> list[torch.Tensor]:
    """Draw z0, eps and further noise for two clips of three frames."""
    return [randn(*shape, seed=seed) for seed in seeds]


def at(*t: int) -> torch.Tensor:
    """The timestep of both clips, (b,), or those of their three frames, (b, f)."""
    return torch.tensor([t] * 2).squeeze(1)


def noisy(z0, eps, t, diffusion=DIFFUSION) -> torch.Tensor:
    """z_t by hand."""
    alpha_bar = diffusion.alpha_bar(t)
    return alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * eps


@pytest.mark.parametrize("t", [at(0), at(1), at(499), at(999), torch.tensor([10, 900]),
                               at(1, 50, 900)])
def test_exercise_03_noise_is_that_of_its_step(t):
    z0, eps = latents(0, 1)
    same(DIFFUSION.add_noise(z0, eps, t), noisy(z0, eps, t),
         f"z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps at t = {t.tolist()}")


def test_exercise_03_latents_keep_their_variance_and_their_type():
    z0, eps = latents(0, 1, shape=(2, 3, 4, 32, 32))
    found = DIFFUSION.add_noise(z0.float(), eps.float(), at(400))
    assert found.dtype == torch.float32, f"factors are cast to z0's type: not {found.dtype}"
    same(found.var(), torch.ones(()), "N(0, 1) and noise of N(0, 1) make N(0, 1)", 0.05)


# --------------------------------------------------------------------------------------------------
# 4: the adaptor


# frames and channels are three each, so that a wrong axis has the right shape
@pytest.mark.parametrize("shape, channels", [((2, 3, 3, 3, 3), (-1, 1, 1)), ((2, 3, 3, 3), (-1,))])
def test_exercise_04_every_frame_has_its_own_scale_and_shift_for_each_channel(shape, channels):
    adaptor = FrameAdaptor(3, 3).double()
    z = randn(*shape)
    same(adaptor(z), z, "with S = 1 and B = 0 the image model stays itself (§3.2.1)", 0)
    adaptor.scale.data = 1 + randn(3, 3)
    adaptor.shift.data = randn(3, 3, seed=1)
    for i in range(3):
        scale = adaptor.scale[i].view(channels)
        shift = adaptor.shift[i].view(channels)
        same(adaptor(z)[:, i], scale * z[:, i] + shift, f"z_i = S_i z_i + B_i (§3.2.1), frame {i} "
             f"of {'(b, f, c, h, w)' if len(shape) == 5 else 'tokens (b, f, n, c)'}")


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_exercise_04_refuses_another_number_of_frames(frames):
    with pytest.raises(ValueError):
        FrameAdaptor(3, 3)(torch.zeros(1, frames, 3, 4, 4))
        pytest.fail(f"{frames} frames were taken by an adaptor of 3, one scale and shift for each")


# --------------------------------------------------------------------------------------------------
# 5 and 6: directed attention


def by_hand(q, k, v, mask: str) -> torch.Tensor:
    """Attend row by row: frame i reads frames up to i."""
    f = q.shape[2]
    rows = []
    for i in range(f):
        weights = ((q[:, :, i : i + 1] * k).sum(-1) / math.sqrt(q.shape[-1])).exp()
        seen = f if mask == "bidirectional" else i + 1
        weights = weights / weights[..., : f if mask == "literal" else seen].sum(-1, keepdim=True)
        rows.append((weights[..., :seen, None] * v[:, :, :seen]).sum(2))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("mask, says", [
    ("strict", "masked before the softmax, rows sum to one"),
    ("literal", "masked after the softmax, later keys stay in the denominator (as the equation)"),
    ("bidirectional", "no mask: all frames are read"),
])
def test_exercise_05_each_mask_weighs_as_it_should(mask, says):
    q, k, v = latents(0, 1, 2, shape=(2, 2, 5, 4))
    same(unet3d.directed_attention(q, k, v, mask), by_hand(q, k, v, mask), f'"{mask}": {says}')


@pytest.mark.parametrize("mask", ["strict", "literal"])
def test_exercise_05_no_frame_reads_a_later_one(mask):
    q, k, v = latents(0, 1, 2, shape=(2, 2, 5, 4))
    before = unet3d.directed_attention(q, k, v, mask)
    v[:, :, 3] += 1
    if mask == "strict":  # literal feels later keys, through the denominator
        k[:, :, 3] += 1
    off = (unet3d.directed_attention(q, k, v, mask) - before).abs().amax((0, 1, 3))
    assert (off[:3] == 0).all(), f'"{mask}": an earlier frame changes with frame 3'
    assert (off[3:] > 0).all(), f'"{mask}": frames 3 and 4 do not read frame 3: rows are queries'


@pytest.fixture
def t_attn(monkeypatch):
    """T-Attn of 4 channels and 2 heads with random weights."""
    monkeypatch.setattr(unet3d, "directed_attention", by_hand)  # exercise 5
    module = DirectedTemporalAttention(4, heads=2).double()
    for seed, p in enumerate(module.parameters()):
        p.data = randn(*p.shape, seed=seed)
    return module


def test_exercise_06_every_pixel_is_a_sequence_of_its_own(t_attn):
    z = randn(2, 3, 4, 2, 2)
    found = t_attn(z)
    for b, y, x in ((0, 0, 1), (1, 1, 0)):
        tokens = t_attn.norm(z[b, :, :, y, x])  # (f, c)
        q, k, v = (to(tokens).view(1, 3, 2, 2).transpose(1, 2)
                   for to in (t_attn.to_q, t_attn.to_k, t_attn.to_v))
        row = t_attn.to_out(by_hand(q, k, v, "strict").transpose(1, 2).reshape(3, 4))
        same(found[b, :, :, y, x], row,
             f"frames attend at equal (h, w), here of clip {b} at ({y}, {x})")


def test_exercise_06_frames_mix_at_equal_places_alone(t_attn):
    z = randn(2, 3, 4, 2, 2)
    before = t_attn(z)
    z[1, 0, :, 1, 0] += randn(4, seed=9)
    off = (t_attn(z) - before).abs().amax(2)  # (b, f, h, w)
    assert (off[0] == 0).all(), "one clip changes with another: a reshape mixes clips and frames"
    off[1, :, 1, 0] = 0
    assert (off == 0).all(), "a pixel changes with another: frames mix at equal (h, w) only"


def test_exercise_06_reads_the_norm_of_its_input_and_adds_nothing_itself(t_attn):
    z = randn(2, 3, 4, 2, 2)
    same(t_attn(z), t_attn(5 * z + 2),
         "T-Attn(LN(z)): scale and offset of the channels do not matter", 1e-2)
    t_attn.to_out.weight.data.zero_()
    t_attn.to_out.bias.data.zero_()
    same(t_attn(z), torch.zeros_like(z),
         "with a zero output projection nothing is added (no residual here)", 0)


# --------------------------------------------------------------------------------------------------
# 7: waves


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_exercise_07_is_cosines_then_sines_of_falling_frequencies(dtype):
    found = unet3d.sinusoid(torch.tensor([0, 1, 8, 30]).to(dtype), 8)
    assert found.dtype == torch.float32, f"{found.dtype} of {dtype}: timesteps would collide"
    angles = torch.tensor([[x * 10000 ** (-k / 4) for k in range(4)] for x in (0, 1, 8, 30)])
    same(found[:, :4], angles.cos(), "the first half are cosines of 0, 1, 8, 30", 1e-5)
    same(found[:, 4:], angles.sin(), "the second half are sines of 0, 1, 8, 30", 1e-5)


# --------------------------------------------------------------------------------------------------
# 8 to 10: sampling


@pytest.mark.parametrize("diffusion, t, t_prev, says", [
    (DIFFUSION, at(999), at(500), "exactly (DDIM, eq. 12)"),
    (DIFFUSION, at(1), at(-1), "the last step, with alpha_bar_0 for alpha_bar of -1 (matches SD)"),
    (DIFFUSION, at(999, 500, 100), at(500, 100, 0), "each frame from its own step to its own"),
    (VDiffusion(), at(600), at(400), "of a network that predicts v: as predict_z0_eps has it"),
])
def test_exercise_08_the_true_output_leads_to_less_noisy_latents(diffusion, t, t_prev, says):
    z0, eps, noise = latents(0, 1, 2)
    z = noisy(z0, eps, t, diffusion)
    found = diffusion.ddim_step(z, diffusion.target(z0, eps, t), t, t_prev, 0.0, noise)
    same(found, noisy(z0, eps, t_prev, diffusion),
         f"eta 0 and the true output: z_t -> z_t_prev {says}", 1e-6)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_exercise_08_new_noise_replaces_old(eta):
    z0, eps, noise = latents(0, 1, 2)
    z = noisy(z0, eps, at(600))
    a = DIFFUSION.alpha_bar(at(600))
    a_prev = DIFFUSION.alpha_bar(at(400))
    variance = eta**2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
    expected = a_prev.sqrt() * z0 + (1 - a_prev - variance).sqrt() * eps + variance.sqrt() * noise
    same(DIFFUSION.ddim_step(z, eps, at(600), at(400), eta, noise), expected,
         f"sigma^2 = eta^2 (1 - a_prev) / (1 - a) (1 - a / a_prev), eta {eta}", 1e-6)
    found = DIFFUSION.ddim_step(z.float(), eps.float(), at(600), at(400), eta, noise.float()).dtype
    assert found == torch.float32, f"factors are cast to z's type: not {found}"


@pytest.mark.parametrize("t, t_prev", [(at(999), at(979)), (at(600), at(400)), (at(19), at(-1)),
                                       (at(999, 600, 19), at(979, 400, -1))])
def test_exercise_09_draws_from_the_posterior(t, t_prev):
    z0, eps, noise = latents(0, 1, 2)
    z = noisy(z0, eps, t)
    a = DIFFUSION.alpha_bar(t)
    a_prev = DIFFUSION.alpha_bar(t_prev, after_last=1.0)
    beta = 1 - a / a_prev
    mean = (a_prev.sqrt() * beta * z0 + (1 - beta).sqrt() * (1 - a_prev) * z) / (1 - a)
    found = DIFFUSION.ddpm_step(z, eps, t, t_prev, 0 * noise)
    same(found, mean, f"the mean of q(z_t_prev | z_t, z_0) (DDPM, eq. 7) from t = {t[0].tolist()} "
         f"to {t_prev[0].tolist()}, alpha_bar of -1 is 1", 1e-6)
    same(DIFFUSION.ddpm_step(z, eps, t, t_prev, noise) - found,
         ((1 - a_prev) / (1 - a) * beta).sqrt() * noise,
         "the noise has the posterior's standard deviation, the root of its variance", 1e-6)
    found = DIFFUSION.ddpm_step(z.float(), eps.float(), t, t_prev, noise.float()).dtype
    assert found == torch.float32, f"factors are cast to z's type: not {found}"


def guidance(scale: float, t=at(500), fps=torch.ones(2)) -> tuple:
    """Guide a network that adds its text to z: what comes out, z, and the calls of the network."""
    calls = []

    def network(z, t, context, fps):
        calls.append((z, t, context, fps))
        return z + context.mean((1, 2)).view(-1, 1, 1, 1, 1)
    z, = latents(0)
    context = torch.ones(2, 5, 3).double()
    return DIFFUSION.guided_output(network, z, t, context, 0 * context, fps, scale), z, calls


@pytest.mark.parametrize("scale", [7.5, 2.0, 0.0])
def test_exercise_10_goes_beyond_the_text_away_from_no_text(scale):
    found, z, _ = guidance(scale)
    same(found, z + scale, f"uncond + s (cond - uncond), guidance {scale} (text adds 1, no text 0)")


@pytest.mark.parametrize("t", [at(500), at(10, 20, 30)])
def test_exercise_10_both_halves_are_one_call(t):
    _, z, calls = guidance(7.5, t)
    assert len(calls) == 1, f"both halves are one batch: the network was called {len(calls)} times"
    same(calls[0][0], torch.cat([z, z]), "the batch holds z twice", 0)
    same(calls[0][1], torch.cat([t, t]), "t is doubled as z is", 0)
    assert calls[0][3] is not None and len(calls[0][3]) == 4, "fps are doubled as z is"


def test_exercise_10_guidance_1_is_the_network_with_its_text_once():
    found, z, calls = guidance(1, fps=None)
    same(found, z + 1, "guidance 1 is the output with text")
    assert len(calls) == 1 and len(calls[0][0]) == 2, "guidance 1 needs no half without text"
    assert calls[0][3] is None, "without fps the network is the image model"


# --------------------------------------------------------------------------------------------------
# 11: the VAE


with torch.device("meta"):
    VAE = VideoVAE(VAEConfig(channels=(8, 8), groups=2, scaling_factor=0.5))


def test_exercise_11_moves_noise_by_the_posterior_and_scales_both():
    mean, logvar, eps = latents(0, 1, 2)
    same(VAE.sample_latents(mean, logvar, eps), 0.5 * (mean + logvar.exp().sqrt() * eps),
         "z = (mean + exp(logvar / 2) eps) * scaling_factor")


def test_exercise_11_lets_gradients_reach_mean_and_variance():
    mean, logvar, eps = latents(0, 1, 2)
    before = mean.clone()
    z = VAE.sample_latents(mean.requires_grad_(), logvar.requires_grad_(), eps)
    assert z.requires_grad, "nothing can be learned: the sample is cut off from mean and logvar"
    z.sum().backward()
    same(mean.grad, torch.full_like(mean, 0.5), "d z / d mean is the scaling factor")
    assert logvar.grad is not None and logvar.grad.abs().min() > 0, "no gradient reaches logvar"
    same(mean.detach(), before, "mean is left as it was", 0)


# --------------------------------------------------------------------------------------------------
# 12: cutting a clip


def cuts(total: int, frames: int, n: int = 400, fps: float | None = None) -> list:
    """Cut a video at 24 frames a second n times."""
    rng = np.random.default_rng(0)
    return [data.sample_frames(total, 24.0, frames, rng, fps) for _ in range(n)]


def strides(*args, **kwargs) -> set[int]:
    """The strides of such cuts."""
    return {int(indices[1] - indices[0]) for indices, _ in cuts(*args, **kwargs)}


def test_exercise_12_frames_are_uniform_and_inside_and_v_is_their_rate():
    for indices, v in cuts(60, 8):
        assert len(indices) == 8, f"8 frames asked for, {len(indices)} cut"
        gaps = set(np.diff(indices).tolist())
        stride = gaps.pop()
        assert not gaps and stride >= 1, f"frames must be uniform (§3.2, FPS): {indices.tolist()}"
        assert 0 <= indices[0] and indices[-1] < 60, f"0 to 59 are there: {indices.tolist()}"
        assert v == pytest.approx(24 / stride), f"v is 24 / {stride} at stride {stride}, not {v}"


def test_exercise_12_every_part_and_every_stride_comes_up():
    found = cuts(44, 8, 3000)
    seen = {int(i[1] - i[0]) for i, _ in found}
    assert seen == {1, 2, 3, 4, 5, 6}, f"strides 1 to 6 all fit 44 frames, seen are {sorted(seen)}"
    for stride in (1, 6):
        starts = {int(i[0]) for i, _ in found if i[1] - i[0] == stride}
        expected = set(range(44 - 7 * stride))
        assert starts == expected, (
            f"stride {stride}: parts start at 0 to {max(expected)}, where the last frame is used; "
            f"seen are {min(starts)} to {max(starts)}")
    assert strides(15, 8) == {1, 2}, "15 frames hold 8 at strides 1 and 2 alone"


@pytest.mark.parametrize("fps, stride", [(24, 1), (12, 2), (8, 3), (9, 3), (7, 3), (100, 1)])
def test_exercise_12_a_rate_that_is_asked_for_is_met_as_nearly_as_fits(fps, stride):
    found = strides(60, 8, 20, fps=fps)
    assert found == {stride}, f"fps {fps} of 24 is stride {stride}, found {found}"
    assert strides(20, 8, 20, fps=2) == {2}, "20 frames hold 8 at stride 2 at most"


def test_exercise_12_a_video_too_short_is_refused():
    assert cuts(8, 8, 1)[0][0].tolist() == list(range(8)), "8 of 8 frames are all of them"
    assert cuts(1, 1, 1)[0][0].tolist() == [0], "a single frame has any stride"
    with pytest.raises(data.InputError):
        cuts(7, 8, 1)
        pytest.fail("8 frames were cut from a video of 7")


# --------------------------------------------------------------------------------------------------
# 13: the moving average


@pytest.mark.parametrize("decay", [0.999, 0.5])
def test_exercise_13_warms_up_to_its_decay_and_keeps_it(decay):
    p = nn.Parameter(torch.zeros(1))
    average = EMA([p], decay)
    p.data.fill_(1.0)
    left = 1.0
    for n in range(1, 31):
        average.update()
        left *= min(decay, (1 + n) / (10 + n))
        same(average.shadow[0], torch.tensor([1 - left]),
             f"decay {decay} is (1 + n) / (10 + n) at first, to forget the start: step {n}", 1e-6)
    assert average.count == 30, f"30 steps were taken, counted are {average.count}"


def test_exercise_13_moves_averages_in_place_and_weights_not_at_all():
    weights = [nn.Parameter(randn(3, seed=seed)) for seed in range(2)]
    average = EMA(weights, 0.9)
    kept = list(average.shadow)
    weights[1].data += 1
    average.update()
    for i in range(2):
        assert average.shadow[i] is kept[i], "averages are moved in place"
        assert not kept[i].requires_grad, "averages must not keep the graph of the step"
        same(weights[i].detach(), randn(3, seed=i) + i, "weights stay what they are", 0)
    same(kept[0], randn(3), "an average whose weight stands still stands still")
    assert (kept[1] != randn(3, seed=1)).all(), "the average of a weight that moved did not move"


# --------------------------------------------------------------------------------------------------
# 14: the ST block


class Stub(nn.Module):
    """Takes the place of a layer: a number times z, plus 100 for other arguments than expected."""

    def __init__(self, factor: float, *expected):
        super().__init__()
        self.factor = factor
        self.expected = expected

    def forward(self, z, *given):
        assert len(given) == len(self.expected)
        return self.factor * z + 100 * sum(a is not b for a, b in zip(given, self.expected))


EMB = randn(1, 1, 16)
CONTEXT = randn(1, 5, 6)


def st_level(video: bool) -> Level:
    """A level of three layers, two with an ST block, whose parts are stubs."""
    level = Level([4, 4, 4], 4, 2, UNetConfig(channels=(4,), heads=2, groups=2, frames=3))
    for i in range(3):
        level.resnets[i] = Stub(2 + i, EMB, level.resnet_adaptors[i] if video else None)
    for i in range(2):
        level.attentions[i] = Stub(5 + i, CONTEXT, level.attention_adaptors[i] if video else None)
        level.temporal_attentions[i] = Stub(0.1 + i)
    return level


@pytest.mark.parametrize("i, video, factor, says", [
    (0, True, 2 * (5 + 0.1), "z_out = S-Attn(z) + T-Attn(z), both of the resnet's z (§3.2.2)"),
    (1, True, 3 * (6 + 1.1), "layer 1 has its own parts, z_out = S-Attn(z) + T-Attn(z)"),
    (1, False, 3 * 6, "without video a layer is the resnet, then S-Attn(z)"),
    (2, True, 4, "layers beyond the attentions are the resnet alone"),
    (2, False, 4, "layers beyond the attentions are the resnet alone, without video too"),
])
def test_exercise_14_space_and_time_read_the_same_tensor_and_are_added(i, video, factor, says):
    z, = latents(0)
    same(st_level(video).layer(i, z, EMB, CONTEXT, video), factor * z,
         f"{says} (100 more: the wrong emb, context or adaptor)")
