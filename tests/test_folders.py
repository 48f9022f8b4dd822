"""Clips and captions are found as people keep them, and every clip is decoded once."""

import fcntl
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import folders
from clip_files import read_clip, write_clip
from conftest import clip_of_bytes
from data import ClipFolder
from folders import find_clips, is_numbered
from runs import InputError


@pytest.fixture
def video():
    return clip_of_bytes()


def folder_of(tmp_path, video, *names):
    for name in names:
        write_clip(tmp_path / name, video, 8)
    return tmp_path


def refused(path, *words, frames=8, **settings):
    with pytest.raises(InputError) as caught:
        ClipFolder(path, frames=frames, size=32, **settings)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


# --------------------------------------------------------------------------------------------------
# Which files are clips


def test_all_unusable_clips_are_named_at_once_or_left_out_where_asked(
        tmp_path, video, monkeypatch):
    clips = folder_of(tmp_path, video, "clips/good.gif") / "clips"
    for name in ("bad.gif", "bad.webp", "worse.png"):
        (clips / name).write_text("this is no clip\n" * 20)
    refused(clips, "3 of 4 clips", "bad.gif: cannot be read", "bad.webp: cannot", "worse.png: ")
    (clips / "gone.gif").symlink_to("nowhere")
    (clips / "round").symlink_to(clips)
    kept = ClipFolder(clips, 8, 32, skip_unusable=True, store=tmp_path / "store")
    assert kept.names == ["good.gif"] and len([n for n in kept.notes if "left out: " in n]) == 4
    assert "; 4 clips left out" in kept.notes[0] and ", and 1 hidden files or " in kept.notes[0]
    monkeypatch.setattr(folders, "read_clip", lambda *_: read_clip(clips / "good.gif", 32))
    assert len(ClipFolder(clips, 8, 32, store=tmp_path / "store")) == 5  # what was wrong is mended
    (clips / "good.gif").rename(tmp_path / "good.gif")
    monkeypatch.setattr(folders, "read_clip", read_clip)
    refused(clips, "4 of 4 clips", skip_unusable=True)



def test_clips_lie_at_any_depth_and_what_is_none_is_passed_over(tmp_path, video):
    folder_of(tmp_path, video, "videos/b.gif", "videos/deep/a.gif", "runs/one/clip.gif", "._a.gif",
              "__MACOSX/a.gif")
    (tmp_path / "runs" / "one" / "log.csv").write_text("stage,step,loss,held_out_loss\n")
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
    assert "; 4 other files passed over, and 3 hidden files or folders of runs" in clips.notes[0]
    assert "metadata.jsonl: line 2: 'cover.png' is no clip; 1 such lines" in clips.notes[1]


def test_a_folder_with_a_log_of_someone_else_is_read(tmp_path, video):
    folder_of(tmp_path, video, "day/a.gif", "night/b.gif", "run/c.gif")
    (tmp_path / "day" / "log.csv").write_text("time,place\n12:00,here\n")
    (tmp_path / "night" / "log.csv").touch()
    (tmp_path / "day" / "checkpoint.pt").touch()
    (tmp_path / "run" / "log.csv").write_text("stage,step,loss,held_out_loss\nvae,1,0.5,\n")
    clips = ClipFolder(tmp_path, 2, 16)
    assert clips.names == ["day/a.gif", "night/b.gif"]
    assert "and 1 hidden files or folders of runs" in clips.notes[0]
    assert ClipFolder(tmp_path / "run", 2, 16).names == ["c.gif"]  # asked for by name


