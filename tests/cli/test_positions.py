import pytest
import torch

from glactl.tasks import Batch
from glactl.train.positions import Positions, without_positions


def batch(targets, bounds=None, **more):
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    return Batch(torch.zeros_like(targets), targets, cu_seqlens=bounds, **more)


def by_hand(losses, places):
    """The mean loss of the positions from a to b, one part at a time."""
    found = {}
    for a, b in [(0, 63), (64, 127), (128, 255), (256, 511)]:
        inside = [x for x, p in zip(losses, places, strict=True) if a <= p <= b]
        if inside:
            found[f"loss {a}-{b}"] = pytest.approx(sum(inside) / len(inside), rel=1e-12)
    return found


def test_positions_in_rows():
    """Rows of 300, of which some targets are not asked for."""
    targets = torch.ones(3, 300, dtype=torch.int64)
    targets[0, 64:70] = targets[2, 256:] = -100
    places = [t for row in targets for t in range(300) if row[t] >= 0]
    losses = torch.randn(len(places), generator=torch.Generator().manual_seed(0)).double()
    positions = Positions()
    positions.add(batch(targets), losses)
    assert positions.numbers() == by_hand(losses.tolist(), places)


def test_positions_in_packed_documents_and_over_batches():
    bounds = [0, 10, 200, 201, 256]
    places = [p - max(b for b in bounds if b <= p) for p in range(256)]
    losses = torch.arange(256).double()
    positions = Positions()
    for _ in range(2):
        positions.add(batch(torch.ones(2, 128, dtype=torch.int64), bounds), losses)
    assert positions.numbers() == by_hand(losses.tolist(), places)
    assert list(positions.numbers()) == ["loss 0-63", "loss 64-127", "loss 128-255"]


def test_what_has_no_positions_to_tell_apart():
    positions = Positions()
    assert positions.numbers() == {}
    positions.add(batch(torch.ones(2, 64, dtype=torch.int64)), torch.ones(128))
    assert positions.numbers() == {}
    recall = batch(torch.ones(1, 200, dtype=torch.int64), pairs=torch.ones(1))
    positions.add(recall, torch.ones(200))
    assert positions.numbers() == {}


def test_a_line_without_them():
    numbers = {"loss": 1.0, "ppl": 2.7, "loss 0-63": 1.5, "loss 64-127": 0.5, "bpb": 1.0}
    assert without_positions(numbers) == {"loss": 1.0, "ppl": 2.7, "bpb": 1.0}
