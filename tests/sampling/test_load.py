from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.locate import files_identity, split_lora
from sd_tokenmerge.sampling.options import GenerateOptions
from tests.tiny_models import tiny_sdxl, tiny_unet


def load(model: Path | str, **changes: Any) -> Any:
    return load_pipeline(GenerateOptions(out="-", model=str(model), device="cpu", **changes))


@pytest.fixture
def copied_model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_folder_loads_with_its_own_class_dtype_and_scheduler(tiny_model: Path) -> None:
    pipe = load(tiny_model)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert pipe.unet.dtype == torch.float32
    assert type(pipe.scheduler) is diffusers.PNDMScheduler
    assert pipe.safety_checker is None
    for name, weight in tiny_unet().state_dict().items():
        assert torch.equal(weight, pipe.unet.state_dict()[name])


def test_dtype_and_scheduler_can_be_chosen(tiny_model: Path) -> None:
    pipe = load(tiny_model, dtype="bfloat16", scheduler="EulerDiscrete")
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"


def test_only_the_unet_is_compiled_and_only_when_asked(tiny_model: Path) -> None:
    assert load(tiny_model).unet._compiled_call_impl is None
    pipe = load(tiny_model, compile=True)
    assert pipe.unet._compiled_call_impl is not None
    assert pipe.vae._compiled_call_impl is None


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        ("none", "to"),
        ("model", "enable_model_cpu_offload"),
        ("sequential", "enable_sequential_cpu_offload"),
    ],
)
def test_what_waits_on_the_cpu_is_diffusers_business(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, offload: str, expected: str
) -> None:
    called = []
    for name in ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(
            diffusers.StableDiffusionPipeline,
            name,
            lambda self, device, name=name: called.append((name, device)),
        )
    load(tiny_model, offload=offload)
    assert called == [(expected, "cpu")]


def test_sdxl_loads_through_the_same_code(tmp_path: Path) -> None:
    tiny_sdxl().save_pretrained(tmp_path / "xl")
    assert type(load(tmp_path / "xl")) is diffusers.StableDiffusionXLPipeline


def test_another_autoencoder_can_be_chosen(tiny_model: Path, tmp_path: Path) -> None:
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    vae.save_pretrained(tmp_path / "vae")
    pipe = load(tiny_model, vae=str(tmp_path / "vae"))
    assert type(pipe.vae) is diffusers.AutoencoderTiny


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_loras_change_the_output_by_their_scales(tiny_model: Path, tmp_path: Path) -> None:
    save_lora(load(tiny_model), tmp_path / "lora")
    file = next((tmp_path / "lora").iterdir())
    sample = torch.ones(1, 4, 8, 8)
    text = torch.ones(1, 77, 32)

    @torch.no_grad()
    def output(*lora: str) -> torch.Tensor:
        unet = load(tiny_model, lora=lora).unet
        return unet(sample, 10, encoder_hidden_states=text).sample

    plain, full = output(), output(str(file))
    assert not torch.allclose(plain, full)
    assert torch.allclose(output(f"{tmp_path / 'lora'}@0"), plain, atol=1e-6)
    assert torch.allclose(output(f"{file}@0.25", f"{file}@0.75"), full, atol=1e-5)


@pytest.mark.parametrize("number", [0, 2])
def test_a_lora_folder_must_hold_one_file(tiny_model: Path, tmp_path: Path, number: int) -> None:
    for index in range(number):
        (tmp_path / f"{index}.safetensors").touch()
    with pytest.raises(ValueError, match=rf"`lora` must be .* got '{tmp_path}' with {number}\."):
        load(tiny_model, lora=(str(tmp_path),))


