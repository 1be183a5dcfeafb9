# SPDX-License-Identifier: Apache-2.0
"""Real transformer classes of diffusers with tiny random-weight configurations, and inputs for them."""

import dataclasses
from collections.abc import Callable

import torch

GRID = (3, 6, 8)  # frames, rows and columns of tokens: 144, no multiple of a query block, tiles are cut at every edge
TOKENS = 144
BATCH = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """name: of the family. build: a model in eval mode. inputs: keyword arguments of one call, batch of two.

    text: tokens of text in the attended sequence, per batch entry.
    text_first: they stand before the video.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict]
    text: tuple[int, int] = (0, 0)
    text_first: bool = False

    def __str__(self):
        return self.name


def wan(heads=2, head_dim=24, layers=3, image=False, **config):
    from diffusers import WanTransformer3DModel

    options = {"in_channels": 4, "out_channels": 4}
    if image:
        options |= {"image_dim": 12, "added_kv_proj_dim": heads * head_dim}
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
        **options | config,
    ).eval()


def wan_inputs(batch=BATCH, timestep=900.0, image=False, grid=GRID, seed=1):
    random = torch.Generator().manual_seed(seed)
    frames, rows, columns = grid
    # The image-to-video processor takes everything before the last 512 tokens for image tokens.
    inputs = {
        "hidden_states": torch.randn(batch, 4, frames, 2 * rows, 2 * columns, generator=random),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, 512 if image else 7, 16, generator=random),
    }
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 5, 12, generator=random)
    return inputs


def wan_ti2v_inputs():
    """Wan 2.2 5B: a timestep per token, 0 where a frame is given."""
    timestep = torch.full((BATCH, TOKENS), 900.0)
    timestep[:, : TOKENS // GRID[0]] = 0
    return wan_inputs() | {"timestep": timestep}


def hunyuan():
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    ).eval()


def hunyuan_inputs():
    random = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(BATCH, 4, *GRID, generator=random),
        "timestep": torch.tensor([700.0, 700.0]),
        "encoder_hidden_states": torch.randn(BATCH, 9, 16, generator=random),
        "encoder_attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5]),
        "pooled_projections": torch.randn(BATCH, 8, generator=random),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def hunyuan15():
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 4, 4),
        target_size=16,
        task_type="t2v",
    ).eval()


def hunyuan15_inputs():
    random = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(BATCH, 4, *GRID, generator=random),
        "timestep": torch.tensor([700.0, 700.0]),
        "encoder_hidden_states": torch.randn(BATCH, 6, 16, generator=random),
        "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 2 + [0] * 4]),
        "encoder_hidden_states_2": torch.randn(BATCH, 4, 8, generator=random),
        "encoder_attention_mask_2": torch.tensor([[1] * 4, [1] * 3 + [0]]),
        "image_embeds": torch.zeros(BATCH, 3, 12),
    }


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=16,
        sample_height=12,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    ).eval()


def cogvideox_inputs():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    random = torch.Generator().manual_seed(4)
    frames, rows, columns = GRID
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (rows, columns)), (rows, columns), frames)
    return {
        "hidden_states": torch.randn(BATCH, frames, 4, 2 * rows, 2 * columns, generator=random),
        "encoder_hidden_states": torch.randn(BATCH, 8, 8, generator=random),
        "timestep": torch.tensor([700, 700]),
        "image_rotary_emb": rotary,
    }


def mochi():
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        qk_norm="rms_norm",
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    ).eval()


def mochi_inputs():
    random = torch.Generator().manual_seed(5)
    frames, rows, columns = GRID
    return {
        "hidden_states": torch.randn(BATCH, 4, frames, 2 * rows, 2 * columns, generator=random),
        "encoder_hidden_states": torch.randn(BATCH, 9, 16, generator=random),
        "timestep": torch.tensor([300.0, 300.0]),
        "encoder_attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4], dtype=torch.bool),
    }


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
    ).eval()


def ltx_inputs():
    random = torch.Generator().manual_seed(6)
    frames, rows, columns = GRID
    return {
        "hidden_states": torch.randn(BATCH, TOKENS, 4, generator=random),
        "encoder_hidden_states": torch.randn(BATCH, 7, 16, generator=random),
        "timestep": torch.tensor([700.0, 700.0]),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4]),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


CASES = (
    Case("wan", wan, wan_inputs),
    Case("wan-i2v", lambda: wan(image=True), lambda: wan_inputs(image=True)),
    Case("wan-ti2v", wan, wan_ti2v_inputs),
    Case("hunyuan", hunyuan, hunyuan_inputs, text=(9, 4)),
    Case("hunyuan15", hunyuan15, hunyuan15_inputs, text=(10, 5)),
    Case("cogvideox", cogvideox, cogvideox_inputs, text=(8, 8), text_first=True),
    Case("mochi", mochi, mochi_inputs, text=(9, 5)),
    Case("ltx", ltx, ltx_inputs),
)


def wan_pipeline(**options):
    """A real WanPipeline without text encoder and VAE: prompts are given as embeddings, results are latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": wan(layers=2)}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(**parts | options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_wan(pipe, steps=6, guidance=5.0, **options):
    """One run of 5 frames of 64 x 64: a token grid of 2 x 4 x 4. Returns the latents."""
    random = torch.Generator().manual_seed(7)
    embeds = {
        "prompt_embeds": torch.randn(1, 7, 16, generator=random),
        "negative_prompt_embeds": torch.randn(1, 7, 16, generator=random),
    }
    size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": steps}
    arguments = {"guidance_scale": guidance, "generator": random, "output_type": "latent"} | embeds | size
    return pipe(**arguments | options).frames
