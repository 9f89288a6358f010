"""Our language model as lm-eval's evaluator sees it.

Rows are packed, never padded: requests sorted from the longest are laid end to end until a batch
holds `batch_tokens` tokens, with their boundaries in cu_seqlens, so a row's result does not depend
on its batch. Generation reads the prompts of a batch at once and then takes one-token steps on
their states (glactl.models.decode).

lm-eval's contract: for a context c and a continuation x of n tokens

    loglikelihood = sum_i log p(x_i | c, x_<i)                                             (1)
    is_greedy = all_i (x_i = argmax p(. | c, x_<i))                                        (2)

and rolling takes c = the token that begins a text and x = the whole text, in windows of max_len
tokens where the model has one, each token scored once (lm_eval.utils.get_rolling_token_windows).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from glactl.models.decode import decode, prefill
from glactl.models.lm import LM, token_losses
from glactl.models.sampling import Sampler, Sampling
from glactl.tasks.stream import TextStream, prompt_ids

if TYPE_CHECKING:
    from glactl.tasks.tokenizer import Tokenizer

Progress = Callable[[int, str], AbstractContextManager[Callable[..., None]]]

DEFAULT_NEW_TOKENS = 256  # of a request that names no limit, as in lm-eval
LEAST_WEIGHT = 256  # tokens that a generated row counts as at least: each keeps a state of its own


@contextmanager
def _silent(total: int, label: str) -> Iterator[Callable[..., None]]:
    yield lambda n=1: None


class HarnessLM(TemplateLM):
    """A trained model and its tokenizer, for lm_eval.simple_evaluate(model=...).

    Args:
        lm: the model, in evaluation mode.
        tokenizer: text to tokens and back.
        batch_tokens: tokens read at once, at least 1; a longer request is read alone.
        progress: progress(total, label) is entered for each kind of request and yields a function
            that takes the number of requests done; None shows nothing.

    Attributes:
        truncated: requests whose context was cut from the left to fit the model's positions.

    Raises:
        ValueError: batch_tokens below 1; a continuation, or max_gen_toks, that the model's
            positions cannot hold.
    """

    def __init__(
        self,
        lm: LM,
        tokenizer: "Tokenizer",
        batch_tokens: int = 16_384,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; allowed: 1 or more")
        self.lm = lm
        self.text = tokenizer  # not `tokenizer`: lm-eval expects Hugging Face's class there
        self.batch_tokens = batch_tokens
        self.progress = progress or _silent
        self.truncated = 0
        # Only a table of positions limits the length: recurrent models and RoPE have none.
        self.max_length = lm.spec.max_len if lm.spec.positions == "learned" else None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or begins one where there is no such token."""
        eos = self.text.eos_id
        return prompt_ids(self.text, "")[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text: the context of a continuation without one."""
        return prompt_ids(self.text, "")[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a string; no special token is ever added."""
        return list(self.text.encode(string))

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(loglikelihood in nats, is_greedy) of every (context, continuation): (1), (2)."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # lm-eval moves the spaces at a context's end to the continuation: " " leaves nothing
        first = [self.prefix_token_id]
        pairs = [(context or first, continuation) for _, context, continuation in requests]
        found = self._score(pairs, "loglikelihood")
        for request, result in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """The log-likelihood in nats of every whole string."""
        windows: list[tuple[list[int], list[int]]] = []
        of: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            # A table of max_len positions reads as many tokens, the prefix among them.
            cut = get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length or len(ids) + 1, context_len=1
            )
            for window in map(make_disjoint_window, cut):
                windows.append(window)
                of.append(i)
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(of, self._score(windows, "rolling"), strict=True):
            totals[i] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The continuation of every context, up to its first stop string."""
        texts = [""] * len(requests)
        settings = [normalize_gen_kwargs(r.args[1], DEFAULT_NEW_TOKENS) for r in requests]
        prompts = [
            self._cut(prompt_ids(self.text, r.args[0]), s["max_gen_toks"])
            for r, s in zip(requests, settings, strict=True)
        ]
        with self.progress(len(requests), "generate") as advance:
            groups: dict[Sampling, list[int]] = {}
            for i, s in enumerate(settings):
                groups.setdefault(_sampling(s), []).append(i)
            for sampling, members in groups.items():
                for batch in self._batches(members, prompts, LEAST_WEIGHT):
                    self._generate(batch, prompts, settings, sampling, texts)
                    advance(len(batch))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(
        self,
        batch: list[int],
        prompts: list[list[int]],
        settings: Sequence[Any],
        sampling: Sampling,
        texts: list[str],
    ) -> None:
        """Continue the prompts of one batch; writes `texts`."""
        streams = [TextStream(self.text, settings[i]["until"]) for i in batch]

        def stop(row: int, token: int) -> bool:
            if token == self.text.eos_id:
                return True
            streams[row].push(token)
            return streams[row].stopped

        hidden, state = prefill(self.lm, [prompts[i] for i in batch])
        limits = [settings[i]["max_gen_toks"] for i in batch]
        sampler = Sampler(sampling, batch)
        for _ in decode(self.lm, hidden, state, limits, sampler, stop, self.text.vocab_size):
            pass
        for i, stream in zip(batch, streams, strict=True):
            stream.flush()
            texts[i] = stream.text

    @torch.inference_mode()
    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], label: str
    ) -> list[tuple[float, bool]]:
        """(1) and (2) for pairs of token lists (context, continuation), contexts not empty."""
        inputs: list[list[int]] = []
        for context, continuation in pairs:
            if self.max_length is not None and len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's "
                    f"max_len {self.max_length}"
                )
            # The last token is predicted, never read.
            whole = self._cut(context + continuation, -1)
            inputs.append(whole[:-1])
        results = [(0.0, True)] * len(pairs)  # of an empty continuation
        rows = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        device = self.lm.device
        with self.progress(len(pairs), label) as advance:
            advance(len(pairs) - len(rows))
            for batch in self._batches(rows, inputs):
                targets = []
                for i in batch:
                    continuation = pairs[i][1]
                    targets += [-100] * (len(inputs[i]) - len(continuation)) + continuation
                ends = torch.tensor([0, *(len(inputs[i]) for i in batch)]).cumsum(0)
                tokens = torch.tensor([[t for i in batch for t in inputs[i]]], device=device)
                hidden, _ = self.lm.forward(tokens, cu_seqlens=ends)
                nats, correct = token_losses(self.lm, hidden, torch.tensor([targets]), correct=True)
                counts = [len(pairs[i][1]) for i in batch]
                for i, n, c in zip(batch, nats.split(counts), correct.split(counts), strict=True):
                    results[i] = (-n.double().sum().item(), bool(c.all()))
                advance(len(batch))
        return results

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The end of `ids` that leaves `room` of the model's positions free; counts the cuts."""
        if self.max_length is None or len(ids) <= self.max_length - room:
            return ids
        if room >= self.max_length:
            raise ValueError(
                f"max_gen_toks {room} leaves no room for a prompt: the model's max_len is "
                f"{self.max_length}"
            )
        self.truncated += 1
        return ids[room - self.max_length :]

    def _batches(
        self, rows: Sequence[int], ids: Sequence[list[int]], least: int = 1
    ) -> Iterator[list[int]]:
        """`rows` in batches of at most batch_tokens tokens, or of one row; the longest first.

        A row counts as `least` tokens or more. The first batch is the largest, so a machine with
        too little memory fails at once.
        """
        batch: list[int] = []
        held = 0
        for row in sorted(rows, key=lambda r: -len(ids[r])):
            weight = max(len(ids[row]), least)
            if batch and held + weight > self.batch_tokens:
                yield batch
                batch, held = [], 0
            batch.append(row)
            held += weight
        if batch:
            yield batch


def _sampling(settings: Any) -> Sampling:
    """lm-eval's generation arguments as ours; greedy unless do_sample."""
    if not settings["do_sample"]:
        return Sampling()
    known = cast("dict[str, Any]", settings)
    return Sampling(
        temperature=float(known.get("temperature") or 1.0),
        top_k=known.get("top_k") or None,
        top_p=float(known.get("top_p") or 1.0),
        seed=int(known.get("seed") or 0),
    )
