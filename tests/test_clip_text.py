"""The tokenizer against OpenAI's own, the text transformer against Hugging Face's, and what must hold without either.

Tests that compare with another package skip with a reason where that package is not installed.
"""

import copy
import gzip
import importlib.util
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from clip_text import CausalSelfAttention, CLIPTextConfig, CLIPTextEncoder, Tokenizer, split_words

CAPTIONS = [
    f"a {color} {shape} {motion}"
    for color in ("red", "green", "blue")
    for shape in ("circle", "square", "triangle")
    for motion in ("moving left", "moving right", "growing", "shrinking")
]
ASTRONAUT = "an astronaut riding a horse on mars"
ASTRONAUT_IDS = [550, 18376, 6765, 320, 4558, 525, 7496]
ODD = [
    "", " ", "\n\t", "don’t", "Don't STOP", "it's we're I've I'm you'll he'd", "'ſ 'S", "re've'll'd",
    "&amp;amp; &lt;b&gt; &#39;s &nbsp;x", "ｆｕｌｌ ｗｉｄｔｈ １２３", "a🦄b👩‍🚀c 🇩🇪", "😀" * 50, "schÃ¶n", "naïve café",
    "İstanbul ǅ ß", "日本語のテキスト", "عربي ١٢٣", "a\u00a0b\u2003c\u0085d", "x\ud800y\udfff", "\ud83d\ude00", "a\x00b\x1fc",
    "<|startoftext|>a<|EndOfText|>b<|endoftext", "</w> <w>", "a" * 300, "12345 3.14 1/2", "!!!???...", "\ufeffbom",
    "\N{COMBINING ACUTE ACCENT}e\N{COMBINING ACUTE ACCENT}",
]


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer with CLIP's own vocabulary


@pytest.fixture(scope="module")
def clip_folder():
    spec = importlib.util.find_spec("clip")                 # finds the package without importing it (and torchvision)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "bpe_simple_vocab_16e6.txt.gz").is_file():
        pytest.skip("openai-clip is not installed: its vocabulary file is what this test compares with")
    return folder


@pytest.fixture(scope="module")
def clip_tokenizer(clip_folder):
    return Tokenizer.from_clip(clip_folder)