@pytest.mark.parametrize("name", [None, "a", "unet.down.lora_A.weight"])
def test_a_lora_of_another_model_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, name: str | None
) -> None:
    file = tmp_path / "foreign.safetensors"
    save_file({} if name is None else {name: torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"`lora` '.*foreign\.safetensors' cannot be loaded: "):
        load(tiny_model, lora=(str(file),))


def save_lora(pipe: Any, folder: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet.add_adapter(
            LoraConfig(r=2, init_lora_weights="gaussian", target_modules=["to_q", "to_k"])
        )
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    layers = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(str(folder), unet_lora_layers=layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "Foo"}, "`scheduler` must be one of .*DDIM.*, got 'Foo'"),
        ({"vae": "./none"}, "`vae` must exist, got './none'"),
        ({"lora": ("./none",)}, "`lora` must exist"),
        ({"device": "cuda:99"}, "`device` must be available, got 'cuda:99'"),
        ({"device": "meta"}, "`device` must be available, got 'meta'"),
        ({"lora": ("a@nan",)}, "`lora` must be name@scale with a finite number"),
        ({"attention_backend": "efficient"}, "`attention_backend` 'efficient' cannot be used"),
        ({"variant": "fp16"}, "cannot be loaded"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tiny_model: Path, changes: dict[str, Any], message: str
) -> None:
    if changes.get("device") and torch.cuda.device_count() > 99:
        pytest.skip("this machine has that GPU")
    values: dict[str, Any] = {"device": "cpu", **changes}
    with pytest.raises(ValueError, match=message):
        load_pipeline(GenerateOptions(out="-", model=str(tiny_model), **values))


def test_a_vae_must_be_one(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="`vae` must be an autoencoder, got UNet2DConditionModel"):
        load(tiny_model, vae=str(tiny_model / "unet"))
    with pytest.raises(ValueError, match=r"`vae` must be a folder with a config\.json"):
        load(tiny_model, vae=str(tiny_model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/model", "`model` must exist, got '/nowhere/model'"),
        ("./model.safetensors", "`model` must exist"),
        ("name", "`model` must exist, got 'name'"),
        (
            "some-owner/some-model",
            r"is not in the local hub cache, and its model_index\.json cannot be fetched",
        ),
    ],
)
def test_absent_models_are_refused(model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(model)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without a model_index\.json"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"must be a file that ends in \.safetensors or \.ckpt"):
        load(tmp_path / "notes.txt")


def test_other_pipelines_are_refused(copied_model: Path) -> None:
    file = copied_model / "model_index.json"
    index = json.loads(file.read_text())
    no_unet = {name: entry for name, entry in index.items() if name != "unet"}
    for content, message in (
        (no_unet, "must be a pipeline with a UNet or a transformer, got a StableDiffusionPipeline"),
        (None, "model_index.json must hold a JSON object, got NoneType"),
        ([], "model_index.json must hold a JSON object, got list"),
        ({}, "`model` must be a pipeline of diffusers .*, got None in "),
        (index | {"_class_name": "Nope"}, "`model` must be a pipeline of diffusers .*, got 'Nope'"),
        (index | {"_class_name": "StableDiffusionImg2ImgPipeline"}, "must be a text-to-image pipe"),
        (index | {"unet": [5]}, "`model` .* cannot be loaded: "),
        (index | {"../vae": index["vae"]}, "must name folders beside it, got '../vae'"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load(copied_model)


def test_damaged_components_are_refused_by_name(copied_model: Path) -> None:
    file = copied_model / "unet" / "config.json"
    config = json.loads(file.read_text())
    for content, message in (
        (None, "unet/config.json must hold a JSON object, got NoneType"),
        (
            config | {"attention_head_dim": 0},
            "cannot be loaded: integer division or modulo by zero",
        ),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load(copied_model)
    file.write_text(json.dumps(config))
    shutil.rmtree(copied_model / "tokenizer")
    with pytest.raises(ValueError, match="`model` must hold a folder 'tokenizer', got "):
        load(copied_model)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "x"}, "one of epsilon, .* got 'x'"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "must be a number"),
        ("scheduler/scheduler_config.json", {"beta_schedule": 1}, "must be text"),
        ("vae/config.json", {"scaling_factor": "x"}, "must be a number, such as 0.18215, got 'x'"),
        ("vae/config.json", {"scaling_factor": None}, "must be a number"),
        ("vae/config.json", {"scaling_factor": [1]}, "must be a number"),
        ("vae/config.json", {"layers_per_block": 10**30}, "must be below 1,048,576"),
        ("unet/config.json", {"layers_per_block": [10**30] * 4}, "must be below 1,048,576"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**30}, "must be below 1,048,576"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, r"in \[1, 77\].*got 'x'"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, r"in \[1, 77\]"),
    ],
)
def test_settings_that_would_fail_only_during_generation(
    copied_model: Path, file: str, change: dict[str, Any], message: str
) -> None:
    path = copied_model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (name,) = change
    with pytest.raises(ValueError, match=rf"`{name}` .*{file}.* {message}") as caught:
        load(copied_model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("vae", "layers_per_block"),
        ("text_encoder", "num_hidden_layers"),
        ("text_encoder", "intermediate_size"),
    ],
)
def test_networks_larger_than_their_files_are_not_built(
    copied_model: Path, component: str, name: str
) -> None:
    path = copied_model / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 1_000_000}))
    with pytest.raises(
        ValueError,
        match=rf"/{component}' cannot be loaded: .* more weights than its files can hold",
    ):
        load(copied_model)


