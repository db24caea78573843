"""Small random decoders of several architectures, made without any file or network."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quest_dist.models import LoadedModel, place
from quest_dist.tasks.prompt import Language

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def tiny(
    kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """A seeded random model; its logits are sharp enough that greedy decoding has no near ties."""
    config_class, model_class, extra = KINDS[kind]
    torch.manual_seed(11)
    model = model_class(config_class(**{**SIZES, **extra, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def tiny_loaded(
    kind: str = "llama", eos: int | None = None, device: str = "cpu", **changes: object
) -> LoadedModel:
    """A tiny model with a tokenizer of as many words, w0 w1 w2 ..."""
    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))
    )
    language = Language(
        tokenizer,
        head="",
        foot="",
        max_length=512,
        eos_ids=frozenset() if eos is None else frozenset({eos}),
    )
    placed = place(device)
    return LoadedModel(tiny(kind, **changes).to(placed), tokenizer, language, placed)


def save_byte_model(folder: Path) -> None:
    """A tiny model of a few kilobytes that reads bytes, saved as any local model is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    tiny(vocab_size=len(vocabulary), eos_token_id=0).save_pretrained(folder)
