import json
import re
import shutil
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from glactl import page
from glactl.cli.main import app
from glactl.run import Run
from glactl.train.loop import train

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# what a page would have to fetch; names of vocabularies in the attributes of an <svg> are no links
OUTSIDE = re.compile(r"""(?:\bsrc=|\bhref=|url\(|@import)\s*["']?(?!["']?#)""")


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder, on a machine whose rates need not be measured."""
    from glactl.measure import Rates

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glactl.profile.command.rates", lambda *_: Rates(1e10, 1e11, "float32"))
    monkeypatch.setattr("glactl.profile.plan.SECONDS", 0.0)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def run(tiny_spec, toy, tmp_path):
    """A run that has ended."""
    run = Run.create(tiny_spec, "name: toy  # <script>", tmp_path / "runs")
    list(train(run.spec, device=torch.device("cpu"), run=run, task=toy))
    run.event("end", step=8, valid={"loss": 1.0}, floors={"gzip -9": 2.5})
    return run


def test_the_page_of_a_run(glactl, run):
    done = glactl("report", run.path)
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r".*/report\.html: run, \d+ KiB, needs no network\n", done.stdout)
    text = (run.path / "report.html").read_text()
    assert "<h1>Run toy-" in text
    assert "# &lt;script&gt;" in text
    assert "8 of 8 steps" in text
    assert "it has not ended" not in text
    assert text.count("<svg") == 1
    assert "gzip -9</td><td>2.5" in text
    assert not OUTSIDE.search(text)
    assert "<script" not in text


def test_a_run_that_goes_on_has_a_page_too(glactl, run):
    metrics = run.path / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:3], lines[3][:20]]))  # a line half written
    (run.path / "events.jsonl").write_text("")
    assert glactl("report").exit_code == 0  # the newest
    text = (run.path / "report.html").read_text()
    assert "3 of 8 steps" in text
    assert "it has not ended" in text
    metrics.unlink()
    assert glactl("report", run.path).exit_code == 0
    assert "No step has been taken yet." in (run.path / "report.html").read_text()


def profiled(glactl, tmp_path):
    args = ["--seqlen", "16,32", "--mixers", "attention,gla", "--heads", 2, "--width", 8]
    parts = ["--parts", "operators", "--kernels", "--quiet"]
    assert glactl("profile", *args, *parts).exit_code == 0
    (folder,) = (tmp_path / "profiles").iterdir()
    return folder


def test_the_page_of_a_profile_is_made_again(glactl, tmp_path):
    folder = profiled(glactl, tmp_path)
    first = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    done = glactl("report", folder, "--json")
    assert json.loads(done.stdout)["kind"] == "profile"
    assert (folder / "report.html").read_text() == first
    assert first.count("<svg") == 2
    assert "Kernels of gla, fwd+bwd, T 32" in first
    assert not OUTSIDE.search(first)
    (folder / "results.json").write_text("{}")
    done = glactl("report", folder)
    assert done.exit_code == 2
    assert "is not of a profile by this version" in done.stderr


@pytest.mark.parametrize(
    ("file", "kind"), [("sweep.yaml", "sweep"), ("summary.json", "evaluation")]
)
def test_sweeps_and_evaluations_have_made_their_own(glactl, tmp_path, file, kind):
    (tmp_path / file).write_text("{}")
    done = glactl("report", tmp_path)
    assert done.exit_code == 2
    assert f"has no report.html; that of its {kind} is made by" in done.stderr
    (tmp_path / "report.html").write_text("mine")
    done = glactl("report", tmp_path)
    assert done.exit_code == 0
    assert f": {kind}, 0 KiB" in done.stdout
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_folder_without_a_result(glactl, tmp_path):
    done = glactl("report", tmp_path)
    assert done.exit_code == 2
    assert "has no result; allowed: the folder of a run, a sweep, an eval" in done.stderr
    done = glactl("report")
    assert done.exit_code == 2
    assert "no run with a checkpoint in runs; make one: glactl train" in done.stderr


def test_what_a_page_is_made_of():
    assert page.paragraph("a & b", "note") == '<p class="note">a &amp; b</p>'
    assert page.block("<") == "<pre>&lt;</pre>"
    table = page.table(["x", "y"], [["<a>", None], [12345.6, 0.123456]], code=True)
    assert "<td>&lt;a&gt;</td><td><code>-</code></td>" in table
    assert "<td>12,346</td><td><code>0.1235</code></td>" in table
    svg = (
        '<?xml?><svg><metadata>http://w</metadata><a id="m"/><use href="#m" fill="url(#m)"/></svg>'
    )
    shown = '<svg><a id="f-m"/><use href="#f-m" fill="url(#f-m)"/></svg>'
    assert page.inline(svg, "f") == shown


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("kind", ["run", "profile"])
def test_a_browser_shows_the_page_without_a_network(kind, request, glactl, tmp_path):
    from matplotlib.image import imread

    if kind == "run":
        folder = request.getfixturevalue("run").path
        assert glactl("report", folder).exit_code == 0
    else:
        folder = profiled(glactl, tmp_path)
    picture = tmp_path / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    page_file = (folder / "report.html").as_uri()
    subprocess.run(
        [*command, f"--screenshot={picture}", page_file],
        check=True,
        capture_output=True,
        timeout=60,
    )
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (1600, 1200)
    dark = (pixels.max(-1) < 0.4).mean(1) > 0  # rows of the picture with text or lines in them
    blue = abs(pixels - [0x1F / 255, 0x77 / 255, 0xB4 / 255]).max(-1) < 0.02  # a curve's colour
    assert dark[:100].any()
    assert dark.mean() > 0.3
    assert blue.sum() > 500