def test_what_cannot_be_looked_into_is_one_line_and_left_out_where_asked(
        tmp_path, video, monkeypatch):
    folder_of(tmp_path, video, "a.gif", "closed/b.gif")
    for name in ("frames", "locked"):
        (tmp_path / name).mkdir()
        for k in range(1, 5):
            Image.new("RGB", (16, 16), (k, 0, 0)).save(tmp_path / name / f"{k}.png")
    (tmp_path / "frames" / "2.png").unlink()
    (tmp_path / "frames" / "2.png").symlink_to("gone.png")
    (tmp_path / "locked" / ".#2.png").symlink_to("me@here:1234")  # as Emacs locks 2.png
    (tmp_path / "locked" / "._3.png").write_text("of macOS")
    (tmp_path / "b.webm").symlink_to("gone.webm")
    os.mkfifo(tmp_path / "c.gif")  # whoever opens it waits for ever
    iterdir = Path.iterdir

    def closed(folder):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", closed)
    refused(tmp_path, "3 of 5 clips", "closed: cannot be read (Permission denied)",
            "b.webm: cannot be read (No such file or directory)",
            "frames: cannot be read (2.png: No such file or directory)", frames=2)
    clips = ClipFolder(tmp_path, 2, 16, skip_unusable=True)
    assert clips.names == ["a.gif", "locked"] and "; 3 clips left out" in clips.notes[0]
    assert clips.clips[1].total == 4
    refused(tmp_path / "closed", ".: cannot be read (Permission denied)", skip_unusable=True)


def test_a_damaged_picture_refuses_its_clip_and_is_named(tmp_path):
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    clip = tmp_path / "clips" / "clip"
    clip.mkdir(parents=True)
    for damaged in ("1.png", "2.png", "3.png"):
        for name in ("1.png", "2.png", "3.png"):
            content = (tmp_path / name).read_bytes()
            (clip / name).write_bytes(content[:20] if name == damaged else content)
        refused(clip.parent, "1 of 1 clips", f"clip: cannot be read ({damaged}: ", frames=2)


