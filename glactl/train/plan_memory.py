"""The bytes that a training step keeps for its backward pass, of a model that is never made whole.

Those of a layer are proportional to its tokens and, at one width of heads and but for small parts,
to the number of heads. So a narrower model is run where a model is wide, with 1 / s of the heads,
of the width and of the inner width, with one and with two layers, on one short row, and what
autograd saves is counted, each storage once and no weights; with V tokens in the vocabulary and n
in the row, w_1 and w_2 bytes of one and of two layers are

    layer = s (w_2 - w_1),   outside = s (2 w_1 - w_2 - 4 V n) + 4 V n                 (1)

where 4 V n are the logits. The count is that of the PyTorch form that runs on a CPU, in fp32; the
kernels for a GPU keep less.
"""

import math

import torch

from glactl.measure import saved_bytes
from glactl.models.lm import LM, build_lm
from glactl.models.lm_spec import LMSpec
from glactl.models.losses import token_losses
from glactl.models.mixers import MixerSpec

WIDE = 512  # the least width that a model is narrowed to
SHORT = 256  # tokens of the row, a multiple of the chunks that mixers take


def activation_bytes(spec: LMSpec, tokens: int) -> int:
    """Kept of a micro-batch of so many tokens, fp32.

    Args:
        spec: with vocab_size set.
        tokens: of all rows.

    Cost: well below a second and little memory, unless one head alone is very wide.
    """
    of_kind: dict[str, tuple[MixerSpec, int]] = {}
    for mixer in spec.mixers:
        key = mixer.model_dump_json()
        of_kind[key] = mixer, of_kind.get(key, (mixer, 0))[1] + 1
    total, outside = 0.0, 0.0
    logits = 4.0 * spec.vocab * SHORT
    for mixer, count in of_kind.values():
        narrow, s = _narrow(spec, mixer)
        one, two = (_saved(narrow.model_copy(update={"n_layers": n})) for n in (1, 2))
        total += count * s * (two - one)
        outside = s * (2 * one - two - logits) + logits  # (1)
    return round((total + outside) * tokens / SHORT)


def _narrow(spec: LMSpec, mixer: MixerSpec) -> tuple[LMSpec, int]:
    """One layer of `mixer` in a model of 1 / s of the width, and s, as large as there can be."""
    heads = [getattr(mixer, name, None) for name in ("heads", "kv_heads")]
    shared = math.gcd(*(n for n in heads if n), spec.d_model, spec.hidden) if heads[0] else 1
    for s in sorted((n for n in range(1, shared + 1) if shared % n == 0), reverse=True):
        if s > 1 and spec.d_model < WIDE * s:
            continue
        fewer = {n: v // s for n in ("heads", "kv_heads") if (v := getattr(mixer, n, None))}
        fields = spec.model_dump() | {
            "d_model": spec.d_model // s,
            "ffn_hidden": spec.hidden // s or None,
            "n_layers": 1,
            "mixer": mixer.model_dump() | fewer,
            "max_len": None if spec.max_len is None else max(spec.max_len, SHORT),
        }
        try:
            return LMSpec.model_validate(fields), s
        except ValueError:
            continue  # some mixers' widths are not shares of the model's
    raise AssertionError("a model of its own width is one")


def _saved(spec: LMSpec) -> int:
    lm: LM = build_lm(spec, 0)
    tokens = torch.zeros(1, SHORT, dtype=torch.int64)
    return saved_bytes(lambda: token_losses(lm, lm(tokens)[0], tokens), lm.parameters())
