"""Tables, and labels that are made when they are asked for."""

import pytest

from arrakis_jax.results.labels import LazyLabels
from arrakis_jax.results.table import Table


class Squares(LazyLabels[int]):
    def __len__(self):
        return 4

    def _label(self, i):
        return i * i


def test_lazy_labels_are_a_sequence():
    assert list(Squares()) == [0, 1, 4, 9]
    assert (Squares()[-1], Squares()[1:3], 9 in Squares()) == (9, (1, 4), True)
    with pytest.raises(IndexError, match=r"`i` must be in \[-4, 4\), got 4; see len\(\)"):
        Squares()[4]


def test_a_table_of_rows():
    table = Table.of_rows(("name", "value"), [("a", 1.0), ("b", 2.0)])
    assert table == {"name": ["a", "b"], "value": [1.0, 2.0]} and table.n_rows == 2
    with pytest.raises(ValueError):
        Table.of_rows(("name", "value"), [("a",)])
