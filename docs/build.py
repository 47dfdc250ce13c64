"""Build the documentation site: the pages of this folder, and one made for everything in conf.

    pip install 'cl_bench[docs]'
    python docs/build.py [--out site]

Nothing is fetched. A page about a strategy or a stream says what its code and its configuration
say; nothing on it is written twice.
"""

import argparse
import inspect
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from mkdocs.commands.build import build as build_site
from mkdocs.config import load_config
from omegaconf import OmegaConf

from cl_bench.board.blocks import Entry, board, results_directory
from cl_bench.board.pages import board_tables, method_section
from cl_bench.board.protocol import protocols
from cl_bench.cli.folders import conf_directory
from cl_bench.cli.listing import describe, options
from cl_bench.contracts import Needs, Origin, Stream

DOCS = Path(__file__).parent
ROOT = DOCS.parent
REPOSITORY = "https://github.com/cl-bench/cl_bench/blob/main"
CONF = conf_directory()
TOO_LARGE = ("biography/paper", "biography/gpu", "biography/small", "t5_cl_hub", "drift")
"""Streams that take long to make, a network or an extra: their pages say how large they are."""

CSS = """
.md-grid { max-width: 1400px; }
.md-typeset pre > code { white-space: pre-wrap; }
.md-typeset td code, .md-typeset td[style*="right"] { white-space: nowrap; }
.md-typeset table:not([class]) :is(th, td) { padding: 0.5em 0.8em; min-width: 0; }
.md-typeset th button { all: inherit; padding: 0; border: 0; min-width: 0; cursor: pointer; }
.md-typeset th button:focus-visible { outline: 2px solid; }
.md-typeset th[aria-sort] button::after { content: " \\2193"; }
.md-typeset th[aria-sort=ascending] button::after { content: " \\2191"; }
"""

JS = """
"use strict";
for (const table of document.querySelectorAll(".md-typeset table")) {
  const body = table.tBodies[0];
  if (!table.tHead || !body || body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const scale = { kB: 1e3, MB: 1e6, GB: 1e9, min: 60 };
      const key = (row) => {
        const text = row.cells[column] ? row.cells[column].textContent.trim() : "";
        const number = /^([-+]?[0-9.]+)(?::([0-9]+))?(?: ([a-zA-Z]+))?/;
        const found = text.replace(/,/g, "").match(number);
        if (!found) return text;
        return (Number(found[1]) + Number(found[2] || 0) / 60) * (scale[found[3]] || 1);
      };
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = typeof a === typeof b && typeof a === "number"
          ? a - b : String(a).localeCompare(String(b));
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
    });
    head.append(button);
  });
}
"""

PAGES = {
    "start/reproduce.md": "Reproduce a paper",
    "start/finetune.md": "Fine-tune a language model",
    "start/own_data.md": "Your own data",
    "start/new_method.md": "Add a method",
    "tutorial.md": "Your own strategy in 15 minutes",
    "studies.md": "From one run to a study",
    "dashboard.md": "Weights & Biases",
    "integrations.md": "In your own training loop",
    "merging.md": "Merging models",
    "optimizers.md": "Optimizers and surgery",
    "architecture.md": "Architecture",
    "board.md": "The board",
    "benchmarks.md": "Benchmarks",
    "seeds.md": "Published systems",
}


