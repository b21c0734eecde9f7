"""What a run trains with: models, method and tables of a pair; the trained network; its record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ctdbench import atomic
from ctdbench.cache import cache_dir
from ctdbench.distill import models, rollouts
from ctdbench.distill.batches import Batch
from ctdbench.distill.corpus import Corpus
from ctdbench.distill.models import Side
from ctdbench.distill.precision import resolve
from ctdbench.distill.rendering import Template, end_token
from ctdbench.distill.step import Balance
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.view import Guide, Network
from ctdbench.errors import UserError
from ctdbench.method import Method, PairInfo, PairTables, Trainable
from ctdbench.spec import RunSpec
from ctdbench.text.edit_distance import minimum_edit_map
from ctdbench.text.projection import Projection, build_projection, encoder
from ctdbench.text.vocabulary import emitted

MODULES = "modules.safetensors"
EDIT_MAP_VERSION = 1


@dataclass(frozen=True)
class Setting:
    """What a run trains with: both sides, the method, and the tables of the pair.

    others: further teachers, each with its tables.
    """

    student: Side
    teacher: Teacher
    method: Method
    tables: PairTables
    corpus: Corpus
    others: tuple[Guide, ...] = ()

    @property
    def teachers(self) -> list[Teacher]:
        """All teachers, the first one first."""
        return [self.teacher, *(guide.teacher for guide in self.others if guide.teacher)]


def guides(setting: Setting) -> list[Guide]:
    """All teachers with their tables."""
    return [Guide(setting.teacher, setting.tables), *setting.others]


def pair_tables(student: Side, teacher: Side, template: Template = "plain") -> PairTables:
    """The tables of two loaded sides; the tokens that end their documents are a pair."""
    vocabularies = student.tokens.vocabulary, teacher.tokens.vocabulary
    own, taught = end_token(student, template), end_token(teacher, template)
    ends = [] if own is None or taught is None else [(own, taught)]
    special_pairs = list(dict.fromkeys([*ends, *student.specials.pairs(teacher.specials)]))

    def projection() -> Projection:
        return build_projection(
            *map(emitted, vocabularies),
            encode_student=encoder(student.tokens),
            encode_teacher=encoder(teacher.tokens),
            special_pairs=special_pairs,
        )

    return PairTables.build(
        *vocabularies,
        projection=projection,  # built by who asks for it: it takes seconds
        special_pairs=special_pairs,
        student_special=_special_ids(student),
        teacher_special=_special_ids(teacher),
        edit_mapping=cached_edit_map,
        ends_first=bool(ends),
    )


def _special_ids(side: Side) -> list[int]:
    return [index for index, token in enumerate(side.tokens.vocabulary) if not token]


def cached_edit_map(
    queries: Sequence[bytes], others: Sequence[bytes], special_pairs: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """`minimum_edit_map`, kept in the cache by content: it takes up to minutes."""
    named = [[token.hex() for token in side] for side in (queries, others)]
    content = json.dumps([EDIT_MAP_VERSION, *named, [list(pair) for pair in special_pairs]])
    key = hashlib.sha256(content.encode()).hexdigest()
    path = cache_dir() / "edit_maps" / f"{key}.safetensors"
    if not path.is_file():
        found = minimum_edit_map(queries, others, special_pairs)
        with atomic.new_file(path) as temporary:
            save_file({"map": found}, temporary)
    return load_file(path)["map"]  # type: ignore[no-any-return]


def derived_seed(*parts: object) -> int:
    """A seed from names, so that adding a method never changes another's numbers."""
    digest = hashlib.sha256("/".join(map(str, ("ctdbench", *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def balancing(spec: RunSpec, method: Method) -> Balance:
    """How the terms are weighted: as asked for, or as the method was published.

    Raises UserError for ratio without a cross-entropy to scale the terms to, and for a weight that
    the rule would take back.
    """
    rule = method.balance if spec.train.balance == "auto" else spec.train.balance
    if rule == "ratio" and not method.options.ce_weight:
        raise UserError(
            "train.balance: ratio scales the terms to cross-entropy, which has weight 0 here",
            "set method.ce_weight=1, or train.balance=fixed",
        )
    if (idle := _idle_weight(method, rule)) is not None:
        raise UserError(
            f"method.{idle} has no effect: train.balance={rule} weights the terms by their size",
            "leave it as it is, or set train.balance=fixed",
        )
    return rule


def _idle_weight(method: Method, rule: Balance) -> str | None:
    """An option, not the default, that the rule takes back: ratio gives cross-entropy a weight of 1
    and knows no common factor of the other terms; gradmag, of all terms, neither."""
    options, fields = method.options, type(method.options).model_fields
    if rule == "ratio" and options.ce_weight not in (1, fields["ce_weight"].default):
        return "ce_weight"
    if rule == "fixed" or (rule == "gradmag" and options.ce_weight):
        return None
    if not type(method).__module__.startswith("ctdbench_methods."):
        return None  # a plugin may have terms that weights() does not name, and that weigh 1
    stated = (name for name in fields if name.endswith("weight") and name != "ce_weight")
    return next((name for name in stated if _is_common_factor(method, name)), None)


def _is_common_factor(method: Method, option: str) -> bool:
    """Whether the option, other than by default, multiplies all terms' weights alike."""
    default, own = type(method.options).model_fields[option].default, method.weights()
    usual = type(method)(method.options.model_copy(update={option: default})).weights()
    factors = {weight / usual[name] for name, weight in own.items() if usual.get(name)}
    return own.keys() == usual.keys() and len(factors) == 1 and not factors & {0.0, 1.0}


def build_network(spec: RunSpec, setting: Setting) -> tuple[Network, torch.optim.AdamW]:
    """The trained network and its optimizer, from the pair's start."""
    model = setting.student.model
    if spec.pair.lora is None:
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        torch.manual_seed(derived_seed("lora", spec.seed))
        model = models.add_lora(model, spec.pair.lora)
    extras = extra_modules(spec, setting)
    network = Network(
        model,
        len(setting.student.tokens.vocabulary),
        {name: extra.module for name, extra in extras.items()},
    )
    return network, _optimizer(spec, network, extras)


def extra_modules(spec: RunSpec, setting: Setting) -> dict[str, Trainable]:
    """The method's modules, initialised from a seed of their own."""
    torch.manual_seed(derived_seed("modules", spec.method, spec.seed))
    found = {}
    for guide in guides(setting):
        assert guide.teacher is not None
        pair = PairInfo(setting.student.width, guide.teacher.side.width, guide.tables)
        for name, extra in setting.method.modules(pair).items():
            found[name + guide.suffix] = extra
    return found


def save_modules(spec: RunSpec, setting: Setting, network: Network, folder: Path) -> None:
    """The modules that a method wants kept (`Trainable.keep`), as FOLDER/modules.safetensors."""
    kept = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, extra in extra_modules(spec, setting).items()
        if extra.keep
        for key, tensor in network.extra[name].state_dict().items()
    }
    if kept:
        with atomic.new_file(folder / MODULES) as temporary:
            safetensors.torch.save_file(kept, temporary)


def _optimizer(spec: RunSpec, network: Network, extras: dict[str, Trainable]) -> torch.optim.AdamW:
    """AdamW with one group for the body, one for embeddings and head, one for each extra module."""
    settings = spec.train
    rate = settings.learning_rate or spec.pair.learning_rate
    moved = spec.pair.student.tokenizer not in (None, spec.pair.student.model)
    table_rate = settings.embedding_learning_rate or (10 * rate if moved else rate)
    inner = models.base_model(network.model)
    tables = {
        id(p)
        for m in (inner.get_input_embeddings(), inner.get_output_embeddings())
        for p in m.parameters()
    }
    student = [p for p in network.model.parameters() if p.requires_grad]
    groups = [
        ([p for p in student if id(p) not in tables], rate),
        ([p for p in student if id(p) in tables], table_rate),
        *((list(e.module.parameters()), e.learning_rate or rate) for e in extras.values()),
    ]
    filled = [{"params": params, "lr": peak} for params, peak in groups if params]
    return torch.optim.AdamW(filled, weight_decay=settings.weight_decay)


def record(
    spec: RunSpec, setting: Setting, sample: Sequence[Batch], device: torch.device
) -> dict[str, Any]:
    """How terms were balanced, in what precision, how sides rendered prompts, what W reaches.

    teacher_states: whether they were read from disk or made at every step. projection: share of
    the teacher's columns, and of the probability that it gives on `sample`.
    """
    sides = {"student": setting.student}
    sides |= {
        f"teacher{guide.suffix}": guide.teacher.side for guide in guides(setting) if guide.teacher
    }
    template = spec.train.template
    setup: dict[str, Any] = {
        "balance": balancing(spec, setting.method),
        "precision": resolve(spec.train.precision, device),
        "rendering": {name: rollouts.rendering(side, template) for name, side in sides.items()},
    }
    for index, guide in enumerate(guides(setting)):
        assert guide.teacher is not None
        if setting.method.needs.teacher_states:
            setup[f"teacher_states{guide.suffix}"] = "stored" if guide.teacher.stored else "live"
        if guide.tables.projection_used:
            laid = [(batch, *batch.others)[index] for batch in sample]
            sizes = torch.tensor([float(len(batch.teacher.position)) for batch in laid])
            means = torch.stack([guide.teacher.mean_prediction(b.teacher) for b in laid])
            mass = (sizes / sizes.sum()).to(means.dtype) @ means
            setup[f"projection{guide.suffix}"] = guide.tables.reached(mass)._asdict()
    return setup
