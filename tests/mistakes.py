"""Typical wrong solutions of the exercises, as small patches: each must be caught by its exercise's graders.

`python tests/mistakes.py` plants all, one after the other, in a copy of the code, and prints what the graders said.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from assignment import EXERCISES, body_lines  # noqa: E402

# exercise: {name: (how it is, how it is wrong)}; the first is found once in the function's body
MISTAKES = {
    1: {
        "no </w> at the end of a word": ('[*word[:-1], word[-1] + "</w>"]', "[*word]"),
        "</w> as a symbol of its own": (
            '[*word[:-1], word[-1] + "</w>"]\n', '[*word, "</w>"]\n        word = symbols\n'),
        "only one merge": ("while heap:", "for _ in range(bool(heap)):"),
        "last learned first": ("learned, i = heapq.heappop(heap)",
                               "learned, i = max(heap)\n            heap.remove((learned, i))"),
        "rightmost first": ("learned, i = heapq.heappop(heap)",
                            "learned, i = min(heap, key=lambda e: (e[0], -e[1]))\n"
                            "            heap.remove((learned, i))"),
        "what was merged is not merged again": ("for j in (before[i], i):", "for j in ():"),
        "special tokens taken apart": ("if word in (START, END):", "if False:"),
        "left to right instead of by rank": ("learned, i = heapq.heappop(heap)",
                                             "learned, i = min(heap, key=lambda e: e[1])\n"
                                             "            heap.remove((learned, i))"),
    },
    2: {
        "padding with 0": ("self.context_length), self.end)", "self.context_length), 0)"),
        "end token lost on truncation": ("[: self.context_length - 2]]", "[: self.context_length - 1]]"),
        "no start token": ("[self.start, *self.encode", "[*self.encode"),
        "one token too few": ("[: self.context_length - 2]]", "[: self.context_length - 3]]"),
        "end token first": ("[self.start, *self.encode", "[self.end, *self.encode"),
        "the first tokens are lost": ("[: self.context_length - 2]]", "[-(self.context_length - 2):]]"),
        "float ids": ("torch.full((len(texts), self.context_length), self.end)",
                      "torch.full((len(texts), self.context_length), float(self.end))"),
        "padding with the start token": ("self.context_length), self.end)", "self.context_length), self.start)"),
    },
    3: {
        "beta for alpha": ("signal * z0 + noise * eps", "noise * z0 + signal * eps"),
        "without the root": ("signal * z0 + noise * eps", "signal**2 * z0 + noise**2 * eps"),
        "noise alone has its factor": ("signal * z0 + noise * eps", "z0 + noise * eps"),
        "noise subtracted": ("signal * z0 + noise * eps", "signal * z0 - noise * eps"),
        "1 - sqrt(alpha_bar) for sqrt(1 - alpha_bar)": (
            "signal * z0 + noise * eps", "signal * z0 + (1 - signal) * eps"),
        "one step too far": ("self.coefficients(t, z0)", "self.coefficients(t + 1, z0)"),
        "the first clip's step for all": ("self.coefficients(t, z0)", "self.coefficients(t[:1].expand_as(t), z0)"),
    },
    4: {
        "shared between frames": ("self.scale[per_channel], z)", "self.scale.mean(0, keepdim=True)[per_channel], z)"),
        "scale of the first frame for all": ("self.scale[per_channel], z)", "self.scale[:1][per_channel], z)"),
        "frames and channels swapped": ("self.scale[per_channel], z)", "self.scale.T[per_channel], z)"),
        "1 + scale": ("self.scale[per_channel], z)", "1 + self.scale[per_channel], z)"),
        "no shift": ("self.shift[per_channel], self", "0 * self.shift[per_channel], self"),
        "shift before scale": ("return torch.addcmul(self.shift[per_channel], self.scale[per_channel], z)",
                               "return self.scale[per_channel] * (z + self.shift[per_channel])"),
        "any number of frames": ("if z.shape[1] != frames:", "if z.shape[1] > frames:"),
        "tokens as if they were pictures": ("if z.ndim == 5 else (slice(None), None)",
                                            "if z.ndim == 5 else (..., None)"),
    },
    5: {
        "mask transposed": (
            "is_causal=mask == \"strict\")", "attn_mask=torch.ones(q.shape[2], k.shape[2]).triu().bool() "
                            "if mask == 'strict' else None)"),
        "mask after the softmax": ('if mask != "literal":', 'if mask == "bidirectional":'),
        "mask before the softmax in literal": ("scores.softmax(-1) * torch.ones_like(scores).tril()",
                                               "scores.masked_fill(torch.ones_like(scores).tril() == 0, "
                                               "-torch.inf).softmax(-1)"),
        "no mask": ("is_causal=mask == \"strict\"", "is_causal=False"),
        "the diagonal masked": ("torch.ones_like(scores).tril()", "torch.ones_like(scores).tril(-1)"),
        "scores masked by zero": ('if mask != "literal":\n        return F.scaled_dot_product_attention(q, k, v, '
                                  'is_causal=mask == "strict")',
                                  'if mask == "bidirectional":\n        return F.scaled_dot_product_attention(q, k, '
                                  'v)\n'
                                  '    if mask == "strict":\n        s = (q @ k.transpose(-1, -2)) / '
                                  'math.sqrt(q.shape[-1])'
                                  '\n        return (s * torch.ones_like(s).tril()).softmax(-1) @ v'),
        "literal not divided by the root of d": (" / math.sqrt(q.shape[-1])", ""),
        "softmax over the queries": ("scores.softmax(-1)", "scores.softmax(-2)"),
        "masked in bidirectional too": ("is_causal=mask == \"strict\"", "is_causal=True"),
    },
    6: {
        "frame order mixed with batch order": ("z.permute(0, 3, 4, 1, 2)).reshape(b * h * w, f, c)",
                                               "z.permute(0, 1, 3, 4, 2)).reshape(b * h * w, f, c)"),
        "pixels of a frame attend": ("z.permute(0, 3, 4, 1, 2)).reshape(b * h * w, f, c)",
                                     "z.permute(0, 1, 3, 4, 2)).reshape(b * f, h * w, c)"),
        "no norm": ("self.norm(z.permute(0, 3, 4, 1, 2))", "z.permute(0, 3, 4, 1, 2)"),
        "residual added twice": ("permute(0, 3, 4, 1, 2)\n", "permute(0, 3, 4, 1, 2) + z\n"),
        "h and w swapped on the way back": ("out.reshape(b, h, w, f, c).permute(0, 3, 4, 1, 2)",
                                            "out.reshape(b, h, w, f, c).permute(0, 3, 4, 2, 1)"),
        "no mask": ("directed_attention(q, k, v, self.mask)", 'directed_attention(q, k, v, "bidirectional")'),
        "queries and keys swapped": (
            "directed_attention(q, k, v, self.mask)", "directed_attention(k, q, v, self.mask)"),
        "no output projection": ("self.to_out(merge_heads(directed_attention(q, k, v, self.mask)))",
                                 "merge_heads(directed_attention(q, k, v, self.mask))"),
        "one head": ("split_heads(to(tokens), self.heads)", "split_heads(to(tokens), 1)"),
    },
    7: {
        "sines first": ("[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
        "divided by half - 1": ("/ half)", "/ (half - 1))"),
        "frequencies for periods": ("-math.log(10000)", "math.log(10000)"),
        "base 1000": ("math.log(10000)", "math.log(1000)"),
        "in degrees": ("x.float()[:, None] * frequencies", "x.float()[:, None] * frequencies * math.pi / 180"),
        "waves between each other": ("torch.cat([angles.cos(), angles.sin()], dim=-1)",
                                     "torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)"),
        "in the precision of x": ("x.float()[:, None] * frequencies", "x[:, None] * frequencies.to(x.dtype)"),
    },
    8: {
        "off by one in the previous step": ("self.alpha_bar(previous, z)", "self.alpha_bar(previous + 1, z)"),
        "the previous step is t": ("self.alpha_bar(previous, z)", "self.alpha_bar(t, z)"),
        "alpha_bar 1 at the end": ("self.alpha_bar(previous, z)", "self.alpha_bar(previous, z, done=1.0)"),
        "sigma not taken off the direction": ("1 - alpha_previous - variance", "1 - alpha_previous"),
        "variance for its root": ("return signal * z0_hat + noise * eps_hat + sigma * eps",
                                  "return signal * z0_hat + noise * eps_hat + sigma**2 * eps"),
        "eta not squared": ("eta**2", "eta"),
        "eps for z_0": ("z0_hat, eps_hat = self.split", "eps_hat, z0_hat = self.split"),
        "output taken for eps": ("eps_hat = self.split(z, output, t)", "eps_hat = self.split(z, output, t)[0], output"),
    },
    9: {
        "posterior variance for its root": ("(1 - alpha) * beta).sqrt()", "(1 - alpha) * beta)"),
        "beta of one step for the stride": ("beta = 1 - alpha / alpha_previous",
                                            "beta = 1 - alpha / self.alpha_bar(torch.as_tensor(t) - 1, z, done=1.0)"),
        "off by one in the previous step": ("self.alpha_bar(previous, z, done=1.0)",
                                            "self.alpha_bar(previous + 1, z, done=1.0)"),
        "never clean at the end": ("self.alpha_bar(previous, z, done=1.0)", "self.alpha_bar(previous, z)"),
        "variance of the forward step": ("((1 - alpha_previous) / (1 - alpha) * beta).sqrt()", "beta.sqrt()"),
        "output taken for z_0": ("z0_hat, _ = self.split(z, output, t)", "z0_hat = output"),
        "no noise": ("sigma.to(z) * eps", "0 * eps"),
        "factors of z_0 and z_t swapped": (
            "of_z0.to(z) * z0_hat + of_z.to(z) * z", "of_z.to(z) * z0_hat + of_z0.to(z) * z"),
    },
    10: {
        "guidance sign": ("without + guidance * (given - without)", "without - guidance * (given - without)"),
        "from the output with text": ("without + guidance * (given - without)", "given + guidance * (given - without)"),
        "halves swapped": ("without, given = both.chunk(2)", "given, without = both.chunk(2)"),
        "text first in the batch": ("torch.cat([uncond, context])", "torch.cat([context, uncond])"),
        "two calls": (
            "without, given = both.chunk(2)", "without, given = model(z, t, uncond, fps), model(z, t, context, "
                      "fps)"),
        "guidance 1 works twice": ("if guidance == 1:", "if False:"),
        "steps not clamped": (".clamp(0, self.config.steps - 1)", ""),
        "falls to 0 instead of 1": ("1 + (guidance - 1) * falling", "guidance * falling"),
        "power forgotten": ("** self.config.guidance_power", ""),
        "rescaled to the output without text": ("given.std(dims", "without.std(dims"),
        "one spread for the batch": ("dims = tuple(range(t.ndim, z.ndim))", "dims = tuple(range(z.ndim))"),
    },
    11: {
        "variance for its root": ("(0.5 * logvar).exp()", "logvar.exp()"),
        "log-variance for a deviation": ("(0.5 * logvar).exp()", "logvar"),
        "noise not scaled": ("(mean + (0.5 * logvar).exp() * eps) * self.config.scaling_factor",
                             "mean * self.config.scaling_factor + (0.5 * logvar).exp() * eps"),
        "divided by the factor": (") * self.config.scaling_factor", ") / self.config.scaling_factor"),
        "no factor": (" * self.config.scaling_factor", ""),
        "own noise": ("* eps)", "* eps.clone().normal_())"),
        "no gradient": ("(mean + (0.5 * logvar).exp() * eps)", "(mean + (0.5 * logvar).exp() * eps).detach()"),
        "exp(2 logvar)": ("(0.5 * logvar)", "(2 * logvar)"),
    },
    12: {
        "v of the video, not of the frames": ("float(rate / stride)", "float(rate)"),
        "v multiplied": ("float(rate / stride)", "float(rate * stride)"),
        "always from the first frame": ("start + stride * np.arange(frames)", "0 * start + stride * np.arange(frames)"),
        "one frame beyond the end": ("rng.integers(total - (frames - 1) * stride)",
                                     "rng.integers(total - (frames - 1) * stride + 1)"),
        "the last part never": ("rng.integers(total - (frames - 1) * stride)",
                                "rng.integers(max(1, total - (frames - 1) * stride - 1))"),
        "frames too far": ("start = rng.integers(total - (frames - 1) * stride)",
                           "start = rng.integers(total - (frames - 2) * stride)"),
        "frames at random": ("start + stride * np.arange(frames)",
                             "np.sort(rng.choice(total, frames, replace=False))"),
        "stride one too few": ("rng.integers(min(longest, 6)) + 1", "rng.integers(max(1, min(longest, 6) - 1)) + 1"),
        "fps rounded down": ("round(rate / fps)", "int(rate / fps)"),
        "short videos repeat": ("if total < frames:", "if False:"),
    },
    13: {
        "no warm-up": ("min(self.decay, (1 + self.count) / (10 + self.count))", "self.decay"),
        "never its decay": ("min(self.decay, (1 + self.count) / (10 + self.count))",
                            "(1 + self.count) / (10 + self.count)"),
        "the larger of both": ("min(self.decay,", "max(self.decay,"),
        "decay for 1 - decay": (", 1 - decay)", ", decay)"),
        "steps not counted": ("self.count += 1", "self.count += 0"),
        "weights moved to averages": (
            "torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)",
                                      "torch._foreach_lerp_([p.data for p in self.parameters], self.values, "
                                      "1 - decay)"),
        "new tensors each step": ("torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)",
                                  "self.values = [v.lerp(p.detach(), 1 - decay) for v, p in zip(self.values, "
                                  "self.parameters)]"),
        "averages are the weights": (
            "torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)",
                                     "[v.copy_(p) for v, p in zip(self.values, self.parameters)]"),
    },
}  # fmt: skip


def plant(folder: Path, number: int, how: str, wrong: str) -> None:
    """Writes the exercise's file with the mistake in it; raises ValueError if the patch does not fit."""
    exercise = EXERCISES[number - 1]
    source = (ROOT / exercise.file).read_text("utf-8")
    first, last = body_lines(source, exercise.name)
    lines = source.splitlines(keepends=True)
    body = "".join(lines[first - 1 : last])
    if body.count(how) != 1:
        raise ValueError(f"exercise {number}: {how!r} is {body.count(how)} times in {exercise.name}")
    planted = "".join([*lines[: first - 1], body.replace(how, wrong), *lines[last:]])
    (folder / exercise.file).write_text(planted, "utf-8")


