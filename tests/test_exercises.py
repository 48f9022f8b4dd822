"""The graders of the exercises: each says which property broke, and by how much.

What is right is stored in numbers, in the file beside this one. A grader calls the function of one
exercise and replaces those of others, so that a mistake in one does not turn the graders of another
red; the last exercise has them all.
"""

import _thread
import gzip
import importlib
import itertools
import json
import pickle
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

torch.set_num_threads(1)  # the tensors are so small that more threads only wait
NUMBERS = json.loads(gzip.decompress(Path(__file__).with_suffix(".json.gz").read_bytes()))
SEED = NUMBERS["seed"]  # of all inputs
CHECKPOINT = Path(__file__).parent.parent / "checkpoints/shapes.pt"


@pytest.fixture(autouse=True)
def time_limit():
    """Stop a long test in words, by a signal that is simulated: every system has that."""
    before = signal.signal(signal.SIGTERM, lambda *_: fail("20 s are over: does your loop end?"))
    end = time.process_time() + 20  # of processor time: the machine may be busy
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if time.process_time() > end:
                return _thread.interrupt_main(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    yield
    done.set()
    signal.signal(signal.SIGTERM, before)


def get(module: str, name: str):
    """Import what a grader tests when it runs: a file with an error fails its own graders alone."""
    return getattr(importlib.import_module(module), name)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * SEED + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def fail(words: str) -> None:
    pytest.fail(words, pytrace=False)


def call(says: str, function, *inputs, refused_by: tuple = ()):
    """Call a function; if it raises anything but what it should, say which property was tested."""
    try:
        found = function(*inputs)
    except refused_by:
        return None
    except Exception as error:
        raise AssertionError(f"{says}: it raised {type(error).__name__}: {error}") from error
    return found if not refused_by else fail(f"{says}: no error was raised")


def same(says: str, found, within: float = 1e-6, suffix: str = "") -> None:
    """Fail with the property, and how far a result is from what is stored under that name."""
    is_tensor = isinstance(found, Tensor)
    if "storing" in NUMBERS and not suffix:
        values = [float(f"{x:.7g}") for x in found.flatten().tolist()] if is_tensor else found
        NUMBERS[says] = [[*found.shape], values] if is_tensor else found
    if not is_tensor:
        if found != NUMBERS[says]:
            fail(f"{says}{suffix}: {found}, not {NUMBERS[says]}")
        return
    shape, values = NUMBERS[says]
    if [*found.shape] != shape:
        fail(f"{says}{suffix}: of shape {[*found.shape]}, not {shape}")
    right = torch.tensor(values, dtype=torch.float64).view(shape)
    off = (found.detach().double() - right).abs().max().item()
    if not off <= within * max(1, right.abs().max().item()):  # nan is not
        fail(f"{says}{suffix}: off by as much as {off:.3g}")


def state_of(inputs: list) -> tuple[bytes, bytes]:
    """Return what no function may change: its inputs, and generators that it was not given."""
    values = [x.detach().numpy().tobytes() if isinstance(x, Tensor) else x for x in inputs]
    generators = (torch.get_rng_state().numpy(), np.random.get_state(), random.getstate())
    return pickle.dumps(values), pickle.dumps(generators)


def check(says: str, function, within: float = 1e-6, result_type=None, **inputs) -> None:
    """Compare a result with the stored one, in float64 and float32, and all that goes with it.

    Floating-point inputs are given in both types, the weights of a module too. The result has their
    type and device, gradients reach each of them (weighted sums are compared), and neither they nor
    any generator are changed. Timesteps are on the CPU.
    """
    if isinstance(function, nn.Module):
        module = function
        names = [name for name, _ in module.named_parameters()]
        inputs |= {name: randn(*module.get_parameter(name).shape, seed=50 + i)
                   for i, name in enumerate(names)}
        function = lambda z, *weights: functional_call(module, dict(zip(names, weights)), (z,))

    def converted(dtype, device="cpu"):
        return [x.to("cpu" if name in ("t", "t_prev") else device,
                     dtype if x.is_floating_point() else x.dtype, copy=True)
                if isinstance(x, Tensor) else x for name, x in inputs.items()]

    for dtype, suffix in ((torch.float64, ""), (torch.float32, ", in float32")):
        given = converted(dtype)
        leaves = {name: x.requires_grad_() for name, x in zip(inputs, given)
                  if isinstance(x, Tensor) and x.is_floating_point()}
        before = state_of(given)
        found = call(says + suffix, function, *given)
        same(says, found, max(within, 2e-5) if suffix else within, suffix)
        if found.dtype != (result_type or dtype):
            fail(f"{says}{suffix}: the result is {found.dtype}, not {result_type or dtype}")
        after = state_of(given)
        for i, words in enumerate(("an input in place", "a generator that it was not given")):
            if after[i] != before[i]:
                fail(f"{says}{suffix}: it changes {words}")
        if not torch.equal(call(says + suffix, function, *given), found):
            fail(f"{says}{suffix}: a second call with the same inputs has another result")
        total = (found * randn(*found.shape, seed=98)).sum()
        grads = [None] * len(leaves)
        if found.requires_grad:
            grads = torch.autograd.grad(total, leaves.values(), allow_unused=True)
        for (name, x), grad in zip(leaves.items(), grads if dtype == torch.float64 else ()):
            words = f"{says}: the gradient that reaches {name}"
            if grad is None and NUMBERS.get(words, [[], [0.0]])[1] != [0.0]:
                fail(f"{words} is cut off")
            grad = torch.zeros_like(x) if grad is None else grad
            same(words, (grad * randn(*x.shape, seed=99)).sum(), within)
    words = f"{says}, on another device than the CPU"
    found = call(words, function, *converted(torch.float32, "meta"))
    if not found.is_meta:
        fail(f"{words}: the result is on {found.device}")


MERGES = [("x", "a"), ("b", "c"), ("a", "b"), ("a", "a"), ("ab", "c</w>"), ("h", "o"), ("r", "s"),
          ("rs", "e</w>"), ("ho", "rse</w>"), ("b", "c</w>"), ("ab", "ab"), ("Ã", "©</w>")]


@pytest.mark.parametrize("words, says", [
    (["abcd"], "what was learned first is joined first, b + c before a + b"),
    (["aaab", "aaaab", "aaaaab"], "of equal pairs the leftmost is joined first"),
    (["aaaaa", "aaaaaaab", "abd", "ad"], "a merge is applied at every place in the word"),
    (["horse", "horses", "abababab"], "merging goes on with what was merged"),
    (["abc", "abbc"], "one merge makes room for another, ab + c</w>"),
    (["xababd", "xaxabab", "xabab"], "only whole symbols are joined: xa + b is not a + b"),
    (["xbc", "abca", "bca"], "the last symbol ends with </w> and is another than without"),
    (["a", "x", "Ã©", "©"], "</w> is a part of the last symbol"),
    (["<|endoftext|>", "<|startoftext|>"], "start and end tokens are symbols of their own"),
    (["".join(random.Random(99 * SEED + n).choices("abchorsex", k=n)) for n in range(1, 30)],
     "words of many letters"),
], ids=range(10))
def test_exercise_01_words_become_the_symbols_that_were_learned(words, says):
    tokenizers = [get("clip_text", "Tokenizer")(MERGES[:n]) for n in (5, len(MERGES))]
    for word in words * 2:  # the first time must not change the second
        for tokenizer in tokenizers:
            case = f"{says}: {word!r}, {len(tokenizer.merges)} merges"
            same(case, call(case, tokenizer._merge, word))


@pytest.mark.parametrize("length", [8, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 8, 20])
def test_exercise_02_a_caption_stands_between_start_and_end(monkeypatch, count, length):
    monkeypatch.setattr("clip_text.Tokenizer._merge", lambda self, word: [*word])  # exercise 1
    tokenizer = get("clip_text", "Tokenizer")([("a", "b"), ("c", "d")])
    tokenizer.context_length = length  # as `MagicVideo.from_preset` does
    letters = "abcdefghijklmnopqrstuvwxyz"[SEED:][:count]
    caption = " ".join(letters[n : n + 2] for n in range(0, count, 2))
    for texts in (caption, [caption], [caption, "xy"], ["z", caption, ""]):
        says = f"{count} tokens in a context of {length}: {texts!r}"
        tokens = call(says, tokenizer, texts)
        same(says, tokens)
        if tokens.dtype != torch.int64:
            fail(f"{says}: ids are int64, not {tokens.dtype}")


FORMS = {  # what t is -> the shapes of t and of z without channels, height and width
    "t (b,)": ((2,), (2, 3)),
    "t (b,) of as many clips as frames": ((3,), (3, 3)),
    "t (b, f)": ((2, 3), (2, 3)),
    "t (b, f) of as many clips as frames": ((3, 3), (3, 3)),
    "t (b,) of one clip": ((1,), (1, 4)),
    "t (b, f) of single frames": ((2, 1), (2, 1)),
}
DIFFUSIONS = {  # what is tested -> module, class, number of timesteps
    "a network that predicts eps": ("diffusion", "Diffusion", 1000),
    "a network that predicts v": ("tiny", "VPrediction", 1000),
    "a schedule of 20 steps": ("diffusion", "Diffusion", 20),
    "a schedule that ends without signal": ("tiny", "VDiffusion", 1000),
}
in_all_ways = pytest.mark.parametrize("name, form", [*itertools.product(DIFFUSIONS, FORMS)])


def step(name: str, form: str, ends: bool, *latents: str) -> tuple:
    """Make a Diffusion, t and t_prev (if it ends the last is -1), and latents (b, f, 2, 1, 3)."""
    module, kind, total = DIFFUSIONS[name]
    diffusion = get(module, kind)(get("diffusion", "DiffusionConfig")(num_steps=total))
    generator = torch.Generator().manual_seed(1000 * SEED + 7)
    t = torch.randint(total // 2, total - 1, FORMS[form][0], generator=generator)
    t_prev = torch.randint(1, total // 2, FORMS[form][0], generator=generator)
    if ends:
        t.view(-1)[-1] = 1
        t_prev.view(-1)[-1] = -1
    tensors = {x: randn(*FORMS[form][1], 2, 1, 3, seed=i) for i, x in enumerate(latents)}
    return diffusion, {"t": t, "t_prev": t_prev}, tensors


@in_all_ways
def test_exercise_03_noise_is_that_of_its_step(name, form):
    diffusion, steps, latents = step(name, form, False, "z0", "eps")
    last = torch.full_like(steps["t"], diffusion.num_steps - 1)
    for t in (*steps.values(), last, 0 * last):
        check(f"z_t, {name}, {form} = {t.tolist()}", diffusion.add_noise, **latents, t=t)


@in_all_ways
def test_exercise_08_ddim_takes_every_frame_from_its_step_to_its_own(name, form):
    for ends, eta in ((False, 0.0), (True, 0.7)):
        diffusion, steps, latents = step(name, form, ends, "z", "output", "noise")
        check(f"DDIM, {name}, {form}, eta {eta}, {[x.tolist() for x in steps.values()]}",
              lambda z, output, noise, t, t_prev: diffusion.ddim_step(
                  z, output, t, t_prev, eta, noise), **latents, **steps)


@in_all_ways
def test_exercise_09_ddpm_draws_from_the_posterior_of_every_frame(name, form):
    for ends in (False, True):
        diffusion, steps, latents = step(name, form, ends, "z", "output", "noise")
        check(f"DDPM, {name}, {form}, {[x.tolist() for x in steps.values()]}",
              lambda z, output, noise, t, t_prev: diffusion.ddpm_step(
                  z, output, t, t_prev, noise), **latents, **steps)


@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 5), (3, 3, 3, 3, 3), (2, 3, 6, 4), (3, 3, 3, 3)])
def test_exercise_04_every_frame_has_its_own_scale_and_shift_for_each_channel(shape):
    adaptor = get("unet3d", "FrameAdaptor")(3, shape[2 if len(shape) == 5 else 3])
    axes = "(b, f, c, h, w)" if len(shape) == 5 else "tokens (b, f, n, c)"
    check(f"each frame's own S and B for each channel, z {axes} = {shape}",
          adaptor, z=randn(*shape))
    found = call("z in bfloat16", adaptor, randn(*shape).bfloat16()).dtype
    if found != torch.bfloat16:
        fail(f"the result has z's type, bfloat16 under autocast, not {found}")


