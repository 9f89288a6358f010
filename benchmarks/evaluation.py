"""Documents a second of an evaluation, by our engine and by lm-eval's hf backend.

    python benchmarks/evaluation.py [--docs 1000] [--tokens 2000] [--new 48] [--write FILE]

Documents are made by a generator with a seed in the layout of FDA's: a decision summary of about
--tokens tokens under a BPE tokenizer of 32,000 entries that is trained on them first, and the name
of a heading at the end, after which a model writes --new tokens, greedily, stopping at a line end.
Weights are random, of 340M parameters, bf16 on a GPU and fp32 on a CPU:

    lm-eval hf    a transformers Llama through lm_eval.models.huggingface, batch_size "auto"
    ours llama    the same weights, imported, through ours
    ours gla      specs/gla_340m.yaml through ours
    ours hf       the transformers Llama through our engine for models of transformers
    lm-eval fla   flash-linear-attention's GLA of that size through the hf backend, where fla is
                  installed and writes for one document within 5 minutes

A row's seconds hold all from texts to texts: tokens, batches and, of the hf backend, the search for
its batch size, which is told apart as well. Each answers --warm documents before its time is taken,
so that kernels are compiled. `same` is the share of documents whose text is that of the hf backend:
with bf16 and random weights many part at a near tie, and GLA has other weights. `new` is the mean
of tokens made.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from glactl.convert.command import read_model
from glactl.manifest import measured_on
from glactl.models.lm import LMSpec, build_lm
from glactl.spec import load
from glactl.tasks.engine import Engine
from glactl.tasks.engine_hf import HFEngine, own_tokenizer
from glactl.tasks.engine_lm import LMEngine
from glactl.tasks.harness import HarnessLM
from glactl.tasks.requests import Requests

SPEC = Path(__file__).parent.parent / "specs" / "gla_340m.yaml"
VOCAB, TINY_VOCAB = 32_000, 512
CONTEXT = 2048  # positions, which the backend sizes its batches by
LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
PATIENCE = 300  # seconds that fla has for its first document
HEADINGS = ("Measurand", "Applicant", "Type of Test", "Panel", "Regulation section")
WORDS = 60_000  # of the lexicon, enough for a vocabulary of as many tokens as the models have
SYLLABLES = "ba be bo ca co da de fi ga glu he in ka lac li ma mi no pro ra se ta tro ul ver zy"


def lexicon(generator: random.Random) -> list[str]:
    """Words of one to four syllables."""
    parts = SYLLABLES.split()
    return ["".join(generator.choices(parts, k=generator.randint(1, 4))) for _ in range(WORDS)]


def document(generator: random.Random, words: list[str], length: int) -> tuple[str, str]:
    """The text of a decision summary with `length` words of studies, and a heading of it."""

    def some(n: int) -> list[str]:
        # the first of the lexicon are the most frequent, as in any language
        return [words[int(WORDS ** generator.random()) - 1] for _ in range(n)]

    values = {heading: " ".join(some(3)).title() for heading in HEADINGS}
    number = f"K{generator.randint(10**5, 10**6 - 1)}"
    head = [f"510(k) SUBSTANTIAL EQUIVALENCE DECISION SUMMARY A. 510(k) Number: {number}"]
    head += [f"{chr(66 + i)}. {name}: {value}" for i, (name, value) in enumerate(values.items())]
    body = [" ".join(some(12)).capitalize() + "." for _ in range(length // 12)]
    body.insert(generator.randrange(len(body)), f"See {number}, {generator.random():.4f} mg/dL.")
    return " ".join(head + body), generator.choice(HEADINGS)


def documents(count: int, tokens: int, vocab: int, seed: int = 0) -> tuple[list[str], Any]:
    """Prompts of about `tokens` tokens each, and the transformers tokenizer trained on them."""
    generator = random.Random(seed)
    words = lexicon(generator)
    # a word is a token or more, so there are enough of them to be cut
    made = [document(generator, words, tokens + 100) for _ in range(count)]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator([*(text for text, _ in made[:200]), " ".join(words)], trainer)
    prompts = []
    for text, heading in made:
        ids = inner.encode(text).ids[: tokens - 16]
        prompts.append(f"{inner.decode(ids)}\n{heading}:")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return prompts, fast


def requests(prompts: list[str], new: int) -> list[Instance]:
    """What lm-eval asks for."""
    return [
        Instance("generate_until", {}, (p, {"until": ["\n"], "max_gen_toks": new}), 0)
        for p in prompts
    ]


def ours(engine: Engine) -> Callable[[list[Instance]], list[str]]:
    """A generate_until that keeps nothing, so that nothing is taken from a cache."""
    return lambda asked: HarnessLM(Requests(engine)).generate_until(asked)


class Backend(HFLM):
    """lm-eval's, with the time of its search for a batch size."""

    searching = 0.0
    found: int | None = None

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        began = time.perf_counter()
        self.found = super()._detect_batch_size(*args, **kwargs)
        self.searching += time.perf_counter() - began
        return self.found


def backend(model: Any, tokenizer: Any) -> Backend:
    """Around a live model."""
    return Backend(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size="auto",
        max_length=model.config.max_position_embeddings,
        add_bos_token=False,
    )


