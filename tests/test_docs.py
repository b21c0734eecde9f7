"""The documentation says what the code is: generated pages, links, commands, the site itself."""

from __future__ import annotations

import ast
import doctest
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from documented_commands import commands, parse
from python_files import load

from ctdbench import __version__, recipes, registry, request, spec
from ctdbench.cli import app
from ctdbench.evaluate import available_tasks
from ctdbench.launch import grid

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
SHIPPED = sorted(
    path for folder in ("ctdbench", "tasks", "results") for path in (ROOT / folder).rglob("*.y*ml")
)


GENERATE: Any = load(DOCS / "generate.py")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """All of the site, what is written and what is generated."""
    made = GENERATE.pages()
    assert not set(made) & set(WRITTEN)
    return {**WRITTEN, **made}


# --- generated pages -----------------------------------------------------------------------------


def test_every_command_is_there_with_its_options(pages: dict[str, str]) -> None:
    group: Any = typer.main.get_command(app)
    parts = re.split(r"^## ", pages["commands.md"], flags=re.MULTILINE)[1:]
    shown = {part.partition("\n")[0]: part for part in parts}
    assert set(shown) == set(group.commands)
    for name, command in group.commands.items():
        for option in (text for parameter in command.params for text in parameter.opts):
            if option.startswith("--"):
                assert option in shown[name], (name, option)


def test_every_method_is_there_as_its_file_says_it(pages: dict[str, str]) -> None:
    for path in registry.shipped_methods().glob("[a-z]*.py"):
        name = path.stem.replace("_", "-")
        page = pages[f"methods/{name}.md"]
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring is not None
        assert f"```text\n{docstring}\n```" in page
        meta = registry.methods()[name].meta
        assert meta["title"] in page
        assert f"(methods/{name}.md)" in pages["methods/index.md"].replace("](", "](methods/")
        assert not meta["paper"] or f"https://arxiv.org/abs/{meta['paper']}" in page
        for field in registry.load_method(name).Options.model_fields:
            assert f"| `{field}` |" in page


def test_every_pair_task_and_table_is_there(pages: dict[str, str]) -> None:
    for name, path in registry.pair_files().items():
        assert f"## {name}\n" in pages["pairs.md"]
        assert path.read_text().strip() in pages["pairs.md"]
    for info in available_tasks():
        assert f"## {info.name}\n\n{info.description}" in pages["tasks.md"]
    for name in recipes.names():
        recipe = recipes.load(name)
        (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", pages["tables.md"], re.M | re.S)
        for setting in recipe.settings:
            assert f"### {setting.name}\n" in section
            for row in setting.rows:
                assert f"- {row}" in section
        assert all(note in section for note in recipe.notes)


def test_every_field_is_there_with_its_kind(pages: dict[str, str]) -> None:
    parts = re.split(r"^## ", pages["settings.md"], flags=re.MULTILINE)[1:]
    shown = {part.partition("\n")[0]: part for part in parts}
    requests = [
        model
        for model in vars(spec).values()
        if isinstance(model, type) and issubclass(model, spec.Frozen) and model is not spec.Frozen
    ]
    assert set(shown) == {model.__name__ for model in requests}
    for model in requests:
        for name, field in model.model_fields.items():
            kind = "identity" if spec.is_identity(field) else "runtime"
            row = rf"^\| `{name}` \| .* \| {kind} \|$"
            assert re.search(row, shown[model.__name__], re.MULTILINE), (model.__name__, name)
            assert " ".join((field.description or "").split()) in shown[model.__name__]
    assert "runtime |" in shown["TrainSpec"]


# --- what is written -----------------------------------------------------------------------------


def test_internal_links_lead_somewhere(pages: dict[str, str]) -> None:
    for page, text in pages.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"https?:", link):
                continue
            target, _, anchor = link.partition("#")
            path = (DOCS / page).parent / target if target else DOCS / page
            name = path.resolve().relative_to(DOCS).as_posix()
            assert name in pages, (page, link)
            heads = re.findall(r"^#+ (.*)$", pages[name], flags=re.MULTILINE)
            assert not anchor or anchor in {head.lower().replace(" ", "-") for head in heads}


def test_every_page_is_in_the_navigation(pages: dict[str, str]) -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    targets = [target for entry in config["nav"] for target in entry.values()]
    folders = tuple(target for target in targets if target.endswith("/"))
    assert set(targets) - set(folders) <= set(pages)
    assert {page for page in pages if not page.startswith(folders)} <= set(targets)


def lines() -> list[list[str]]:
    texts = {**WRITTEN, "tables.md": GENERATE.tables()}
    return [line for text in texts.values() for line in commands(text, "ctdbench")]


@pytest.mark.parametrize("arguments", lines(), ids=" ".join)
def test_a_command_of_the_documentation_parses(arguments: list[str]) -> None:
    parse(arguments)


@pytest.mark.parametrize("page", [name for name, text in WRITTEN.items() if "\n>>> " in text])
def test_examples_give_what_they_show(page: str) -> None:
    found = doctest.testfile(str(DOCS / page), module_relative=False, encoding="utf-8")
    assert found.attempted > 0
    assert found.failed == 0


def test_contributing_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:ctdbench|methods|tasks|tests|results)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_yaml_is_read_by_what_it_is_for(path: Path) -> None:
    if path.parent.name == "pairs":
        assert registry.load_pair(path.stem).name == path.stem
    elif path.parent.name == "recipes":
        assert recipes.load(path.stem).name == path.stem
    elif path.parent.name == "tasks":
        assert path.stem in {info.name for info in available_tasks()}
    elif path.parent.name == "embedded":
        assert registry.read_yaml(path)
    else:  # a grid
        assert grid.lines(grid.read(path), request.build_spec, {})


def test_the_citation_file_has_the_version_and_every_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)
    assert cited["version"] == __version__
    for reference in cited["references"]:
        assert {"type", "title", "authors"} <= set(reference)
    numbers = {one["value"] for r in cited["references"] for one in r.get("identifiers", ())}
    papers = {info.meta.get("paper") for info in GENERATE.shipped().values()} - {"", None}
    assert {f"arXiv:{paper}" for paper in papers} <= numbers


# --- the site ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for package in ("mkdocs", "material"):
        pytest.importorskip(package, reason="make docs installs what builds the site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = list(tmp_path.rglob("*.html"))
    assert len(made) > len(GENERATE.pages())
    for page in made:
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        loads = [tag for tag in tags if re.search(r"(src|href)=\"?(https?:)?//", tag)]
        assert loads == [], page
    assert not list(tmp_path.rglob("*.py"))


def test_the_rows_with_one_seed_stand_in_the_table_of_the_others() -> None:
    """Whose cells compare only if all but rows and seeds is the same."""
    folder = ROOT / "results" / "grids"
    many, one = (
        registry.read_yaml(folder / f"smol-mistral{end}.yaml") for end in ("", "-one-seed")
    )
    own = ("rows", "seeds")
    assert {k: v for k, v in many.items() if k not in own} == {
        k: v for k, v in one.items() if k not in own
    }
    assert not set(many["rows"]) & set(one["rows"])
    assert set(one["seeds"]) < set(many["seeds"])
