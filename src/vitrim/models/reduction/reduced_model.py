"""What a reduced model does outside its blocks, for all families: open a call, and keep the strength in its state.

A family adds what its own class does with tokens after the last block: it wraps the method that returns final tokens
with `finish`, and weighs tokens where its head averages them (`trace_at_head`).
"""

from typing import Any

from torch import Tensor

from .exchange import Reduced, while_attached
from .forward_pass import Call
from .handle import Handle


class ReducedModel(Reduced):
    """Mixin placed before a family's own model class."""

    vitrim_handle: Handle
    vitrim_free = ("forward",)

    def expected_patches(self, images: Any) -> int | None:
        """Patch tokens that reach the first block of these images; None where that is not known."""
        policy = self.vitrim_policy
        return policy.entering[self.training] if policy.geometry.fixed_size else None

    def open_call(self, images: Any, *, restorable: bool = False) -> Call:
        """A call of this model on these images, to run inside: `with self.open_call(images): ...`."""
        size = tuple(images.shape[-2:]) if getattr(images, "ndim", 0) == 4 else None
        return Call(self.vitrim_policy, self.training, self.expected_patches(images), size, restorable)

    @while_attached
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the foreign class, with a call open."""
        with self.open_call(x):
            return super().forward(x, *args, **kwargs)

    # The keys of a state dict are those of the plain model, so that weights go both ways. Its metadata, which
    # `torch.save` keeps, carries how much of the schedule acts.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "vitrim_handle" in vars(self) and hasattr(destination, "_metadata"):  # Not a tower inside the model.
            destination._metadata.setdefault(prefix[:-1], {})["vitrim"] = self.vitrim_policy.metadata()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        strength = self.vitrim_policy.strength_in(local_metadata.get("vitrim"))
        if "vitrim_handle" not in vars(self):
            return
        self.vitrim_policy.weights_loaded(said=strength is not None)
        if strength is not None:
            self.vitrim_handle.set_strength(strength)