def copied(folder: Path) -> Path:
    """What graders need, in a folder."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "tests").mkdir()
    for name in ("conftest.py", "test_exercises.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    shutil.copy(ROOT / "pytest.ini", folder)
    return folder


def caught(folder: Path, number: int, name: str) -> str | None:
    """Plants one mistake -> what the exercise's graders said of it, None if they passed it; all is whole again then."""
    plant(folder, number, *MISTAKES[number][name])
    said = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-k",
                           f"exercise_{number:02d}"], cwd=folder, capture_output=True, text=True, timeout=300)
    file = EXERCISES[number - 1].file
    shutil.copy(ROOT / file, folder / file)
    if said.returncode not in (0, 1):
        raise RuntimeError(f"exercise {number}, {name}: {said.stdout[-500:]}{said.stderr[-500:]}")
    lines = re.findall(r"^E +(.*)", said.stdout, re.MULTILINE)
    return (lines or ["failed"])[0] if said.returncode else None


def main() -> int:
    """All mistakes of the exercises that are named on the command line, or of all."""
    numbers, missed, n = [int(x) for x in sys.argv[1:]] or list(MISTAKES), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        for number in numbers:
            for name in MISTAKES[number]:
                said, n = caught(Path(folder), number, name), n + 1
                missed += said is None
                print(f"{number:2} {name}: {said or 'NOT CAUGHT'}"[:170], flush=True)
    print(f"{n - missed} of {n} mistakes caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
