"""What a step of a run leaves behind: a line of metrics.jsonl."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What one step did; see RunSpec for the fields' units.

    step counts from 1 to steps; tokens are those read since the start of the run; loss
    (nats a target) and grad_norm (before clipping) are of this step, before its update; seconds
    are since this process began to train. In stage "match" loss is the distance of layers. Step 0
    is the start of a run with `init`, its loss that of validation. mfu is the share of the chip's
    peak that the model's products take at tokens_per_s, None where it is not known (peaks.py);
    memory the most bytes that a GPU has held.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    seconds: float
    skipped: bool = False
    valid: dict[str, float] | None = None  # loss, ppl, accuracy and, for text, bpb
    checkpoint: str | None = None  # where the state after this step is saved; the last one is
    stage: str = "train"
    mfu: float | None = None
    memory: int | None = None
