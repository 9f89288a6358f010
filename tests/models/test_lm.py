import math

import pytest
import torch
from pydantic import TypeAdapter

from glactl.models.layers import glu_hidden
from glactl.models.lm import LMSpec, build_lm
from glactl.models.losses import token_losses
from glactl.models.mixers import KINDS, MIXERS, MixerSpec

EPS = torch.finfo(torch.float64).eps


def model(**fields):
    data = {"d_model": 16, "n_layers": 2, "vocab_size": 11, "init_std": 0.3} | fields
    return LMSpec.model_validate(data)


def build(seed=0, **fields):
    return build_lm(model(**fields), seed, dtype=torch.float64).eval()


def draw(*size, vocab=11, seed=0):
    return torch.randint(vocab, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"d_model": 100, "mixer": {"kind": "gla", "heads": 3}},
            r"mixer gla: heads 3 does not divide expand_k \* d_model 50",
        ),
        (
            {"d_model": 10, "mixer": {"kind": "gla", "expand_k": 0.33}},
            "mixer gla: expand_k 0.33 times d_model 10 is 3.3; allowed: a whole number, 1 or more",
        ),
        ({"mixer": {"kind": "gsa", "heads": 3}}, "mixer gsa: heads 3 does not divide d_model 16"),
        (
            {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 3}},
            "mixer attention: kv_heads 3 does not divide heads 4",
        ),
        (
            {"mixer": {"kind": "attention", "heads": 16}},
            r"positions rope needs heads of an even width, not 1 \(d_model 16 / heads 16\)",
        ),
        (
            {"n_layers": 3, "mixer": ["gla", "gsa"]},
            "n_layers 3 is not a multiple of the 2 mixers listed",
        ),
        ({"mixer": []}, "at least 1 item"),
        ({"positions": "learned"}, "positions learned needs max_len"),
        ({"ffn": "none", "ffn_hidden": 3}, "ffn_hidden is 3, but ffn is none"),
        ({"dropout": 1.0}, "less than 1"),
        ({"d_model": "16"}, "valid integer"),
        ({"init_std": "a"}, "valid number"),
        ({"init_std": math.nan}, "finite number"),
        ({"tie_embeddings": "true"}, "valid boolean"),
        ({"hidden": 3}, "Extra inputs"),
    ],
)
def test_specs_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=message):
        model(**fields)


def test_numbers_of_a_spec():
    assert model(init_std="1e-3").init_std == 1e-3
    assert model(embedding_scale=4).embedding_scale == 4.0


def test_a_spec_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        model().d_model = 3


def test_a_list_of_mixers_is_repeated():
    spec = model(n_layers=4, mixer=["gla", {"kind": "gsa", "slots": 3}])
    assert [m.kind for m in spec.mixers] == ["gla", "gsa", "gla", "gsa"]
    assert [type(b.mixer).__name__ for b in build_lm(spec, 0).blocks] == ["GLA", "GSA"] * 2
    assert model(mixer="gsa") == model(mixer={"kind": "gsa"})
    assert model(mixer="gsa") != model(mixer=["gsa"])


def test_layers_are_counted_by_kind():
    spec = model(n_layers=6, mixer=["gla", "hgrn2", {"kind": "gla", "heads": 2}])
    assert [(at.layer, at.layers) for at in spec.depths] == [
        *[(0, 4), (0, 2), (1, 4)],
        *[(2, 4), (1, 2), (3, 4)],
    ]


def test_the_schema_takes_a_mixer_by_name():
    schema = TypeAdapter(MixerSpec).json_schema()
    assert {"const", "enum"} & {key for branch in schema["anyOf"] for key in branch}
    assert KINDS[:3] == ("attention", "gla", "gsa")
    assert len(MIXERS) == len(KINDS)


@pytest.mark.parametrize(
    ("d", "hidden"), [(1024, 2816), (2048, 5632), (4096, 11008), (128, 352), (64, 160), (4, 32)]
)
def test_the_width_of_the_channel_mixer(d, hidden):
    assert glu_hidden(d) == hidden


def test_a_model_needs_its_vocabulary():
    with pytest.raises(ValueError, match="vocab_size is not set"):
        build_lm(LMSpec(), 0)