@pytest.mark.parametrize("shape", [(1, 1, 4, 4, 4), (2, 1, 4, 4), (2, 2, 4, 4, 4), (1, 2, 4, 4),
                                   (2, 4, 4, 4, 4), (1, 4, 4, 4), (1, 6, 4, 4, 4), (2, 6, 4, 4)])
def test_exercise_04_refuses_another_number_of_frames(shape):
    adaptor = get("unet3d", "FrameAdaptor")(3, 4)
    call(f"S and B are those of 3 frames, z {shape}: raise ValueError", adaptor,
         torch.zeros(shape), refused_by=ValueError)


MASKS = {"strict": "masked before the softmax, the rows sum to one",
         "literal": "masked after the softmax, later keys stay in the denominator",
         "bidirectional": "no mask, all frames are read"}


@pytest.mark.parametrize("shape", [(3, 2, 5, 4), (1, 1, 1, 4), (4, 4, 4, 4), (2, 1, 7, 2)])
@pytest.mark.parametrize("mask", MASKS)
def test_exercise_05_each_mask_weighs_as_it_should(mask, shape):
    attention = get("unet3d", "directed_attention")
    q, k, v = (randn(*shape, seed=seed) for seed in range(3))
    for factor, size, within in ((1, "", 1e-6), (300, "large ", 1e-3)):
        check(f'"{mask}": {MASKS[mask]}; {size}q {shape}',
              lambda q, k, v: attention(q, k, v, mask), within, q=q * factor, k=k, v=v)


