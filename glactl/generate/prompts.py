"""Prompts out of files, and texts into one that a stopped command goes on with."""

import json
import os
from pathlib import Path
from typing import Any


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: .jsonl, strings or objects with a field prompt or text; else lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8 text, a line that is no prompt, or no prompt at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    found = [
        _prompt(line, f"{path}:{n}") if path.suffix == ".jsonl" else line
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"{path} has no prompts")
    return found


class Answers:
    """A file of texts, one JSON line for each row in order, that only grows.

        {"prompt": ..., "text": ..., "by": HASH}

    Args:
        path: the file; it need not exist. Half a line at its end, of a process that was killed, is
            taken off.
        by: what the texts are a function of, as a hash.
        prompts: of all rows.

    Attributes:
        done: rows that the file has.

    Raises:
        ValueError: the file's lines are not texts for these prompts, or not by this model and
            these options.
    """

    def __init__(self, path: Path, by: str, prompts: list[str]) -> None:
        self.path, self.by, self.done = path, by, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        for n, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                prompt, made_by = row["prompt"], row["by"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{n}: not a text that --out wrote") from None
            if n > len(prompts) or prompt != prompts[n - 1]:
                raise ValueError(f"{path}:{n}: its prompt is not prompt {n} of this command")
            if made_by != by:
                raise ValueError(
                    f"{path}:{n}: made by another checkpoint or with other options; give --out "
                    "another file"
                )
            self.done = n
        if whole != raw:
            with open(path, "r+b") as file:
                file.truncate(len(whole))

    def add(self, prompts: list[str], texts: list[str]) -> None:
        """Write the texts of the next rows, down to the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            for prompt, text in zip(prompts, texts, strict=True):
                row = {"prompt": prompt, "text": text, "by": self.by}
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done += len(texts)


def _prompt(line: str, place: str) -> str:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg}") from None
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise ValueError(f'{place}: neither a string nor an object with "prompt" or "text"')
    return value
