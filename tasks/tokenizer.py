"""Text to tokens and back: bytes, or a tokenizer of the `tokenizers` library."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from glactl.tasks import hub
from glactl.tasks.errors import DataUnavailable

if TYPE_CHECKING:
    import tokenizers

# Names that begin or end a text where no tokenizer_config.json says which; the first found counts.
BOS = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "[CLS]", "<|endoftext|>")
EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """Text to tokens and back. Every token is below vocab_size; bos_id, eos_id: None if absent."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; none is added at its ends."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """encode of each of `texts`, by all cores where there are many."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out; bytes that are no character read U+FFFD."""

    def save(self, path: Path) -> None:
        """Write the folder `path`, from which load_tokenizer(str(path)) makes an equal one."""

    def array(self, text: str) -> np.ndarray:
        """encode(text) as (n,) integers."""

    def sizes(self, text: str) -> np.ndarray:
        """The bytes of UTF-8 text that each of encode(text) stands for; sums to all of them."""


class ByteTokenizer:
    """The bytes of UTF-8 text, 0 to 255, then BOS, EOS and PAD."""

    vocab_size = 259
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id = 258

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`. Raises ValueError at a lone surrogate."""
        return list(text.encode())

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """encode of each of `texts`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of the bytes among `ids`; what is no character reads U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Write the folder `path`."""
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "byte_tokenizer.json").write_text('{"tokenizer": "byte"}\n')

    def array(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, (n,) uint8."""
        return np.frombuffer(text.encode(), np.uint8)

    def sizes(self, text: str) -> np.ndarray:
        """One for each byte, (n,) uint8."""
        return np.ones(len(text.encode()), np.uint8)


class FileTokenizer:
    """A tokenizer.json.

    Args:
        inner: what the `tokenizers` library read; its truncation and padding are switched off.
        config: the tokenizer_config.json beside it, {} where there is none: its bos_token and
            eos_token count before the usual names.

    Attributes:
        leading: the tokens that its own rule puts before a text (<s>), which encode does not add.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", config: dict[str, Any]) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        # Ids may have gaps, so that the number of tokens would be too small.
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        mask = inner.encode("x").special_tokens_mask
        self.leading = mask.index(0) if 0 in mask else 0
        special = [t.content for t in inner.get_added_tokens_decoder().values() if t.special]
        self._names = {
            "bos_token": _name(config, "bos_token", BOS, special),
            "eos_token": _name(config, "eos_token", EOS, special),
        }
        self.bos_id, self.eos_id = (
            None if n is None else inner.token_to_id(n) for n in self._names.values()
        )

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; the names of special tokens in it become those tokens."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """encode of each of `texts`, on all cores."""
        # _fast leaves out the places of the tokens in the text
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens and unknown ids read ""."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def save(self, path: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into the folder `path`."""
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "tokenizer.json").write_text(self._inner.to_str(pretty=True))
        (Path(path) / "tokenizer_config.json").write_text(json.dumps(self._names) + "\n")

    def array(self, text: str) -> np.ndarray:
        """The tokens of `text`, (n,) int32."""
        # _fast leaves out the places of the tokens in the text
        fast = self._inner.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(fast.ids, np.int32)

    def sizes(self, text: str) -> np.ndarray:
        """The bytes from each token's end back to that of the token before, (n,) int32.

        Of several tokens for one character the first has all its bytes; what no token covers
        (dropped spaces) counts to the token behind, at the end to the last one.
        """
        offsets = self._inner.encode(text, add_special_tokens=False).offsets
        if not offsets:
            return np.zeros(0, np.int32)
        characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        width = 1 + (characters[:, None] >= np.array([0x80, 0x800, 0x10000])).sum(1)  # of UTF-8
        bounds = np.concatenate([[0], np.cumsum(width)])  # bytes before each character, and at end
        stops = np.maximum.accumulate(bounds[[end for _, end in offsets]])
        stops[-1] = bounds[-1]
        return np.diff(stops, prepend=0).astype(np.int32)


def _name(
    config: dict[str, Any], key: str, usual: tuple[str, ...], special: list[str]
) -> str | None:
    """The token that `config` names, else the first usual name among the special tokens."""
    if key in config:
        value = config[key]
        if isinstance(value, dict):  # a token with its settings
            value = value.get("content")
        return value if isinstance(value, str) else None
    return next((n for n in usual if n in special), None)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        name: "byte"; a tokenizer.json; a folder with one, or that Tokenizer.save wrote; or the
            name of a repository on the hub.

    Raises:
        ValueError: no tokenizer is in the file or folder.
        FileNotFoundError: no such file.
        DataUnavailable: not a file here, and the hub has it not or cannot be reached.
    """
    if name == "byte":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        if (path / "byte_tokenizer.json").is_file():
            return ByteTokenizer()
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"tokenizer folder {name} has no tokenizer.json")
        return _from_files(file, path / "tokenizer_config.json")
    if path.is_file():
        return _from_files(path, path.parent / "tokenizer_config.json")
    if path.suffix == ".json" or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"no tokenizer at {name}")
    return _from_hub(name)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """The sha256 (64 hex digits) of what `tokenizer` saves."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer")
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _from_files(file: Path, config: Path) -> FileTokenizer:
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{file} is not a tokenizer.json: {reason}") from None
    names: Any = {}
    if config.is_file():
        try:
            names = json.loads(config.read_bytes())
        except ValueError:
            raise ValueError(f"{config} is not JSON") from None
        if not isinstance(names, dict):
            raise ValueError(f"{config} is a JSON {type(names).__name__}; allowed: an object")
    return FileTokenizer(inner, names)


def _from_hub(name: str) -> FileTokenizer:
    import tokenizers

    hub.reach("model", name)
    try:
        inner = tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception, whatever the reason
        raise DataUnavailable(
            f"tokenizer {name!r} is no file here, nor on the hub: {hub.reason(error)}"
        ) from None
    return FileTokenizer(inner, {})
