"""Typical wrong solutions of the exercises: each must be caught by its exercise's graders (ours).

`python -m course.mistakes [NUMBER ...]` grades them one after the other and prints what was said. A
mistake is the right function with some text replaced; ANOTHER_WAY has changes that stay right, and
must not be caught.
"""

import sys
from pathlib import Path

from course.assignment import EXERCISES, build_copy, exercise_numbers, split
from course.grade import run_graders
from runs import run_command

JOIN = "join_pair(symbols, min(pairs, key=self._rank.get))"
FULL = "tokens = torch.full((len(texts), self.context_length), self.end)"
SIGNAL = "cast(alpha_bar.sqrt(), z0)"
NOISE = "cast((1 - alpha_bar).sqrt(), z0)"
TOKENS = "self.norm(z.permute(0, 3, 4, 1, 2)).reshape(b * h * w, f, c)"
FUSED = "return F.scaled_dot_product_attention(q, k, v"
DRAW = "int(rng.integers(min(longest, 6))) + 1"
SUM = "s_attn + self.temporal_attentions[i](z)"

# exercise, name, then what is replaced, by what, and so on
MISTAKES = [
    (1, "joined across symbol borders", f"symbols = {JOIN}", "p = min(pairs, key=self._rank.get); "
     "symbols = ' '.join(symbols).replace(' '.join(p), ''.join(p)).split()"),
    (1, "the start token split into letters", "(START, END)", "(END,)"),
    (1, "no </w> at the end of a word", 'word[-1] + "</w>"', "word[-1]"),
    (1, "left to right instead of by rank", "min(pairs, key=self._rank.get)", "pairs[0]"),
    (1, "the most frequent pair", "min(pairs, key=self._rank.get)", "max(pairs, key=pairs.count)"),
    (1, "two symbols are left", "if not pairs", "if not pairs or len(symbols) == 2"),
    (2, "captions of length - 2 lose a token", "_length - 2", "_length - 3"),
    (2, "padding with 0", FULL, "tokens = torch.zeros(len(texts), self.context_length).long()",
     "*self.encode(text)[: self.context_length - 2]", "*self.encode(text)[: self.context_length "
     "- 2], self.end"),
    (2, "a string is a list of letters", "[texts] if isinstance(texts, str) else texts", "texts"),
    (2, "ids are int32", "return tokens", "return tokens.int()"),
    (2, "the last tokens are kept", "[: self.context_length - 2]", "[2 - self.context_length :]"),
    (2, "captions of length - 1 lose end", "_length - 2]", "_length - 1]"),
    (3, "float64 from float32", SIGNAL, "alpha_bar.sqrt()", NOISE, "(1 - alpha_bar).sqrt()"),
    (3, "the first frame's step", "bar(t)", "bar(t.view(len(t), -1)[:, 0])"),
    (3, "t of one axis alone", "bar(t)", "bar(t).view(-1, 1, 1, 1, 1)"),
    (3, "fresh noise", "* eps", "* torch.randn_like(eps)"),
    (3, "the gradient is cut", "* z0 +", "* z0.detach() +"),
    (3, "a schedule of 1000 steps", "self.alpha_bar(t)", "Diffusion().alpha_bar(t)"),
    (4, "the gradient is cut", "self.scale.view", "self.scale.data.view"),
    (4, "a single frame broadcasts", "z.shape[1] != frames", "z.shape[1] not in (1, frames)"),
    (4, "tokens are not checked", "z.shape[1] != frames", "z.ndim == 5 and z.shape[1] != frames"),
    (4, "tokens as if they were pictures", "(frames, 1, -1)", "(frames, -1, 1)"),
    (4, "the weights' type", ".to(z.dtype)", ""),
    (4, "no shift for tokens", "+ shift", "+ shift * (z.ndim == 5)"),
    (5, "mask after the softmax", 'if mask == "strict"', 'if mask == "none"',
     'if mask == "literal"', 'if mask != "bidirectional"'),
    (5, "the softmax overflows", "scores.softmax(-1)",
     "scores.exp() / scores.exp().sum(-1, keepdim=True)"),
    (5, "softmax over the queries", "scores.softmax(-1)", "scores.softmax(-2)"),
    (5, "the diagonal is masked", ".tril()", ".tril(-1)"),
    (5, "the weights have no gradient", "(scores.softmax(-1)", "(scores.softmax(-1).detach()"),
    (5, "the mask made on the wrong device", "ones_like(scores)", "ones(scores.shape)"),
    (6, "self.mask ignored", "self.mask", '"strict"'),
    (6, "h and w swapped", "b, h, w, f, c", "b, w, h, f, c"),
    (6, "frames and pixels mixed", TOKENS, "self.norm(z.reshape(b * h * w, f, c))"),
    (6, "keys for values", "self.to_v(tokens)", "self.to_k(tokens)"),
    (6, "no norm", "self.norm(z.permute(0, 3, 4, 1, 2))", "z.permute(0, 3, 4, 1, 2)"),
    (6, "h and w swapped twice", "0, 3, 4, 1, 2))", "0, 4, 3, 1, 2))", "0, 3, 4, 1, 2)\n",
     "0, 3, 4, 2, 1)\n"),
    (7, "the result has the type of x", "dim=-1)", "dim=-1).to(x.dtype)"),
    (7, "frequencies on the CPU", ", device=x.device", ""),
    (7, "sines first", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
    (7, "the gradient is cut", "x.float()", "x.detach().float()"),
    (7, "in t's integer type", "angles = x.float()[:, None] * frequencies",
     "angles = (x[:, None] * frequencies).to(x.dtype)"),
    (7, "x rounded", "x.float()", "x.long().float()"),
    (8, "t (b,) alone", "self.alpha_bar(t)", "self.alpha_bar(t).view(len(z), 1, 1, 1, 1)"),
    (8, "eps = output", "* eps_hat", "* output"),
    (8, "eta ignored", "eta**2", "0"),
    (8, "eta not squared", "eta**2", "eta"),
    (8, "alpha_bar 1 at the end", "self.alpha_bar(t_prev)", "self.alpha_bar(t_prev, 1.0)"),
    (8, "sigma not taken off", " - variance).sqrt()", ").sqrt()"),
    (8, "last noise left out", "* noise", "* noise * cast((t_prev >= 0).view_as(alpha_bar), z)"),
    (9, "never clean at the end", ", after_last=1.0", ""),
    (9, "the variance of the forward step", "(ratio * beta).sqrt()", "beta.sqrt()"),
    (9, "beta of one step", "alpha_bar / alpha_bar_prev", "alpha_bar / self.alpha_bar(t - 1)"),
    (9, "z_0 instead of z_t", "cast(coef_zt, z) * z +", "cast(coef_zt, z) * z0_hat +"),
    (9, "float64", "cast(sigma, z) * noise", "sigma * noise"),
    (9, "eps = output", "self.predict_z0_eps(", "Diffusion.predict_z0_eps(self, "),
    (10, "t is not moved", "t = t.to(z.device)", ""),
    (10, "fps None becomes ones", "None if fps is None", "torch.ones(2 * len(z)) if fps is None"),
    (10, "fps forgotten", "context]), fps)", "context]), None)"),
    (10, "the text half first", "torch.cat([uncond, context])", "torch.cat([context, uncond])"),
    (10, "no guidance means one half", "guidance == 1", "guidance <= 1"),
    (10, "fps forgotten at guidance 1", "model(z, t, context, fps)", "model(z, t, context)"),
    (11, "the variance for its root", "0.5 * logvar", "logvar"),
    (11, "SD's factor for every model", "self.config.scaling_factor", "0.18215"),
    (11, "noise drawn inside", "* eps", "* eps.new_empty(eps.shape).normal_()"),
    (11, "no gradient to logvar", "logvar).exp()", "logvar.detach()).exp()"),
    (11, "the spread per channel", "logvar).exp()", "logvar).exp().mean((-1, -2), keepdim=True)"),
    (11, "the spread is uncentred", "* eps", "* eps - (0.5 * logvar).exp()"),
    (12, "v is the rate that was asked for", "float(rate / stride)", "float(fps or rate / stride)"),
    (12, "a start that is always 0", "start + stride", "stride"),
    (12, "np.random for rng", "rng.integers(total", "np.random.randint(total"),
    (12, "fps rounded down", "round(rate / fps)", "int(rate / fps)"),
    (12, "one stride too few", "min(longest, 6)", "max(min(longest, 6) - 1, 1)"),
    (12, "short videos repeat frames", "if total < frames", "if total < 1"),
    (13, "the first parameter alone averaged", "self.parameters):", "self.parameters[:1]):"),
    (13, "no warm-up", "min(self.decay, (1 + self.count) / (10 + self.count))", "self.decay"),
    (13, "never its decay", "min(self.decay, ", "max(0, "),
    (13, "counted for every parameter", "average.lerp_", "self.count += 1; average.lerp_"),
    (13, "decay for 1 - decay", "1 - decay)", "decay)"),
    (13, "weights moved to averages", "average.lerp_(p, 1 - decay)", "p.lerp_(average, 1 - decay)"),
    (14, "T-Attn reads what S-Attn wrote", SUM, "s_attn + self.temporal_attentions[i](s_attn)"),
    (14, "residual added again", SUM, f"{SUM} + z"),
    (14, "the first layer's T-Attn", "self.temporal_attentions[i]", "self.temporal_attentions[0]"),
    (14, "no adaptor after attention", "self.attention_adaptors[i])", "None)"),
    (14, "one layer too few has a block", "len(self.attentions)", "len(self.attentions) - 1"),
    (14, "an image model has no adaptors", "self.resnet_adaptors[i] if video else None",
     "self.resnet_adaptors[i] if video else self.resnet_adaptors and None"),
]
ANOTHER_WAY = [
    (1, "all merges in the order learned", "pairs = [pair for pair in zip(symbols, symbols[1:]) if "
     "pair in self._rank]", "pairs = []", "return symbols", "for pair in self.merges: symbols = "
     "join_pair(symbols, pair)\n                return symbols"),
    (5, "by hand", f"{FUSED}, is_causal=True)", "s = (q @ k.mT) * q.shape[-1] ** -0.5\n        "
     "return (s + torch.full_like(s, -torch.inf).triu(1)).softmax(-1) @ v", f"{FUSED})",
     "return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v"),
    (7, "by powers", "torch.exp(-math.log(10000) * exponents)", "10000.0 ** -exponents"),
    (10, "the sum weighted", "uncond_output + guidance * (cond_output - uncond_output)",
     "(1 - guidance) * uncond_output + guidance * cond_output"),
    (12, "draws from 1", DRAW, "int(rng.integers(1, min(longest, 6) + 1))"),
]


def change(number: int, *texts: str) -> dict[Path, bytes]:
    """Return a copy where texts of an exercise's function are replaced."""
    exercise = EXERCISES[number - 1]
    files = build_copy([])
    before, body, after = split(files[Path(exercise.file)].decode(), exercise)
    for old, new in zip(texts[::2], texts[1::2]):
        if old not in body:
            raise ValueError(f"exercise {number}: {old!r} is not in the function; correct it")
        body = body.replace(old, new)
    return {**files, Path(exercise.file): f"{before}{body}{after}".encode()}


def first_words(number: int, *texts: str) -> str:
    """Return what the first grader that failed said of a changed function, "" if none did."""
    said, _ = run_graders(change(number, *texts), EXERCISES[number - 1], first_only=True)
    return next((words for words in said.values() if words), "")


def main() -> None:
    """Grade the mistakes of the exercises named on the command line, or all; status 1 if missed."""
    every = ",".join(str(exercise.number) for exercise in EXERCISES)
    numbers = exercise_numbers(",".join(sys.argv[1:]) or every)
    caught = []
    for number, name, *texts in MISTAKES:
        if number in numbers:
            words = first_words(number, *texts)
            caught.append(bool(words))
            print(f"{number:2} {name}: {words or 'NOT CAUGHT'}")
    print(f"{sum(caught)} of {len(caught)} mistakes caught")
    sys.exit(not all(caught))


if __name__ == "__main__":
    run_command("course.mistakes", main)
