"""Typical wrong solutions of the exercises: each must be caught by its exercise's graders (ours).

`python -m course.mistakes [NUMBER ...]` plants them one after the other and prints what the graders
said. A mistake is a wrong function put in the place of the right one: a formula with one term
wrong, or the right function with one thing changed in what goes in or comes out.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from clip_text import END, START, join_pair
from course.assignment import EXERCISES, ROOT

NUMBERS = range(1, len(EXERCISES) + 1)


def place_of(number: int) -> tuple[object, str]:
    """Return the module or class that holds an exercise's function, and the function's name."""
    exercise = EXERCISES[number - 1]
    module = importlib.import_module(exercise.file.removesuffix(".py"))
    *classes, name = exercise.name.split(".")
    return reduce(getattr, classes, module), name


RIGHT = {number: getattr(*place_of(number)) for number in NUMBERS}


# --------------------------------------------------------------------------------------------------
# Formulas: right as they stand, wrong with an argument


def merge(symbols=lambda word: [*word[:-1], word[-1] + "</w>"], special=(START, END), rounds=99,
          choose=min, join=join_pair, may_join=lambda pair: True) -> Callable:
    """Make Tokenizer._merge."""
    def function(self, word):
        if word in special:
            return [word]
        parts = symbols(word)
        for _ in range(rounds):
            pairs = [p for p in zip(parts, parts[1:]) if p in self.merges and may_join(p)]
            if pairs:
                parts = join(parts, choose(pairs, key=self.merges.index))
        return parts
    return function


def join_last(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join the last occurrence of a pair alone."""
    i = max(i for i in range(len(symbols)) if tuple(symbols[i : i + 2]) == pair)
    return [*symbols[:i], "".join(pair), *symbols[i + 2 :]]


def tokenize(row=lambda tok, ids, n: [tok.start, *ids[: n - 2]],
             padding=lambda tok: tok.end) -> Callable:
    """Make Tokenizer.__call__; n is the context length."""
    def function(self, texts):
        n = self.context_length
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = row(self, self.encode(text), n)
            rows.append([*ids, *[padding(self)] * (n - len(ids))])
        return torch.tensor(rows)
    return function


def noisy(mix=lambda z0, eps, signal, noise: signal * z0 + noise * eps) -> Callable:
    """Make Diffusion.add_noise."""
    def function(self, z0, eps, t):
        alpha_bar = self.alpha_bar(t)
        return mix(z0, eps, alpha_bar.sqrt().to(z0), (1 - alpha_bar).sqrt().to(z0))
    return function


WEIGHTS = {  # of exercise 5, from scores s and the lower triangular m
    "strict": lambda s, m: s.masked_fill(m == 0, -torch.inf).softmax(-1),
    "literal": lambda s, m: s.softmax(-1) * m,
    "bidirectional": lambda s, m: s.softmax(-1),
}


def attention(**changed: Callable) -> Callable:
    """Make directed_attention."""
    weights = {**WEIGHTS, **changed}

    def function(q, k, v, mask):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return weights[mask](scores, torch.ones_like(scores).tril()) @ v
    return function


def waves(exponent=lambda k, half: -k / half, base=10000) -> Callable:
    """Make sinusoid."""
    def function(x, width):
        half = width // 2
        angles = x.float()[:, None] * base ** exponent(torch.arange(half), half)
        return torch.cat([angles.cos(), angles.sin()], -1)
    return function


def ddim(direction=lambda a, variance: 1 - a - variance, sigma=torch.sqrt) -> Callable:
    """Make Diffusion.ddim_step; a is alpha_bar of t_prev."""
    def function(self, z, output, t, t_prev, eta, noise):
        a = self.alpha_bar(t_prev)
        a_t = self.alpha_bar(t)
        z0_hat, eps_hat = self.predict_z0_eps(z, output, t)
        variance = eta**2 * (1 - a) / (1 - a_t) * (1 - a_t / a)
        z = a.sqrt() * z0_hat + direction(a, variance).sqrt() * eps_hat + sigma(variance) * noise
        return z.to(output)
    return function


