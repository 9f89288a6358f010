"""The commands, each thin: read the arguments, call one function, print.

Everything heavy is imported inside a command: torch takes over 0.7 s to import, and
`glactl --help` answers in a fifth of that.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from glactl import console


class _Group(TyperGroup):
    """Commands whose usage errors are one line too, as all other errors are."""

    def main(self, *args: Any, **options: Any) -> Any:
        alone = options.pop("standalone_mode", True)
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except typer.TyperException as error:
            if not alone:
                raise
            console.error(error.format_message())
            sys.exit(error.exit_code)
        if not alone:
            return code
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Build, train, test and measure gated linear attention language models.",
)

Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1; by default CUDA if there is one.", metavar="NAME"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON lines on stdout.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field: --set model.d_model=256."),
]
Run = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run folder; by default the newest one.")
]


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="The version and its environment.")
    ] = False,
) -> None:
    if version:
        from glactl.versions import lines

        for line in lines():
            console.say(line)
    elif ctx.invoked_subcommand is None:
        console.say(ctx.get_help())


@app.command(epilog="Example: glactl train --preset tiny --set model.mixer=gsa")
def train(
    spec: Annotated[
        Path | None, typer.Argument(help="A run spec (YAML); by default the preset.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="default, tiny or t2r_mistral_7b, in place of a spec."),
    ] = None,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run: the folder given, or the newest.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would run, and stop.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Short for --set train.steps=N.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Short for --set name=NAME, the run folder's name.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder that run folders are made in.")] = Path(
        "runs"
    ),
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a language model on a task, both as the spec says."""
    with console.errors():
        from glactl.session import train_command

        short = {"train.steps": steps, "name": name}
        train_command(
            spec,
            preset=preset,
            sets=[*(sets or []), *(f"{k}={v!r}" for k, v in short.items() if v is not None)],
            resume=resume,
            plan=plan,
            out=out,
            device=device,
            json=json,
            quiet=quiet,
        )


@app.command(epilog="Example: glactl mqar --dims 64,128,256")
def mqar(
    grid: Annotated[
        Path | None,
        typer.Argument(metavar="[GRID]", help="A grid (YAML) that changes the preset's."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="quick (the default), for two CPU cores; zoology, gsa or based, for a GPU.",
        ),
    ] = None,
    dims: Annotated[str | None, typer.Option(metavar="N,N", help="Model widths.")] = None,
    mixers: Annotated[
        str | None, typer.Option(metavar="A,B", help="Mixers by name, or all.")
    ] = None,
    lrs: Annotated[
        str | None, typer.Option(metavar="X,Y", help="Learning rates, in the order to try.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Of weights and data.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Keys with values in a row.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a row.")] = None,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="FORM", help="identity, mixers alone, or hybrid, a short convolution first."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The sweep's folder; by default sweeps/PRESET or GRID.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Trials at once; by default 1 on a CPU, 4 on each GPU."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop then, all kept; the same command goes on (exit code 6)."),
    ] = None,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="F,M",
            help="After share F of its steps end a rate that is M of accuracy behind: 0.25,0.1.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run trials that ended in an error again.")
    ] = False,
    plot_only: Annotated[
        bool, typer.Option("--plot-only", help="Run nothing: table and plot of what there is.")
    ] = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sweep multi-query associative recall over widths, mixers and learning rates."""
    with console.errors():
        from glactl.sweep import mqar_command

        mqar_command(
            grid,
            preset=preset,
            dims=dims,
            mixers=mixers,
            lrs=lrs,
            seeds=seeds,
            pairs=pairs,
            seqlen=seqlen,
            form=form,
            out=out,
            jobs=jobs,
            minutes=minutes,
            prune=prune,
            retry_failed=retry_failed,
            plot_only=plot_only,
            device=device,
            json=json,
            quiet=quiet,
        )


@app.command("eval", epilog="Example: glactl eval --tasks swde,squad --data-dir data")
def evaluate(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run folders, or hf:PATH of transformers; the newest run without any. Others are "
            "compared with the first.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="swde, fda, squad, nq, triviaqa, drop, arc, lambada, positions, or lm-eval's own "
            "names; swde,squad by default.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A table of a paper: gla-table2, gla-table3, gsa-table1 or gsa-recall.",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of the first six: jrt (default), jrt-twice, based or stock."
        ),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the protocol's window; 2000 of jrt.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Local rows, DIR/<task>/<split>.jsonl; else the hub's.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of the hub's data; by default what was read before.")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="A few rows of our own; needs no network.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at once.")] = 16_384,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a model reads; longer contexts are cut.")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Texts begin with BOS.")] = False,
    share: Annotated[
        bool,
        typer.Option(
            "--share/--no-share", help="Read what the answers to one question share only once."
        ),
    ] = True,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep answers, and go on from them.")
    ] = True,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 on a GPU.")
    ] = "auto",
    out: Annotated[Path, typer.Option(help="The folder that results go to.")] = Path("evals"),
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure trained models by the papers' recall protocols and lm-eval's tasks."""
    # lm-eval's bars would cross ours; torch, which comes first, reads this when it is imported
    os.environ.setdefault("TQDM_DISABLE", "1")
    with console.errors():
        from glactl.evaluate import eval_command

        eval_command(
            runs or [],
            tasks=tasks,
            suite=suite,
            protocol=protocol,
            context_length=context_length,
            data_dir=data_dir,
            revision=revision,
            sample=sample,
            limit=limit,
            batch_tokens=batch_tokens,
            max_length=max_length,
            bos=bos,
            reuse=share,
            cache=cache,
            precision=precision,
            out=out,
            device=device,
            json=json,
            quiet=quiet,
        )


