"""Tiny components for any pipeline with a UNet, chosen by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel
from diffusers.pipelines.onnx_utils import OnnxRuntimeModel

from tests.conformance.discovery import find_class
from tests.tiny_models import tiny_tokenizer

WIDTH = 32
"""Channels of text and image embeddings, and of the UNet's finest level."""
LATENT = 16
"""Height and width of the latents."""
PIXELS = 2 * LATENT

Make = Callable[["Pipeline"], Any]


class Pipeline:
    """A pipeline class, and what is already built of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cls = find_class(name)
        self.parameters = dict(inspect.signature(self.cls.__init__).parameters)
        del self.parameters["self"]
        self.is_sdxl = "tokenizer_2" in self.parameters and "XL" in name
        self.is_kolors = name.startswith("Kolors")
        self._built: dict[str, Any] = {}

    def component(self, name: str) -> Any:
        """The component of that name; built once, from the seed of its name."""
        if name not in self._built:
            with torch.random.fork_rng():
                torch.manual_seed(sum(map(ord, name)))
                made = COMPONENTS[name](self)
            self._built[name] = made.eval() if isinstance(made, torch.nn.Module) else made
        return self._built[name]

    def build(self) -> Any:
        """The pipeline."""
        given = {}
        for name, parameter in self.parameters.items():
            is_optional = parameter.default is not parameter.empty
            if name == "requires_safety_checker":
                given[name] = False
            elif name in OPTIONS.get(self.name, {}):
                given[name] = OPTIONS[self.name][name]
            elif name in COMPONENTS and not (is_optional and name in OPTIONAL):
                given[name] = self.component(name)
            elif not is_optional:
                given[name] = None
        pipe = self.cls(**given)
        pipe.set_progress_bar_config(disable=True)
        return pipe


OPTIONAL = {"image_encoder", "feature_extractor"}
"""Left out where the pipeline works without them, which is without IP-Adapter."""

OPTIONS: dict[str, dict[str, Any]] = {
    "MarigoldDepthPipeline": {"prediction_type": "depth"},
    "MarigoldIntrinsicsPipeline": {
        "prediction_type": "intrinsics",
        "target_properties": {
            "target_names": ["albedo", "shading"],
            "albedo": {"prediction_space": "linear"},
            "shading": {"prediction_space": "linear"},
        },
    },
    "MarigoldNormalsPipeline": {"prediction_type": "normals"},
}


# ---- UNets ------------------------------------------------------------------------------------

_SD: dict[str, Any] = {
    "block_out_channels": (WIDTH, 2 * WIDTH),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "sample_size": LATENT,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_SDXL: dict[str, Any] = {
    **_SD,
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    "use_linear_projection": True,
}
_SIMPLE_CROSS_ATTENTION: dict[str, Any] = {
    **_SD,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
_UNCONDITIONAL: dict[str, Any] = {
    "block_out_channels": (WIDTH, 2 * WIDTH),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "sample_size": LATENT,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
_CHANGES: dict[str, dict[str, Any]] = {
    "LatentConsistency": {"time_cond_proj_dim": WIDTH},
    "Marigold": {"in_channels": 8},
    "MarigoldIntrinsics": {"in_channels": 12, "out_channels": 8},
    "PaintByExample": {"in_channels": 9},
    "StableDiffusionDepth2Img": {"in_channels": 5},
    "StableDiffusionControlNetXS": {"layers_per_block": 2},
    "StableDiffusionXLControlNetXS": {"layers_per_block": 2},
    "StableDiffusionGLIGEN": {"attention_type": "gated"},
    "StableDiffusionGLIGENTextImage": {"attention_type": "gated-text-image"},
    "StableDiffusionInstructPix2Pix": {"in_channels": 8},
    "StableDiffusionXLInstructPix2Pix": {"in_channels": 8},
    "StableDiffusionUpscale": {"in_channels": 7, "num_class_embeds": 1000},
    "StableDiffusionLatentUpscale": {
        "in_channels": 8,
        "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
        "time_embedding_type": "fourier",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
        "norm_num_groups": None,
    },
    "StableUnCLIP": {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2 * WIDTH,
    },
    "AudioLDM": {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": WIDTH,
        "class_embeddings_concat": True,
        "cross_attention_dim": (WIDTH, 2 * WIDTH),  # a second self-attention, as no text is given
    },
    "MusicLDM": {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": WIDTH,
        "class_embeddings_concat": True,
        "cross_attention_dim": (WIDTH, 2 * WIDTH),  # a second self-attention, as no text is given
    },
}
"""By the beginning of a pipeline's name; the longest applies."""


def _unet(pipeline: Pipeline) -> Any:
    annotation = str(pipeline.parameters["unet"].annotation)
    if pipeline.name.startswith(("IF", "Kandinsky")) and "Kandinsky3" not in annotation:
        return diffusers.UNet2DConditionModel(**_SIMPLE_CROSS_ATTENTION)
    if "UNet2DConditionModel" in annotation and "AudioLDM2" not in annotation:
        base = _SDXL if pipeline.is_sdxl or pipeline.is_kolors else _SD
        begins = [begin for begin in _CHANGES if pipeline.name.startswith(begin)]
        changes = _CHANGES[max(begins, key=len)] if begins else {}
        return diffusers.UNet2DConditionModel(**{**base, **changes})
    for kind, make in _OTHER_UNETS.items():
        if kind in annotation:
            return make()
    raise ValueError(f"{pipeline.name} must have a known UNet, got {annotation}.")


