"""A random 2-layer Llama with a byte-level tokenizer, saved as a model folder: what the tests of the examples run on."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def save(folder: Path, hidden: int, **config: float) -> Path:
    torch.manual_seed(0)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    size = {"hidden_size": hidden, "intermediate_size": hidden * 3 // 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    llama = transformers.LlamaConfig(vocab_size=256, num_hidden_layers=2, **size, **config)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder)
    return folder
