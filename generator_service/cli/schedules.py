"""``flux2 calibrate`` and ``flux2 schedules``: measure caching errors and plan schedules."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from generator_service.cli.console import finite, one_line_errors, parse_size, step_timeline
from generator_service.cli.output_file import check_writable
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

schedules = typer.Typer(no_args_is_help=True, help="List, show and plan calibrated schedules.")
out = Console()

DEFAULT_GUIDANCE = 4.0
STORAGE_HELP = "Where to store trajectories: cpu, cuda, cuda:N or a folder. Default: the GPU if they fit."
DEFAULT_BUDGETS = range(8, 27)


def calibrate(
    prompts: Annotated[Path, typer.Option(help="A text file with a prompt on each line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Error graph file (JSON).")] = Path("graph.json"),
    model: Annotated[str | None, typer.Option(envvar="FLUX2_MODEL", help="Folder or hub id.")] = None,
    steps: Annotated[int, typer.Option(min=2, max=100)] = 50,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "1024x1024",
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = DEFAULT_GUIDANCE,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per prompt.")] = 2,
    max_skip: Annotated[int, typer.Option(min=2, help="Largest distance between two computed steps.")] = 10,
    predictor: Annotated[str, typer.Option(help=", ".join(PREDICTORS))] = "linear",
    batch: Annotated[int, typer.Option(min=1, help="Latents in one forward pass.")] = 8,
    storage: Annotated[str | None, typer.Option("--keep", help=STORAGE_HELP)] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Compare latents where a skip ends; no further forward passes.")
    ] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only print the expected cost.")] = False,
) -> None:
    """Measure the error of skipping steps. An interrupted calibration can be resumed."""
    with one_line_errors():
        if predictor not in PREDICTORS:
            raise typer.BadParameter(f"--predictor must be one of {', '.join(PREDICTORS)}")
        finite("--guidance", guidance)
        check_writable(output)
        from generator_service.cli import calibration as work  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415

        settings = GeneratorSettings(model=model) if model else GeneratorSettings()
        samples = work.CalibrationSet(work.read_prompts(prompts), seeds, *parse_size(size), steps, guidance)
        run = work.CalibrationRun(settings, samples, PREDICTORS[predictor], storage)
        cost = run.estimate(max_skip, is_exact=not approximate)
        duration = datetime.timedelta(seconds=round(cost.seconds))
        out.print(f"{samples.count} samples, {cost.forwards} transformer steps: at most {duration} here")
        if estimate:
            return
        with progress_of("edges") as on_progress:
            is_exact = not approximate
            work.calibrate(run, output, max_skip=max_skip, batch_size=batch, is_exact=is_exact, on_progress=on_progress)
        out.print(f"[bold]{output}[/bold]  {run.signature}", highlight=False)


@contextmanager
def progress_of(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; yield a function that takes the completed and the total number."""
    columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@schedules.command("list")
def list_schedules(
    folder: Annotated[Path, typer.Argument(help="Folder of schedules. Default: the built-in schedules.")] = SHIPPED,
) -> None:
    """List the schedules in a folder."""
    with one_line_errors():
        for file in sorted(folder.glob("*.json")):
            loaded = load_schedules(file)
            signatures = " | ".join(dict.fromkeys(str(replace(s.signature, predictor=None)) for s in loaded))
            table = Table("name", "computed", "largest error", "predictor", title=f"{file.name}: {signatures}")
            for schedule in loaded:
                error = "" if schedule.max_error is None else f"{schedule.max_error:.2g}"
                computed = f"{schedule.num_computed}/{schedule.num_steps}"
                table.add_row(schedule.name, computed, error, schedule.predictor.name)
            out.print(table)


@schedules.command()
def show(file: Annotated[Path, typer.Argument(help="A file of schedules.")]) -> None:
    """Show the steps of every schedule in a file: blocks are computed, dots are predicted."""
    with one_line_errors():
        for schedule in load_schedules(file):
            timeline = step_timeline(schedule.is_computed(step) for step in range(schedule.num_steps))
            out.print(Text(f"{schedule.num_computed:>3} "), timeline, f" {schedule.name}", sep="")


