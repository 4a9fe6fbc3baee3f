"""The training's parts at a size that takes seconds."""

import torch
from safetensors.torch import load_file
from sample_training.autoencoder import build_autoencoder, picture_batch
from sample_training.denoiser import Denoiser
from sample_training.export import export_pipeline
from sample_training.loop import Schedule, Trainer
from sample_training.text import build_text_encoder, build_tokenizer, world_prompts
from sample_world import CLASSES
from torch import nn

from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions


def test_the_autoencoder_starts_as_a_thumbnail():
    pictures = picture_batch(0, 4, 128)
    with torch.no_grad():
        autoencoder = build_autoencoder()
        colors = autoencoder.encode(pictures).latents[:, :3]
        decoded = autoencoder.decode(autoencoder.encode(pictures).latents).sample
    means = nn.functional.avg_pool2d(pictures, 8)
    torch.testing.assert_close(colors, means * 1.5, atol=1e-4, rtol=0)
    blurred = nn.functional.interpolate(means, scale_factor=8)
    assert (decoded - blurred).abs().mean() < 0.2 * (decoded - decoded.mean()).abs().mean() + 0.1


def test_every_prompt_of_the_world_fits_the_tokenizer_and_comes_back(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    for class_index in CLASSES:
        for prompt in world_prompts(class_index):
            ids = tokenizer(prompt).input_ids
            assert len(ids) <= tokenizer.model_max_length
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text.replace(" ", "") == prompt.lower().replace(" ", "")


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    def train(folder, *stops):
        folder.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            model = nn.Linear(3, 1)
            trainer = Trainer(model, Schedule(8, 0.1, 2, 0.9, save_every=1), folder, "toy")

            def loss(draw, model=model, trainer=trainer, stop=stop):
                if trainer.step == stop:
                    raise KeyboardInterrupt
                return model(torch.randn(4, 3)).square().mean()

            try:
                trainer.run(loss)
            except KeyboardInterrupt:
                continue
        return model

    whole = train(tmp_path / "whole", None)
    resumed = train(tmp_path / "resumed", 3, 6, None)
    torch.testing.assert_close(whole.state_dict(), resumed.state_dict(), atol=0, rtol=0)


def test_an_exported_pipeline_loads_with_the_names_of_published_weights(tmp_path):
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    denoiser = Denoiser(build_text_encoder(tokenizer))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = denoiser.text_encoder(tokens).last_hidden_state
    folder = tmp_path / "pipeline"
    export_pipeline(
        build_autoencoder(), denoiser, tokenizer, tmp_path / "tokenizer", scaling=1.0, folder=folder
    )
    names = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"text_model"}
    loaded = load_pipeline(GenerateOptions(out="-", model=str(folder), device="cpu"))
    with torch.no_grad():
        assert torch.equal(loaded.text_encoder(tokens).last_hidden_state, expected)
