"""Random and scripted models that write, and their tokenizers with chat templates of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from tiny_models import bpe_tokenizer, tiny_model
from transformers import LlamaForCausalLM

from ctdbench.distill import rollouts
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.decoding import writing
from ctdbench.distill.models import Side, base_model
from ctdbench.distill.rollouts import Decoding, continued

SHORT = Decoding(max_new_tokens=8, batch_size=3)
GREEDY = replace(SHORT, temperature=0.0)
QUESTIONS = (
    "Why is the sky blue?",
    "What is 3 + 4?",
    "Tell a long story about the fox, the dog and 1234567 sheep in a small house at the river.",
    "我们应选择",
    "Who?",
)
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[Q]' + m['content'] + '[A]' }}{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] + eos_token }}{% else %}{{ raise_exception('unknown role') }}{% endif %}"
    "{% endfor %}"
)


def question(text: str, answer: str | None = None) -> Document:
    asked = Segment(text, "user", supervised=False)
    if answer is None:
        return Document((asked,), complete=False)
    return Document((asked, Segment(answer, "assistant")))


PROMPTS = tuple(map(question, QUESTIONS))


@lru_cache
def side(template: str | None = None, **options: Any) -> Side:
    """A random model; with a template it is a chat model whose turns have specials of their own."""
    own = bpe_tokenizer()
    if template is not None:
        own.add_tokens(["<|start|>", "<|end|>", "[Q]", "[A]"], special_tokens=True)
        own.chat_template = template
    return Side.of(tiny_model(own, **options).eval(), own)


def author(
    own: Side, decoding: Decoding = SHORT, template: Any = "plain", stream: str = "s"
) -> Any:
    return rollouts._Author(own, decoding, template, stream, "float32")


def tokens(own: Side, prompts: Sequence[Document], writer: Any) -> list[list[int]]:
    """What the model writes to these prompts in one batch."""
    openings = [writer._opening(asked) for asked in prompts]
    with writing(base_model(own.model), "float32") as model:
        return writer.written(model, openings, [asked.text for asked in prompts])


class Scripted(LlamaForCausalLM):
    """Says a script, token by token, whatever it is asked."""

    script: Sequence[int] = ()

    def forward(self, input_ids: Any = None, **settings: Any) -> Any:
        output = super().forward(input_ids=input_ids, **settings)
        if input_ids.shape[1] > 1:
            self.said = 0
        output.logits[:, -1] = (
            torch.nn.functional.one_hot(
                torch.tensor(self.script[min(self.said, len(self.script) - 1)]),
                output.logits.shape[-1],
            )
            * 100.0
        )
        self.said += 1
        return output


def scripted(own: Side, *script: str | bytes | int) -> Side:
    """The side with a model that says these texts, bytes and ids; the last token for ever."""
    ids: list[int] = []
    for part in script:
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, bytes):
            ids += [own.tokens.vocabulary.index(bytes([byte])) for byte in part]
        else:
            ids += own.tokens.encode(part).ids.tolist()
    model = Scripted(own.model.config).eval()
    model.script = ids
    return replace(own, model=model)


def eos(own: Side) -> int:
    assert own.specials.eos is not None
    return own.specials.eos


def said(own: Side, template: Any = "plain", decoding: Decoding = GREEDY) -> Document | None:
    return continued(own, [PROMPTS[0]], decoding, template=template, stream="s")[0]