def test_finding_ten_thousand_pictures_takes_as_many_steps_as_ten_times_a_thousand(
        tmp_path, monkeypatch):
    Image.new("L", (1, 1)).save(tmp_path / "0.png")
    content = (tmp_path / "0.png").read_bytes()
    compared = []
    monkeypatch.setattr(Path, "__eq__", lambda a, b: compared.append(1) or str(a) == str(b))
    steps = []
    for count in (100, 1000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for k in range(count):
            (folder / f"f{k}.png").write_bytes(content)
        compared.clear()
        assert is_numbered(folder)
        steps.append(len(compared))
    assert steps[1] <= 10 * steps[0] + 100


def test_clips_that_sort_alike_have_one_order(tmp_path, video):
    names = ["a1.gif", "a01.gif", "a001.gif", "a1b2.gif", "a1b.gif"]
    orders = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder_of(folder, video[:2], *names)
        names.reverse()
        orders.append([clip.name for clip in find_clips(folder)[0]])
    assert orders[0] == orders[1] == ["a001.gif", "a01.gif", "a1.gif", "a1b2.gif", "a1b.gif"]


# --------------------------------------------------------------------------------------------------
# Captions




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
    assert "prompts.txt: not used for captions; they " in ClipFolder(tmp_path, 2, 16).notes[1]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.gif", "text": "\\ud800 \u732b"}')
    assert ClipFolder(tmp_path, 2, 16).captions == ["? \u732b"]
    (tmp_path / "metadata.jsonl").unlink()
    for text, encoding in (("un caf\xe9 noir", "cp1252"), ("\u7ea2\u8272", "gbk")):
        (tmp_path / "a.txt").write_text(text, encoding)
        refused(tmp_path, "a.txt: its encoding is not UTF-8", "save it as UTF-8")



@pytest.mark.parametrize("name, content, words", [
    ("metadata.jsonl", '{"file_name": "../a.gif", "text": "x"}', ["line 1", "no clip"]),
    ("metadata.jsonl", '\n{"file_name": "c.gif", "text": "x"}', ["line 2", "'c.gif'", "no clip"]),
    ("metadata.jsonl", '{"file_name": "a.gif", "text": "x"}\n{"file_name": ', ["line 2", "read"]),
    ("metadata.jsonl", '{"file_name": "a.gif", "text": 3}', ["line 1", "and text", "text: 3"]),
    ("metadata.jsonl", '{"file_name": "a.gif", "text": ["x", 3]}', ["line 1", "and text"]),
    ("metadata.jsonl", '{"file_name": "", "text": "x"}', ["line 1", "file_name and text"]),
    ("metadata.jsonl", '{"file_name": ["a.gif"], "text": "x"}', ["line 1", "file_name and text"]),
    ("metadata.jsonl", '{"file_name": "b", "text": "x"}', ["line 1: 'b' may be b.gif or b.webp"]),
    ("metadata.jsonl", '{"file_name": "B.WEBM", "text": "x"}', ["line 1: 'B.WEBM' is no clip"]),
    ("metadata.jsonl", "[1, 2]", ["line 1", "file_name and text"]),
    ("metadata.json", "[" * 100_000, ["line 1 cannot be read", "correct it"]),
    ("metadata.json", "[" + "1" * 5000 + "]", ["line 1 cannot be read"]),
    ("metadata.json", "3", ["line 1 cannot be read"]),
    ("metadata.json", '[{"file_name": "a.gif",\n"text": "x"},\n{"a" 1}]', ["line 3 cannot be read"]),
    ("metadata.csv", "file,said\na.gif,x\n", ["line 2", "file_name and text", "said: 'x'"]),
    ("metadata.csv", "file_name,text\na.gif\n", ["line 2", "file_name and text"]),
    ("metadata.csv", "file_name,text\na.gif,red, moving\n", ["line 2", "in quotes"]),
    ("metadata.csv", "file_name,text\na.gif," + "x" * 200_000, ["line 1", "field larger"]),
])
def test_captions_that_cannot_be_right_are_refused(tmp_path, video, name, content, words):
    folder_of(tmp_path, video, "a.gif", "b.gif", "b.webp")
    (tmp_path / name).write_text(content)
    refused(tmp_path, name, *words)


def test_rows_are_read_as_people_and_their_tools_write_them(tmp_path, video):
    folder_of(tmp_path / "clips", video, "a.gif", "Caf\u00e9.gif", "sub/B.GIF", "d.gif", "e.gif",
              "stra\u00dfe.gif")
    rows = [{"file_name": "a.gif", "text": None},
            {"file_name": "cafe\u0301.gif", "text": "another form of the accent, another case"},
            {"file_name": "sub\\b.gif", "text": "of Windows"},
            {"file_name": "STRASSE.gif", "text": "of a system in capitals"},
            {"file_name": "d.gif", "text": ["one of several", "another", "a third"]},
            {"file_name": "D.gif ", "text": "a row more", "more": ["a column of any name"]},
            {"file_name": "e.gif", "text": float("nan")}]
    (tmp_path / "clips" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "clips" / "metadata.csv").write_text("file_name,text\ne.gif,from a table more\n")
    clips = ClipFolder(tmp_path / "clips", 2, 16)
    assert dict(zip(clips.names, clips.captions)) == {
        "a.gif": "", "Caf\u00e9.gif": rows[1]["text"], "sub/B.GIF": "of Windows",
        "d.gif": "one of several", "e.gif": "from a table more",
        "stra\u00dfe.gif": "of a system in capitals"}
    assert "3 captions are not used: of several the first is the clip's" in clips.notes
    for name, text in (("a", ""), ("sub/b", "beside it")):  # a table's caption goes before
        (tmp_path / "clips" / f"{name}.txt").write_text("beside it")
    assert ClipFolder(tmp_path / "clips", 2, 16).captions[1:3] == ["beside it", "one of several"]


def test_equal_captions_of_a_clip_and_exact_names_are_not_spoken_of(tmp_path, video):
    folder_of(tmp_path, video, "a.gif", "A.gif")
    if len([*tmp_path.iterdir()]) == 1:
        pytest.skip("names of one case here")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.gif,x\nA.gif,y\na.gif,x\n")
    clips = ClipFolder(tmp_path, 2, 16)
    assert (clips.names, clips.captions, len(clips.notes)) == (["A.gif", "a.gif"], ["y", "x"], 1)
    (tmp_path / "captions.csv").write_text("file_name,text\nA.GIF,x\n")
    refused(tmp_path, "captions.csv: line 2: 'A.GIF' may be A.gif or a.gif; write the whole name")


def test_of_several_tables_the_first_in_order_counts(tmp_path, video, monkeypatch):
    folder_of(tmp_path, video, "a.gif")
    for name in ("captions.csv", "metadata.csv", "prompts.csv"):
        (tmp_path / name).write_text(f"file_name,text\na.gif,of {name}\n")
    iterdir = Path.iterdir
    for reverse in (False, True):  # as file systems list them
        monkeypatch.setattr(Path, "iterdir", lambda folder, reverse=reverse: iter(
            sorted(iterdir(folder), reverse=reverse)))
        assert ClipFolder(tmp_path, 2, 16).captions == ["of captions.csv"]


def test_a_row_that_names_a_file_outside_the_folder_is_refused(tmp_path, video):
    folder_of(tmp_path, video, "a.gif", "clips/b.gif")
    for name in ("../a.gif", str(tmp_path / "a.gif")):
        (tmp_path / "clips" / "metadata.jsonl").write_text(
            json.dumps({"file_name": name, "text": "x"}))
        refused(tmp_path / "clips", "metadata.jsonl: line 1", "a.gif", "outside", "remove the line")
    ClipFolder(tmp_path, 2, 16)  # inside the larger folder


def test_messages_of_tables_stay_short(tmp_path, video):
    folder_of(tmp_path, video, "a.gif")
    for row in ({"file_name": "x" * 15_000, "text": "y"}, {"z" * 15_000: "y" * 15_000},
                {"z\nz": "y\ny"}):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(InputError, match="^.{,400}$"):
            ClipFolder(tmp_path, 2, 16)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "a.txt").symlink_to("gone")
    refused(tmp_path, "a.txt: cannot be read (No such file or directory)")


