"""The commands that make models and use them: train, mqar, eval, generate."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from glactl import console
from glactl.cli.options import Device, Json, Quiet, Run, Sets


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
        from glactl.train.session import train_command

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
        typer.Option(min=1, help="Trials at once; by default 1, on every GPU."),
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
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Run as N jobs of a SLURM cluster that share the folder."),
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of these jobs: partition=gpu, gpus_per_node=8."),
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
    options: dict[str, Any] = {
        "file": grid,
        "preset": preset,
        "dims": dims,
        "mixers": mixers,
        "lrs": lrs,
        "seeds": seeds,
        "pairs": pairs,
        "seqlen": seqlen,
        "form": form,
        "out": out,
        "jobs": jobs,
        "minutes": minutes,
        "prune": prune,
        "retry_failed": retry_failed,
        "plot_only": plot_only,
        "device": device,
        "json": json,
        "quiet": quiet,
    }
    with console.errors():
        if nodes is not None:
            from glactl.sweep.submit import submit

            submitted = submit(options, nodes, slurm or ())
            if json:
                console.result({"event": "submitted", "jobs": submitted})
            return
        if slurm:
            raise ValueError("--slurm is of jobs; allowed with --nodes")
        from glactl.sweep.command import mqar_command

        mqar_command(**options)


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
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens read at once; by default 32768 on a GPU, else 16384."),
    ] = None,
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
        from glactl.evaluate.command import eval_command

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
    seed: Annotated[int, typer.Option(help="Of the draws; copies of a prompt draw anew.")] = 0,
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
        from glactl.generate.command import generate_command

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
