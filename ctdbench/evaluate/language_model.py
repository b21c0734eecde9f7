"""lm-eval's view of a model in memory, with everything pinned that it leaves to the tokenizer.

The policy, the same for every model that is compared:
- the tokenizer's BOS stands in front of every context where it has one, and of nothing else that a
  tokenizer may add. (HFLM adds what the tokenizer's post-processor happens to add; with BOS added,
  its rolling log-likelihood scores a second BOS as if it were text.)
- a document scored from its start is conditioned on BOS, or on EOS where there is no BOS;
- text that spells a special token is text;
- log-softmax is in float32, over the columns that have a token;
- greedy decoding that ignores the model's own generation settings (a repetition penalty, the EOS of
  another tokenizer), for about as many *bytes* as the task file's tokens are worth at 4 bytes each;
- no chat template.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig

from ctdbench.distill.growing_cache import growing_cache
from ctdbench.errors import RunError
from ctdbench.evaluate.ensemble import reads_on

BYTES_PER_TOKEN = 4.0  # what `max_gen_toks` in a task file counts on
DEFAULT_GENERATED_TOKENS = 256
SHARED_CONTEXT = 128  # tokens from which reading a context once beats batching over items
Scored = tuple[list[int], int]  # tokens, and how many of the last ones are scored


class PinnedLM(HFLM):
    """An HFLM over a loaded causal model and its fast tokenizer; changes neither of them.

    bfloat16: run the forward passes under bf16 autocast (HFLM ignores an outer autocast).
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, bfloat16: bool = False
    ) -> None:
        tokenizer = copy.deepcopy(tokenizer)  # HFLM sets its padding
        backend = tokenizer.backend_tokenizer
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype=torch.bfloat16 if bfloat16 else None,
        )
        if self.tokenizer.pad_token_id >= model.get_output_embeddings().weight.shape[0]:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # masked, but it is looked up
        self._columns = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.max_gen_toks_given: int | None = None  # to the last answer generated

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """BOS and the tokens of the text; without BOS for `add_special_tokens=False`."""
        ids = self._backend.encode(string, add_special_tokens=False).ids
        bos = [] if add_special_tokens is False else self._bos
        if left_truncate_len is not None and len(bos) + len(ids) > left_truncate_len:
            ids = ids[len(ids) - left_truncate_len + len(bos) :]
        return bos + ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Contexts for generation, padded on the left: ids and attention mask, both [B, L]."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, length - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask[index, length - len(row) :] = 1
        return ids, mask

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole documents, in nats; the prefix token itself is not scored."""
        bos, self._bos = self._bos, []  # HFLM puts its prefix token in front by itself
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._bos = bos

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy generation, with a token budget that is worth the same number of bytes to all."""
        scale = self._budget_scale([request.args[0] for request in requests])
        return super().generate_until(
            [self._with_budget(request, scale) for request in requests], disable_tqdm=disable_tqdm
        )

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """HFLM's own over a cache that copies nothing; the same tokens."""
        return super()._model_generate(
            context, max_length, stop, **growing_cache(self.model), **options
        )

    def _budget_scale(self, contexts: Sequence[str]) -> float:
        total = sum(len(context.encode()) for context in contexts)
        tokens = sum(
            len(self.tok_encode(context, add_special_tokens=False)) for context in contexts
        )
        return max(1.0, BYTES_PER_TOKEN * tokens / max(total, 1))

    def _with_budget(self, request: Instance, scale: float) -> Instance:
        context, options = request.args
        tokens = math.ceil(scale * options.get("max_gen_toks", DEFAULT_GENERATED_TOKENS))
        self.max_gen_toks_given = max(1, min(tokens, self.max_length // 2))
        budget = {**options, "max_gen_toks": self.max_gen_toks_given}
        return dataclasses.replace(request, arguments=(context, budget))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(nats of the continuation, is it greedy) of (_, context, continuation), in order.

        Unlike HFLM's own, this reads a long context once for all continuations (the choices behind
        an exam's passage), and never has logits of a context.
        """
        rows = [
            (context + continuation, len(continuation)) for _, context, continuation in requests
        ]
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, _) in enumerate(requests):
            alike[tuple(context)].append(index)
        jobs, single = [], []
        shares = reads_on(self.model)
        for prefix, indices in alike.items():
            fits = max(len(rows[index][0]) for index in indices) <= self.max_length + 1
            if shares and len(indices) > 1 and len(prefix) >= SHARED_CONTEXT and fits:
                jobs.append((indices, len(prefix) - 1))
            else:
                single += indices
        single.sort(key=lambda index: (-len(rows[index][0]), rows[index], index))
        size = override_bs or self.batch_size
        jobs += [(single[at : at + size], 0) for at in range(0, len(single), size)]
        return self._run(jobs, rows, disable_tqdm)

    def _run(
        self, jobs: Sequence[tuple[list[int], int]], rows: Sequence[Scored], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        results = [(0.0, False)] * len(rows)
        with tqdm(total=len(rows), desc="Log-likelihoods", disable=disable_tqdm) as bar:
            for indices, shared in jobs:
                scores = self._score([rows[index] for index in indices], shared)
                for index, score in zip(indices, scores, strict=True):
                    results[index] = score
                bar.update(len(indices))
        return results

    @torch.no_grad()
    def _score(self, rows: Sequence[Scored], shared: int) -> list[tuple[float, bool]]:
        """Scores of every row's last tokens; the first `shared`, alike in all, are read once."""
        limit = self.max_length
        if any(not 0 < count <= limit for _, count in rows):
            raise RunError(f"a text to score has no token, or more than the context of {limit}")
        tokens = [
            torch.tensor(ids[-(limit + 1) :])[shared:] for ids, _ in rows
        ]  # cut from the left
        inputs = pad_sequence([ids[:-1] for ids in tokens], batch_first=True).to(self.device)
        begins = [len(ids) - 1 - count for ids, (_, count) in zip(tokens, rows, strict=True)]
        first, dtype = min(begins), self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            cache = self._read(rows[0][0][:shared], len(rows)) if shared else None
            keep = inputs.shape[1] - first
            logits = self.model(inputs, past_key_values=cache, logits_to_keep=keep).logits
        logits = logits[:, -keep:]  # some models take the argument and keep all
        results = []
        for row, ids, begin in zip(logits, tokens, begins, strict=True):
            target = ids[begin + 1 :].to(self.device)
            scored = row[begin - first :][: len(target), : self._columns].float().log_softmax(-1)
            nats = scored.gather(1, target[:, None]).sum()
            results.append((float(nats), bool((scored.argmax(-1) == target).all())))
        return results

    def _read(self, ids: list[int], copies: int) -> Any:
        """The key-value cache after these tokens, once for every row to come."""
        inputs = torch.tensor([ids], device=self.device)
        cache = self.model(inputs, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(copies)
        return cache


def greedy(tokenizer: Any) -> GenerationConfig:
    """The generation settings of every model that is compared."""
    return GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, do_sample=False
    )


@contextmanager
def undisturbed(model: Any, tokenizer: Any) -> Iterator[None]:
    """Evaluation mode and plain greedy decoding inside; the model's own settings again outside."""
    training, settings = model.training, getattr(model, "generation_config", None)
    model.eval()
    model.generation_config = greedy(tokenizer)
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = settings
