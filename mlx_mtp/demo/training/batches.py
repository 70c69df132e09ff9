"""Token streams and the windows cut from them."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import ChatPair, Corpus
from .tokenizer import BOS_ID, EOS_ID, chat_text

CHAT_SHARE = 0.65


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokens.npz``: one text stream and one chat stream with its starts, for training and held-out."""
    arrays: dict[str, np.ndarray] = {}
    for index, split in enumerate(("train", "held_out")):
        documents = tokenizer.encode_batch(corpus.texts[index], add_special_tokens=False)
        ids = [token for document in documents for token in [BOS_ID, *document.ids, EOS_ID]]
        arrays[f"{split}_text"] = np.asarray(ids, dtype=np.uint16)
        chats = encode_pairs(corpus.pairs[index], tokenizer)
        arrays[f"{split}_chat"] = np.concatenate([np.asarray(chat, dtype=np.uint16) for chat in chats])
        arrays[f"{split}_chat_lengths"] = np.asarray([len(chat) for chat in chats], dtype=np.int64)
    np.savez(folder / "tokens.npz", **arrays)  # type: ignore[arg-type]


def encode_pairs(pairs: list[ChatPair], tokenizer: Tokenizer) -> list[list[int]]:
    """Each pair as its own token list, without ``<bos>``, so that several make a longer conversation."""
    texts = [chat_text(pair) for pair in pairs]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


class WindowSampler:
    """Draws ``[B, L + 1]`` windows: conversations from ``<bos>``, or stretches of plain text; seeded."""

    def __init__(self, folder: Path, split: str, seed: int) -> None:
        stored = np.load(folder / "tokens.npz")
        self.text: np.ndarray = stored[f"{split}_text"].astype(np.int64)
        ends = np.cumsum(stored[f"{split}_chat_lengths"])
        self.chats: list[np.ndarray] = np.split(stored[f"{split}_chat"].astype(np.int64), ends[:-1])
        self.random = np.random.default_rng(seed)
        self.order: list[int] = []

    def _next_chat(self) -> np.ndarray:
        if not self.order:
            self.order = self.random.permutation(len(self.chats)).tolist()
        return self.chats[self.order.pop()]

    def chat_window(self, length: int) -> np.ndarray:
        parts = [np.asarray([BOS_ID])]
        while sum(map(len, parts)) < length:
            parts.append(self._next_chat())
        return np.concatenate(parts)[:length]

    def text_window(self, length: int) -> np.ndarray:
        start = int(self.random.integers(0, len(self.text) - length))
        return self.text[start : start + length]

    def batch(self, rows: int, length: int, chat_share: float = CHAT_SHARE) -> Tensor:
        """``[rows, length + 1]`` token ids."""
        chat_rows = int(rows * chat_share + self.random.random())
        windows = [self.chat_window(length + 1) for _ in range(chat_rows)]
        windows += [self.text_window(length + 1) for _ in range(rows - chat_rows)]
        return torch.from_numpy(np.stack(windows))