def test_a_component_without_settings(copied_model: Path) -> None:
    path = copied_model / "scheduler" / "scheduler_config.json"
    path.write_text("{}")
    with pytest.raises(
        ValueError, match=rf"`_class_name` in {path} must be .* 'PNDMScheduler', got none"
    ):
        load(copied_model)


def test_a_tokenizer_without_settings(copied_model: Path) -> None:
    (copied_model / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`model_max_length` .*tokenizer_config\.json must be in"):
        load(copied_model)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_integer_weights_are_refused(copied_model: Path, component: str) -> None:
    path = next((copied_model / component).glob("*.safetensors"))
    weights = {name: value.to(torch.int32) for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"/{component}' cannot be loaded: .* floating"):
        load(copied_model)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_weights_that_are_not_finite_are_refused(copied_model: Path, value: float) -> None:
    path = copied_model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"][0] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"/vae' .* finite in torch\.float16, got decoder\.conv_out"
    ):
        load(copied_model, dtype="float16")


@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_damaged_weights_are_refused_on_one_line(copied_model: Path, damage: str) -> None:
    weights = copied_model / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "garbage":
        weights.write_bytes(b"garbage")
    else:
        weights.unlink()
    with pytest.raises(ValueError, match=r"`model` .* cannot be loaded: ") as caught:
        load(copied_model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "another shape"])
def test_weights_that_do_not_fit_are_refused(
    copied_model: Path, component: str, fault: str
) -> None:
    path = next((copied_model / component).glob("*.safetensors"))
    weights = load_file(path)
    name = next(name for name, value in weights.items() if value.ndim >= 2)
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        name = "renamed.weight"
        weights[name] = torch.zeros(1)
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, metadata={"format": "pt"})
    name = name.removeprefix("text_model.")
    with pytest.raises(ValueError, match=rf"/{component}' cannot be loaded: .*{name}") as caught:
        load(copied_model)
    assert "\n" not in str(caught.value)


def test_position_ids_of_older_checkpoints_are_no_fault(copied_model: Path) -> None:
    path = copied_model / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, metadata={"format": "pt"})
    load(copied_model)


def test_a_chosen_autoencoder_must_have_all_its_weights(
    tiny_model: Path, copied_model: Path
) -> None:
    path = next((copied_model / "vae").glob("*.safetensors"))
    weights = load_file(path)
    del weights["encoder.conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"`vae` .* missing encoder\.conv_in\.weight"):
        load(tiny_model, vae=str(copied_model / "vae"))


def test_identity_is_that_of_the_content(tiny_model: Path, copied_model: Path) -> None:
    identity = files_identity(tiny_model)
    assert files_identity(copied_model) == identity
    assert "unet/diffusion_pytorch_model.safetensors" in identity["files"]

    (copied_model / "README.txt").write_text("not part of the model")
    (copied_model / "sample.json").write_text("{}")
    assert files_identity(copied_model) == identity

    weights = copied_model / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = files_identity(copied_model)
    assert changed["sha256"] != identity["sha256"]
    assert [k for k, v in changed["files"].items() if v != identity["files"][k]] == [
        "vae/diffusion_pytorch_model.safetensors"
    ]


def test_identity_of_a_file_does_not_depend_on_its_name(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"weights")
    assert files_identity(tmp_path / "a.safetensors") == files_identity(tmp_path / "b.safetensors")


def test_lora_scales() -> None:
    assert split_lora("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert split_lora("a@b@0.5") == ("a@b", 0.5)
    with pytest.raises(ValueError, match="`lora` must be name@scale"):
        split_lora("a@b")
