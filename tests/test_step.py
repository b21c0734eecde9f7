"""The streamed step against a plain restatement, its memory, and the invariants of a harness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from harness_setup import (
    IDS,
    METHODS,
    batch_of,
    examples,
    float64,
    float64_side,
    gradients,
    llama_side,
    make_step,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ctdbench import ops
from ctdbench.distill import batches, teacher, train
from ctdbench.distill.blocks import position_pairs
from ctdbench.distill.examples import Example
from ctdbench.distill.step import Step
from ctdbench.distill.view import CE
from ctdbench.errors import RunError, UserError
from ctdbench.method import Block, Method, MethodOptions, Needs, Rows, Term
from ctdbench.rows import LOGGED

every_method = pytest.mark.parametrize(("name", "options"), METHODS, ids=IDS)


# --- a plain restatement: whole documents, full logits, one backward ------------------------------


def full_logits(model: Any, ids: Any, columns: int) -> Tensor:
    """[n - 1, V]: row i predicts token i + 1."""
    return model(input_ids=torch.tensor(ids)[None]).logits[0, :-1, :columns]


def plain_loss(step: Step, found: list[Example]) -> Tensor:
    """The loss by its definition, document by document."""
    parts = [document_parts(step, example) for example in found]
    sums = {key: sum(part[key] for part in parts) for key in parts[0]}
    weights = {"ce": step.method.options.ce_weight, **step.method.weights()}
    return sum(
        weight * sums[f"{name} total"] / sums[f"{name} count"]
        for name, weight in weights.items()
        if f"{name} total" in sums and weight
    )


def document_parts(step: Step, example: Example) -> dict[str, Any]:
    student, taught = example.student, example.teacher
    scores = full_logits(step.network.model, student.sequence.ids, step.network.columns)
    with torch.no_grad():
        assert step.teacher is not None
        targets = full_logits(
            step.teacher.side.model, taught.sequence.ids, step.teacher.columns
        ).softmax(-1)
    supervised = torch.tensor(student.supervised[1:])
    tokens = torch.tensor(student.sequence.ids[1:])
    nll = -scores.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    parts = {"ce total": nll[supervised].sum(), "ce count": supervised.sum()}
    if "uld" in step.method.weights():
        return {**parts, **uld_parts(step, example, scores, targets)}
    if "byte" in step.method.weights():
        return {**parts, **byte_parts(step, example, targets)}
    return parts


def uld_parts(step: Step, example: Example, scores: Tensor, targets: Tensor) -> dict[str, Any]:
    mine, theirs = scores.softmax(-1), targets
    if step.method.options.alignment == "positions":  # type: ignore[attr-defined]
        left = [mine[i - 1] for i in range(1, len(mine) + 1) if example.student.supervised[i]][:-1]
        right = [theirs[i - 1] for i in range(1, len(theirs) + 1) if example.teacher.supervised[i]]
    else:
        left = [chunk_distribution(mine, example.student, c) for c in range(example.chunks)]
        right = [chunk_distribution(theirs, example.teacher, c) for c in range(example.chunks)]
    distances = []
    for a, b in zip(left, right, strict=False):
        width = max(len(a), len(b))
        ranked = [
            nn.functional.pad(x.sort(descending=True).values, (0, width - len(x))) for x in (a, b)
        ]
        distances.append((ranked[0] - ranked[1]).abs().sum())
    return {"uld total": sum(distances) / len(distances), "uld count": 1}


def chunk_distribution(rows: Tensor, side: Any, chunk: int) -> Tensor:
    members = [i for i in range(len(side.chunk)) if side.chunk[i] == chunk]
    weight = torch.ones((), dtype=rows.dtype)
    for i in members[:-1]:
        weight = weight * rows[i - 1, side.sequence.ids[i]].clamp(min=1e-8)
    return rows[members[-1] - 1] * weight


def byte_parts(step: Step, example: Example, targets: Tensor) -> dict[str, Any]:
    """Head j reads the state that predicts a token and gives the token's j-th byte."""
    side, heads = example.student, step.network.extra["heads"]
    ids = torch.tensor(side.sequence.ids)[None]
    body = step.network.model.get_decoder()(input_ids=ids).last_hidden_state[0]
    teacher_bytes = teacher_byte_rows(step, example, targets)
    by_token = step.method.options.reduction == "token_sum"  # type: ignore[attr-defined]
    taught = step.method.needs.bytes is not None
    ce, kl, ce_count, kl_count = [], [], 0, 0
    for i in range(1, len(side.chunk)):
        start, end = int(side.sequence.byte_start[i]), int(side.sequence.byte_end[i])
        if not side.supervised[i] or end == start:
            continue
        for j in range(min(end - start, 10)):
            log_q = (heads.weight[j] @ body[i - 1] + heads.bias[j]).log_softmax(-1)
            ce.append(-log_q[example.text[start + j]])
            if side.chunk[i] >= 0 and taught:
                p = teacher_bytes[start + j]
                kl.append((torch.special.xlogy(p, p) - p * log_q[:257]).sum())
        ce_count += 1 if by_token else min(end - start, 10)
        kl_count += (side.chunk[i] >= 0) * (1 if by_token else min(end - start, 10))
    found = {"byte total": sum(ce), "byte count": ce_count}
    return {**found, "kl total": sum(kl), "kl count": kl_count} if taught else found