@schedules.command()
def plan(
    graph: Annotated[Path, typer.Argument(help="Error graph written by flux2 calibrate.")],
    budget: Annotated[int | None, typer.Option(help="Number of computed steps.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Use the fewest steps with no error above this.")] = None,
    statistic: Annotated[str, typer.Option("--for", help="An edge's error: mean, p90 or worst.")] = "mean",
    name: Annotated[str | None, typer.Option(help="Name for use in requests.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for the schedule, or for those of all budgets.")
    ] = None,
) -> None:
    """Plan the best schedule for a budget or a bound on errors; with neither, for every budget."""
    with one_line_errors():
        from generator_service.cli.calibration import plan_all  # noqa: PLC0415 - torch takes seconds to import

        if output is not None:
            check_writable(output)
        loaded = ErrorGraph.load(graph)
        measured = loaded.planned_for(statistic) if loaded.samples else loaded
        planned = plan_one(measured, budget, max_error) or plan_all(measured)
        if name is not None:
            if len(planned) != 1:
                raise NoSuchPath("--name needs --budget or --max-error")
            planned = [Schedule(**{**vars(planned[0]), "name": name})]
        for schedule in planned:
            timeline = step_timeline(schedule.is_computed(step) for step in range(schedule.num_steps))
            out.print(
                Text(f"{schedule.num_computed:>3} "), timeline, f" largest error {schedule.max_error:.3g}", sep=""
            )
        if output is not None:
            save_schedules(planned, output)


@schedules.command("refine")
def refine_schedules(
    graphs: Annotated[list[Path], typer.Argument(help="Error graphs of one model and size, of any predictors.")],
    prompts: Annotated[Path, typer.Option(help="A text file with a prompt on each line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File for the schedules (JSON).")],
    budget: Annotated[list[int] | None, typer.Option(help="Computed steps, repeatable. Default: 8 to 26.")] = None,
    model: Annotated[str | None, typer.Option(envvar="FLUX2_MODEL", help="Folder or hub id.")] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "1024x1024",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per prompt.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Latents in one forward pass.")] = 8,
    rounds: Annotated[int, typer.Option(min=0, help="Most passes of moving steps; 0 only measures the plans.")] = 4,
) -> None:
    """Measure the graphs' plans on whole runs, and move steps while the error decreases."""
    with one_line_errors():
        from generator_service.cli import calibration as work  # noqa: PLC0415 - torch takes seconds to import
        from generator_service.settings import GeneratorSettings  # noqa: PLC0415

        check_writable(output)
        loaded = [ErrorGraph.load(graph) for graph in graphs]
        guidance = loaded[0].signature.guidance_scale if loaded[0].signature else None
        settings = GeneratorSettings(model=model) if model else GeneratorSettings()
        samples = work.CalibrationSet(
            work.read_prompts(prompts), seeds, *parse_size(size), loaded[0].num_steps, guidance or DEFAULT_GUIDANCE
        )
        run = work.CalibrationRun(settings, samples, PREDICTORS["reuse"])
        refined: dict[int, Schedule] = {}
        for schedule in work.refine_all(run, loaded, budget or DEFAULT_BUDGETS, batch, rounds):
            refined[schedule.num_computed] = schedule
            save_schedules(list(refined.values()), output)
            summary = f" {schedule.predictor.name}, error {schedule.evidence['error']:.3g}"
            timeline = step_timeline(schedule.is_computed(step) for step in range(schedule.num_steps))
            out.print(Text(f"{schedule.num_computed:>3} "), timeline, summary, sep="")


def plan_one(graph: ErrorGraph, budget: int | None, max_error: float | None) -> list[Schedule]:
    """Plan the schedule for a budget or a bound on errors; the list is empty if neither is given."""
    if budget is not None and max_error is not None:
        raise NoSuchPath("give --budget or --max-error, not both")
    if budget is not None:
        return [lexicographic_minimax_path(graph, budget)]
    return [] if max_error is None else [cheapest_within(graph, finite("--max-error", max_error))]
