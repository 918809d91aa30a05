"""README.md and benchmark/README.md hold what the raw results give, and name every file of raw results."""

import re
import sys

import pytest
from conftest import ROOT

sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT)]

from benchmark import paper, table

MARKS = [(path, name, text) for path in table.DOCUMENTS for name, text in table.MARKED.findall(path.read_text())]


@pytest.mark.parametrize(("path", "name", "text"), MARKS, ids=[f"{path.parent.name}-{name}" for path, name, _ in MARKS])
def test_a_marked_table_is_what_the_raw_results_give(path, name, text):
    assert text.strip() == table.text_of(name).strip(), f"python benchmark/table.py --write brings {path.name} up to date"


def test_the_marks_are_whole():
    for path in table.DOCUMENTS:
        document = path.read_text()
        assert document.count("<!-- table:") == document.count("<!-- end -->") == len(table.MARKED.findall(document))
    names = [name for _, name, _ in MARKS]
    assert len(names) == len(set(names))
    assert {"pusht", "dbpo", "provenance", "paper"} <= set(names)


def test_every_file_of_raw_results_is_named_where_the_numbers_come_from():
    document = (ROOT / "benchmark" / "README.md").read_text()
    files = [path.name for path in (ROOT / "benchmark" / "results").iterdir()]
    assert [name for name in files if f"results/{name}" not in document] == []
    for script in re.findall(r"`python (benchmark/\w+\.py)", document):
        assert (ROOT / script).is_file() or script == "benchmark/diffusion.py", script  # that one is of an earlier commit


def test_a_number_that_changes_is_noticed():
    readme = table.DOCUMENTS[0].read_text()
    changed = readme.replace("| embedded-fast | 0 | 0.938 |", "| embedded-fast | 0 | 0.939 |")
    assert changed != readme
    assert table.rewritten(changed) == table.rewritten(readme)
    assert table.rewritten("no marks") == "no marks"
    with pytest.raises(KeyError):
        table.rewritten("<!-- table: unheard-of -->\nx\n<!-- end -->")


def test_verdicts_on_the_papers_cells():
    def verdict(paper_figure, ours, **more):
        return paper.verdict(paper.Cell("I", "x", paper_figure, ours, "not run", **more))

    assert verdict(0.87, None) == "not run"
    assert [verdict(0.87, ours) for ours in (0.80, 0.86, 0.88, 0.90)] == ["below", "met", "met", "above"]
    assert [verdict(87.0, ours) for ours in (80.0, 86.0, 90.0)] == ["below", "met", "above"]
    assert verdict(0.5, 0.9, differs="other data") == "not the same: other data"
