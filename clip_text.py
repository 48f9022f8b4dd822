"""CLIP's text encoder (Radford et al. 2021): a caption goes in, one vector per token comes out.

The tokenizer comes first, then the transformer; both give exactly what CLIP gives. The paper (§3)
takes both over and keeps them frozen; here they can also be trained from scratch, at any size
(ours). In `unet3d.py` every frame reads the vectors by cross-attention. Read `magicvideo.py` next:
it assembles all parts into one model.
"""

import gzip
import heapq
import html
import json
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------
# The tokenizer: text -> ids
#
# A network wants small whole numbers. One number per word leaves no number for a word never seen;
# one per letter makes long sequences of parts that mean little. Byte-pair encoding (BPE) stands
# between. Start from single bytes, then join the two neighbours that occur together most often into
# one new symbol, and again, thousands of times:
#
#     h o r s e</w>   ->   h or s e</w>   ->   h or se</w>   ->   hor se</w>   ->   horse</w>
#
# A frequent word ends as one symbol, a rare one as a few, and any text at all still has its bytes
# to fall back on. The list of joins ("merges"), in the order in which they were learned, is the
# whole tokenizer. `</w>` marks a word's last symbol, so that "art" alone and "art" in "artist" are
# two different symbols.
#
#     ids:   0..255 the bytes | 256..511 the same with </w> | one per merge, in order | start | end

START = "<|startoftext|>"
END = "<|endoftext|>"
CLIP_MERGES = 49408 - 512 - 2  # OpenAI's file lists 262,144 merges; CLIP uses the first 48,894
CLIP_FILES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt",
              "tokenizer.json")

# A word is an English ending ('s, 'll), a run of letters, a single digit, or a run of other
# characters that are not white space. START and END, written out, are words too.
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

# Merges are kept as text, so every byte needs a printable character: the 188 printable Latin-1
# bytes stand for themselves and come first, the other 68 (space, control bytes) borrow the
# characters from 256 on.
_printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
              *range(ord("®"), ord("ÿ") + 1)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_TO_CHAR = {byte: chr(byte) for byte in _printable}