def mix(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
    """Stand in for exercise 5: no attention, but it depends on all that it is given."""
    frames = v * torch.linspace(1, 2, v.shape[2]).to(v)[:, None]
    return (1 + [*MASKS].index(mask)) * frames.flip(2) + q * k.cumsum(-1)


@pytest.mark.parametrize("shape, heads, mask", [
    ((2, 3, 4, 2, 5), 2, "strict"), ((1, 3, 6, 4, 1), 3, "literal"), ((3, 1, 4, 1, 2), 1, "strict"),
    ((4, 4, 4, 4, 4), 2, "bidirectional"), ((2, 5, 4, 3, 2), 4, "literal")])
def test_exercise_06_every_pixel_is_a_sequence_of_its_frames(monkeypatch, shape, heads, mask):
    monkeypatch.setattr("unet3d.directed_attention", mix)
    module = get("unet3d", "DirectedTemporalAttention")(shape[2], heads, mask)
    check(f'T-Attn(LN(z)), z (b, f, c, h, w) = {shape}, {heads} heads, directed_attention with '
          f'mask "{mask}"', module, z=randn(*shape))


@pytest.mark.parametrize("width", [8, 2, 96])
@pytest.mark.parametrize("x", [[0, 1, 3 + SEED, 30], [250, 996], [7.5 + SEED]], ids=range(3))
def test_exercise_07_is_cosines_then_sines_of_falling_frequencies(x, width):
    says = f"cosines, then sines, of {x}, width {width}"
    check(says, lambda x: get("unet3d", "sinusoid")(x, width), 2e-4, torch.float32,
          x=torch.tensor(x).double())
    for dtype in (torch.bfloat16, torch.int64, torch.int32)[: 1 if 7.5 + SEED in x else 3]:
        suffix = f", x in {dtype}"
        found = call(says + suffix, get("unet3d", "sinusoid"), torch.tensor(x).to(dtype), width)
        same(says, found, 2e-4, suffix)
        if found.dtype != torch.float32:
            fail(f"{says}{suffix}: the result is {found.dtype}, not torch.float32")


def network(z, t, context, fps=None) -> Tensor:
    """Stand in for the U-Net: depend on all that is given, and note the size of the batch."""
    network.batches.append(len(z))
    if t.device != z.device:
        raise ValueError(f"t is on {t.device} and z on {z.device}")
    context = (context.square().mean(2) * torch.arange(context.shape[1]).to(z)).sum(1)
    fps = z.new_full((len(z),), -1) if fps is None else fps
    context, fps, t = (x.to(z).view(*x.shape, *[1] * (5 - x.ndim)) for x in (context, fps, t))
    return z * (1 + context + t / 1000) + fps * t


@pytest.mark.parametrize("scale", [7.5, 1, 1.0, 0.0, -0.5])
@pytest.mark.parametrize("fps", [None, torch.tensor([4.0, 8.0, 12.0])], ids=["no fps", "fps"])
@pytest.mark.parametrize("form", FORMS)
def test_exercise_10_goes_beyond_the_text_away_from_no_text(form, fps, scale):
    diffusion, steps, latents = step("a network that predicts eps", form, False, "z")
    b = len(steps["t"])
    fps = None if fps is None else fps[:b]
    says = f"guidance {scale}, {form}, {'no fps' if fps is None else 'with fps'}"

    def guide(*inputs):
        network.batches = []
        found = diffusion.guided_output(network, *inputs, scale)
        if network.batches != [b if scale == 1 else 2 * b]:
            fail(f"{says}: the network gets batches of {network.batches}, for {b} clips")
        return found
    check(says, guide, **latents, t=steps["t"], context=randn(b, 5, 3, seed=3),
          uncond=randn(b, 5, 3, seed=4), fps=fps)


@pytest.mark.parametrize("factor", [0.5, 0.18215])
@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 5), (1, 1, 4, 3, 3)])
def test_exercise_11_moves_noise_by_the_posterior_and_scales_both(shape, factor):
    config = get("vae", "VAEConfig")(channels=(8, 8), groups=2, scaling_factor=factor)
    with torch.device("meta"):
        vae = get("vae", "VideoVAE")(config)
    check(f"a sample of the posterior in the latents' scale {factor}, shape {shape}",
          vae.sample_latents, mean=randn(*shape), logvar=3 * randn(*shape, seed=1),
          eps=randn(*shape, seed=2))