def test_weights_at_the_start():
    lm = build_lm(LMSpec(vocab_size=1000, init_std=0.02, short_conv=4, norm="layernorm"), 0)
    for name, p in lm.named_parameters():
        if p.ndim == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
        elif p.numel() > 4000:
            # the standard error of a standard deviation of n draws is 1 / sqrt(2 n) of it
            assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel())), name
    assert lm.training
    assert lm.device == torch.device("cpu")


def test_tied_embeddings_are_one_tensor():
    lm = build(tie_embeddings=True)
    assert lm.head.weight is lm.embed.weight
    assert sum(p is lm.head.weight for p in lm.parameters()) == 1
    again = build(1, tie_embeddings=True)
    again.load_state_dict(lm.state_dict())
    tokens = draw(1, 5)
    assert torch.equal(again(tokens)[0], lm(tokens)[0])
    untied = build()
    assert untied.head.weight is not untied.embed.weight


def test_embeddings_are_scaled():
    lm, tokens = build(embedding_scale=3.0, n_layers=1), draw(1, 5)
    other = build(n_layers=1)
    other.load_state_dict(lm.state_dict())
    other.embed.weight.data *= 3.0
    torch.testing.assert_close(lm(tokens)[0], other(tokens)[0], rtol=100 * EPS, atol=100 * EPS)


def test_losses_are_those_of_the_asked_targets_in_order():
    lm = build()
    hidden, _ = lm(draw(3, 7))
    targets = draw(3, 7, seed=1)
    targets[draw(3, 7, vocab=2, seed=2) == 0] = -100
    targets[0, 0] = -1
    seen = []
    lm.head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    losses, correct = token_losses(lm, hidden, targets, correct=True)
    asked = targets >= 0
    assert seen == [(int(asked.sum()), 11)]  # no logits where nothing is asked
    logits = (hidden @ lm.head.weight.T)[asked]
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    expected = -log_p[torch.arange(len(log_p)), targets[asked]]
    torch.testing.assert_close(losses, expected, rtol=100 * EPS, atol=100 * EPS)
    assert torch.equal(correct, logits.argmax(-1) == targets[asked])
    assert torch.equal(token_losses(lm, hidden, targets), losses)


def test_losses_of_nothing():
    lm = build()
    losses, correct = token_losses(
        lm, torch.zeros(1, 4, 16).double(), torch.full((1, 4), -100), correct=True
    )
    assert losses.shape == correct.shape == (0,)
    losses.sum().backward()
    assert (lm.head.weight.grad == 0).all()


def test_losses_of_bf16_logits_are_fp32():
    lm = build_lm(model(), 0, dtype=torch.bfloat16)
    hidden, _ = lm(draw(1, 5))
    assert lm.logits(hidden).dtype == torch.bfloat16
    losses = token_losses(lm, hidden, draw(1, 5, seed=1))
    assert losses.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(lm.logits(hidden)[0].double(), draw(5, seed=1))
    assert losses.double().mean().item() == pytest.approx(
        expected.item(), rel=64 * torch.finfo(torch.float32).eps
    )


@pytest.mark.parametrize("field", ["dropout", "embed_dropout"])
def test_dropout_is_for_training_alone(field):
    lm, tokens = build(**{field: 0.5}), draw(1, 5)
    plain = build()
    assert torch.equal(lm(tokens)[0], plain(tokens)[0])
    lm.train()
    torch.manual_seed(0)
    first = lm(tokens)[0]
    assert not torch.equal(first, lm(tokens)[0])
    torch.manual_seed(0)
    assert torch.equal(first, lm(tokens)[0])


def test_learned_positions_end_at_max_len():
    lm = build(positions="learned", max_len=6, mixer="attention")
    _, state = lm(draw(2, 5), lm.initial_state(2))
    lm.step(draw(2), state)
    with pytest.raises(ValueError, match="position 7 is beyond the model's max_len 6"):
        lm.step(draw(2), state)
    with pytest.raises(ValueError, match="position 7 is beyond the model's max_len 6"):
        lm(draw(1, 7))
    # in packed documents positions begin again
    lm(draw(1, 12), cu_seqlens=torch.tensor([0, 6, 12]))


