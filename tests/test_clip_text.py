"""The tokenizer against OpenAI's own, the text transformer against Hugging Face's.

Tests that compare with another package skip with a reason where it is not installed.
"""

import gzip
import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import clip_text
from clip_text import (END, START, CausalSelfAttention, CLIPTextConfig, CLIPTextEncoder, Tokenizer,
                       join_pair, split_words)
from conftest import close, randn, shaken
from data import shape_captions

CAPTIONS = shape_captions("test")
ASTRONAUT = "an astronaut riding a horse on mars"
ASTRONAUT_IDS = [550, 18376, 6765, 320, 4558, 525, 7496]
ODD = [
    "", " ", "\n\t", "don’t", "Don't STOP", "it's we're I've I'm you'll he'd", "'ſ 'S", "re've'd",
    "&amp;amp; &lt;b&gt; &#39;s &nbsp;x", "ｆｕｌｌ ｗｉｄｔｈ １２３", "a🦄b👩‍🚀c 🇩🇪", "😀" * 20,
    "schÃ¶n", "naïve café", "İstanbul ǅ ß", "日本語のテキスト", "عربي ١٢٣", "a\u00a0b\u2003c\u0085d",
    "x\ud800y\udfff", "\ud83d\ude00", "a\x00b\x1fc", "<|startoftext|>a<|EndOfText|>b<|endoftext",
    "</w> <w>", "12345 3.14 1/2", "!!!???...", "\ufeffbom", "\u0301e\u0301", "aab" * 90,
]


@pytest.fixture(scope="module")
def clip_folder():
    spec = importlib.util.find_spec("clip")  # finds the package without importing it
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "bpe_simple_vocab_16e6.txt.gz").is_file():
        pytest.skip("openai-clip is not installed: its vocabulary is what this test compares with")
    return folder


@pytest.fixture(scope="module")
def clip_tokenizer(clip_folder):
    return Tokenizer.from_clip(clip_folder)


