"""A new tokenizer in an old model: where its tables start, and sub-words added to bytes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_setup import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import both_heads, both_trainings, forward, small, train_a_little
from tiny_models import bpe_tokenizer, byte_tokenizer, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerFast
from wheel_tokenizers import real_documents, wheel_token_bytes, wheel_tokenizer

from ctdbench import registry
from ctdbench.distill import models, saving, tokenizers
from ctdbench.distill.models import Side
from ctdbench.distill.tokenizers import Specials
from ctdbench.distill.transplant import LongestSubwords, transfer_sources, transplant
from ctdbench.errors import UserError
from ctdbench.evaluate import divergence
from ctdbench.spec import Lora, ModelSpec
from ctdbench.text.token_bytes import TokenBytes
from ctdbench.text.vocabulary import ids_by_bytes

BOS, EOS, PAD = 256, 257, 258  # of the byte tokenizer
TEXT = "The quick brown fox jumps over the lazy dog, zwölf 我们 42."
few = settings(max_examples=40, deadline=None)


# --- Fast Vocabulary Transfer ---


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """BPE over characters with a dummy prefix and byte fallback; no token spells `fo`."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdefox"]
    merges = [("▁", "a"), ("b", "c")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "▁a", "bc"])}
    backend = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    backend.add_special_tokens([AddedToken(p, special=True) for p in pieces[:3]])
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@both_heads
def test_transplant_follows_the_rule_of_fvt(tied: bool) -> None:
    old, new = tokenizer("teacher"), tokenizer("student")
    model = tiny_model(old, tie_word_embeddings=tied)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [table.detach().clone() for table in tables]
    transplant(model, old, new)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (after[0] is after[1]) == tied
    known = {token: n for n, token in enumerate(TokenBytes(old).vocabulary) if token}
    roles = {new.bos_token_id: old.bos_token_id, new.eos_token_id: old.eos_token_id}
    copied = averaged = 0
    for index, token in enumerate(TokenBytes(new).vocabulary):
        if not token:
            sources = [roles[index]]
        elif token in known:
            sources = [known[token]]
            copied += 1
        else:
            sources = split_of(old, known, token)
            averaged += 1
        for table, start in zip(after, before, strict=True):
            torch.testing.assert_close(table[index], start[sources].mean(0))
    assert min(copied, averaged) > 20
    assert model.config.vocab_size == len(after[0]) == len(TokenBytes(new).vocabulary)
    assert (model.config.bos_token_id, model.config.eos_token_id) == tuple(roles)


def split_of(old: Any, known: dict[bytes, int], token: bytes) -> list[int]:
    try:
        return old(token.decode(), add_special_tokens=False)["input_ids"]
    except UnicodeDecodeError:  # part of a character: its bytes, each a token in this vocabulary
        longest = next(n for n in range(len(token), 0, -1) if token[:n] in known)
        rest = token[longest:]
        return [known[token[:longest]], *(split_of(old, known, rest) if rest else [])]


def test_parts_of_characters_are_spelled_by_the_old_bytes() -> None:
    old, new = bpe_tokenizer(), tokenizer("teacher")
    vocabulary = TokenBytes(new).vocabulary
    sources = transfer_sources(old, new)
    old_vocabulary = TokenBytes(old).vocabulary
    partial = [n for n, token in enumerate(vocabulary) if (token or b"a")[0] >= 0x80]
    assert len(partial) >= 128
    for index in partial:
        assert b"".join(old_vocabulary[source] for source in sources[index]) == vocabulary[index]


def test_a_lone_dummy_prefix_is_no_source() -> None:
    old = sentencepiece_like()
    assert old("fo", add_special_tokens=False)["input_ids"][0] == old.get_vocab()["▁"]
    new = bpe_tokenizer()
    index = TokenBytes(new).vocabulary.index(b"fo")
    spelled = [TokenBytes(old).vocabulary[n] for n in transfer_sources(old, new)[index]]
    assert spelled == [b"f", b"o"]