_OTHER_UNETS: dict[str, Callable[[], Any]] = {
    "UNet2DModel": lambda: diffusers.UNet2DModel(**_UNCONDITIONAL),
    "UNet1DModel": lambda: diffusers.UNet1DModel(
        block_out_channels=(WIDTH, WIDTH, 2 * WIDTH), extra_in_channels=16, sample_size=512
    ),
    "UNet3DConditionModel": lambda: diffusers.UNet3DConditionModel(
        **{
            **_SD,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        }
    ),
    "I2VGenXLUNet": lambda: diffusers.I2VGenXLUNet(
        **{
            **_SD,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        }
    ),
    "UNetSpatioTemporalConditionModel": lambda: diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(WIDTH, 2 * WIDTH),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4),
        sample_size=LATENT,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ),
    "Kandinsky3UNet": lambda: diffusers.Kandinsky3UNet(
        time_embedding_dim=WIDTH,
        groups=4,
        attention_head_dim=4,
        layers_per_block=1,
        block_out_channels=(WIDTH, WIDTH, WIDTH, WIDTH),
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
    ),
    "AudioLDM2UNet2DConditionModel": lambda: diffusers.AudioLDM2UNet2DConditionModel(
        **{**_SD, "cross_attention_dim": ((None, WIDTH, WIDTH), (None, WIDTH, WIDTH))}
    ),
    "UniDiffuserModel": lambda: diffusers.UniDiffuserModel(
        text_dim=WIDTH,
        clip_img_dim=WIDTH,
        num_text_tokens=77,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=LATENT,
        patch_size=2,
        activation_fn="gelu",
        norm_type="layer_norm",
    ),
    "DreamLiteUNetModel": lambda: diffusers.DreamLiteUNetModel(),
    "OnnxRuntimeModel": lambda: OnnxRuntimeModel(model=None),
}


# ---- text, images, latents --------------------------------------------------------------------


def _text_config() -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
    )


def _text_encoder(pipeline: Pipeline) -> Any:
    if pipeline.name == "MusicLDMPipeline":
        return transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=_text_config().to_dict(), vision_config=_vision_config().to_dict()
            )
        )
    if "qformer" in pipeline.parameters:
        return ContextCLIPTextModel(_text_config())
    return None if pipeline.is_kolors else transformers.CLIPTextModel(_text_config())


def _projected_text_encoder(pipeline: Pipeline) -> Any:
    return transformers.CLIPTextModelWithProjection(_text_config())


def _tokenizer(pipeline: Pipeline) -> Any:
    return None if pipeline.is_kolors else tiny_tokenizer()


def _vision_config() -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=8,
    )


def _image_encoder(pipeline: Pipeline) -> Any:
    config = _vision_config()
    if pipeline.name == "PaintByExamplePipeline":
        from diffusers.pipelines.deprecated.paint_by_example.image_encoder import (
            PaintByExampleImageEncoder,
        )

        return PaintByExampleImageEncoder(config, proj_size=WIDTH)
    if pipeline.name == "StableVideoDiffusionPipeline":
        config.image_size = 224  # it resizes every image to this
    return transformers.CLIPVisionModelWithProjection(config)


def _feature_extractor(pipeline: Pipeline) -> Any:
    size = {"height": PIXELS, "width": PIXELS}
    return transformers.CLIPImageProcessor(crop_size=size, size={"shortest_edge": PIXELS})


def _vae(pipeline: Pipeline) -> Any:
    colours = 6 if "LDM3D" in pipeline.name else 1 if "vocoder" in pipeline.parameters else 3
    return diffusers.AutoencoderKL(
        in_channels=colours,
        out_channels=colours,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=PIXELS,
    )


# ---- schedulers -------------------------------------------------------------------------------

_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SCHEDULERS: dict[str, Callable[[], Any]] = {
    "LatentConsistencyModel": lambda: diffusers.LCMScheduler(**_SCHEDULE),
    "LEditsPP": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, **_SCHEDULE
    ),
    "StableDiffusionParadigms": lambda: diffusers.DDIMParallelScheduler(**_SCHEDULE),
    "StableDiffusionXL": lambda: diffusers.EulerDiscreteScheduler(steps_offset=1, **_SCHEDULE),
    "StableVideoDiffusion": lambda: diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
        **_SCHEDULE,
    ),
    "ConsistencyModel": lambda: diffusers.CMStochasticIterativeScheduler(),
    "DDPM": lambda: diffusers.DDPMScheduler(),
    "KarrasVe": lambda: diffusers.KarrasVeScheduler(),
    "RePaint": lambda: diffusers.RePaintScheduler(),
    "ScoreSdeVe": lambda: diffusers.ScoreSdeVeScheduler(),
}


