import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from glactl.cli.main import app
from glactl.generate.command import generate
from glactl.generate.prompts import read_prompts
from glactl.generate.states import load_past, save_past
from glactl.models.lm import LMSpec, build_lm
from glactl.models.sampling import Sampling
from glactl.run import Position
from glactl.tasks.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PROMPTS = ["The heron", "", "a longer prompt, été", "x"]


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def build(mixer, **fields):
    data = {"d_model": 16, "n_layers": 2, "init_std": 0.3, "vocab_size": 259, **fields}
    spec = LMSpec.model_validate(data | {"mixer": {"kind": mixer, "heads": 2}})
    return build_lm(spec, 0, dtype=torch.float64).eval()


@pytest.mark.parametrize("mixer", ["attention", "gla", "gsa"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=20, top_p=0.9, seed=3)])
def test_a_batch_of_ragged_prompts_equals_single_prompts(mixer, sampling):
    lm = build(mixer)
    together = generate(lm, TOKENIZER, PROMPTS, 12, sampling)
    single = [generate(lm, TOKENIZER, [p], 12, sampling) for p in PROMPTS]
    assert together.texts == [one.texts[0] for one in single]
    assert together.prompt_tokens == sum(one.prompt_tokens for one in single)
    assert together.tokens == sum(one.tokens for one in single)


def test_what_is_shown_adds_up_to_the_text():
    shown = [""] * len(PROMPTS)

    def show(row, text):
        shown[row] += text

    made = generate(build("gla"), TOKENIZER, PROMPTS, 40, Sampling(1.0), ["e"], show=show)
    assert shown == made.texts
    assert all("e" not in text for text in shown)


def test_the_state_of_a_linear_mixer_does_not_grow():
    lm = build("gla")
    sizes = {generate(lm, TOKENIZER, ["x" * n], 1).state_bytes for n in (1, 10, 200)}
    assert len(sizes) == 1
    assert sizes.pop() > 0


def test_no_tokens():
    made = generate(build("gla"), TOKENIZER, ["x"], 0)
    assert (made.texts, made.tokens) == ([""], 0)


