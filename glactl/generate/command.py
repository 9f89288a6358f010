"""`glactl generate`: text from a trained model.

Prompts are read packed, in pieces of so many tokens; then every token is one step on the state of
its row, whose size does not grow (softmax attention excepted).
"""

import hashlib
import json as jsons
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from glactl import console
from glactl.device import Precision, pick_device, precision_on
from glactl.generate.prompts import Answers, read_prompts
from glactl.generate.states import Past, checkpoint_hash, load_past, save_past
from glactl.models.decode import PIECE, decode, prefill, step_error
from glactl.models.lm import LM, LMState
from glactl.models.sampling import Sampler, Sampling
from glactl.models.steps import BLOCK, captures, take
from glactl.run import Run
from glactl.tasks.stream import TextStream, prompt_ids
from glactl.tasks.tokenizer import Tokenizer

BATCH = 256  # rows that `glactl generate` makes at once, to bound the memory of their states
CHECKED = 64  # tokens that --check reads step by step


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
    piece: int = PIECE,
    past: Past | None = None,
    keep: Callable[[Past], None] | None = None,
) -> Generated:
    """Continue prompts.

    Args:
        lm: the model, in evaluation mode.
        tokenizer: the one it was trained with.
        prompts: texts; "" begins a new one.
        max_tokens: the most tokens to make for each, 0 or more; a row ends before at EOS or BOS.
        sampling: how tokens are drawn; None: the most probable one.
        stops: a text ends before the first of these.
        rows: the number of each prompt, for its random numbers; None: as of `numbers_of`.
        show: show(i, text) is called with each new piece of the text of prompt i, token by token;
            None: tokens are looked at in blocks, which is faster.
        piece: the most tokens of prompts read at once.
        past: of a text that every prompt continues, "" as it is; None: they begin here.
        keep: keep(past) is called with the first prompt, and the past before it, once it is read.

    Raises:
        ValueError: no prompt, max_tokens or piece out of range, or more tokens than the model has
            positions.

    Cost: one forward pass over the prompts, then max_tokens steps.
    """
    if not prompts:
        raise ValueError("prompts is empty")
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}; allowed: 0 or more")
    ids = _ids(tokenizer, prompts, past)
    longest = max(map(len, ids)) + (0 if past is None else past.state.longest)
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
    first = None if past is None else _repeated(past, len(ids))
    room = longest + max_tokens if captures(lm.device) else 0
    hidden, state = prefill(lm, ids, piece, first, room)
    _wait(hidden.device)
    read = time.perf_counter()
    state_bytes = _bytes(state)
    seen = [[*tokens, *(past.seen if past else ())] for tokens in ids]
    if keep is not None:
        index = torch.zeros(1, device=hidden.device, dtype=torch.int64)
        with torch.inference_mode():
            keep(Past(hidden[index], take(state, index), sorted(set(seen[0]))))
    numbers = numbers_of(prompts) if rows is None else rows
    sampler = Sampler(sampling or Sampling(), numbers, seen)
    limits, block = [max_tokens] * len(ids), BLOCK if show is None else 1
    for _ in decode(lm, hidden, state, limits, sampler, stop, tokenizer.vocab_size, block):
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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    prefill_chunk: int = PIECE,
    check: bool = False,
    state: Path | None = None,
    save_state: Path | None = None,
    out: Path | None = None,
    precision: Precision = "auto",
    device: str | None = None,
    json: bool = False,
) -> None:
    """Run `glactl generate`; the arguments are the command's options.

    Row i of all samples has the random numbers of (seed, i), however they are cut into batches.

    Raises:
        ValueError: an option out of range, a file of prompts that cannot be read, or a run that is
            not about text; a state of another checkpoint, or texts of other options.
        FileNotFoundError: no run, or no such file.
    """
    sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty)
    for name, value in (("samples", samples), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    texts = [*prompts, *(read_prompts(file) if file is not None else [])] or [""]
    if save_state is not None and len(texts) > 1:
        raise ValueError(f"save_state keeps the state of one prompt; there are {len(texts)}")
    texts = [text for text in texts for _ in range(samples)]
    opened = Run.newest() if run is None else Run.open(run)
    if run is None:
        console.note(f"run {opened.path} (the newest)")
    where = pick_device(device)
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r}; allowed: {', '.join(get_args(Precision))}")
    lm, tokenizer, _ = opened.load_model(where)
    if precision_on(where, precision) == "bf16":
        lm = lm.to(torch.bfloat16)
    if tokenizer is None:
        raise ValueError(f"{opened.path} has no tokenizer, its data is not text")
    weights = checkpoint_hash(opened.newest_checkpoint())
    past = None if state is None else load_past(state, lm, weights)
    answers = None
    if out is not None:
        options = [asdict(sampling), max_tokens, stops, weights, _sum(state)]
        options += [str(lm.head.weight.dtype)] if lm.head.weight.dtype != torch.float32 else []
        by = hashlib.sha256(jsons.dumps(options).encode()).hexdigest()
        answers = Answers(out, by[:12], texts)
        if answers.done:
            console.note(f"{out} has {answers.done} of {len(texts)} texts")
    if check:
        tokens = max((prompt_ids(tokenizer, text) for text in texts), key=len)[:CHECKED]
        console.note(
            f"check: steps and one forward pass over {len(tokens)} tokens differ by "
            f"{step_error(lm, tokens):.1e} of the largest logit"
        )
    stream = len(texts) == 1 and not json and out is None
    if stream:
        console.write(texts[0])
    parts = []
    before, numbers = 0 if answers is None else answers.done, numbers_of(texts)
    for first in range(before, len(texts), BATCH):
        rows = range(first, min(first + BATCH, len(texts)))
        batch = [texts[row] for row in rows]
        made = generate(
            lm,
            tokenizer,
            batch,
            max_tokens,
            sampling,
            stops or [],
            [numbers[row] for row in rows],
            show=(lambda _, text: console.write(text)) if stream else None,
            piece=prefill_chunk,
            past=past,
            keep=(lambda past: save_past(save_state, past, weights)) if save_state else None,
        )
        parts.append(made)
        if stream:
            console.write("\n")
            continue
        if answers is not None:
            answers.add(batch, made.texts)
            continue
        for row, text in zip(rows, made.texts, strict=True):
            if json:
                console.result({"prompt": texts[row], "text": text})
            else:
                console.say(("" if row == 0 else "\n") + f"--- {row + 1}\n{texts[row]}{text}")
    if parts:
        _tell(parts, len(texts) - before)


