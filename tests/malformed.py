"""Malformed input of every kind: what is put into a folder, the command, and what it must say.

A case's files are made by its name alone, so that each one fails for a single reason.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from example_results import example, store_example
from transformers import PreTrainedTokenizerFast

from ctdbench.distill import models, references

RUN = ("run", "--method", "sft", "--pair", "tiny", "--tasks", "bpb_pydoc", "--limit", "1")
TEXT = [f"The fox counts {number} stones and writes the sum down." for number in range(40)]
Make = Callable[[Path], tuple[str, ...]]


@dataclass(frozen=True)
class Bad:
    """`make` writes files into a folder and returns the arguments; relative paths lie in it."""

    name: str
    make: Make
    culprit: str
    code: int = 2


def command(*arguments: str) -> Make:
    return lambda _: arguments


def file(path: str, data: str | bytes, *arguments: str) -> Make:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data.encode() if isinstance(data, str) else data)
        return arguments

    return make


def config(data: str | bytes) -> Make:
    return file("run.yaml", data, "run", "--config", "run.yaml")


def asked(text: str) -> Make:
    """A config file that is well-formed up to this."""
    return config("method: sft\npair: tiny\n" + text)


def pair(**fields: Any) -> Make:
    stated = {"student": {"model": "tiny:student"}, "teachers": [{"model": "tiny:teacher"}]}
    return file("p.yaml", yaml.safe_dump(stated | fields), *RUN[:3], "--pair", "p.yaml")


def plugin(code: str | bytes, name: str = "mine.py") -> Make:
    method = Path(name).stem.replace("_", "-")
    return file(name, code, "run", "--pair", "tiny", "--plugin", name, "--method", method)


def corpus(data: str | bytes) -> Make:
    return file("c.jsonl", data, *RUN, "--set", "train.corpus=jsonl:c.jsonl")


def rows(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def task_data(*items: Any) -> Make:
    return file("data/piqa/validation.jsonl", rows(*items), *RUN[:5], *PIQA)


def stored(damage: Callable[[str], str | bytes], file: str = "result.json", *options: str) -> Make:
    """A store with one damaged cell, shown as a table."""

    def make(folder: Path) -> tuple[str, ...]:
        cell = store_example(folder / "runs", example("sft", {"piqa": {"acc": 0.5}}))
        store_example(folder / "runs", example("start", {"piqa": {"acc": 0.4}}))
        path = cell / file
        path.parent.mkdir(exist_ok=True)
        found = damage(path.read_text() if path.is_file() else "")
        path.write_bytes(found.encode() if isinstance(found, str) else found)
        return ("table", *options)

    return make


def changed(**fields: Any) -> Callable[[str], str]:
    """The stored result with these fields replaced; a dot leads into a mapping, None removes."""

    def damage(text: str) -> str:
        result = json.loads(text)
        for path, value in fields.items():
            *above, last = path.split("__")
            inner = result
            for name in above:
                inner = inner[name]
            if value is None:
                del inner[last]
            else:
                inner[last] = value
        return json.dumps(result)

    return damage


def model(damage: Callable[[Path], None]) -> Make:
    """A pair whose student is a damaged copy of the tiny one, in the folder `model`."""

    def make(folder: Path) -> tuple[str, ...]:
        models.load_tokenizer("tiny:student")  # makes it
        source = models._tiny_folder(references.parse("tiny:student"))
        shutil.copytree(source, folder / "model")
        damage(folder / "model")
        file("c.jsonl", rows(*({"text": text} for text in TEXT)))(folder)
        arguments = pair(student={"model": "dir:model"})(folder)
        text = ("--set", "train.corpus=jsonl:c.jsonl", "--budget", "1kB")
        return (*arguments, *text, "--tasks", "bpb_pydoc", "--limit", "1")

    return make


def _set(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _retokenized(backend: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=backend(), **special).save_pretrained(folder)

    return damage


def _word_piece() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    backend = Tokenizer(kinds.WordPiece({"<unk>": 0, "the": 1, "##re": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def _without_byte_fallback() -> Any:
    """SentencePiece-like, and it knows a single letter."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers import models as kinds

    backend = Tokenizer(kinds.BPE({"<unk>": 0, "a": 1, "▁": 2}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    return backend


def _too_many_words() -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"word{index}" for index in range(500))]
    backend = Tokenizer(kinds.BPE({name: index for index, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


PIQA = ("--tasks", "piqa", "--data-dir", "data")
IMPORTS = "from ctdbench.method import Method\n"
BUDGET = ("--set", "train.corpus=jsonl:c.jsonl", "--budget", "9MB")

CONFIGS = [
    Bad("empty file", config(""), "run.yaml must hold a mapping"),
    Bad("a list", config("- method: sft\n"), "run.yaml must hold a mapping"),
    Bad("a word", config("sft"), "run.yaml must hold a mapping"),
    Bad("unclosed bracket", asked("train: [1"), "run.yaml line 3 is no valid YAML"),
    Bad("tab", asked("train:\n\tclip: 1"), "run.yaml line 4 is no valid YAML"),
    Bad("python object", asked("seed: !!python/object/apply:os.getpid []"), "run.yaml line 3"),
    Bad("not UTF-8", config(b"method: \xff\xfe"), "run.yaml is no text in UTF-8"),
    Bad("NUL bytes", config(b"method: s\x00ft"), "run.yaml is no valid YAML"),
    Bad("deep nesting", asked("seed: " + "[" * 5000), "run.yaml is no valid YAML"),
    Bad("no date", asked("seed: 2020-99-99"), "run.yaml is no valid YAML: month"),
    Bad("no integer", asked("seed: !!int ''"), "run.yaml is no valid YAML"),
    Bad("endless integer", asked("seed: " + "9" * 5000), "run.yaml is no valid YAML"),
    Bad("a file that holds itself", asked("train: &t {clip: *t}"), "train: clip"),
    Bad("key that is a number", config("1: 2"), "run.yaml: 1 is no name of a field"),
    Bad("unknown field", asked("optoins: {}"), "did you mean options"),
    Bad("misspelt field", pair(teachers=None, teacher=[]), "did you mean teachers"),
    Bad("section that is a list", asked("train: [1]"), "train must hold a mapping"),
    Bad("field that is a number", asked("train: {1: 2}"), "train: 1"),
    Bad("options that are a word", asked("options: all"), "options must hold a mapping"),
    Bad("negative budget", asked("train: {budget: -5}"), "train: budget"),
    Bad("rate that is no number", asked("train: {learning_rate: .nan}"), "train: learning_rate"),
    Bad("endless rate", asked("train: {learning_rate: .inf}"), "train: learning_rate"),
    Bad("endless weight", asked("options: {ce_weight: .inf}"), "method sft: ce_weight"),
    Bad("half a seed", asked("seed: 1.5"), "seed: "),
    Bad("no tasks", asked("eval: {tasks: []}"), "eval: tasks"),
    Bad("tasks in one word", asked("eval: {tasks: piqa}"), "eval: tasks"),
    Bad("no items", asked("eval: {limit: 0}"), "eval: limit"),
    Bad("trust in a file", asked("trust_remote_code: true"), "run.yaml: trust_remote_code"),
    Bad("method that is a list", config("method: [sft]\npair: tiny"), "unknown method"),
    Bad("pair that is a list", config("method: sft\npair: [tiny]"), "unknown pair"),
    Bad("no method", config("pair: tiny"), "--method is missing"),
    Bad("folder for a file", command("run", "--config", "."), "cannot read ."),
]
PAIRS = [
    Bad("pair file that is a list", file("p.yaml", "[]", *RUN[:3], "--pair", "p.yaml"), "p.yaml"),
    Bad("no pair file", command(*RUN[:3], "--pair", "p.yaml"), "cannot read p.yaml"),
    Bad("no teachers", pair(teachers=[]), "p.yaml: teachers"),
    Bad("no student", pair(student=None), "p.yaml: student"),
    Bad("pair outside the store", pair(name="../../x"), "p.yaml: name"),
    Bad("no layers", pair(student={"model": "tiny:student", "layers": 0}), "student.layers"),
    Bad("no rank", pair(lora={"rank": 0}), "lora.rank"),
    Bad("endless teacher", pair(teachers=[{"model": "tiny:teacher", "weight": 1e999}]), "weight"),
    Bad("model without a kind", pair(student={"model": "gpt2"}), "reference 'gpt2'"),
    Bad("no such tiny", pair(student={"model": "tiny:giant"}), "'tiny:giant'"),
    Bad("bytes for a model", pair(student={"model": "bytes:256"}), "bytes:256"),
    Bad("out of a wheel", pair(student={"model": "wheel:torch/../../etc/passwd"}), "../../etc"),
    Bad("wheel without a name", pair(student={"model": "wheel:/x.gguf"}), "'wheel:/x.gguf'"),
    Bad("wheel not there", pair(student={"model": "wheel:no-such-wheel/x"}), "no-such-wheel", 3),
    Bad("out of the hub's cache", pair(student={"model": "hub:../../x"}), "'../../x'"),
    Bad("dots in a hub name", pair(student={"model": "hub:a/b..c"}), "'a/b..c'"),
    Bad("revision with dots", pair(student={"model": "hub:a/b@../../c"}), "'../../c'"),
    Bad("not in the cache", pair(student={"model": "hub:a/b"}), "hub:a/b is not in the", 3),
    Bad("folder with dots", pair(student={"model": "dir:../../x"}), "dir:../../x", 3),
]
COMMANDS = [
    Bad("unknown command", command("tabel"), "'tabel'"),
    Bad("unknown option", command(*RUN, "--sed", "1"), "--sed"),
    Bad("option without a value", command(*RUN, "--seed"), "--seed"),
    Bad("seed that is a word", command(*RUN, "--seed", "x"), "--seed"),
    Bad("seed below zero", command(*RUN, "--seed", "-1"), "seed"),
    Bad("budget that is a word", command(*RUN, "--budget", "much"), "budget"),
    Bad("endless budget", command(*RUN, "--budget", "inf"), "budget"),
    Bad("method with a path", command(*RUN, "--method", "../sft"), "'../sft'"),
    Bad("unknown pair", command(*RUN[:3], "--pair", "smol-mistrl"), "did you mean smol-mistral"),
    Bad("unknown task", command(*RUN, "--tasks", "gsm9k"), "did you mean gsm8k"),
    Bad("task between commas", command(*RUN, "--tasks", "bpb_pydoc,,"), "unknown task ''"),
    Bad("task with a path", command(*RUN, "--tasks", "../x"), "'../x'"),
    Bad("setting without a dot", command(*RUN, "--set", "clip=1"), "--set clip=1"),
    Bad("setting without a value", command(*RUN, "--set", "train.clip"), "--set train.clip"),
    Bad("setting of no section", command(*RUN, "--set", "tarin.clip=1"), "'tarin'"),
    Bad("setting of no field", command(*RUN, "--set", "train.clib=1"), "did you mean clip"),
    Bad("setting that is no YAML", command(*RUN, "--set", "train.clip=["), "--set train.clip=["),
    Bad("setting that is no date", command(*RUN, "--set", "train.clip=2020-99-99"), "month"),
    Bad("option of no method", command(*RUN, "--set", "method.x=1"), "method sft: x"),
    Bad("name that commands the terminal", command(*RUN, "--method", "\x1b[2J"), "unknown method"),
    Bad("no folder of data", command(*RUN, "--data-dir", "nowhere"), "nowhere is no folder"),
    Bad("no data", file("data/x", "", *RUN[:5], *PIQA), "data/piqa"),
    Bad("no store to show", command("table", "--store", "nowhere"), "nowhere"),
    Bad("no such format", stored(str, "x", "--format", "docx"), "docx"),
    Bad("store that is a file", file("runs", "", *RUN, "--budget", "1kB"), "--store runs", 3),
]
PLUGINS = [
    Bad("no plugin", command(*RUN, "--plugin", "mine.py"), "mine.py is no file"),
    Bad("plugin with no name", plugin("", "Mine!.py"), "'Mine!'"),
    Bad("plugin that raises", plugin("raise OSError('gone')"), "'mine' (mine.py) cannot be"),
    Bad("plugin that leaves", plugin("import sys; sys.exit(0)"), "'mine' (mine.py) cannot be"),
    Bad("plugin that is no Python", plugin("def"), "'mine' (mine.py) cannot be imported: Syntax"),
    Bad("plugin of NUL bytes", plugin(b"\0\0"), "'mine' (mine.py) cannot be imported"),
    Bad("plugin of brackets", plugin("(" * 3000), "'mine' (mine.py) cannot be imported"),
    Bad("plugin without a method", plugin("x = 1"), "METHOD"),
    Bad("plugin of a number", plugin("METHOD = 3"), "'mine' (mine.py) is no subclass"),
    Bad("plugin of another class", plugin("METHOD = dict"), "'mine' (mine.py) is no subclass"),
    Bad("plugin called teacher", plugin(IMPORTS + "METHOD = Method", "teacher.py"), "'teacher'"),
]
CORPORA = [
    Bad("unknown corpus", command(*RUN, "--set", "train.corpus=wiki"), "'wiki'"),
    Bad("no corpus", command(*RUN, "--set", "train.corpus=jsonl:no.jsonl"), "no.jsonl"),
    Bad("empty corpus", corpus(""), "jsonl:c.jsonl has no usable document (no rows)"),
    Bad("corpus that is no JSON", corpus("{\n" * 9), "jsonl:c.jsonl has no usable document (9 not"),
    Bad("corpus that is no UTF-8", corpus(b'{"text": "\xff"}\n'), "1 not UTF-8"),
    Bad("corpus of numbers", corpus(rows(1, 2.5, None, [])), "4 empty or without text"),
    Bad("corpus of no text", corpus(rows({"text": None}, {"text": ""}, {})), "3 empty"),
    Bad("corpus of odd segments", corpus(rows({"segments": [1, {"text": 2}]})), "1 empty"),
    Bad("corpus of surrogates", corpus('{"text": "a\\ud800"}\n'), "1 lone surrogates"),
    Bad("corpus of brackets", corpus("[" * 100_000), "1 not JSON"),
    Bad("corpus too small", file("c.jsonl", rows({"text": TEXT[0]}), *RUN, *BUDGET), "budget"),
    Bad("empty folder", file("e/x", "", *RUN, "--set", "train.corpus=jsonl:e"), "folder e holds"),
    Bad(
        "task data that is no JSON",
        file("data/piqa/validation.jsonl", "{", *RUN[:5], *PIQA),
        "validation",
    ),
    Bad("task data of numbers", task_data(1, 2), "validation.jsonl"),
    Bad("task data without an answer", task_data({"query": "q", "choices": ["a"]}), "piqa"),
]
MODELS = [
    Bad("model without a config", model(lambda f: (f / "config.json").unlink()), "dir:model", 3),
    Bad("config that is no JSON", model(lambda f: _halve(f / "config.json")), "dir:model", 3),
    Bad(
        "unknown architecture",
        model(lambda f: _set(f / "config.json", model_type="hal", architectures=["Hal"])),
        "dir:model",
        3,
    ),
    Bad("truncated weights", model(lambda f: _halve(f / "model.safetensors")), "dir:model", 3),
    Bad("weights of another size", model(lambda f: _set(f / "config.json", hidden_size=8)), "", 3),
    Bad("weights in a pickle", model(_pickled), "dir:model", 3),
    Bad(
        "code of its own",
        model(
            lambda f: _set(
                f / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}
            )
        ),
        "--trust-remote-code",
        3,
    ),
    Bad("tokenizer cut short", model(lambda f: _halve(f / "tokenizer.json")), "dir:model", 3),
    Bad("WordPiece", model(_retokenized(_word_piece)), "dir:model: the tokenizer (WordPiece)"),
    Bad("no byte fallback", model(_retokenized(_without_byte_fallback)), "not spelled"),
    Bad("more words than logits", model(_retokenized(_too_many_words)), "dir:model: the tok", 3),
]
RESULTS = [
    Bad("empty result", stored(lambda text: ""), "result.json is no valid result"),
    Bad("half a result", stored(lambda text: text[: len(text) // 2]), "result.json is no valid"),
    Bad("result of bytes", stored(lambda text: b"\xff\x00\xfe"), "result.json is no valid"),
    Bad("result of brackets", stored(lambda text: "[" * 100_000), "result.json is no valid"),
    Bad("result of a list", stored(lambda text: "[]"), "result.json is no valid"),
    Bad("result of the future", stored(changed(version=9)), "version"),
    Bad("result without a spec", stored(changed(spec=None)), "spec: "),
    Bad("result without a pair", stored(changed(spec__pair=None)), "spec.pair"),
    Bad("result without teachers", stored(changed(spec__pair__teachers=[])), "spec.pair.teachers"),
    Bad("result with a word for a seed", stored(changed(spec__seed="a")), "spec.seed"),
    Bad("result with a list of settings", stored(changed(spec__train=[])), "spec.train"),
    Bad("result with a word for a score", stored(changed(scores__piqa__acc="high")), "scores"),
    Bad("samples that are no JSON", stored(lambda _: "{", "samples/piqa.jsonl"), "piqa.jsonl"),
    Bad("samples of numbers", stored(lambda _: "1\n2\n", "samples/piqa.jsonl"), "piqa.jsonl"),
    Bad(
        "samples without ids",
        stored(lambda _: rows({"acc": 1.0}, {"acc": 0.0}), "samples/piqa.jsonl"),
        "piqa.jsonl",
    ),
]
ALL = [*CONFIGS, *PAIRS, *COMMANDS, *PLUGINS, *CORPORA, *MODELS, *RESULTS]