def llama(tokenizer: Any, device: torch.device, tiny: bool, context: int) -> Any:
    """A transformers Llama with random weights."""
    heads = 4 if tiny else 16
    config = transformers.LlamaConfig(
        **(TINY if tiny else LLAMA),
        vocab_size=TINY_VOCAB if tiny else VOCAB,
        num_attention_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(device, dtype_on(device)).eval()


def dtype_on(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def imported(model: Any, tokenizer: Any, batch_tokens: int | None) -> LMEngine:
    """Our model with the weights of a transformers Llama."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        lm, _ = read_model(Path(folder), model.device)
    return LMEngine(lm.to(model.dtype), own_tokenizer(tokenizer), batch_tokens)


def gla(tokenizer: Any, device: torch.device, tiny: bool, batch_tokens: int | None) -> LMEngine:
    """Our GLA with random weights."""
    spec = load(SPEC).model
    if tiny:
        small = {"d_model": 64, "n_layers": 2, "mixer": "gla", "tie_embeddings": True}
        spec = LMSpec.model_validate(small | {"vocab_size": TINY_VOCAB})
    lm = build_lm(spec, 0, device, dtype_on(device)).eval()
    return LMEngine(lm, own_tokenizer(tokenizer), batch_tokens)


def fla_gla(tokenizer: Any, device: torch.device) -> Any:
    """fla's GLA of the same size; None where fla is not installed."""
    try:
        import fla  # noqa: F401
        from fla.models import GLAConfig, GLAForCausalLM
    except ImportError:
        return None
    config = GLAConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_heads=4,
        intermediate_size=2816,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return GLAForCausalLM(config).to(device, dtype_on(device)).eval()


def wait(device: torch.device) -> float:
    """The time when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measured(
    name: str,
    generate: Callable[[list[Instance]], list[str]],
    prompts: list[str],
    new: int,
    device: torch.device,
    warm: int,
) -> tuple[dict[str, Any], list[str]]:
    """Time all prompts after `warm` of them; returns the row and the texts."""
    with redirect_stdout(sys.stderr):
        began = wait(device)
        generate(requests(prompts[:warm], new))
        warmed = wait(device) - began
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = wait(device)
        texts = generate(requests(prompts, new))
        seconds = wait(device) - began
    row = {
        "name": name,
        "docs": len(prompts),
        "seconds": round(seconds, 2),
        "docs_per_s": round(len(prompts) / seconds, 2),
        "warm_s": round(warmed, 2),
    }
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return row, texts


def main() -> None:
    """Measure what was asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--warm", type=int, default=160, help="documents before the time is taken")
    parser.add_argument("--batch-tokens", type=int, help="by default as of glactl eval")
    parser.add_argument("--only", default="hf,llama,gla,ours_hf,fla", help="rows to make")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--commit", help="of the source, where it is no git checkout")
    parser.add_argument("--write", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    wanted = args.only.split(",")
    transformers.utils.logging.set_verbosity_error()
    vocab = TINY_VOCAB if args.tiny else VOCAB
    prompts, tokenizer = documents(args.docs, args.tokens, vocab)
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    cuda = device.type == "cuda"
    about: dict[str, Any] = {
        **measured_on(device, args.commit),
        "transformers": transformers.__version__,
        "tiny": args.tiny,
        "tokens": [min(lengths), max(lengths)],
        "new": args.new,
        "batch_tokens": args.batch_tokens,
        "results": [],
    }
    first: dict[str, list[str]] = {}

    def keep(name: str, generate: Callable[[list[Instance]], list[str]], **more: Any) -> None:
        row, texts = measured(name, generate, prompts, args.new, device, args.warm)
        row["same"] = None
        if base := first.setdefault("texts", texts if name == "lm-eval hf" else []):
            same = sum(a == b for a, b in zip(texts, base, strict=True))
            row["same"] = round(same / len(texts), 3)
        row["new"] = round(sum(map(len, tokenizer(texts)["input_ids"])) / len(texts), 1)
        if base and (rows := about["results"]):
            row["times_hf"] = round(row["docs_per_s"] / rows[0]["docs_per_s"], 2)
        about["results"].append(row | {key: value() for key, value in more.items()})
        print(json.dumps(about["results"][-1]), flush=True)
        if args.write:
            Path(args.write).write_text(json.dumps(about, indent=1) + "\n")

    def keep_backend(name: str, model: Any) -> None:
        lm = backend(model, tokenizer)

        def timed(asked: list[Instance]) -> list[str]:
            lm.searching = 0.0
            return lm.generate_until(asked)

        keep(name, timed, search_s=lambda: round(lm.searching, 2), batch=lambda: lm.found)

    # a longer text than the backend's model holds would be cut; a CPU is spared its search at 2048
    context = args.tokens + args.new if args.tiny else max(CONTEXT, args.tokens + args.new)
    model = llama(tokenizer, device, args.tiny, context)
    if "hf" in wanted:
        keep_backend("lm-eval hf", model)
    if "llama" in wanted:
        keep("ours llama", ours(imported(model, tokenizer, args.batch_tokens)))
    if "ours_hf" in wanted:
        engine = HFEngine(model, own_tokenizer(tokenizer), args.batch_tokens)
        keep("ours hf", ours(engine))
    del model
    if "gla" in wanted:
        keep("ours gla", ours(gla(tokenizer, device, args.tiny, args.batch_tokens)))
    if "fla" in wanted and cuda and (theirs := fla_gla(tokenizer, device)) is not None:
        began = wait(device)
        backend(theirs, tokenizer).generate_until(requests(prompts[:1], args.new))
        if wait(device) - began < PATIENCE:
            keep_backend("lm-eval fla", theirs)


if __name__ == "__main__":
    main()
