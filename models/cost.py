"""What a model costs: the one cost model, of which plans, profiles and floors are made.

It sums the costs (layers.Cost) of the parts: mixers (each counts its own), convolutions, channel
mixers, norms, the residual, the embeddings and the head. Per token, forward:

    flops = 2 * (weights of all products) + mixing along time                          (1)
    bytes = 4 * (activations read and written once by each product and mixing)         (2)

Training takes three times (1): one forward and two products of that size for the gradients of
inputs and of weights. Element-wise work is not in (1). tests hold parameters and states against the
tensors of built models.
"""

from dataclasses import dataclass

from glactl.models.layers import FP32, GLU, Cost, ShortConv, linear_cost
from glactl.models.lm import LMSpec


@dataclass(frozen=True)
class LMCost:
    """Costs of a model on sequences of T tokens.

    params counts all weights, tied ones once; params_embedding those of the tables of tokens and
    positions. state_bytes is what one sequence needs to go on after T tokens, of an fp32 model.
    flops_token, flops_token_train and bytes_token are means per token, fp32.
    """

    params: int
    params_embedding: int
    state_bytes: int
    flops_token: float
    flops_token_train: float
    bytes_token: float


def lm_cost(spec: LMSpec, T: int) -> LMCost:
    """The cost of a model.

    Args:
        spec: with vocab_size set.
        T: tokens of a sequence, at least 1.

    Raises:
        ValueError: T below 1, or vocab_size not set.
    """
    if T < 1:
        raise ValueError(f"T is {T}; allowed: 1 or more")
    d = spec.d_model
    norm = Cost(params=d if spec.norm == "rmsnorm" else 2 * d)
    residual = Cost(moved=float(d))  # h is read once more; norm and sum are fused into products
    total = norm  # the last one, fused into the head's product
    for mixer, at in zip(spec.mixers, spec.depths, strict=True):
        total += norm + residual + mixer.cost(d, spec.rope, T, at)
        if spec.short_conv is not None:
            total += ShortConv.cost(d, spec.short_conv)
        if spec.hidden:
            total += norm + residual + GLU.cost(d, spec.hidden)
    rows = spec.vocab + (spec.max_len or 0 if spec.positions == "learned" else 0)
    head = linear_cost(d, spec.vocab)
    total += Cost(moved=2.0 * d) + head  # an embedding is read and written
    embedding = rows * d
    return LMCost(
        params=total.params + embedding - (head.params if spec.tie_embeddings else 0),
        params_embedding=embedding,
        state_bytes=total.state,
        flops_token=total.flops,  # (1)
        flops_token_train=3 * total.flops,
        bytes_token=FP32 * total.moved,  # (2)
    )
