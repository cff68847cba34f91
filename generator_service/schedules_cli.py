"""``flux2 calibrate`` and ``flux2 schedules``: measure a model's caching errors, and plan with them."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from generator_service.lemica import (
    PREDICTORS,
    SHIPPED,
    ErrorGraph,
    NoSuchPath,
    Schedule,
    cheapest_within,
    lexicographic_minimax_path,
    load_schedules,
    save_schedules,
)
from generator_service.terminal import one_line_errors, parse_size, step_timeline

schedules = typer.Typer(no_args_is_help=True, help="List, show and plan calibrated schedules.")
out = Console()

DEFAULT_GUIDANCE = 4.0
DEFAULT_BUDGETS = range(8, 27)


def calibrate(
    prompts: Annotated[Path, typer.Option(help="A text file with a prompt on each line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The graph, as JSON.")] = Path("graph.json"),
    model: Annotated[str | None, typer.Option(envvar="FLUX2_MODEL", help="Folder or hub id.")] = None,
    steps: Annotated[int, typer.Option(min=2, max=100)] = 50,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "1024x1024",
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = DEFAULT_GUIDANCE,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each prompt.")] = 2,
    max_skip: Annotated[int, typer.Option(min=2, help="The most steps from one computed step to the next.")] = 10,
    predictor: Annotated[str, typer.Option(help=", ".join(PREDICTORS))] = "linear",
    batch: Annotated[int, typer.Option(min=1, help="Latents in one forward pass.")] = 8,
    keep: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:N, or a folder on disk, keeps the runs; by default a GPU that has room, else cpu."
        ),
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Compare the latents where a skip ends: no transformer steps behind.")
    ] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what it would take.")] = False,
) -> None:
    """Measure what skipping steps costs a model. Can be killed and started again."""
    with one_line_errors():
        if predictor not in PREDICTORS:
            raise typer.BadParameter(f"--predictor is one of {', '.join(PREDICTORS)}")
        from generator_service import calibrate as work  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415

        settings = GeneratorSettings(model=model) if model else GeneratorSettings()
        samples = work.CalibrationSet(work.read_prompts(prompts), seeds, *parse_size(size), steps, guidance)
        run = work.CalibrationRun(settings, samples, PREDICTORS[predictor], keep)
        told = run.estimate(max_skip, is_exact=not approximate)
        duration = datetime.timedelta(seconds=round(told.seconds))
        out.print(f"{samples.count} samples, {told.forwards} transformer steps: at most {duration} here")
        if estimate:
            return
        columns = TextColumn("edges"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("edges")
            work.calibrate(
                run,
                output,
                max_skip=max_skip,
                batch_size=batch,
                is_exact=not approximate,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        out.print(f"[bold]{output}[/bold]  {run.signature}", highlight=False)


@schedules.command("list")
def list_schedules(
    folder: Annotated[Path, typer.Argument(help="Files of schedules; those that are shipped if absent.")] = SHIPPED,
) -> None:
    """Every schedule in a folder."""
    with one_line_errors():
        for file in sorted(folder.glob("*.json")):
            found = load_schedules(file)
            made_for = " | ".join(dict.fromkeys(str(replace(s.signature, predictor=None)) for s in found))
            table = Table("name", "computed", "largest error", "predictor", title=f"{file.name}: {made_for}")
            for schedule in found:
                error = "" if schedule.max_error is None else f"{schedule.max_error:.2g}"
                computed = f"{schedule.num_computed}/{schedule.num_steps}"
                table.add_row(schedule.name, computed, error, schedule.predictor.name)
            out.print(table)


@schedules.command()
def show(file: Annotated[Path, typer.Argument(help="A file of schedules.")]) -> None:
    """Draw the steps of every schedule in a file: blocks are computed, dots are predicted."""
    with one_line_errors():
        for schedule in load_schedules(file):
            timeline = step_timeline(schedule.is_computed(step) for step in range(schedule.num_steps))
            out.print(Text(f"{schedule.num_computed:>3} "), timeline, f" {schedule.name}", sep="")


@schedules.command()
def plan(
    graph: Annotated[Path, typer.Argument(help="What flux2 calibrate wrote.")],
    budget: Annotated[int | None, typer.Option(help="Computed steps.")] = None,
    max_error: Annotated[float | None, typer.Option(help="As few steps as keep every error below this.")] = None,
    statistic: Annotated[str, typer.Option("--for", help="Which errors count: mean, p90 or worst.")] = "mean",
    name: Annotated[str | None, typer.Option(help="What requests call it.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Save it here; all budgets if none is given.")
    ] = None,
) -> None:
    """The best schedule for a budget, or for a bound on errors; with neither, of every budget."""
    with one_line_errors():
        from generator_service.calibrate import plan_all  # noqa: PLC0415 - torch takes seconds to import

        loaded = ErrorGraph.load(graph)
        measured = loaded.planned_for(statistic) if loaded.samples else loaded
        found = plan_one(measured, budget, max_error) or plan_all(measured)
        if name is not None:
            if len(found) != 1:
                raise NoSuchPath("--name needs --budget or --max-error")
            found = [Schedule(**{**vars(found[0]), "name": name})]
        for schedule in found:
            timeline = step_timeline(schedule.is_computed(step) for step in range(schedule.num_steps))
            out.print(
                Text(f"{schedule.num_computed:>3} "), timeline, f" largest error {schedule.max_error:.3g}", sep=""
            )
        if output is not None:
            save_schedules(found, output)


@schedules.command("refine")
def refine_schedules(
    graphs: Annotated[list[Path], typer.Argument(help="Error graphs of one model and size, of any predictors.")],
    prompts: Annotated[Path, typer.Option(help="A text file with a prompt on each line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The schedules, as JSON.")],
    budget: Annotated[list[int] | None, typer.Option(help="Computed steps, repeatable; 8 to 26 if absent.")] = None,
    model: Annotated[str | None, typer.Option(envvar="FLUX2_MODEL", help="Folder or hub id.")] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "1024x1024",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each prompt.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Latents in one forward pass.")] = 8,
    rounds: Annotated[int, typer.Option(min=0, help="How often every step is tried elsewhere; 0 only measures.")] = 4,
) -> None:
    """Measure what the graphs plan on whole runs, and move steps as long as that helps."""
    with one_line_errors():
        from generator_service import calibrate as work  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415

        loaded = [ErrorGraph.load(graph) for graph in graphs]
        guidance = loaded[0].signature.guidance_scale if loaded[0].signature else None
        settings = GeneratorSettings(model=model) if model else GeneratorSettings()
        samples = work.CalibrationSet(
            work.read_prompts(prompts), seeds, *parse_size(size), loaded[0].num_steps, guidance or DEFAULT_GUIDANCE
        )
        run = work.CalibrationRun(settings, samples, PREDICTORS["reuse"])
        found: dict[int, Schedule] = {}
        for schedule in work.refine_all(run, loaded, budget or DEFAULT_BUDGETS, batch, rounds):
            found[schedule.num_computed] = schedule
            save_schedules(list(found.values()), output)
            told = f" {schedule.predictor.name}, error {schedule.evidence['error']:.3g}"
            timeline = step_timeline(schedule.is_computed(step) for step in range(schedule.num_steps))
            out.print(Text(f"{schedule.num_computed:>3} "), timeline, told, sep="")


def plan_one(graph: ErrorGraph, budget: int | None, max_error: float | None) -> list[Schedule]:
    """The schedule that was asked for, or none."""
    if budget is not None and max_error is not None:
        raise NoSuchPath("give --budget or --max-error, not both")
    if budget is not None:
        return [lexicographic_minimax_path(graph, budget)]
    return [] if max_error is None else [cheapest_within(graph, max_error)]