def test_tokens_are_cut_as_within_a_text() -> None:
    """Not with the space that a SentencePiece tokenizer puts before a text."""
    old, new = (TokenBytes(wheel_tokenizer(name)) for name in ("mistral", "smollm2"))
    cut = 0
    sources = transfer_sources(wheel_tokenizer("mistral"), wheel_tokenizer("smollm2"))
    for token, found in zip(new.vocabulary, sources, strict=True):
        if token:
            assert b"".join(old.vocabulary[index] for index in found) == token
            cut += len(found) > 1
    assert cut > 20_000


def test_specials_map_by_role_and_what_is_not_found_is_the_mean() -> None:
    old, new = tokenizer("teacher"), bpe_tokenizer()
    new.add_special_tokens({"additional_special_tokens": ["<tool>"], "pad_token": "<eos>"})
    assert old.pad_token_id != old.eos_token_id
    sources = transfer_sources(old, new)
    assert sources[new.eos_token_id] == [old.eos_token_id]  # and not the padding token
    assert sources[new.bos_token_id] == [old.bos_token_id]
    assert sources[new.convert_tokens_to_ids("<tool>")] == []
    model = tiny_model(old)
    mean = model.get_input_embeddings().weight.detach().mean(0)
    transplant(model, old, new)
    row = model.get_input_embeddings().weight[new.convert_tokens_to_ids("<tool>")]
    torch.testing.assert_close(row, mean)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3", "Phi"])
def test_shared_text_keeps_its_logits(family: str) -> None:
    """Tokens that exist on both sides: same states, and same logits in the shared columns."""
    old, new = tokenizer("teacher"), byte_tokenizer()
    model = small(family, vocab_size=len(old))
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    sources = transfer_sources(old, new)
    new_ids = torch.tensor([[b for b in b"one two" if len(sources[b]) == 1]])
    old_ids = torch.tensor([[sources[int(b)][0] for b in new_ids[0]]])
    before = forward(model, old_ids)
    transplant(model, old, new)
    shared = [(n, s[0]) for n, s in enumerate(sources) if len(s) == 1]
    after = forward(model, new_ids)
    kept = after[..., [n for n, _ in shared]]
    torch.testing.assert_close(kept, before[..., [s for _, s in shared]], rtol=1e-4, atol=1e-5)
    assert len(shared) >= 256


@both_heads
def test_a_transplanted_model_is_saved_and_read_again(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tokenizer("teacher"), tie_word_embeddings=tied)
    new = tokenizer("student")
    transplant(model, tokenizer("teacher"), new)
    saving.save(Side.of(model.eval(), new), tmp_path / "saved")
    ids = torch.tensor([new("The fox jumps, 42")["input_ids"]])
    again = models.load_side(ModelSpec(model=f"dir:{tmp_path / 'saved'}"))
    torch.testing.assert_close(forward(again.model, ids), forward(model, ids))
    assert again.specials == Specials.of(new)


# --- tokens that begin alike ---


def beginning(known: dict[bytes, int], token: bytes) -> list[int]:
    """The old tokens that begin with these bytes, one by one."""
    return sorted(index for text, index in known.items() if text.startswith(token))


