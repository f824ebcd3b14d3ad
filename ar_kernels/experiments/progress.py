"""What the commands print: how far a training run is, and tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@contextmanager
def progress_bar(
    console: Console, steps: int, done: int, title: str = "training"
) -> Iterator[Callable[[int, float], None]]:
    """Yields on_step(step, loss). On a terminal a bar that moves, elsewhere a line for every tenth of the steps."""
    average = None

    def smooth(loss: float) -> float:
        nonlocal average
        average = loss if average is None else 0.95 * average + 0.05 * loss
        return average

    if not console.is_terminal:
        every, shown = max(1, steps // 10), done // max(1, steps // 10)

        def print_line(step: int, loss: float) -> None:
            nonlocal shown
            text = f"{title}  step {step:>{len(str(steps))}} of {steps}  loss {smooth(loss):.3f}"
            if step // every > shown or step == steps:
                shown = step // every
                filled = round(20 * step / steps)
                console.print(f"[{'#' * filled}{'.' * (20 - filled)}]  {text}", markup=False)

        yield print_line
        return
    columns = (
        TextColumn(title, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, completed=done, loss="?")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{smooth(loss):.3f}")


def on_terminal(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """A table for rich to print: words in the first column, folded where they must be, and whole numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(header):
        width = max(len(cell) for cell in (*column.split(), *(row[number] for row in rows)))
        table.add_column(column, justify="right" if number else "left", min_width=width if number else 4)
    for row in rows:
        table.add_row(*row)
    return table
