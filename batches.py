"""What a step of training sees: which clips, in which order, read by whom, and their latents (all ours).

Everything random is drawn from its place in the run: the stage, the step, the place in the batch. So neither a stop nor
the number of processes, of readers or of parts of a batch changes what is learned. Read next: `train.py`.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import InputError
from magicvideo import MagicVideo, read_checkpoint, write_checkpoint
from parallel import rank, world


def rng(seed: int, *place: int) -> torch.Generator:
    """A generator that depends on the seed and the place in the run alone: stage, step, place in the batch."""
    number = seed
    for part in place:
        number = (number * 1_000_003 + part + 1) % 2**63
    return torch.Generator().manual_seed(number)


def indices(count: int, batch: int, step: int, seed: int, stage: int) -> list[tuple[int, int]]:
    """The (epoch, item) pairs of a step's batch: every item once an epoch, in an order that is new each epoch."""
    places = range(step * batch, (step + 1) * batch)
    epochs = {place // count for place in places}
    orders = {epoch: torch.randperm(count, generator=rng(seed, stage, 0, epoch)) for epoch in epochs}
    return [(place // count, int(orders[place // count][place % count])) for place in places]


def share(pairs: list) -> list[tuple]:
    """A batch of all ranks -> this rank's part of it, each item behind its place in the whole."""
    return list(enumerate(pairs))[rank() :: world()]


class Reader(Dataset):
    """Items by (place, (epoch, i)) -> (place, item), or the InputError, which must cross processes whole."""

    def __init__(self, clips: Dataset):
        self.clips = clips

    def __getitem__(self, at: tuple[int, tuple[int, int]]) -> tuple[int, dict | InputError]:
        place, (epoch, i) = at
        self.clips.set_epoch(epoch)
        try:
            return place, self.clips[i]
        except InputError as error:
            return place, error


def of_its_own(worker: int) -> None:
    """In a reader: Ctrl-C in a terminal is not for it, since it reaches a whole group of processes."""
    os.setsid()


def read(clips: Dataset, batches: Iterable[list], workers: int) -> Iterator[list[tuple[int, dict]]]:
    """Lists of (place, (epoch, i)) -> lists of (place, item), read ahead by as many processes as `workers`.

    Raises InputError, which names the clip, for one that cannot be read.
    """
    workers = min(workers, os.cpu_count() or 1)
    loader = DataLoader(Reader(clips), batch_sampler=batches, num_workers=workers, collate_fn=list,
                        worker_init_fn=of_its_own if hasattr(os, "setsid") else None)
    for items in loader:
        for _, item in items:
            if isinstance(item, InputError):
                raise item
        yield items


# ----------------------------------------------------------------------------------------------------------------------
# Latents


@torch.no_grad()
def encode(model: MagicVideo, clip: dict) -> dict:
    """A clip with its "video" replaced by "mean" and "logvar" of its latents, each (f, 4, h/8, w/8), on the CPU."""
    mean, logvar = model.vae.encode(clip["video"][None].to(model.unet.conv_in.weight))
    return {"mean": mean[0].cpu(), "logvar": logvar[0].cpu(), "caption": clip["caption"], "fps": clip["fps"]}


class Latents(Dataset):
    """Clips through the frozen encoder, once: [i] -> what `encode` returns, the same in every epoch.

    They are kept in `path` and read from there by a run that goes on; what is there counts only if weights of the
    encoder, clips and their number are the same. Pages of the file are read when they are asked for.
    """

    def __init__(self, model: MagicVideo, clips: Dataset, count: int, path: Path | None = None):
        key = latents_key(model, clips, count)
        if path is None or not self.found(path, key):
            self.kept = {"mean": [], "logvar": [], "caption": [], "fps": []}
            every = ([(i, (i // len(clips), i % len(clips)))] for i in range(count))
            for [(_, clip)] in tqdm(read(clips, every, 0), "encode", count, unit="clip", dynamic_ncols=True,
                                    disable=rank() > 0):
                for name, value in encode(model, clip).items():
                    self.kept[name].append(value)
            for name in ("mean", "logvar"):
                self.kept[name] = torch.stack(self.kept[name])  # (count, f, 4, h/8, w/8)
            if path and rank() == 0:
                write_checkpoint(path, {"format": "magicvideo-latents", "key": key, "kept": self.kept})

    def found(self, path: Path, key: str) -> bool:
        """Reads `path` into self.kept; whether it was there and has this key."""
        try:
            contents = read_checkpoint(path, "magicvideo-latents", mmap=True)
        except InputError:
            return False
        self.kept = contents.get("kept")
        return contents.get("key") == key

    def __len__(self) -> int:
        return len(self.kept["caption"])

    def __getitem__(self, i: int) -> dict:
        return {name: values[i] for name, values in self.kept.items()}

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes."""


class Frames(Dataset):
    """The frames of latents, each by itself: [i] is frame i % f of clip i // f, as a clip of one frame."""

    def __init__(self, latents: Latents):
        self.latents, self.frames = latents, latents.kept["mean"].shape[1]

    def __len__(self) -> int:
        return len(self.latents) * self.frames

    def __getitem__(self, i: int) -> dict:
        clip, frame = self.latents[i // self.frames], [i % self.frames]
        return {**clip, "mean": clip["mean"][frame], "logvar": clip["logvar"][frame]}

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes."""


def latents_key(model: MagicVideo, clips: Dataset, count: int) -> str:
    """A hash of all that latents depend on: which clips, how cut, how many, and the encoder's weights."""
    digest = hashlib.sha256(f"{clips.identity()} {count}".encode())
    for part in (model.vae.encoder, model.vae.quant_conv):
        for weight in part.state_dict().values():
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def latents_of(model: MagicVideo, items: list[tuple[int, dict]], stage: str) -> list[tuple[int, dict]]:
    """A step's items, clips or latents -> all as latents; in stage image every frame is one by itself."""
    items = [(place, item if "mean" in item else encode(model, item)) for place, item in items]
    if stage != "image":
        return items
    return [(place * len(item["mean"]) + k, {**item, "mean": mean[None], "logvar": logvar[None]})
            for place, item in items for k, (mean, logvar) in enumerate(zip(item["mean"], item["logvar"]))]


def stacked(items: list[tuple[int, dict]], name: str, like: Tensor) -> Tensor:
    """One kind of tensor of all items, on the device and in the precision of `like`."""
    return torch.stack([item[name] for _, item in items]).to(like)
