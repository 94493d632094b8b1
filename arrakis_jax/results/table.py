"""Results as tables: columns by name, which print themselves."""

from typing import Any

import numpy as np

from arrakis_jax.results.labels import Label, Labels


class Table(dict[str, list]):
    """Columns of equal length, by name: `pandas.DataFrame(table)` takes it as it is.

    Printed, it shows its first rows.
    """

    shown = 20

    @property
    def n_rows(self) -> int:
        """How many rows."""
        return len(next(iter(self.values()), []))

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable

        more = self.n_rows - self.shown
        table = RichTable(caption=f"and {more} more rows" if more > 0 else None)
        for name, column in self.items():
            numbers = any(isinstance(x, int | float) for x in column[: self.shown])
            table.add_column(name, justify="right" if numbers else "left")
        for i in range(min(self.n_rows, self.shown)):
            table.add_row(*(_text(column[i]) for column in self.values()))
        return table

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    __str__ = __repr__


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:+.4g}" if isinstance(value, float) else str(value)


def table_of(
    values: Any, labels: Labels, axes: tuple[str, ...], name: str, index: Any = None
) -> Table:
    """A row for each term and each index of the other axes.

    `values` is `[C,...]`, and `axes` names what follows C. With `index [C,...]` they are some of
    the terms: those labels.
    """
    values = np.asarray(values)
    columns = ("term", "layer", "kind", "index", "source", *axes, name)
    table = Table({column: [] for column in columns})
    named: dict[int, Label] = {}
    for place in np.ndindex(values.shape[1:]):
        for i, value in enumerate(values[(slice(None), *place)]):
            which = i if index is None else int(index[(i, *place)])
            label = named.setdefault(which, labels[which])
            row = (str(label), label.layer, label.kind, label.index, label.source, *place)
            for column, entry in zip(columns, (*row, float(value)), strict=True):
                table[column].append(entry)
    return table
