"""Methods and pairs by name: found without importing, mistakes named in one line."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from pydantic import Field

from ctdbench import registry
from ctdbench.distill import references
from ctdbench.errors import UserError
from ctdbench.method import MethodOptions
from ctdbench.request import references_of

PLUGIN = '''
"""A plugin."""
from ctdbench.method import Method

META = {"title": "Mine", "paper": ""}

class Mine(Method):
    pass

METHOD = Mine
'''


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", {})


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_shipped_method_says_what_it_is() -> None:
    found = registry.methods()
    assert {"sft", "bld", "uld"} <= set(found)
    for name, info in found.items():
        assert str(info.meta["title"]).lower().startswith(name.split("-")[0]), name


def test_a_method_published_without_cross_entropy_says_so() -> None:
    for name, info in registry.methods().items():
        options = registry.load_method(name).Options()
        assert (options.ce_weight == 0) == (info.meta.get("ce") is False), name


def test_a_shipped_method_loads_by_name() -> None:
    assert registry.load_method("sft").__name__ == "SFT"


@pytest.mark.parametrize("load", [registry.load_method, registry.load_pair])
def test_an_unknown_name_shows_what_there_is(load: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"there are: .*, "):
        load("qqqqqq")


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UserError, match=r"unknown pair 'smol-mistrl'\. did you mean smol-mistral"):
        registry.load_pair("smol-mistrl")


@pytest.mark.parametrize("name", sorted(registry.pair_files()))
def test_shipped_pairs_are_valid(name: str) -> None:
    pair = registry.load_pair(name)
    assert pair.name == name
    assert pair.title
    for text in references_of(pair):
        assert references.parse(text).name


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("student: {model: dir:a}\n", "teachers: Field required"),
        (
            "student: {modl: dir:a}\nteachers: [{model: dir:b}]\n",
            "student.modl: no such field. did you mean model?",
        ),
        (
            "student: {model: dir:a}\nteachers: [{model: dir:b, size: 1}]\n",
            "teachers.0.size: no such field. there are: ",
        ),
        (
            "student: {model: dir:a, layer: 2}\nteachers: [{model: dir:b}]\n",
            "student.layer: no such field. did you mean layers?",
        ),
        (
            "student: {model: dir:a}\nteachers: [{model: dir:b}]\nlora: {rnk: 4}\n",
            "lora.rnk: no such field. did you mean rank?",
        ),
        ("student: {model: dir:a}\nteachers: dir:b\n", "teachers: Input should be a list"),
        ("student: {model: dir:a}\nteachers: []\n", "teachers: Tuple should have at least 1 item"),
        ("student: {model: dir:a}\nteacher: {model: dir:b}\n", "did you mean teachers"),
        ("student: [unclosed\n", "line 2 is no valid YAML"),
        ("- a list\n", "must hold a mapping of fields, not list"),
        ("", "must hold a mapping of fields, not NoneType"),
        ("student: !!python/object/apply:os.getcwd []\n", "no valid YAML"),
    ],
)
def test_a_malformed_pair_is_one_line_with_file_and_field(
    text: str, complaint: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "mine.yaml", text)
    with pytest.raises(UserError) as caught:
        registry.load_pair(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert complaint in message
    assert "\n" not in message


def test_a_pair_file_of_ones_own_is_named_by_its_file(tmp_path: Path) -> None:
    text = "student: {model: dir:a, layers: 2}\nteachers: [{model: dir:b}]\n"
    pair = registry.load_pair(str(write(tmp_path, "mine.yaml", text)))
    assert (pair.name, pair.student.layers, pair.lora) == ("mine", 2, None)


def test_a_pair_file_whose_name_is_no_slug(tmp_path: Path) -> None:
    text = "student: {model: dir:a}\nteachers: [{model: dir:b}]\n"
    with pytest.raises(UserError, match=r"My Pair.yaml: .* 'My Pair' is no valid name\. use lower"):
        registry.load_pair(str(write(tmp_path, "My Pair.yaml", text)))
    named = write(tmp_path, "größe.yaml", "name: mine\n" + text)
    assert registry.load_pair(str(named)).name == "mine"


def test_a_plugin_is_found_and_loads(tmp_path: Path) -> None:
    assert registry.add_plugin(write(tmp_path, "my_method.py", PLUGIN)) == "my-method"
    assert registry.methods()["my-method"].meta["title"] == "Mine"
    assert registry.load_method("my-method").__name__ == "Mine"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import nothing_of_that_name\n", "ModuleNotFoundError"),
        ("def broken(:\n", "SyntaxError"),
        ("x = 1\n", "METHOD"),
    ],
)
def test_a_broken_plugin_is_named(text: str, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path, "broken.py", text)
    registry.add_plugin(path)
    with pytest.raises(UserError, match=complaint) as caught:
        registry.load_method("broken")
    assert str(path) in str(caught.value)


def test_meta_of_an_installed_package_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_package").mkdir()
    for name in ("__init__", "inner"):
        write(tmp_path / "some_package", f"{name}.py", f"raise SystemExit\n{PLUGIN}")
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = {"one": "some_package", "two": "some_package.inner:Mine", "three": "some_package.no"}
    points = [EntryPoint(name, value, registry.GROUP) for name, value in modules.items()]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: points)
    found = registry.methods()
    titles = [found[name].meta["title"] for name in modules]
    assert titles == ["Mine", "Mine", "some_package.no"]
    assert found["two"].file == tmp_path / "some_package" / "inner.py"
    assert found["three"].file is None


@pytest.mark.parametrize(
    ("points", "name", "complaint"),
    [
        ({"sft": ["json:loads"]}, "sft", "ctdbench's own, and the entry point json:loads claims"),
        ({"mine": ["a:One", "b:Two"]}, "mine", "entry points a:One and b:Two have that name"),
        ({"Bad_Name": ["json:loads"]}, "Bad_Name", "method 'Bad_Name' is no valid name"),
        ({"mine": ["nowhere.at_all:Mine"]}, "mine", r"\(entry point nowhere.at_all:Mine\) cannot"),
        ({"mine": ["json:loads"]}, "mine", r"\(entry point json:loads\) is no subclass"),
    ],
)
def test_an_entry_point_that_cannot_be_the_method_of_its_name(
    points: dict[str, list[str]], name: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [EntryPoint(key, value, registry.GROUP) for key in points for value in points[key]]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: made)
    with pytest.raises(UserError, match=complaint) as caught:
        registry.load_method(name)
    assert "EntryPoint(" not in str(caught.value)
    assert registry.load_method("uld").__name__ == "ULD"  # the others are as they were
    assert registry.methods()["sft"].entry_point is None


@pytest.mark.parametrize("file", ["sft.py", "h_kl.py", "h-kl.py"])
def test_a_plugin_may_not_have_the_name_of_a_shipped_method(file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is a method (sft|h-kl) already\. rename the file"):
        registry.add_plugin(write(tmp_path, file, PLUGIN))


def test_a_method_that_is_written_among_the_shipped_ones_may_be_tried_as_a_plugin() -> None:
    path = registry.shipped_methods() / "h_kl.py"
    assert registry.add_plugin(path) == "h-kl"


def test_a_plugin_that_is_no_file_or_has_no_proper_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        registry.add_plugin(tmp_path / "absent.py")
    with pytest.raises(UserError, match="no valid name"):
        registry.add_plugin(write(tmp_path, "My Method.py", PLUGIN))


def test_an_option_with_an_alias_is_set_by_either_name() -> None:
    class Options(MethodOptions):
        lambda_: float = Field(1.0, alias="lambda", description="Weight.")

    for name in ("lambda", "lambda_"):
        assert registry.validate(Options, {name: 2.0}, "method mine").lambda_ == 2.0
    dumped = Options().model_dump(mode="json")
    assert registry.validate(Options, dumped, "method mine") == Options()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("class O:\n kind: str = Field('a', description='a or ' 'b.')\n", "a or b. Default: a."),
        ("class O:\n kind: str = Field('a', description=f'{x}')\n", ""),
        ("class O:\n other: str = Field('a', description='b.')\n", ""),
        ("a: int = Field(ONE, le=ONE)\nkind: str = Field('b', le=3)\n", "Default: b."),
        ("def (\n", ""),
    ],
)
def test_an_option_is_described_without_importing_it(text: str, told: str, tmp_path: Path) -> None:
    info = registry.MethodInfo("mine", write(tmp_path, "mine.py", text), {"row": "kind"})
    assert registry.described(info, "kind") == told


@pytest.mark.parametrize("text", ["META = {'title': compute()}\n", "META = 3\n", "def (\n", ""])
def test_meta_that_is_no_literal_is_left_out(text: str, tmp_path: Path) -> None:
    registry.add_plugin(write(tmp_path, "odd.py", text))
    assert dict(registry.methods()["odd"].meta) == {}
