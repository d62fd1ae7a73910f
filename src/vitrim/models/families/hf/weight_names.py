"""The names of the same weights in timm and in Hugging Face transformers, and how each library lays them out."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...adapter import State
from .layout import Layout

_SAME = (("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
_POSITIONS = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")


def in_timm_names(layout: Layout, state: State, first: str, own: State) -> Iterator[tuple[str, Tensor]]:
    """Weights of transformers as timm names and shapes them.

    Args:
        layout: of the model of transformers.
        state: its weights.
        first: how the names of its tower begin: nothing, or the name of the tower and a dot.
        own: weights of the new model of timm, for their shapes.
    """
    for theirs, ours in _names(layout, state, first, own):
        if theirs in state:
            value = state[theirs]
            yield ours, value.reshape(own[ours].shape) if ours in own and value.numel() == own[ours].numel() else value
    positions = next((state[first + name] for name in _POSITIONS if first + name in state), None)
    if positions is not None and "pos_embed" in own:
        positions = positions.reshape(1, -1, positions.shape[-1])
        extra = positions.shape[1] - own["pos_embed"].shape[1]
        yield "pos_embed", positions[:, extra:]
        if extra:  # timm has no position for CLS.
            yield "cls_token", state[f"{first}embeddings.cls_token"] + positions[:, :1]
    for block in range(_depth(own)):
        attn = f"{first}{layout.layers}.{block}.{layout.parts[0]}."
        for part in ("weight", "bias"):
            rows = [state.get(f"{attn}{one}_proj.{part}") for one in "qkv"]
            there = next((row for row in rows if row is not None), None)
            if there is not None:
                whole = [torch.zeros_like(there) if row is None else row for row in rows]
                yield f"blocks.{block}.attn.qkv.{part}", torch.cat(whole)
                if part == "bias":
                    for one, row in zip("qkv", whole, strict=True):
                        yield f"blocks.{block}.attn.{one}_bias", row
    if f"{first}head.attention.in_proj_weight" in state:
        for part in ("weight", "bias"):
            query, *others = state[f"{first}head.attention.in_proj_{part}"].chunk(3)
            yield f"attn_pool.q.{part}", query
            yield f"attn_pool.kv.{part}", torch.cat(others)


def in_transformers_names(layout: Layout, state: State, first: str, own: State) -> Iterator[tuple[str, Tensor]]:
    """Weights of timm as transformers names and shapes them; the arguments are those of `in_timm_names`, turned round.

    Args:
        layout: of the new model of transformers.
        state: the weights of timm.
        first: how the names of the tower begin.
        own: weights of the new model, for their shapes.
    """
    for theirs, ours in _names(layout, own, first, state):
        if ours in state and theirs in own:
            yield theirs, state[ours].reshape(own[theirs].shape)
    for name in _POSITIONS:
        if first + name in own and "pos_embed" in state:
            table, wanted = state["pos_embed"], own[first + name]
            missing = wanted.numel() // table.shape[-1] - table.shape[1]
            table = torch.cat([table.new_zeros(1, missing, table.shape[-1]), table], 1)  # timm has none for CLS.
            yield first + name, table.reshape(wanted.shape)
    for block in range(_depth(state)):
        attn = f"{first}{layout.layers}.{block}.{layout.parts[0]}."
        for part in ("weight", "bias"):
            whole = state.get(f"blocks.{block}.attn.qkv.{part}")
            for at, one in enumerate("qkv"):
                row = state.get(f"blocks.{block}.attn.{one}_bias") if whole is None else whole.chunk(3)[at]
                if row is not None:
                    yield f"{attn}{one}_proj.{part}", row
    if "attn_pool.q.weight" in state:
        for part in ("weight", "bias"):
            query_key_value = torch.cat([state[f"attn_pool.q.{part}"], state[f"attn_pool.kv.{part}"]])
            yield f"{first}head.attention.in_proj_{part}", query_key_value


def _names(layout: Layout, theirs: State, first: str, ours: State) -> Iterator[tuple[str, str]]:
    """Names in transformers and in timm of the tensors that are the same in both, up to their shape."""
    yield f"{first}embeddings.cls_token", "cls_token"
    yield f"{first}embeddings.class_embedding", "cls_token"
    yield f"{first}embeddings.register_tokens", "reg_token"
    for part in ("weight", "bias"):
        yield f"{first}{layout.projection}.{part}", f"patch_embed.proj.{part}"
        yield f"{first}{layout.final_norm or 'post_layernorm'}.{part}", f"norm.{part}"
        yield f"{first}pre_layrnorm.{part}", f"norm_pre.{part}"
        yield f"classifier.{part}", f"head.{part}"
        yield f"visual_projection.{part}", f"head.{part}"
        for a, b in (("attention.out_proj", "proj"), ("layernorm", "norm"), *_SAME):
            yield f"{first}head.{a}.{part}", f"attn_pool.{b}.{part}"
    yield f"{first}head.probe", "attn_pool.latent"
    for block in range(_depth(ours)):
        start, mine = f"{first}{layout.layers}.{block}.", f"blocks.{block}."
        attn, mlp = (start + name for name in layout.parts)
        for half in (1, 2):
            yield f"{start}layer_scale{half}.lambda1", f"{mine}ls{half}.gamma"
            yield f"{start}layer_scale{half}.lambda1", f"{mine}gamma_{half}"
        for part in ("weight", "bias"):
            yield f"{start}{layout.norms[0]}.{part}", f"{mine}norm1.{part}"
            yield f"{start}{layout.norms[1]}.{part}", f"{mine}norm2.{part}"
            yield f"{attn}.{layout.out}.{part}", f"{mine}attn.proj.{part}"
            for a, b in (("fc1", "fc1"), ("fc2", "fc2"), ("up_proj", "fc1"), ("down_proj", "fc2")):
                yield f"{mlp}.{a}.{part}", f"{mine}mlp.{b}.{part}"


def _depth(ours: State) -> int:
    return 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("blocks."))
