"""The table of `benchmarks.trainer`, and that the page shows the numbers of the result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.trainer import BEGIN, END, markdown, median, with_table

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "trainer.json").read_text(encoding="utf-8"))


def test_page_has_the_numbers_of_the_result() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert with_table(page, RESULT) == page
    assert markdown(RESULT).count("\n| ") == 1 + len(RESULT["rows"])


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}", f"{BEGIN}{BEGIN}{END}"])
def test_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        with_table(page, RESULT)


@pytest.mark.parametrize(("count", "place"), [(1, 0), (5, 0), (8, 0), (9, 1), (15, 3), (20, 5)])
def test_interval_of_a_median_is_that_of_the_sign_test(count: int, place: int) -> None:
    """Places from the tables: 95 % at least from six values on."""
    values = [float(x) for x in range(count)]
    assert median(values[::-1]) == ((count - 1) / 2, place, count - 1 - place)
