"""Models over one vocabulary, averaged token by token: an ensemble is a model that is evaluated.

Models that were moved to one tokenizer predict the same tokens, so their predictions can be
averaged (Minixhofer et al., arXiv 2503.20083, "Ensembling"). At every position
    probabilities      log (1/n * sum_i p_i)      the arithmetic mean
    log-probabilities  1/n * sum_i log p_i - log Z    the geometric mean, normalised
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ctdbench.distill.growing_cache import is_attention
from ctdbench.errors import UserError

Average = Literal["probabilities", "log-probabilities"]
LENGTH = "max_position_embeddings"


class Ensemble(PreTrainedModel, GenerationMixin):
    """A causal model whose logits are the averaged log-probabilities of its members, [B, L, V].

    V is the number of ids of the tokenizer; what members have beyond it is cut.
    """

    config_class = PreTrainedConfig

    def __init__(
        self, members: Sequence[Any], vocabulary: int, average: Average = "probabilities"
    ) -> None:
        first = members[0].config.get_text_config()
        config = PreTrainedConfig(bos_token_id=first.bos_token_id, eos_token_id=first.eos_token_id)
        config.vocab_size = vocabulary
        lengths = [getattr(m.config.get_text_config(), LENGTH, None) for m in members]
        if known := [length for length in lengths if length is not None]:
            config.max_position_embeddings = min(known)
        super().__init__(config)
        self.members = nn.ModuleList(members)
        self.average = average
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemberCaches | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """As of any causal model; float32."""
        cache = past_key_values
        if cache is None and use_cache:
            cache = MemberCaches(self.members)
        logs = []
        for index, member in enumerate(self.members):
            logits = member(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache.parts[index] if cache is not None else None,
                use_cache=cache is not None,
                logits_to_keep=logits_to_keep,
            ).logits
            logs.append(logits[..., : self.config.vocab_size].float().log_softmax(-1))
        if cache is not None:
            cache.collect()
        return CausalLMOutputWithPast(logits=averaged(logs, self.average), past_key_values=cache)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` is to leave the cache to `forward`."""
        return False

    def get_output_embeddings(self) -> Any:
        """The first member's: all of them have a row for every id."""
        first: Any = self.members[0]
        return first.get_output_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Members were loaded as they are."""


def reads_on(model: Any) -> bool:
    """Whether a model, or all of an ensemble's, can go on from a cache, in several rows as well."""
    members = model.members if isinstance(model, Ensemble) else [model]
    return all(map(is_attention, members))


class MemberCaches(Cache):
    """The members' key-value caches; what is done to the rows of one is done to all of them."""

    def __init__(self, members: Iterable[Any]) -> None:
        super().__init__(layers=[])
        self.parts = [DynamicCache(config=member.config) for member in members]

    def collect(self) -> None:
        """See the layers of all members, also those that appeared meanwhile."""
        self.layers = [layer for part in self.parts for layer in part.layers]


def averaged(logs: list[Tensor], average: Average) -> Tensor:
    """The log-probabilities of the mean of normalised `logs`, [..., V] each."""
    if average == "probabilities":
        return torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))
    return torch.stack(logs).mean(dim=0).log_softmax(-1)


def require_one_vocabulary(tokenizers: Sequence[Any], names: Sequence[str]) -> None:
    """Raise UserError unless all have the same tokens under the same ids, and the same BOS."""
    (first, *others), (name, *other_names) = tokenizers, names
    for other, other_name in zip(others, other_names, strict=True):
        hint = "an ensemble takes models that were moved to one tokenizer"
        if other.get_vocab() != first.get_vocab():
            raise UserError(f"{name} and {other_name} differ in their vocabularies", hint)
        if other.bos_token_id != first.bos_token_id:
            raise UserError(f"{name} and {other_name} begin texts with other tokens", hint)