def numbers_of(prompts: Sequence[str]) -> list[int]:
    """Of each prompt its number for random numbers: how often it was there before. So a text draws
    the same alone and among others, with or without a state, and copies of it do not."""
    before: Counter[str] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(before[prompt])
        before[prompt] += 1
    return numbers


def _tell(parts: Sequence[Generated], rows: int) -> None:
    """One line about the speed."""
    tokens, seconds = sum(p.tokens for p in parts), sum(p.seconds for p in parts)
    read, took = sum(p.prompt_tokens for p in parts), sum(p.prefill_seconds for p in parts)
    console.note(
        f"prefill {read} tokens in {1e3 * took:.1f} ms, "
        f"{read / took if took > 0 else 0:,.0f} tokens/s; "
        f"{tokens} tokens at {tokens / seconds if seconds > 0 else 0:,.0f} tokens/s; "
        f"state {max(p.state_bytes for p in parts) / 2**20:.2f} MiB in "
        f"{console.counted(rows, 'row')}"
    )


def _ids(tokenizer: Tokenizer, prompts: Sequence[str], past: Past | None) -> list[list[int]]:
    """The tokens of prompts; with a past "" has none."""
    if past is None:
        return [prompt_ids(tokenizer, prompt) for prompt in prompts]
    return [list(tokenizer.encode(prompt)) for prompt in prompts]


def _sum(file: Path | None) -> str | None:
    """The sha256 of a file."""
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def _repeated(past: Past, n: int) -> tuple[Tensor, LMState]:
    """The past of n rows."""
    index = torch.zeros(n, device=past.hidden.device, dtype=torch.int64)
    return past.hidden[index], take(past.state, index)


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
