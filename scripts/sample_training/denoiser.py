"""Stage 3: the denoising UNet and the text encoder, trained together on latents."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sample_training.text import draw_prompts


def build_unet() -> UNet2DConditionModel:
    """A UNet laid out like Stable Diffusion's: attention at two levels and in the middle."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(48, 96, 160),
        attention_head_dim=(4, 4, 5),  # diffusers reads this as the number of heads
        norm_num_groups=16,
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM with v-prediction and zero terminal SNR, which learns a picture's overall brightness."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused with this spacing; diffusers warns of any other value
        clip_sample=False,
        set_alpha_to_one=True,
    )


class Denoiser(nn.Module):
    """The UNet and the text encoder, which stage 3 trains together."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = build_unet(), text_encoder


def denoiser_loss(
    model: Denoiser,
    tokenizer: CLIPTokenizer,
    sets: list[tuple[Tensor, Tensor, int, int]],
    scaling: float,
    seed: int,
    processes: int = 1,
) -> Callable[[int], Tensor]:
    """Mean squared error on the velocity.

    Args:
        model: the model to train.
        tokenizer: of the prompts.
        sets: `(latents, classes, batch size, every)`; a step uses the last set with an
            `every` that divides the step's number.
        scaling: latents are multiplied by this to have unit variance.
        seed: first of the draws' seeds.
        processes: how many processes take one step together; batch sizes are each process's own.
    """
    scheduler = build_scheduler()

    def loss(draw: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + draw)
        latents, classes, batch, _ = [s for s in sets if draw // processes % s[3] == 0][-1]
        device = model.unet.device
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[chosen].float() * scaling
        noise = torch.randn(clean.shape, generator=generator)
        # stratified: the timesteps of a batch cover the range evenly
        offset = torch.rand((), generator=generator)
        steps = ((torch.arange(batch) + offset) / batch * 1000).long().clamp_max(999)
        steps = steps[torch.randperm(batch, generator=generator)]
        noisy = scheduler.add_noise(clean, noise, steps)
        target = scheduler.get_velocity(clean, noise, steps)
        prompts = draw_prompts(classes[chosen].tolist(), Random(seed + draw))
        unique = sorted(set(prompts))
        tokens = tokenizer(
            unique, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        embeddings = model.text_encoder(tokens.to(device)).last_hidden_state
        context = embeddings[[unique.index(prompt) for prompt in prompts]]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            velocity = model.unet(noisy.to(device), steps.to(device), context).sample
        return (velocity.float() - target.to(device)).square().mean()

    return loss
