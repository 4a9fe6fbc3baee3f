"""The text side: a byte-level BPE tokenizer of the prompts and a small CLIP text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from sample_world import CLASSES
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_tokenmerge.sampling.imagenet import class_prompt

MAX_LENGTH = 32
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def world_prompts(class_index: int) -> list[str]:
    """The paper's prompt with ATC's full class string, and with the short name."""
    return [
        class_prompt(class_index, class_names="atc"),
        class_prompt(class_index, class_names="short"),
    ]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train the merges on the world's prompts and write `vocab.json` and `merges.txt`.

    Every byte is in the vocabulary, so any other prompt can be encoded too.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    prompts = [prompt.lower() for index in CLASSES for prompt in world_prompts(index)]
    tokenizer.train_from_iterator(prompts, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [token for token in ("".join(merge) for merge in merges) if token not in tokens]
    vocab = {token: index for index, token in enumerate(tokens + SPECIAL)}
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    merges_file.write_text("\n".join(lines) + "\n")
    return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=MAX_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model for the tokenizer's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def draw_prompts(classes: list[int], rng: Random, drop: float = 0.1) -> list[str]:
    """One prompt per class; a share `drop` of them empty, for classifier-free guidance."""
    return ["" if rng.random() < drop else rng.choice(world_prompts(index)) for index in classes]