@both_heads
@pytest.mark.parametrize("name", ["student", "bytes"])
def test_a_token_starts_from_all_that_begin_with_it(tied: bool, name: str) -> None:
    old = tokenizer("teacher")
    new = tokenizers.byte_tokenizer() if name == "bytes" else tokenizer(name)
    model = tiny_model(old, tie_word_embeddings=tied)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [table.detach().clone() for table in tables]
    transplant(model, old, new, start="first_byte")
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (after[0] is after[1]) == tied
    by_fvt, known = transfer_sources(old, new), ids_by_bytes(TokenBytes(old).vocabulary)
    several = 0
    for index, token in enumerate(TokenBytes(new).vocabulary):
        sources = (beginning(known, token) if token else []) or by_fvt[index]
        several += len(sources) > 1
        for table, start in zip(after, before, strict=True):
            torch.testing.assert_close(table[index], start[sources].mean(0))
    assert several > 20
    assert model.config.bos_token_id == new.bos_token_id
    assert model.config.pad_token_id == new.pad_token_id


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_real_tokens_by_their_first_byte(name: str) -> None:
    """Mistral's own byte tokens are not among them where a piece spells the same."""
    old, new = wheel_tokenizer(name), tokenizers.byte_tokenizer()
    sources, by_fvt = transfer_sources(old, new, "first_byte"), transfer_sources(old, new)
    known = ids_by_bytes(wheel_token_bytes(name).vocabulary)
    for byte in b" ea\n9\x00\xe6\xff":
        assert sorted(sources[byte]) == (beginning(known, bytes([byte])) or by_fvt[byte])
    assert len(sources[ord(" ")]) > 10_000
    assert sources[BOS] == [old.bos_token_id]
    assert sources[EOS] == [old.eos_token_id]


# --- the longest sub-word ---


def slow_longest(known: dict[bytes, int], ids: list[int]) -> list[int]:
    read, found = b"", []
    for index in ids:
        read = read + bytes([index]) if index < 256 else b""
        endings = (read[start:] for start in range(max(0, len(read) - 90), len(read)))
        found.append(next((known[text] for text in endings if text in known), -1))
    return found


def subwords_over(vocabulary: list[bytes], width: int = 4) -> LongestSubwords:
    new = TokenBytes(tokenizers.byte_tokenizer()).vocabulary
    return LongestSubwords(nn.Embedding(len(vocabulary), width), vocabulary, new)


@few
@given(
    words=st.lists(st.binary(max_size=4).map(lambda text: bytes(b % 3 for b in text)), min_size=1),
    rows=st.lists(
        st.lists(st.sampled_from([0, 1, 2, BOS, PAD]), min_size=9, max_size=9),
        min_size=1,
        max_size=3,
    ),
)
def test_the_longest_subword_of_random_words(words: list[bytes], rows: list[list[int]]) -> None:
    vocabulary = [b"", *words, b"\x01"]
    found = subwords_over(vocabulary).longest(torch.tensor(rows))
    assert found.tolist() == [slow_longest(ids_by_bytes(vocabulary), row) for row in rows]


@lru_cache
def smollm() -> tuple[LongestSubwords, dict[bytes, int]]:
    vocabulary = wheel_token_bytes("smollm2").vocabulary
    return subwords_over(vocabulary), ids_by_bytes(vocabulary)


def test_the_longest_subword_of_real_text() -> None:
    """Real documents and random Unicode, with specials in the middle, padded on the left."""
    documents = [text.encode()[:300] for text in real_documents()[::25]]
    rows = [[BOS, *text[:150], EOS, *text[150:]] for text in documents]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    subwords, known = smollm()
    found = subwords.longest(ids)
    assert found.tolist() == [slow_longest(known, row) for row in ids.tolist()]
    assert len(ids) > 80
    vocabulary = wheel_token_bytes("smollm2").vocabulary
    assert max(len(vocabulary[index]) for index in set(found.flatten().tolist())) > 16


@few
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_the_longest_subword_of_any_text(text: str) -> None:
    ids = list(text.encode())
    subwords, known = smollm()
    found = subwords.longest(torch.tensor(ids, dtype=torch.long)[None])
    assert found[0].tolist() == slow_longest(known, ids)


def test_subwords_are_for_bytes_only() -> None:
    with pytest.raises(UserError, match=r"student\.add_subwords.*several bytes"):
        transplant(
            tiny_model(bpe_tokenizer()), bpe_tokenizer(), tokenizer("student"), add_subwords=True
        )


# --- a student that adds sub-words ---


def with_subwords(family: str = "", *, tied: bool = True) -> Any:
    """A model of bytes that was one of `teacher`'s tokens, with its sub-words."""
    old = tokenizer("teacher")
    if family:
        model = small(family, vocab_size=len(old), initializer_range=0.3, tie_word_embeddings=tied)
    else:
        model = tiny_model(old, tie_word_embeddings=tied).eval()
    transplant(model, old, tokenizers.byte_tokenizer(), add_subwords=True)
    return model


