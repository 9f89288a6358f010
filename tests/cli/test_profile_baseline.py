import json

import pytest

from glactl.profile.baseline import Regression, compare, parse_share, read, show
from glactl.profile.cases import Failed, Measured


def row(median, half, T=8):
    """A row whose 10th and 90th percentiles are `half` below and above the median."""
    p = (median, median - half, median + half)
    return Measured("operator", "gla", "forward", T, 1, *p, 9, 0, 0, 0, 0, 0, "memory")


def before(*rows):
    names = ("part", "name", "work", "T", "batch", "median", "p10", "p90")
    return {"results": [{name: getattr(r, name) for name in names} for r in rows]}


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("0", 0), (" 12.5% ", 0.125)]
)
def test_shares(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "five", "-1%", "nan", "inf"])
def test_shares_that_are_none(text):
    with pytest.raises(ValueError, match=r"fail_above is .*allowed: a share of 0 or more"):
        parse_share(text)


@pytest.mark.parametrize(
    ("median", "noise_then", "noise_now", "failed"),
    [
        (1.00, 0.0, 0.0, False),
        (1.04, 0.0, 0.0, False),
        (1.06, 0.0, 0.0, True),
        (1.06, 0.03, 0.0, False),  # 6 % less 3 % is below 5 %
        (1.06, 0.0, 0.03, False),
        (1.20, 0.03, 0.04 * 1.2, True),  # 20 % less sqrt(0.03^2 + 0.04^2)
        (0.50, 0.0, 0.0, False),
    ],
)
def test_noise_of_both_is_taken_off(median, noise_then, noise_now, failed):
    (one,) = compare(before(row(1.0, noise_then)), [row(median, noise_now)], [], 0.05)
    assert one.failed == failed
    assert one.change == pytest.approx(median - 1)
    assert one.noise == pytest.approx((noise_then**2 + (noise_now / median) ** 2) ** 0.5)


def test_a_row_that_cannot_be_measured_any_more_failed(capsys):
    lost = Failed("operator", "gla", "forward", 8, 1, "out of memory")
    found = compare(before(row(1.0, 0)), [], [lost], 0.05)
    assert found[0].failed
    assert found[0].now is None
    with pytest.raises(Regression, match="1 of 1 rows are over 5%: operator gla forward T=8"):
        show(found, "old.json", 0.05)
    assert "beside old.json" in capsys.readouterr().out


def test_rows_of_other_calls_are_not_compared():
    found = compare(before(row(1.0, 0), row(1.0, 0, T=16)), [row(1.0, 0, T=16)], [], 0.05)
    assert [one.key[3] for one in found] == [16]
    with pytest.raises(ValueError, match="baseline has no row of the calls measured here"):
        compare(before(row(1.0, 0)), [row(1.0, 0, T=16)], [], 0.05)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"results": []}), "\xff"])
def test_files_that_are_no_profile(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"results\.json is not the results\.json of a profile"):
        read(tmp_path)
