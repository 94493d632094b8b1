"""Results as tables: columns by name, which print themselves."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from arrakis_jax.results.labels import Label, Labels


class Table(dict[str, list]):
    """Columns of equal length, by name: `pandas.DataFrame(table)` takes it as it is.

    Printed, it shows its first rows.
    """

    shown = 20

    @classmethod
    def of_rows(cls, columns: Iterable[str], rows: Iterable[Sequence]) -> "Table":
        """The table of these rows, each with an entry for every column."""
        table = cls({column: [] for column in columns})
        for row in rows:
            for column, entry in zip(table.values(), row, strict=True):
                column.append(entry)
        return table

    @property
    def n_rows(self) -> int:
        """How many rows."""
        return len(next(iter(self.values()), []))

    # rich is imported only to print: it would slow down the import of the package.
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

    Args:
        values: `[C,...]`.
        labels: what the terms are.
        axes: the names of the axes after C.
        name: the name of the column of values.
        index: `[C,...]`, which of the labels each value has; None for the labels in order.
    """
    values = np.asarray(values)
    # Making a label takes a search, and tables repeat labels.
    label_of: dict[int, Label] = {}

    def rows() -> Iterable[Sequence]:
        for place in np.ndindex(values.shape[1:]):
            for i, value in enumerate(values[(slice(None), *place)]):
                term = i if index is None else int(index[(i, *place)])
                if term not in label_of:
                    label_of[term] = labels[term]
                label = label_of[term]
                yield (str(label), *label, *place, float(value))

    columns = ("term", "layer", "kind", "index", "source", *axes, name)
    return Table.of_rows(columns, rows())