BYTE_TO_CHAR |= {byte: chr(256 + n) for n, byte in enumerate(_others)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def split_words(text: str) -> list[str]:
    """Split text into cleaned, lower-case words, each byte one printable character (matches CLIP).

    Cleaning repairs broken Unicode (curly quotes and full-width letters turn plain), undoes HTML
    escapes twice, as web captions are often escaped twice, and turns each run of white space into
    one blank.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    words = WORD.findall(text)
    return ["".join(BYTE_TO_CHAR[byte] for byte in word.encode("utf-8")) for word in words]


def join_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair of neighbours, the leftmost first."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] = "".join(pair)
        else:
            joined.append(symbol)
    return joined


def learn_merges(counts: dict[str, int], limit: int) -> list[tuple[str, str]]:
    """Learn merges: join the most frequent pair of neighbours, again and again (Sennrich 2016).

    `counts` says how often each word occurs. Of equally frequent pairs the alphabetically first is
    joined. Returns at most `limit` pairs, fewer if every word has become one symbol.
    """
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    pairs = Counter()  # how often each pair occurs
    holders = defaultdict(set)  # the words that hold a pair, or held it earlier
    for word, symbols in words.items():
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += counts[word]
            holders[pair].add(word)
    # Counting all pairs again after each merge would take minutes. A merge changes only the words
    # that hold its pair, so only these are counted again. The heap gives the most frequent pair
    # first. A pair whose count changes enters the heap again; its older entries are skipped.
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < limit:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            continue  # an older entry
        merges.append(best)
        changed = set()
        for word in holders.pop(best):
            before = words[word]
            words[word] = join_pair(before, best)
            change = Counter(zip(words[word], words[word][1:]))
            change.subtract(zip(before, before[1:]))
            for pair, difference in change.items():
                if difference != 0:
                    pairs[pair] += difference * counts[word]
                    holders[pair].add(word)
                    changed.add(pair)
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
    return merges


class Tokenizer:
    """Turn captions into token ids and back, by a list of merges (paper §3; matches CLIP).

    merges: pairs of symbols in the order in which they were learned; nothing else needs saving.
    context_length: how many ids a row has.
    Raises ValueError for a merge that does not join two known symbols into a new one.
    """

    def __init__(self, merges: list[tuple[str, str]], context_length: int = 77):
        symbols = [*BYTE_TO_CHAR.values(), *(char + "</w>" for char in BYTE_TO_CHAR.values())]
        known = set(symbols)
        for left, right in merges:
            if left not in known or right not in known or left + right in known:
                raise ValueError(f"{left[:9]!r} + {right[:9]!r}: a merge must join two known "
                                 "symbols into a new one")
            symbols.append(left + right)
            known.add(left + right)
        symbols += [START, END]
        self.merges = [(left, right) for left, right in merges]
        self.context_length = context_length
        self.vocab_size = len(symbols)
        self.start = self.vocab_size - 2
        self.end = self.vocab_size - 1
        self._symbols = symbols
        self._id_of = {symbol: n for n, symbol in enumerate(symbols)}
        self._rank = {pair: n for n, pair in enumerate(self.merges)}

    @classmethod
    def from_clip(cls, path: str | Path, context_length: int = 77) -> "Tokenizer":
        """Read bpe_simple_vocab_16e6.txt[.gz], merges.txt, tokenizer.json, or a folder with one.

        Raises FileNotFoundError if there is no such file, and ValueError if it is not a list of
        merges.
        """
        path = Path(path)
        files = [file for file in (path, *(path / name for name in CLIP_FILES)) if file.is_file()]
        if not files:
            raise FileNotFoundError(f"{path}: no tokenizer here; get {' or '.join(CLIP_FILES)}")
        file = files[0]
        try:
            raw = file.read_bytes()
            if file.suffix == ".json":  # transformers 5 writes it; a merge is "a b" or ["a", "b"]
                merges = json.loads(raw)["model"]["merges"]
                pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
            else:
                text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
                lines = text.split("\n")
                lines = lines[1:] if "#version" in lines[0] else lines
                pairs = [tuple(line.split()) for line in lines[:CLIP_MERGES] if line.strip()]
            return cls(pairs, context_length)
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a list of merges ({error}); get it again") from error

    @classmethod
    def train(cls, captions: list[str], vocab_size: int, context_length: int = 77) -> "Tokenizer":
        """Learn merges from captions: small data needs fewer symbols than CLIP's 49,408 (ours).

        No merge crosses the border of a word, so the vocabulary ends smaller than `vocab_size` once
        every word is one symbol. Raises ValueError if `vocab_size` is below 514.
        """
        if vocab_size < 514:
            raise ValueError(f"vocab_size {vocab_size}: give 514 (bytes, start, end) or more")
        counts = Counter(word for caption in captions for word in split_words(caption))
        counts = {word: n for word, n in counts.items() if word not in (START, END)}
        return cls(learn_merges(counts, vocab_size - 514), context_length)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, as many as it takes, without start and end tokens (matches CLIP)."""
        return [self._id_of[symbol] for word in split_words(text) for symbol in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        """Split a word into symbols: join the pair learned earliest, until none applies (as CLIP).

        START and END, written out in a caption, are symbols of their own.
        """
        if word in (START, END):
            return [word]
        symbols = [*word[:-1], word[-1] + "</w>"]
        while True:
            pairs = [pair for pair in zip(symbols, symbols[1:]) if pair in self._rank]
            if not pairs:
                return symbols
            symbols = join_pair(symbols, min(pairs, key=self._rank.get))

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text, with blanks between words and without start and end tokens."""
        chars = "".join(self._symbols[n] for n in ids if n not in (self.start, self.end))
        text = bytes(CHAR_TO_BYTE[char] for char in chars).decode("utf-8", errors="replace")
        return text.replace("</w>", " ").strip()

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Turn captions into ids, int64 (b, context_length): start, the caption, then end tokens.

        A caption that is too long loses its last tokens, never the end token. The padding is the
        end token, as in SD; OpenAI's CLIP pads with 0. Nothing masks the padding later, so it
        matters which it is.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), self.context_length), self.end)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text)[: self.context_length - 2]]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# Worked example: one caption from text to ids, with CLIP's merges.
#
#     text     An astronaut riding a horse on Mars
#     words    an astronaut riding a horse on mars
#     symbols  an</w> astronaut</w> riding</w> a</w> horse</w> on</w> mars</w>
#     ids      550 18376 6765 320 4558 525 7496
#     tokens   49406 550 18376 6765 320 4558 525 7496 49407 49407 ... 49407
#
# All these words are so frequent that each is one symbol. The row of 77 ids begins with the start
# token and is filled up with end tokens. Now the same with three merges, learned from the caption
# in the line "train", and with rows of 6 ids:
#
#     train    low low lower newest widest
#     merges   l o, e s, es t</w>
#     text     lowest
#     words    lowest
#     symbols  lo w est</w>
#     ids      512 86 514
#     tokens   515 512 86 514 516 516
#
# "l o" occurs three times and is joined first. "e s" and "s t</w>" occur twice each, and "e s" is
# first in the alphabet. The word "lowest" was never seen: two of its symbols were learned, by the
# first and the third merge (ids 512 and 514); "w" is a single byte. Start is 515 and end is 516.


# --------------------------------------------------------------------------------------------------
# The transformer: ids -> one vector per token
#
# Attributes keep the names of Hugging Face's CLIPTextModel, so that the weights of an SD 1.x
# `text_encoder/` load unchanged.


@dataclass
class CLIPTextConfig:
    """Set the sizes of the text transformer; the defaults are CLIP ViT-L/14's, as in SD 1.x."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12


class CausalSelfAttention(nn.Module):
    """Let each token read itself and those before it: x (b, l, width) -> same (matches CLIP)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, length, width = x.shape
        heads = (b, length, self.heads, width // self.heads)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (b, heads, l, width/heads)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        # A = softmax(Q K^T / sqrt(width/heads)), later tokens masked before the softmax
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).reshape(b, length, width))


class MLP(nn.Module):
    """Apply two linear layers with quick GELU, x * sigmoid(1.702 x), between (matches CLIP)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (b, l, 4*width)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class CLIPTextLayer(nn.Module):
    """Add attention(norm(x)) to x, then mlp(norm(x)): x (b, l, width) -> same (matches CLIP)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.self_attn = CausalSelfAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEncoder(nn.Module):
    """Turn token ids (b, l) into context (b, l, width) for cross-attention (paper §3; matches SD).

    Token embeddings start with standard deviation 1, not CLIP's 0.02 (ours). Single frames look
    the same for "left" and "right", so an encoder trained on them from scratch could make the two
    words alike if their embeddings were small.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        width = config.width
        layers = [CLIPTextLayer(width, config.heads) for _ in range(config.layers)]
        # the nesting only makes the names: text_model.embeddings.token_embedding.weight and so on
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.context_length, width)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "final_layer_norm": nn.LayerNorm(width, eps=1e-5)})
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens (b, l), int64, as (b, l, width). Raises ValueError if l is too long."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens: the encoder has {self.config.context_length} "
                             "positions")
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(tokens)  # (b, l, width)
        x = x + embeddings.position_embedding.weight[:length]
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)
