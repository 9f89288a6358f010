"""Our language models under evaluation: packed rows, states instead of padding.

Rows are laid end to end until a batch holds `batch_tokens` tokens, with their boundaries in
cu_seqlens: there is no padding that a state could read. Answers to one question are read after a
copy of the state that the question left, so it is read once (glactl.tasks.batching). A row longer
than `batch_tokens` is read in pieces, the state carried from one to the next: memory does not
depend on the length of a text (softmax attention without a window excepted, which keeps its past).

Generation reads prompts, as many as fit in `batch_tokens` at once, and takes one-token steps on all
rows (glactl.models.decode). As many rows go together as their states fit `state_memory` bytes; they
are written where the captured steps of the batch before have them.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glactl.models.decode import decode, prefill
from glactl.models.layers import end_to_end, to_device
from glactl.models.lm import LM
from glactl.models.losses import token_losses
from glactl.models.sampling import Sampler
from glactl.models.steps import BLOCK, Again, take
from glactl.tasks.batching import SHORTEST, Budget, Group, alone, budget, grouped
from glactl.tasks.engine import Ask, Engine, Pair, Score

if TYPE_CHECKING:
    from glactl.tasks.tokenizer import Tokenizer

LEAST_WEIGHT = 256  # tokens that a row with a state of its own counts as at least
LEAST_PIECE = 64  # tokens: where so few do not fit the memory, fewer would not help
LOGITS = 2**26  # entries that are held at once
ROWS = 256  # steps of more rows than this are bound by their states: more gain nothing
SHARE = 2  # of the free memory half is for states: rows that go on without others are copied


class LMEngine(Engine):
    """A model of ours, in evaluation mode.

    Args:
        lm: the model.
        tokenizer: text to tokens and back.
        batch_tokens: tokens read at once, 1 or more; None: as of `budget`.
        bos: texts begin with BOS.
        max_length: tokens to read at most; None: what the model's table of positions holds, any
            number without one.
        reuse: read what requests share once.
        shortest: tokens that are worth it.
        state_memory: bytes for the states of the rows of a generation; None: 1 / SHARE of what
            a GPU has free, 1 GiB on a CPU.

    Raises:
        ValueError: batch_tokens below 1, or a max_length beyond the model's positions.
    """

    def __init__(
        self,
        lm: LM,
        tokenizer: "Tokenizer",
        batch_tokens: int | None = None,
        *,
        bos: bool = False,
        max_length: int | None = None,
        reuse: bool = True,
        shortest: int = SHORTEST,
        state_memory: int | None = None,
    ) -> None:
        # only a table of positions limits the length: recurrent models and RoPE have none
        held = lm.spec.max_len if lm.spec.positions == "learned" else None
        if held is not None and max_length is not None and max_length > held:
            raise ValueError(f"max_length is {max_length}; the model has {held} positions")
        super().__init__(tokenizer, max_length or held, bos)
        self.lm, self.reuse, self.shortest = lm, reuse, shortest
        self._tokens = budget(batch_tokens, lm.device)
        self._memory = state_memory
        self._states: Budget | None = None
        empty, some = (state_bytes(lm, n) for n in (0, 1024))
        self._row_bytes, self._token_bytes = empty, (some - empty) // 1024

    @torch.inference_mode()
    def _score(self, pairs: Sequence[Pair], keep: Callable[[int, Score], None]) -> None:
        inputs = [_input(pair) for pair in pairs]
        # the context's last token predicts the first of the continuation, so it stays with the row
        most = [len(context) - 1 for context, _ in pairs]
        rows = range(len(pairs))
        groups = grouped(rows, inputs, most, self.shortest) if self.reuse else alone(rows)

        def weight(group: Group) -> int:
            if not group.shared:
                return len(inputs[group.rows[0]])
            rests = (max(len(inputs[row]) - group.shared, LEAST_WEIGHT) for row in group.rows)
            return group.shared + sum(rests)

        def do(batch: list[Group]) -> None:
            of = [([pairs[row] for row in group.rows], group.shared) for group in batch]
            nats, correct = self._shared(of) if batch[0].shared else self._alone(of)
            at = 0
            for row in (row for group in batch for row in group.rows):
                end = at + len(pairs[row][1])
                keep(row, (-sum(nats[at:end]), all(correct[at:end])))
                at = end

        self._tokens.run([g for g in groups if g.shared], weight, do)
        self._tokens.run([g for g in groups if not g.shared], weight, do, least=LEAST_PIECE)

    def _alone(self, groups: Sequence[tuple[list[Pair], int]]) -> tuple[list[float], list[bool]]:
        """Losses of groups of one row each, end to end."""
        pairs = [pairs[0] for pairs, _ in groups]
        asked = [t for pair in pairs for t in _targets(pair)]
        if len(asked) > self._tokens.size:  # one row, longer than a batch
            return self._pieces(_input(pairs[0]), asked)
        tokens, ends = self._packed([_input(pair) for pair in pairs])
        hidden, _ = self.lm.forward(tokens, cu_seqlens=ends)
        return self._losses(hidden[0], asked)

    def _shared(self, groups: Sequence[tuple[list[Pair], int]]) -> tuple[list[float], list[bool]]:
        """Losses of groups of rows whose first tokens, so many of each, are the same."""
        rows = [(pair, shared) for pairs, shared in groups for pair in pairs]
        need = max(len(_input(pair)) for pair, _ in rows)
        beginnings = [_input(pairs[0])[:shared] for pairs, shared in groups]
        _, state = prefill(self.lm, beginnings, self._tokens.size, capacity=need)
        copies = torch.tensor([i for i, (pairs, _) in enumerate(groups) for _ in pairs])
        state = take(state, to_device(copies, self.lm.device))
        tokens, ends = self._packed([_input(pair)[shared:] for pair, shared in rows])
        hidden = self.lm.extend(tokens, state, ends)
        return self._losses(hidden[0], [t for row in rows for t in _targets(*row)])

    def _nats(self, texts: Sequence[list[int]], keep: Callable[[int, list[float]], None]) -> None:
        def do(batch: list[Group]) -> None:
            for row in (group.rows[0] for group in batch):
                ids = texts[row]
                keep(row, self._pieces([self.first, *ids[:-1]], ids)[0] if ids else [])

        size = self._tokens
        size.run(alone(range(len(texts))), lambda g: len(texts[g.rows[0]]), do, 1, LEAST_PIECE)

    @torch.inference_mode()
    def _pieces(self, ids: list[int], targets: list[int]) -> tuple[list[float], list[bool]]:
        """Losses of one row, read with the memory of one piece."""
        size, state = self._tokens.size, self.lm.initial_state(1, capacity=len(ids))
        nats: list[float] = []
        correct: list[bool] = []
        for at in range(0, len(ids), size):
            tokens, _ = self._packed([ids[at : at + size]])
            hidden = self.lm.extend(tokens, state)
            found = self._losses(hidden[0], targets[at : at + size])
            nats += found[0]
            correct += found[1]
        return nats, correct

    def _packed(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows end to end, (1, T) on the device, and their bounds on the CPU."""
        tokens, ends = end_to_end(rows)
        return to_device(tokens[None], self.lm.device), ends

    def _losses(self, hidden: Tensor, targets: list[int]) -> tuple[list[float], list[bool]]:
        """-log p of the targets of 0 or more, (M, D) hidden, and which are the most likely token.

        Logits are held for as many targets as LOGITS allows.
        """
        wanted = torch.tensor(targets)
        asked = (wanted >= 0).nonzero().squeeze(-1)
        nats, correct = [], []
        for part in asked.split(max(1, LOGITS // self.lm.spec.vocab)):
            of = hidden.index_select(0, to_device(part, hidden.device))
            n, c = token_losses(self.lm, of, wanted[part], correct=True)
            nats.append(n.double())
            correct.append(c)
        if not nats:
            return [], []
        return torch.cat(nats).tolist(), torch.cat(correct).tolist()

    def _generate(self, asks: Sequence[Ask], keep: Callable[[int, str], None]) -> None:
        if self._states is None:
            self._states = Budget(self._memory or _free(self.lm.device) // SHARE)
        row, token = self._row_bytes, self._token_bytes

        def weight(group: Group) -> int:
            ask = asks[group.rows[0]]
            return row + token * (len(ask.ids) + ask.limit)

        kept = [Again()]

        def do(batch: list[Group]) -> None:
            rows, again = [group.rows[0] for group in batch], kept.pop() if kept else Again()
            for i, text in zip(rows, self._continue([asks[i] for i in rows], again), strict=True):
                keep(i, text)
            kept.append(again)  # not where memory ran out

        self._states.run(alone(range(len(asks))), weight, do, most=ROWS)

    def _continue(self, asks: Sequence[Ask], again: Again) -> list[str]:
        """The new texts of one batch."""
        made: list[list[int]] = [[] for _ in asks]
        over = {self.tokenizer.bos_id, self.tokenizer.eos_id}  # BOS begins another text

        def stop(row: int, token: int) -> bool:
            if token in over:
                return True
            made[row].append(token)
            # text is looked at where rows may leave: after the first token, then once a block
            return len(made[row]) % BLOCK == 1 and self.ends(made[row], asks[row].stops)

        sampler = Sampler(asks[0].sampling, [ask.number for ask in asks])
        limits = [ask.limit for ask in asks]
        need = max(len(ask.ids) for ask in asks) + max(limits)
        room, prompts = again.room(len(asks), need), [ask.ids for ask in asks]
        read = prefill(self.lm, prompts, self._tokens.size, capacity=need, room=room)
        vocab = self.tokenizer.vocab_size
        for _ in decode(self.lm, *read, limits, sampler, stop, vocab, again=again):
            pass
        return [self.text(ids, ask.stops) for ids, ask in zip(made, asks, strict=True)]


def _input(pair: Pair) -> list[int]:
    """What is read of a pair: all but its last token."""
    return pair[0] + pair[1][:-1]


def _targets(pair: Pair, skip: int = 0) -> list[int]:
    """What follows each token of _input(pair)[skip:], -100 where it is not asked for."""
    context, continuation = pair
    return [-100] * (len(context) - 1 - skip) + continuation


def state_bytes(lm: LM, tokens: int) -> int:
    """The bytes of one sequence's state with room for so many tokens."""
    layers = lm.initial_state(1, device="meta", capacity=tokens).layers
    return sum(part.nbytes for layer in layers for part in layer.values())


def _free(device: torch.device) -> int:
    """Bytes that a GPU has free, torch's own reserve among them; on a CPU a number to go by."""
    if device.type != "cuda":
        return SHARE * 2**30
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve
