"""The bar that shows how far a long command has come."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import Progress, TimeElapsedColumn

# Takes what is under way, how many steps are done, and how many there are.
Tell = Callable[[str, int, int], None]


@contextlib.contextmanager
def progress() -> Iterator[tuple[Progress, Tell]]:
    """Show a bar with the time that has passed, and yield it with the function that moves it."""
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("")

        def tell(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total)

        yield bar, tell
