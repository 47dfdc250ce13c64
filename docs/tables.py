"""Fill the tables of README.md and docs/ with the figures of docs/results.

    python docs/tables.py            # write the pages
    python docs/tables.py --check    # write nothing; status 1 if a page and the data differ

A page says which figures a table shows, and how, in a comment that no reader sees:

    <!-- table permuted_digits
    strategy: {strategy}
    ACC: {acc:.1f} ± {acc_std:.1f}
    -->

    <!-- end -->

The first line names files of docs/results; their rows follow one another. ``where key`` at its end
keeps the rows that have the key, ``where key=value`` those with that value. Every other line is a
column: its head, and a format string over a row's fields, or several with `` || `` between them, of
which the first counts whose fields the row has. A cell is empty if it has those of none.
``<!-- file PATH -->`` is filled with a file of the repository, as a block of code.

A row has the fields of its file, and its own in their place. Where it names a published row
(``published: <file>/<id>``), it has that row's fields too, as ``published_<field>``, and for every
score a ``verdict_<score>`` by the rule of ``python -m cl_bench report --published``. Where that row
names the naive one of its file (``naive: <id>``), the row is also held against ours of the same
file that names that one: ``gap`` is what its ACC has over the naive run's, in the mean over common
seeds, and ``verdict`` is ``holds`` where ACC is inside and the gap has the published sign, or
``not discriminating`` where the published naive ACC would be inside too.
"""

import argparse
import csv
import json
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_bench.report.published import Verdict, judge
from cl_bench.report.quantities import METRICS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results"
FIELDS = ("command", "commit", "seeds", "machine", "date", "values")
TABLE = re.compile(r"<!-- table (.+?)\n(.+?)\n-->\n.*?<!-- end -->", re.DOTALL)
FILE = re.compile(r"<!-- file (\S+) -->\n.*?<!-- end -->", re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml"}


def main() -> int:
    """Fill every page; the status is 1 if ``--check`` sees one that is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [path for path in pages() if filled(path.read_text()) != path.read_text()]
    for path in stale:
        if not check:
            path.write_text(filled(path.read_text()))
        print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}")
    return int(check and bool(stale))


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(page: str) -> str:
    """The page with its tables and files as the data and the repository have them."""
    page = TABLE.sub(_table, page)
    return FILE.sub(_file, page)


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of one file of results, each with its file's fields.

    Args:
        name: the file's path in docs/results, without ``.json``; or that of a list, with ``.csv``.

    Raises:
        ValueError: a field is missing from the file, or the published row that a row names.
    """
    if name.endswith(".csv"):
        yield from _listed(name)
        return
    whole = json.loads((RESULTS / f"{name}.json").read_text())
    missing = [field for field in FIELDS if field not in whole]
    if missing:
        raise ValueError(f"{name}.json: no {', '.join(missing)} (null where it is not known)")
    values = whole.pop("values")
    ours = [{**whole, **one} for one in values]
    for row in ours:
        found = {**row, **_published(row)}
        yield {**found, **_paired(found, ours)}


def _listed(name: str) -> Iterator[dict[str, Any]]:
    """Lines of a list."""
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _published(row: Mapping[str, Any]) -> dict[str, Any]:
    if "published" not in row:
        return {}
    reference = _named(row["published"])
    verdicts = {
        f"verdict_{key}": judge(reference, key, row[key]).text
        for key in METRICS
        if isinstance(reference.get(key), float) and key in row
    }
    return {**{f"published_{key}": value for key, value in reference.items()}, **verdicts}


def _named(place: str) -> dict[str, Any]:
    """The one row ``<file>/<id>``."""
    name, _, which = place.rpartition("/")
    found = [one for one in rows(name) if one["id"] == which]
    if len(found) != 1:
        raise ValueError(f"{place}: {len(found)} rows of that id")
    return found[0]


def _paired(row: Mapping[str, Any], ours: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if "published_naive" not in row:
        return {}
    place = f"{row['published'].rpartition('/')[0]}/{row['published_naive']}"
    naive = next((one for one in ours if one.get("published") == place), None)
    if naive is None:
        return {}
    scores, bare = (_by_seed(one) for one in (row, naive))
    common = scores.keys() & bare.keys()
    gap = sum(scores[seed] - bare[seed] for seed in common) / len(common)
    published_gap = row["published_acc"] - _named(place)["acc"]
    band = Verdict("acc", row["published_acc"], row["published_acc_std"], row["acc"])
    missed = [band.text] if band.text != "inside" else []
    missed += ["the gap has another sign"] if gap * published_gap <= 0 else []
    verdict = f"missed: {', '.join(missed)}" if missed else "holds"
    if abs(published_gap) <= band.tolerance:
        verdict = "not discriminating"
    return {"gap": gap, "published_gap": published_gap, "verdict": verdict}


def _by_seed(row: Mapping[str, Any]) -> dict[int, float]:
    """ACC of every seed; that of the row where there is one."""
    values = row["per_seed"]["acc"] if "per_seed" in row else [row["acc"]]
    return dict(zip(row["seeds"], values, strict=True))


def _table(match: re.Match[str]) -> str:
    names, _, condition = match[1].strip().partition(" where ")
    heads, cells = zip(*(line.split(": ", 1) for line in match[2].splitlines()), strict=True)
    lines = ["| " + " | ".join(head.strip() for head in heads) + " |", "|---" * len(heads) + "|"]
    for row in (row for name in names.split() for row in rows(name) if _meets(row, condition)):
        lines.append("| " + " | ".join(_cell(row, cell) for cell in cells) + " |")
    return "\n".join([match[0].partition("-->")[0] + "-->", "", *lines, "", "<!-- end -->"])


def _meets(row: Mapping[str, Any], condition: str) -> bool:
    key, equals, value = condition.partition("=")
    return not key or (key in row and (not equals or str(row[key]) == value))


def _cell(row: Mapping[str, Any], template: str) -> str:
    for one in template.split(" || "):
        with suppress(KeyError, IndexError):
            return _Figures().vformat(one, (), row).replace("|", "\\|")
    return ""


class _Figures(string.Formatter):
    """Format strings that take lists, number by number; nothing known is no cell."""

    def format_field(self, value: Any, spec: str) -> str:
        if value is None:
            raise KeyError
        if isinstance(value, list):
            return ", ".join(self.format_field(one, spec) for one in value)
        return format(value, spec)


def _file(match: re.Match[str]) -> str:
    path = ROOT / match[1]
    text = path.read_text().rstrip()
    return f"<!-- file {match[1]} -->\n\n```{LANGUAGES[path.suffix]}\n{text}\n```\n\n<!-- end -->"


if __name__ == "__main__":
    sys.exit(main())
