"""The words' half of MagicVideo: a caption in, one vector per token out, (b, 77, 768) at Stable Diffusion's size.

CLIP's text side, exactly (Radford et al. 2021, arXiv 2103.00020): byte-pair tokenizer first, transformer below.
The paper (§3) takes CLIP over, frozen; both halves can also be trained from scratch, at any size (ours).
In `unet3d.py` every frame reads them by cross-attention. Read `magicvideo.py` next: the parts made one.
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

# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer: text -> ids
#
# A network wants small whole numbers. One number per word leaves no number for a word never seen; one per letter makes
# long sequences of parts that mean little. Byte-pair encoding (BPE) stands between. Start from single bytes, then join
# the two neighbours that occur together most often into one new symbol, and again, thousands of times:
#
#     h o r s e</w>   ->   h or s e</w>   ->   h or se</w>   ->   hor se</w>   ->   horse</w>
#
# A frequent word ends as one symbol, a rare one as a few, and any text at all still has its bytes to fall back on. The
# list of joins ("merges"), in the order in which they were learned, is the whole tokenizer. `</w>` marks a word's last
# symbol, so that "art" alone and "art" in "artist" are two different symbols.
#
#     ids:   0..255 the bytes | 256..511 the same with </w> | one per merge, in order | start | end

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2           # OpenAI's file lists 262,144 merges and a header; CLIP uses the first 48,894
CLIP_FILES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt", "tokenizer.json")
REMEDY = (f"pass OpenAI's {CLIP_FILES[0]}, a Stable Diffusion tokenizer's merges.txt or tokenizer.json, or a folder "
          f"that holds one of them")

# What counts as a word: English endings ('s, 'll), a run of letters, one single digit, or a run of anything else.
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)

# Merges are kept as text, so every byte needs a character that can be printed: the 188 bytes that are printable Latin-1
# stand for themselves and come first, the other 68 (space, control bytes) borrow the characters from 256 on.
_printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_TO_CHAR = {byte: chr(byte) for byte in _printable} | {byte: chr(256 + n) for n, byte in enumerate(_others)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def split_words(text: str) -> list[str]:
    """text -> its cleaned, lower-case words, each byte one printable character (matches OpenAI's CLIP).

    Cleaning repairs broken Unicode (curly quotes and full-width letters turn plain, a lone surrogate becomes U+FFFD),
    undoes HTML escapes twice, since web captions are often escaped twice, and makes white space single blanks.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    return ["".join(BYTE_TO_CHAR[byte] for byte in word.encode("utf-8")) for word in WORD.findall(text)]


class Tokenizer:
    """Captions to token ids and back, by a list of merges (paper §3; matches OpenAI's CLIP, padding SD).

    merges: pairs of symbols in the order learned. They are all there is to save: `Tokenizer(merges)` is the same again.
    Raises ValueError for a merge of symbols that no earlier merge made, or into a symbol that is there already.
    """

    def __init__(self, merges: list[tuple[str, str]], context_length: int = 77):
        symbols = [*BYTE_TO_CHAR.values(), *(char + "</w>" for char in BYTE_TO_CHAR.values())]
        known = set(symbols)
        for n, (left, right) in enumerate(merges, start=1):
            if left not in known or right not in known or left + right in known:
                raise ValueError(f"merge {n}, {left!r} + {right!r}, does not make a new symbol out of two known ones")
            symbols.append(left + right)
            known.add(left + right)
        symbols += [START, END]
        self.merges = [(left, right) for left, right in merges]
        self.context_length = context_length
        self.vocab_size = len(symbols)
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1
        self._id_of = {symbol: n for n, symbol in enumerate(symbols)}
        self._symbol_of = dict(enumerate(symbols))
        self._rank = {pair: n for n, pair in enumerate(self.merges)}

    @classmethod
    def from_clip(cls, path: str | Path, context_length: int = 77) -> "Tokenizer":
        """The tokenizer in bpe_simple_vocab_16e6.txt[.gz], merges.txt, tokenizer.json, or in a folder that holds one.

        Raises FileNotFoundError for a missing file, and ValueError for one that is not a list of merges.
        """
        path = file = Path(path)
        if path.is_dir():
            file = next((path / name for name in CLIP_FILES if (path / name).is_file()), path)
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no tokenizer file here; {REMEDY}")
        try:
            raw = file.read_bytes()
            if file.suffix == ".json":  # transformers 5 writes the merges there alone, as "a b" or ["a", "b"]
                merges = json.loads(raw)["model"]["merges"]
                return cls([tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges], context_length)
            lines = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8").split("\n")
            lines = lines[1:] if "#version" in lines[0] else lines
            pairs = [tuple(line.split()) for line in lines[:CLIP_MERGES] if line.strip()]
            if not pairs or any(len(pair) != 2 for pair in pairs):
                raise ValueError("two symbols a line are expected")
            return cls(pairs, context_length)
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:  # bad gzip, UTF-8, merges
            raise ValueError(f"{file}: cannot be read as a list of merges ({error}); {REMEDY}") from error

    @classmethod
    def train(cls, captions: list[str], vocab_size: int, context_length: int = 77) -> "Tokenizer":
        """Learns merges from captions: small data needs no 49,408 symbols (ours; BPE as in Sennrich et al. 2016).

        Deterministic: of equally frequent pairs the alphabetically first is merged. Words never merge with each other,
        so the vocabulary ends smaller once every word is one symbol. Raises ValueError for vocab_size < 514.
        """
        if vocab_size < 514:
            raise ValueError(f"vocab_size is {vocab_size}: at least 514 are needed, 2 x 256 bytes and 2 special tokens")
        counts = Counter(word for caption in captions for word in split_words(caption) if word not in (START, END))
        words = [([*word[:-1], word[-1] + "</w>"], count) for word, count in counts.items()]
        pair_counts, words_with = Counter(), defaultdict(set)           # pair -> how often; in which of the words

        def tally(n: int, sign: int) -> None:
            symbols, count = words[n]
            for pair in zip(symbols, symbols[1:]):
                pair_counts[pair] += sign * count
                words_with[pair].add(n)

        for n in range(len(words)):
            tally(n, +1)
        merges = []
        while len(merges) < vocab_size - 514:
            most = max(pair_counts.values(), default=0)
            if most == 0:
                break                                                   # every word is one symbol
            best = min(pair for pair, count in pair_counts.items() if count == most)
            merges.append(best)
            for n in words_with.pop(best):
                tally(n, -1)
                symbols = words[n][0]
                for i in range(len(symbols) - 1):
                    if tuple(symbols[i : i + 2]) == best:               # never once i has passed the shrinking end
                        symbols[i : i + 2] = ["".join(best)]
                tally(n, +1)
        return cls(merges, context_length)

    def encode(self, text: str) -> list[int]:
        """text -> its ids, of any number, without start and end (matches OpenAI's `SimpleTokenizer.encode`).

        As there, "<|endoftext|>" written out in a caption is the end token itself.
        """
        return [self._id_of[symbol] for word in split_words(text) for symbol in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        """word -> its symbols: the earliest learned merge first, the leftmost first, until none applies.

        A heap holds the pairs that can merge. OpenAI's loop scans the whole word again for every merge, and caches; the
        heap finds the same symbols, fast enough without a cache even for one "word" of 100,000 letters.
        """
        if word in (START, END):
            return [word]
        symbols = [*word[:-1], word[-1] + "</w>"]
        before = list(range(-1, len(word) - 1))                         # the neighbours of each symbol still standing
        after = list(range(1, len(word) + 1))

        def rank(i: int) -> int | None:
            return self._rank.get((symbols[i], symbols[after[i]])) if after[i] < len(word) else None

        heap = [(rank(i), i) for i in range(len(word)) if rank(i) is not None]
        heapq.heapify(heap)
        while heap:
            learned, i = heapq.heappop(heap)
            if rank(i) != learned:
                continue                                                # one of the two has gone into another merge
            gone = after[i]
            symbols[i], symbols[gone] = symbols[i] + symbols[gone], ""
            after[i] = after[gone]
            if after[i] < len(word):
                before[after[i]] = i
            for j in (before[i], i):
                if j >= 0 and rank(j) is not None:
                    heapq.heappush(heap, (rank(j), j))
        return [symbol for symbol in symbols if symbol]

    def decode(self, ids: list[int]) -> str:
        """ids -> text, one blank after each word, start and end tokens dropped. Raises KeyError for an unknown id."""
        chars = "".join(self._symbol_of[n] for n in map(int, ids) if n not in (self.start, self.end))
        text = bytes(CHAR_TO_BYTE[char] for char in chars).decode("utf-8", errors="replace")
        return text.replace("</w>", " ").strip()

    def __call__(self, texts: str | list[str]) -> Tensor:
        """One caption or b of them -> int64 ids (b, context_length): start, the caption, then end tokens to the end.

        Captions that are too long lose their last tokens, never the end token. SD pads with the end token, OpenAI's
        CLIP with 0; nothing masks the padding later, so it matters.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), self.context_length), self.end)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text)[: self.context_length - 2]]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# ---------------------------------------------------------------------------------------------------------------------
# The transformer: ids -> one vector per token
#
# Attributes bear the names of Hugging Face's CLIPTextModel, so that an SD 1.x `text_encoder/` loads as it is.


@dataclass
class CLIPTextConfig:
    """Sizes of the text transformer; the defaults are CLIP ViT-L/14's, as in SD 1.x (123,060,480 parameters)."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12


class CausalSelfAttention(nn.Module):
    """Every token reads itself and the tokens before it: softmax(Q K^T / sqrt(d)) V (matches CLIP)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, l, width) -> the same shape."""
        b, length, width = x.shape
        q, k, v = (
            to(x).view(b, length, self.heads, width // self.heads).transpose(1, 2)       # (b, heads, l, width/heads)
            for to in (self.q_proj, self.k_proj, self.v_proj)
        )
        # A = softmax(Q K^T / sqrt(width/heads)), with -inf before the softmax where a token would read a later one
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).reshape(b, length, width))                # (b, l, width)


class MLP(nn.Module):
    """Two linear layers, 4 x width between them, and CLIP's quick GELU: x * sigmoid(1.702 x) (matches CLIP)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, l, width) -> the same shape."""
        x = self.fc1(x)                                                                  # (b, l, 4*width)
        return self.fc2(x * torch.sigmoid(1.702 * x))                                    # (b, l, width)


class CLIPTextLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): each step adds to the stream that it read (matches CLIP)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.self_attn = CausalSelfAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, l, width) -> the same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEncoder(nn.Module):
    """Token ids to the `context` that the U-Net's cross-attention reads (paper §3): all positions (as SD 1.x).

    Raises ValueError if the heads do not divide the width.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} does not divide into {config.heads} heads: choose a multiple")
        self.config = config
        # The nesting carries names only: text_model.embeddings.token_embedding.weight and so on.
        embeddings = {
            "token_embedding": nn.Embedding(config.vocab_size, config.width),
            "position_embedding": nn.Embedding(config.context_length, config.width),
        }
        layers = nn.ModuleList(CLIPTextLayer(config.width, config.heads) for _ in range(config.layers))
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict(embeddings),
            "encoder": nn.ModuleDict({"layers": layers}),
            "final_layer_norm": nn.LayerNorm(config.width, eps=1e-5),
        })
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """A start for training from scratch: OpenAI's, but for wide token embeddings and zero biases in the MLPs."""
        width, layers = self.config.width, self.config.layers
        # Embeddings: at OpenAI's 0.02 the first steps can make two words alike. Single frames say nothing of "left" and
        # "right", so stage image did, and stage video never told them apart again. At 1, words stay distinct (ours).
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=1.0)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)
        for layer in self.text_model.encoder.layers:
            # Readers: a normalised input comes out with variance 1, or 1/2 per hidden unit of the MLP.
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
            # Writers: two per layer add to the stream; 1/sqrt(2 layers) makes their sum the same size at any depth.
            for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
                nn.init.normal_(linear.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        # Biases: nothing to shift yet. LayerNorm starts at weight 1, bias 0 by itself.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b, l) int64 -> context (b, l, width). Raises ValueError if l exceeds the context length."""
        length, limit = tokens.shape[1], self.config.context_length
        if length > limit:
            raise ValueError(f"{length} tokens are more than the {limit} that this text encoder has positions for")
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(tokens) + embeddings.position_embedding.weight[:length]    # (b, l, width)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)
