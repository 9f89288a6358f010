"""Documents framed by the special tokens and laid end to end: a stream of tokens, in memory.

    BOS document EOS BOS document EOS ...    where BOS and EOS differ
    END document END document ... END        where there is one token for both, or one of the two,
                                             and with frame "bos", END being BOS
    document document ...                    where there is neither

In the second case the streams are called joined: one and the same token ends a document and begins
the next, and the last of them stands alone at the end.
"""

from array import array
from collections.abc import Sequence
from typing import Literal

import numpy as np

from glactl.tasks.tokenizer import Tokenizer

Frame = Literal["both", "bos"]


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest type of tokens below `vocab_size`: uint16 up to 65,536, else uint32."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def ends(tokenizer: Tokenizer, frame: Frame) -> tuple[list[int], list[int]]:
    """What stands before and behind each document; of joined streams ([END], [])."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id if frame == "both" else None
    found = [t for t in dict.fromkeys([bos, eos]) if t is not None]
    return found[:1], found[1:]


class Frames:
    """A stream that grows by documents.

    Args:
        tokenizer, frame: what documents become, and what stands between them.
        sized: keep the bytes of text that each token stands for.

    Attributes:
        starts: where each document's frame begins, in tokens, array of int64.
        length: tokens; n_bytes: of UTF-8 text. joined: see above.
    """

    def __init__(self, tokenizer: Tokenizer, frame: Frame, sized: bool = False) -> None:
        self.tokenizer = tokenizer
        self._lead, self._tail = ends(tokenizer, frame)
        self.joined = bool(self._lead) and not self._tail
        self.width = token_type(tokenizer.vocab_size)
        self._stream = bytearray()
        self._sizes = bytearray() if sized else None
        self.starts = array("q")
        self.length = self.n_bytes = 0

    def add(self, text: str) -> None:
        """Append a document."""
        self.n_bytes += len(text.encode())
        self.starts.append(self.length)
        self._append(self._lead)
        self._append(self.tokenizer.array(text), text)
        self._append(self._tail)

    def close(self) -> None:
        """End the last document."""
        if self.joined:
            self._append(self._lead)

    def tokens(self) -> np.ndarray:
        """The stream, (length,) uint16 or uint32, which is not copied."""
        return np.frombuffer(self._stream, self.width)

    def sizes(self) -> np.ndarray | None:
        """Bytes of text of each token, (length,) int32, not copied; None unless sized."""
        return None if self._sizes is None else np.frombuffer(self._sizes, np.int32)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from start up to stop, or to the end; (n,)."""
        return self.tokens()[start:stop]

    def bytes_of(self, start: int, stop: int) -> np.ndarray | None:
        """The sizes of those tokens; None unless sized."""
        sizes = self.sizes()
        return None if sizes is None else sizes[start:stop]

    def begun(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin, from start up to stop: (n,) int64."""
        starts = np.frombuffer(self.starts, np.int64)
        return starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)]

    def _append(self, ids: Sequence[int] | np.ndarray, text: str | None = None) -> None:
        tokens = np.asarray(ids, self.width)
        self._stream += tokens.tobytes()
        self.length += len(tokens)
        if self._sizes is not None:
            sizes = np.zeros(len(tokens)) if text is None else self.tokenizer.sizes(text)
            self._sizes += sizes.astype(np.int32).tobytes()