def teacher_byte_rows(step: Step, example: Example, targets: Tensor) -> dict[int, Tensor]:
    """Byte offset -> distribution, from the document's own teacher rows in one go."""
    side = example.teacher
    width = torch.tensor(side.sequence.byte_end - side.sequence.byte_start)[1:]
    estimator = "path" if step.method.needs.bytes == "path" else "mixed"
    assert step.teacher is not None
    rows = ops.byte_distributions(
        step.teacher.trie,
        targets,
        torch.tensor(side.sequence.ids)[1:],
        width,
        torch.zeros_like(width),
        estimator=estimator,  # type: ignore[arg-type]
    )
    first = int(side.sequence.byte_start[1])
    return {first + place: row.to(targets) for place, row in enumerate(rows)}


@pytest.mark.parametrize("block_rows", [8, 40, 10_000])
@every_method
@float64()
def test_streamed_equals_unstreamed(name: str, options: dict[str, Any], block_rows: int) -> None:
    sides = {"student": float64_side("student"), "teacher": float64_side("teacher")}
    step = make_step(name, options, **sides, block_rows=block_rows)
    found = examples(**sides, count=5)
    report, streamed = gradients(step, [batch_of(found[:2]), batch_of(found[2:])])
    step.network.zero_grad(set_to_none=True)
    loss = plain_loss(step, found)
    loss.backward()
    exact = name != "bld"  # its softmax is in float32
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(torch.tensor(report.loss), loss.detach(), **tolerance)
    for key, parameter in step.network.named_parameters():
        if parameter.grad is None:
            assert streamed[key].abs().max() == 0, key
        else:
            torch.testing.assert_close(streamed[key], parameter.grad, **tolerance, msg=key)


# --- memory ---


class LargestRows(TorchDispatchMode):
    """The most rows that any tensor as wide as a vocabulary has had."""

    def __init__(self, widths: set[int], parameters: set[int]) -> None:
        super().__init__()
        self.widths, self.parameters, self.rows, self.shape = widths, parameters, 0, ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.numel() not in self.parameters:
                wide = [size for size in tensor.shape if size in self.widths]
                rows = tensor.numel() // max(wide) if wide else 0
                held = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
                if held and rows > self.rows:  # an expanded zero holds nothing
                    self.rows, self.shape = rows, tuple(tensor.shape)
        return result


@every_method
def test_no_tensor_of_tokens_by_vocabulary_exists(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "ROWS_AT_A_TIME", 15)
    sides = {"student": llama_side("student"), "teacher": llama_side("teacher")}
    step = make_step(name, options, **sides, block_rows=16)
    batch = batch_of(examples(**sides, count=12))
    assert len(batch.student.token) > 300
    widths = {
        size + more
        for side in sides.values()
        for size in (len(side.tokens.vocabulary), side.model.config.vocab_size)
        for more in (0, 1)
    }
    own = {p.numel() for side in sides.values() for p in side.model.parameters()}
    with LargestRows(widths, own) as seen:
        step.gradients([batch])
    assert 0 < seen.rows <= 16, seen.shape


def test_the_memory_check_sees_a_whole_tensor() -> None:
    sides = {"student": llama_side("student"), "teacher": llama_side("teacher")}
    step = make_step("uld", **sides, block_rows=10_000)
    batch = batch_of(examples(**sides, count=12))
    with LargestRows({step.network.columns}, set()) as seen:
        step.gradients([batch])
    assert seen.rows > 200


