"""A new tokenizer for a model: its embeddings and head from the old ones, and the old ones beside.

Tables start by Fast Vocabulary Transfer (Gee et al., EMNLP 2022 industry track), or from the tokens
that begin alike. A student of bytes may also keep the old embeddings: at every byte that of the
longest old token that ends there is added (arXiv 2503.20083, "Adjustments for Transfer to Bytes").
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ctdbench.distill.tokenizers import Specials
from ctdbench.errors import UserError
from ctdbench.text.projection import cut_tokens, encoder
from ctdbench.text.token_bytes import TokenBytes
from ctdbench.text.vocabulary import ByteTrie, emitted, ids_by_bytes

Start = Literal["fvt", "first_byte"]
NO_BYTE = 0  # code of a special, and of what stands before the first token; byte b has code b + 1
CODES = 257


def transplant(
    model: Any,
    old_tokenizer: Any,
    new_tokenizer: Any,
    *,
    start: Start = "fvt",
    add_subwords: bool = False,
) -> None:
    """Give the model another tokenizer, in place.

    Embeddings and, where untied, the head follow the same rule (`transfer_sources`). add_subwords:
    attach `LongestSubwords`; raises UserError if the new tokenizer has tokens of several bytes.
    """
    sources = transfer_sources(old_tokenizer, new_tokenizer, start)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if add_subwords:
        old, new = (TokenBytes(own).vocabulary for own in (old_tokenizer, new_tokenizer))
        _attach(model, LongestSubwords(embeddings, old, new))
    tied = head.weight is embeddings.weight
    # The modules stay, with new tables: some scale or cap what they give (Gemma's embeddings).
    embeddings.weight = nn.Parameter(_averages(embeddings.weight.detach(), sources))
    embeddings.num_embeddings, embeddings.padding_idx = len(sources), None
    old_head = head.weight.detach()
    head.weight = embeddings.weight if tied else nn.Parameter(_averages(old_head, sources))
    head.out_features = len(sources)
    if head.bias is not None:
        head.bias = nn.Parameter(_averages(head.bias.detach()[:, None], sources)[:, 0])
    roles = Specials.of(new_tokenizer)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = roles.bos, roles.eos
        config.pad_token_id = roles.pad
    model.config.vocab_size = len(sources)


# --- where a new token's embedding comes from ----------------------------------------------------


def transfer_sources(
    old_tokenizer: Any, new_tokenizer: Any, start: Start = "fvt"
) -> list[list[int]]:
    """For every new id the old ids whose embeddings it starts from; empty: the mean of all.

    fvt: a token that exists byte for byte copies; another one takes its old tokenization.
    first_byte: all old tokens that begin with the token's bytes, the token itself among them; where
    there is none, as fvt. Specials map by role. A new id that is never emitted, since another has
    its bytes (SentencePiece's <0x37> beside 7), starts from the mean of all: a copy in the head
    would take half of the probability of the one that is.
    """
    old, new = TokenBytes(old_tokenizer), TokenBytes(new_tokenizer)
    vocabulary = emitted(new.vocabulary)
    known = ids_by_bytes(old.vocabulary)
    alike = _Beginnings(known) if start == "first_byte" else None
    roles = Specials.of(new_tokenizer).pairs(Specials.of(old_tokenizer))
    by_role = dict(reversed(roles))  # where one token has two roles, its first one holds
    sources: list[list[int]] = []
    uncut = []
    for index, token in enumerate(vocabulary):
        if not token:
            sources.append([by_role[index]] if index in by_role else [])
        elif alike is not None and (found := alike.of(token)):
            sources.append(found)
        elif token in known:
            sources.append([known[token]])
        else:
            uncut.append(index)
            sources.append([])
    cuts = _old_tokenizations(old, [vocabulary[index] for index in uncut])
    for index, cut in zip(uncut, cuts, strict=True):
        sources[index] = cut
    return sources


class _Beginnings:
    """The tokens that begin with given bytes: an interval of the sorted vocabulary."""

    def __init__(self, known: dict[bytes, int]) -> None:
        self.trie = ByteTrie(list(known))
        self.ids = np.array(list(known.values()))[self.trie.order]

    def of(self, token: bytes) -> list[int]:
        low, high = self.trie.interval(token)
        return [int(index) for index in self.ids[low:high]]


def _old_tokenizations(old: TokenBytes, tokens: Sequence[bytes]) -> list[list[int]]:
    """The old ids that spell each token as they would within a text; none where nothing does."""
    longest = max(map(len, tokens), default=0)
    cuts = cut_tokens(tokens, old.vocabulary, encoder(old), longest)
    return [row[row >= 0].tolist() for row in cuts]


def _averages(table: Tensor, sources: list[list[int]]) -> Tensor:
    """[len(sources), d]: the mean of the named rows of `table` [V, d], or of all rows."""
    flat = torch.tensor([index for ids in sources for index in ids], dtype=torch.long)
    lengths = torch.tensor([len(ids) for ids in sources])
    means = nn.functional.embedding_bag(flat, table, lengths.cumsum(0) - lengths, mode="mean")
    return torch.where((lengths > 0)[:, None], means, table.mean(dim=0))


# --- the longest sub-word that ends at a byte ----------------------------------------------------


class LongestSubwords(nn.Module):
    """What a byte's embedding gets on top: that of the longest old token that ends at the byte.

    The old table stays as it was: it is a buffer, neither trained nor saved (the public code,
    bminixhofer/tokenkit, freezes it too). Unlike there, tokens of any length count, by all of their
    bytes, and specials, which end what can be a token, get nothing on top.
    """

    codes: Tensor  # [new V] what stands in place of an id: its byte + 1, or NO_BYTE
    edges: Tensor  # [E] sorted keys, of a node of the trie and the byte that leads on from it
    token: Tensor  # [E + 1] of every node the id of the old token that it spells, or -1

    def __init__(self, embeddings: Any, old: Sequence[bytes], new: Sequence[bytes]) -> None:
        """embeddings: the old module, copied; old, new: both vocabularies as bytes, b"": special.

        Raises UserError if a new token has more than one byte.
        """
        super().__init__()
        if any(len(token) > 1 for token in new):
            raise UserError(
                "student.add_subwords: the tokenizer has tokens of several bytes",
                "use tokenizer: bytes:256",
            )
        self.table = copy.deepcopy(embeddings)  # with what it does beside looking up
        del self.table.weight
        self.table.register_buffer("weight", embeddings.weight.detach(), persistent=False)
        known = ids_by_bytes(old)
        backwards = ByteTrie([token[::-1] for token in known])
        self.reach = int(backwards.depth.max())  # bytes of the longest token
        ids = np.array(list(known.values()))[backwards.order]
        ends = backwards.exact > backwards.low  # nodes that are a whole token, read backwards
        token = np.where(ends, ids[np.minimum(backwards.low, len(ids) - 1)], -1)
        codes = [token[0] + 1 if token else NO_BYTE for token in new]
        # Nodes are numbered breadth first and by byte, so edge k, which leads to node k + 1, is in
        # the order of its key already.
        edges = backwards.parent[1:] * CODES + backwards.byte[1:] + 1
        for name, values in {"codes": codes, "edges": edges, "token": token}.items():
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.long), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L, d] for ids [B, L]; zero where no old token ends."""
        found = self.longest(ids)
        added: Tensor = self.table(found.clamp(min=0))
        return added * (found >= 0)[..., None]

    def longest(self, ids: Tensor) -> Tensor:
        """The id of the longest old token whose bytes end at each of ids [B, L], else -1: [B, L].

        All positions walk down the trie of reversed tokens together, one byte back at a time; those
        that no token continues to drop out.
        """
        codes = nn.functional.pad(self.codes[ids], (1, 0), value=NO_BYTE)
        place = torch.arange(codes.numel(), device=ids.device).view_as(codes)[:, 1:].flatten()
        codes, active = codes.flatten(), torch.arange(ids.numel(), device=ids.device)
        node, found = torch.zeros_like(active), torch.full_like(active, -1)
        for _ in range(self.reach):
            key = node * CODES + codes[place]
            edge = torch.searchsorted(self.edges, key).clamp(max=len(self.edges) - 1)
            goes_on = self.edges[edge] == key
            active, node, place = active[goes_on], edge[goes_on] + 1, place[goes_on] - 1
            if len(active) == 0:
                break
            found[active] = torch.where(self.token[node] >= 0, self.token[node], found[active])
        return found.view_as(ids)


def has_subwords(model: Any) -> bool:
    """Whether `LongestSubwords` is attached to this transformers model."""
    return hasattr(model.get_decoder(), "subwords")


def _attach(model: Any, subwords: LongestSubwords) -> None:
    """Let the body read ids through both tables. The embedding module, and with it a tied head,
    stays as it is."""
    body = model.get_decoder()
    body.subwords = subwords
    body.register_forward_pre_hook(_embed, with_kwargs=True)


def _embed(
    body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn the body's `input_ids` into `inputs_embeds`.

    Under a key-value cache only the newest ids come in. The bytes before them travel in the cache
    itself, as one layer more, so that whoever repeats, reorders or crops it does so to them.
    """
    from transformers import DynamicCache

    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if args or ids is None or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        raise TypeError("a model with sub-words reads input_ids in their order, nothing else")
    cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if cache is None and (body.config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=body.config)
    read = ids if cache is None else _remember(cache, ids, body.config.num_hidden_layers)
    window = read[:, -(ids.shape[1] + body.subwords.reach - 1) :]
    embeds = body.get_input_embeddings()(ids) + body.subwords(window)[:, -ids.shape[1] :]
    changed = {"input_ids": None, "inputs_embeds": embeds, "past_key_values": cache}
    return args, {**kwargs, **changed}


def _remember(cache: Any, ids: Tensor, layer: int) -> Tensor:
    """All ids that the cache has read, [B, past + L]; `ids` [B, L] are the newest of them."""
    from transformers.cache_utils import DynamicLayer

    before = cache.get_seq_length()
    if cache.layer_class_to_replicate is None and len(cache.layers) == layer:
        cache.layers.append(DynamicLayer())
    states = ids[:, None, :, None]  # as keys of one head with one channel
    read: Tensor = cache.update(states, states, layer)[0][:, 0, :, 0]
    if read.shape[1] != before + ids.shape[1]:
        raise TypeError("this cache was not filled by the model with sub-words")
    return read
