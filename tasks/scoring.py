"""Metrics of one item from what the model returned for it; lm-eval calls these per item.

Every task has a continuous form: `bpb`, the bits that the model spends on each UTF-8 byte of the
gold answer given the question, -log2 p(answer | question) / bytes(answer). It moves long before a
small model leaves chance level, and no tokenizer can bend it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

Row = dict[str, Any]
LogLikelihood = tuple[float, bool]  # nats, and whether greedy decoding would yield the text
DELIMITER = " "  # lm-eval's target_delimiter: part of the scored continuation
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
INVALID = "[invalid]"


def bits_per_byte(nats: float, text: str) -> float:
    """Bits per UTF-8 byte of a text with log-likelihood `nats`."""
    return -nats / math.log(2) / max(len(text.encode()), 1)


def two_choices(row: Row, results: Sequence[LogLikelihood]) -> dict[str, float]:
    """Metrics of a PIQA-like row: `sol1`, `sol2`, `label`."""
    return choice_metrics([row["sol1"], row["sol2"]], [int(row["label"])], results)


def agieval(row: Row, results: Sequence[LogLikelihood]) -> dict[str, float]:
    """Metrics of an AGIEval row: `choices`, `gold`; any of several gold letters counts as right."""
    return choice_metrics(row["choices"], row["gold"], results)


def choice_metrics(
    choices: Sequence[str], gold: Sequence[int], results: Sequence[LogLikelihood]
) -> dict[str, float]:
    """Accuracy of the most likely choice, and `bpb` over all gold choices together.

    acc: by log-likelihood. acc_norm: per character, as lm-eval does it. acc_bytes: per UTF-8 byte,
    the one to compare across tokenizers and scripts.
    """
    nats = [result[0] for result in results]
    answers = [DELIMITER + choices[index] for index in gold]
    return {
        "acc": _hit(nats, lambda _: 1, choices, gold),
        "acc_norm": _hit(nats, len, choices, gold),
        "acc_bytes": _hit(nats, lambda text: len(text.encode()), choices, gold),
        "bpb": bits_per_byte(sum(nats[index] for index in gold), "".join(answers)),
    }


def _hit(
    nats: Sequence[float], length: Callable[[str], int], choices: Sequence[str], gold: Sequence[int]
) -> float:
    scores = [value / max(length(text), 1) for value, text in zip(nats, choices, strict=True)]
    return float(scores.index(max(scores)) in gold)


def final_number(row: Row, results: Sequence[Any]) -> dict[str, float]:
    """Metrics of a GSM8K row (`answer` ends in "#### number") from text and log-likelihood."""
    generated, (nats, _) = results
    bits = bits_per_byte(nats, DELIMITER + row["answer"])
    return {**number_metrics(generated, row["answer"]), "bpb": bits}


def gold_answers(row: Row) -> list[str]:
    """GSM8K's `answer`; of AGIEval the choices that are right."""
    return [row["answer"]] if "answer" in row else [row["choices"][index] for index in row["gold"]]


def gold_bits(row: Row, results: Sequence[LogLikelihood]) -> dict[str, float]:
    """`bpb` over all of a row's gold answers together."""
    scored = "".join(DELIMITER + answer for answer in gold_answers(row))
    return {"bpb": bits_per_byte(sum(nats for nats, _ in results), scored)}


def document(row: Row, results: Sequence[float]) -> dict[str, float]:
    """Metrics of a whole document (`text`) from its rolling log-likelihood."""
    return {"bpb": bits_per_byte(results[0], row["text"])}


def number_metrics(generated: str, gold: str) -> dict[str, float]:
    """Exact match of the final number as in lm-eval's gsm8k: after "####", or the last at all."""
    target = _normalised(gold)
    strict = STRICT.search(generated)
    numbers = FLEXIBLE.findall(generated)
    return {
        "exact_match": float(_normalised(strict[1] if strict else INVALID) == target),
        "exact_match_flexible": float(_normalised(numbers[-1] if numbers else INVALID) == target),
    }


def _normalised(number: str) -> str:
    for ignored in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        number = re.sub(ignored, "", number)
    return number.lower()


class GenerateAndScore(ConfigurableTask):
    """Two requests an item: generate after the few-shot prompt, and score the gold answer.

    The gold answer is scored after the question alone, so `bpb` does not depend on the examples.
    The task file's `process_results` gets the text and the log-likelihood.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: Row, ctx: str, **kwargs: Any) -> list[Instance]:
        """lm-eval's instances of one item: a generation, and a log-likelihood."""
        metadata = kwargs["metadata"]
        scored = (self.doc_to_text(doc), DELIMITER + self.doc_to_target(doc))
        generation = (ctx, dict(self.config.generation_kwargs))
        return [
            Instance("generate_until", doc, generation, 0, metadata=metadata),
            Instance("loglikelihood", doc, scored, 1, metadata=metadata),
        ]