@pytest.mark.parametrize("total, rate, frames, fps", [
    (60, 24.0, 8, None), (44, 24.0, 8, None), (15, 24.0, 8, None), (8, 24.0, 8, None),
    (1, 8.0, 1, None), (9, 8.0, 1, None), (300, 29.97, 16, None), (40, 12.0, 5, None),
    (60, 24.0, 8, 24.0), (60, 24.0, 8, 8), (60, 24.0, 8, 9.0), (60, 24.0, 8, 7.0),
    (60, 24.0, 8, 100.0), (20, 24.0, 8, 2.0), (300, 24.0, 8, 2.5), (50, 10.0, 1, 5.0)])
def test_exercise_12_frames_are_uniform_and_v_is_their_rate(total, rate, frames, fps):
    rng = np.random.default_rng(SEED)
    for n in range(12):
        says = f"cut {n}, {frames} of {total} frames at {rate} a second, fps {fps}"
        before = state_of([])
        indices, v = call(says, get("data", "sample_frames"), total, rate, frames, rng, fps)
        if state_of([]) != before:
            fail(f"{says}: draw from rng, and from no other generator")
        if not isinstance(indices, np.ndarray) or indices.dtype.kind != "i":
            fail(f"{says}: the indices are no array of whole numbers")
        stride = int(indices[1] - indices[0]) if frames > 1 else round(rate / v)
        if not isinstance(v, float) or abs(v - rate / stride) > 1e-9:
            fail(f"{says}: v of the frames that were cut is {rate / stride}, not {v!r}")
        same(f"{says}: a stride that fits is drawn, then the start, by rng.integers; frames",
             indices.tolist())