def test_learned_positions_are_seen():
    lm = build(positions="learned", max_len=6, mixer="attention")
    same = torch.zeros(1, 4, dtype=torch.int64)
    hidden = lm(same)[0][0]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((draw(5),), r"tokens are \(5,\); allowed: two axes, \(B, T\)"),
        ((draw(2, 4), None, torch.tensor([0, 4])), r"cu_seqlens is \(2,\) with tokens \(2, 4\)"),
        ((draw(1, 4), None, torch.tensor([[0, 4]])), r"cu_seqlens is \(1, 2\) with tokens"),
        ((draw(1, 4), None, torch.tensor([0, 3])), r"cu_seqlens is \[0, 3\]; allowed: from 0 to 4"),
        ((draw(1, 4), None, torch.tensor([1, 4])), r"cu_seqlens is \[1, 4\]; allowed"),
        ((draw(1, 4), None, torch.tensor([0, 3, 2, 4])), "never falling"),
    ],
)
def test_arguments_that_do_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        build()(*args)


def test_a_state_of_other_sequences():
    lm = build()
    state = lm.initial_state(3)
    with pytest.raises(ValueError, match="state is of 3 sequences; allowed: 2"):
        lm(draw(2, 4), state)
    with pytest.raises(ValueError, match="state is of 3 sequences; allowed: 1"):
        lm(draw(1, 4), state, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"tokens are \(2,\); allowed: \(3,\)"):
        lm.step(draw(2), state)


def test_gradients_flow_through_a_state():
    lm = build(mixer=["gla", "gsa"], short_conv=3)
    _, state = lm(draw(1, 4), lm.initial_state(1))
    hidden, _ = lm(draw(1, 3, seed=1), state)
    assert state.layers[0]["s"].requires_grad
    (g,) = torch.autograd.grad(hidden.sin().sum(), [state.layers[0]["s"]])
    assert torch.isfinite(g).all()
    assert (g != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [kind for kind in KINDS if kind != "conv"])  # it sees 2 back
def test_small_models_learn_to_copy(mixer):
    """Half of a row is 8 of 16 tokens, the rest repeats it: only mixing along time can tell it.

    A model that knows nothing but the eight guesses one in eight.
    """
    data = {"d_model": 64, "n_layers": 2, "vocab_size": 16, "short_conv": 3, "init_std": 0.1}
    heads = {"hgrn2": {"expand_ratio": 32}, "mamba": {}}.get(mixer, {"heads": 2})
    spec = LMSpec.model_validate(data | {"mixer": {"kind": mixer} | heads})
    lm = build_lm(spec, 0)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(500):
        generator = torch.Generator().manual_seed(step)
        half = torch.rand(32, 16, generator=generator).argsort(-1)[:, :8]
        tokens = torch.cat([half, half], 1)
        targets = tokens.roll(-1, 1)
        targets[:, :8] = -100
        targets[:, -1] = -100
        hidden, _ = lm(tokens)
        losses, correct = token_losses(lm, hidden, targets, correct=True)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if correct.float().mean() > 0.9:
            return
    pytest.fail(f"accuracy {correct.float().mean():.2f} after {step + 1} steps")


def test_fresh_weights_are_wider_in_narrow_models():
    assert LMSpec(d_model=64).std == 0.08
    assert LMSpec(d_model=400).std == pytest.approx(0.05)
    assert LMSpec(d_model=400, init_std=0.02).std == 0.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ffn", ["swiglu", "none"])
def test_hidden_states_that_are_asked_for_are_those_of_all_of_them(ffn, training):
    """In evaluation mode the last channel mixer is left out at the other places."""
    size = {"d_model": 16, "n_layers": 2, "vocab_size": 11, "ffn": ffn}
    lm = build_lm(LMSpec.model_validate(size | {"mixer": "gla"}), 0).train(training)
    tokens = torch.randint(lm.spec.vocab, (3, 7))
    whole, none = lm(tokens)
    asked = torch.tensor([2, 7, 20])
    widths = []
    for block in lm.blocks if ffn == "swiglu" else []:
        block.ffn.register_forward_hook(lambda _, x, y: widths.append(y.shape[:-1].numel()))
    some, after = lm(tokens, lm.initial_state(3), asked=asked)
    assert widths == ([] if ffn == "none" else [21, 21 if training else 3])
    torch.testing.assert_close(some, whole.flatten(0, 1)[asked])
    assert none is None
    assert after is not None
    assert after.position.tolist() == [7, 7, 7]
    empty, _ = lm(tokens, asked=asked[:0])
    assert empty.shape == (0, 16)