def ddpm(sigma=lambda beta, ratio: (ratio * beta).sqrt(), stride_to=lambda t, t_prev: t_prev,
         order=1) -> Callable:
    """Make Diffusion.ddpm_step; beta is of the stride to `stride_to`, order -1 swaps factors."""
    def function(self, z, output, t, t_prev, noise):
        a = self.alpha_bar(t_prev, 1.0)
        a_t = self.alpha_bar(t)
        z0_hat, _ = self.predict_z0_eps(z, output, t)
        beta = 1 - a_t / self.alpha_bar(stride_to(t, t_prev), 1.0)
        ratio = (1 - a) / (1 - a_t)
        factors = [a.sqrt() * beta / (1 - a_t), (1 - beta).sqrt() * ratio][::order]
        z = factors[0] * z0_hat + factors[1] * z + sigma(beta, ratio) * noise
        return z.to(output)
    return function


def moving_average(decay=lambda ema, warm: min(ema.decay, warm),
                   move=lambda average, p, decay: average.lerp_(p, 1 - decay)) -> Callable:
    """Make EMA.update."""
    @torch.no_grad()
    def function(self):
        self.count += 1
        for average, p in zip(self.shadow, self.parameters):
            move(average, p, decay(self, (1 + self.count) / (10 + self.count)))
    return function


def st_block(z_out=lambda s_attn, t_attn, z, z_in: s_attn(z) + t_attn(z)) -> Callable:
    """Make Level.layer; z_in is the resnet's input, z its output."""
    def function(self, i, z_in, emb, context, video):
        if not video or i >= len(self.attentions):
            return RIGHT[14](self, i, z_in, emb, context, video)
        z = self.resnets[i](z_in, emb, self.resnet_adaptors[i])
        adaptor = self.attention_adaptors[i]
        return z_out(lambda x: self.attentions[i](x, context, adaptor),
                     self.temporal_attentions[i], z, z_in)
    return function


FORMULAS = {1: merge(), 2: tokenize(), 3: noisy(), 5: attention(), 7: waves(), 8: ddim(),
            9: ddpm(), 13: moving_average(), 14: st_block()}


# --------------------------------------------------------------------------------------------------
# The right function with one thing changed


class But:
    """An object with other attributes: `But(adaptor, scale=s)` is the adaptor with scale s."""

    def __init__(self, original: object, **changed):
        self.__dict__.update(changed, original=original)

    def __getattr__(self, name: str):
        return getattr(self.original, name)