def byte_ids(text: str = TEXT) -> torch.Tensor:
    return torch.tensor([[BOS, *text.encode()]])


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3", "Phi"])
def test_what_is_read_is_byte_and_subword(family: str) -> None:
    """The same text as the sum of both old embeddings; Gemma's scaling acts on both."""
    old = tokenizer("teacher")
    model = with_subwords(family)
    plain = small(family, vocab_size=len(old), initializer_range=0.3, tie_word_embeddings=True)
    ids = byte_ids("one two three")
    sources = transfer_sources(old, tokenizers.byte_tokenizer())
    first = torch.tensor([[sources[index][0] for index in ids[0].tolist()]])
    known = ids_by_bytes(TokenBytes(old).vocabulary)
    longest = torch.tensor([slow_longest(known, ids[0].tolist())])
    assert longest[0, 0] == -1
    assert (longest != first).sum() > 5
    embed = plain.get_input_embeddings()
    with torch.no_grad():
        embeds = embed(first)
        embeds[:, 1:] += embed(longest[:, 1:])
        expected = plain.get_decoder()(inputs_embeds=embeds).last_hidden_state
        states = models.hidden_states(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(states, expected)
    models._check_logits(model, "dir:x")


def test_padding_changes_nothing() -> None:
    model, ids = with_subwords(), byte_ids()
    alone = forward(model, ids)
    for side in ("left", "right"):
        pads = torch.full((1, 7), PAD)
        rows = torch.cat([pads, ids] if side == "left" else [ids, pads], 1)
        mask = (rows != PAD).long()
        place = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found = model(input_ids=rows, attention_mask=mask, position_ids=place).logits
        torch.testing.assert_close(found[mask.bool()], alone[0], rtol=1e-4, atol=1e-4)


every_decoding = pytest.mark.parametrize(
    "decoding",
    [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "num_beams": 3}],
    ids=["greedy", "sampled", "beams"],
)


@every_decoding
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Mistral", "Phi"])
def test_generation_over_a_cache_is_that_of_whole_sequences(
    family: str, decoding: dict[str, Any]
) -> None:
    """Of a batch padded on the left, in the letters of which the old tokens are made."""
    model = with_subwords(family, tied=False)
    own = tokenizers.byte_tokenizer()
    batch = own([TEXT, "lazy d", "h"], return_tensors="pt", padding=True, padding_side="left")
    others = [index for index in range(260) if index not in list(b"theinors ")]
    options = {"max_new_tokens": 24, "temperature": 3.0, "suppress_tokens": others, **decoding}
    options |= {"pad_token_id": PAD, "eos_token_id": None}
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(model.generate(**batch, **options, use_cache=use_cache))
    assert texts[0].tolist() == texts[1].tolist()
    if decoding["do_sample"]:  # greedy texts run in circles
        assert (model.get_decoder().subwords.longest(texts[0][:, -24:]) > 260).sum() > 4
    else:
        ids = byte_ids()
        for _ in range(24):
            scores = forward(model, ids)[:, -1:]
            scores[..., others] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1)], 1)
        assert texts[0][0].tolist() == ids[0].tolist()


def test_text_read_in_pieces_over_a_cache() -> None:
    model, ids = with_subwords(), byte_ids()
    whole = forward(model, ids)
    for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
        parts = []
        for piece in ids.split(5, dim=1):
            with torch.no_grad():
                output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_cache_repeated_for_several_continuations() -> None:
    """As the evaluation reads a long context once for all choices of an answer."""
    model, ids = with_subwords(), byte_ids("What happens to the numbe")
    ends = torch.tensor([list(b"r of"), list(b"d po"), list(b"\xbb\xac 4")])
    expected = forward(model, torch.cat([ids.expand(3, -1), ends], 1))[:, -4:]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        found = model(ends, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_teacher_tasks_read_it_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = with_subwords(), tokenizers.byte_tokenizer()
    whole = divergence.ByteModel(model, own).distributions(TEXT)
    monkeypatch.setattr(divergence, "ROWS", 7)
    pieces = divergence.ByteModel(model, own).distributions(TEXT)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6)


