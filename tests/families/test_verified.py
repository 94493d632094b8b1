"""The table of what was verified is complete, of these versions, and true where measured again."""

import random
import re

import pytest

from arrakis_jax.families import families
from tests.families.verify import FILE, Errors, measure, rows, variants, versions
from tests.models import chosen

ROWS = rows()
AGAIN = random.Random(3).sample(sorted({family.name for family in families().values()}), 2)
EPS = 2.0**-23  # below it, an error is luck


def test_it_has_every_family_and_variant():
    assert set(ROWS) == {family.name for family in families().values()}
    for family, cells in ROWS.items():
        assert cells[-1].split(", ") == variants(family)
        assert max(map(float, cells[1:3])) <= 2e-5 and float(cells[3]) <= 1e-6, family
        assert float(cells[4]) <= 2e-5, family


def test_it_names_the_installed_versions():
    """If this fails, run `python -m tests.families.verify` and look at what changed."""
    found = re.search(r"with (.*), on", FILE.read_text().replace("\n", " "))
    assert found and found[1] == versions()


@pytest.mark.parametrize("family", chosen(AGAIN, AGAIN[:1]))
def test_a_row_measured_again(family):
    written = Errors(*map(float, ROWS[family][1:5]))
    for name, now, then in zip(Errors._fields, measure(family), written, strict=True):
        ratio = max(now, EPS) / max(then, EPS)
        assert 1 / 3 <= ratio <= 3, f"{name}: {now:.1e}, {then:.1e} in the table"
