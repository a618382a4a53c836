"""How the command line prints: tables, plain into a pipe or file; who stops reading is found out in one place, `cli.main`."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # called while BrokenPipeError is handled; rich itself would exit with 1


def console() -> Console:
    """Colours and box lines on a terminal; plain text, wide enough not to fold, into a pipe or file."""
    return _Console(highlight=False) if sys.stdout.isatty() else _Console(highlight=False, width=170, no_color=True)


def table(title: str, *columns: str, figures: bool = False) -> Table:
    """Cells that fold; or, of figures, that do not and from the second column on stand to the right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2, header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if figures and i else "left", no_wrap=figures, overflow="ellipsis" if figures else "fold")
    return made
