"""The documentation site: a page for everything in conf, built without a network."""

import importlib.util
import re
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.listing import options
from cl_bench.contracts import Needs

DOCS = Path(__file__).parents[2] / "docs"
CONF = conf_directory()


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    build.write_pages(folder)
    return folder


def test_what_a_strategy_needs_is_told_in_whole_sentences(build):
    found = build.needs(Needs(first_task=1, plateau=True, modalities=frozenset({"text"})))
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", found))
    assert rows.keys() == vars(Needs()).keys()
    assert all(row.endswith(".") and ":meth:" not in row for row in rows.values())
    told = {key: row.partition(" | ")[0] for key, row in rows.items()}
    assert (told["first_task"], told["plateau"], told["adapts"]) == ("1", "yes", "no")
    assert (told["modalities"], told["scenarios"], told["options"]) == ("text", "any", "none")


@pytest.mark.parametrize("name", sorted(options([CONF], "strategy")))
def test_a_strategys_page_says_what_code_and_config_say(pages, name):
    page = (pages / "strategy" / f"{name}.md").read_text()
    config = OmegaConf.load(CONF / "strategy" / f"{name}.yaml")
    target = get_object(config._target_)
    assert "```text\n" in page
    assert target.__module__.replace(".", "/") in page
    settings = page.split("## Settings")[1]
    for key, value in config.items():
        if key not in ("_target_", "defaults") and not OmegaConf.is_config(value):
            assert f"| `{key}` |" in settings, key
    assert "published ACC" in page or "No published number is quoted" in page
    needed = re.search(r"`task_id_at_test` \| (yes|no)", page)[1]
    assert (needed == "yes") == target.needs.task_id_at_test


@pytest.mark.parametrize("name", sorted(options([CONF], "stream")))
def test_a_streams_page_names_its_licence(pages, name):
    page = (pages / "stream" / f"{name}.md").read_text()
    assert "Licence: " in page or "biography" in name
    assert "| setting | default |" in page
    if "digits" in name:
        assert re.search(r"\| \d+ \| [\d,]+ \| [\d,]+ \| [\d,]+ \|", page), "sizes"


@pytest.mark.timeout(200)
def test_the_site_is_whole_and_fetches_nothing(build, pages, tmp_path):
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    config = load_config(
        str(DOCS / "mkdocs.yml"),
        docs_dir=str(pages),
        site_dir=str(tmp_path / "site"),
        nav=build.navigation(pages),
        extra_css=["extra.css"],
        strict=True,
    )
    build_site(config)  # strict: a link that leads nowhere is an error
    for name in ("index", "tutorial", "studies", "strategy/gpm", "stream/permuted_digits"):
        html = (tmp_path / "site" / f"{name}.html").read_text()
        loaded = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?(https?://[^\"' >]+)", html
        )
        assert [u for u in loaded if "cl-bench" not in u] == [], name


def links():
    """(page, target) of every link in docs to a file of the repository, with its anchor."""
    for page in sorted(DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)\s:]+)\)", page.read_text()):
            yield page, target


def test_links_of_the_docs_lead_somewhere():
    for page, target in links():
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.relative_to(DOCS)}: {target}"
        if anchor:
            heads = re.findall(r"(?m)^#+ (.+)$", path.read_text())
            named = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in named, f"{page.relative_to(DOCS)}: {target}"


def test_architecture_says_where_to_add_what():
    page = (DOCS / "architecture.md").read_text()
    lines = page.split("## Where to add what\n")[1].split("\n## ")[0].strip().splitlines()
    lines = [line for line in lines if line.startswith("- ")]
    kinds = [re.match(r"- \*\*An? (\w+)\*\*: .*\]\(\.\./.+\.py\)", line)[1] for line in lines]
    assert kinds == ["strategy", "stream", "metric", "probe", "engine"]
