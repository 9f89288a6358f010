import pytest
import torch

from glactl.tasks.batching import Budget, Group, alone, grouped, out_of_memory


def test_rows_that_begin_alike_are_grouped():
    question, other = list(range(50)), list(range(100, 150))
    ids = [[*question, 7, 8], [*other, 1], [*question, 9], [*other, 2, 3], [5] * 40]
    found = grouped(range(5), ids, [len(i) - 1 for i in ids], shortest=10)
    assert {(frozenset(g.rows), g.shared) for g in found} == {
        (frozenset({0, 2}), 50),
        (frozenset({1, 3}), 50),
        (frozenset({4}), 0),
    }


def test_what_may_be_shared_is_never_exceeded():
    ids = [list(range(50))] * 3
    (group,) = grouped(range(3), ids, [30, 49, 40], shortest=10)
    assert sorted(group.rows) == [0, 1, 2]
    assert group.shared == 30


def test_short_beginnings_are_not_shared():
    ids = [[*range(9), 1], [*range(9), 2]]
    assert [g.shared for g in grouped(range(2), ids, [9, 9], shortest=10)] == [0, 0]
    assert [g.shared for g in grouped(range(2), ids, [9, 9], shortest=9)] == [9]
    # less than half of the longer row
    ids = [[*range(12)], [*range(12), *range(50)]]
    assert [g.shared for g in grouped(range(2), ids, [11, 61], shortest=10)] == [0, 0]


def test_a_row_joins_only_where_more_is_saved():
    """Ten shared tokens among three save less than forty among two."""
    ids = [[*range(40), 1], [*range(40), 2], [*range(10), 3, 4, 5]]
    found = grouped(range(3), ids, [len(i) - 1 for i in ids], shortest=5)
    assert {(g.rows, g.shared) for g in found} == {((0, 1), 40), ((2,), 0)}


def weights(sizes):
    return lambda group: sum(sizes[row] for row in group.rows)


def test_batches_hold_the_budget_the_heaviest_first():
    sizes, seen = [3, 9, 4, 20, 2], []
    Budget(10).run(alone(range(5)), weights(sizes), lambda b: seen.append([g.rows[0] for g in b]))
    assert seen == [[3], [1], [2, 0, 4]]


def test_no_batch_is_left_with_a_few_rows():
    seen = []
    for most in (None, 5):
        Budget(50).run(alone(range(12)), lambda _: 10, lambda b: seen.append(len(b)), most)
    assert seen == [4, 4, 4] * 2


def test_no_more_rows_than_asked_for():
    seen = []
    Budget(100).run(alone(range(5)), weights([1] * 5), lambda b: seen.append(len(b)), most=2)
    assert seen == [2, 2, 1]


def test_a_budget_is_halved_when_memory_runs_out_and_stays():
    done, tried = [], []

    def do(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("no")
        done.extend(g.rows[0] for g in batch)

    budget = Budget(16)
    budget.run(alone(range(16)), weights([1] * 16), do)
    assert sorted(done) == list(range(16))
    assert tried == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert budget.size == 2


def test_a_group_too_large_is_split():
    done = []

    def do(batch):
        rows = [row for g in batch for row in g.rows]
        if len(rows) > 2:
            raise MemoryError
        done.append((rows, {g.shared for g in batch}))

    Budget(4).run([Group((0, 1, 2, 3), 5)], weights([1] * 4), do)
    assert sorted(row for rows, _ in done for row in rows) == [0, 1, 2, 3]
    assert {s for _, shared in done for s in shared} == {5}


def test_a_row_that_never_fits_ends_in_the_error():
    def do(batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        Budget(4).run(alone([0]), weights([1]), do)
    budget = Budget(64)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        budget.run(alone([0]), weights([64]), do, least=10)
    assert budget.size == 8  # it was tried in pieces of 32, 16 and 8


def test_other_errors_pass():
    def do(batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        Budget(4).run(alone(range(2)), weights([1, 1]), do)
    assert not out_of_memory(RuntimeError("something else"))