@pytest.mark.parametrize("fps", [None, 8.0])
@pytest.mark.parametrize("total, frames", [(7, 8), (0, 1), (1, 2)])
def test_exercise_12_a_video_too_short_is_refused(total, frames, fps):
    call(f"{frames} frames of a video of {total}, fps {fps}: raise InputError",
         get("data", "sample_frames"), total, 24.0, frames, np.random.default_rng(0), fps,
         refused_by=get("data", "InputError"))


@pytest.mark.parametrize("decay", [0.999, 0.5, 0.15])
def test_exercise_13_every_average_warms_up_to_its_decay(decay):
    weights = [nn.Parameter(randn(*shape, seed=9)) for shape in ((3,), (2, 3), (1,))]
    ema = get("tiny", "EMA")(weights, decay)
    averages = [*ema.shadow]
    for n in range(1, 31):
        for i, p in enumerate(weights):
            p.data += randn(*p.shape, seed=100 * n + i)
        before = state_of(weights)
        call(f"decay {decay}", ema.update)
        if state_of(weights) != before:
            fail(f"decay {decay}: the weights must stay what they are, and nothing is drawn")
        for i, average in enumerate(averages):
            if ema.shadow[i] is not average:
                fail(f"average {i}: move it in place, it is another tensor after step {n}")
            if average.requires_grad:
                fail(f"average {i} keeps the graph of the step")
            same(f"decay {decay}, average {i} of 3 after step {n}", average)
        if ema.count != n:
            fail(f"self.count is {ema.count} after {n} steps: it counts them")