@pytest.fixture(scope="module")
def openai_tokenizer(clip_folder):
    spec = importlib.util.spec_from_file_location("simple_tokenizer", clip_folder / "simple_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def odd_strings(count, seed):
    """Words, odd pieces and characters from all of Unicode, joined with and without blanks."""
    rng = random.Random(seed)
    words = "the of horse astronaut riding extraordinarily Moving LEFT o'clock &quot; &amp;#39; http://x.org #1".split()
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0xFF01, 0xFF5F), (0x1F300, 0x1F650), (1, 0x10FFFF)]
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.4:
                parts.append(rng.choice(words))
            elif kind < 0.6:
                parts.append(rng.choice(ODD)[:40])
            elif kind < 0.75:
                parts.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz'", k=rng.randint(1, 30))))
            else:
                parts.append("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 6))))
        yield rng.choice(["", " ", " ", "  "]).join(parts)


def test_the_special_ids_and_the_size_are_clips(clip_tokenizer):
    assert (clip_tokenizer.start, clip_tokenizer.end, clip_tokenizer.vocab_size) == (49406, 49407, 49408)
    assert len(clip_tokenizer.merges) == 48894


@pytest.mark.parametrize("text, ids", [(ASTRONAUT, ASTRONAUT_IDS), ("dog", [1929]), ("don’t", [847, 713]), ("", [])])
def test_known_captions_have_clips_ids(clip_tokenizer, text, ids):
    assert clip_tokenizer.encode(text) == ids


def test_20_000_strings_have_the_ids_that_openais_tokenizer_gives(clip_tokenizer, openai_tokenizer):
    long = (" ".join(odd_strings(40, seed)) for seed in range(1, 101))  # about 200 words each
    for text in [*ODD, *odd_strings(20_000, seed=0), *long]:
        assert clip_tokenizer.encode(text) == openai_tokenizer.encode(text), ascii(text)


def test_a_long_word_has_the_ids_that_openais_tokenizer_gives(clip_tokenizer, openai_tokenizer):
    rng = random.Random(1)
    for letters in ("abcdefghijklmnopqrstuvwxyz", "aab", "-=_", "ha"):
        word = "".join(rng.choices(letters, k=600))
        assert clip_tokenizer.encode(word) == openai_tokenizer.encode(word)


def test_decoding_gives_what_openais_tokenizer_gives(clip_tokenizer, openai_tokenizer):
    for text in odd_strings(200, seed=2):
        ids = [n for n in clip_tokenizer.encode(text) if n < 49406]
        assert clip_tokenizer.decode(ids) == openai_tokenizer.decode(ids).strip()


def test_one_caption_is_start_words_and_end_tokens_up_to_77(clip_tokenizer):
    assert clip_tokenizer(ASTRONAUT).tolist() == [[49406, *ASTRONAUT_IDS, *[49407] * 69]]


def test_the_txt_the_gz_and_the_folder_of_either_give_the_same_tokenizer(clip_folder, clip_tokenizer, tmp_path):
    text = gzip.decompress((clip_folder / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
    (tmp_path / "bpe_simple_vocab_16e6.txt").write_text(text, encoding="utf-8")
    (tmp_path / "hf").mkdir()
    merges = ["#version: 0.2", *text.split("\n")[1 : 48894 + 1], ""]
    (tmp_path / "hf" / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    for path in (tmp_path, str(tmp_path / "bpe_simple_vocab_16e6.txt"), tmp_path / "hf", tmp_path / "hf/merges.txt"):
        assert Tokenizer.from_clip(path).merges == clip_tokenizer.merges


def test_a_caption_of_ten_thousand_words_keeps_its_start_and_its_end_token(clip_tokenizer):
    ids = clip_tokenizer("horse " * 10_000)[0].tolist()
    assert ids == [49406, *clip_tokenizer.encode("horse") * 75, 49407]


# ---------------------------------------------------------------------------------------------------------------------
# A tokenizer learned from captions: no file needed


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CAPTIONS, vocab_size=600, context_length=12)


def test_training_captions_and_words_never_seen_come_back_from_their_ids(trained):
    for text in [*CAPTIONS, "a purple hexagon", "größer als 日本", "x"]:
        assert trained.decode(trained.encode(text)) == text


def test_decoding_drops_start_end_and_padding(trained):
    assert trained.decode(trained("a red circle growing")[0]) == "a red circle growing"


def test_training_ends_when_every_word_is_one_token(trained):
    assert trained.vocab_size < 600
    for text in CAPTIONS:
        assert len(trained.encode(text)) == len(text.split())


def test_training_stops_at_the_vocabulary_size_asked_for():
    assert Tokenizer.train(CAPTIONS, vocab_size=530).vocab_size == 530
    assert Tokenizer.train(CAPTIONS, vocab_size=514).merges == []
    assert Tokenizer.train([], vocab_size=1000).vocab_size == 514


def naive_merges(captions, count):
    """BPE by the book: count all pairs again after every merge."""
    words = Counter(word for caption in captions for word in split_words(caption))
    words = [([*word[:-1], word[-1] + "</w>"], n) for word, n in words.items()]
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for symbols, n in words:
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[0]
        merges.append(best)
        for symbols, _ in words:
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def test_training_takes_the_most_frequent_pair_and_of_equals_the_alphabetically_first(trained):
    rng = random.Random(4)
    repeats = [" ".join("".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(6)) for _ in range(20)]
    assert trained.merges == naive_merges(CAPTIONS, 86)
    assert Tokenizer.train(repeats, vocab_size=800).merges == naive_merges(repeats, 286)


def test_training_does_not_depend_on_the_order_of_the_captions(trained):
    assert Tokenizer.train(CAPTIONS[::-1], vocab_size=600).merges == trained.merges


def test_no_learned_symbol_reaches_across_words(trained):
    words = {word for text in CAPTIONS for word in text.split()}
    for left, right in trained.merges:
        assert any((left + right).removesuffix("</w>") in word for word in words)


def test_the_list_of_merges_rebuilds_the_tokenizer(trained):
    again = Tokenizer([list(pair) for pair in trained.merges], trained.context_length)        # as JSON would hold it
    assert torch.equal(again(CAPTIONS), trained(CAPTIONS))
    assert (again.merges, again.vocab_size, again.end) == (trained.merges, trained.vocab_size, trained.end)


def test_a_batch_is_int64_and_as_wide_as_the_context(trained):
    tokens = trained(CAPTIONS)
    assert tokens.shape == (len(CAPTIONS), 12) and tokens.dtype == torch.int64
    assert torch.equal(trained(CAPTIONS[3]), tokens[3:4])


def test_padding_is_the_end_token(trained):
    row = trained("a red circle growing")[0].tolist()
    assert row == [trained.start, *trained.encode("a red circle growing"), *[trained.end] * 7]


def test_truncation_keeps_the_first_tokens_and_the_end_token(trained):
    row = trained("red " * 100)[0].tolist()
    assert row == [trained.start, *trained.encode("red " * 10), trained.end]


def test_an_empty_caption_is_start_and_end_tokens_alone(trained):
    assert trained("").tolist() == trained(" \n").tolist() == [[trained.start, *[trained.end] * 11]]


def test_a_lone_surrogate_reads_as_the_replacement_character(trained):
    assert trained.encode("red \ud800 circle") == trained.encode("red \ufffd circle")


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="513.*514"):
        Tokenizer.train(CAPTIONS, vocab_size=513)


def test_a_merge_of_symbols_never_made_is_refused():
    with pytest.raises(ValueError, match="merge 2"):
        Tokenizer([("a", "b"), ("ab", "cd")])
    with pytest.raises(ValueError, match="merge 2"):
        Tokenizer([("a", "b"), ("a", "b")])


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no tokenizer


def one_line_naming(error, path):
    message = str(error.value)
    return "\n" not in message and str(path) in message and "merges.txt" in message


@pytest.mark.parametrize("name", ["none.txt.gz", "."])
def test_a_missing_file_or_an_empty_folder_is_named_with_the_remedy(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer.from_clip(tmp_path / name)
    assert one_line_naming(error, tmp_path / name)


@pytest.mark.parametrize("name, content", [
    ("merges.txt", b""),
    ("merges.txt", b"#version: 0.2\n"),
    ("merges.txt", b'{"a": 1, "b": 2}\n'),
    ("merges.txt", b"#version: 0.2\na b\nthree words here\n"),
    ("merges.txt", b"two words\nper line\n"),
    ("merges.txt", b"\xff\xfe\x00\x01"),
    ("vocab.txt.gz", b"a b\n"),
    ("vocab.txt.gz", gzip.compress(b"#version: 0.2\na b\nab c\n")[:-12]),
    ("vocab.txt.gz", gzip.compress(b"a b\n")[:10] + b"\xff" * 20),
])
def test_a_file_that_is_no_list_of_merges_is_named_with_the_remedy(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_clip(tmp_path / name)
    assert one_line_naming(error, tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer

SMALL = CLIPTextConfig(vocab_size=99, context_length=16, width=24, layers=3, heads=4)


def shaken(module, seed=0):
    """All weights random and far from their start, in float64, so that no mistake hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
    return module.double().eval()


@pytest.fixture(scope="module")
def encoder():
    return shaken(CLIPTextEncoder(SMALL))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [16, 5])
@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@torch.no_grad()
def test_outputs_equal_those_of_transformers_clip_text_model(encoder, tokens, length, dtype, within):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=99, max_position_embeddings=16, hidden_size=24, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, hidden_act="quick_gelu", bos_token_id=97, eos_token_id=98, attn_implementation="sdpa",
    )).to(dtype).eval()                                     # "eager" takes its softmax in float32 and so is off by 1e-7
    prefix = "" if any(name.startswith("text_model.") for name in theirs.state_dict()) else "text_model."    # 5.x: none
    weights = encoder.state_dict()
    assert {prefix + n for n in theirs.state_dict() if not n.endswith("position_ids")} == set(weights)
    theirs.load_state_dict({name.removeprefix(prefix): weight for name, weight in weights.items()}, strict=False)
    ours = copy.deepcopy(encoder).to(dtype)
    difference = ours(tokens[:, :length]) - theirs(tokens[:, :length]).last_hidden_state
    assert difference.abs().max() < within


@torch.no_grad()
def test_attention_is_the_formula_written_out():
    attention = shaken(CausalSelfAttention(24, heads=4))
    x = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    heads = []
    for head in range(4):
        q, k, v = (to(x)[..., 6 * head : 6 * head + 6] for to in (attention.q_proj, attention.k_proj, attention.v_proj))
        scores = q @ k.transpose(1, 2) / 6**0.5
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(attention(x), attention.out_proj(torch.cat(heads, -1)), rtol=0, atol=1e-9)


def test_names_and_shapes_at_full_size_are_those_of_stable_diffusion():
    with torch.device("meta"):
        weights = CLIPTextEncoder(CLIPTextConfig()).state_dict()
    shapes = {name.removeprefix("text_model."): tuple(weight.shape) for name, weight in weights.items()}
    expected = {
        "embeddings.token_embedding.weight": (49408, 768),
        "embeddings.position_embedding.weight": (77, 768),
        "final_layer_norm.weight": (768,),
        "final_layer_norm.bias": (768,),
    }
    for n in range(12):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            expected[f"encoder.layers.{n}.{part}.weight"] = (768, 768)
            expected[f"encoder.layers.{n}.{part}.bias"] = (768,)
        for part in ("layer_norm1", "layer_norm2"):
            expected |= {f"encoder.layers.{n}.{part}.{kind}": (768,) for kind in ("weight", "bias")}
        for part, shape in (("mlp.fc1", (3072, 768)), ("mlp.fc2", (768, 3072))):
            expected[f"encoder.layers.{n}.{part}.weight"] = shape
            expected[f"encoder.layers.{n}.{part}.bias"] = shape[:1]
    assert shapes == expected and all(name.startswith("text_model.") for name in weights)
    assert len(weights) == 196 and sum(weight.numel() for weight in weights.values()) == 123_060_480


@torch.no_grad()
def test_changing_a_later_token_leaves_earlier_outputs_bit_identical(encoder, tokens):
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 99
    before, after = encoder(tokens), encoder(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


@torch.no_grad()
def test_every_caption_of_a_batch_is_read_by_itself(encoder, tokens):
    torch.testing.assert_close(encoder(tokens)[1:], encoder(tokens[1:]), rtol=0, atol=1e-12)


def test_gradients_reach_every_weight(tokens):
    encoder = shaken(CLIPTextEncoder(SMALL))
    (encoder(tokens) ** 2).sum().backward()
    for name, p in encoder.named_parameters():
        if not name.endswith("k_proj.bias"):                # a shift of all keys cancels in the softmax
            assert p.grad.abs().sum() > 0, name


def test_a_new_encoder_starts_as_clip_does_with_words_further_apart():
    torch.manual_seed(0)
    encoder = CLIPTextEncoder(CLIPTextConfig(vocab_size=512, context_length=77, width=128, layers=2, heads=4))
    weights = {name.removeprefix("text_model."): p.detach() for name, p in encoder.named_parameters()}
    stds = {"token_embedding": 1.0, "position_embedding": 0.01, "q_proj": 128**-0.5, "k_proj": 128**-0.5,
            "v_proj": 128**-0.5, "out_proj": 128**-0.5 / 2, "fc1": 256**-0.5, "fc2": 128**-0.5 / 2}
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in kind:
            assert (weight == 1).all(), name
        else:
            assert weight.std().item() == pytest.approx(stds[kind], rel=0.05), name


def test_more_tokens_than_positions_are_refused(encoder):
    with pytest.raises(ValueError, match="17 tokens.*16"):
        encoder(torch.zeros(1, 17, dtype=torch.int64))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 10.*3 heads"):
        CLIPTextEncoder(CLIPTextConfig(width=10, heads=3))
