"""A reduced Vision Transformer written to be obviously right: one image, plain loops, attention matrices, float64.

Shares with the library only timm's own modules for embedding, norms, MLPs and the final layer. Tokens are rows of a
list; each carries the set of input patches behind it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.models import RemovedBranch, adapter_of
from vitrim.tokens import Cluster, Evidence, Plan, Reducer, ToMe, TopK
from vitrim.tokens.scores import SCORES


@dataclass
class Tokens:
    """The residual stream of one image. `members[i]` are the input patches behind patch token i.

    `places[i]` is the input patch at whose place it is, by which rotary positions turn its query and key.
    """

    prefix: list[Tensor]
    patches: list[Tensor]
    members: list[set[int]]
    places: list[int]
    carried: list[float] | None = None
    lost: set[int] = field(default_factory=set)
    parked: dict[int, Tensor] = field(default_factory=dict)

    def rows(self) -> Tensor:
        return torch.stack(self.prefix + self.patches)

    def replace(self, rows: Tensor) -> None:
        self.prefix, self.patches = list(rows[: len(self.prefix)]), list(rows[len(self.prefix) :])

    def reinstate(self) -> None:
        """Every patch back: as it was when it lost its own token, otherwise as the token that it is part of."""
        back = {patch: token for token, members in zip(self.patches, self.members, strict=True) for patch in members}
        back |= self.parked
        self.patches = [back[patch] for patch in sorted(back)]
        self.members, self.lost, self.carried = [{patch} for patch in sorted(back)], set(), None
        self.parked = {}
        self.places = sorted(back)


@dataclass
class View:
    """What a score may read: attention (H, T, T), keys (H, T, D), hidden rows (T, C), all of one image."""

    attention: Tensor
    key: Tensor
    hidden: Tensor
    num_prefix: int
    block: int
    listened: list[float] | None = None

    @property
    def patches(self) -> range:
        return range(self.num_prefix, self.hidden.shape[0])

    @property
    def heads(self) -> range:
        return range(self.key.shape[0])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cls_attention(v: View) -> list[float]:
    return [_mean([v.attention[h, 0, i].item() for h in v.heads]) for i in v.patches]


def _mean_attention(v: View) -> list[float]:
    def received(i: int) -> float:
        return _mean([_mean([v.attention[h, j, i].item() for j in v.patches if j != i]) for h in v.heads])

    return [received(i) for i in v.patches]


def _entropy_gap(v: View) -> list[float]:
    def gap(row: list[float]) -> float:
        return math.log(len(row)) + sum(p * math.log(p) for p in row if p > 0)

    return [_mean([gap(v.attention[h, i].tolist()) for h in v.heads]) for i in v.patches]


def _variance(v: View) -> list[float]:
    def variance(row: list[float]) -> float:
        return _mean([(p - _mean(row)) ** 2 for p in row])

    return [_mean([variance(v.attention[h, i].tolist()) for h in v.heads]) for i in v.patches]


def _sharpness(v: View) -> list[float]:
    return [_mean([max(v.attention[h, i].tolist()) for h in v.heads]) for i in v.patches]


def _length(row: Tensor) -> float:
    return math.sqrt(sum(value * value for value in row.tolist()))


def _gradient(v: View) -> list[float]:
    weight = v.listened or [1.0] * v.hidden.shape[1]
    return [math.sqrt(sum(w * x * x for w, x in zip(weight, v.hidden[i].tolist(), strict=True))) for i in v.patches]


def _random(v: View) -> list[float]:
    # The draw is arbitrary; that it is one fixed draw per block and the same for all images is what matters.
    seen = Evidence(v.num_prefix, v.block, training=False, scale=1.0, hidden_BTC=v.hidden[None])
    return SCORES["random"].compute(seen)[0].tolist()


SCORE_REFERENCES: dict[str, Callable[[View], list[float]]] = {
    "cls_attention": _cls_attention,
    "mean_attention": _mean_attention,
    "attention_entropy": _entropy_gap,
    "attention_variance": _variance,
    "attention_sharpness": _sharpness,
    "norm": lambda v: [_length(v.hidden[i]) for i in v.patches],
    "gradient": _gradient,
    "key_norm": lambda v: [_mean([_length(v.key[h, i]) for h in v.heads]) for i in v.patches],
    "random": _random,
}


def _top_k(reducer: TopK, tokens: Tokens, view: View, keep: int) -> None:
    own = tokens.carried is None or reducer.shallow is None or view.block <= reducer.shallow
    raw = SCORE_REFERENCES[reducer.score](view) if own else list(tokens.carried or [])
    score = raw
    if own and reducer.normalise:
        middle = _mean(raw)
        spread = math.sqrt(_mean([(value - middle) ** 2 for value in raw]))
        score = [(value - middle) / spread for value in raw]
    if own and tokens.carried is not None:
        old = tokens.carried
        score = [reducer.momentum * o + (1 - reducer.momentum) * n for o, n in zip(old, score, strict=True)]
    ranked = sorted(range(len(score)), key=lambda i: (-score[i], i))
    kept, rest = sorted(ranked[:keep]), sorted(ranked[keep:])
    patches, members = [tokens.patches[i] for i in kept], [tokens.members[i] for i in kept]
    for i in rest:
        for patch in tokens.members[i]:  # Those behind a fused token went earlier.
            tokens.parked.setdefault(patch, tokens.patches[i])
    carried, places = [score[i] for i in kept], [tokens.places[i] for i in kept]
    if reducer.fuse is None:
        for i in rest:
            tokens.lost |= tokens.members[i]
    else:
        total = sum(raw[i] for i in rest) if reducer.fuse == "mean" else 1.0
        patches.append(sum((raw[i] / total) * tokens.patches[i] for i in rest))
        members.append(set().union(*(tokens.members[i] for i in rest)))
        carried.append(_mean([score[i] for i in rest]))
        places.append(tokens.places[min(rest, key=lambda i: (-score[i], i))])
    tokens.patches, tokens.members, tokens.places = patches, members, places
    tokens.carried = carried if reducer.momentum > 0 or reducer.shallow is not None else None


def _tome(reducer: ToMe, tokens: Tokens, view: View, keep: int) -> None:
    num_tokens = len(tokens.patches)
    metric = [sum(view.key[h, i] for h in view.heads) / len(view.heads) for i in view.patches]
    edges: list[tuple[float, int, int]] = []
    for even in range(0, num_tokens, 2):
        cosine = {
            odd: (metric[even] @ metric[odd]).item() / _length(metric[even]) / _length(metric[odd])
            for odd in range(1, num_tokens, 2)
        }
        partner = max(cosine, key=lambda odd: (cosine[odd], -odd))
        edges.append((cosine[partner], even, partner))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    groups = {i: [i] for i in range(num_tokens)}
    for _, even, partner in edges[: num_tokens - keep]:
        groups[partner] += groups.pop(even)
    _merge(tokens, groups)


def _merge(tokens: Tokens, groups: dict[int, list[int]]) -> None:
    """Every group becomes its mean, in the order of the tokens that stay."""
    patches, members, places = [], [], []
    for _, group in sorted(groups.items()):
        weight = [len(tokens.members[i]) for i in group]
        patches.append(sum(w * tokens.patches[i] for w, i in zip(weight, group, strict=True)) / sum(weight))
        members.append(set().union(*(tokens.members[i] for i in group)))
        places.append(tokens.places[min(group, key=lambda i: (-len(tokens.members[i]), i))])
    tokens.patches, tokens.members, tokens.places = patches, members, places


def _cluster(reducer: Cluster, tokens: Tokens, view: View, keep: int) -> None:
    score = SCORE_REFERENCES[reducer.score](view)
    hidden = [view.hidden[i] for i in view.patches]
    number = len(hidden)

    def cosine(i: int, j: int) -> float:
        return (hidden[i] @ hidden[j]).item() / _length(hidden[i]) / _length(hidden[j])

    ranked = sorted(range(number), key=lambda i: (-score[i], i))
    worth = {}
    for place, i in enumerate(ranked):
        alike = max((cosine(i, j) for j in ranked[:place]), default=-1.0)
        worth[i] = score[i] * (1 - alike) ** 4
    kept = sorted(sorted(worth, key=lambda i: (-worth[i], i))[:keep])
    groups = {i: [i] for i in kept}
    for i in range(number):
        if i not in kept:
            groups[max(kept, key=lambda k: (cosine(i, k), -k))].append(i)
    _merge(tokens, groups)


REDUCER_REFERENCES: dict[str, Callable[..., None]] = {"TopK": _top_k, "ToMe": _tome, "Cluster": _cluster}


def _attention(
    attn: nn.Module, normed_TC: Tensor, size: list[int] | None, places: list[int | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of the attention layer before its residual, the attention (H, T, T), the keys (H, T, D).

    Of one that was removed a constant is left, and no head. `places` are those of the tokens, None for prefix tokens;
    an attention with rotary positions has `turned`: what a row of one head is at a place, and `query_dim`, if some of
    the pairs of dims were cut, while `head_dim` still scales the logits; one with relative positions has `relative`:
    what is added for a query and a key at their places, in all heads. Differential attention has `differ`, which makes
    the rows of a head from two attention maps, of which the first counts. An MLP that works in parallel is `parallel`.
    """
    if isinstance(attn, RemovedBranch):
        return attn.bias.expand_as(normed_TC), normed_TC.new_empty(0, *2 * normed_TC.shape[:1]), normed_TC.new_empty(0)
    count, heads, scaled_by = normed_TC.shape[0], attn.num_heads, attn.head_dim
    dim = getattr(attn, "query_dim", attn.head_dim)
    rows = attn.qkv(normed_TC)  # Queries and keys of all heads, then values, which may have fewer dims.
    query, key = rows[:, : 2 * heads * dim].reshape(count, 2, heads, dim).permute(1, 2, 0, 3)
    value = rows[:, 2 * heads * dim :].reshape(count, heads, -1).transpose(0, 1)
    query, key = attn.q_norm(query), attn.k_norm(key)
    if hasattr(attn, "turned"):
        query, key = (
            torch.stack([
                torch.stack([row if p is None else attn.turned(h, p, row) for p, row in zip(places, one, strict=True)])
                for h, one in enumerate(stream)
            ])
            for stream in (query, key)
        )  # fmt: skip
    bias = None
    if hasattr(attn, "relative"):
        bias = torch.stack([torch.stack([attn.relative(query, key) for key in places]) for query in places])
    rows = []
    for h in range(heads):
        logits = query[h] @ key[h].T / math.sqrt(scaled_by)
        if size is not None:
            logits = logits + torch.tensor([math.log(s) for s in size], dtype=logits.dtype)
        if bias is not None:
            logits = logits + bias[:, :, h]
        rows.append(logits.exp() / logits.exp().sum(1, keepdim=True))
    attention = torch.stack(rows)
    if hasattr(attn, "differ"):
        values = value.unflatten(0, (heads // 2, 2)).transpose(1, 2).flatten(2)
        mixed = [attn.differ(attention[2 * h], attention[2 * h + 1], values[h]) for h in range(heads // 2)]
        mixed, attention, key = torch.cat(mixed, dim=1), attention[::2], key[::2]
    else:
        mixed = torch.cat([attention[h] @ value[h] for h in range(heads)], dim=1)
    mixed = attn.norm(mixed)
    if attn.gate is not None:
        mixed = mixed * torch.sigmoid(attn.gate(normed_TC))
    out = attn.proj(mixed)
    return out + attn.parallel(normed_TC) if hasattr(attn, "parallel") else out, attention, key


def _head(model: nn.Module, tokens: Tokens, weighted_attention: bool) -> Tensor:
    if model.global_pool == "grid":  # The head reads every patch at its place.
        tokens = replace(tokens)
        tokens.reinstate()
        return model.head(model.norm(tokens.rows())[None])
    rows = model.norm(tokens.rows())[None]
    num_prefix = len(tokens.prefix)
    if getattr(model, "head_dist", None) is not None:
        return (model.head(rows[:, 0]) + model.head_dist(rows[:, 1])) / 2
    if model.attn_pool is None and model.global_pool == "token":
        return model.head(model.fc_norm(rows[:, 0]))
    # A token that stands for n patches counts as n equal tokens.
    whole = model.global_pool == "all"  # The head takes all tokens, prefix tokens included, and pools by itself.
    full = [rows[0, i] for i in range(num_prefix)] if whole or model.pool_include_prefix else []
    for i, members in enumerate(tokens.members):
        times = len(members) if model.attn_pool is None or weighted_attention else 1
        full += [rows[0, num_prefix + i]] * times
    repeated = torch.stack(full)[None]
    if whole:
        return model.head(repeated)
    if model.attn_pool is not None:
        pooled = model.attn_pool(repeated)
    elif model.global_pool == "avg":
        pooled = repeated.mean(1)
    else:
        pooled = (repeated.mean(1) + repeated.max(1).values) / 2
    return model.head(model.fc_norm(pooled))


VIEWS: dict[str, Callable[[nn.Module], Any]] = {}
"""Name of a family -> its model under the names of timm's parts; timm's own need none."""


def reduced_vit(
    model: nn.Module,
    image_CHW: Tensor,
    reducer: Reducer,
    plan: Plan,
    listened: Mapping[int, list[float]] | None = None,
) -> tuple[Tensor, Tokens]:
    """Logits (num_classes,) and final tokens of a float64 timm ViT under the cuts of `plan`.

    `listened` holds for some blocks how much the loss listened to each channel, for the score `gradient`.
    """
    family = adapter_of(model).name
    model = VIEWS[family](model) if family in VIEWS else model
    embedded = model.norm_pre(model._pos_embed(model.patch_embed(image_CHW[None])))[0]
    num_prefix = model.num_prefix_tokens
    rows = list(embedded)
    tokens = Tokens(rows[:num_prefix], rows[num_prefix:], [{i} for i in range(len(rows) - num_prefix)], [])
    tokens.places = list(range(len(tokens.patches)))
    cut = REDUCER_REFERENCES[type(reducer).__name__]
    for index, block in enumerate(model.blocks):
        heard = (listened or {}).get(index)
        if index == plan.reinstate:
            tokens.reinstate()

        def attend(block: nn.Module = block) -> tuple[Tensor, Tensor, Tensor]:
            size = [1] * num_prefix + [len(m) for m in tokens.members] if reducer.prop_attn else None
            places = [*[None] * num_prefix, *tokens.places]
            each = getattr(block, "attentions", None) or [(block.attn, block.norm1)]
            outs = [_attention(attn, norm(tokens.rows()), size, places) for attn, norm in each]
            return (
                sum(out for out, _, _ in outs),
                torch.cat([a for _, a, _ in outs]),
                torch.cat([k for _, _, k in outs]),
            )

        before, inside = plan.cut(index, "before"), plan.cut(index, "inside")
        if before is not None:
            _, attention, key = attend()
            cut(reducer, tokens, View(attention, key, tokens.rows(), num_prefix, index, heard), before.keep)
        added, attention, key = attend()
        tokens.replace(tokens.rows() + block.ls1(added))
        if inside is not None:
            cut(reducer, tokens, View(attention, key, tokens.rows(), num_prefix, index, heard), inside.keep)
        tokens.replace(tokens.rows() + block.ls2(block.mlp(block.norm2(tokens.rows()))))
    return _head(model, tokens, reducer.prop_attn)[0], tokens


def gradients_of_reference(model: nn.Module, x: Tensor, reducer: Reducer, plan: Plan) -> dict[str, Tensor | None]:
    """Gradients of the sum of squared logits of these images, from the slow forward pass; those there are cleared."""
    model.zero_grad()
    sum(reduced_vit(model, image, reducer, plan)[0].square().sum() for image in x).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
