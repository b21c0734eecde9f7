"""Evaluation of models in memory, checked against plain transformers and against lm-eval itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.tasks import TaskManager
from tiny_models import TEXTS, bpe_tokenizer, byte_tokenizer, recurrent_model, tiny_model
from transformers import GenerationConfig

from ctdbench.errors import PreflightError, RunError, UserError
from ctdbench.evaluate import EvaluationRequest, check_tasks, evaluate, outcomes
from ctdbench.evaluate.language_model import SHARED_CONTEXT, PinnedLM, undisturbed
from ctdbench.evaluate.task_files import task_configs, task_dir
from ctdbench.text.token_bytes import TokenBytes

TOKENIZER = bpe_tokenizer()
MODEL = tiny_model(TOKENIZER)


def request(tasks: Sequence[str], **options: Any) -> EvaluationRequest:
    defaults = {"student": MODEL, "tokenizer": TOKENIZER, "heldout": TEXTS}
    return EvaluationRequest(tasks=tasks, **{**defaults, **options})


def bits(model: Any, ids: Sequence[int], scored: int, columns: int) -> float:
    """-log2 likelihood of the last `scored` tokens, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1, :columns].double()
    logp = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return -float(logp[-scored:].sum()) / math.log(2)


class TestBitsPerByte:
    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_document_is_conditioned_on_one_bos(self, adds_bos: bool) -> None:
        tokenizer = bpe_tokenizer(adds_bos=adds_bos)
        evaluation = evaluate(request(["bpb_heldout"], tokenizer=tokenizer))
        ids = [TokenBytes(tokenizer).encode(text).ids.tolist() for text in TEXTS]
        sizes = [len(text.encode()) for text in TEXTS]
        expected = [bits(MODEL, [0, *row], len(row), len(tokenizer)) for row in ids]
        rows = evaluation.samples["bpb_heldout"]
        measured = [row["bpb"] * row["weight"] for row in rows]
        assert measured == pytest.approx(expected, rel=1e-4)
        assert [row["weight"] for row in rows] == sizes
        assert evaluation.scores["bpb_heldout"]["bpb"] == pytest.approx(
            sum(expected) / sum(sizes), rel=1e-4
        )

    def test_without_bos_a_document_is_conditioned_on_eos(self) -> None:
        tokenizer = bpe_tokenizer(bos=False)
        evaluation = evaluate(request(["bpb_heldout"], tokenizer=tokenizer, heldout=TEXTS[:1]))
        ids = TokenBytes(tokenizer).encode(TEXTS[0]).ids.tolist()
        expected = bits(MODEL, [1, *ids], len(ids), len(tokenizer)) / len(TEXTS[0].encode())
        assert evaluation.scores["bpb_heldout"]["bpb"] == pytest.approx(expected, rel=1e-4)
        assert evaluation.settings["bos"] == "none"

    def test_document_longer_than_the_context(self) -> None:
        short = tiny_model(TOKENIZER, max_position_embeddings=64)
        evaluation = evaluate(request(["bpb_heldout"], student=short, heldout=["fox " * 200]))
        assert math.isfinite(evaluation.scores["bpb_heldout"]["bpb"])

    def test_gold_answer_given_the_question(self) -> None:
        evaluation = evaluate(request(["arithmetic_word"], limit=1))
        items = task_dir() / "arithmetic_word.jsonl"
        item = json.loads(items.read_text().splitlines()[0])
        encode = TokenBytes(TOKENIZER).encode
        question, answer = f"Question: {item['question']}\nAnswer:", f" {item['answer']}"
        context = len(encode(question).ids)
        ids = encode(question + answer).ids.tolist()
        expected = bits(MODEL, [0, *ids], len(ids) - context, len(TOKENIZER)) / len(answer.encode())
        assert evaluation.scores["arithmetic_word"]["bpb"] == pytest.approx(expected, rel=1e-4)

    def test_no_logits_of_the_context_exist(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = PinnedLM(MODEL, TOKENIZER, batch_size=2)
        shapes = []
        head = MODEL.lm_head.forward
        monkeypatch.setattr(
            MODEL.lm_head,
            "forward",
            lambda hidden: (shapes.append(hidden.shape[1]), head(hidden))[1],
        )
        context, short, long = list(range(2, 200)), [5, 6, 7], [9, 8, 7, 6, 5]
        requests = [("", context, short), ("", context, long), ("", [3], [4])]
        scores = model._loglikelihood_tokens(requests, disable_tqdm=True)
        assert shapes == [1, 5, 1]  # the context read once, its continuations, the third request
        expected = [bits(MODEL, c + t, len(t), len(TOKENIZER)) for _, c, t in requests]
        assert [-nats / math.log(2) for nats, _ in scores] == pytest.approx(expected, rel=1e-4)

    def test_a_model_that_keeps_all_logits_scores_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forward = MODEL.forward

        def deaf(*inputs: Any, logits_to_keep: int = 0, **options: Any) -> Any:
            return forward(*inputs, **options)

        model = PinnedLM(MODEL, TOKENIZER, batch_size=2)
        requests = [
            ("", [3, 8, 5], [4]),
            ("", [7, 2], [6]),
        ]  # 3 logits of a row, and 2 are asked for
        before = model._loglikelihood_tokens(requests, disable_tqdm=True)
        monkeypatch.setattr(MODEL, "forward", deaf)
        after = model._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [nats for nats, _ in after] == pytest.approx([nats for nats, _ in before])

    @pytest.mark.parametrize("kind", ["Mamba", "FalconH1", "Lfm2"])
    def test_recurrent_layers_read_a_context_of_many_choices(self, kind: str) -> None:
        """Their state cannot be repeated for every choice, as keys and values can."""
        model, context = recurrent_model(kind, TOKENIZER), (TEXTS[0] * 3).strip()
        scorer = PinnedLM(model, TOKENIZER, batch_size=2)
        chosen = [" yes", " no, not at all"]
        asked = [Instance("loglikelihood", {}, (context, text), 0) for text in chosen]
        with undisturbed(model, TOKENIZER):
            found = scorer.loglikelihood(asked, disable_tqdm=True)
        before = scorer.tok_encode(context)
        assert len(before) > SHARED_CONTEXT
        for (nats, _), text in zip(found, chosen, strict=True):
            ids = TOKENIZER(text)["input_ids"]
            expected = bits(model, before + ids, len(ids), len(TOKENIZER))
            assert -nats / math.log(2) == pytest.approx(expected, rel=1e-4)

    def test_nothing_to_score_is_said(self) -> None:
        model = PinnedLM(MODEL, TOKENIZER, batch_size=2)
        with pytest.raises(RunError, match="no token"):
            model._loglikelihood_tokens([("", [3], [])])

    def test_bfloat16_keeps_the_softmax_in_float32(self) -> None:
        full, half = (
            evaluate(request(["bpb_heldout"], precision=precision)).scores["bpb_heldout"]["bpb"]
            for precision in ("float32", "bfloat16")
        )
        assert half != full
        assert half == pytest.approx(full, rel=0.02)


class TestGroups:
    @pytest.fixture
    def data_dir(self, tmp_path: Path) -> Path:
        folder = tmp_path
        (folder / "agieval_zh").mkdir()
        names = [member["task"] for member in task_configs()["agi_zh"]["task"]]
        for number, name in enumerate(names):
            rows = [
                {
                    "passage": None,
                    "question": f"{name}第{item}题",
                    "options": ["(A)甲", "(B)乙乙", "(C)丙丁", "(D)都不对"],
                    "label": ["A", "C"] if name == "jec-qa-kd" else "ABCD"[(item * 7 + number) % 4],
                }
                for item in range(3 + number)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "agieval_zh" / f"{name}.jsonl").write_text(lines)
        return folder

    def test_macro_average_is_that_of_lm_eval(self, data_dir: Path) -> None:
        evaluation = evaluate(request(["agi_zh"], data_dir=data_dir))
        manager = TaskManager(
            include_path=str(task_dir()),
            include_defaults=False,
            metadata={"data_dir": str(data_dir)},
        )
        model = PinnedLM(MODEL, TOKENIZER, batch_size=8)
        theirs = run_lm_eval(model, manager.load(["agi_zh"]), bootstrap_iters=10)["groups"][
            "agi_zh"
        ]
        for metric in ("acc", "acc_norm", "acc_bytes", "bpb"):
            assert evaluation.scores["agi_zh"][metric] == pytest.approx(theirs[f"{metric},none"])
            expected = theirs[f"{metric}_stderr,none"]
            assert evaluation.stderr["agi_zh"][metric] == pytest.approx(expected)

    def test_limit_is_split_over_the_subsets(self, data_dir: Path) -> None:
        evaluation = evaluate(request(["agi_zh"], data_dir=data_dir, limit=15))
        rows = evaluation.samples["agi_zh"]
        assert len(rows) == 20
        assert sum(row["weight"] for row in rows) == pytest.approx(1)
        assert len({row["id"] for row in rows}) == 20
        assert evaluation.settings["tasks"]["agi_zh"]["limit_per_subset"] == 2
        assert evaluation.settings["tasks"]["agi_zh"]["data"] == "data-dir"

    def test_what_a_guesser_would_score_is_stored(self, data_dir: Path) -> None:
        evaluation = evaluate(request(["agi_zh", "arithmetic_word"], data_dir=data_dir, limit=10))
        chances = {row["subset"]: row["chance"] for row in evaluation.samples["agi_zh"]}
        assert chances == {name: 0.5 if name == "jec-qa-kd" else 0.25 for name in chances}
        assert "chance" not in evaluation.scores["agi_zh"]
        assert not any("chance" in row for row in evaluation.samples["arithmetic_word"])


class TestOutcomes:
    def test_every_score_is_the_mean_of_its_rows(self) -> None:
        tasks = ["everyday_physics", "bpb_pydoc"]
        evaluation = evaluate(request(tasks, limit=6))
        assert set(evaluation.scores) == set(evaluation.samples) == set(tasks)
        for task, metrics in evaluation.scores.items():
            rows = evaluation.samples[task]
            assert len(rows) == 6
            for metric, value in metrics.items():
                total = sum(row["weight"] for row in rows)
                mean = sum(row["weight"] * row[metric] for row in rows) / total
                assert value == pytest.approx(mean)
                assert evaluation.stderr[task][metric] >= 0

    def test_two_models_are_paired_by_id(self) -> None:
        other = evaluate(request(["everyday_physics"], student=tiny_model(TOKENIZER, 1), limit=6))
        own = evaluate(request(["everyday_physics"], limit=6))
        ids = [[row["id"] for row in e.samples["everyday_physics"]] for e in (own, other)]
        assert ids[0] == ids[1]
        assert own.settings["tasks"] == other.settings["tasks"]
        assert own.scores != other.scores

    def test_score_does_not_depend_on_other_tasks(self) -> None:
        alone = evaluate(request(["everyday_physics"], limit=5))
        beside = evaluate(request(["bpb_heldout", "arithmetic_word", "everyday_physics"], limit=5))
        assert beside.samples["everyday_physics"] == alone.samples["everyday_physics"]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-5, 5), min_size=2, max_size=20))
    def test_standard_error_of_equal_weights(self, values: list[float]) -> None:
        rows = [{"id": str(i), "weight": 3.0, "x": value} for i, value in enumerate(values)]
        expected = float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))
        assert outcomes.standard_error(rows, "x") == pytest.approx(expected, abs=1e-9)
        assert outcomes.standard_error(rows[:1], "x") is None