def test_learned_positions_are_a_limit():
    lm = build("attention", positions="learned", max_len=10)
    assert generate(lm, TOKENIZER, ["12345678"], 3).tokens == 3
    with pytest.raises(ValueError, match=r"a prompt of 8 tokens and max_tokens 4 .* max_len 10"):
        generate(lm, TOKENIZER, ["12345678"], 4)


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [([], 1, "prompts is empty"), (["x"], -1, "max_tokens is -1; allowed: 0 or more")],
)
def test_arguments_out_of_range(prompts, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(build("gla"), TOKENIZER, prompts, max_tokens)


def test_one_prompt_is_streamed(glactl, byte_run):
    done = glactl("generate", byte_run.path, "--prompt", "The ", "-n", 20, "--seed", 1)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("The ")
    assert done.stdout.endswith("\n")
    lm, tokenizer, _ = byte_run.load_model()
    (text,) = generate(lm, tokenizer, ["The "], 20, Sampling(0.8, seed=1)).texts
    assert done.stdout == f"The {text}\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("prefill 4 tokens in ")
    assert " tokens/s; state " in line
    assert glactl("generate", byte_run.path, "--prompt", "The ", "-n", 20, "--seed", 1).stdout == (
        done.stdout
    )


def test_no_prompt_begins_a_text_with_the_newest_run(glactl, byte_run, tmp_path):
    done = glactl("generate", "-n", 5, "--temperature", 0)
    assert done.exit_code == 0, done.output
    assert f"run {byte_run.path.relative_to(tmp_path)} (the newest)" in done.stderr
    assert "prefill 1 tokens" in done.stderr


def test_many_prompts_as_json_and_as_text(glactl, byte_run, tmp_path):
    (tmp_path / "more.jsonl").write_text('"three"\n\n{"prompt": "four"}\n{"text": "five"}\n')
    args = ["generate", "-p", "one", "-p", "two", "--prompts", "more.jsonl", "-n", 6]
    done = glactl(*args, "--json", "--top-k", 5, "--top-p", 0.9, "--stop", "\n")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two", "three", "four", "five"]
    done = glactl(*args)
    assert "--- 1\none" in done.stdout
    assert "\n--- 5\nfive" in done.stdout


def test_prompts_from_a_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("first\n\n second \n")
    assert read_prompts(path) == ["first", " second "]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"{", r"p.jsonl:1: not JSON: "),
        ("p.jsonl", b'"a"\n[1]', r'p.jsonl:2: neither a string nor an object with "prompt"'),
        ("p.jsonl", b'{"question": "x"}', r"p.jsonl:1: neither a string"),
        ("p.txt", b"\xff\xfe", r"p.txt: not UTF-8 text \(byte 0\)"),
        ("p.txt", b"\n\n", r"p.txt has no prompts"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "-1"], "error: temperature is -1.0; allowed: 0 or more"),
        (["--top-k", "0"], "error: top_k is 0; allowed: 1 or more"),
        (["--top-p", "2"], "error: top_p is 2.0; allowed: more than 0, at most 1"),
        (["--min-p", "2"], "error: min_p is 2.0; allowed: 0 to 1"),
        (["--repetition-penalty", "0"], "error: repetition_penalty is 0.0; allowed: more than 0"),
        (["--prefill-chunk", "0"], "error: prefill_chunk is 0; allowed: 1 or more"),
        (["--state", "gone.st"], "error: no state at gone.st"),
        (
            ["-p", "a", "-p", "b", "--save-state", "s"],
            "error: save_state keeps the state of one prompt; there are 2",
        ),
        (["--max-tokens", "-3"], "error: max_tokens is -3; allowed: 0 or more"),
        (["--prompts", "gone.txt"], "error: no file of prompts at gone.txt"),
        (["nowhere"], "error: nowhere is not a run folder"),
        (["--precision", "fp8"], "error: precision 'fp8'; allowed: auto, fp32, bf16"),
        (["--device", "tpu"], "error: device 'tpu' is not known"),
    ],
)
def test_errors_are_one_line(glactl, byte_run, args, message):
    done = glactl("generate", *args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1


def test_weights_in_bf16(glactl, byte_run, tmp_path):
    """Steps stay close to a forward pass, as close as bf16 has digits; a state goes either way."""
    state = tmp_path / "state.st"
    args = ("generate", byte_run.path, "-n", "4", "--temperature", "0")
    done = glactl(*args, "--precision", "bf16", "--check", "-p", "abcdefgh", "--save-state", state)
    assert done.exit_code == 0, done.stderr
    note = next(line for line in done.stderr.splitlines() if "differ by" in line)
    assert float(note.split("differ by ")[1].split()[0]) < 0.05
    assert load_file(state)["hidden"].dtype == torch.bfloat16
    for precision in ("bf16", "fp32"):
        more = glactl(*args, "--precision", precision, "--state", state)
        assert more.exit_code == 0, more.stderr


def test_a_run_without_a_tokenizer(glactl, byte_run):
    (byte_run.path / "tokenizer").rename(byte_run.path / "gone")
    done = glactl("generate")
    assert done.exit_code == 2
    assert "has no tokenizer, its data is not text" in done.stderr


def test_without_any_run(glactl):
    done = glactl("generate")
    assert done.exit_code == 2
    assert "error: no run with a checkpoint in runs; make one: glactl train" in done.stderr


def test_samples_of_a_prompt_differ_and_do_not_depend_on_the_batch(glactl, byte_run, monkeypatch):
    """Five of each of two prompts, at once or three rows at a time."""
    args = ("generate", byte_run.path, "-p", "a", "-p", "b", "--samples", 5, "--json", "-n", 6)
    whole = glactl(*args)
    assert whole.exit_code == 0, whole.stderr
    rows = [json.loads(line) for line in whole.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["a"] * 5 + ["b"] * 5
    assert len({row["text"] for row in rows}) > 5
    monkeypatch.setattr("glactl.generate.command.BATCH", 3)
    assert glactl(*args).stdout == whole.stdout


@pytest.mark.parametrize("end", ["bos_id", "eos_id"])
def test_a_text_ends_where_another_one_would_begin(end):
    lm = build("gla")
    assert generate(lm, TOKENIZER, ["x"], 9).tokens == 9
    with torch.no_grad():  # what follows "x" is the end, by far
        lm.head.weight[getattr(TOKENIZER, end)] = 1e3 * lm(torch.tensor([[120]]))[0][0, -1]
    made = generate(lm, TOKENIZER, ["x"], 9)
    assert (made.tokens, made.texts) == (1, [""])


def test_pieces_of_prompts_and_a_check(glactl, byte_run):
    args = ("generate", byte_run.path, "-p", "The heron stands", "-n", 9, "--temperature", 0)
    whole = glactl(*args)
    done = glactl(*args, "--prefill-chunk", 3, "--check")
    assert done.stdout == whole.stdout
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("check: ")]
    assert "steps and one forward pass over 16 tokens differ by " in line
    assert float(line.split(" differ by ")[1].split()[0]) < 1e-5  # fp32, untrained
    assert "check" not in whole.stderr


@pytest.mark.parametrize("penalty", [1.0, 3.0])
@pytest.mark.parametrize("mixer", ["attention", "gla", "gsa"])
def test_a_saved_state_goes_on_as_the_text_itself(mixer, penalty, tmp_path):
    """fp64: the same tokens, drawn by the same numbers, wherever the text was cut."""
    lm, kept = build(mixer, short_conv=3), tmp_path / "kept"
    sampling = Sampling(0.9, seed=4, repetition_penalty=penalty)
    more = [" stands", "", " and", "!"]
    expected = generate(lm, TOKENIZER, [f"The heron{text}" for text in more], 12, sampling)
    generate(lm, TOKENIZER, ["The heron"], 3, keep=lambda past: save_past(kept, past, "of this"))
    past = load_past(kept, lm, "of this")
    for _ in range(2):  # using it does not use it up
        made = generate(lm, TOKENIZER, more, 12, sampling, past=past, piece=5)
        assert made.texts == expected.texts
        assert made.prompt_tokens == 12
    longest = generate(
        lm, TOKENIZER, [more[0]], 0, keep=lambda p: save_past(kept, p, ""), past=past
    )
    assert longest.state_bytes > 0
    again = load_past(kept, lm, "")
    made = generate(lm, TOKENIZER, [""], 12, sampling, past=again)
    assert made.texts == expected.texts[:1]


def test_a_state_of_another_checkpoint(tmp_path):
    lm, kept = build("gla"), tmp_path / "kept"
    generate(lm, TOKENIZER, ["x"], 0, keep=lambda past: save_past(kept, past, "a" * 64))
    with pytest.raises(
        ValueError, match=r"is a state of checkpoint a{12}; allowed: b{12}, the one"
    ):
        load_past(kept, lm, "b" * 64)
    kept.write_bytes(b"something else")
    with pytest.raises(ValueError, match="kept is not a state: "):
        load_past(kept, lm, "a" * 64)
    save_file({"x": torch.zeros(1)}, kept)
    with pytest.raises(ValueError, match="kept is not a state that --save-state wrote"):
        load_past(kept, lm, "a" * 64)


def test_states_on_the_command_line(glactl, byte_run):
    options = ("-n", 9, "--seed", 3)
    whole = glactl("generate", byte_run.path, "-p", "The heron stands", *options)
    first = glactl("generate", byte_run.path, "-p", "The heron", "-n", 0, "--save-state", "a/b")
    assert first.exit_code == 0, first.stderr
    done = glactl("generate", byte_run.path, "--state", "a/b", "-p", " stands", *options)
    assert done.exit_code == 0, done.stderr
    assert f"The heron{done.stdout}" == whole.stdout
    assert "prefill 7 tokens" in done.stderr
    model = build_lm(byte_run.spec.model, 1)
    at = Position(0, 40, "toy", step=4)
    byte_run.save_checkpoint(model, torch.optim.AdamW(model.parameters()), at)
    done = glactl("generate", byte_run.path, "--state", "a/b", "-p", " stands", *options)
    assert done.exit_code == 2
    assert "error: a/b is a state of checkpoint " in done.stderr


def test_texts_go_to_a_file_that_a_second_command_goes_on_with(
    glactl, byte_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("glactl.generate.command.BATCH", 2)
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(f"text {i}") for i in range(5)))
    args = ("generate", byte_run.path, "--prompts", "p.jsonl", "-n", 6, "--seed", 2)
    expected = [json.loads(line) for line in glactl(*args, "--json").stdout.splitlines()]
    done = glactl(*args, "--out", "made/texts.jsonl")
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    file = tmp_path / "made" / "texts.jsonl"
    whole = file.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [{k: row[k] for k in ("prompt", "text")} for row in rows] == expected
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:20])  # killed within a line
    done = glactl(*args, "--out", "made/texts.jsonl")
    assert "made/texts.jsonl has 3 of 5 texts" in done.stderr
    assert "in 2 rows" in done.stderr
    assert file.read_text() == whole
    done = glactl(*args, "--out", "made/texts.jsonl")
    assert (done.exit_code, file.read_text()) == (0, whole)
    for change, message in (
        (("--top-k", 3), "made/texts.jsonl:1: made by another checkpoint or with other options"),
        (("-p", "x"), "made/texts.jsonl:1: its prompt is not prompt 1 of this command"),
    ):
        done = glactl(*args, "--out", "made/texts.jsonl", *change)
        assert done.exit_code == 2
        assert message in done.stderr
    file.write_text('{"text": 1}\n')
    assert "texts.jsonl:1: not a text that --out wrote" in glactl(*args, "--out", file).stderr
    assert file.read_text() == '{"text": 1}\n'


def test_copies_of_a_prompt_draw_anew_and_more_of_them_change_none():
    lm, sampling = build("gla"), Sampling(1.0, seed=3)
    few = generate(lm, TOKENIZER, ["a", "b", "a"], 12, sampling).texts
    more = generate(lm, TOKENIZER, ["a", "a", "a", "b"], 12, sampling).texts
    assert [more[0], more[3], more[1]] == few
    assert len({*more[:3]}) == 3
