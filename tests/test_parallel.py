"""One training on several cores and in several processes."""

import ctypes
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import parallel
from conftest import close, randn, shaken
from unet3d import UNet3D, UNetConfig

ROOT = Path(__file__).parent.parent
SMALL = UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, groups=4, context_width=32, frames=4)


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    unet = shaken(UNet3D(SMALL))
    parameters, found = list(unet.parameters()), {}
    z, t, context, fps = randn(4, 4, 4, 4, 4), torch.arange(100, 900, 200), randn(4, 5, 32), torch.full((4,), 8.0)

    def loss(part):
        return unet(z[part], t[part], context[part], fps[part]).square().mean(), [1.0, None]

    for count in (1, 2, 4):
        with ThreadPoolExecutor(count) as pool:
            losses = [(1 / count, partial(loss, slice(k, None, count))) for k in range(count)]
            value, bands = parallel.backward(losses, parameters, pool, nullcontext)
        assert bands == [1.0, None]
        found[count] = [torch.tensor(value), *(p.grad for p in parameters)]
        unet.zero_grad()
    for count in (2, 4):
        assert all(close(whole, part, 1e-9) for whole, part in zip(found[1], found[count]))
    assert all(gradient.abs().max() > 1e-9 for gradient in found[1])


@pytest.mark.parametrize("library", [lambda _: object(), lambda _: ctypes.CDLL("no such library")])
def test_a_system_without_glibc_keeps_no_freed_memory_and_says_nothing(monkeypatch, library):
    monkeypatch.setattr(parallel, "ctypes", SimpleNamespace(CDLL=library))
    parallel.keep_freed_memory()


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: real processes, as torchrun starts them

# a training of a few steps in float64, of a model that is small
SCRIPT = """
import sys, torch
torch.set_default_dtype(torch.float64)
sys.path.insert(0, ROOT)
import batches, magicvideo, train
from clip_text import CLIPTextConfig
from magicvideo import PRESETS, MagicVideoConfig
from unet3d import UNetConfig
from vae import VAEConfig
from diffusion import DiffusionConfig
PRESETS["tiny"] = MagicVideoConfig(
    size=32, text=CLIPTextConfig(vocab_size=560, context_length=12, width=32, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 16), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, groups=4, context_width=32, frames=4),
    diffusion=DiffusionConfig(zero_terminal_snr=True, prediction="v_prediction", frame_lag=100))
EXTRA
try:
    train.main(sys.argv[1:])
except train.InputError as error:
    sys.exit(f"train.py: {error}")
"""
FLAGS = ["--vae-steps", "3", "--image-steps", "2", "--video-steps", "3", "--cache", "8", "--thumbnail", "0",
         "--muon-lr", "0", "--device", "cpu", "--sample-every", "0", "--save-every", "1"]


def run(folder, ranks, *flags, extra="", torchrun=()):
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("ROOT", repr(str(ROOT))).replace("EXTRA", extra))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port",
               str(20000 + os.getpid() % 20000), *torchrun] if ranks > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(script), *FLAGS, "--out", "run", *flags], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=300)


def weights(folder):
    contents = torch.load(folder / "run" / "model.pt", weights_only=True)["model"]
    return {name: weight for name, weight in contents["weights"].items()}


def alike(one, other, within):
    return one.keys() == other.keys() and all(close(one[name], other[name], within) for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights that one process ends with, batch 8."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(folder, 1, "--batch-size", "8", "--vae-batch-size", "8")
    assert done.returncode == 0, done.stderr
    return weights(folder)


def test_one_rank_with_batch_8_and_two_with_batch_4_end_with_equal_weights(alone, tmp_path):
    done = run(tmp_path, 2, "--batch-size", "4", "--vae-batch-size", "4")
    assert done.returncode == 0, done.stderr
    found = weights(tmp_path)
    assert next(iter(found.values())).dtype == torch.float64 and alike(alone, found, 1e-9)
    assert done.stdout.count("done in") == 1  # rank 0 speaks


def test_the_number_of_parts_changes_nothing(alone, tmp_path):
    done = run(tmp_path, 1, "--batch-size", "8", "--vae-batch-size", "8", "--parts", "5")
    assert done.returncode == 0, done.stderr
    assert alike(alone, weights(tmp_path), 1e-9)


DIES = """
import os
import losses
place = batches.rng
def dying(seed, *numbers):
    if numbers[:3] == (2, 1, 1) and os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise train.InputError("this rank dies")
    return place(seed, *numbers)
losses.rng = dying
"""


def test_a_rank_that_dies_ends_the_run_with_its_reason_and_a_restart_goes_on(alone, tmp_path):
    flags = "--batch-size", "4", "--vae-batch-size", "4"
    ended = run(tmp_path, 2, *flags, extra=DIES)
    assert ended.returncode != 0 and "train.py: this rank dies" in ended.stderr
    again = run(tmp_path, 2, "--resume", torchrun=["--max-restarts", "0"])
    assert again.returncode == 0 and "resumed at step 1 of stage video" in again.stdout, again.stderr
    assert alike(alone, weights(tmp_path), 1e-9)


def test_torchrun_starts_a_dead_run_again_from_its_last_checkpoint(alone, tmp_path):
    flags = "--batch-size", "4", "--vae-batch-size", "4"
    done = run(tmp_path, 2, *flags, extra=DIES, torchrun=["--max-restarts", "1"])
    assert done.returncode == 0 and "resumed at step 1 of stage video" in done.stdout, done.stderr
    assert alike(alone, weights(tmp_path), 1e-9)


def test_torchrun_without_out_is_refused():
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    code = "import train; train.join = lambda _: None; train.world = lambda: 2; train.main([])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.search("InputError: torchrun: add --out", done.stderr)