class TestGeneration:
    def instances(self, texts: Sequence[str], **options: Any) -> list[Instance]:
        kwargs = {"until": ["\n\n"], "do_sample": False, "temperature": 0.0, **options}
        return [
            Instance("generate_until", {}, (text, dict(kwargs)), 0, metadata=("t", i, 1))
            for i, text in enumerate(texts)
        ]

    def test_padding_does_not_change_what_is_generated(self) -> None:
        contexts = ["The fox", "The quick brown fox jumps over the", "42 + 17 ="]
        outputs = []
        for size in (1, 3):
            with undisturbed(MODEL, TOKENIZER):
                model = PinnedLM(MODEL, TOKENIZER, batch_size=size)
                outputs.append(model.generate_until(self.instances(contexts, max_gen_toks=12)))
        assert outputs[0] == outputs[1]

    def test_own_generation_settings_are_set_aside_and_restored(self) -> None:
        model = tiny_model(TOKENIZER)
        plain = evaluate(request(["arithmetic_word"], student=model, limit=3))
        disturbed = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0)
        disturbed.eos_token_id = 77
        model.generation_config = disturbed
        model.train()
        again = evaluate(request(["arithmetic_word"], student=model, limit=3))
        assert again.samples == plain.samples
        assert all(row["output"] for row in plain.samples["arithmetic_word"])
        assert model.generation_config is disturbed
        assert model.training

    def test_budget_is_worth_the_same_bytes(self) -> None:
        tokenizer = byte_tokenizer()
        model = PinnedLM(tiny_model(tokenizer), tokenizer, batch_size=2)
        scale = model._budget_scale(["The fox", "ß"])
        assert scale == pytest.approx(4)
        (instance,) = model_requests = self.instances(["The fox"], max_gen_toks=20)
        assert model._with_budget(instance, scale).args[1]["max_gen_toks"] == 80
        assert model_requests[0].args[1]["max_gen_toks"] == 20

    def test_special_tokens_in_a_text_are_text(self) -> None:
        model = PinnedLM(MODEL, TOKENIZER, batch_size=1)
        ids = model.tok_encode("a<eos>b", add_special_tokens=False)
        assert 1 not in ids
        assert model.tok_encode("a<eos>b") == [0, *ids]
        assert model.tok_encode("a<eos>b", left_truncate_len=3) == [0, *ids[-2:]]

    def test_the_tokenizer_is_left_as_it_was(self) -> None:
        tokenizer = bpe_tokenizer()
        PinnedLM(MODEL, tokenizer, batch_size=1)
        assert tokenizer.pad_token is None


