"""Any causal language model of transformers under evaluation, for baselines by the same protocols.

Likelihoods: rows padded on the right, behind all that is asked, so that nothing reads the padding.
Generation: prompts padded on the left where the model is seen to take no notice of it (a row beside
a longer one must give the logits that it gives alone); where it does, as a recurrent model without
a mask, prompts of one length go together and none is padded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tokenizers
import torch
from torch import Tensor

from glactl.tasks.batching import Group, alone, budget
from glactl.tasks.engine import Ask, Engine, Pair, Score
from glactl.tasks.tokenizer import FileTokenizer, Tokenizer

LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # what configs call their positions
LOOK = 8  # steps between two looks at the text of a row
ROWS = 256
APART = 0.02  # of the largest logit: bf16 rounds by 0.004, a model that reads padding is far off


class HFEngine(Engine):
    """A model of transformers, in evaluation mode.

    Args:
        model: an AutoModelForCausalLM.
        tokenizer: its own.
        batch_tokens: tokens of a batch with its padding, 1 or more; None: as of `budget`.
        bos: texts begin with BOS.
        max_length: tokens to read at most; None: the positions of its config, if it has some.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        batch_tokens: int | None = None,
        *,
        bos: bool = False,
        max_length: int | None = None,
    ) -> None:
        named = (getattr(model.config, name, None) for name in LENGTHS)
        super().__init__(tokenizer, max_length or next(filter(None, named), None), bos)
        self.model = model
        told = model.generation_config.eos_token_id
        ends = [*(told if isinstance(told, list) else [told]), tokenizer.eos_id, tokenizer.bos_id]
        self._ends = [token for token in dict.fromkeys(ends) if token is not None]
        self._tokens = budget(batch_tokens, model.device)
        self._padded: bool | None = None

    @torch.inference_mode()
    def _score(self, pairs: Sequence[Pair], keep: Callable[[int, Score], None]) -> None:
        inputs = [context + continuation[:-1] for context, continuation in pairs]

        def do(batch: list[Group]) -> None:
            rows = [group.rows[0] for group in batch]
            width = max(len(inputs[row]) for row in rows)
            padded = [inputs[row] + [0] * (width - len(inputs[row])) for row in rows]
            logits = self.model(self._tensor(padded), use_cache=False).logits
            for n, row in enumerate(rows):
                wanted = self._tensor(pairs[row][1])
                end = len(inputs[row])
                z = logits[n, end - len(wanted) : end].float()
                nats = z.log_softmax(-1).gather(-1, wanted[:, None])
                keep(row, (nats.double().sum().item(), bool((z.argmax(-1) == wanted).all())))

        self._tokens.run(alone(range(len(pairs))), lambda g: len(inputs[g.rows[0]]), do)

    @torch.inference_mode()
    def _nats(self, texts: Sequence[list[int]], keep: Callable[[int, list[float]], None]) -> None:
        for i, ids in enumerate(texts):
            logits = self.model(self._tensor([[self.first, *ids[:-1]]]), use_cache=False).logits[0]
            wanted = self._tensor(ids)
            z = logits[: len(ids)].float().log_softmax(-1).gather(-1, wanted[:, None])
            keep(i, (-z[:, 0].double()).tolist())

    def _generate(self, asks: Sequence[Ask], keep: Callable[[int, str], None]) -> None:
        if self._padded is None:
            self._padded = takes_padding(self.model)
        drawn = bool(asks) and asks[0].sampling.temperature > 0
        lengths: dict[int, list[int]] = {}
        for i, ask in enumerate(asks):
            lengths.setdefault(0 if self._padded else len(ask.ids), []).append(i)

        def do(batch: list[Group]) -> None:
            rows = [group.rows[0] for group in batch]
            for i, text in zip(rows, self._continue([asks[i] for i in rows]), strict=True):
                keep(i, text)

        def weight(group: Group) -> int:
            ask = asks[group.rows[0]]
            return len(ask.ids) + ask.limit

        for members in lengths.values():
            # a seed is of a whole batch in transformers: what is drawn must not depend on others
            self._tokens.run(alone(members), weight, do, most=1 if drawn else ROWS)

    @torch.inference_mode()
    def _continue(self, asks: Sequence[Ask]) -> list[str]:
        """The new texts of one batch."""
        width = max(len(ask.ids) for ask in asks)
        gaps = [width - len(ask.ids) for ask in asks]
        pad = self._ends[0] if self._ends else 0
        prompt = [[pad] * gap + ask.ids for gap, ask in zip(gaps, asks, strict=True)]
        mask = [[0] * gap + [1] * len(a.ids) for gap, a in zip(gaps, asks, strict=True)]
        s = asks[0].sampling
        options: dict[str, Any] = {"do_sample": False}
        if s.temperature > 0:
            torch.manual_seed((s.seed + asks[0].number) % 2**63)
            options = {"do_sample": True, "temperature": s.temperature, "top_p": s.top_p}
            options["top_k"] = s.top_k or 0
        made = self.model.generate(
            self._tensor(prompt),
            attention_mask=self._tensor(mask),
            max_new_tokens=max(ask.limit for ask in asks),
            eos_token_id=self._ends or None,
            pad_token_id=pad,
            stopping_criteria=[self._stopping(asks, width)],
            **options,
        )
        texts = []
        for ids, ask in zip(made[:, width:].tolist(), asks, strict=True):
            end = next((n for n, t in enumerate(ids) if t in self._ends), len(ids))
            texts.append(self.text(ids[: min(end, ask.limit)], ask.stops))
        return texts

    def _stopping(self, asks: Sequence[Ask], width: int) -> Callable[..., Tensor]:
        """Tells transformers which rows have ended."""

        def ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            done = [False] * len(asks)
            if (ids.shape[1] - width) % LOOK == 1:
                new = ids[:, width:].tolist()
                done = [self.ends(new[i], ask.stops) for i, ask in enumerate(asks)]
            return torch.tensor(done, device=ids.device)

        return ended

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)


@torch.inference_mode()
def takes_padding(model: Any) -> bool:
    """Whether a prompt padded on the left, with a mask, has the logits that it has alone."""
    vocab = min(model.config.get_text_config().vocab_size, 1000)
    ids = torch.arange(1, 14, device=model.device)[None] * 7 % vocab
    options = {
        "max_new_tokens": 1,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }

    def logits(rows: Tensor, mask: Tensor) -> Tensor:
        made = model.generate(rows, attention_mask=mask, **options)
        z: Tensor = made.logits[0][0].float()
        return z

    short = ids[:, -6:]
    padded = torch.cat([torch.zeros_like(ids[:, :-6]), short], 1)
    mask = torch.ones_like(ids)
    mask[:, :-6] = 0
    both = torch.cat([mask, torch.ones_like(mask)])
    apart = logits(torch.cat([padded, ids]), both) - (z := logits(short, torch.ones_like(short)))
    return bool(apart.abs().max() <= APART * z.abs().max())


def own_tokenizer(auto: Any) -> FileTokenizer:
    """The tokenizer of an AutoTokenizer, in our form.

    Raises:
        ValueError: it is written in Python, of which there is no such form.
    """
    inner = getattr(auto, "backend_tokenizer", None)
    if inner is None:
        raise ValueError(f"{auto.name_or_path} has no tokenizer.json, nor what one is made of")
    names = {"bos_token": auto.bos_token, "eos_token": auto.eos_token}
    return FileTokenizer(tokenizers.Tokenizer.from_str(inner.to_str()), names)
