"""Train the embedded sample pipeline from a seed.

    python scripts/train_sample_pipeline.py --out runs/sample

Stages: autoencoder, latents, denoiser (with its text encoder), decoder, export. Each resumes from
its checkpoint in `--out`, so the command may be interrupted and repeated. Several processes share
the steps when launched by torchrun (a 2-core CPU is faster with two processes of one thread than
with one process of two); the result depends on their number. `--continue-from` keeps a trained
pipeline's autoencoder and trains its denoiser further, with the heads that `build_unet` has now.
samples/README.md says how the committed weights were trained.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from sample_training.autoencoder import autoencoder_loss, build_autoencoder, decoder_loss
from sample_training.denoiser import Denoiser, denoiser_loss
from sample_training.export import export_pipeline
from sample_training.latents import latent_set
from sample_training.loop import Schedule, Trainer
from sample_training.text import build_text_encoder, build_tokenizer

STAGE_SEEDS = 10**9  # distance between the seeds of two stages


def main() -> None:
    """Run the stages in order."""
    options = parse_options()
    processes = start_processes()
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [options.seed + stage * STAGE_SEEDS for stage in range(4)]

    earlier = options.continue_from and load_trained(options.continue_from)
    torch.manual_seed(options.seed)
    autoencoder = build_autoencoder().to(options.device)
    if earlier:
        autoencoder.load_state_dict(earlier.vae.state_dict())
    else:
        schedule = Schedule(options.autoencoder_steps, learning_rate=1e-3, ema_decay=0.995)
        Trainer(autoencoder, schedule, folder, "autoencoder").run(
            autoencoder_loss(autoencoder, seeds[0])
        )
    autoencoder.requires_grad_(False)

    if processes > 1 and dist.get_rank() > 0:
        dist.barrier()  # the first process writes the latents
    small = latent_set(autoencoder, folder, options.pictures, 256, seeds[1])
    large = latent_set(
        autoencoder, folder, options.pictures // 10, 512, seeds[1] + options.pictures
    )
    if processes > 1 and dist.get_rank() == 0:
        dist.barrier()
    scaling = (
        earlier.vae.config.scaling_factor
        if earlier
        else round(1 / float(small[0].float().std()), 4)
    )

    torch.manual_seed(options.seed + 1)
    tokenizer_folder = options.continue_from / "tokenizer" if earlier else folder / "tokenizer"
    tokenizer = earlier.tokenizer if earlier else build_tokenizer(tokenizer_folder)
    denoiser = Denoiser(build_text_encoder(tokenizer)).to(options.device)
    if earlier:
        denoiser.unet.load_state_dict(earlier.unet.state_dict())
        denoiser.text_encoder.load_state_dict(earlier.text_encoder.state_dict())
    schedule = Schedule(
        options.denoiser_steps,
        learning_rate=5e-4 if earlier else 1e-3,
        warmup=200,
        ema_decay=0.999,
        save_every=250,
    )
    sets = [(*small, 32 // processes, 1), (*large, 4 // processes, 10)]
    Trainer(denoiser, schedule, folder, "denoiser").run(
        denoiser_loss(denoiser, tokenizer, sets, scaling, seeds[2], processes)
    )

    if not earlier:
        autoencoder.decoder.requires_grad_(True)
        schedule = Schedule(options.decoder_steps, learning_rate=5e-4, ema_decay=0.995)
        Trainer(autoencoder, schedule, folder, "decoder").run(decoder_loss(autoencoder, seeds[3]))
    if processes == 1 or dist.get_rank() == 0:
        export_pipeline(
            autoencoder, denoiser, tokenizer, tokenizer_folder, scaling, options.pipeline
        )
        print(f"written to {options.pipeline}")


def load_trained(folder: Path) -> StableDiffusionPipeline:
    """A sample pipeline in float32."""
    return StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.float32)


def start_processes() -> int:
    """Join the processes that torchrun started; returns their number."""
    if "RANK" not in os.environ:
        return 1
    dist.init_process_group("gloo")
    return dist.get_world_size()


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--pipeline", type=Path, default=None, help="default: OUT/pipeline")
    parser.add_argument(
        "--continue-from",
        type=Path,
        help="a trained sample pipeline: keep its autoencoder, and start the denoiser and the text "
        "encoder from its weights (default: train everything from random weights)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=1400)
    parser.add_argument(
        "--pictures", type=int, default=8192, help="pictures to train the denoiser on"
    )
    parser.add_argument("--denoiser-steps", type=int, default=6000)
    parser.add_argument("--decoder-steps", type=int, default=400)
    options = parser.parse_args()
    options.pipeline = options.pipeline or options.out / "pipeline"
    return options


if __name__ == "__main__":
    main()
