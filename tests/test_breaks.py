"""The breaks can be applied: each finds its place, and every room of the package has some."""

from collections import Counter

from tests.breaks import BREAKS, ROOT, not_once


def test_every_break_finds_its_place_once():
    assert not not_once(BREAKS)
    assert len(BREAKS) >= 64
    assert max(Counter(b.name for b in BREAKS).values()) == 1
    assert all(b.old != b.new for b in BREAKS)


def test_the_tests_of_a_break_are_there():
    for b in BREAKS:
        assert b.tests, b.name
        for test in b.tests:
            file, _, node = test.partition("::")
            source = (ROOT / "tests" / file).read_text()
            for name in node.partition("[")[0].split("::") if node else ():
                assert f"def {name}(" in source or f"class {name}:" in source, (b.name, test)


def test_every_room_is_broken():
    package = ROOT / "arrakis_jax"
    rooms = {p.relative_to(package).parts[0] for p in package.rglob("*.py")} - {"__init__.py"}
    assert {b.file.split("/")[0] for b in BREAKS} == rooms
