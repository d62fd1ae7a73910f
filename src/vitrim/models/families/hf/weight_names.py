"""The names of the same weights in timm and in Hugging Face transformers, and how each library lays them out."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...adapter import State
from .layout import Layout

Named = Iterator[tuple[str, Tensor, tuple[str, ...]]]
"""A name in the new model, its value, and the names of the weights of the old one that it is made of."""
_SAME = (("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
POSITIONS = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")
"""Names in a tower of transformers."""


def in_timm_names(layout: Layout, state: State, first: str, own: State) -> Named:
    """Weights of transformers as timm names and shapes them.

    Args:
        layout: of the model of transformers.
        state: its weights.
        first: how the names of its tower begin: nothing, or the name of the tower and a dot.
        own: weights of the new model of timm, for their shapes.
    """
    for theirs, ours in _names(layout, state, first, own):
        if theirs in state:
            yield ours, _shaped(state[theirs], own.get(ours)), (theirs,)
    at = next((first + name for name in POSITIONS if first + name in state), None)
    if at is not None and "pos_embed" in own:
        positions = state[at].reshape(1, -1, state[at].shape[-1])
        extra = positions.shape[1] - own["pos_embed"].shape[1]
        yield "pos_embed", positions[:, max(0, extra) :], (at,)
        if extra == 1:  # timm has no position for CLS.
            yield "cls_token", state[f"{first}embeddings.cls_token"] + positions[:, :1], (at,)
    for block in range(_depth(own)):
        attn = f"{first}{layout.layers}.{block}.{layout.parts[0]}."
        for part in ("weight", "bias"):
            rows = {one: state.get(f"{attn}{one}_proj.{part}") for one in "qkv"}
            read = tuple(f"{attn}{one}_proj.{part}" for one in "qkv" if rows[one] is not None)
            if read:
                whole = [torch.zeros_like(state[read[0]]) if row is None else row for row in rows.values()]
                yield f"blocks.{block}.attn.qkv.{part}", torch.cat(whole), read
                for one, row in zip("qkv", whole, strict=True):
                    name = f"{attn}{one}_proj.{part}"
                    yield f"blocks.{block}.attn.{one}_{part}", row, (name,) if name in read else ()
    for part in ("weight", "bias"):
        name = f"{first}head.attention.in_proj_{part}"
        if name in state:
            query, *others = state[name].chunk(3)
            yield f"attn_pool.q.{part}", query, (name,)
            yield f"attn_pool.kv.{part}", torch.cat(others), (name,)


def in_transformers_names(layout: Layout, state: State, first: str, own: State) -> Named:
    """Weights of timm as transformers names and shapes them; the arguments are those of `in_timm_names`, turned round.

    Args:
        layout: of the new model of transformers.
        state: the weights of timm.
        first: how the names of the tower begin.
        own: weights of the new model, for their shapes.
    """
    for theirs, ours in _names(layout, own, first, state):
        if ours in state:
            yield theirs, _shaped(state[ours], own.get(theirs)), (ours,)
    for name in POSITIONS:
        if first + name in own and "pos_embed" in state:
            table, wanted = state["pos_embed"], own[first + name]
            missing = max(0, wanted.numel() // table.shape[-1] - table.shape[1])
            table = torch.cat([table.new_zeros(1, missing, table.shape[-1]), table], 1)  # timm has none for CLS.
            yield first + name, _shaped(table, wanted), ("pos_embed",)
    for block in range(_depth(state)):
        attn = f"{first}{layout.layers}.{block}.{layout.parts[0]}."
        for part in ("weight", "bias"):
            for at, one in enumerate("qkv"):
                target, mine = f"{attn}{one}_proj.{part}", f"blocks.{block}.attn."
                if (whole := f"{mine}qkv.{part}") in state:
                    yield target, state[whole].chunk(3)[at], (whole,)
                for alone in (f"{mine}{one}_proj.{part}", f"{mine}{one}_bias" if part == "bias" else ""):
                    if alone in state:
                        yield target, state[alone], (alone,)
    for part in ("weight", "bias"):
        names = f"attn_pool.q.{part}", f"attn_pool.kv.{part}"
        if all(name in state for name in names):
            yield f"{first}head.attention.in_proj_{part}", torch.cat([state[name] for name in names]), names


def _shaped(value: Tensor, like: Tensor | None) -> Tensor:
    """In the shape of another one, where that has as many values."""
    return value if like is None or value.numel() != like.numel() else value.reshape(like.shape)


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
