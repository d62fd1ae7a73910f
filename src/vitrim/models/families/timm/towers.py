"""What the adapters of timm's vision towers share: encoders, and classifiers that hold one as `encoder`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ....errors import CheckpointError, UnsupportedModelError, VitrimError
from ...adapter import Description, Geometry, State
from ...foreign_macs import macs_per_row
from ...input_format import InputFormat
from ...macs import Macs
from ...outputs import ModelInfo, as_tensor
from ...reduction.exchange import Reduced
from ...reduction.forward_pass import finish, known_trace
from ...reduction.policy import Policy
from ..timm_eva import TimmEva
from .model import check_whole_patches
from .reduced_towers import averages, final_norm_of, grid_of, mean_of, projector_of, side_of
from .weights import converted


class _TimmTower(TimmEva):
    """Encoders and the classifiers around them. Both are reduced the same way; attach to either."""

    _encoder: ClassVar[type[nn.Module]]
    _classifier: ClassVar[type[nn.Module]]
    _filters: ClassVar[tuple[Callable[..., State], Callable[..., State]]]
    """timm's own filters of foreign weights for an encoder, and for a classifier."""

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, self._encoder | self._classifier)

    def tower(self, model: Any) -> Any:
        """The encoder itself, or the one inside a classifier."""
        return model.encoder if isinstance(model, self._classifier) else model

    def check(self, model: Any) -> None:
        super().check(model)
        tower = self.tower(model)
        if tower is not model and type(tower) not in (*self._reduced_models, *self._reduced_models.values()):
            raise UnsupportedModelError(
                f"its encoder is a {type(tower).__qualname__}, of which the {self.name} adapter knows nothing; it "
                f"covers {self.covers}"
            )

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(self.tower(model).blocks)

    def parts(self, model: Any) -> Sequence[nn.Module]:
        return (self.tower(model),)

    def check_widths(self, model: Any) -> None:
        pass

    def geometry(self, model: Any) -> Geometry:
        tower = self.tower(model)
        height, width = self._size(model)
        rows, columns = grid_of(tower, (height, width))
        return Geometry(
            depth=len(tower.blocks),
            num_patches=rows * columns,
            num_prefix=0,
            has_cls=False,
            head="tokens",
            input_size=(tower.in_chans, height, width),
            fixed_size=False,
            rotary=True,
        )

    def _size(self, model: Any) -> tuple[int, int]:
        """Height and width of the images that a model is made for; it takes others too."""
        height, width = self.tower(model).patch_embed.img_size
        return height, width

    def patches_entering(self, model: Any, *, training: bool) -> int:
        return self.geometry(model).num_patches

    def grid(self, model: Any, image_size: Sequence[int]) -> tuple[int, int]:
        return grid_of(self.tower(model), image_size)

    def final_norm(self, model: Any) -> nn.Module | None:
        return final_norm_of(self.tower(model))

    def info(self, model: Any) -> ModelInfo:
        tower = self.tower(model)
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
        return ModelInfo(name, self.classifier(model).classes, len(tower.blocks), tower.embed_dim)

    def output_width(self, model: Any) -> int:
        return self.classifier(model).classes or model.head_hidden_size

    def predict(self, model: Any, images: Tensor) -> Tensor:
        """Logits, or what an encoder gives: of tokens or a grid channels first, (B, C, ...)."""
        return _channels_first(as_tensor(model(images)))

    def features(
        self, model: Any, images: Tensor, blocks: Sequence[int]
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        policy = _policy_of(model)
        if policy is not None:
            with model.open_call(images, restorable=not self._averages(model)):
                final, between = self.tower(model).vitrim_left(images, blocks)
                finish(policy, final)
        else:  # The encoder of a classifier may be reduced by itself: then its whole grid is what the head reads.
            tower = self.tower(model)
            grid, found = tower.forward_intermediates(images, indices=list(blocks) or None, output_fmt="NLC")
            final, between = grid.flatten(1, -2), dict(zip(blocks, found, strict=False))
        return final, {block: (between[block][:, :0], between[block]) for block in blocks}

    def head(self, model: Any, final_BTC: Tensor) -> Tensor:
        """What the model makes of final tokens: logits, or of an encoder what it returns, channels first."""
        tower, policy = self.tower(model), _policy_of(model)
        if self._averages(model):
            if tower is not model:
                return model.forward_head(final_BTC)
            trace = None if policy is None else known_trace(policy, final_BTC)
            return final_BTC.mean(dim=1) if trace is None else mean_of(final_BTC, trace)
        size = self.geometry(model).input_size[1:]
        if policy is not None and (trace := known_trace(policy, final_BTC)) is not None:
            size = trace.image_size or size
            final_BTC = trace.restored(final_BTC, final_norm_of(tower), num_prefix=0)
        rows, columns = grid_of(tower, size)
        if rows * columns != final_BTC.shape[1]:
            raise VitrimError(
                f"it is not known how {final_BTC.shape[1]} patches lie, since images of {size[0]} x {size[1]} px have "
                f"{rows} x {columns}; call the model"
            )
        out = self._projected(tower, final_BTC, (rows, columns))
        return model.forward_head(out) if tower is not model else _channels_first(out)

    def _projected(self, tower: Any, whole_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """What an encoder returns of all its patches, so many rows and columns."""
        shaped, projector = whole_BNC.unflatten(1, grid), projector_of(tower)
        return shaped if projector is None else projector(shaped)

    def _averages(self, model: Any) -> bool:
        """Whether the head averages the tokens of the last block."""
        return model.global_pool == "avg" if self.tower(model) is model else averages(model)

    def input_format(self, model: Any) -> InputFormat:
        return replace(super().input_format(model), size=self.geometry(model).input_size)

    def resize(self, model: Any, size: int | tuple[int, int]) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        embed, projector = self.tower(model).patch_embed, projector_of(self.tower(model))
        rows, columns = grid_of(self.tower(model), (height, width))
        pads = getattr(embed, "dynamic_img_pad", False)
        check_whole_patches((height, width), (rows, columns), embed.patch_size, pads)
        # DeepSeek's pads what is left over.
        side = 1 if projector is None or hasattr(projector, "downsample_ratio") else side_of(projector)
        if rows % side or columns % side:
            raise UnsupportedModelError(
                f"images of {height} x {width} px have {rows} x {columns} patches, of which the projector takes "
                f"{side} x {side} at a time; give a multiple of both"
            )
        if hasattr(embed, "set_input_size"):
            embed.set_input_size(img_size=(height, width))
        model._traits = {**getattr(model, "_traits", {}), "img_size": (height, width)}  # timm's record of it.
        if (handle := vars(model).get("vitrim_handle")) is not None:
            handle.refresh()

    def reset_classifier(self, model: Any, classes: int) -> None:
        if self.tower(model) is model:
            name = self.info(model).name.removesuffix("_enc")
            raise UnsupportedModelError(
                f"this {type(model).__name__} is an encoder without a classifier; build {name} for one, whose encoder "
                "takes the same weights"
            )
        super().reset_classifier(model, classes)

    def describe(self, model: Any) -> Description:
        tower = self.tower(model)
        if tower is not model and "vitrim_handle" in vars(tower):
            raise CheckpointError(
                f"the reduction is attached to the encoder inside this {type(model).__name__}, which a saved model "
                "cannot say; attach it to the whole model, or remove it first"
            )
        return super().describe(model)

    def trained_size(self, model: Any, state: State, trained_at: tuple[int, int] | None) -> None:
        return None

    def fit_weights(
        self,
        model: Any,
        state: State,
        trained_at: tuple[int, int] | None = None,
        *,
        resample_patches: bool = False,
    ) -> State:
        return converted(dict(state), model, self._filters[isinstance(model, self._classifier)])

    def _patch_macs(self, model: Any) -> Macs:
        kernel = self.tower(model).patch_embed.proj.weight
        return Macs(self.geometry(model).num_patches * kernel.numel())

    def _head_macs(self, model: Any, tokens: int) -> Macs:
        tower = self.tower(model)
        rows, columns = grid_of(tower, self.geometry(model).input_size[1:])
        total, read, projector = 0, rows * columns, projector_of(tower)
        if projector is not None:
            side = side_of(projector)
            read = -(-rows // side) * -(-columns // side)
            total += self._projector_macs(projector, read)
        if tower is not model:
            total += (1 if model.global_pool == "avg" else read) * macs_per_row(model.head, model.num_features)
        return Macs(total)

    def _projector_macs(self, projector: Any, read: int) -> int:
        """Of a projector that gives so many tokens."""
        each = macs_per_row(projector.fc1, projector.hidden_size)
        return read * (each + macs_per_row(projector.fc2, projector.fc1.out_features))


def _channels_first(out: Tensor) -> Tensor:
    return out.movedim(-1, 1) if out.ndim > 2 else out


def _policy_of(model: nn.Module) -> Policy | None:
    """Of the reduction that is attached to this very model."""
    return model.vitrim_policy if isinstance(model, Reduced) else None