def main() -> None:
    """Write the pages to a temporary folder and build the site from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    parser.add_argument("--data", type=Path, help="folder with mnist/, cifar100/, ...: for sizes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        write_pages(source, given.data)
        config = load_config(
            str(DOCS / "mkdocs.yml"),
            docs_dir=str(source),
            site_dir=str(given.out.absolute()),
            nav=navigation(source),
            extra_css=["extra.css"],
            extra_javascript=["extra.js"],
            strict=True,
        )
        build_site(config)
    print(f"{given.out / 'index.html'}")


def write_pages(folder: Path, data: Path | None = None) -> None:
    """All Markdown of the site.

    Args:
        folder: where to.
        data: folder with the data sets that are at hand, each in one of its name.
    """
    (folder / "extra.css").write_text(CSS)
    (folder / "extra.js").write_text(JS)
    shutil.copytree(DOCS / "images", folder / "images")
    shutil.copy(DOCS / "notebook.ipynb", folder)
    for name in ("own_folder", "results"):
        shutil.copytree(DOCS / name, folder / name)
    cells = results_directory()
    entries = board(protocols(), cells)
    for path in [*DOCS.glob("*.md"), *DOCS.glob("start/*.md"), *DOCS.glob("lab/*.md")]:
        target = folder / path.relative_to(DOCS)
        target.parent.mkdir(exist_ok=True)
        target.write_text(relinked(path.read_text()))
    about = (folder / "board.md").read_text()
    (folder / "board.md").write_text(f"{about}\n{board_tables(entries, folder, cells)}")
    readme = (ROOT / "README.md").read_text()
    before, own, after = re.split(r"(?m)^## (?=Your own strategy|In your own training)", readme)
    (folder / "tutorial.md").write_text(tutorial(own))
    (folder / "index.md").write_text(relinked(f"{before}## {after}"))
    for group in ("strategy", "stream"):
        for name, path in sorted(options([CONF], group).items()):
            target = folder / group / f"{name}.md"
            target.parent.mkdir(parents=True, exist_ok=True)
            text = strategy_page(name, path, entries) if group == "strategy" else None
            target.write_text(text or stream_page(name, path, data))


def navigation(folder: Path) -> list[dict[str, Any]]:
    """The site's contents, in the order in which one reads."""
    nav: list[dict[str, Any]] = [{"Start": "index.md"}]
    nav += [{title: name} for name, title in PAGES.items() if (folder / name).exists()]
    for group, title in (("strategy", "Strategies"), ("stream", "Streams")):
        found = sorted((folder / group).rglob("*.md"))
        items = {p.relative_to(folder / group).with_suffix("").as_posix(): p for p in found}
        nav.append({title: [{n: p.relative_to(folder).as_posix()} for n, p in items.items()]})
    rest = sorted(p.name for p in folder.glob("*.md") if p.name not in {*PAGES, "index.md"})
    lab = ["results/README.md", *sorted(f"lab/{p.name}" for p in folder.glob("lab/*.md"))]
    return [*nav, {"More": rest}, {"Figures": lab}]


def relinked(text: str) -> str:
    """Links from the repository's root and to its code, as the site has them."""
    text = text.replace("](docs/", "](")
    code = r"\]\((?:\.\./)*((?:cl_bench|tasks|tests|conf|README|CITATION|LICENSE|Makefile)[^)]*)\)"
    return re.sub(code, rf"]({REPOSITORY}/\1)", text)


def tutorial(readme: str) -> str:
    """The README's example, which the test suite runs as it is printed, with what comes around."""
    more = "A test, and what to check next: [add a method](start/new_method.md)."
    return relinked(f"# {readme}\n{more}\n")


