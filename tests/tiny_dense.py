"""A tiny dense Llama in a Hugging Face folder with a tokenizer, as a checkpoint to convert."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from duollm.data.tokenizer import train_tokenizer


def write_dense(folder: Path, corpus: Path, vocabulary: int = 300, **sizes: object) -> Path:
    """A random Llama of 3 layers whose tokenizer is trained on the texts in `corpus`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **sizes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    train_tokenizer(texts, vocabulary).save_pretrained(folder)
    return folder