def changed(number: int, out=lambda out, a: out, /, **inputs: Callable) -> Callable:
    """Change arguments of a right function, or its output: all by functions of the arguments."""
    signature = inspect.signature(RIGHT[number])

    def function(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        a = SimpleNamespace(**call.arguments)
        given = {**call.arguments, **{name: f(a) for name, f in inputs.items()}}
        return out(RIGHT[number](**given), a)
    return function


def but(number: int, **attributes: Callable) -> Callable:
    """Change attributes of `self`: each is a function of self."""
    changes = attributes.items()
    return changed(number, self=lambda a: But(a.self, **{name: f(a.self) for name, f in changes}))


# --------------------------------------------------------------------------------------------------
# The mistakes: exercise -> {name: the function in the place of the right one}; of a call `a` holds
# the arguments, and `s` is self

MISTAKES = {
    1: {
        "no </w> at the end of a word": merge(symbols=list),
        "</w> as a separate symbol": merge(symbols=lambda word: [*word, "</w>"]),
        "only one merge": merge(rounds=1),
        "last learned first": merge(choose=max),
        "rightmost first": merge(join=join_last),
        "what was merged is not merged again": merge(
            may_join=lambda pair: len("".join(pair).removesuffix("</w>")) == 2),
        "special tokens taken apart": merge(special=()),
        "left to right instead of by rank": merge(choose=lambda pairs, key: pairs[0]),
    },
    2: {
        "padding with 0": tokenize(padding=lambda tok: 0),
        "end token lost on truncation": tokenize(lambda tok, ids, n: [tok.start, *ids[: n - 1]]),
        "no start token": tokenize(lambda tok, ids, n: ids[: n - 1]),
        "one token too few": tokenize(lambda tok, ids, n: [tok.start, *ids[: n - 3]]),
        "end token first": tokenize(lambda tok, ids, n: [tok.end, *ids[: n - 2]]),
        "the first tokens are lost": tokenize(lambda tok, ids, n: [tok.start, *ids[2 - n :]]),
        "float ids": changed(2, lambda tokens, a: tokens.float()),
        "padding with the start token": tokenize(padding=lambda tok: tok.start),
    },
    3: {
        "beta for alpha": noisy(lambda z0, eps, s, n: n * z0 + s * eps),
        "without the root": noisy(lambda z0, eps, s, n: s**2 * z0 + n**2 * eps),
        "noise alone has its factor": noisy(lambda z0, eps, s, n: z0 + n * eps),
        "noise subtracted": noisy(lambda z0, eps, s, n: s * z0 - n * eps),
        "1 - sqrt(a) for sqrt(1 - a)": noisy(lambda z0, eps, s, n: s * z0 + (1 - s) * eps),
        "one step too far": changed(3, t=lambda a: a.t + 1),
        "the first clip's step for all": changed(3, t=lambda a: a.t[:1].expand_as(a.t)),
        "the first frame's step for all": changed(3, t=lambda a: a.t.view(len(a.t), -1)[:, 0]),
    },
    4: {
        "shared between frames": but(4, scale=lambda s: 0 * s.scale + s.scale.mean(0)),
        "scale of the first frame for all": but(4, scale=lambda s: 0 * s.scale + s.scale[0]),
        "frames and channels swapped": but(4, scale=lambda s: s.scale.T),
        "1 + scale": but(4, scale=lambda s: 1 + s.scale),
        "no shift": but(4, shift=lambda s: 0 * s.shift),
        "shift before scale": but(4, shift=lambda s: s.scale * s.shift),
        "any number of frames": changed(4, self=lambda a: But(
            a.self, scale=a.self.scale[: a.z.shape[1]], shift=a.self.shift[: a.z.shape[1]])),
        "tokens as if they were pictures": lambda self, z: (
            RIGHT[4](self, z) if z.ndim == 5 else RIGHT[4](self, z.mT).mT),
    },
    5: {
        "mask transposed": attention(strict=lambda s, m: WEIGHTS["strict"](s, m.mT)),
        "mask after the softmax": attention(strict=WEIGHTS["literal"]),
        "mask before the softmax in literal": attention(literal=WEIGHTS["strict"]),
        "no mask": attention(strict=WEIGHTS["bidirectional"]),
        "the diagonal masked": attention(literal=lambda s, m: s.softmax(-1) * m.tril(-1)),
        "scores masked by zero": attention(strict=lambda s, m: (s * m).softmax(-1)),
        "literal not divided by the root of d": changed(
            5, q=lambda a: a.q * a.q.shape[-1] ** 0.5 if a.mask == "literal" else a.q),
        "softmax over the queries": attention(literal=lambda s, m: s.softmax(-2) * m),
        "masked in bidirectional too": attention(bidirectional=WEIGHTS["strict"]),
    },
    6: {
        "frame order mixed with batch order": lambda self, z: RIGHT[6](
            self, z.reshape(z.shape[1], z.shape[0], *z.shape[2:])).reshape(z.shape),
        "pixels of a frame attend": changed(
            6, lambda out, a: out.transpose(1, 3), z=lambda a: a.z.transpose(1, 3)),
        "no norm": but(6, norm=lambda s: nn.Identity()),
        "residual added twice": changed(6, lambda out, a: out + a.z),
        "h and w swapped in the output": changed(6, lambda out, a: out.mT),
        "no mask": but(6, mask=lambda s: "bidirectional"),
        "queries and keys swapped": but(6, to_q=lambda s: s.to_k, to_k=lambda s: s.to_q),
        "no output projection": but(6, to_out=lambda s: nn.Identity()),
        "one head": but(6, heads=lambda s: 1),
    },
    7: {
        "sines first": changed(7, lambda out, a: out.roll(a.width // 2, -1)),
        "divided by half - 1": waves(lambda k, half: -k / (half - 1)),
        "frequencies for periods": waves(lambda k, half: k / half),
        "base 1000": waves(base=1000),
        "in degrees": changed(7, x=lambda a: a.x * math.pi / 180),
        "waves interleaved": changed(7, lambda out, a: out.view(-1, 2, a.width // 2).mT.flatten(1)),
        "in the precision of x": changed(7, lambda out, a: out.to(a.x.dtype)),
    },
    8: {
        "off by one in the previous step": changed(8, t_prev=lambda a: a.t_prev + 1),
        "the previous step is t": changed(8, t_prev=lambda a: a.t),
        "alpha_bar 1 at the end": but(8, alpha_bar=lambda s: lambda t: s.alpha_bar(t, 1.0)),
        "sigma not taken off the direction": ddim(lambda a, variance: 1 - a),
        "variance for its root": ddim(sigma=lambda variance: variance),
        "eta not squared": changed(8, eta=lambda a: a.eta**0.5),
        "eps for z_0": but(8, predict_z0_eps=lambda s: lambda *args: s.predict_z0_eps(*args)[::-1]),
        "output taken for eps": but(8, predict_z0_eps=lambda s: lambda z, output, t: (
            s.predict_z0_eps(z, output, t)[0], output)),
    },
    9: {
        "posterior variance for its root": ddpm(lambda beta, ratio: ratio * beta),
        "beta of one step for the stride": ddpm(stride_to=lambda t, t_prev: t - 1),
        "off by one in the previous step": changed(9, t_prev=lambda a: a.t_prev + 1),
        "never clean at the end": but(9, alpha_bar=lambda s: lambda t, **_: s.alpha_bar(t)),
        "variance of the forward step": ddpm(lambda beta, ratio: beta.sqrt()),
        "output taken for z_0": but(9, predict_z0_eps=lambda s: lambda z, out, t: (out, out)),
        "no noise": changed(9, noise=lambda a: 0 * a.noise),
        "factors of z_0 and z_t swapped": ddpm(order=-1),
    },
    10: {
        "guidance sign": changed(10, guidance=lambda a: -a.guidance),
        "from the output with text": changed(10, guidance=lambda a: a.guidance + 1),
        "halves swapped": changed(10, model=lambda a: lambda *x: a.model(*x).roll(len(a.z), 0)),
        "text half first": changed(10, context=lambda a: a.uncond, uncond=lambda a: a.context),
        "two calls": lambda self, model, z, t, context, uncond, fps, guidance: (
            (1 - guidance) * model(z, t, uncond, fps) + guidance * model(z, t, context, fps)),
        "guidance 1 works twice": changed(10, guidance=lambda a: a.guidance + 1e-12),
        "fps forgotten": changed(10, fps=lambda a: None),
        "no guidance": changed(10, guidance=lambda a: 1),
    },
    11: {
        "variance for its root": changed(11, logvar=lambda a: 2 * a.logvar),
        "logvar for sigma": changed(11, eps=lambda a: a.eps * a.logvar / (a.logvar / 2).exp()),
        "noise not scaled": changed(11, eps=lambda a: a.eps / a.self.config.scaling_factor),
        "divided by the factor": changed(11, lambda z, a: z / a.self.config.scaling_factor**2),
        "no factor": changed(11, lambda z, a: z / a.self.config.scaling_factor),
        "own noise": changed(11, eps=lambda a: torch.randn_like(a.eps)),
        "no gradient": changed(11, lambda z, a: z.detach()),
        "exp(2 logvar)": changed(11, logvar=lambda a: 4 * a.logvar),
    },
    12: {
        "v of the video, not of the frames": changed(12, lambda cut, a: (cut[0], a.rate)),
        "v multiplied": changed(12, lambda cut, a: (cut[0], a.rate**2 / cut[1])),
        "always from the first frame": changed(12, lambda cut, a: (cut[0] - cut[0][0], cut[1])),
        "one frame beyond the end": changed(12, total=lambda a: a.total + 1),
        "the last part never": changed(12, total=lambda a: a.total - (a.total > a.frames)),
        "frames too far": changed(12, lambda cut, a: (cut[0] + np.diff(cut[0])[0], cut[1])),
        "frames at random": changed(12, lambda cut, a: (
            np.sort(a.rng.choice(a.total, a.frames, replace=False)), cut[1])),
        "stride one too few": changed(12, fps=lambda a: a.fps or a.rate / a.rng.integers(1, 6)),
        "fps rounded down": changed(12, fps=lambda a: a.fps and a.rate / max(a.rate // a.fps, 1)),
        "short videos taken": changed(12, total=lambda a: max(a.total, a.frames)),
    },
    13: {
        "no warm-up": moving_average(lambda ema, warm: ema.decay),
        "never its decay": moving_average(lambda ema, warm: warm),
        "the larger of both": moving_average(lambda ema, warm: max(ema.decay, warm)),
        "decay for 1 - decay": moving_average(move=lambda mean, p, d: mean.lerp_(p, d)),
        "steps not counted": changed(13, lambda out, a: setattr(a.self, "count", 0)),
        "weights moved to averages": moving_average(move=lambda mean, p, d: p.lerp_(mean, 1 - d)),
        "new tensors each step": changed(
            13, lambda out, a: setattr(a.self, "shadow", [x.clone() for x in a.self.shadow])),
        "averages are the weights": moving_average(move=lambda mean, p, d: mean.copy_(p)),
    },
    14: {
        "T-Attn reads what S-Attn wrote": st_block(lambda s, t, z, z_in: s(z) + t(s(z))),
        "S-Attn reads what T-Attn wrote": st_block(lambda s, t, z, z_in: s(z + t(z))),
        "T-Attn reads the resnet's input": st_block(lambda s, t, z, z_in: s(z) + t(z_in)),
        "residual added again": st_block(lambda s, t, z, z_in: z + s(z) + t(z)),
        "mean for sum": st_block(lambda s, t, z, z_in: (s(z) + t(z)) / 2),
        "no T-Attn": st_block(lambda s, t, z, z_in: s(z)),
        "T-Attn in the image model too": changed(14, video=lambda a: True),
        "no S-Attn in the image model": changed(14, lambda out, a: (
            out if a.video else a.self.resnets[a.i](a.z, a.emb, None))),
        "no adaptors in the resnet": but(14, resnet_adaptors=lambda s: [None] * 9),
        "one adaptor for all": but(14, attention_adaptors=lambda s: [s.attention_adaptors[0]] * 9),
    },
}


# --------------------------------------------------------------------------------------------------
# Planting


class Planter:
    """pytest plugin: run the graders once for each function put in its exercise's place.

    functions: (exercise, name) -> function. `said` has what each grader that failed said. Graders
    of other exercises run too where `all_graders`.
    """

    def __init__(self, functions: dict[tuple[int, str], Callable], all_graders: bool):
        self.functions = functions
        self.all_graders = all_graders
        self.said = {key: {} for key in functions}

    def pytest_generate_tests(self, metafunc):
        grader = metafunc.function.__name__
        keys = [(number, name) for number, name in self.functions
                if self.all_graders or grader.startswith(f"test_exercise_{number:02d}_")]
        metafunc.parametrize("planted", keys, ids=str, indirect=True)

    @pytest.fixture(autouse=True)
    def planted(self, request, monkeypatch):
        """Put the function in place while the grader runs."""
        monkeypatch.setattr(*place_of(request.param[0]), self.functions[request.param])

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        try:
            return (yield)
        except (Exception, pytest.fail.Exception) as error:
            said = self.said[pyfuncitem.callspec.params["planted"]]
            said.setdefault(pyfuncitem.originalname, f"{type(error).__name__}: {error}")
            return True


def grade(functions: dict[tuple[int, str], Callable],
          all_graders: bool = False) -> dict[tuple[int, str], dict[str, str]]:
    """Plant functions one after the other -> what each grader that failed said: none, not caught.

    Raises RuntimeError if the graders cannot be run. Run it in a separate process: it imports them.
    """
    planter = Planter(functions, all_graders)
    flags = ["-p", "no:terminal", "-p", "no:cacheprovider"]
    if pytest.main([*flags, str(ROOT / "tests/test_exercises.py")], plugins=[planter]):
        raise RuntimeError("python -m pytest tests/test_exercises.py says what is wrong with it")
    return planter.said


def main() -> int:
    """Plant the mistakes of the exercises named on the command line, or all; 1 if one is missed."""
    numbers = sys.argv[1:] or [str(number) for number in NUMBERS]
    for number in numbers:
        if number not in map(str, NUMBERS):
            print(f"course.mistakes: {number} is no exercise; give numbers from 1 to "
                  f"{len(EXERCISES)}", file=sys.stderr)
            return 2
    said = grade({(int(number), name): function
                  for number in numbers for name, function in MISTAKES[int(number)].items()})
    for (number, name), messages in said.items():
        message = next(iter(messages.values()), "NOT CAUGHT").split("\n")[0]
        print(f"{number:2} {name}: {message.removeprefix('AssertionError: ')}")
    caught = sum(map(bool, said.values()))
    print(f"{caught} of {len(said)} mistakes caught")
    return int(caught < len(said))


if __name__ == "__main__":
    sys.exit(main())
