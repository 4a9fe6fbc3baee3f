"""Pipelines of diffusers' image transformers, tiny and with random weights.

All have 16 x 16 pixels per image token.
"""

from __future__ import annotations

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tests.tiny_models import text_config, tiny_tokenizer, tiny_vae
from tests.tiny_transformers import tiny_transformer

TEXT_DIM = 24


def auraflow():
    return diffusers.AuraFlowPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(kind="UMT5"),
        vae=tiny_vae(),
        transformer=tiny_transformer("auraflow"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def flux(**changes):
    return diffusers.FluxPipeline(
        scheduler=dynamic_scheduler(),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=clip(hidden_size=8),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=byte_tokenizer(),
        transformer=tiny_transformer("flux", in_channels=16, **changes),
    )


def flux_distilled():
    return flux(guidance_embeds=True)


def hunyuandit():
    bert = transformers.BertConfig(
        vocab_size=300,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=77,
    )
    return diffusers.HunyuanDiTPipeline(
        vae=tiny_vae(),
        text_encoder=seeded(transformers.BertModel, bert),
        tokenizer=byte_tokenizer(),
        transformer=tiny_transformer("hunyuandit", text_len=77, text_len_t5=256),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(width=8),
        tokenizer_2=byte_tokenizer(),
    )


def lumina2():
    config = transformers.Gemma2Config(
        vocab_size=300,
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return diffusers.Lumina2Pipeline(
        transformer=tiny_transformer("lumina2", axes_lens=(300, 32, 32)),
        scheduler=dynamic_scheduler(),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=seeded(transformers.Gemma2Model, config),
        tokenizer=byte_tokenizer(),
    )


def pixart():
    return diffusers.PixArtSigmaPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(),
        vae=tiny_vae(),
        transformer=tiny_transformer("pixart"),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def qwen_image():
    language = {
        "vocab_size": 300,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        "max_position_embeddings": 512,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config=language, vision_config={**vision, "out_hidden_size": TEXT_DIM}
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval()
    return diffusers.QwenImagePipeline(
        scheduler=dynamic_scheduler(),
        vae=vae,
        text_encoder=seeded(transformers.Qwen2_5_VLForConditionalGeneration, config),
        tokenizer=byte_tokenizer(),
        transformer=tiny_transformer("qwen_image"),
    )


def sd3():
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny_transformer("sd35"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=clip(hidden_size=8, projection_dim=4),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=clip(hidden_size=8, projection_dim=4),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=byte_tokenizer(),
    )


PIPELINES = {
    make.__name__: make
    for make in (auraflow, flux, flux_distilled, hunyuandit, lumina2, pixart, qwen_image, sd3)
}


def dynamic_scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def clip(**changes):
    projects = "projection_dim" in changes
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return seeded(kind, text_config(**changes))


def t5(width=TEXT_DIM, kind="T5"):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return seeded(getattr(transformers, f"{kind}EncoderModel"), config)


def seeded(kind, config):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return kind(config).eval()


def byte_tokenizer():
    """A tokenizer that knows single bytes, with no merges; it ends texts as T5's does."""
    special = ["<pad>", "</s>", "<unk>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
