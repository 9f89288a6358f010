"""`glactl generate`: text from a trained model.

Prompts are read by one packed forward pass; then every token is one step on the state of its row,
whose size does not grow (softmax attention excepted).
"""

import json as jsons
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glactl import console
from glactl.device import pick_device
from glactl.models.decode import Sampler, Sampling, decode, prefill
from glactl.models.lm import LM, LMState
from glactl.run import Run
from glactl.tasks.stream import TextStream, prompt_ids
from glactl.tasks.tokenizer import Tokenizer

BATCH = 256  # rows that `glactl generate` makes at once, to bound the memory of their states


@dataclass(frozen=True)
class Generated:
    """What one call made.

    texts: the continuations, without their prompts. prompt_tokens, tokens: read and made, in all
    rows. prefill_seconds: from the start to the first token's logits; seconds: for the rest.
    state_bytes: of all rows, after the prompts.
    """

    texts: list[str]
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    seconds: float
    state_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens made a second, in all rows together; 0 without any."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def generate(
    lm: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    stops: Sequence[str] = (),
    rows: Sequence[int] | None = None,
    show: Callable[[int, str], None] | None = None,
) -> Generated:
    """Continue prompts.

    Args:
        lm: the model, in evaluation mode.
        tokenizer: the one it was trained with.
        prompts: texts; "" begins a new one.
        max_tokens: the most tokens to make for each, 0 or more; a row ends before at EOS or BOS.
        sampling: how tokens are drawn; None: the most probable one.
        stops: a text ends before the first of these.
        rows: the number of each prompt, for its random numbers; None: 0, 1, 2, ...
        show: show(i, text) is called with each new piece of the text of prompt i.

    Raises:
        ValueError: no prompt, max_tokens below 0, or more tokens than the model has positions.

    Cost: one forward pass over the prompts, then max_tokens steps.
    """
    if not prompts:
        raise ValueError("prompts is empty")
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}; allowed: 0 or more")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, ids))
    if lm.spec.positions == "learned" and lm.spec.max_len is not None:
        # the last token made is not read
        _need_positions(longest, max_tokens, lm.spec.max_len)
    streams = [TextStream(tokenizer, stops) for _ in prompts]
    made = 0

    def emit(row: int, text: str) -> None:
        if show is not None and text:
            show(row, text)

    def stop(row: int, token: int) -> bool:
        nonlocal made
        made += 1
        if token in (tokenizer.bos_id, tokenizer.eos_id):  # BOS begins another text
            return True
        emit(row, streams[row].push(token))
        return streams[row].stopped

    start = time.perf_counter()
    hidden, state = prefill(lm, ids)
    _wait(hidden.device)
    read = time.perf_counter()
    state_bytes = _bytes(state)
    sampler = Sampler(sampling or Sampling(), list(range(len(ids))) if rows is None else rows)
    limits = [max_tokens] * len(ids)
    for _ in decode(lm, hidden, state, limits, sampler, stop, tokenizer.vocab_size):
        pass
    for row, stream in enumerate(streams):
        emit(row, stream.flush())
    return Generated(
        texts=[stream.text for stream in streams],
        prompt_tokens=sum(map(len, ids)),
        tokens=made,
        prefill_seconds=read - start,
        seconds=time.perf_counter() - read,
        state_bytes=state_bytes,
    )


def generate_command(
    run: str | None,
    *,
    prompts: list[str],
    file: Path | None = None,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stops: list[str] | None = None,
    samples: int = 1,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Run `glactl generate`; the arguments are the command's options.

    Row i of all samples has the random numbers of (seed, i), however they are cut into batches.

    Raises:
        ValueError: an option out of range, a file of prompts that cannot be read, or a run that is
            not about text.
        FileNotFoundError: no run, or no such file.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if samples < 1:
        raise ValueError(f"samples is {samples}; allowed: 1 or more")
    texts = [*prompts, *(read_prompts(file) if file is not None else [])] or [""]
    texts = [text for text in texts for _ in range(samples)]
    opened = Run.newest() if run is None else Run.open(run)
    if run is None:
        console.note(f"run {opened.path} (the newest)")
    where = pick_device(device)
    lm, tokenizer, _ = opened.load_model(where)
    if tokenizer is None:
        raise ValueError(f"{opened.path} has no tokenizer, its data is not text")
    stream = len(texts) == 1 and not json
    if stream:
        console.write(texts[0])
    parts = []
    for first in range(0, len(texts), BATCH):
        rows = range(first, min(first + BATCH, len(texts)))
        batch = [texts[row] for row in rows]
        made = generate(
            lm,
            tokenizer,
            batch,
            max_tokens,
            sampling,
            stops or [],
            rows,
            show=(lambda _, text: console.write(text)) if stream else None,
        )
        parts.append(made)
        if stream:
            console.write("\n")
            continue
        for row, text in zip(rows, made.texts, strict=True):
            if json:
                console.result({"prompt": texts[row], "text": text})
            else:
                console.say(("" if row == 0 else "\n") + f"--- {row + 1}\n{texts[row]}{text}")
    tokens, seconds = sum(p.tokens for p in parts), sum(p.seconds for p in parts)
    console.note(
        f"prefill {sum(p.prompt_tokens for p in parts)} tokens in "
        f"{1e3 * sum(p.prefill_seconds for p in parts):.1f} ms; "
        f"{tokens} tokens at {tokens / seconds if seconds > 0 else 0:,.0f} tokens/s; "
        f"state {max(p.state_bytes for p in parts) / 2**20:.2f} MiB in {len(texts)} row(s)"
    )


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


def _prompt(line: str, place: str) -> str:
    try:
        value: Any = jsons.loads(line)
    except jsons.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg}") from None
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise ValueError(f'{place}: neither a string nor an object with "prompt" or "text"')
    return value


def _need_positions(longest: int, max_tokens: int, max_len: int) -> None:
    if longest + max(max_tokens - 1, 0) > max_len:
        raise ValueError(
            f"a prompt of {longest} tokens and max_tokens {max_tokens} do not fit the model's "
            f"max_len {max_len}"
        )


def _bytes(state: LMState) -> int:
    return sum(part.nbytes for layer in state.layers for part in layer.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