def _scheduler(pipeline: Pipeline) -> Any:
    for begin, make in _SCHEDULERS.items():
        if pipeline.name.startswith(begin):
            return make()
    return diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, **_SCHEDULE
    )


# ---- what is added to a UNet ------------------------------------------------------------------


_UNION_OPTIONS = (
    *("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim"),
    *("attention_head_dim", "down_block_types", "addition_embed_type", "addition_time_embed_dim"),
    *("projection_class_embeddings_input_dim", "use_linear_projection"),
)


def _controlnet(pipeline: Pipeline) -> Any:
    unet = pipeline.component("unet")
    if "XS" in pipeline.name:
        return diffusers.ControlNetXSAdapter.from_unet(
            unet, size_ratio=1, conditioning_embedding_out_channels=(8, 8)
        )
    if "Union" in pipeline.name:
        return diffusers.ControlNetUnionModel(
            **{name: unet.config[name] for name in _UNION_OPTIONS},
            conditioning_embedding_out_channels=(8, 8),
            num_trans_channel=WIDTH,
            num_proj_channel=WIDTH,
            num_trans_head=4,
        )
    if "Sparse" in pipeline.name:
        config = {
            name: _SD[name]
            for name in ("block_out_channels", "layers_per_block", "norm_num_groups")
        }
        return diffusers.SparseControlNetModel(
            **config,
            in_channels=4,
            conditioning_channels=3,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            cross_attention_dim=WIDTH,
            conditioning_embedding_out_channels=(8, 8),
            concat_conditioning_mask=True,
            use_simplified_condition_embedding=False,
        )
    return diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))


def _motion_adapter(pipeline: Pipeline) -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=(WIDTH, 2 * WIDTH),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
        conv_in_channels=9 if pipeline.name == "PIAPipeline" else None,
    )


def _adapter(pipeline: Pipeline) -> Any:
    return diffusers.T2IAdapter(
        in_channels=3,
        channels=[WIDTH, 2 * WIDTH],
        num_res_blocks=1,
        downscale_factor=2,
        adapter_type="full_adapter",
    )


def _prior(pipeline: Pipeline) -> Any:
    return diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1
    )


def _text_decoder(pipeline: Pipeline) -> Any:
    from diffusers.pipelines.deprecated.unidiffuser.modeling_text_decoder import (
        UniDiffuserTextDecoder,
    )

    return UniDiffuserTextDecoder(
        prefix_length=77, prefix_inner_dim=WIDTH, n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=514
    )


class _QFormer(torch.nn.Module):
    """Stands in for BLIP-2's Q-Former, which takes its tokenizer from the hub."""

    config = SimpleNamespace(num_query_tokens=4)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.queries = torch.nn.Parameter(torch.randn(1, 4, WIDTH))

    def forward(self, **_: Any) -> torch.Tensor:
        return self.queries


def _image_processor(pipeline: Pipeline) -> Any:
    if "qformer" in pipeline.parameters:
        size = {"height": PIXELS, "width": PIXELS}
        return BlipImageProcessor(size=size, do_center_crop=False)
    return transformers.CLIPProcessor(_feature_extractor(pipeline), tiny_tokenizer())


def _image_project(pipeline: Pipeline) -> Any:
    from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

    return CLIPImageProjection(hidden_size=WIDTH)


def _normalizer(pipeline: Pipeline) -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    return StableUnCLIPImageNormalizer(embedding_dim=WIDTH)


def _vocoder(pipeline: Pipeline) -> Any:
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            normalize_before=False,
        )
    )


COMPONENTS: dict[str, Make] = {
    "adapter": _adapter,
    "bert": _text_encoder,
    "controlnet": _controlnet,
    "feature_extractor": _feature_extractor,
    "image_encoder": _image_encoder,
    "image_noising_scheduler": lambda _: diffusers.DDPMScheduler(),
    "image_normalizer": _normalizer,
    "image_processor": _image_processor,
    "image_project": _image_project,
    "inverse_scheduler": lambda _: diffusers.DDIMInverseScheduler(clip_sample=False, **_SCHEDULE),
    "language_model": _text_encoder,
    "low_res_scheduler": lambda _: diffusers.DDPMScheduler(),
    "motion_adapter": _motion_adapter,
    "movq": _vae,
    "prior": _prior,
    "prior_scheduler": lambda _: diffusers.UnCLIPScheduler(prediction_type="sample"),
    "prior_text_encoder": _projected_text_encoder,
    "prior_tokenizer": _tokenizer,
    "processor": _image_processor,
    "qformer": lambda _: _QFormer(),
    "scheduler": _scheduler,
    "text_decoder": _text_decoder,
    "text_encoder": _text_encoder,
    "text_encoder_2": _projected_text_encoder,
    "tokenizer": _tokenizer,
    "tokenizer_2": _tokenizer,
    "unet": _unet,
    "vae": _vae,
    "vocoder": _vocoder,
    "vqvae": _vae,
}
"""What is built for a parameter; a parameter that is not here is None, or keeps its default."""