@app.command(epilog='Example: glactl generate --prompt "The function " --temperature 0.7')
def generate(
    run: Run = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts: .jsonl, or a prompt a line.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens to make.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K most probable.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the most probable with sum P.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws; each prompt has its own.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts for each prompt.")] = 1,
    min_p: Annotated[
        float, typer.Option(help="Leave out what is below P times the most probable.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="R", help="Divide logits of tokens that were there by R.")
    ] = 1.0,
    prefill_chunk: Annotated[
        int, typer.Option(metavar="N", help="Tokens of prompts read at once.")
    ] = 8192,
    check: Annotated[
        bool, typer.Option("--check", help="Compare one-token steps with one forward pass first.")
    ] = False,
    state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Continue the text whose state this is.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the state after the prompt.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts go there as JSON lines; goes on where it ends."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of the weights: fp32, bf16, or auto, bf16 on a GPU."),
    ] = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Sample text from a trained model."""
    with console.errors():
        from glactl.generate import generate_command

        generate_command(
            run,
            prompts=prompt or [],
            file=prompts,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stops=stop,
            samples=samples,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            prefill_chunk=prefill_chunk,
            check=check,
            state=state,
            save_state=save_state,
            out=out,
            precision=precision,  # type: ignore[arg-type]
            device=device,
            json=json,
        )


@app.command(epilog="Example: glactl profile --seqlen 8192")
def profile(
    seqlen: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Lengths: 512,1024 or 512:8192:x2; by default 1024."),
    ] = None,
    mixers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Of attention, gla, decay, gsa (the default) and a spec's mixers."
        ),
    ] = None,
    spec: Annotated[
        Path | None, typer.Option(help="Measure this run spec's model, not one of each mixer.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Or that of a preset, such as tiny.")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Of operators, layers, models; by default no layers."),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Of models: train, prefill, decode; by default all."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a call; else the longest length.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="By default 4.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of a head.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="fp32, bf16 or fp16.")] = None,
    fla: Annotated[
        bool, typer.Option("--fla", help="flash-linear-attention's operators beside ours.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="The time of every kernel of a call too.")
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure what this results.json has, and compare."),
    ] = None,
    fail_above: Annotated[
        str, typer.Option(metavar="SHARE", help="Slower than the baseline by more fails.")
    ] = "5%",
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Search tile shapes for the GPU's kernels; later runs use them."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="The folder that results go to.")] = Path("profiles"),
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure operators, layers and models on the device at hand."""
    with console.errors():
        if tune:
            from glactl.tune import tune_command

            tune_command(
                seqlen=seqlen or "1024",
                mixers=mixers,
                spec=spec,
                tokens=tokens,
                heads=heads or 4,
                width=width,
                dtype=dtype,
                device=device,
                json=json,
                quiet=quiet,
            )
            return
        from glactl.profile import profile_command

        profile_command(
            seqlen=seqlen,
            mixers=mixers,
            spec=spec,
            preset=preset,
            parts=parts,
            phase=phase,
            tokens=tokens,
            heads=heads,
            width=width,
            dtype=dtype,
            fla=fla,
            kernels=kernels,
            baseline=baseline,
            fail_above=fail_above,
            out=out,
            device=device,
            json=json,
            quiet=quiet,
        )


