"""What is done to a student before and after training: layers, LoRA, merge, save; logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from harness_setup import tokenizer
from huggingface_hub import constants
from lm_eval.api.instance import Instance
from tiny_models import FALCON_H1, bpe_tokenizer, tiny_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from ctdbench.distill import models, references, saving
from ctdbench.distill.models import Side
from ctdbench.errors import PreflightError, UserError
from ctdbench.evaluate.language_model import PinnedLM
from ctdbench.spec import Lora, ModelSpec

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
        ("FalconH1", {"lm_head_multiplier": 0.02, **FALCON_H1}),
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


def test_specials_past_the_columns_are_left_out() -> None:
    """Gemma 3's text models have a tokenizer with a token for images, and no logit for it."""
    own = bpe_tokenizer()
    model = tiny_model(own, vocab_size=len(own))
    own.add_tokens([AddedToken("<image>", special=True), AddedToken("<pad>", special=True)])
    own.pad_token = "<pad>"
    side = Side.of(model, own)
    assert len(side.tokens.vocabulary) == len(own) - 2
    assert side.specials.pad is None
    asked = Instance("generate_until", {}, ("The fox", {"until": ["."]}), 0)
    assert PinnedLM(model, own, batch_size=2).generate_until([asked], disable_tqdm=True)
    own.eos_token = "<image>"
    with pytest.raises(PreflightError, match="ids, its model only"):
        Side.of(model, own)


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
    saving.save(Side.of(merged, own), tmp_path / "saved")
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


def test_a_hub_model_is_loaded_at_the_commit_that_its_id_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for `main`, the library would fetch what lies there by now."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, asked = "a" * 40, []
    for path, text in ((f"snapshots/{commit}/config.json", "{}"), ("refs/main", commit)):
        (tmp_path / "models--o--m" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models--o--m" / path).write_text(text)

    def loaded(name: str, *, revision: str, **_: Any) -> Any:
        asked.append((name, revision))
        return small("Llama") if len(asked) == 1 else tokenizer("student")

    for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", loaded)
    assert references.content(references.parse("hub:o/m")) == commit
    models.load_model("hub:o/m")
    models.load_tokenizer("hub:o/m")
    assert asked == [("o/m", commit)] * 2
    assert references.hub_revision(references.parse("hub:o/other@v1")) == "v1"
    assert references.hub_revision(references.parse("hub:o/other")) == "main"


def test_the_tokenizer_of_bytes_is_a_reference_of_its_own() -> None:
    source = references.parse("bytes:256")
    references.require(source)
    assert references.content(source) == "bytes:256"
    assert models.load_tokenizer("bytes:256")("é").input_ids == [256, 0xC3, 0xA9]
    with pytest.raises(UserError, match="bytes:256 is a tokenizer and no model"):
        models.load_model("bytes:256")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("bytes:255", "write bytes:256"),
        ("tiny:nobody", "write tiny:student or tiny:teacher"),
        ("bytes:", "for a tokenizer of bytes: bytes:256"),
        ("byte:256", "for a tokenizer of bytes: bytes:256"),
    ],
)
def test_other_references_are_refused_in_one_line(text: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"reference '{text}'") as caught:
        references.parse(text)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)
