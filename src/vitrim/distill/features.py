"""What a model says about a batch: logits, CLS at stage boundaries, final CLS and patch tokens.

Features come from timm's own `forward_intermediates` rather than from hooks: nothing is put into the model and nothing
must be taken out, outputs are values and not side effects (so compilation, deepcopy, pickling and several forward
passes before one backward just work), blocks run their own fused attention, and under activation checkpointing the
features are what the checkpoint returns, never what is recomputed. Models without it (CNNs, Hugging Face) give logits.

Shapes: B images, K classes, S stage boundaries, P prefix and N patch tokens, M of them left, C channels.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DistillError
from ..models import attached
from ..models.input_format import InputFormat
from ..tokens import Assignment, TokenState

Outputs = Mapping[str, Tensor]
"""Any of: logits (B, K), dist_logits (B, K), stages (B, S, C), cls (B, C), tokens (B, N, C) and, from a student alone,
origin (B, N) and fused (B, M). A cache gives top (B, k), index (B, k) and one rest@T (B,) in place of many logits."""


@dataclass(frozen=True)
class Anatomy:
    """What distillation must know of a model. `width` and `depth` are 0 where it gives logits alone."""

    name: str
    num_classes: int
    depth: int = 0
    width: int = 0
    num_prefix: int = 0
    has_cls: bool = False
    has_dist: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "Anatomy":
        """Read off a timm model; of anything else, only the number of its classes (0: no head)."""
        classes = getattr(model, "num_classes", getattr(getattr(model, "config", None), "num_labels", 0))
        needed = ("forward_intermediates", "forward_head", "blocks", "num_prefix_tokens", "embed_dim")
        name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        if not all(hasattr(model, attribute) for attribute in needed):
            return cls(name, int(classes))
        return cls(
            name=name,
            num_classes=int(classes),
            depth=len(model.blocks),
            width=model.embed_dim,
            num_prefix=model.num_prefix_tokens,
            has_cls=getattr(model, "cls_token", None) is not None,
            has_dist=hasattr(model, "head_dist"),
        )

    def boundaries(self, stages: int) -> tuple[int, ...]:
        """The last block of every stage but the final one, in `stages` equal stages."""
        if self.depth < stages:
            raise DistillError(f"{self.name} has {self.depth} blocks, too few for {stages} stages")
        return tuple(i * self.depth // stages - 1 for i in range(1, stages))


@dataclass(frozen=True)
class Wanted:
    """Which outputs the terms compare; two of them join by `|`.

    stages: number of stages whose boundaries count, 0 = none. temperatures: at which logits are softened.
    """

    logits: bool = False
    dist_logits: bool = False
    stages: int = 0
    cls: bool = False
    tokens: bool = False
    temperatures: tuple[float, ...] = ()

    @property
    def features(self) -> bool:
        """Whether more than logits of the usual forward pass is compared."""
        return self.dist_logits or self.stages > 0 or self.cls or self.tokens

    def __str__(self) -> str:
        parts = [name for name in ("logits", "cls", "tokens") if getattr(self, name)]
        parts += [f"CLS of {self.stages} stages"] if self.stages else []
        parts += [f"temperature {temperature:g}" for temperature in self.temperatures]
        return ", ".join(parts) or "nothing"

    def covers(self, other: "Wanted") -> bool:
        """Whether whoever has this has all that `other` asks for."""
        return self | other == self and other.stages in (0, self.stages)

    def __or__(self, other: "Wanted") -> "Wanted":
        return Wanted(
            logits=self.logits or other.logits,
            dist_logits=self.dist_logits or other.dist_logits,
            stages=max(self.stages, other.stages),
            cls=self.cls or other.cls,
            tokens=self.tokens or other.tokens,
            temperatures=tuple(sorted({*self.temperatures, *other.temperatures})),
        )


def look(model: nn.Module, images: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    """Run the model once on images (B, channels, H, W) and return what is wanted of it, in its present mode."""
    if not wanted.features:
        out = model(images)
        return {"logits": getattr(out, "logits", out)}
    anatomy = Anatomy.of(model)
    found: dict[str, Tensor] = {}
    if wanted.stages:
        boundaries = list(anatomy.boundaries(wanted.stages))
        final, between = model.forward_intermediates(
            images, indices=boundaries, return_prefix_tokens=True, output_fmt="NLC"
        )
        found["stages"] = torch.stack([prefix[:, 0] for _, prefix in between], dim=1)
    else:
        final = model.forward_features(images)
    if wanted.dist_logits:
        # Apart in every mode of the model, whose own head averages them except in distilled training.
        pooled = model.head_drop(final[:, :2])
        found["logits"], found["dist_logits"] = model.head(pooled[:, 0]), model.head_dist(pooled[:, 1])
    elif wanted.logits:
        found["logits"] = model.forward_head(final)
    if wanted.cls:
        found["cls"] = final[:, 0]
    if wanted.tokens:
        found["tokens"] = final[:, anatomy.num_prefix :]
    return found


def idle_parameters(model: nn.Module, wanted: Wanted, reads: Collection[str]) -> list[str]:
    """Parameters that no gradient reaches from these outputs of `look`: a head that is not read, blocks behind the
    last one that is.

    Found on the meta device, where a copy of the model takes no memory and computes nothing.
    """
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    hollow = copy.deepcopy(model, memo).train()
    learnt = {name: parameter for name, parameter in hollow.named_parameters() if parameter.requires_grad}
    dtype = next(model.parameters()).dtype
    with torch.enable_grad():
        found = look(hollow, torch.empty(2, *InputFormat.of(model).size, device="meta", dtype=dtype), wanted)
        read = [found[name].sum() for name in reads if name in found and found[name].requires_grad]
    reached = torch.autograd.grad(read, list(learnt.values()), allow_unused=True) if read else [None] * len(learnt)
    return [name for name, gradient in zip(learnt, reached, strict=True) if gradient is None]


def whereabouts(model: nn.Module, tokens_BMC: Tensor) -> dict[str, Tensor]:
    """Origin (B, N) of the patch tokens that left the model's latest forward pass, and which of them are fused, (B, M).

    A fused token is no mean of its members but a sum weighted by attention, so it is the likeness of no position.
    """
    num_images, num_tokens = tokens_BMC.shape[:2]
    handle = attached(model)
    if handle is None:
        state = TokenState.start(num_images, num_tokens, tokens_BMC.device)
        return {"origin": state.origin, "fused": torch.zeros_like(state.origin, dtype=torch.bool)}
    trace = handle.last_trace()
    if trace.plan.prefix_only:
        raise DistillError("the student's last block computes prefix tokens alone; attach it with cls_only=False")
    fused = torch.zeros(num_images, trace.plan.num_patches, dtype=torch.bool, device=tokens_BMC.device)
    for assignment in trace.cuts():
        fused = _follow(fused, assignment)
    return {"origin": trace.state().origin.to(tokens_BMC.device).expand(num_images, -1), "fused": fused}


def _follow(fused_BN: Tensor, assignment: Assignment) -> Tensor:
    kept = fused_BN.gather(1, assignment.kept_BK)
    if assignment.num_out > kept.shape[1]:
        return torch.nn.functional.pad(kept, (0, assignment.num_out - kept.shape[1]), value=True)
    return kept


def group_means(target_BNC: Tensor, origin_BN: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Mean of the targets of each slot's members, (B, M, C), and the number of members, (B, M).

    A slot with one member gets exactly the target at its own position; a dropped position belongs to no slot.
    """
    num_images, _, width = target_BNC.shape
    slot_BN = torch.where(origin_BN < 0, num_slots, origin_BN)  # One more slot takes what was dropped.
    total = target_BNC.new_zeros(num_images, num_slots + 1, width)
    total = total.scatter_add(1, slot_BN.unsqueeze(2).expand(-1, -1, width), target_BNC)[:, :num_slots]
    count = torch.zeros(num_images, num_slots + 1, device=slot_BN.device, dtype=torch.long)
    count = count.scatter_add(1, slot_BN, torch.ones_like(slot_BN))[:, :num_slots]
    return total / count.clamp(min=1).unsqueeze(2), count
