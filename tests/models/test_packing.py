"""Training on packed documents is training on the documents, one at a time; for every mixer."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from glactl.models.lm import build_lm
from glactl.models.losses import token_losses
from glactl.tasks.frames import Frames
from glactl.tasks.packing import pack

# fp64. A gradient is a sum of at most 60 tokens' terms, each behind two layers of up to 8 nested
# products forward and as many back, sums of at most 64 terms with values up to 10 times the result.
TOL = 60 * 2 * 8 * 64 * 10 * torch.finfo(torch.float64).eps


class Letters:
    """Characters as tokens 0 to 8, BOS 9 and EOS 10."""

    vocab_size, bos_id, eos_id = 11, 9, 10

    def array(self, text):
        return np.array([ord(c) % 9 for c in text], np.uint8)


def batch():
    """Three rows of 20: documents that rows cut, whole ones, some of one letter."""
    frames = Frames(Letters(), "both")
    for text in ("a long document here", "x", "short", "the last one", "ab", "y", "nearly done"):
        frames.add(text)
    frames.close()
    return pack([(frames, r) for r in (0, 1, 2)], 20, packed=True)


def gradients(lm, rows):
    """Of the sum of the losses of (tokens, targets, bounds or None)."""
    lm.zero_grad()
    total = 0.0
    for tokens, targets, bounds in rows:
        hidden, _ = lm(tokens, cu_seqlens=bounds)
        loss = token_losses(lm, hidden, targets).sum()
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in lm.named_parameters()}


def test_gradients_of_packed_documents_are_those_of_separate_ones(spec):
    packed = batch()
    bounds = packed.cu_seqlens.tolist()
    assert {0, 20, 40, 60} < set(bounds)
    assert len(bounds) > 7
    lm = build_lm(spec, 0, dtype=torch.float64)
    tokens, targets = packed.tokens.reshape(1, -1), packed.targets.reshape(1, -1)
    together, found = gradients(lm, [(tokens, targets, packed.cu_seqlens)])
    alone = [(tokens[:, a:b], targets[:, a:b], None) for a, b in pairwise(bounds)]
    apart, expected = gradients(lm, alone)
    assert together == pytest.approx(apart, rel=TOL)
    for name, g in expected.items():
        scale = g.abs().max().item()
        assert scale > 0, name
        assert (found[name] - g).abs().max() <= TOL * max(scale, 1), name


def test_without_bounds_they_are_others(spec):
    """So the test above tells them apart: what is before a document changes its gradients."""
    packed = batch()
    lm = build_lm(spec, 0, dtype=torch.float64)
    tokens, targets = packed.tokens.reshape(1, -1), packed.targets.reshape(1, -1)
    _, found = gradients(lm, [(tokens, targets, packed.cu_seqlens)])
    _, leaking = gradients(lm, [(packed.tokens, packed.targets, None)])
    worst = max((found[n] - g).abs().max().item() for n, g in leaking.items())
    assert worst > 1e6 * TOL


def test_a_document_does_not_see_the_one_before(spec):
    """Bit for bit: other tokens in the first document, the same hidden states in the second."""
    lm = build_lm(spec, 0, dtype=torch.float64).eval()
    packed = batch()
    tokens, bounds = packed.tokens.reshape(1, -1), packed.cu_seqlens
    other = tokens.clone()
    first = int(bounds[1])
    other[:, :first] = (other[:, :first] + 1) % 9
    with torch.no_grad():
        a, b = (lm(x, cu_seqlens=bounds)[0][:, first:] for x in (tokens, other))
    assert torch.equal(a, b)
