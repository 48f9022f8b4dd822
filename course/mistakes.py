"""Typical wrong solutions of the exercises: each must be caught by its exercise's graders (ours).

`python -m course.mistakes [NUMBER ...]` grades them one after the other and prints the first words
of each. A mistake is the right function with some text replaced; ANOTHER_WAY has functions that are
right, written otherwise, and must not be caught.
"""

import sys
from pathlib import Path

from course.assignment import EXERCISES, build_copy, exercise_numbers, split
from course.grade import Worker, expect, judge, load_graders
from runs import run_command

JOIN = "join_pair(symbols, min(pairs, key=self._rank.get))"
FULL = "tokens = torch.full((len(texts), self.context_length), self.end)"
SIGNAL = "cast(alpha_bar.sqrt(), z0)"
NOISE = "cast((1 - alpha_bar).sqrt(), z0)"
TOKENS = "self.norm(z.permute(0, 3, 4, 1, 2)).reshape(b * h * w, f, c)"
DRAW = "int(rng.integers(min(longest, 6))) + 1"
SUM = "s_attn + self.temporal_attentions[i](z)"
CUT = "self.encode(text)[: self.context_length - 2]"
BAR = "alpha_bar = self.alpha_bar(t)"
BAR_PREV = "alpha_bar_prev = self.alpha_bar(t_prev)"
BAR_END = "alpha_bar_prev = self.alpha_bar(t_prev, after_last=1.0)"
LERP = "average.lerp_(p, 1 - decay)"
GUIDED = "uncond_output + guidance * (cond_output - uncond_output)"
ADAPTED = "scale * z + shift"
POSTERIOR = "(mean + (0.5 * logvar).exp() * eps) * self.config.scaling_factor"
CAST_FIRST = ("a half type's alpha_bar", BAR, "alpha_bar = cast(self.alpha_bar(t), z).double()")

ATTEND = """
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = torch.ones_like(scores).tril()
    if mask == "strict":
        scores = scores.masked_fill(seen == 0, -torch.inf)
    weights = scores.softmax(-1)
    if mask == "literal":
        weights = weights * seen
    return weights @ v"""

