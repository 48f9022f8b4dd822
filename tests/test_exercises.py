"""The graders of the exercises that `assignment.py` cuts: each says which property of the paper broke, and by how much.

They call one function each, with everything else replaced where another exercise stands beside it: what is wrong in one
does not turn the graders of another red.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

import unet3d
from clip_text import Tokenizer
from conftest import randn
from data import InputError, sample_frames
from diffusion import Diffusion, DiffusionConfig
from optim import MovingAverage
from unet3d import DirectedTemporalAttention, FrameAdaptor, directed_attention, sinusoid
from vae import VAEConfig, VideoVAE

WITHIN = 1e-9


def same(found, expected, says: str, within: float = WITHIN) -> None:
    """Fails with what should have been so, and how far it is from it."""
    assert found.shape == expected.shape, f"{says}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
    assert found.isfinite().all(), f"{says}: there are values that are no finite numbers"
    off = (found.double() - expected.double()).abs().max().item()
    assert off <= within, f"{says}: off by as much as {off:.3g}"


# ----------------------------------------------------------------------------------------------------------------------
# 1 and 2: the tokenizer

MERGES = [("b", "c"), ("a", "b"), ("a", "a"), ("ab", "c</w>"), ("h", "o"), ("r", "s"), ("rs", "e</w>"),
          ("ho", "rse</w>"), ("b", "c</w>")]


def merged(word: str) -> list[str]:
    return Tokenizer(MERGES)._merge(word)


@pytest.mark.parametrize("word, symbols, says", [
    ("abcd", ["a", "bc", "d</w>"], "the pair that was learned first is joined first: b + c before a + b"),
    ("abd", ["ab", "d</w>"], "neighbours that are in the list of merges are joined"),
    ("aaab", ["aa", "a", "b</w>"], "of equal pairs the leftmost is joined first"),
    ("aaaaa", ["aa", "aa", "a</w>"], "a merge is applied to every place in the word"),
    ("horse", ["horse</w>"], "merging goes on with what was merged, until no pair is in the list"),
    ("xbc", ["x", "bc</w>"], "the last symbol of a word carries </w>, another symbol than the same without"),
    ("a", ["a</w>"], "a word of one letter is one symbol, and ends with </w>"),
    ("<|endoftext|>", ["<|endoftext|>"], "start and end tokens are symbols of their own"),
])
def test_exercise_01_words_become_the_symbols_that_were_learned(word, symbols, says):
    found = merged(word)
    assert found == symbols, f"{says}: {word!r} became {found}, not {symbols}"


def test_exercise_01_joins_in_the_order_of_learning_whatever_the_place():
    found = merged("abc")
    assert found == ["ab", "c</w>"] or found == ["abc</w>"], f"'abc' became {found}"
    assert found == ["abc</w>"], "the two symbols ab and c</w> are in the list: one merge makes room for another"


@pytest.fixture
def pairs_left_alone(monkeypatch):
    monkeypatch.setattr(Tokenizer, "_merge", lambda self, word: [*word[:-1], word[-1] + "</w>"])  # exercise 1


def test_exercise_02_a_caption_stands_between_start_and_end(pairs_left_alone):
    tokenizer = Tokenizer([], context_length=8)
    found = tokenizer("ab")[0].tolist()
    a, b = ord("a") - ord("!"), ord("b") - ord("!") + 256
    assert found[:4] == [tokenizer.start, a, b, tokenizer.end], f"start, caption, end expected: {found}"


def test_exercise_02_what_is_left_is_filled_with_the_end_token(pairs_left_alone):
    tokenizer = Tokenizer([], context_length=8)
    found = tokenizer("ab")[0, 3:].tolist()
    assert found == [tokenizer.end] * 5, f"Stable Diffusion pads with the end token {tokenizer.end}, here is {found}"


def test_exercise_02_a_caption_that_is_too_long_keeps_its_end_token(pairs_left_alone):
    tokenizer = Tokenizer([], context_length=8)
    found = tokenizer("abcdefghijkl")[0]
    assert len(found) == 8, f"(b, context_length) expected, {len(found)} tokens found"
    assert found[-1] == tokenizer.end, "the last token of a caption that was cut is not the end token"
    assert found[0] == tokenizer.start, "the first token of a caption that was cut is not the start token"
    assert found[1:7].tolist() == [ord(c) - ord("!") for c in "abcdef"], "a long caption loses its last tokens alone"


def test_exercise_02_several_captions_are_rows(pairs_left_alone):
    tokenizer = Tokenizer([], context_length=8)
    found = tokenizer(["ab", "", "abcdefghijkl"])
    assert found.shape == (3, 8) and found.dtype == torch.int64, f"int64 (3, 8) expected, {found.dtype} {found.shape}"
    assert found[1].tolist() == [tokenizer.start] + [tokenizer.end] * 7, "an empty caption is start, then end tokens"
    assert tokenizer("ab").shape == (1, 8), "one caption is a batch of one"


# ----------------------------------------------------------------------------------------------------------------------
# 3: noise


@pytest.mark.parametrize("t", [0, 1, 499, 998, 999])
def test_exercise_03_noise_is_that_of_its_step(t):
    diffusion, z0, eps = Diffusion(), randn(1, 2, 4, 3, 3), randn(1, 2, 4, 3, 3, seed=1)
    alpha = diffusion.alphas_cumprod[t].item()
    found = diffusion.add_noise(z0, eps, torch.tensor([t]))
    same(found, math.sqrt(alpha) * z0 + math.sqrt(1 - alpha) * eps,
         f"z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps at t = {t}")


def test_exercise_03_keeps_the_variance_of_one():
    z0, eps = randn(1, 8, 4, 32, 32), randn(1, 8, 4, 32, 32, seed=1)
    for t in (50, 400, 800):
        found = Diffusion().add_noise(z0, eps, torch.tensor([t])).var().item()
        assert abs(found - 1) < 0.05, f"of N(0, 1) and N(0, 1) noise makes N(0, 1): variance {found:.3f} at t = {t}"


def test_exercise_03_each_clip_has_its_own_step_and_each_frame_can_have_one():
    diffusion, z0, eps = Diffusion(), randn(2, 3, 4, 2, 2), randn(2, 3, 4, 2, 2, seed=1)
    of_clips = diffusion.add_noise(z0, eps, torch.tensor([10, 900]))
    for i, t in enumerate((10, 900)):
        same(of_clips[i : i + 1], diffusion.add_noise(z0[i : i + 1], eps[i : i + 1], torch.tensor([t])),
             f"clip {i} of a batch has step {t} of t (b,)")
    of_frames = diffusion.add_noise(z0, eps, torch.tensor([[1, 50, 900]] * 2))
    for i, t in enumerate((1, 50, 900)):
        same(of_frames[:, i : i + 1], diffusion.add_noise(z0[:, i : i + 1], eps[:, i : i + 1], torch.tensor([t, t])),
             f"frame {i} has step {t} of t (b, f)")


# ----------------------------------------------------------------------------------------------------------------------
# 4: the adaptor


def adaptor(frames: int = 3, channels: int = 3) -> FrameAdaptor:
    module = FrameAdaptor(frames, channels).double()
    module.scale.data, module.shift.data = 1 + randn(frames, channels), randn(frames, channels, seed=1)
    return module


def test_exercise_04_is_the_identity_with_scale_one_and_shift_zero():
    z = randn(2, 3, 3, 4, 4)
    same(FrameAdaptor(3, 3).double()(z), z, "with S = 1 and B = 0 the image model stays itself (§3.2.1)", 0)


def test_exercise_04_every_frame_has_its_own_scale_and_shift_for_each_channel():
    module, z = adaptor(), randn(2, 3, 3, 3, 3)  # all of one length, so that a wrong axis has the right shape
    found = module(z)
    for i in range(3):
        for c in range(3):
            same(found[:, i, c], module.scale[i, c] * z[:, i, c] + module.shift[i, c],
                 f"z_i = S_i z_i + B_i (§3.2.1), frame {i}, channel {c}")


def test_exercise_04_works_on_tokens_too():
    module, tokens = adaptor(), randn(2, 3, 3, 3)  # (b, f, n, c)
    found = module(tokens)
    for i in range(3):
        same(found[:, i], module.scale[i] * tokens[:, i] + module.shift[i], f"tokens (b, f, n, c) of frame {i}")


def test_exercise_04_refuses_another_number_of_frames():
    for frames in (1, 2, 4):
        with pytest.raises(ValueError):
            adaptor()(randn(1, frames, 3, 4, 4))
            pytest.fail(f"{frames} frames were taken by an adaptor of 3: it holds one scale and shift for each")


# ----------------------------------------------------------------------------------------------------------------------
# 5 and 6: directed attention


def attention_inputs(f: int = 5) -> tuple:
    return tuple(randn(2, 2, f, 4, seed=seed) for seed in range(3))


def by_hand(q, k, v, mask: str) -> torch.Tensor:
    """Row by row: frame i reads frames up to i."""
    f, rows = q.shape[2], []
    for i in range(f):
        scores = (q[:, :, i : i + 1] * k).sum(-1) / math.sqrt(q.shape[-1])  # (n, heads, f)
        seen = f if mask == "bidirectional" else i + 1
        weights = scores.exp()
        weights = weights / weights[..., : f if mask == "literal" else seen].sum(-1, keepdim=True)
        rows.append((weights[..., :seen, None] * v[:, :, :seen]).sum(2))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("mask", ["strict", "literal", "bidirectional"])
def test_exercise_05_each_mask_weighs_as_it_should(mask):
    q, k, v = attention_inputs()
    says = {"strict": "masked before the softmax, rows sum to one", "bidirectional": "no mask: all frames are read",
            "literal": "masked after the softmax (the paper's equation), later frames stay in the denominator"}[mask]
    same(directed_attention(q, k, v, mask), by_hand(q, k, v, mask), f'"{mask}": {says}')


@pytest.mark.parametrize("mask", ["strict", "literal"])
def test_exercise_05_no_frame_reads_the_values_of_a_later_one(mask):
    q, k, v = attention_inputs()
    before, other = directed_attention(q, k, v, mask), v.clone()
    other[:, :, 3] += 1
    off = (directed_attention(q, k, other, mask) - before).abs().amax((0, 1, 3))
    assert (off[:3] == 0).all(), f'"{mask}": frame {int((off[:3] > 0).nonzero()[0])} changes with the values of frame 3'
    assert (off[3:] > 0).all(), f'"{mask}": frames 3 and 4 do not change with the values of frame 3 (rows are queries)'


def test_exercise_05_strict_is_independent_of_later_keys_and_literal_is_not():
    q, k, v = attention_inputs()
    other = k.clone()
    other[:, :, 4] += 1
    off = {mask: (directed_attention(q, other, v, mask) - directed_attention(q, k, v, mask)).abs().amax((0, 1, 3))
           for mask in ("strict", "literal")}
    assert (off["strict"][:4] == 0).all(), "strict: a key of frame 4 moves an earlier frame, through the denominator"
    assert (off["literal"][:4] > 0).all(), "literal: later keys must stay in the denominator, as the equation has it"


def test_exercise_05_the_first_frame_reads_itself_alone():
    q, k, v = attention_inputs()
    same(directed_attention(q, k, v, "strict")[:, :, 0], v[:, :, 0], "the diagonal is kept: frame 1 reads itself")


def temporal(monkeypatch) -> DirectedTemporalAttention:
    monkeypatch.setattr(unet3d, "directed_attention", by_hand)  # exercise 5
    module = DirectedTemporalAttention(4, heads=2).double()
    for seed, p in enumerate(module.parameters()):
        p.data = randn(*p.shape, seed=seed)
    return module


def test_exercise_06_every_pixel_is_a_sequence_of_its_own(monkeypatch):
    module, z = temporal(monkeypatch), randn(2, 3, 4, 2, 2)
    found = module(z)
    for b, y, x in ((0, 0, 1), (1, 1, 0)):
        tokens = module.norm(z[b, :, :, y, x])  # (f, c)
        q, k, v = (to(tokens).view(1, 3, 2, 2).transpose(1, 2) for to in (module.to_q, module.to_k, module.to_v))
        row = module.to_out(by_hand(q, k, v, "strict").transpose(1, 2).reshape(3, 4))
        same(found[b, :, :, y, x], row, f"frames attend at equal (h, w), here of clip {b} at ({y}, {x})")


def test_exercise_06_frames_mix_at_equal_places_alone(monkeypatch):
    module, z = temporal(monkeypatch), randn(2, 3, 4, 2, 2)
    before, other = module(z), z.clone()
    other[1, 0, :, 1, 0] += randn(4, seed=9)
    off = (module(other) - before).abs().amax(2)  # (b, f, h, w)
    assert (off[0] == 0).all(), "one clip changes with another: clips and frames are mixed up in a reshape"
    off[1, :, 1, 0] = 0
    assert (off == 0).all(), "a pixel changes with another pixel: frames must mix at equal (h, w) only (§3.2.2)"


def test_exercise_06_reads_the_norm_of_its_input_and_adds_nothing_itself(monkeypatch):
    module, z = temporal(monkeypatch), randn(2, 3, 4, 2, 2)
    same(module(z), module(5 * z + 2), "T-Attn(LN(z)): scale and offset of the channels do not matter", 1e-2)
    module.to_out.weight.data.zero_()
    module.to_out.bias.data.zero_()
    same(module(z), torch.zeros_like(z), "with a zero output projection nothing is added (no residual here)", 0)


# ----------------------------------------------------------------------------------------------------------------------
# 7: waves


def test_exercise_07_is_cosines_then_sines_of_falling_frequencies():
    found = sinusoid(torch.tensor([0.0, 1.0, 8.0, 30.0]), 8)
    assert found.shape == (4, 8), f"x (b,) -> (b, width) expected, {tuple(found.shape)} found"
    for x, row in zip((0.0, 1.0, 8.0, 30.0), found):
        angles = [x * 10000 ** (-k / 4) for k in range(4)]
        same(row[:4], torch.tensor([math.cos(a) for a in angles]), f"the first half are cosines, at {x}", 1e-5)
        same(row[4:], torch.tensor([math.sin(a) for a in angles]), f"the second half are sines, at {x}", 1e-5)


def test_exercise_07_is_float32_whatever_comes():
    for x in (torch.tensor([3]), torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([999])):
        found = sinusoid(x, 4)
        assert found.dtype == torch.float32, f"float32 expected of {x.dtype}, {found.dtype} found: steps would collide"


# ----------------------------------------------------------------------------------------------------------------------
# 8 to 10: sampling


def step_inputs(config: DiffusionConfig | None = None) -> tuple:
    return Diffusion(config), randn(2, 3, 4, 2, 2), randn(2, 3, 4, 2, 2, seed=1), randn(2, 3, 4, 2, 2, seed=2)


def of(t: int) -> torch.Tensor:
    return torch.full((2,), t)


def test_exercise_08_the_true_noise_leads_to_the_true_less_noisy_latents():
    diffusion, z0, eps, other = step_inputs()
    for t, previous in ((999, 500), (500, 100), (100, 0)):
        (a, b), (c, d) = ((math.sqrt(x), math.sqrt(1 - x)) for x in diffusion.alphas_cumprod[[t, previous]].tolist())
        found = diffusion.ddim_step(a * z0 + b * eps, eps, of(t), of(previous), 0.0, other)
        same(found, c * z0 + d * eps, f"eta 0 and the true eps: z_{t} -> z_{previous} exactly (DDIM, eq. 12)", 1e-6)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_exercise_08_new_noise_replaces_old(eta):
    diffusion, z0, eps, other = step_inputs()
    t, previous = 600, 400
    alpha, before = diffusion.alphas_cumprod[[t, previous]].tolist()
    sigma = eta * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
    z = math.sqrt(alpha) * z0 + math.sqrt(1 - alpha) * eps
    expected = math.sqrt(before) * z0 + math.sqrt(1 - before - sigma**2) * eps + sigma * other
    same(diffusion.ddim_step(z, eps, of(t), of(previous), eta, other), expected,
         f"sigma^2 = eta^2 (1 - a_prev) / (1 - a) (1 - a / a_prev), eta {eta}", 1e-6)


def test_exercise_08_the_last_step_goes_to_step_zero_as_stable_diffusion_does():
    diffusion, z0, eps, other = step_inputs()
    alpha, first = diffusion.alphas_cumprod[[1, 0]].tolist()
    z = math.sqrt(alpha) * z0 + math.sqrt(1 - alpha) * eps
    same(diffusion.ddim_step(z, eps, of(1), of(-1), 0.0, other), math.sqrt(first) * z0 + math.sqrt(1 - first) * eps,
         "below step 0 alpha_bar is that of step 0 (matches SD)", 1e-6)


def test_exercise_08_reads_v_where_the_network_predicts_v():
    diffusion, z0, eps, other = step_inputs(DiffusionConfig(prediction="v_prediction"))
    alpha, before = diffusion.alphas_cumprod[[600, 400]].tolist()
    a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
    found = diffusion.ddim_step(a * z0 + b * eps, a * eps - b * z0, of(600), of(400), 0.0, other)
    same(found, math.sqrt(before) * z0 + math.sqrt(1 - before) * eps, "v-prediction: z_0 and eps come of split()", 1e-6)


@pytest.mark.parametrize("t, previous", [(999, 979), (600, 400), (20, 0)])
def test_exercise_09_draws_from_the_posterior(t, previous):
    diffusion, z0, eps, other = step_inputs()
    alpha, before = diffusion.alphas_cumprod[[t, previous]].tolist()
    beta = 1 - alpha / before
    z = math.sqrt(alpha) * z0 + math.sqrt(1 - alpha) * eps
    mean = (math.sqrt(before) * beta * z0 + math.sqrt(1 - beta) * (1 - before) * z) / (1 - alpha)
    found = diffusion.ddpm_step(z, eps, of(t), of(previous), torch.zeros_like(z))
    same(found, mean, f"the mean of q(z_{previous} | z_{t}, z_0) (DDPM, eq. 7)", 1e-6)
    noise = diffusion.ddpm_step(z, eps, of(t), of(previous), other) - found
    sigma = math.sqrt((1 - before) / (1 - alpha) * beta)
    same(noise, sigma * other, "the noise has the posterior's standard deviation, the root of its variance", 1e-6)


def test_exercise_09_the_last_step_ends_at_z_0_without_noise():
    diffusion, z0, eps, other = step_inputs()
    alpha = diffusion.alphas_cumprod[19].item()
    z = math.sqrt(alpha) * z0 + math.sqrt(1 - alpha) * eps
    same(diffusion.ddpm_step(z, eps, of(19), of(-1), other), z0, "alpha_bar is 1 once a frame is done", 1e-6)


def network(calls: list | None = None):
    """Of text 0: z, of text c: z + c; remembers what it was called with."""
    def run(z, t, context, fps):
        if calls is not None:
            calls.append((z, t, context, fps))
        return z + context.mean((1, 2)).view(-1, 1, 1, 1, 1)
    return run


def guidance_inputs() -> tuple:
    return randn(2, 3, 4, 2, 2), torch.full((2, 5, 3), 1.0).double(), torch.zeros(2, 5, 3).double(), torch.ones(2)


def test_exercise_10_goes_beyond_the_text_away_from_no_text():
    z, context, uncond, fps = guidance_inputs()
    for scale in (7.5, 2.0, 0.0):
        found = Diffusion().guided(network(), z, of(500), context, uncond, fps, scale)
        same(found, z + scale, f"uncond + s (cond - uncond), guidance {scale} (text adds 1, no text 0)")


def test_exercise_10_one_call_and_both_halves_of_it():
    (z, context, uncond, fps), calls = guidance_inputs(), []
    Diffusion().guided(network(calls), z, of(500), context, uncond, fps, 7.5)
    assert len(calls) == 1, f"both halves belong in one batch: the network was called {len(calls)} times"
    assert len(calls[0][0]) == 4 and torch.equal(calls[0][0][:2], calls[0][0][2:]), "the batch holds z twice"
    assert calls[0][1].shape[0] == 4 and calls[0][3].shape == (4,), "t and fps are doubled as z is"
    calls.clear()
    Diffusion().guided(network(calls), z, of(500), context, uncond, None, 1)
    assert len(calls) == 1 and len(calls[0][0]) == 2 and torch.equal(calls[0][2], context), \
        "guidance 1 is the network with its text, once: half the work"


def test_exercise_10_steps_outside_the_schedule_are_its_ends():
    (z, context, uncond, fps), calls = guidance_inputs(), []
    Diffusion().guided(network(calls), z, torch.tensor([[-50, 10, 2000]] * 2), context, uncond, fps, 7.5)
    assert calls[0][1][0].tolist() == [0, 10, 999], f"t is clamped to 0 .. T-1: {calls[0][1][0].tolist()}"


def test_exercise_10_falls_with_the_power_of_the_step():
    z, context, uncond, fps = guidance_inputs()
    found = Diffusion(DiffusionConfig(guidance_power=2.0)).guided(
        network(), z, torch.tensor([[1000 - 500, 250, 0]] * 2), context, uncond, fps, 5.0)
    for i, falling in enumerate((0.25, 0.0625, 0.0)):
        same(found[:, i], z[:, i] + 1 + 4 * falling, f"1 + (s - 1) (t / T)^power, frame {i}")


def test_exercise_10_the_rescaled_output_has_the_spread_of_the_one_with_text():
    z, context, uncond, fps = guidance_inputs()

    def louder(z, t, context, fps):
        return z * (1 + context.mean((1, 2)).view(-1, 1, 1, 1, 1))

    context[1] = 3  # to the second clip its text is louder
    given, guided = torch.stack([2 * z[0], 4 * z[1]]), torch.stack([8.5 * z[0], 23.5 * z[1]])
    found = Diffusion(DiffusionConfig(guidance_rescale=1.0)).guided(louder, z, of(500), context, uncond, fps, 7.5)
    for clip, with_text in zip(found, given):
        same(clip.std(), with_text.std(), "guidance_rescale 1: each clip's spread is that of its output with text")
    half = Diffusion(DiffusionConfig(guidance_rescale=0.5)).guided(louder, z, of(500), context, uncond, fps, 7.5)
    same(half, (found + guided) / 2, "guidance_rescale 0.5 is half way")


# ----------------------------------------------------------------------------------------------------------------------
# 11: the VAE


def test_exercise_11_moves_noise_by_the_posterior_and_scales_both():
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig(channels=(8, 8), groups=2, scaling_factor=0.5))
    mean, logvar, eps = randn(2, 3, 4, 2, 2), randn(2, 3, 4, 2, 2, seed=1), randn(2, 3, 4, 2, 2, seed=2)
    sigma = logvar.exp().sqrt()
    found = vae.sample_latents(mean, logvar, eps)
    same(found, 0.5 * (mean + sigma * eps), "z = (mean + exp(logvar / 2) eps) * scaling_factor")
    same(vae.sample_latents(mean, logvar, 0 * eps), 0.5 * mean, "without noise it is the mean, scaled")


def test_exercise_11_lets_gradients_reach_mean_and_variance():
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig(channels=(8, 8), groups=2, scaling_factor=0.5))
    mean, logvar, eps = (randn(1, 1, 4, 2, 2, seed=seed).requires_grad_(seed < 2) for seed in range(3))
    before = mean.detach().clone()
    z = vae.sample_latents(mean, logvar, eps)
    assert z.requires_grad, "nothing can be learned: the sample is cut off from mean and log-variance"
    z.sum().backward()
    same(mean.grad, torch.full_like(mean, 0.5), "dz / dmean = scaling_factor: the reparametrisation lets it through")
    same(logvar.grad, 0.25 * (0.5 * logvar).exp().detach() * eps, "dz / dlogvar = scaling_factor sigma eps / 2")
    same(mean.detach(), before, "the mean that was given stays what it is", 0)


# ----------------------------------------------------------------------------------------------------------------------
# 12: frames


def cuts(total: int, frames: int, n: int = 400, **settings) -> list:
    rng = np.random.default_rng(0)
    return [sample_frames(total, 24.0, frames, rng, **settings) for _ in range(n)]


def test_exercise_12_frames_are_uniform_and_inside():
    for indices, _ in cuts(60, 8):
        gaps = set(np.diff(indices).tolist())
        assert len(indices) == 8, f"8 frames asked for, {len(indices)} cut"
        assert len(gaps) == 1 and gaps.pop() >= 1, f"frames must be uniform in the part (§3.2, FPS): {indices.tolist()}"
        assert indices[0] >= 0 and indices[-1] < 60, f"frames 0 to 59 are there, {indices.tolist()} asked for"


def test_exercise_12_v_is_the_rate_of_the_frames_that_were_taken():
    for indices, v in cuts(60, 8):
        stride = int(indices[1] - indices[0])
        assert v == pytest.approx(24 / stride), f"every {stride}th of 24 frames a second are {24 / stride:.3g}, not {v}"


def test_exercise_12_every_part_and_every_stride_comes_up():
    found = cuts(44, 8, 3000)
    strides = {int(i[1] - i[0]) for i, _ in found}
    assert strides == {1, 2, 3, 4, 5, 6}, f"strides 1 to 6 all fit 44 frames, seen are {sorted(strides)}"
    for stride in (1, 6):
        starts = {int(i[0]) for i, _ in found if i[1] - i[0] == stride}
        expected = set(range(44 - 7 * stride))
        assert starts == expected, f"stride {stride}: parts start at 0 to {max(expected)}, the last frame included; " \
                                   f"seen are {min(starts)} to {max(starts)}"
    assert {int(i[1] - i[0]) for i, _ in cuts(15, 8)} == {1, 2}, "15 frames hold 8 at strides 1 and 2 alone"


def test_exercise_12_a_rate_that_is_asked_for_is_met_as_nearly_as_fits():
    for fps, stride in ((24, 1), (12, 2), (8, 3), (9, 3), (7, 3), (100, 1)):
        found = {int(i[1] - i[0]) for i, _ in cuts(60, 8, 20, fps=fps)}
        assert found == {stride}, f"--fps {fps} of 24 is every {stride}th frame, found {found}"
    assert {int(i[1] - i[0]) for i, _ in cuts(20, 8, 20, fps=2)} == {2}, "20 frames hold 8 at stride 2 at most"


def test_exercise_12_a_video_too_short_is_refused():
    assert cuts(8, 8, 1)[0][0].tolist() == list(range(8)), "8 of 8 frames are all of them"
    with pytest.raises(InputError):
        cuts(7, 8, 1)
        pytest.fail("8 frames were cut from a video of 7")


# ----------------------------------------------------------------------------------------------------------------------
# 13: the moving average


def averaged(decay: float, values: list[float]) -> tuple[list[float], MovingAverage]:
    p = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    average, found = MovingAverage([p], decay), []
    for value in values:
        p.data = torch.tensor([value], dtype=torch.float64)
        average.update()
        found.append(average.values[0].item())
    return found, average


def test_exercise_13_warms_up():
    found, expected, average = averaged(0.999, [1.0] * 30)[0], [], 0.0
    for n in range(1, 31):
        decay = min(0.999, (1 + n) / (10 + n))
        average = decay * average + (1 - decay)
        expected.append(average)
    same(torch.tensor(found), torch.tensor(expected), "decay is (1 + n) / (10 + n) until that exceeds it: without "
                                                      "it the average of a short run is the noise it began with", 1e-6)


def test_exercise_13_reaches_its_decay_and_keeps_it():
    average = averaged(0.5, [0.0] * 20)[1]
    average.parameters[0].data.fill_(1.0)
    average.update()
    same(average.values[0], torch.tensor([0.5]).double(), "after the warm-up each step moves by 1 - decay")
    assert average.count == 21, f"21 steps were taken, counted are {average.count}"


def test_exercise_13_moves_averages_in_place_and_weights_not_at_all():
    p, q = (nn.Parameter(randn(3, seed=seed)) for seed in range(2))
    average = MovingAverage([p, q], 0.9)
    kept, before = list(average.values), [p.detach().clone(), q.detach().clone()]
    p.data += 1
    average.update()
    assert all(a is b for a, b in zip(kept, average.values)), "averages are moved in place: others hold these tensors"
    assert not any(value.requires_grad for value in average.values), "averages must not keep the graph of the step"
    same(p.detach(), before[0] + 1, "weights stay what they are", 0)
    same(average.values[1], before[1], "an average whose weight stands still stands still")
    assert (average.values[0] - before[0]).abs().min() > 0, "the average of a weight that moved did not move"