# --- invariants ---


def assert_same_step(first: Any, second: Any) -> None:
    (report, grads), (other, others) = first, second
    assert report.loss == pytest.approx(other.loss, rel=1e-5)
    assert grads.keys() == others.keys()
    for key, value in grads.items():
        torch.testing.assert_close(value, others[key], rtol=1e-3, atol=1e-5, msg=key)


@every_method
def test_padding_order_and_splitting_change_nothing(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {"student": llama_side("student"), "teacher": llama_side("teacher")}
    step = make_step(name, options, **sides)
    found = examples(**sides, count=6)
    whole = gradients(step, [batch_of(found)])
    assert_same_step(whole, gradients(step, [batch_of(found[::-1])]))
    assert_same_step(whole, gradients(step, [batch_of([example]) for example in found]))
    monkeypatch.setattr(batches, "BUCKETS", (200, 300))
    assert_same_step(whole, gradients(step, [batch_of(found)]))


def test_padding_tokens_are_in_no_row() -> None:
    sides = {"student": llama_side("student"), "teacher": llama_side("teacher")}
    found = examples(**sides, count=4)
    batch = batch_of(found)
    for side, name in ((batch.student, "student"), (batch.teacher, "teacher")):
        sequences = [getattr(example, name) for example in found]
        assert len(side.token) == sum(len(sequence.chunk) - 1 for sequence in sequences)
        shifted = side.ids.flatten()[side.position + 1]
        assert torch.equal(shifted, side.token)
        assert side.mask.flatten()[side.position + 1].all()


# --- the contract of a method ---


class Plain(Method):
    """Squared states and teacher entropy: reads all that a method can ask for."""

    kind = "constant"

    def __init__(self) -> None:
        super().__init__(MethodOptions())

    @property
    def needs(self) -> Needs:
        return Needs(hidden=True, bytes="mixed")

    def weights(self) -> Mapping[str, float]:
        return {"states": 0.5}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        assert block.student.hidden is not None
        assert block.bytes is not None
        rows = block.student
        assert int(rows.chunk.max()) < block.chunks
        inside = rows.chunk >= 0
        energy = block.student.hidden[inside].square().mean(1).sum()
        return {"states": Term(energy, self.counted(rows.scores(), inside))}

    def counted(self, logits: Tensor, inside: Tensor) -> Tensor:
        return inside.sum()


class Counting(Plain):
    def counts(self, block: Block) -> Mapping[str, Tensor]:
        return {"states": (block.student.chunk >= 0).sum()}


class CountsByLogits(Plain):
    def counted(self, logits: Tensor, inside: Tensor) -> Tensor:
        return (inside & (logits.max(1).values > 1)).sum()


class Miscounting(Counting):
    def counted(self, logits: Tensor, inside: Tensor) -> Tensor:
        return inside.sum() + 1


class CountsTooMuch(Counting):
    def counts(self, block: Block) -> Mapping[str, Tensor]:
        return {**super().counts(block), "absent": torch.tensor(1)}


def custom_step(method: Method) -> tuple[Step, list[Example]]:
    sides = {"student": llama_side("student"), "teacher": llama_side("teacher")}
    return make_step(method, **sides), examples(**sides, count=4)


def test_a_method_without_counts_trains_as_one_with_them() -> None:
    results = []
    for method in (Plain(), Counting()):
        step, found = custom_step(method)
        results.append(gradients(step, [batch_of(found[:3]), batch_of(found[3:])]))
    assert results[0][0] == results[1][0]
    for key, value in results[0][1].items():
        assert torch.equal(value, results[1][1][key]), key


class Undemanding(Plain):
    """Sees blocks of chunks, of pairs, and without a teacher: chunk ids fit in each."""

    def __init__(self, needs: Needs) -> None:
        super().__init__()
        self.asked = needs

    @property
    def needs(self) -> Needs:
        return self.asked

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        for rows in (block.student, block.teacher):
            if rows is not None:
                assert ((rows.chunk >= -1) & (rows.chunk < block.chunks)).all()
        return {}


@pytest.mark.parametrize(
    "needs", [Needs(), Needs(teacher_logits=False), Needs(pairing="positions")]
)
def test_chunk_ids_are_those_of_the_block(needs: Needs) -> None:
    step, found = custom_step(Undemanding(needs))
    step.gradients([batch_of(found)])


@pytest.mark.parametrize("method", [CountsByLogits(), Miscounting(), CountsTooMuch()])
def test_a_count_that_does_not_follow_from_the_tokens_is_refused(method: Method) -> None:
    step, found = custom_step(method)
    with pytest.raises(RunError, match=r"^method term '\w+' counts \d+ in terms") as caught:
        step.gradients([batch_of(found)])
    assert "\n" not in str(caught.value)


class Gives(Plain):
    """Returns what it is given, in `terms` alone."""

    def __init__(self, terms: Any) -> None:
        super().__init__()
        self.given = terms

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> Any:
        return self.given


ONE = torch.ones(())


@pytest.mark.parametrize(
    ("terms", "complaint"),
    [
        (None, "gives a NoneType"),
        (ONE, "gives a Tensor"),
        ({"kl": ONE}, "term kl is of type Tensor"),
        ({"kl": Term(torch.ones(3), ONE)}, r"the total of term kl is a Tensor \[3\]"),
        ({"kl": Term(ONE, 7)}, "the count of term kl is a int"),  # type: ignore[arg-type]
        ({"loss": Term(ONE, ONE)}, "term 'loss' has no name of its own in the log"),
        ({"step": Term(ONE, ONE)}, "term 'step' has no name"),
        ({"a b": Term(ONE, ONE)}, "term 'a b' has no name"),
        ({7: Term(ONE, ONE)}, "term 7 has no name"),
    ],
)
def test_what_is_no_term_is_named(terms: Any, complaint: str) -> None:
    step, found = custom_step(Gives(terms))
    with pytest.raises(RunError, match=complaint):
        step.gradients([batch_of(found)])


def test_names_in_the_log_are_those_that_no_term_may_have() -> None:
    assert {*train.COUNTED, "loss", CE} == set(LOGGED)
    assert {field.name for field in fields(train.Progress)} >= set(train.COUNTED)


def test_needs_are_of_the_values_there_are() -> None:
    for wrong in ({"pairing": "nowhere"}, {"bytes": "pth"}, {"text": "techer"}, {"hidden": "yes"}):
        ((name, value),) = wrong.items()
        with pytest.raises(UserError, match=rf"Needs\({name}='{value}'\)\. it is one of "):
            Needs(**wrong)  # type: ignore[arg-type]
    assert Needs(bytes=None, prepare=None) == Needs()


def test_a_loss_that_is_not_finite_is_refused() -> None:
    step, found = custom_step(Plain())
    with torch.no_grad():
        step.network.model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(RunError, match="loss is not finite"):
        step.gradients([batch_of(found)])


def test_an_idle_process_adds_nothing() -> None:
    step, found = custom_step(Plain())
    report = step.gradients([batch_of(found)], idle=True)
    assert report.loss == 0
    assert all(not p.grad.any() for p in step.network.parameters() if p.grad is not None)


class Largest(Plain):
    """Asks for every token's largest logit of the batch."""

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logits=True, prepare="batch", reduce="max")

    def prepare(self, teacher: Rows) -> torch.Tensor:
        return teacher.scores().float().amax(0)


def test_what_an_idle_process_borrowed_is_in_no_maximum() -> None:
    """On-policy the owner trains on other text than the one that was borrowed."""
    step, found = custom_step(Largest())
    largest = [step._views(batch_of(found), idle=idle)[0] for idle in (False, True)]
    for view in largest:
        view.load_states()
    assert largest[0].prepare().isfinite().all()
    assert (largest[1].prepare() == -torch.inf).all()


def test_a_first_token_without_bos_shifts_no_pair() -> None:
    """The k-th tokens are paired where both are predicted, whichever side lacks the BOS."""
    sides = {"student": llama_side("student"), "teacher": llama_side("teacher")}
    bare = replace(sides["teacher"], specials=replace(sides["teacher"].specials, bos=None))
    batch = batch_of(examples(sides["student"], sides["teacher"], count=1))
    without = batch_of(examples(sides["student"], bare, count=1))
    expected = [
        (int(batch.student.token[s]), int(batch.teacher.token[t]))
        for s, t in position_pairs(batch, False)
    ]
    assert [
        (int(without.student.token[s]), int(without.teacher.token[t]))
        for s, t in position_pairs(without, False)
    ] == expected[1:]
