"""Sizes and costs of cells, against models that are built and cells that were run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctdbench import request, results
from ctdbench.distill import references
from ctdbench.errors import PreflightError
from ctdbench.launch import estimate, sizes
from ctdbench.spec import Lora, ModelSpec, RunSpec

LLAMA = {
    "vocab_size": 700,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# --- sizes, against models that are built --------------------------------------------------------


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))


def saved_size(model: Any, folder: Path, **spec: Any) -> sizes.Size:
    folder.mkdir()
    model.config.save_pretrained(folder)
    found = sizes.size_of(ModelSpec(model=f"dir:{folder}", **spec))
    assert found is not None
    return found


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 20}])
def test_parameters_are_those_of_the_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = llama(**changes)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert saved_size(model, tmp_path / "model").parameters == matrices


def test_parameters_under_another_tokenizer_and_with_fewer_layers(tmp_path: Path) -> None:
    size = saved_size(llama(), tmp_path / "model", tokenizer="bytes:256", layers=2)
    expected = llama(vocab_size=256, num_hidden_layers=2)
    assert size.parameters == sum(p.numel() for p in expected.parameters() if p.ndim == 2)


@pytest.mark.parametrize("embeddings", [True, False])
def test_what_lora_trains(tmp_path: Path, embeddings: bool) -> None:
    from ctdbench.distill.models import add_lora

    targets = ("q_proj", "v_proj", "down_proj")
    lora = Lora(rank=5, targets=targets, train_embeddings=embeddings)
    model = llama()
    size = saved_size(model, tmp_path / "model")
    wrapped = add_lora(model, lora)
    trained = [p.numel() for p in wrapped.parameters() if p.requires_grad]
    assert size.trained(lora) == sum(trained)
    assert size.trained(None) == size.parameters


def test_the_size_in_a_gguf_file_is_read_from_its_head(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(3)
    writer.add_languages(["en", "de"])
    writer.add_embedding_length(48)
    writer.add_feed_forward_length(80)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"<{number}>" for number in range(700)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = sizes._of_gguf(tmp_path / "model.gguf")
    assert found == saved_size(llama(tie_word_embeddings=True), tmp_path / "model")


def test_what_has_no_known_size_has_no_estimate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    pair = {"name": "odd", "student": {"model": f"dir:{tmp_path}"}}
    pair["teachers"] = [{"model": "tiny:teacher"}]
    spec = request.build_spec({"method": "sft", "pair": pair})
    assert sizes.size_of(spec.pair.student) is None
    assert estimate.estimate(spec, taught=False) is None


# --- costs, against cells that were run ----------------------------------------------------------

# cost.peak_memory_bytes / 1e9 of cells with 20 to 50 kB of text, two cores, bfloat16 autocast.
SHORT = 30_000
MEASURED = {
    ("smol-mistral", "sft"): 5.62,
    ("smol-mistral", "alm"): 5.65,
    ("smol-mistral", "bld"): 5.90,
    ("smol-mistral", "dskd"): 6.20,
    ("smol-mistral", "gold"): 5.95,
    ("smol-mistral", "h-kl"): 6.14,
    ("smol-mistral", "mined"): 5.69,
    ("smol-mistral", "p-kl"): 5.97,
    ("smol-mistral", "uld"): 5.90,
    ("smol-short", "kd"): 4.25,
    ("smol-bytes", "sft"): 7.29,
    ("smol-gemma", "sft"): 6.95,
    ("smol-gemma", "alm"): 8.59,
    ("smol-gemma", "bld"): 8.61,
    ("smol-gemma", "dskd"): 10.61,
    ("smol-gemma", "gold"): 8.68,
    ("smol-gemma", "h-kl"): 10.01,
    ("smol-gemma", "mined"): 7.23,
    ("smol-gemma", "p-kl"): 8.96,
    ("smol-gemma", "uld"): 8.66,
}
# The same of published cells, which read more text: memory grows with the steps of a cell.
PUBLISHED = [
    (
        cell["spec"]["pair"]["name"],
        cell["spec"]["method"],
        cell["spec"]["train"]["budget"],
        cell["cost"]["peak_memory_bytes"] / 1e9,
    )
    for cell in results.find(Path(__file__).parents[1] / "results").values()
    if "peak_memory_bytes" in cell["cost"]
]


def embedded(pair: str, method: str = "sft", **train: Any) -> RunSpec:
    spec = request.build_spec({"method": method, "pair": pair, "train": train})
    for reference in request.references_of(spec.pair):
        try:
            references.require(references.parse(reference))
        except PreflightError as error:
            pytest.skip(str(error))
    return spec


@pytest.mark.parametrize(
    ("pair", "method", "budget", "measured"),
    [*((*cell, SHORT, size) for cell, size in MEASURED.items()), *PUBLISHED],
)
def test_memory_is_estimated_within_a_quarter(
    pair: str, method: str, budget: int, measured: float
) -> None:
    found = estimate.estimate(embedded(pair, method, budget=budget), taught=method != "sft")
    assert found is not None
    assert found.memory / 1e9 == pytest.approx(measured, rel=0.25)


def test_operations_are_those_that_a_cell_records() -> None:
    """20 kB on smol-mistral: 5,442 student tokens, 5,041 of the teacher."""
    found = estimate.estimate(embedded("smol-mistral", "bld", budget=20_000), taught=True)
    assert found is not None
    assert found.flops == pytest.approx(6 * 125.1e6 * 5442 + 2 * 134.5e6 * 5041, rel=0.1)


def test_what_saves_memory_is_estimated_to_save_some() -> None:
    whole = estimate.estimate(embedded("smol-mistral"), taught=True)
    assert whole is not None
    for saving in ({"micro_batch": 1}, {"block_rows": 64}, {"document_bytes": 256}):
        found = estimate.estimate(embedded("smol-mistral", **saving), taught=True)
        assert found is not None
        assert found.memory < whole.memory


def test_disk_is_that_of_checkpoints() -> None:
    none, some = (
        estimate.estimate(embedded("smol-mistral", checkpoint_every=every), taught=False)
        for every in (0, 50)
    )
    assert none is not None
    assert some is not None
    assert some.disk - none.disk == pytest.approx(3 * 3 * 4 * 125.1e6, rel=0.01)


def test_a_kept_model_takes_disk_for_good() -> None:
    plain, kept = (
        estimate.estimate(embedded("smol-mistral", keep_model=keep), taught=False)
        for keep in (False, True)
    )
    assert plain is not None
    assert kept is not None
    assert kept.kept - plain.kept == pytest.approx(4 * 125.1e6, rel=0.01)
    assert kept.disk - plain.disk == kept.kept - plain.kept