@app.command("import", epilog="Example: glactl import ./gla-1.3B-100B --out runs/gla-1.3b")
def import_(
    source: Annotated[
        str, typer.Argument(help="A folder, a file of weights in one, or owner/name on the hub.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to make.")],
    json: Json = False,
) -> None:
    """Make a run folder of a checkpoint of Hugging Face's Llama, Mistral or Mamba, or of fla."""
    with console.errors():
        from glactl.convert import import_command

        import_command(source, out=out, json=json)


@app.command(epilog="Example: glactl export runs/NAME-7f3a91 --format fla --out gla-fla")
def export(
    run: Run = None,
    format: Annotated[
        Literal["hf", "fla"],
        typer.Option(help="hf, for attention and mamba, or fla (flash-linear-attention)."),
    ] = "hf",
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("export"),
    device: Device = None,
    json: Json = False,
) -> None:
    """Write a model as a checkpoint of another project, and compare its logits read back."""
    with console.errors():
        from glactl.convert import export_command

        export_command(run, format=format, out=out, device=device, json=json)


data = typer.Typer(cls=_Group, rich_markup_mode=None, help="Turn text into data to train on.")
app.add_typer(data, name="data")


@data.command(
    "prepare", epilog="Example: glactl data prepare corpus/ --out data/corpus --tokenizer byte"
)
def data_prepare(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A file or folder of txt, jsonl or parquet, pydoc, or owner/name[:config] of the "
            "hub."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to make, or to go on with.")] = Path(
        "data/prepared"
    ),
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fineweb_edu or slimpajama, in place of a source."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="byte, a tokenizer.json or its folder, or a name on the hub."),
    ] = None,
    valid: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of documents held out; by default 0.0625."),
    ] = None,
    frame: Annotated[
        Literal["both", "bos"] | None,
        typer.Option(help="both: BOS and EOS around documents; bos: BOS alone."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents to read at most.")] = None,
    shard_mib: Annotated[
        float | None, typer.Option(metavar="MIB", help="Text a shard; by default 64.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokenise text once into shards that training reads from the disk; goes on where it was."""
    with console.errors():
        from glactl.data_command import prepare_command

        given = {
            "tokenizer": tokenizer,
            "valid": valid,
            "frame": frame,
            "limit": limit,
            "shard_mib": shard_mib,
        }
        prepare_command(
            source, out=out, preset=preset, given=given, jobs=jobs, json=json, quiet=quiet
        )


@data.command("check", epilog="Example: glactl data check data/corpus")
def data_check(
    folder: Annotated[Path, typer.Argument(help="A folder that `glactl data prepare` made.")],
    json: Json = False,
) -> None:
    """Hold every byte of prepared data against its hash."""
    with console.errors():
        from glactl.data_command import check_command

        check_command(folder, json=json)


@app.command(epilog="Example: glactl doctor --device cpu")
def doctor(device: Device = None, json: Json = False) -> None:
    """Tell what this machine has, what is missing and what that costs."""
    with console.errors():
        from glactl.doctor import doctor_command

        doctor_command(device=device, json=json)


@app.command(epilog="Example: glactl report runs/NAME-7f3a91")
def report(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="The folder of a run, sweep, evaluation or profile; by default the newest run."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write report.html into a result's folder: tables and figures in one file."""
    with console.errors():
        from glactl.report import report_command

        report_command(path, json=json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a run spec, for editors."""
    with console.errors():
        from glactl.spec import json_schema

        console.result(json_schema())


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
