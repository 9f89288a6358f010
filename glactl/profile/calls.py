"""The calls that `glactl profile` times, made from a case: operators, layers, phases of a model.

With N tokens in a call, P bytes of weights and S, s bytes of the states of all rows after T tokens
and after none, the least work is that of operators.py or of the cost model, and of bytes

    layer    forward  N a + P,   forward and backward  3 (N a + P)                         (1)
    model    train    3 (N a + P),   prefill  N a + P,   decode  P + S + s                 (2)

a being the activations of a token. A step of decode reads the states and writes as many bytes of
them as do not grow; the rows of the embedding that it does not look at are not counted.

A model trains as `glactl train` does, with fp32 weights and products of the type that is asked for;
prefill and decode have all weights in that type, as `glactl generate` has on a GPU.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glactl.models.cost import LMCost, lm_cost
from glactl.models.decode import prefill
from glactl.models.layers import linear_cost
from glactl.models.lm import LM, Block, LMSpec, LMState, build_lm
from glactl.models.losses import token_losses
from glactl.models.sampling import Sampler, Sampling
from glactl.models.steps import BLOCK, Stepper
from glactl.profile.cases import BOTH, Case
from glactl.profile.operators import ERROR_T, Shape, error, relative
from glactl.profile.peers import operator

STEPPED = 64  # tokens at which decode is held against fp64, the second half of them steps
BLOCKS = 30  # of steps that are timed, at most: attention's state grows meanwhile
LARGE = 1_500_000_000  # weights; gradients of more, in fp64 too, do not fit beside


@dataclass(frozen=True)
class Call:
    """One call and its least work; `forward` is what keeps for a backward pass, with `weights`.

    run does `turns` of the calls that are measured, each of `tokens` tokens. error: a function that
    gives the largest relative error against fp64 and the tokens it was measured at.
    """

    run: Callable[[], object]
    tokens: int
    flops: float
    moved: float
    error: Callable[[], tuple[float, int]]
    forward: Callable[[], object] | None = None
    weights: Iterable[Tensor] = ()
    turns: int = 1
    most: int = 100


def make_call(case: Case, work: str, T: int) -> Call:
    """The call of a row of the case."""
    device, shape = torch.device(case.device), case.at(T)
    if case.part == "operator":
        return _operator(case.name, work, shape, device)
    assert case.spec is not None
    if case.part == "layer":
        return _layer(case.spec, work, shape, device)
    make = {"train": _train, "prefill": _prefill, "decode": _decode}[work]
    return make(case.spec, shape, device)


def _operator(name: str, work: str, shape: Shape, device: torch.device) -> Call:
    op = operator(name)
    inputs = op.inputs(shape, device, 0)
    leaves = [x.detach().requires_grad_() for x in inputs]
    do = torch.ones_like(inputs[2])

    def forward() -> None:
        with torch.no_grad():
            op.call(*inputs)

    def both() -> None:
        torch.autograd.grad(op.call(*leaves), leaves, do)

    backward = work == BOTH
    return Call(
        both if backward else forward,
        shape.tokens,
        op.flops(shape, backward),
        op.moved(shape, backward),
        lambda: error(op, shape, device, 0, backward),
        (lambda: op.call(*leaves)) if backward else None,
    )


def _layer(spec: LMSpec, work: str, shape: Shape, device: torch.device) -> Call:
    """One layer: norms, short convolution, mixer, channel mixer."""
    alone = spec.model_copy(update={"n_layers": 1, "mixer": spec.mixers[0]})
    one, two = (_cost(alone.model_copy(update={"n_layers": n}), shape) for n in (1, 2))
    lm = build_lm(alone, 0, device=device, dtype=shape.dtype)
    weights = list(lm.blocks.parameters())

    def run(lm: LM, x: Tensor) -> Tensor:
        (block,) = lm.blocks
        assert isinstance(block, Block)
        rows = lm.shared[alone.mixers[0].kind]() if lm.shared else [None]
        y: Tensor = block(x, None, None, x.shape[1], rows[0])[0]
        return y

    def draw(B: int, T: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(B, T, spec.d_model, generator=generator)
        return x.to(device, shape.dtype).requires_grad_()

    x = draw(shape.batch, shape.T)
    do = torch.ones_like(x)

    def forward() -> None:
        with torch.no_grad():
            run(lm, x)

    def both() -> None:
        torch.autograd.grad(run(lm, x), [x, *weights], do)

    def worst() -> tuple[float, int]:
        short = draw(1, min(shape.T, ERROR_T))
        exact, leaf = copy.deepcopy(lm).double(), short.detach().double().requires_grad_()
        ours, truth = run(lm, short), run(exact, leaf)
        found = relative(ours.detach(), truth.detach())
        if work == BOTH:
            mine = torch.autograd.grad(ours, [short, *weights], torch.ones_like(ours))
            leaves = [leaf, *exact.blocks.parameters()]
            right = torch.autograd.grad(truth, leaves, torch.ones_like(truth))
            found = max(found, _together(mine, right))
        return found, short.shape[1]

    size = shape.dtype.itemsize
    backward = work == BOTH
    activations = (two.bytes_token - one.bytes_token) / 4 * size * shape.tokens
    moved = activations + sum(p.nbytes for p in weights)  # (1)
    flops = (two.flops_token - one.flops_token) * shape.tokens
    return Call(
        both if backward else forward,
        shape.tokens,
        flops * (3 if backward else 1),
        moved * (3 if backward else 1),
        worst,
        (lambda: run(lm, x)) if backward else None,
        weights,
    )


def _train(spec: LMSpec, shape: Shape, device: torch.device) -> Call:
    """The loss on random tokens and its gradient by every weight."""
    lm = build_lm(spec, 0, device=device)
    drawn = _tokens(spec, shape)
    tokens, targets = drawn[:, :-1].to(device), drawn[:, 1:]
    weights = list(lm.parameters())

    def loss(lm: LM, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = lm(tokens)
        return token_losses(lm, hidden, targets).mean(), hidden

    def products() -> torch.autocast:
        narrow = shape.dtype != torch.float32
        return torch.autocast(device.type, shape.dtype if narrow else None, enabled=narrow)

    def forward() -> Tensor:
        with products():
            return loss(lm, tokens, targets)[0]

    def worst() -> tuple[float, int]:
        at = min(shape.T, ERROR_T)
        few, asked = tokens[:1, :at], targets[:1, :at]
        exact = copy.deepcopy(lm).double()
        with products():
            ours, hidden = loss(lm, few, asked)
        truth, right = loss(exact, few, asked)
        found = relative(hidden.detach(), right.detach())
        if sum(p.numel() for p in weights) <= LARGE:
            mine = torch.autograd.grad(ours, weights)
            found = max(
                found, _together(mine, torch.autograd.grad(truth, list(exact.parameters())))
            )
        return found, at

    cost = _cost(spec, shape)
    activations = cost.bytes_token / 4 * shape.dtype.itemsize * shape.tokens
    return Call(
        lambda: torch.autograd.grad(forward(), weights),
        shape.tokens,
        cost.flops_token_train * shape.tokens,
        3 * (activations + sum(p.nbytes for p in weights)),  # (2)
        worst,
        forward,
        weights,
    )


def _prefill(spec: LMSpec, shape: Shape, device: torch.device) -> Call:
    """Reading prompts of T tokens into states; logits of the last token alone."""
    lm = build_lm(spec, 0, device=device, dtype=shape.dtype).eval()
    drawn = _tokens(spec, shape)[:, :-1]
    prompts = drawn.tolist()

    def worst() -> tuple[float, int]:
        at = min(shape.T, ERROR_T)
        with torch.no_grad():
            exact, _ = copy.deepcopy(lm).double()(drawn[:1, :at].to(device))
            return relative(prefill(lm, [prompts[0][:at]])[0], exact[:, -1]), at

    def run() -> None:
        with torch.inference_mode():
            lm.logits(prefill(lm, prompts)[0])

    cost, head = _cost(spec, shape), linear_cost(spec.d_model, spec.vocab)
    heads = shape.tokens - shape.batch  # that are not asked for
    moved = (cost.bytes_token * shape.tokens - 4 * head.moved * heads) / 4 * shape.dtype.itemsize
    return Call(
        run,
        shape.tokens,
        cost.flops_token * shape.tokens - head.flops * heads,
        moved + sum(p.nbytes for p in lm.parameters()),  # (2)
        worst,
    )


def _decode(spec: LMSpec, shape: Shape, device: torch.device) -> Call:
    """One token after T, in every row, with its greedy draw, as `glactl generate` makes it."""
    lm = build_lm(spec, 0, device=device, dtype=shape.dtype).eval()
    drawn = _tokens(spec, shape)[:, :-1]
    with torch.inference_mode():
        hidden, state = prefill(lm, drawn.tolist())
        fresh = _nbytes(lm.initial_state(shape.batch))
        states = _nbytes(state)
        sampler = Sampler(Sampling(), range(shape.batch)).start(device, spec.vocab)
        token = lm.logits(hidden).argmax(-1)
        stepper = Stepper(lm, token, state, sampler, (BLOCKS + 10) * BLOCK)
    weights = sum(p.nbytes for p in lm.parameters())
    if not spec.tie_embeddings:
        weights -= lm.embed.weight.nbytes
    return Call(
        lambda: stepper.run(BLOCK),
        shape.batch,
        _cost(spec, shape).flops_token * shape.batch,
        float(weights + states + fresh),  # (2)
        lambda: _step_error(lm, drawn[:1, :STEPPED].to(device)),
        turns=BLOCK,
        most=BLOCKS,
    )


@torch.inference_mode()
def _step_error(lm: LM, tokens: Tensor) -> tuple[float, int]:
    """Of the hidden states after steps, against one forward pass in fp64."""
    read = tokens.shape[1] // 2
    state = lm.initial_state(1)
    if read:
        _, state = lm(tokens[:, :read], state)
    stepped = torch.stack([lm.step(token, state) for token in tokens[:, read:].T], dim=1)
    exact, _ = copy.deepcopy(lm).double()(tokens)
    return relative(stepped, exact[:, read:]), tokens.shape[1]


def _cost(spec: LMSpec, shape: Shape) -> LMCost:
    return lm_cost(spec, shape.T)


def _tokens(spec: LMSpec, shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(spec.vocab, (shape.batch, shape.T + 1), generator=generator)


def _nbytes(state: LMState) -> int:
    return sum(part.nbytes for layer in state.layers for part in layer.values())


def _together(found: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """`relative` of all tensors as one."""
    wrong, size = 0.0, 0.0
    for a, b in zip(found, truth, strict=True):
        wrong += (a.double() - b).square().sum().item()
        size += b.square().sum().item()
    return float((wrong / max(size, 1e-300)) ** 0.5)
