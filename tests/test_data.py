"""The shapes keep their promises in pixels; a folder of clips is cut, captioned and split."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import lab.animations
from clip_files import read_clip
from data import (COLORS, MOTIONS, SHAPES, ClipFolder, PictureFolder, ShapesDataset, open_data,
                  open_pictures, sample_frames, shape_captions)
from runs import InputError
from test_folders import folder_of, refused, video  # noqa: F401

# --------------------------------------------------------------------------------------------------
# The shapes data set


def measure(item):
    """Measure an object: area, centre x, y, width and height of each frame, in frame sizes."""
    video = item["video"].numpy() * 0.5 + 0.5
    color = video.max((0, 2, 3))
    cover = np.abs(video - data.BACKGROUND).sum(1) / np.abs(color - data.BACKGROUND).sum()
    size = cover.shape[-1]  # cover is (f, h, w)
    ruler = (np.arange(size) + 0.5) / size
    area = cover.sum((1, 2))
    x = (cover.sum(1) * ruler).sum(1) / area
    y = (cover.sum(2) * ruler).sum(1) / area
    w = cover.max(1).sum(1) / size
    h = cover.max(2).sum(1) / size
    return cover, area / size**2, x, y, w, h, color


def test_24_of_144_captions_are_for_testing_and_spread_over_every_word():
    train = shape_captions("train")
    test = shape_captions("test")
    assert (len(train), len(test), len({*train, *test})) == (120, 24, 144)
    for words, times in ((COLORS, 3), (SHAPES, 8), (MOTIONS, 4)):
        for word in words:
            assert sum(word in caption for caption in test) == times
    assert len({tuple(caption.split()[1:3]) for caption in test}) == 24


@pytest.mark.parametrize("split", ["train", "test"])
def test_at_8_frames_a_second_every_caption_is_seen_in_the_pixels(split):
    clips = ShapesDataset(split, fps=8, seed=3)
    for i in range(len(clips.captions)):
        item = clips[i]
        _, color, shape, motion = item["caption"].split(" ", 3)
        _, area, x, y, w, h, seen = measure(item)
        assert item["video"].shape == (8, 3, 64, 64) and item["fps"] == 8
        assert item["video"].dtype == torch.float32 and item["video"].abs().max() <= 1
        assert np.allclose(seen, np.maximum(COLORS[color], data.BACKGROUND), atol=1e-6)
        # circle, square and triangle fill pi / 4, 1 and 1 / 2 of their boxes
        fill = {"circle": math.pi / 4, "square": 1, "triangle": 0.5}[shape]
        assert np.allclose(w, h, atol=0.033) and abs((area / (w * h)).mean() - fill) < 0.12
        right = x[-1] - x[0]
        down = y[-1] - y[0]
        growth = area[-1] / area[0]
        if motion in ("growing", "shrinking"):
            assert max(abs(right), abs(down)) < 0.1  # a triangle's centre is not its box's
            assert growth >= 2 if motion == "growing" else growth <= 0.5
        else:
            moved = {"left": -right, "right": right, "up": -down, "down": down}[motion.split()[1]]
            assert moved >= 0.3 and min(abs(right), abs(down)) < 1e-3 and abs(growth - 1) < 0.02


@pytest.mark.parametrize("frames, fps", [(1, None), (8, None), (16, 8), (40, 8)])
def test_the_whole_object_is_inside_the_frame_at_any_rate_and_length(frames, fps):
    clips = ShapesDataset(frames=frames, fps=fps)
    for i in range(120):
        cover = measure(clips[i])[0]
        border = np.stack([cover[:, 0], cover[:, -1], cover[:, :, 0], cover[:, :, -1]])
        assert border.max() < 1e-3, clips[i]["caption"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_item_depends_on_seed_index_and_epoch_alone(split):
    one = ShapesDataset(split, seed=1)
    same = ShapesDataset(split, seed=1)
    same.set_epoch(1)
    later = same[7]
    same.set_epoch(0)
    assert torch.equal(one[7]["video"], same[7]["video"]) and one[7]["fps"] == same[7]["fps"]
    other = ShapesDataset(split, seed=2)
    repeated = len(one.captions)  # the item of this number has the caption of item 0
    for a, b in ((one[7], other[7]), (one[0], one[repeated]), (one[7], later)):
        assert a["caption"] == b["caption"] and not torch.equal(a["video"], b["video"])


def test_the_pixels_are_those_of_every_earlier_version():
    ramp = torch.linspace(0, 1, 8 * 3 * 64 * 64).view(8, 3, 64, 64)
    stored = {0: (-0.4192388, 6.0), 17: (-0.3983881, 12.0), 43: (-0.3933135, 4.8)}
    for i, sums in stored.items():
        item = ShapesDataset("train", seed=5)[i]
        assert ((item["video"] * ramp).mean().item(), item["fps"]) == pytest.approx(sums, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Frames and FPS


@pytest.mark.parametrize("total, frames", [(8, 8), (22, 8), (300, 16), (5, 1), (1, 1), (2, 2)])
def test_frames_are_uniform_inside_the_video_and_v_is_their_rate(total, frames):
    rng = np.random.default_rng(0)
    strides = set()
    ends = set()
    for _ in range(400):
        indices, v = sample_frames(total, 24, frames, rng)
        assert len(indices) == frames and 0 <= indices[0] and indices[-1] < total
        strides.add(round(24 / v, 6))
        assert frames == 1 or {*np.diff(indices)} == {round(24 / v)}
        ends |= {indices[0], indices[-1]}
    longest = min(6, (total - 1) // (frames - 1)) if frames > 1 else 6
    assert strides == {*range(1, longest + 1)} and {0, total - 1} <= ends


def test_a_rate_asked_for_takes_the_nearest_stride_that_fits():
    for total, rate, fps, expected in ((100, 24, 8, 8), (100, 25, 8, 25 / 3), (100, 60, 8, 60 / 8),
                                       (15, 24, 8, 12), (8, 24, 8, 24), (100, 24, 100, 24)):
        assert sample_frames(total, rate, 8, np.random.default_rng(0), fps)[1] == expected
    for total in (1, 100):  # every stride fits a single frame
        indices, v = sample_frames(total, 24, 1, np.random.default_rng(0), fps=1)
        assert v == 1 and 0 <= indices[0] < total and indices.shape == (1,)


# --------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_reads_every_kind_of_clip_with_the_caption_of_every_convention(tmp_path, video):
    folder_of(tmp_path, video, "a.gif", "b.webp", "c.PNG", "clip10.gif", "clip9.gif")
    pictures, _ = read_clip(tmp_path / "a.gif")
    (tmp_path / "v1.0").mkdir()
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "v1.0" / f"{k + 3}.png")  # 10 after 9
    (tmp_path / ".hidden.gif").write_text("no clip")
    (tmp_path / "metadata.jsonl").write_bytes(
        b'\xef\xbb\xbf\n{"file_name": "a.gif", "text": "from  a\\nline \xc3\xa9"}\r\n\n')
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\n./b.webp,"a table, quoted"\nv1.0/,"a folder"\n')
    (tmp_path / "a.txt").write_text("not this")
    (tmp_path / "c.txt").write_text("beside it\n")
    clips = ClipFolder(tmp_path, frames=4, size=48)
    assert clips.captions == ["from a line \u00e9", "a table, quoted", "beside it", "", "",
                              "a folder"]
    truth = torch.from_numpy(pictures[:, :, 8:56]).permute(0, 3, 1, 2) / 127.5 - 1  # centre square
    drawn = set()
    for epoch in range(9):
        clips.set_epoch(epoch)
        for item in clips:
            assert item["video"].shape == (4, 3, 48, 48) and item["video"].dtype == torch.float32
            stride = round(8 / item["fps"])
            cuts = [truth[s : s + 3 * stride + 1 : stride] for s in range(8 - 3 * stride)]
            drawn.add((stride, [torch.equal(item["video"], cut) for cut in cuts].index(True)))
    assert drawn == {*((1, start) for start in range(5)), (2, 0), (2, 1)}  # all that there are


def test_every_item_is_of_its_own_clip_also_after_a_split(tmp_path):
    for k in range(12):
        video = torch.full((4, 3, 8, 8), k / 8 - 1)
        video[::2, :, 0] = 1  # frames of one picture would be written as a still
        folder_of(tmp_path, video, f"{k:02}.png")
        (tmp_path / f"{k:02}.txt").write_text(str(k))
    for part in (ClipFolder(tmp_path, 2, 8), *ClipFolder(tmp_path, 2, 8).split()):
        for item in part:
            assert (item["video"][:, :, 4] - int(item["caption"]) / 8 + 1).abs().max() < 0.01


def test_clips_of_other_sizes_are_cut_to_their_center_and_resized(tmp_path):
    left, middle, right = (torch.full((8, 3, 40, 40), value) for value in (-1.0, 0.2, 1.0))
    wide = torch.cat([left, middle, right], dim=3)
    wide[::2, :, 0] = 1  # frames of one picture would be written as a still
    folder_of(tmp_path, wide, "wide.webp")
    folder_of(tmp_path, wide.transpose(2, 3), "high.webp")
    for item in ClipFolder(tmp_path, frames=1, size=20):
        assert item["video"].shape == (1, 3, 20, 20)
        assert (item["video"][..., 2:-2, 2:-2] - 0.2).abs().max() < 0.01


def test_clips_named_in_a_file_are_held_out(tmp_path, video):
    folder_of(tmp_path, video, "clips/a.gif", "clips/b.gif", "clips/c/d.gif")
    (names := tmp_path / "names.txt").write_text("c/d.gif\n\na.gif\r\n")
    train, held_out = ClipFolder(tmp_path / "clips", 2, 16).split(str(names))
    assert train.names == ["b.gif"] and held_out.names == ["a.gif", "c/d.gif"]
    names.write_text("C\\D.GIF\n./a.gif")  # as Windows writes them
    assert ClipFolder(tmp_path / "clips", 2, 16).split(str(names))[1].names == held_out.names
    names.write_text("x" * 15_000)
    with pytest.raises(InputError, match="^.{,300}$"):
        ClipFolder(tmp_path / "clips", 2, 16).split(str(names))
    for lines in ("a.gif\ne.gif", "a.gif\nb.gif\nc/d.gif", ""):
        names.write_text(lines)
        with pytest.raises(InputError, match="names.txt: ('e.gif' is no clip|.* one a line)"):
            ClipFolder(tmp_path / "clips", 2, 16).split(str(names))


def test_every_tenth_clip_of_a_folder_is_held_out_and_a_subset_keeps_its_captions(tmp_path, video):
    names = [f"{n}.gif" for n in range(1, 13)]
    folder_of(tmp_path, video, *names)
    for n in range(1, 13):
        (tmp_path / f"{n}.txt").write_text(f"clip {n}")
    train, held_out = open_data(str(tmp_path), 2, 8)
    assert held_out.captions == ["clip 10"] and len(train) == 11
    assert train.captions[-1] == train[10]["caption"] == "clip 12"
    with pytest.raises(IndexError):
        train[11]
    assert [len(split) for split in map(shape_captions, ("train", "test"))] == [
        len(split.captions) for split in open_data("shapes", 2, 8)]


def test_the_same_clips_are_held_out_where_fewer_can_be_used(tmp_path, video):
    names = [f"{n:02}.gif" for n in range(1, 21)]
    folder_of(folder_of(tmp_path, video, *names), video[:3], "01.gif")
    for frames in (2, 4):
        folder = ClipFolder(tmp_path, frames, 8, skip_unusable=True)
        assert len(folder) == 20 - (frames == 4)
        assert folder.split()[1].names == ["10.gif", "20.gif"]


def test_clips_of_which_the_rest_is_not_used_are_counted(tmp_path, video):
    folder_of(folder_of(tmp_path, video, "a.gif", "b.gif"), video[:3], "short.gif")
    assert len(ClipFolder(tmp_path, 2, 16).notes) == 1
    notes = ClipFolder(tmp_path, 2, 16, max_frames=4).notes
    assert notes[1:] == ["of 2 clips the first 4 frames are used; --max-frames changes that"]


@pytest.mark.parametrize("count, held_out", [(1, [0]), (2, [0, 1]), (3, [2]), (9, [8]), (10, [9]),
                                             (20, [9, 19])])
def test_one_or_two_clips_are_all_trained_on_which_a_note_says(tmp_path, video, count, held_out):
    names = [f"{n:02}.gif" for n in range(count)]
    folder_of(tmp_path, video, *names)
    train, rest = open_data(str(tmp_path), 2, 8)
    assert rest.names == [names[i] for i in held_out]
    assert train.names == (names if count < 3 else [n for n in names if n not in rest.names])
    assert any("too few to hold one out" in note for note in train.notes) == (count < 3)


def test_pictures_of_the_shapes_are_one_object_anywhere_without_a_word_of_motion():
    pictures, held_out = open_pictures("shapes", 32)
    assert {*pictures.captions} == {f"a {c} {s}" for c in COLORS for s in SHAPES}
    assert pictures[3]["caption"] == pictures.captions[3] == held_out[3]["caption"]
    assert pictures[3]["video"].shape == (1, 3, 32, 32)
    assert not torch.equal(pictures[3]["video"], held_out[3]["video"])
    places, sides = [], []
    for i in range(0, 240, 3):  # circles
        mask = pictures[i]["video"][0].max(0).values > 0
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert 0 < rows.min() and rows.max() < 31 and 0 < columns.min() and columns.max() < 31
        places.append((rows.float().mean().item(), columns.float().mean().item()))
        sides.append(int(rows.max() - rows.min()))
    assert max(sides) > 2 * min(sides)
    for along in zip(*places):
        assert min(along) < 10 and max(along) > 21


def test_interpolation_takes_every_frame_of_the_clips_of_a_folder(tmp_path):
    video = torch.linspace(-1, 1, 30).view(30, 1, 1, 1).expand(30, 3, 8, 8)
    folder_of(tmp_path / "clips", video, "a.webp", "b.webp", "c.webp")
    for multiplier, fastest in ((1, False), (4, True)):
        clips, _ = open_data(str(tmp_path / "clips"), 5, 8, 0, multiplier)
        rates = set()
        for epoch in range(12):
            clips.set_epoch(epoch)
            rates.add(clips[0]["fps"])
        assert (len(rates) == 1) == fastest and max(rates) == clips.clips[0].rate


def test_every_picture_of_a_folder_is_one_and_of_animations_the_first_frame(tmp_path, video):
    folder_of(tmp_path, video, "moving.webp", "deep/moving.gif", "deep/film.png")
    for n, suffix in enumerate((".png", ".jpg", ".webp", ".bmp", ".gif")):
        Image.new("RGB", (20, 10), (250, 0, 0)).save(tmp_path / f"deep/{n}{suffix}")
        (tmp_path / f"deep/{n}.txt").write_text(f"number {n}")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "printed.jpg")
    (tmp_path / "film.mp4").write_text("not read")
    pictures = PictureFolder(tmp_path, 32)
    items = {name: item for name, item in zip(pictures.names, pictures)}
    assert len(items) == 9 and "9 pictures, decoded" in pictures.notes[0]
    assert "1 other files passed over" in pictures.notes[0] and len(pictures.notes) == 1
    for n, suffix in enumerate((".png", ".jpg", ".webp", ".bmp", ".gif")):
        assert items[f"deep/{n}{suffix}"]["caption"] == f"number {n}"
    for name in ("deep/0.png", "deep/1.jpg", "printed.jpg"):
        red = items[name]["video"].mean((0, 2, 3))
        assert items[name]["video"].shape == (1, 3, 32, 32) and red[0] > 0.9 and red[1] < -0.9
    first = [folder.pixels[folder.clips[folder.names.index("moving.webp")].start]
             for folder in (pictures, ClipFolder(tmp_path, 2, 32, skip_unusable=True))]
    assert np.array_equal(*first)
    trained, held_out = open_pictures(str(tmp_path), 32)
    assert len(trained) == 8 and len(held_out) == 1


def test_photographs_stand_upright(tmp_path):
    turned = Image.new("RGB", (8, 8))
    turned.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half, which is the right one
    exif = Image.Exif()
    exif[0x112] = 6
    turned.save(tmp_path / "photo.png", exif=exif)
    frame = PictureFolder(tmp_path, 8)[0]["video"][0, 0]
    assert frame[:, 5:].min() > 0.9 and frame[:, :3].max() < -0.9


def test_pictures_that_cannot_be_used_are_refused_as_clips_are(tmp_path, video):
    with pytest.raises(InputError, match="--images .*nowhere: no such folder"):
        PictureFolder(tmp_path / "nowhere", 8)
    with pytest.raises(InputError, match="--images .*: no pictures in it; put .png, .jpg"):
        PictureFolder(tmp_path, 8)
    (tmp_path / "a.jpg").write_bytes(b"damaged")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("nowhere")
    with pytest.raises(InputError, match="2 of 3 pictures cannot be used: a.jpg: .*; c.png: ") as e:
        PictureFolder(tmp_path, 8)
    assert "--skip-unusable" in str(e.value) and "--frames" not in str(e.value)
    kept = PictureFolder(tmp_path, 8, skip_unusable=True)
    assert kept.names == ["b.png"] and "; 2 pictures left out" in kept.notes[0]


def test_captions_of_the_shapes_that_a_file_names_are_held_out(tmp_path):
    file = tmp_path / "held_out.txt"
    file.write_text("a red circle growing\n\na blue square moving up \n")
    train, held_out = open_data("shapes", 2, 8, held_out=str(file))
    assert {*held_out.captions} == {"a red circle growing", "a blue square moving up"}
    assert len(train.captions) == 142 and not {*train.captions} & {*held_out.captions}
    assert held_out[1]["caption"] == held_out.captions[1]
    for text, words in (("a pink circle growing", "'a pink circle growing' is no caption"),
                        ("", "names 0 of 144 captions")):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            open_data("shapes", 2, 8, held_out=str(file))


def test_a_folder_named_shapes_is_spoken_of_and_read_under_its_path(
        tmp_path, video, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    open_data("shapes", 2, 8)
    assert capsys.readouterr().out == ""
    folder_of(tmp_path, video, "shapes/a.gif")
    assert isinstance(open_data("shapes", 2, 8)[0], ShapesDataset)
    assert "for the folder of that name give ./shapes" in capsys.readouterr().out
    assert open_data("./shapes", 2, 8)[0].names == ["a.gif"]
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------
# Bad input: one line that names the file and the remedy


def test_folders_that_are_none_and_clips_that_are_too_short_are_refused(tmp_path, video):
    refused(tmp_path / "missing", "missing: no such folder")
    (tmp_path / "notes.txt").write_text("a caption without a clip")
    refused(tmp_path / "notes.txt", "notes.txt: no such folder")
    refused(tmp_path, f"{tmp_path}: no clips in it", ".gif")
    folder_of(folder_of(tmp_path, video, "a.gif"), video[:3], "short.gif", "b.gif")
    refused(tmp_path, "b.gif: 3 of 8 frames; short.gif: 3 of 8", "--frames")
    refused(tmp_path, "--max-frames 4: a clip has 8", max_frames=4)
    with pytest.raises(InputError, match="7 frames of 8: .*--frames"):
        sample_frames(7, 24, 8, np.random.default_rng(0))


def test_the_folder_of_animations_is_made_once_and_never_of_nothing(tmp_path, monkeypatch, capsys):
    emoji = SimpleNamespace(EMOJI_DATA={"\u2600": {"en": ":sun:"}})
    monkeypatch.setitem(sys.modules, "emoji", emoji)
    made = [str(tmp_path / "source"), str(tmp_path / "clips")]
    with pytest.raises(InputError, match="source: no animations"):
        lab.animations.main(made)
    moving = torch.linspace(-1, 1, 2).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    folder_of(tmp_path / "source", moving, "2600.webp")
    lab.animations.main(made)
    before = sorted((tmp_path / "clips").iterdir())
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("clips", "link"):
        with pytest.raises(InputError, match=f"{out}: is there already; remove it, or name"):
            lab.animations.main([made[0], str(tmp_path / out)])
    assert sorted((tmp_path / "clips").iterdir()) == before and len(before) == 3
