"""What is done to a student before and after training: transplant, LoRA, merge, save; logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from harness_setup import tokenizer
from tiny_models import bpe_tokenizer, byte_tokenizer, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ctdbench.distill import models
from ctdbench.distill.models import Side, Specials
from ctdbench.errors import PreflightError, UserError
from ctdbench.spec import Lora, ModelSpec
from ctdbench.text.token_bytes import TokenBytes

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
both_heads = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
both_trainings = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))


def small(family: str, **options: Any) -> Any:
    """A random model of a transformers family."""
    config = getattr(transformers, family + ("TextConfig" if family == "Gemma3" else "Config"))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**{**SMALL, **options}))
    return model.eval()


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- logits ---


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Qwen3", {}),
        ("Gemma2", {"final_logit_softcapping": 3.0}),
        ("Gemma3", {"final_logit_softcapping": 3.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi", {}),
    ],
)
def test_logits_are_those_of_the_models_own_forward(family: str, options: dict[str, Any]) -> None:
    model = small(family, **options)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # far enough out for a cap to bite
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    hidden = models.hidden_states(model, ids, torch.ones_like(ids))
    found = models.logits(model, hidden[0], columns=57)
    torch.testing.assert_close(found, forward(model, ids)[0, :, :57])
    assert models.logits(model.double(), hidden[0].double(), 57).dtype == torch.float64


def test_an_unknown_scaling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("Llama")
    models._check_logits(model, "dir:x")
    own = type(model).forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(PreflightError, match=r"dir:x \(llama\)"):
        models._check_logits(model, "dir:x")


def test_columns_past_the_vocabulary_are_cut_and_missing_ones_refused() -> None:
    own = bpe_tokenizer()
    Side.of(tiny_model(own), own)
    with pytest.raises(PreflightError, match="ids, its model only"):
        Side.of(tiny_model(own, vocab_size=len(own) - 1), own)


# --- transplant ---


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
    models.transplant(model, old, new)
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
    sources = models.transfer_sources(old, new)
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
    spelled = [TokenBytes(old).vocabulary[n] for n in models.transfer_sources(old, new)[index]]
    assert spelled == [b"f", b"o"]


def test_specials_map_by_role_and_what_is_not_found_is_the_mean() -> None:
    old, new = tokenizer("teacher"), bpe_tokenizer()
    new.add_special_tokens({"additional_special_tokens": ["<tool>"], "pad_token": "<eos>"})
    assert old.pad_token_id != old.eos_token_id
    sources = models.transfer_sources(old, new)
    assert sources[new.eos_token_id] == [old.eos_token_id]  # and not the padding token
    assert sources[new.bos_token_id] == [old.bos_token_id]
    assert sources[new.convert_tokens_to_ids("<tool>")] == []
    model = tiny_model(old)
    mean = model.get_input_embeddings().weight.detach().mean(0)
    models.transplant(model, old, new)
    row = model.get_input_embeddings().weight[new.convert_tokens_to_ids("<tool>")]
    torch.testing.assert_close(row, mean)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3", "Phi"])
def test_shared_text_keeps_its_logits(family: str) -> None:
    """Tokens that exist on both sides: same states, and same logits in the shared columns."""
    old, new = tokenizer("teacher"), byte_tokenizer()
    model = small(family, vocab_size=len(old))
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    sources = models.transfer_sources(old, new)
    new_ids = torch.tensor([[b for b in b"one two" if len(sources[b]) == 1]])
    old_ids = torch.tensor([[sources[int(b)][0] for b in new_ids[0]]])
    before = forward(model, old_ids)
    models.transplant(model, old, new)
    shared = [(n, s[0]) for n, s in enumerate(sources) if len(s) == 1]
    after = forward(model, new_ids)
    kept = after[..., [n for n, _ in shared]]
    torch.testing.assert_close(kept, before[..., [s for _, s in shared]], rtol=1e-4, atol=1e-5)
    assert len(shared) >= 256


@both_heads
def test_a_transplanted_model_is_saved_and_read_again(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tokenizer("teacher"), tie_word_embeddings=tied)
    new = tokenizer("student")
    models.transplant(model, tokenizer("teacher"), new)
    models.save(Side.of(model.eval(), new), tmp_path / "saved")
    ids = torch.tensor([new("The fox jumps, 42")["input_ids"]])
    again = models.load_side(ModelSpec(model=f"dir:{tmp_path / 'saved'}"))
    torch.testing.assert_close(forward(again.model, ids), forward(model, ids))
    assert again.specials == Specials.of(new)


# --- training, merging, saving ---


def train_a_little(model: Any, ids: torch.Tensor) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@both_trainings
@both_heads
def test_trained_embeddings_and_head_survive_merge_and_save(
    tied: bool, lora: bool, tmp_path: Path
) -> None:
    own = tokenizer("student")
    model = tiny_model(own, tie_word_embeddings=tied).eval()
    before = model.get_output_embeddings().weight.detach().clone()
    ids = torch.tensor([own("The fox jumps over the dog, 42 + 17")["input_ids"]])
    trained = models.add_lora(model, Lora(rank=4, alpha=8)) if lora else model
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert inputs.requires_grad
    assert head.requires_grad
    assert (inputs is head) == tied
    train_a_little(trained, ids)
    expected = forward(trained, ids)
    merged = models.merged(trained)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    models.save(Side.of(merged, own), tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    torch.testing.assert_close(forward(again, ids), expected, rtol=0, atol=1e-4)
    moved = again.get_output_embeddings().weight
    assert (moved - before).abs().max() > 1e-3
    same = torch.equal(moved, again.get_input_embeddings().weight)
    assert same == tied
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] == tied


def test_lora_can_leave_the_embeddings_alone() -> None:
    model = models.add_lora(tiny_model(tokenizer("student")), Lora(train_embeddings=False))
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


def test_lora_on_layers_that_do_not_exist_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match=r"pair\.lora\.targets") as caught:
        models.add_lora(tiny_model(tokenizer("student")), Lora(targets=("nosuch",)))
    assert "\n" not in str(caught.value)


def test_the_first_layers_can_be_kept() -> None:
    whole = tiny_model(tokenizer("student")).eval()
    cut = tiny_model(tokenizer("student")).eval()
    models.keep_layers(cut, 1)
    assert cut.config.num_hidden_layers == 1
    ids = torch.tensor([[3, 4, 5]])
    states = whole(input_ids=ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(
        models.hidden_states(cut, ids, torch.ones_like(ids)), whole.model.norm(states)
    )
    with pytest.raises(PreflightError, match="1 layers, not 2"):
        models.keep_layers(cut, 2)


# --- references ---


def test_the_tiny_pair_is_made_once_and_always_the_same(tmp_path: Path) -> None:
    first = models.load_side(ModelSpec(model="tiny:student"))
    folder = next((tmp_path / "cache").glob("tiny/student*"))
    kept = (folder / "model.safetensors").read_bytes()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    second = models.load_side(ModelSpec(model="tiny:student"))
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert first.tokens.vocabulary == second.tokens.vocabulary
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    models.load_side(ModelSpec(model="tiny:student"))
    assert (folder / "model.safetensors").read_bytes() == kept
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_folder_that_holds_no_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for load in (models.load_model, models.load_tokenizer):
        with pytest.raises(PreflightError, match="does not load") as caught:
            load(f"dir:{tmp_path}")
        assert "\n" not in str(caught.value)