# --------------------------------------------------------------------------------------------------
# The store of decoded frames


@pytest.fixture
def decoded(monkeypatch):
    """The names of the clips that are decoded, as they are."""
    names = []
    monkeypatch.setattr(folders, "read_clip", lambda clip, *how: names.append(clip.name)
                        or read_clip(clip, *how))
    return names


def frames_of(clips):
    return [clips.pixels[clip.start : clip.start + clip.total].copy() for clip in clips.clips]


def test_a_clip_is_decoded_once_and_alone_when_it_is_new_or_has_changed(tmp_path, video, decoded):
    clips = folder_of(tmp_path, video, "clips/a.gif", "clips/b.gif") / "clips"
    store = tmp_path / "store"
    first = ClipFolder(clips, 4, 32, store=store)
    again = ClipFolder(clips, 2, 32, seed=1, store=store)
    assert sorted(decoded) == ["a.gif", "b.gif"] and first.clips == again.clips
    assert np.array_equal(first.pixels, again.pixels)
    before = frames_of(first)
    write_clip(clips / "b.gif", -video, 8)
    write_clip(clips / "c.gif", video, 8)
    changed = ClipFolder(clips, 4, 32, store=store)
    assert sorted(decoded[2:]) == ["b.gif", "c.gif"]
    for frames, clip in zip(frames_of(changed), ("a", "b", "c")):
        assert np.array_equal(frames, read_clip(clips / f"{clip}.gif", 32)[0])
    for frames, unchanged in zip(frames_of(first), before):  # another training goes on
        assert np.array_equal(frames, unchanged)
    (clips / "a.gif").unlink()
    assert ClipFolder(clips, 4, 32, store=store).names == ["b.gif", "c.gif"] and len(decoded) == 4


@pytest.mark.parametrize("change", ["folder", "size", "max_frames", "format", "name", "head"])
def test_a_store_is_of_one_folder_size_length_and_format_and_knows_clips_by_content(
        tmp_path, video, decoded, monkeypatch, change):
    folder_of(tmp_path, video, "one/a.gif")
    content = (tmp_path / "one" / "a.gif").read_bytes()
    other = bytearray(content)
    other[200] ^= 1  # a color of the palette, in the first 4 KiB
    os.utime(tmp_path / "one" / "a.gif", (1e9, 1e9))
    settings = {"size": 32, "max_frames": 8}
    ClipFolder(tmp_path / "one", 4, store=tmp_path / "store", **settings)
    folder = tmp_path / "one"
    if change == "folder":  # of equal names, sizes and times
        folder = tmp_path / "two"
        folder.mkdir()
        (folder / "a.gif").write_bytes(content)
    elif change == "name":
        (folder / "a.gif").rename(folder / "b.gif")
    elif change == "head":
        (folder / "a.gif").write_bytes(other)
    elif change == "format":
        monkeypatch.setattr(folders, "STORE_FORMAT", folders.STORE_FORMAT + 1)
    else:
        settings[change] -= 1
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    clips = ClipFolder(folder, 4, store=tmp_path / "store", **settings)
    assert len(decoded) == 2 and clips.pixels.shape[1] == settings["size"]
    assert np.array_equal(frames_of(clips)[0], read_clip(
        next(folder.iterdir()), settings["size"], settings["max_frames"])[0])