def test_what_hides_the_bytes_is_refused() -> None:
    model, ids = with_subwords(), byte_ids()
    with pytest.raises(TypeError, match="reads input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(TypeError, match="reads input_ids"):  # a tree of texts in one row
        model(ids, attention_mask=torch.zeros(1, 1, ids.shape[1], ids.shape[1]))
    foreign = tiny_model(tokenizers.byte_tokenizer())(ids, use_cache=True).past_key_values
    with pytest.raises(TypeError, match="not filled by"):
        model(ids, past_key_values=foreign)


@both_trainings
@both_heads
def test_a_student_with_subwords_trains_and_is_not_saved(
    tied: bool, lora: bool, tmp_path: Path
) -> None:
    model = with_subwords(tied=tied).requires_grad_(True)
    kept = model.get_decoder().subwords.table.weight.clone()
    before = model.get_input_embeddings().weight.detach().clone()
    if lora:
        model.requires_grad_(False)
    trained = models.add_lora(model, Lora(rank=4, alpha=8)) if lora else model
    train_a_little(trained, byte_ids())
    expected = forward(trained, byte_ids())
    merged = models.merged(trained)
    torch.testing.assert_close(forward(merged, byte_ids()), expected, rtol=1e-4, atol=1e-4)
    inputs, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert inputs.shape == (260, 32)
    assert (inputs is head) == tied
    assert (inputs - before).abs().max() > 1e-3
    assert torch.equal(merged.get_decoder().subwords.table.weight, kept)
    assert not any("subwords" in name for name in merged.state_dict())
    side = Side.of(merged, tokenizers.byte_tokenizer())
    with pytest.raises(UserError, match=r"student\.add_subwords"):
        saving.save(side, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# --- a pair that states it ---


def test_a_student_of_bytes_is_loaded_saved_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))
    spec = ModelSpec(model="tiny:teacher", tokenizer="bytes:256", start="first_byte")
    side = models.load_side(spec)
    assert not any("subwords" in name for name, _ in side.model.named_modules())
    train_a_little(side.model, byte_ids())
    saving.save(side, tmp_path / "saved")
    again = models.load_side(ModelSpec(model=f"dir:{tmp_path / 'saved'}"))
    torch.testing.assert_close(forward(again.model, byte_ids()), forward(side.model, byte_ids()))
    assert again.tokens.vocabulary == side.tokens.vocabulary
    assert again.specials == side.specials == Specials(BOS, EOS, PAD, 259)
    more = models.load_side(spec.model_copy(update={"add_subwords": True}))
    start = models.load_side(spec).model
    assert torch.equal(more.model.lm_head.weight, start.lm_head.weight)
    difference = forward(more.model, byte_ids()) - forward(start, byte_ids())
    assert difference.abs().max() > 0.01


def test_the_shipped_pair_starts_from_first_bytes() -> None:
    student = registry.load_pair("smol-bytes").student
    assert (student.tokenizer, student.start, student.add_subwords) == (
        *("bytes:256", "first_byte"),
        False,
    )


@pytest.mark.parametrize(
    ("student", "complaint"),
    [
        ("{model: dir:a, start: first_byte}", "student: start and add_subwords are for"),
        ("{model: dir:a, tokenizer: dir:a, add_subwords: true}", "student: start and add_subwords"),
        ("{model: dir:a, tokenizer: bytes:256, start: bytes}", "student.start: Input should be"),
        ("{model: 'bytes:256'}", "student: model: bytes:256 is a tokenizer and no model"),
    ],
)
def test_what_a_pair_cannot_ask_for(student: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"student: {student}\nteachers: [{{model: dir:b}}]\n")
    with pytest.raises(UserError) as caught:
        registry.load_pair(str(path))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
