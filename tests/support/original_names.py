"""Weights of diffusers' modules under the names of Stability AI and of latent diffusion."""

import re

import torch


def stability_names(model):
    """SD3's: queries, keys and values in one map, and shift before scale everywhere."""
    state = {name: x.detach() for name, x in model.state_dict().items()}
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}.norm1_context"
    found = {}
    for name, x in state.items():
        new = name
        for pattern, replacement in SD3_NAMES:
            new = re.sub(pattern, replacement, new)
        if name.startswith(("norm_out", last)):
            x = torch.cat(x.chunk(2)[::-1])
        if match := re.search(r"\.(to_q|add_q_proj)\.", name):
            parts = (match[1].replace("q", part) for part in "qkv")
            x = torch.cat([state[name.replace(match[1], part)] for part in parts])
        if not re.search(r"\.(to_[kv]|add_[kv]_proj)\.", name):
            assert new not in found
            found[new] = x.clone()
    return found


SD3_NAMES = (
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
    (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
    (r"\.(attn2?)\.to_q", r".x_block.\1.qkv"),
    (r"\.(attn2?)\.to_out\.0", r".x_block.\1.proj"),
    (r"\.(attn2?)\.norm_([qk])", r".x_block.\1.ln_\2"),
    (r"\.attn\.add_q_proj", ".context_block.attn.qkv"),
    (r"\.attn\.to_add_out", ".context_block.attn.proj"),
    (r"\.attn\.norm_added_([qk])", r".context_block.attn.ln_\1"),
    (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
    (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
    (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
    (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
)


def latent_diffusion_names(model):
    """An AutoencoderKL's: the decoder's levels are counted from full resolution, and attention's
    maps are 1×1 convolutions.
    """
    last = len(model.decoder.up_blocks) - 1
    found = {}
    for name, x in model.state_dict().items():
        new = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{last - int(match[1])}", name)
        for pattern, replacement in LDM_NAMES:
            new = re.sub(pattern, replacement, new)
        assert new not in found
        is_map = "attentions" in name and x.ndim == 2
        found[new] = (x[:, :, None, None] if is_map else x).clone()
    return found


LDM_NAMES = (
    (r"down_blocks\.", "down."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"\.resnets\.", ".block."),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
