"""Breaks the code in one place at a time and sees that a test fails: `python tests/mutations.py`.

A mutation is a file, a text in it, what stands there instead, and the tests that must see it: a
file of tests, then words of their names. It is made in a copy of the repository. A test that runs
out of time sees nothing.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 600  # of the tests of a mutation

MUTATIONS = [
    ("train.py", "average.parameters, 1.0)", "average.parameters, 10.0)", "train above_one"),
    ("train.py", "average.copy_to_weights()\n    stage.finish", "stage.finish", "train average"),
    ("train.py", "loss = losses.mean() * share", "loss = losses.mean()", "train two_processes"),
    ("train.py", "bins += loss_by", "bins = loss_by", "train bins"),
    ("train.py", "* len(shards) * stage.steps / 60", "* len(shards) * stage.steps",
     "train minutes"),
    ("train.py", "with average.applied(), record(picture):", "with record(picture):",
     "train average"),
    ("train.py", "    with average.applied():\n        stage.finish",
     "    if True:\n        stage.finish", "train average"),
    ("train.py", "max(1, min(count, size // process_count()))", "max(1, count)",
     "train micro_batches"),
    ("train.py", "total += losses.sum().item()", "total += losses.mean().item()", "train held_out"),
    ("train.py", 'average.count = resumed["step"]', "average.count = 0", "train stopped_and"),
    ("train.py", "return replace(s, batch_size=parts)", "return s", "train processes"),
    ("train.py", "0.25, (count / 1000) ** 0.5", "0.5, (count / 1000) ** 0.5", "train"),
    ("train.py", "model.config.vae.scaling_factor = scaling_factor\n", "pass\n",
     "train measured_scale"),
    ("train.py", "if not resumed:\n            log.truncate(0)",
     "if resumed:\n            log.truncate(0)", "train log or stopped_and"),
    ("train.py", "add_up(bins)", "pass", "train two_processes"),
    ("stages.py", "return [pictures], *self.plan_batch", "return [clips], *self.plan_batch",
     "train pictures"),
    ("train.py", "spread(mix(data.held_out, data.held_out_pictures, frames), HELD_OUT)",
     "spread([data.held_out], HELD_OUT)", "train pictures or held_out"),
    ("stages.py", "item[key][:1]}", "item[key][-1:]}", "stages first_frames"),
    ("stages.py", "self.s.batch_size * self.model.config.unet.frames // frames, frames",
     "self.s.batch_size, frames", "stages image or pictures"),
    ("stages.py", "if u < self.s.text_dropout", "if u > self.s.text_dropout", "stages dropped"),
    ("stages.py", "int(0.8 * self.steps)", "int(0.5 * self.steps)", "stages fifth or peak"),
    ("stages.py", "+ self.s.kl_weight * kl", "+ kl", "stages divergence"),
    ("stages.py", "source[i * n // share]", "source[i]", "stages spread"),
    ("stages.py", "float(1 / torch.cat(latents).std())", "float(torch.cat(latents).std())",
     "stages standard_deviation"),
    ("stages.py", "number * 1_000_003 + part + 1", "number * 1_000_003 + 1", "stages epoch"),
    ("stages.py", "clips.set_epoch(n // len(clips))", "clips.set_epoch(0)", "stages latents"),
    ("stages.py", "[self.shard]\n\n    def uniform", "\n\n    def uniform", "stages shard"),
    ("stages.py", "rate_multiplier = cascade.NEW_FRAMES + 1", "rate_multiplier = 1",
     "stages quarter_of"),
    ("stages.py", 'item["fps"] / self.rate_multiplier', 'item["fps"]', "stages quarter_of"),
    ("stages.py", "source.set_epoch(epoch)", "source.set_epoch(0)", "stages epoch"),
    ("stages.py", "not step % self.s.picture_every:", "step % self.s.picture_every:",
     "stages pictures"),
    ("stages.py", "source = sources[n % len(sources)]", "source = sources[0]", "stages pictures"),
    ("runs.py", "betas=(0.9, 0.99)", "betas=(0.9, 0.999)", "runs"),
    ("runs.py", "os.fsync(file.fileno())", "pass", "runs"),
    ("runs.py", "(1 + self.count) / (10 + self.count)", "(1 + self.count) / (100 + self.count)",
     "runs"),
    ("runs.py", 'file.write("\\n" * is_cut_off)', "pass", "runs"),
    ("runs.py", "except BlockingIOError as error:\n        raise InputError",
     "except OSError as error:\n        raise InputError", "runs"),
    ("runs.py", "max(1, int(quota) // int(period))", "max(1, int(period) // int(quota))", "runs"),
    ("runs.py", "(done + 1) / max(warmup, 1)", "done / max(warmup, 1)", "runs"),
    ("runs.py", "0.5 * (1 + math.cos", "0.4 * (1 + math.cos", "runs"),
    ("runs.py", "sys.exit(2)", "sys.exit(1)", "runs"),
    ("diffusion.py", "z = seeded_randn(shape, generator).to(context)",
     "z = 0.9 * seeded_randn(shape, generator).to(context)", "diffusion"),
    ("diffusion.py", "offset = 1 if steps < self.num_steps else 0", "offset = 0", "diffusion"),
    ("diffusion.py", "if guidance == 1:", "if guidance == 2:", "diffusion"),
    ("tiny.py", "frame_lag = 100", "frame_lag = 90", "tiny"),
    ("tiny.py", "t_prev < last)", "t_prev <= last)", "tiny"),
    ("tiny.py", "3.4445 * x", "3.0 * x", "tiny"),
    ("tiny.py", "momentum: float = 0.95", "momentum: float = 0.9", "tiny"),
    ("tiny.py", "max(1, rows / columns) ** 0.5", "max(1, columns / rows) ** 0.5", "tiny"),
    ("cascade.py", "top : top + side, left : left + side", "top : top + side, top : top + side",
     "cascade"),
    ("cascade.py", "SAMPLE_AUG_LEVEL = 1 ", "SAMPLE_AUG_LEVEL = 5 ", "cascade"),
    ("cascade.py", "noise = draw.normal(1, 3, side, side).to(frames)", "noise = eps", "cascade"),
    ("cascade.py", "fps / (NEW_FRAMES + 1)", "fps / NEW_FRAMES", "cascade"),
    ("cascade.py", "manual_seed(seed + i)", "manual_seed(seed)", "cascade"),
    ("cascade.py", "MAX_AUG_LEVEL = 20", "MAX_AUG_LEVEL = 200", "cascade"),
    ("cascade.py", "(z0[:, 1:-1] - cross_fade(pairs))", "z0[:, 1:-1]", "cascade"),
    ("cascade.py", "new = cross_fade(pairs) + z", "new = cross_fade(pairs) - z", "cascade"),
    ("cascade.py", "p.mean(0, keepdim=True)", "p[:1]", "cascade"),
    ("magicvideo.py", "self.config.steps if steps is None", "50 if steps is None", "magicvideo"),
    ("magicvideo.py", "return self.config.vae.scaling_factor * mean", "return mean", "magicvideo"),
    ("magicvideo.py", "videos.to(self.vae.encoder.conv_in.weight)",
     "videos.to(self.unet.conv_in.weight)", "magicvideo"),
    ("magicvideo.py", 'state.get("version", 1) != VERSION', "False", "magicvideo"),
    ("magicvideo.py", ".clamp(-1, 1) for z in", " for z in", "magicvideo"),
    ("stable_diffusion.py", "min(256, side", "min(512, side", "stable_diffusion"),
    ("stable_diffusion.py", "and not is_video_parameter(name)]\n", "]\n", "stable_diffusion"),
    ("sample.py", "fps *= cascade.NEW_FRAMES + 1", "fps *= cascade.NEW_FRAMES", "sample"),
    ("sample.py", "seed=flags.seed)\n        fps", "seed=0)\n        fps", "sample"),
    ("data.py", "round(rate / fps), 1), longest)", "round(rate / fps), 1), longest + 1)", "data"),
    ("data.py", "held_out = m == (c + 2 * s) % 6", "held_out = m == (c + s) % 6", "data"),
    ("data.py", "indices = total - 1 - indices", "indices = total - indices", "data"),
    ("data.py", "self.rng(i, self.split == \"test\", 1)", "self.rng(i, 1)", "data pictures"),
    ("data.py", "enumerate(self.all_names, 1)}", "enumerate(self.names, 1)}", "data"),
    ("data.py", ".permute(0, 3, 1, 2) / 127.5 - 1", ".permute(0, 3, 1, 2) / 128 - 1", "data"),
    ("folders.py", "end <= 4 * used", "end <= 400 * used", "folders"),
    ("folders.py", "os.fsync(file.fileno())", "pass", "folders"),
    ("folders.py", "if key not in store.clips]", "if key in store.clips]", "folders"),
    ("clip_files.py", "shown < shortest * 3 / 2", "shown < shortest * 5 / 2", "clip_files"),
    ("clip_files.py", "sorted(seconds)[len(seconds) // 20]", "min(seconds)", "clip_files"),
    ("clip_files.py", "Image.Resampling.BICUBIC", "Image.Resampling.NEAREST", "clip_files means"),
    ("unet3d.py", "(frames, 1, -1)", "(frames, -1, 1)", "unet3d"),
    ("unet3d.py", "nn.init.zeros_(self.to_out.bias)", "pass", "unet3d"),
    ("unet3d.py", "scores.softmax(-1) * torch.ones_like(scores).tril()",
     "(scores * torch.ones_like(scores).tril()).softmax(-1)", "unet3d"),
    ("unet3d.py", "math.log(10000)", "math.log(1000)", "unet3d"),
    ("unet3d.py", "z.permute(0, 3, 4, 1, 2)).reshape", "z.permute(0, 4, 3, 1, 2)).reshape",
     "unet3d"),
    ("vae.py", "(0.5 * logvar).exp()", "logvar.exp()", "vae"),
    ("vae.py", "self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-6)",
     "self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-5)", "vae"),
    ("vae.py", "latents / self.config.scaling_factor", "latents", "vae"),
    ("vae.py", "x = self.temporal(1, x, frames)", "x = self.temporal(0, x, frames)", "vae"),
    ("clip_text.py", "html.unescape(html.unescape(", "(html.unescape(", "clip_text"),
    ("clip_text.py", "[: self.context_length - 2]", "[: self.context_length - 1]", "clip_text"),
    ("clip_text.py", "1.702 * x", "1.7 * x", "clip_text"),
    ("clip_text.py", "difference * counts[word]", "difference", "clip_text"),
]


def is_caught(copy: Path, file: str, old: str, new: str, tests: str) -> str:
    """Run the tests of one mutation -> how they ended: caught, SURVIVED, TIME or NOT FOUND."""
    text = (ROOT / file).read_text("utf-8")
    if old not in text:
        return "NOT FOUND"
    name, _, words = tests.partition(" ")
    (copy / file).write_text(text.replace(old, new, 1), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               f"tests/test_{name}.py", *(["-k", words] if words else [])]
    try:
        status = subprocess.run(command, cwd=copy, capture_output=True, timeout=SECONDS).returncode
        return {0: "SURVIVED", 1: "caught", 5: "NO TEST"}.get(status, f"status {status}")
    except subprocess.TimeoutExpired:
        return "TIME"
    finally:
        (copy / file).write_text(text, "utf-8")


def main() -> None:
    """Try all mutations, or those of some files, and print what becomes of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="mutations of these files (all)")
    files = parser.parse_args().files
    chosen = [mutation for mutation in MUTATIONS if not files or mutation[0] in files]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", "runs", ".venv", "venv", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for mutation in chosen:
            words = is_caught(copy, *mutation)
            caught += words == "caught"
            file, old, new, tests = mutation
            print(f"{words:9} {file}: {old!r:.60} -> {new!r:.60} (test_{tests})", flush=True)
    print(f"{caught} of {len(chosen)} mutations are caught")
    sys.exit(caught < len(chosen))


if __name__ == "__main__":
    main()