@pytest.fixture(scope="module")
def openai_tokenizer(clip_folder):
    spec = importlib.util.spec_from_file_location("theirs", clip_folder / "simple_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def odd_strings(count, seed):
    """Words, odd pieces and characters from all of Unicode, joined with and without blanks."""
    rng = random.Random(seed)
    words = "the of horse astronaut extraordinarily LEFT o'clock &quot; &amp;#39; http://x.org #1"
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0xFF01, 0xFF5F), (0x1F300, 0x1F650),
              (1, 0x10FFFF)]
    kinds = [lambda: rng.choice(words.split()), lambda: rng.choice(ODD)[:40],
             lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz'", k=rng.randint(1, 30))),
             lambda: "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(4))]
    for _ in range(count):
        parts = [rng.choice(kinds)() for _ in range(rng.randint(1, 12))]
        yield rng.choice(["", " ", "  "]).join(parts)


@pytest.mark.parametrize("text, ids", [(ASTRONAUT, ASTRONAUT_IDS), ("dog", [1929]),
                                       ("don’t", [847, 713]), ("", [])])
def test_known_captions_have_clips_ids(clip_tokenizer, text, ids):
    assert clip_tokenizer.encode(text) == ids
    assert clip_tokenizer(text).tolist() == [[49406, *ids, *[49407] * (76 - len(ids))]]


def test_10_000_odd_strings_and_one_long_word_have_the_ids_of_openais_tokenizer(
        clip_tokenizer, openai_tokenizer):
    long = "".join(random.Random(1).choices("aab", k=600))
    for text in [*ODD, long, *odd_strings(10_000, seed=0)]:
        ids = clip_tokenizer.encode(text)
        assert ids == openai_tokenizer.encode(text), ascii(text)
        plain = [n for n in ids if n < 49406]
        assert clip_tokenizer.decode(ids) == openai_tokenizer.decode(plain).strip(), ascii(text)


def test_every_kind_of_vocabulary_file_gives_the_same_tokenizer(
        clip_folder, clip_tokenizer, tmp_path):
    packed = clip_folder / "bpe_simple_vocab_16e6.txt.gz"
    text = gzip.decompress(packed.read_bytes()).decode("utf-8")
    (tmp_path / "bpe_simple_vocab_16e6.txt").write_text(text, encoding="utf-8")
    (tmp_path / "hf").mkdir()
    lines = ["#version: 0.2", *text.split("\n")[1 : 48894 + 1], ""]
    (tmp_path / "hf" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    for path in (packed, str(tmp_path), tmp_path / "hf", tmp_path / "hf" / "merges.txt"):
        assert Tokenizer.from_clip(path).merges == clip_tokenizer.merges
    ids = (clip_tokenizer.start, clip_tokenizer.end, clip_tokenizer.vocab_size)
    assert ids == (49406, 49407, 49408)


def test_a_list_of_merges_is_read_with_and_without_its_header_and_blank_lines(tmp_path):
    for text in ("a b\nab c</w>", "#version: 0.2\na b\n\nab c</w>\n"):
        (tmp_path / "merges.txt").write_text(text)
        assert Tokenizer.from_clip(tmp_path).merges == [("a", "b"), ("ab", "c</w>")]


def test_a_vocabulary_of_transformers_has_its_merges_as_texts_or_as_pairs(tmp_path):
    pairs = [("a", "b"), ("ab", "c</w>")]
    for merges in (["a b", "ab c</w>"], pairs):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
        assert Tokenizer.from_clip(tmp_path).merges == pairs


def test_rows_have_77_ids_or_as_many_as_asked_for(tmp_path):
    (tmp_path / "merges.txt").write_text("a b\n")
    assert Tokenizer([])("").shape == Tokenizer.train([], 514)("").shape == (1, 77)
    assert Tokenizer.from_clip(tmp_path)("").shape == (1, 77)
    assert Tokenizer.from_clip(tmp_path, 9)("").shape == (1, 9)


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CAPTIONS, vocab_size=700, context_length=12)


def test_training_captions_and_words_never_seen_come_back_from_their_ids(trained):
    for text in [*CAPTIONS, "a purple hexagon", "größer als 日本", "x"]:
        assert trained.decode(trained.encode(text)) == text
    assert trained.decode(trained(CAPTIONS[0])[0]) == CAPTIONS[0]


def test_half_a_character_is_decoded_as_the_replacement_character(trained):
    assert trained.decode(trained.encode("ß")[:1]) == "\ufffd"


def test_training_ends_when_every_word_is_one_token_or_the_size_is_reached(trained):
    assert trained.vocab_size < 700
    assert all(len(trained.encode(text)) == len(text.split()) for text in CAPTIONS)
    assert Tokenizer.train(CAPTIONS, vocab_size=530).vocab_size == 530
    assert Tokenizer.train([], vocab_size=1000).vocab_size == 514


def merges_by_recounting(captions, vocab_size):
    """Learn merges as the textbook has it: count all pairs again before each merge."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts if word not in (START, END)}
    merges = []
    while len(merges) < vocab_size - 514:
        pairs = Counter()
        for word, symbols in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {word: join_pair(symbols, merges[-1]) for word, symbols in words.items()}
    return merges


def random_captions(seed):
    """Make captions of words that repeat, with letters that repeat, and now and then odd ones."""
    rng = random.Random(seed)
    letters = rng.choice(["a", "ab", "aab", "abcdefgh", "aé", "日本語猫", "a🦄👩‍🚀", "a'!</w>09"])
    words = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 15))]
    words += rng.choices([*ODD, "", "", "", ""], k=2)
    return [rng.choice([" ", " ", ""]).join(rng.choices(words, k=8)) for _ in range(8)]


def test_training_learns_the_merges_of_counting_all_pairs_again_each_time():
    for seed in range(150):
        captions = random_captions(seed)
        most = [3, 20, 10_000][seed % 3]
        merges = Tokenizer.train(captions, 514 + most).merges
        assert merges == merges_by_recounting(captions, 514 + most), captions


def test_a_merge_visits_only_the_words_that_hold_its_pair(monkeypatch):
    visited = []
    monkeypatch.setattr("clip_text.join_pair", lambda symbols, pair: (
        visited.append(symbols) or join_pair(symbols, pair)))
    words = [x + y for x in "abcdefghijklmnopqrst" for y in "abcdefghijklmnopqrst"]
    merges = Tokenizer.train([" ".join(words)], vocab_size=10_000).merges
    assert len(merges) == len(visited) == 400  # no two words have a pair in common


def worked_example(number):
    """Read one of the two worked examples in the comments of clip_text.py, "name  value" a line."""
    _, block = Path(clip_text.__file__).read_text("utf-8").split("# Worked example")
    examples = re.findall(r"(?:^#     .+\n)+", block, re.MULTILINE)
    assert len(examples) == 2
    return dict(line[1:].split(maxsplit=1) for line in examples[number].splitlines())


def check_worked_example(example, tokenizer):
    words = split_words(example["text"])
    assert words == example["words"].split()
    ids = tokenizer.encode(example["text"])
    assert [tokenizer._symbols[n] for n in ids] == example["symbols"].split()
    assert ids == [int(n) for n in example["ids"].split()]
    tokens = tokenizer(example["text"])[0].tolist()
    first, *last = example["tokens"].split(" ... ")  # left out are repetitions of the last
    first = [int(n) for n in first.split()]
    assert tokens == [*first, *[int(n) for n in last] * (len(tokens) - len(first))]


def test_the_worked_example_is_what_clips_tokenizer_gives(clip_tokenizer):
    example = worked_example(0)
    assert example["text"].lower() == ASTRONAUT
    check_worked_example(example, clip_tokenizer)


def test_the_worked_example_is_what_a_trained_tokenizer_gives():
    example = worked_example(1)
    tokenizer = Tokenizer.train([example["train"]], vocab_size=514 + 3, context_length=6)
    assert tokenizer.merges == [tuple(pair.split()) for pair in example["merges"].split(", ")]
    check_worked_example(example, tokenizer)


def test_the_introduction_joins_horse_as_clip_does(clip_tokenizer):
    source = Path(clip_text.__file__).read_text("utf-8")
    chain = [form.split() for form in re.search("h o r s e.*", source)[0].split("->")]
    forms = [["h", "o", "r", "s", "e</w>"]]
    for pair in clip_tokenizer.merges:
        if join_pair(forms[-1], pair) != forms[-1]:
            forms.append(join_pair(forms[-1], pair))
    assert chain == forms


def test_training_takes_the_most_frequent_pair_and_of_equals_the_alphabetically_first():
    merges = Tokenizer.train(["xyc abab", "abab xyc", "abd"], vocab_size=1000).merges
    expected = [("a", "b")]  # 3 times, the next four twice, the last once
    expected += [("a", "b</w>"), ("ab", "ab</w>"), ("x", "y"), ("xy", "c</w>"), ("ab", "d</w>")]
    assert merges == expected


def test_rows_are_start_the_first_tokens_of_the_caption_and_end_tokens(trained):
    texts = ["a red circle growing", "red " * 10_000, "", " \n"]
    tokens = trained(texts)
    assert tokens.shape == (4, 12) and tokens.dtype == torch.int64
    for row, text in zip(tokens.tolist(), texts):
        ids = trained.encode(text)[:10]
        assert row == [trained.start, *ids, *[trained.end] * (11 - len(ids))]
    assert torch.equal(trained(texts[0]), tokens[:1])


def test_impossible_vocabularies_are_refused():
    with pytest.raises(ValueError, match="513.*514"):
        Tokenizer.train(CAPTIONS, vocab_size=513)
    assert Tokenizer.train(CAPTIONS, vocab_size=514).merges == []
    for second in (("cd", "a"), ("a", "cd"), ("a", "b"), ("x" * 999, "a")):
        with pytest.raises(ValueError, match="must join two known symbols into a new one") as error:
            Tokenizer([("a", "b"), second])
        assert len(str(error.value)) < 100


@pytest.mark.parametrize("name, content", [
    ("none.txt.gz", None),
    (".", None),
    ("merges.txt", b"#version: 0.2\na b\nthree words here\n"),
    ("merges.txt", b"two words\nper line\n"),
    ("merges.txt", b"a b\n" + b"x" * 10_000 + b" y\n"),
    ("merges.txt", b"\xff\xfe\x00\x01"),
    ("tokenizer.json", b'{"model": 3}'),
    ("tokenizer.json", b'{"model": {}}'),
    ("vocab.txt.gz", b"a b\n"),
    ("vocab.txt.gz", gzip.compress(b"#version: 0.2\na b\nab c\n")[:-12]),
    ("vocab.txt.gz", gzip.compress(b"a b\n")[:10] + b"\xff" * 20),
])
def test_a_file_that_is_missing_or_no_list_of_merges_is_named_in_one_line(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        Tokenizer.from_clip(tmp_path / name)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 200


SMALL = CLIPTextConfig(vocab_size=99, context_length=16, width=24, layers=3, heads=4)


@pytest.fixture(scope="module")
def encoder():
    return shaken(CLIPTextEncoder(SMALL))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [16, 5])
def test_outputs_equal_those_of_transformers_clip_text_model(encoder, tokens, length):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=99, max_position_embeddings=16, hidden_size=24, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, hidden_act="quick_gelu", bos_token_id=97,
        eos_token_id=98, attn_implementation="sdpa"))  # "eager" takes its softmax in float32
    theirs = theirs.double().eval()
    names = [name for name in theirs.state_dict() if not name.endswith("position_ids")]
    # transformers 5 has no prefix
    prefix = "" if names[0].startswith("text_model.") else "text_model."
    weights = encoder.state_dict()
    assert {prefix + name for name in names} == {*weights}
    theirs.load_state_dict({name: weights[prefix + name] for name in names}, strict=False)
    expected = theirs(tokens[:, :length]).last_hidden_state
    assert close(encoder(tokens[:, :length]), expected, 1e-9)


def test_attention_is_the_formula_written_out():
    attention = shaken(CausalSelfAttention(24, heads=4))
    x = randn(2, 7, 24)
    outputs = []
    for head in range(4):
        own = slice(6 * head, 6 * head + 6)
        q = attention.q_proj(x)[..., own]
        k = attention.k_proj(x)[..., own]
        v = attention.v_proj(x)[..., own]
        later = torch.ones(7, 7).triu(1).bool()
        scores = (q @ k.transpose(1, 2) / 6**0.5).masked_fill(later, -float("inf"))
        outputs.append(scores.softmax(-1) @ v)
    assert close(attention(x), attention.out_proj(torch.cat(outputs, -1)), 1e-9)


def test_changing_a_later_token_leaves_earlier_outputs_bit_identical(encoder, tokens):
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % 99
    before = encoder(tokens)
    after = encoder(other)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


def test_more_tokens_than_positions_are_refused(encoder):
    with pytest.raises(ValueError, match="17 tokens.* 16 positions"):
        encoder(torch.zeros(1, 17, dtype=torch.int64))


def test_token_embeddings_start_at_size_1_and_positions_at_a_hundredth_of_it():
    embeddings = CLIPTextEncoder(CLIPTextConfig(1000, 100, 64, 1, 1)).text_model.embeddings
    assert 0.98 < embeddings.token_embedding.weight.std() < 1.02
    assert 0.0095 < embeddings.position_embedding.weight.std() < 0.0105


def test_the_encoder_at_full_size_is_stable_diffusions_196_tensors():
    assert CLIPTextConfig() == CLIPTextConfig(49408, 77, width=768, layers=12, heads=12)
    with torch.device("meta"):  # no memory behind it
        weights = CLIPTextEncoder(CLIPTextConfig()).state_dict().values()
    assert len(weights) == 196 and sum(p.numel() for p in weights) == 123_060_480