class Stub(nn.Module):
    """Stand in for a layer: multiply z by a number that depends on all else that is given."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, z, *given):
        tensors = [[x] if isinstance(x, Tensor) else x.parameters() if x else [] for x in given]
        return z * (self.factor + 0.1 * sum(n * x.to(z).sum() for n, group in enumerate(tensors, 1)
                                            for x in group))


@pytest.mark.parametrize("frames, video", [(3, True), (3, False), (0, False)])
@pytest.mark.parametrize("i", [0, 1, 2])
def test_exercise_14_space_and_time_read_the_same_tensor_and_are_added(i, frames, video):
    config = get("unet3d", "UNetConfig")(channels=(4,), heads=2, groups=2, frames=frames)
    level = get("unet3d", "Level")([4, 4, 4], 4, 2, config)
    for n, p in enumerate(level.parameters()):
        p.data = randn(*p.shape, seed=50 + n)
    for name, first in (("resnets", 2), ("attentions", 5), ("temporal_attentions", 0.3)):
        layers = getattr(level, name, [])
        for n in range(len(layers)):
            layers[n] = Stub(first + n)
    check(f"layer {i} of 3, two with an ST block, {'with' if video else 'without'} video, the "
          f"adaptors hold {frames} frames",
          lambda z, emb, context: level.layer(i, z, emb, context, video),
          z=randn(2, 3, 4, 2, 5), emb=randn(2, 1, 16, seed=1), context=randn(2, 5, 6, seed=2))


@torch.no_grad()
def test_exercise_15_all_together():
    model = get("magicvideo", "MagicVideo").load(CHECKPOINT)
    prompts = [["a red circle moving left"], ["a white square growing"]][SEED % 2]
    context = model.encode_text(prompts)
    uncond = model.encode_text([""])
    shape = (1, model.config.unet.frames, 4, 8, 8)
    for sampler, eta, guidance in (("ddim", 0.0, 2.0), ("ddim", 0.7, 2.0), ("ddpm", 0.0, 2.0),
                                   ("ddim", 0.0, 1.0)):
        z = model.diffusion.sample(model.unet, shape, context, uncond, torch.tensor([8.0]), sampler,
                                   3, guidance, eta, torch.Generator().manual_seed(SEED))
        same(f"three steps of {sampler}, eta {eta}, guidance {guidance}: every other latent",
             z[..., ::2, ::2], 1e-3)
    z = model.sample(prompts, fps=None, steps=3, seed=SEED, decode=False)
    same("three steps of the image model", z, 1e-3)

    clip = get("data", "ShapesDataset")()[SEED]
    mean, logvar = model.vae.encode(clip["video"][None])
    z0 = model.vae.sample_latents(mean, logvar, randn(*mean.shape).float())
    loss = model.diffusion.loss(model.unet, z0, context, torch.tensor([clip["fps"]]),
                                torch.tensor([500]), randn(*z0.shape, seed=1).float())
    same("the loss of a clip that was cut and encoded", loss, 1e-3)
    ema = get("tiny", "EMA")([*model.unet.parameters()], 0.9)
    for p in ema.parameters:
        p.mul_(1.1)
    ema.update()
    same("the averages after a step", sum(x.double().abs().sum() for x in ema.shadow), 1e-4)