def strategy_page(name: str, path: Path, entries: Sequence[Entry]) -> str:
    """Equations and source from the module, defaults from the configuration."""
    target = get_object(OmegaConf.load(path)._target_)
    module = inspect.getmodule(target)
    file = Path(inspect.getfile(target)).relative_to(ROOT)
    parts = [
        f"# {name}",
        describe(path) + ".",
        f"    {path.read_text().partition(chr(10))[0].removeprefix('# ')}",
        "## What it does",
        verbatim(inspect.getdoc(module) or ""),
        f"Source: [`{file}`]({REPOSITORY}/{file})",
        "## What it needs",
        needs(target.needs),
        "## Settings",
        settings(path, skip=("_target_", "defaults")),
        searched(name),
        "## On the board",
        method_section(entries, name),
        "## Numbers to compare with",
        published(name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def stream_page(name: str, path: Path, data: Path | None) -> str:
    """Licence, citation and sizes, from the stream itself where its data is at hand."""
    config = OmegaConf.load(path).stream
    target = get_object(config._target_)
    file = Path(inspect.getfile(target)).relative_to(ROOT)
    parts = [
        f"# {name}",
        describe(path) + ".",
        f"    python -m cl_bench +strategy=gpm +stream={name}",
        "## What it is",
        verbatim(inspect.getdoc(target) or ""),
        f"Source: [`{file}`]({REPOSITORY}/{file})",
        "## Data",
        sizes(name, config, data),
        "## Settings",
        settings(path, skip=("defaults",)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verbatim(docstring: str) -> str:
    """A docstring as it stands: its equations are laid out for a fixed width."""
    return f"```text\n{docstring}\n```"


def needs(found: Needs) -> str:
    """What the strategy asks of stream and engine, as its class declares it."""
    told = re.findall(r"(?m)^    (\w+): (.+(?:\n        .+)*)$", inspect.getdoc(Needs) or "")
    said = {key: re.sub(r":\w+:", "", " ".join(words.split())) for key, words in told}
    rows = []
    for key, value in vars(found).items():
        shown = str(value)
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, frozenset):
            shown = ", ".join(sorted(value)) or "any"
        elif isinstance(value, Mapping):
            shown = ", ".join(f"{what} by {option}" for what, option in value.items()) or "none"
        rows.append(f"| `{key}` | {shown} | {said.get(key, '')} |")
    return "\n".join(["| need | | |", "|---|---|---|", *rows])


def settings(path: Path, skip: tuple[str, ...]) -> str:
    """Every key with its default and what the configuration's comment says about it."""
    rows = [
        f"| `{key}` | `{value}` | {escaped(comment)} |"
        for key, value, comment in commented(path)
        if key.partition(".")[0] not in skip and "_target_" not in key
    ]
    if not rows:
        return "None."
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows])


def escaped(comment: str) -> str:
    """A comment as Markdown shows it: no table cells, no attribute lists."""
    for character in "|{}*_<":
        comment = comment.replace(character, f"&#{ord(character)};")
    return comment


def commented(path: Path) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and comment of every line of a configuration that has a value.

    Parts that it takes from another group (``/protect@protect: layers``) are among them.
    """
    parents: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        found = re.match(r"( *)([\w.]+):(?: +(.*?))?(?:\s+# (.*))?$", line)
        if not found or line.lstrip().startswith("#"):
            continue
        indent, key, value, comment = len(found[1]), found[2], found[3], found[4] or ""
        parents = [p for p in parents if p[0] < indent]
        if value and not value.startswith("#"):
            yield ".".join([*(p[1] for p in parents), key]), value, comment
        else:
            parents.append((indent, key))
    for group, place, name in re.findall(r"(?m)^  - /(\w+)@(\w+): (\w+)$", path.read_text()):
        for key, value, comment in commented(CONF / group / f"{name}.yaml"):
            yield f"{place}.{key}", value, comment


def searched(name: str) -> str:
    """The space in which settings without a published value are chosen."""
    path = CONF / "search" / f"{name}.yaml"
    if not path.exists():
        return "No search space is defined."
    base = OmegaConf.load(path.with_name("_base.yaml"))
    sweeper = OmegaConf.merge(base, OmegaConf.load(path)).hydra.sweeper
    space = ", ".join(f"`{key}` in `{value}`" for key, value in sweeper["params"].items())
    return (
        f"`-m +search={name}` chooses {space}, in {sweeper['n_trials']} trials on validation data "
        "of the first three tasks. What it chooses is labelled so in every table."
    )


def published(name: str) -> str:
    """Numbers that experiments quote for the strategy, and where they stand."""
    rows = []
    for words, found in quoted(name):
        acc = f"{found.get('acc', '-')} ± {found.get('acc_std', '-')}"
        bwt = found.get("bwt", "-")
        source = found.get("source", "")
        rows.append(f"| `{words}` | {acc} | {bwt} | {source} |")
    if not rows:
        return (
            "No published number is quoted for it: whatever is compared with this strategy here "
            "is unverified against its paper."
        )
    head = ["| experiment | published ACC (%) | published BWT | quoted from |", "|---|---|---|---|"]
    ours = "Whether our runs reach them stands in [benchmarks](../benchmarks.md)."
    return "\n".join([*head, *rows, "", ours])


def quoted(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The overrides that make a published run of the strategy, and the numbers quoted for it."""
    for experiment, path in sorted(options([CONF], "experiment").items()):
        part = path.with_suffix("") / f"{name}.yaml"  # of an experiment of many strategies
        for file, words in ((path, ""), (part, f" strategy={name}")):
            config = OmegaConf.load(file) if file.exists() else {}
            if (config.get("reference") or {}).get("strategy") != name:
                continue
            for scenario in config.get("scenarios") or [None]:
                stream = {} if scenario is None else {"stream": {"scenario": scenario}}
                found = OmegaConf.to_container(OmegaConf.merge(config, stream), resolve=False)
                found = OmegaConf.to_container(OmegaConf.create(found).reference, resolve=True)
                said = "" if scenario is None else f" stream.scenario={scenario}"
                yield f"+experiment={experiment}{words}{said}", found


def sizes(name: str, config: Any, data: Path | None) -> str:
    """Tasks, samples and origin; what the stream says of them where its data is not here."""
    if "data_dir" in config:
        hub = hub_of(config)
        at_hand = data / hub.rpartition("/")[2] if data and hub else None
        if at_hand is None or not at_hand.is_dir():
            return origin_of_module(config)
        config.data_dir = str(at_hand)
    elif name in TOO_LARGE:
        return origin_of_module(config)
    if config.get("data", "none") is None:  # somebody's own
        return origin_of_module(config)
    stream: Stream = instantiate(config)
    head = "| task | classes | training | validation | test | chance |"
    rows = [
        f"| {task.name} | {len(task.classes)} | {len(task.train):,} | {len(task.validation):,} "
        f"| {len(task.test):,} | {task.facts.get('chance', '-')} |"
        for task in stream
    ]
    origins = {task.origin for task in stream}
    said = [
        f"*{o.source}*\n\nLicence: {o.licence}\n\nCitation: {o.citation or 'none'}" for o in origins
    ]
    facts = f"Scenario `{stream.scenario}`, samples of shape {tuple(stream.input_shape)}."
    return "\n".join([facts, "", *said, "", head, "|---|---:|---:|---:|---:|---:|", *rows])


def hub_of(config: Any) -> str:
    """Id of the stream's data on the hub; nothing if there is none, or several."""
    ids = {m.HUB_ID for m in modules_of(config) if isinstance(getattr(m, "HUB_ID", None), str)}
    return str(ids.pop()) if len(ids) == 1 else ""


def modules_of(config: Any) -> list[Any]:
    """The stream's module, and ours whose functions it uses."""
    module = inspect.getmodule(get_object(config._target_))
    around = [module, *(inspect.getmodule(v) for v in vars(module).values() if callable(v))]
    found = {
        m.__name__: m for m in around if m is not None and m.__name__.startswith("cl_bench.tasks")
    }
    return list(found.values())


def chosen(known: dict[Any, Any], config: Any) -> list[Any]:
    """Entries of a table that the configuration names; all where it names none."""
    words = [v for v in config.values() if isinstance(v, str)]
    return [known[w] for w in words if w in known] or list(known.values())


def origin_of_module(config: Any) -> str:
    """Licence and citation as constants beside the stream, where its data is not at hand."""
    said = []
    for found in modules_of(config):
        for value in vars(found).values():
            for one in chosen(value, config) if isinstance(value, dict) else [value]:
                if isinstance(one, Origin):
                    said.append((one.source, one.licence, one.citation))
                elif hasattr(one, "citation") and hasattr(one, "licence"):
                    said.append((getattr(one, "hub_id", ""), one.licence, one.citation))
        if isinstance(getattr(found, "LICENCE", None), str):
            hub = getattr(found, "HUB_ID", "")
            said.append(
                (
                    f"{hub} on the Hugging Face hub" if hub else "",
                    found.LICENCE,
                    getattr(found, "CITATION", ""),
                )
            )
    for key in ("licence", "citation"):
        if not said and key in config:
            said.append(("", config.licence, config.citation))
    texts = [
        "\n\n".join(
            part
            for part in (source and f"*{source}*", f"Licence: {licence}", f"Citation: {citation}")
            if part
        )
        for source, licence, citation in dict.fromkeys(said)
    ]
    remark = (
        "Its data is not part of the package and was not read for this page; the sizes of what you "
        "run on stand in the run's `data.json`."
    )
    return "\n\n".join([*texts, remark])


if __name__ == "__main__":
    sys.exit(main())