def test_names_that_are_no_text_are_names(tmp_path, video, decoded):
    folder_of(tmp_path, video, "clips/a.gif")
    try:
        os.rename(tmp_path / "clips" / "a.gif", os.fsencode(tmp_path / "clips") + b"/\xff.gif")
    except OSError:
        pytest.skip("names are text here")
    for _ in range(2):
        assert len(ClipFolder(tmp_path / "clips", 4, 32, store=tmp_path / "store")) == 1
    assert len(decoded) == 1


def test_a_linked_folder_has_the_store_of_the_folder(tmp_path, video, decoded):
    clips = folder_of(tmp_path, video, "clips/a.gif") / "clips"
    (tmp_path / "link").symlink_to(clips)
    for path in (clips, tmp_path / "link", tmp_path / "clips" / ".." / "clips"):
        ClipFolder(path, 4, 32, store=tmp_path / "store")
    assert decoded == ["a.gif"]


def test_frames_of_a_folder_of_pictures_are_decoded_anew_when_one_has_changed(
        tmp_path, video, decoded):
    clip = tmp_path / "clips" / "clip"
    clip.mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(clip / f"{k}.png")
    for k in (None, 0, 1, 2):
        if k is not None:
            Image.new("RGB", (8, 8), (9, k, 0)).save(clip / f"{k}.png")
        (clip / "notes.txt").write_text(f"{k}")  # which is no part of the clip
        clips = ClipFolder(clip.parent, 2, 8, store=tmp_path / "store")
        assert np.array_equal(frames_of(clips)[0], read_clip(clip, 8)[0])
    assert decoded == ["clip"] * 4


def test_a_store_that_is_not_whole_is_made_anew(tmp_path, video, decoded):
    clips = folder_of(tmp_path, video, "clips/a.gif") / "clips"
    store = tmp_path / "store"
    whole = ClipFolder(clips, 4, 16, store=store).pixels.copy()
    for suffix, damage in ((".u8", lambda content: content[:-1]), (".index", lambda _: b"{"),
                           (".index", lambda _: b"[1]"), (".index", lambda _: b'{"clips": 1}')):
        [file] = store.glob(f"*{suffix}")
        file.write_bytes(damage(file.read_bytes()))
        assert np.array_equal(ClipFolder(clips, 4, 16, store=store).pixels, whole)
        assert len([*store.iterdir()]) == 3  # pixels, index, lock
    assert len(decoded) == 5


def test_clips_that_change_again_and_again_do_not_fill_the_disk(tmp_path, video, decoded):
    clips = folder_of(tmp_path, video, "clips/a.gif", "clips/b.gif") / "clips"
    for k in range(12):
        write_clip(clips / "b.gif", video * (k + 1) / 12, 8)
        ClipFolder(clips, 4, 16, store=tmp_path / "store")
        [pixels] = (tmp_path / "store").glob("*.u8")
        assert pixels.stat().st_size <= 5 * 16 * 16 * 16 * 3
    assert decoded.count("b.gif") == 12 and decoded.count("a.gif") <= 3


def test_a_killed_decoding_goes_on_where_it_was_and_leaves_nothing(tmp_path, video, decoded):
    clips = folder_of(tmp_path, video, *(f"clips/{k}.gif" for k in range(9))) / "clips"
    store = tmp_path / "store"
    add = folders.FrameStore.add

    def add_and_die(frame_store, *clip):
        add(frame_store, *clip)
        if len(frame_store.clips) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for seconds, dies_at, known in ((600, 3, 0), (-1, 3, 2), (-1, 6, 5)):
        child = os.fork()
        if not child:
            try:
                folders.FrameStore.add = add_and_die
                folders.SAVE_SECONDS = seconds
                ClipFolder(clips, 4, 16, store=store)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        indices = [json.loads(file.read_text()) for file in store.glob("*.index")]
        assert sum(len(index["clips"]) for index in indices) == known
    whole = ClipFolder(clips, 4, 16, store=store)
    assert len(decoded) == 4 and len([*store.iterdir()]) == 3
    for frames, name in zip(frames_of(whole), whole.names):
        assert np.array_equal(frames, read_clip(clips / name, 16)[0])
    assert whole.pixels.shape[0] == 72 and next(store.glob("*.u8")).stat().st_size == 72 * 768