class TestRequests:
    @pytest.mark.parametrize(
        ("task", "options", "said"),
        [
            ("bpb_heldout", {"heldout": []}, "held-out"),
            ("teacher_jsd", {}, "needs a teacher"),
            ("teacher_jsd", {"heldout": [], "teachers": [(MODEL, TOKENIZER)]}, "held-out"),
            ("bpb_pydok", {}, "did you mean bpb_pydoc"),
            ("bpb_pydoc", {"limit": 0}, "limit 0"),
        ],
    )
    def test_what_cannot_be_served_is_said(
        self, task: str, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UserError, match=said):
            evaluate(replace(request([task]), **options))

    def test_versions_and_settings_are_recorded(self) -> None:
        evaluation = evaluate(request(["bpb_pydoc", "bpb_pydoc"], limit=1))
        assert {"python", "lm-eval", "torch", "transformers"} <= set(evaluation.versions)
        assert evaluation.versions["task:bpb_pydoc"] == "1.0"
        assert evaluation.settings["bos"] == "<bos> before every context"
        assert evaluation.settings["batch_size"] == 8
        assert len(evaluation.settings["tasks"]["bpb_pydoc"]["documents"]) == 16
        json.dumps([evaluation.settings, evaluation.samples])

    def test_a_stranger_s_task_file_runs(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"q": "2+2=", "a": "4"}\n{"q": "3+3=", "a": "6"}\n')
        (tmp_path / "sums.yaml").write_text(
            "task: sums\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\n"
            "doc_to_target: '{{a}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
            "filter_list:\n"
            "  - {name: first, filter: [{function: take_first}]}\n"
            "  - {name: same, filter: [{function: take_first}]}\n"
        )
        evaluation = evaluate(request(["sums"], extra_tasks=[tmp_path / "sums.yaml"]))
        assert set(evaluation.scores["sums"]) == {"exact_match,first", "exact_match,same"}
        assert len(evaluation.samples["sums"]) == 2

    def test_data_set_out_of_reach(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import huggingface_hub
        from huggingface_hub import constants

        def unreachable(self: Any, *_: Any, **__: Any) -> None:
            raise ConnectionError("no route")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
        monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
        with pytest.raises(PreflightError, match="baber/piqa") as caught:
            check_tasks(["piqa"])
        assert caught.value.exit_code == 3
        (tmp_path / "datasets--baber--piqa" / "snapshots").mkdir(parents=True)
        check_tasks(["piqa"])

    def test_listing_and_checking_import_nothing_heavy(self) -> None:
        code = (
            "import sys\nfrom ctdbench.evaluate import available_tasks, check_tasks\n"
            "available_tasks(); check_tasks(['bpb_pydoc', 'everyday_physics'])\n"
            "print([m for m in ('torch', 'lm_eval', 'datasets', 'pandas', 'transformers')"
            " if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"