# exercise, name, then what is replaced, by what, and so on, or the whole body of the function
MISTAKES = [
    (1, "joined across symbol borders", f"symbols = {JOIN}", "p = min(pairs, key=self._rank.get); "
     "symbols = ' '.join(symbols).replace(' '.join(p), ''.join(p)).split()"),
    (1, "the start token split into letters", "(START, END)", "(END,)"),
    (1, "the end token split into letters", "(START, END)", "(START,)"),
    (1, "no </w> at the end of a word", 'word[-1] + "</w>"', "word[-1]"),
    (1, "</w> as a symbol of its own", 'word[-1] + "</w>"]', 'word[-1], "</w>"]'),
    (1, "left to right instead of by rank", "min(pairs, key=self._rank.get)", "pairs[0]"),
    (1, "the rank reversed", "min(pairs, key", "max(pairs, key"),
    (1, "the most frequent pair", "min(pairs, key=self._rank.get)", "max(pairs, key=pairs.count)"),
    (1, "two symbols are left", "if not pairs", "if not pairs or len(symbols) == 2"),
    (1, "one merge alone", JOIN, f"{JOIN}; return symbols"),
    (1, "the first place alone", f"symbols = {JOIN}", "p = min(pairs, key=self._rank.get); "
     "n = [*zip(symbols, symbols[1:])].index(p); symbols[n : n + 2] = [''.join(p)]; "
     "self._rank.pop(p)"),
    (1, "a string", "return symbols", "return ' '.join(symbols)"),
    (2, "captions of length - 2 lose a token", "_length - 2", "_length - 3"),
    (2, "padding with 0", FULL, "tokens = torch.zeros(len(texts), self.context_length).long()",
     f"*{CUT}", f"*{CUT}, self.end"),
    (2, "a string is a list of letters", "[texts] if isinstance(texts, str) else texts", "texts"),
    (2, "ids are int32", "return tokens", "return tokens.int()"),
    (2, "ids are float", "return tokens", "return tokens.float()"),
    (2, "the last tokens are kept", "[: self.context_length - 2]", "[2 - self.context_length :]"),
    (2, "captions of length - 1 lose end", "_length - 2]", "_length - 1]"),
    (2, "no start token", "[self.start, *", "[*"),
    (2, "a row for the first caption alone", "zip(tokens, texts)", "zip(tokens, texts[:1])"),
    (2, "a length of 8", "self.context_length", "8"),
    (2, "the caller's list is emptied", "zip(tokens, texts)",
     "zip(tokens, [texts.pop(0) for _ in range(len(texts))])"),
    (2, "as long as the longest caption", "return tokens",
     "return tokens[:, : max([2 + len(self.encode(x)) for x in texts], default=0)]"),
    (3, "float64 from float32", SIGNAL, "alpha_bar.sqrt()", NOISE, "(1 - alpha_bar).sqrt()"),
    (3, "the first frame's step", "bar(t)", "bar(t.view(len(t), -1)[:, 0])"),
    (3, "t of one axis alone", "bar(t)", "bar(t).view(-1, 1, 1, 1, 1)"),
    (3, "fresh noise", "* eps", "* torch.randn_like(eps)"),
    (3, "the gradient is cut", "* z0 +", "* z0.detach() +"),
    (3, "a schedule of 1000 steps", "self.alpha_bar(t)", "Diffusion().alpha_bar(t)"),
    (3, "no roots", "alpha_bar.sqrt()", "alpha_bar", "(1 - alpha_bar).sqrt()", "(1 - alpha_bar)"),
    (3, "roots subtracted", "(1 - alpha_bar).sqrt()", "(1 - alpha_bar.sqrt())"),
    (3, "factors swapped", SIGNAL, "cast((1 - alpha_bar).sqrt(), z0) ", f"{NOISE} * eps",
     "cast(alpha_bar.sqrt(), z0) * eps"),
    (3, "alpha_bar of the step after", "bar(t)", "bar((t + 1).clamp(max=self.num_steps - 1))"),
    (3, "alpha_bar in the half type", BAR, "alpha_bar = self.alpha_bar(t).to(z0.dtype)"),
    (3, "a half type becomes float32", "return ", "z0, eps = "
     "[x.float() if x.itemsize == 2 else x for x in (z0, eps)]; return "),
    (3, "z_0 written into", f"{SIGNAL} * z0 +", f"z0.data.mul_({SIGNAL}) +"),
    (4, "the gradient is cut", "self.scale.view", "self.scale.data.view"),
    (4, "a single frame broadcasts", "z.shape[1] != frames", "z.shape[1] not in (1, frames)"),
    (4, "tokens are not checked", "z.shape[1] != frames", "z.ndim == 5 and z.shape[1] != frames"),
    (4, "tokens as if they were pictures", "(frames, 1, -1)", "(frames, -1, 1)"),
    (4, "the weights' type", ".to(z.dtype)", ""),
    (4, "no shift for tokens", "+ shift", "+ shift * (z.ndim == 5)"),
    (4, "the first frame's scale", "self.scale.view(shape)",
     "self.scale[:1].expand_as(self.scale).reshape(shape)"),
    (4, "1 + scale", ADAPTED, "(1 + scale) * z + shift"),
    (4, "scale after shift", ADAPTED, "scale * (z + shift)"),
    (4, "z added", ADAPTED, f"z + {ADAPTED}"),
    (4, "half types in float32", ADAPTED, "scale.float() * z.float() + shift.float() "
     f"if z.itemsize == 2 else {ADAPTED}"),
    (4, "a frame more is cut off", "if z.shape[1] != frames", "z = z[:, :frames]\n        if "
     "z.shape[1] != frames"),
    (4, "z written into", ADAPTED, "z.data.mul_(scale.data).add_(shift)"),
    *[(5, name, ATTEND.replace(old, new)) for name, old, new in (
        ("mask after the softmax", """if mask == "strict":
        scores = scores.masked_fill(seen == 0, -torch.inf)""", """if mask == "strict":
        return (scores.softmax(-1) * seen) @ v"""),
        ("no mask", 'if mask == "strict"', 'if mask == ""'),
        ("literal is strict", 'if mask == "strict"', 'if mask != "bidirectional"'),
        ("the softmax overflows", "scores.softmax(-1)",
         "scores.exp() / scores.exp().sum(-1, keepdim=True)"),
        ("softmax over the queries", "softmax(-1)", "softmax(-2)"),
        ("the diagonal is masked", ".tril()", ".tril(-1)"),
        ("earlier frames are masked", ".tril()", ".triu()"),
        ("the weights have no gradient", "softmax(-1)", "softmax(-1).detach()"),
        ("the mask on the wrong device", "torch.ones_like(scores)", "torch.ones(scores.shape, "
         "dtype=scores.dtype)"),
        ("no root of d", "math.sqrt(q.shape[-1])", "q.shape[-1]"),
        ("not divided by sqrt(d)", " / math.sqrt(q.shape[-1])", ""),
        ("divided by the root of f", "q.shape[-1]", "q.shape[-2]"),
        ("literal rows divided by their sums", "weights * seen",
         "weights * seen / (weights * seen).sum(-1, keepdim=True)"),
        ("-1e9 does not fit in float16", "-torch.inf", "-1e9"),
        ("-100 is not small", "-torch.inf", "-100"),
        ("float32 whatever the type", "weights @ v", "weights.float() @ v.float()"),
        ("view of what is not contiguous", "scores = q", "q = q.view(-1, *q.shape[2:])"
         ".view(q.shape)\n    scores = q"),
        ("masked scores are 0", "masked_fill(seen == 0, -torch.inf)", "mul(seen)"),
        ("8 frames at most", ".tril()", ".tril().where(torch.arange(scores.shape[-1], "
         "device=q.device) < 8, 0)"))],
    (6, "self.mask ignored", "self.mask", '"strict"'),
    (6, "h and w swapped", "b, h, w, f, c", "b, w, h, f, c"),
    (6, "frames and pixels mixed", TOKENS, "self.norm(z.reshape(b * h * w, f, c))"),
    (6, "keys for values", "self.to_v(tokens)", "self.to_k(tokens)"),
    (6, "queries for keys", "self.to_k(tokens)", "self.to_q(tokens)"),
    (6, "no norm", "self.norm(z.permute(0, 3, 4, 1, 2))", "z.permute(0, 3, 4, 1, 2)"),
    (6, "h and w swapped twice", "0, 3, 4, 1, 2))", "0, 4, 3, 1, 2))", "0, 3, 4, 1, 2)\n",
     "0, 3, 4, 2, 1)\n"),
    (6, "a residual", "return out", "return z + out"),
    (6, "no output layer", "self.to_out(", "("),
    (6, "frames attend in each picture", "permute(0, 3, 4, 1, 2)).reshape(b * h * w, f, c)",
     "permute(0, 1, 3, 4, 2)).reshape(b * f, h * w, c)", "reshape(b, h, w, f, c).permute(0, 3, 4, "
     "1, 2)", "reshape(b, f, h, w, c).permute(0, 1, 4, 2, 3)"),
    (6, "one head", "self.heads", "1"),
    (6, "the norm over frames too", "self.norm(z.permute(0, 3, 4, 1, 2))", "F.layer_norm(z.permute("
     "0, 3, 4, 1, 2), (f, c), self.norm.weight.expand(f, c), self.norm.bias.expand(f, c), 1e-5)"),
    (6, "half types in float32", "return out", "out = out.float() if z.itemsize == 2 else out\n"
     "        return out"),
    (6, "dropout in training", "return out", "out = F.dropout(out, 0.5, not self.training)\n"
     "        return out"),
    (6, "view of what is not contiguous", TOKENS, "self.norm(z.view(b, f, c, h * w).view(z.shape)"
     ".permute(0, 3, 4, 1, 2)).reshape(b * h * w, f, c)"),
    (7, "the result has the type of x", "dim=-1)", "dim=-1).to(x.dtype)"),
    (7, "frequencies on the CPU", ", device=x.device", ""),
    (7, "sines first", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
    (7, "the gradient is cut", "x.float()", "x.detach().float()"),
    (7, "in t's integer type", "angles = x.float()[:, None] * frequencies",
     "angles = (x[:, None] * frequencies).to(x.dtype)"),
    (7, "x rounded", "x.float()", "x.long().float()"),
    (7, "the last period is reached", "/ (width // 2)", "/ max(width // 2 - 1, 1)"),
    (7, "neighbours are cosine and sine", "torch.cat([angles.cos(), angles.sin()], dim=-1)",
     "torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)"),
    (7, "rising frequencies", "-math.log", "math.log"),
    (7, "periods up to 1000", "10000", "1000"),
    (7, "angles in the half type", "angles = x.float()[:, None] * frequencies", "angles = (x[:, "
     "None] * frequencies.to(x.dtype)).float() if x.is_floating_point() else x[:, None] * "
     "frequencies"),
    (8, "t (b,) alone", "self.alpha_bar(t)", "self.alpha_bar(t).view(len(z), 1, 1, 1, 1)"),
    (8, "eps = output", "* eps_hat", "* output"),
    (8, "eta ignored", "eta**2", "0"),
    (8, "eta not squared", "eta**2", "eta"),
    (8, "alpha_bar 1 at the end", "self.alpha_bar(t_prev)", "self.alpha_bar(t_prev, 1.0)"),
    (8, "sigma not taken off", " - variance).sqrt()", ").sqrt()"),
    (8, "last noise left out", "* noise", "* noise * cast((t_prev >= 0).view_as(alpha_bar), z)"),
    (8, "the variance for its root", "variance.sqrt(), z)", "variance, z)"),
    (8, "a step to t - 1", BAR_PREV, "alpha_bar_prev = self.alpha_bar(t - 1)"),
    (8, "no root of alpha_bar_prev", "alpha_bar_prev.sqrt()", "alpha_bar_prev"),
    (8, "alpha_bar for alpha_bar_prev", "cast(alpha_bar_prev.sqrt(), z) * z0_hat",
     "cast(alpha_bar.sqrt(), z) * z0_hat"),
    (8, "z_0_hat divided by alpha_bar", "z0_hat, eps_hat = self.predict_z0_eps(z, output, t)",
     "eps_hat = self.predict_z0_eps(z, output, t)[1]; z0_hat = (z - cast((1 - alpha_bar).sqrt(), z)"
     " * eps_hat) / cast(alpha_bar.sqrt(), z)"),
    (8, *CAST_FIRST, BAR_PREV, "alpha_bar_prev = cast(self.alpha_bar(t_prev), z).double()"),
    (8, "half types in float32", "return z_prev", "return (z_prev.float() if z.itemsize == 2 else "
     "z_prev)"),
    (8, "noise written into", "cast(variance.sqrt(), z) * noise",
     "noise.data.mul_(cast(variance.sqrt(), z))"),
    (9, "never clean at the end", ", after_last=1.0", ""),
    (9, "the variance of the forward step", "(ratio * beta).sqrt()", "beta.sqrt()"),
    (9, "beta of one step", "alpha_bar / alpha_bar_prev", "alpha_bar / self.alpha_bar(t - 1)"),
    (9, "z_0 instead of z_t", "cast(coef_zt, z) * z +", "cast(coef_zt, z) * z0_hat +"),
    (9, "float64", "cast(sigma, z) * noise", "sigma * noise"),
    (9, "eps = output", "self.predict_z0_eps(", "Diffusion.predict_z0_eps(self, "),
    (9, "no root of 1 - beta", "(1 - beta).sqrt() * ratio", "(1 - beta) * ratio"),
    (9, "the variance for its root", "(ratio * beta).sqrt()", "(ratio * beta)"),
    (9, "alpha_bar for alpha_bar_prev", "alpha_bar_prev.sqrt() * beta", "alpha_bar.sqrt() * beta"),
    (9, "no noise", "+ cast(sigma, z) * noise", "+ 0 * noise"),
    (9, *CAST_FIRST, BAR_END, "alpha_bar_prev = cast(self.alpha_bar(t_prev, 1.0), z).double()"),
    (9, "half types in float32", "return cast(coef_z0, z)", "z = z.float() if z.itemsize == 2 else "
     "z\n        return cast(coef_z0, z)"),
    (9, "divided by alpha_bar", "coef_z0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)",
     "coef_z0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * (alpha_bar / alpha_bar)"),
    (10, "t is not moved", "t = t.to(z.device)", ""),
    (10, "fps None becomes ones", "None if fps is None", "torch.ones(2 * len(z)) if fps is None"),
    (10, "fps forgotten", "context]), fps)", "context]), None)"),
    (10, "the text half first", "torch.cat([uncond, context])", "torch.cat([context, uncond])"),
    (10, "no guidance means one half", "guidance == 1", "guidance <= 1"),
    (10, "fps forgotten at guidance 1", "model(z, t, context, fps)", "model(z, t, context)"),
    (10, "from the text on", GUIDED, "cond_output + guidance * (cond_output - uncond_output)"),
    (10, "the difference reversed", "(cond_output - uncond_output)", "(uncond_output - "
     "cond_output)"),
    (10, "no text at guidance 1", "model(z, t, context, fps)", "model(z, t, uncond, fps)"),
    (10, "two calls at guidance 1", "if guidance == 1:", "if guidance == 1 and "
     "model(z, t, uncond, fps) is None:"),
    (10, "fps not doubled", "torch.cat([fps, fps])", "torch.cat([fps, fps.flip(0)])"),
    (10, "halves interleaved", "output.chunk(2)", "(output[::2], output[1::2])"),
    (10, "half types in float32", f"return {GUIDED}", f"return ({GUIDED}).float() if z.itemsize == "
     f"2 else {GUIDED}"),
    (10, "the gradient is cut", "guidance * (cond_output - uncond_output)", "guidance * "
     "(cond_output - uncond_output).detach()"),
    (11, "the variance for its root", "0.5 * logvar", "logvar"),
    (11, "SD's factor for every model", "self.config.scaling_factor", "0.18215"),
    (11, "noise drawn inside", "* eps", "* eps.new_empty(eps.shape).normal_()"),
    (11, "no gradient to logvar", "logvar).exp()", "logvar.detach()).exp()"),
    (11, "the spread per channel", "logvar).exp()", "logvar).exp().mean((-1, -2), keepdim=True)"),
    (11, "the spread is uncentred", "* eps", "* eps - (0.5 * logvar).exp()"),
    (11, "no scale", " * self.config.scaling_factor", ""),
    (11, "the mean is not scaled", POSTERIOR, "mean + (0.5 * logvar).exp() * eps * "
     "self.config.scaling_factor"),
    (11, "divided by the scale", ") * self.config", ") / self.config"),
    (11, "logvar for sigma", "(0.5 * logvar).exp()", "logvar"),
    (11, "half types in float32", "(0.5 * logvar)", "(0.5 * logvar.float())"),
    (11, "the mean written into", POSTERIOR, "mean.data.add_((0.5 * logvar).exp().data * eps.data) "
     "* self.config.scaling_factor"),
    (12, "v is the rate that was asked for", "float(rate / stride)", "float(fps or rate / stride)"),
    (12, "a start that is always 0", "start + stride", "stride"),
    (12, "np.random for rng", "rng.integers(total", "np.random.randint(total"),
    (12, "fps rounded down", "round(rate / fps)", "int(rate / fps)"),
    (12, "one stride too few", "min(longest, 6)", "max(min(longest, 6) - 1, 1)"),
    (12, "short videos repeat frames", "if total < frames", "if total < 1"),
    (12, "the nearest rate", "max(round(rate / fps), 1)",
     "min(range(1, total + 1), key=lambda s: abs(rate / s - fps))"),
    (12, "fps never beyond 6", "round(rate / fps), 1), longest)", "round(rate / fps), 1), longest, "
     "6)"),
    (12, "strides that do not fit", "min(max(round(rate / fps), 1), longest)", "max(round(rate / "
     "fps), 1)"),
    (12, "v upside down", "rate / stride)", "stride / rate)"),
    (12, "the last start is never drawn", "rng.integers(total - (frames - 1) * stride)",
     "rng.integers(max(total - (frames - 1) * stride - 1, 1))"),
    (12, "a list", "start + stride * np.arange(frames)", "[*(start + stride * np.arange(frames))]"),
    (12, "a rate that is numpy's", "float(rate / stride)", "np.float32(rate / stride)"),
    (12, "a start before the stride", f"        stride = {DRAW}", "        rng.integers(9)\n"
     f"        stride = {DRAW}"),
    (13, "the first parameter alone averaged", "self.parameters):", "self.parameters[:1]):"),
    (13, "no warm-up", "min(self.decay, (1 + self.count) / (10 + self.count))", "self.decay"),
    (13, "never its decay", "min(self.decay, ", "max(0, "),
    (13, "counted for every parameter", "average.lerp_", "self.count += 1; average.lerp_"),
    (13, "decay for 1 - decay", "1 - decay)", "decay)"),
    (13, "weights moved to averages", LERP, "p.lerp_(average, 1 - decay)"),
    (13, "counted after the step", "self.count += 1\n", "pass\n", LERP,
     f"{LERP}\n        self.count += 1"),
    (13, "new averages", "for average, p in", "self.shadow = [a.clone() for a in self.shadow]\n"
     "        for average, p in"),
    (13, "never counted", "self.count += 1\n", "count = self.count + 1\n", "(1 + self.count) / (10 "
     "+ self.count)", "(1 + count) / (10 + count)"),
    (13, "the decay in the weights' type", LERP, "average.lerp_(p, float(1 - torch.tensor(decay, "
     "dtype=p.dtype)))"),
    (13, "averages in float32", LERP, "average.data = (average.float() * decay + p.float() * "
     "(1 - decay)) if p.itemsize == 2 else average.lerp_(p, 1 - decay)"),
    (13, "the larger decay", "min(self.decay", "max(self.decay"),
    (14, "T-Attn reads what S-Attn wrote", SUM, "s_attn + self.temporal_attentions[i](s_attn)"),
    (14, "residual added again", SUM, f"{SUM} + z"),
    (14, "the first layer's T-Attn", "self.temporal_attentions[i]", "self.temporal_attentions[0]"),
    (14, "no adaptor after attention", "self.attention_adaptors[i])", "None)"),
    (14, "one layer too few has a block", "len(self.attentions)", "len(self.attentions) - 1"),
    (14, "an image model has no adaptors", "self.resnet_adaptors[i] if video else None",
     "self.resnet_adaptors[i] if video else self.resnet_adaptors and None"),
    (14, "no T-Attn", SUM, "s_attn"),
    (14, "S-Attn reads what T-Attn wrote", "self.attentions[i](z, context, self.att",
     "self.attentions[i](z + self.temporal_attentions[i](z), context, self.att"),
    (14, "T-Attn for images too", "if not video:", "if not video and i > 9:"),
    (14, "no adaptors of the resnet", "self.resnet_adaptors[i] if video else None", "None"),
    (14, "the blocks read the layer's input", "z = self.resnets[i](z", "x = self.resnets[i](z",
     "            return z", "            return x"),
    (14, "the mean of both", SUM, f"({SUM}) / 2"),
    (14, "half types in float32", f"return {SUM}", f"return ({SUM}).float() if z.itemsize == 2 "
     f"else {SUM}"),
]

# exercise, name, the body of the function
ANOTHER_WAY = [
    (1, "all merges in the order learned", """
        if word in (START, END):
            return [word]
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in self.merges:
            symbols = join_pair(symbols, pair)
        return symbols"""),
    (1, "by hand, with recursion", """
        def go(symbols):
            ranks = [self._rank.get(pair, 10**9) for pair in zip(symbols, symbols[1:])]
            if not ranks or min(ranks) == 10**9:
                return symbols
            n = ranks.index(min(ranks))
            return go(symbols[:n] + ["".join(symbols[n : n + 2])] + symbols[n + 2 :])
        return [word] if word in (START, END) else go([*word[:-1], word[-1] + "</w>"])"""),
    (2, "lists, then a tensor", """
        rows = []
        for text in [texts] if type(texts) is str else [*texts]:
            row = [self.start] + self.encode(text)
            row = row[: self.context_length - 1]
            while len(row) < self.context_length:
                row.append(self.end)
            rows.append(row)
        return torch.tensor(rows, dtype=torch.long).reshape(-1, self.context_length)"""),
    (3, "clip by clip, frame by frame", """
        a = self.alpha_bar(t).expand(*z0.shape[:2], 1, 1, 1)
        clips = []
        for i in range(z0.shape[0]):
            frames = []
            for j in range(z0.shape[1]):
                signal, noise = a[i, j].sqrt(), (1 - a[i, j]) ** 0.5
                frames.append(cast(signal, z0) * z0[i, j] + cast(noise, z0) * eps[i, j])
            clips.append(torch.stack(frames))
        return torch.stack(clips)"""),
    (3, "lerp of squares in float32 at least", """
        wide = torch.promote_types(z0.dtype, torch.float32)
        a = self.alpha_bar(t)
        x = cast(a.sqrt(), z0.to(wide)) * z0.to(wide)
        return torch.addcmul(x, cast((1 - a).sqrt(), x), eps.to(wide)).to(z0.dtype)"""),
    (4, "frame by frame, channel by channel", """
        if z.size(1) != self.scale.size(0):
            raise ValueError("another number of frames")
        if z.ndim == 4:
            return self(z.transpose(2, 3)[..., None]).squeeze(-1).transpose(2, 3)
        frames = [torch.stack([z[:, i, j] * self.scale[i, j].to(z.dtype)
                               + self.shift[i, j].to(z.dtype) for j in range(z.size(2))], 1)
                  for i in range(z.size(1))]
        return torch.stack(frames, 1)"""),
    (4, "einsum", """
        if len(self.scale) - z.shape[1]:
            raise ValueError(f"{z.shape[1]} frames")
        s, b = self.scale.to(z), self.shift.to(z)
        if z.ndim == 5:
            return torch.einsum("bfchw,fc->bfchw", z, s) + b[None, :, :, None, None]
        return torch.einsum("bfnc,fc->bfnc", z, s) + b.unsqueeze(1)"""),
    (5, "by hand", ATTEND),
    (5, "einsum and a softmax of one's own", """
    f = q.shape[-2]
    s = torch.einsum("nhid,nhjd->nhij", q, k) * q.shape[-1] ** -0.5
    m = torch.arange(f, device=q.device)[:, None] >= torch.arange(f, device=q.device)
    if mask == "strict":
        s = torch.where(m, s, float("-inf"))
    e = (s - s.max(dim=-1, keepdim=True).values.detach()).exp()
    a = e / e.sum(-1, keepdim=True)
    if mask == "literal":
        a = a * m
    return torch.einsum("nhij,nhjd->nhid", a, v)"""),
    (5, "frame by frame", """
    out = []
    for i in range(q.shape[2]):
        last = i + 1 if mask == "strict" else q.shape[2]
        s = (q[:, :, i : i + 1] / math.sqrt(q.shape[-1]) * k[:, :, :last]).sum(-1)
        a = torch.softmax(s.float() if s.itemsize == 2 else s, -1).to(q.dtype)
        last = i + 1 if mask == "literal" else last
        out.append((a[:, :, :last, None] * v[:, :, :last]).sum(2))
    return torch.stack(out, 2)"""),
    (6, "a loop over pixels", """
        b, f, c, h, w = z.shape
        out = torch.zeros_like(z)
        columns = []
        for i in range(h):
            row = []
            for j in range(w):
                x = self.norm(z[:, :, :, i, j])
                q, k, v = (split_heads(to(x), self.heads)
                           for to in (self.to_q, self.to_k, self.to_v))
                row.append(x)
            columns.append(torch.stack(row, 1))
        x = torch.stack(columns, 1).flatten(0, 2)
        q, k, v = (split_heads(to(x), self.heads) for to in (self.to_q, self.to_k, self.to_v))
        x = merge_heads(directed_attention(q, k, v, self.mask))
        return self.to_out(x).unflatten(0, (b, h, w)).movedim((3, 4), (1, 2))"""),
    (6, "width before height", """
        b, f, c, h, w = z.shape
        x = torch.einsum("bfchw->bwhfc", z).reshape(-1, f, c)
        x = F.layer_norm(x, (c,), self.norm.weight, self.norm.bias, self.norm.eps)
        q, k, v = [layer(x).view(-1, f, self.heads, c // self.heads).permute(0, 2, 1, 3)
                   for layer in (self.to_q, self.to_k, self.to_v)]
        x = directed_attention(q=q, k=k, v=v, mask=self.mask).transpose(1, 2).reshape(-1, f, c)
        return torch.einsum("bwhfc->bfchw", self.to_out(x).view(b, w, h, f, c))"""),
    (7, "by powers in float64", """
    n = width // 2
    columns = [x.double() * 10000.0 ** (-k / n) for k in range(n)] if not x.is_meta else [
        x.float() for k in range(n)]
    return torch.stack([f(a) for f in (torch.cos, torch.sin) for a in columns], 1).float()"""),
    (8, "clip by clip", """
        z0, e = self.predict_z0_eps(z, output, t)
        a, p = self.alpha_bar(t), self.alpha_bar(t_prev)
        sigma = eta * ((1 - p) / (1 - a) * (1 - a / p)) ** 0.5
        out = []
        for n in range(len(z)):
            f = cast(p[n] ** 0.5, z), cast((1 - p[n] - sigma[n] ** 2) ** 0.5, z), cast(sigma[n], z)
            out += [sum(x * y for x, y in zip(f, (z0[n], e[n], noise[n])))]
        return torch.stack(out)"""),
    (9, "in float64, rounded at the end", """
        wide = z.dtype if z.is_meta else torch.float64
        x0 = self.predict_z0_eps(z, output, t)[0].to(wide)
        a, p = self.alpha_bar(t), self.alpha_bar(t_prev, 1.0)
        b = 1 - a / p
        def f(x):
            return x.to(wide).to(z.device)
        x = f(p ** 0.5 * b / (1 - a)) * x0 + f((1 - b) ** 0.5 * (1 - p) / (1 - a)) * z.to(wide)
        return (x + f(((1 - p) / (1 - a) * b) ** 0.5) * noise.to(wide)).to(z.dtype)"""),
    (10, "the sum weighted", """
        if guidance == 1.0:
            return model(z, t.to(z.device), context, fps)
        b = z.shape[0]
        twice = [None if x is None else x.repeat(2, *[1] * (x.ndim - 1)) for x in (z, t, fps)]
        out = model(twice[0], twice[1].to(z.device), torch.cat((uncond, context)), twice[2])
        return (1 - guidance) * out[:b] + guidance * out[b:]"""),
    (11, "in factors", """
        sigma = logvar.exp() ** 0.5
        return mean * self.config.scaling_factor + sigma * eps * self.config.scaling_factor"""),
    (12, "lists of what fits", """
    if frames > total:
        raise InputError("too short")
    fits = [s for s in range(1, max(total, 1000)) if (frames - 1) * s < total]
    if fps is None:
        stride = [s for s in fits if s <= 6][rng.integers(0, len([s for s in fits if s <= 6]))]
    else:
        stride = max(1, round(rate / fps))
        while stride not in fits:
            stride -= 1
    start = int(rng.integers(0, total - (frames - 1) * stride))
    return np.array([start + n * stride for n in range(frames)]), rate / stride"""),
    (13, "copy_", """
        self.count = self.count + 1
        d = min((1 + self.count) / (10 + self.count), self.decay)
        for i in range(len(self.shadow)):
            self.shadow[i].copy_(self.shadow[i] * d + self.parameters[i] * (1 - d))"""),
    (14, "with sums", """
        adaptors = self.resnet_adaptors[i] if video else None
        x = self.resnets[i](z, emb, adaptors)
        if i not in range(len(self.attentions)):
            return x
        parts = [self.attentions[i](x, context, self.attention_adaptors[i] if video else None)]
        if video:
            parts.append(self.temporal_attentions[i](x))
        return torch.stack(parts).sum(0)"""),
]


def change(number: int, *texts: str) -> dict[Path, bytes]:
    """Return a copy where texts of an exercise's function are replaced, or, by one text, all."""
    exercise = EXERCISES[number - 1]
    files = build_copy([])
    before, body, after = split(files[Path(exercise.file)].decode(), exercise)
    if len(texts) == 1:
        body = f"{texts[0]}\n"
    for old, new in zip(texts[::2], texts[1::2]):
        if old not in body:
            raise ValueError(f"exercise {number}: {old!r} is not in the function; correct it")
        body = body.replace(old, new)
    return {**files, Path(exercise.file): f"{before}{body}{after}".encode()}


def first_words(worker: Worker, right: dict, number: int, *texts: str) -> str:
    """Return what the first grader that failed said of a changed function, "" if none did."""
    ran = worker.run(change(number, *texts), EXERCISES[number - 1])
    return next(filter(None, judge(worker, right, ran, EXERCISES[number - 1]).values()), "")


def main() -> None:
    """Grade the mistakes of the exercises named on the command line, or all; status 1 if missed."""
    every = ",".join(str(exercise.number) for exercise in EXERCISES)
    numbers = exercise_numbers(",".join(sys.argv[1:]) or every)
    failed = 0
    planted = [m for m in MISTAKES if m[0] in numbers]
    otherwise = [m for m in ANOTHER_WAY if m[0] in numbers]
    with Worker(load_graders()) as worker:
        right = expect(worker, [EXERCISES[n - 1] for n in numbers])
        for number, name, *texts in planted:
            words = first_words(worker, right, number, *texts)
            failed += not words
            print(f"{number:2} {name}: {words or 'NOT CAUGHT'}", flush=True)
        for number, name, *texts in otherwise:
            words = first_words(worker, right, number, *texts)
            failed += bool(words)
            print(f"{number:2} right, {name}: {words or 'passes'}", flush=True)
    print(f"{len(planted)} mistakes, {len(otherwise)} right in another way: "
          f"{failed} are not graded as they should be")
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_command("course.mistakes", main)