def test_of_several_processes_one_decodes_and_the_others_wait_and_say_so(
        tmp_path, video, decoded, capsys):
    clips = folder_of(tmp_path, video, "clips/a.gif") / "clips"
    ClipFolder(clips, 4, 16, store=tmp_path / "store")
    assert "waiting" not in capsys.readouterr().out
    [lock] = (tmp_path / "store").glob("*.lock")
    with open(lock, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=ClipFolder, args=(clips, 4, 16), kwargs={
            "store": tmp_path / "store"})
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(20)
    assert not thread.is_alive() and decoded == ["a.gif"]
    assert capsys.readouterr().out == f"{clips}: waiting for another process that decodes it\n"


def test_where_there_are_no_locks_every_process_decodes_for_itself(
        tmp_path, video, decoded, monkeypatch):
    clips = folder_of(tmp_path, video, "clips/a.gif") / "clips"

    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    for _ in range(2):
        read = ClipFolder(clips, 4, 16, store=tmp_path / "store")
        assert np.array_equal(frames_of(read)[0], read_clip(clips / "a.gif", 16)[0])
    assert len(decoded) == 2 and not [*(tmp_path / "store").glob("*.u8")]


def test_a_long_decoding_says_how_far_it_is_and_uses_the_cores_it_may(
        tmp_path, video, monkeypatch, capsys):
    clips = folder_of(tmp_path, video, "clips/a.gif", "clips/b.gif", "clips/c.gif") / "clips"
    counts = []
    pool = folders.ThreadPool
    monkeypatch.setattr(folders, "ThreadPool", lambda count: counts.append(count) or pool(count))
    monkeypatch.setattr(folders, "usable_cores", lambda: 3)
    monkeypatch.setattr(folders, "SAVE_SECONDS", -1)
    ClipFolder(clips, 4, 16)
    assert counts == [3] and capsys.readouterr().out.splitlines() == [
        f"{clips}: {done} of 3 clips decoded" for done in (1, 2, 3)]
    ClipFolder(clips, 4, 16, max_frames=2**31 // (2 * 16 * 16 * 3))  # two clips fill 2 GB
    assert counts == [3, 2]


def test_the_index_names_only_frames_that_are_on_the_disk(tmp_path, video, monkeypatch):
    clips = folder_of(tmp_path, video, "clips/a.gif") / "clips"
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(folders.os, name, lambda *a, name=name, real=real: order.append(name)
                            or real(*a))
    ClipFolder(clips, 4, 16, store=tmp_path / "store")
    assert order[-2:] == ["fsync", "replace"]


def test_a_disk_that_is_too_small_is_one_line_and_what_was_decoded_stays(
        tmp_path, video, decoded, monkeypatch):
    clips = folder_of(tmp_path, video, "clips/a.gif") / "clips"
    store = tmp_path / "store"
    ClipFolder(clips, 4, 32, store=store)
    write_clip(clips / "b.gif", video, 8)
    add = folders.FrameStore.add

    def fill_disk(self, key, frames, rate):
        with open(self.pixels, "ab") as file:
            file.write(b"half a clip")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.FrameStore, "add", fill_disk)
    refused(clips, f"--frame-store {store}", "cannot be written (No space left on device); make "
            "room", store=store)
    [pixels] = store.glob("*.u8")
    assert pixels.stat().st_size == 8 * 32 * 32 * 3
    monkeypatch.setattr(folders.FrameStore, "add", add)
    ClipFolder(clips, 4, 32, store=store)
    assert decoded == ["a.gif", "b.gif", "b.gif"]
    (tmp_path / "file").touch()
    refused(clips, f"--frame-store {tmp_path / 'file'}: ", "cannot be", store=tmp_path / "file")
