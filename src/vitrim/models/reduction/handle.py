"""The handle of a reduction: what it does to the model, how far its curriculum has come, and what it removed."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

from torch import Tensor, nn

from ...errors import UnsupportedModelError, VitrimError
from ...tokens import Plan, Reducer, Reduction, Schedule, TokenState
from ...tokens.curriculum import History, check_moment
from ...tokens.gradients import GradientMemory
from ..adapter import Geometry
from ..finding import find_adapter, needs_all_tokens
from .attached import attached
from .exchange import Exchange, reduced_blocks
from .forward_pass import CHANGED
from .padded import PaddedTrace
from .places import state_after, trace_behind
from .policy import Policy
from .trace import Trace


class NotAModelError(VitrimError, AttributeError):
    """A handle was used as if it were the model."""


class Handle:
    """A reduction that is attached to a model: what `attach` returns. The model itself is changed in place.

    Use it as a context manager, or call `remove`. In a training loop of your own, call `set_epoch` (or
    `vitrim.set_epoch`, which also moves copies such as an EMA) at the start of each epoch, and keep `state_dict()` in
    the checkpoint.

    model: the model. adapter: its family. reduction: what was attached; None for `cls_only` without a reduction.
    """

    def __init__(self, model: nn.Module, reduction: Reduction | None, cls_only: bool) -> None:
        self.model = model
        self.adapter = find_adapter(model)
        self.reduction = reduction
        self.cls_only = cls_only
        self.policy = Policy(model, self.adapter, reduction, cls_only)
        self._exchange: Exchange | None = None

    def __repr__(self) -> str:
        reduction = "cls_only" if self.reduction is None else repr(str(self.reduction))
        tokens = " ".join(map(str, self.token_counts))
        if self._exchange is None:
            return f"Handle({reduction}, removed)"
        return f"Handle({reduction} on {type(self.model).__name__}, strength {self.strength:g}, tokens {tokens})"

    @property
    def geometry(self) -> Geometry:
        """Of the model at its own input size."""
        return self.policy.geometry

    @property
    def reducer(self) -> Reducer:
        """The reducer that is attached."""
        if self.reduction is None:
            raise VitrimError("no reducer is attached")
        return self.reduction.reducer

    @property
    def schedule(self) -> Schedule | None:
        """The schedule at full strength, with nothing left to solve."""
        return self.policy.schedule

    @property
    def strength(self) -> float:
        """How much of the schedule acts now, in [0, 1]; see `set_epoch`."""
        return self.policy.strength

    @property
    def gradients(self) -> GradientMemory | None:
        """What the score has learnt from training steps; None where it learns nothing."""
        return self.policy.gradients

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens leaving each block in the model's present mode, prefix tokens included."""
        return self.plan().token_counts

    @property
    def states(self) -> list[TokenState]:
        """One `TokenState` for each block, of the latest forward pass of any thread; see `state_of`."""
        trace = self.last_trace()
        return [self._state(trace, block) for block in range(self.geometry.depth)]

    @property
    def origin(self) -> Tensor:
        """`state.origin` (B, N) after the last block of the latest forward pass of any thread; see `state_of`."""
        return self._state(self.last_trace(), self.geometry.depth - 1).origin

    @property
    def positions(self) -> Tensor:
        """`state.positions` (B, M, 2) after the last block of the latest forward pass of any thread; see `state_of`."""
        return self._state(self.last_trace(), self.geometry.depth - 1).positions

    @property
    def restorable(self) -> bool:
        """Whether forward passes keep the values of dropped tokens, for `restore`; may be set."""
        return self.policy.restorable

    @restorable.setter
    def restorable(self, on: bool) -> None:
        self.policy.restorable = on

    def state_of(self, tokens: Tensor) -> TokenState:
        """What became of the input patches in the forward pass that these tokens come from.

        Args:
            tokens: (B, P + M, C), as the model returned them: what `forward_features` of timm gives, or
                `last_hidden_state` and the members of `hidden_states` of transformers.

        Raises:
            VitrimError: it is not known from which forward pass they come, as with a slice, a cast or a copy.
        """
        trace = trace_behind(tokens)
        return self._state(trace, trace.block)

    def restore(self, tokens: Tensor) -> Tensor:
        """All patches again, at their places: (B, P + N, C), prefix tokens first.

        A patch that is left has its present value, a merged one that of its common token. A dropped or fused patch has
        the value with which it was removed, after the last norm where these tokens have passed it: what entered the
        block that dropped it, or what its attention made of that where it was computed. With `restorable` the forward
        pass keeps these values as long as its tokens exist, which takes as much memory as the tokens before every cut;
        merging alone (`ToMe`) needs none.

        Args:
            tokens: as in `state_of`.

        Raises:
            VitrimError: as in `state_of`; or tokens were dropped without `restorable`.
        """
        trace = trace_behind(tokens)
        return trace.restored(tokens, self.adapter.final_norm(self.model) if trace.normed else None)

    def plan(self, num_patches: int | None = None, training: bool | None = None) -> Plan:
        """The cuts for so many patch tokens (default: what the model's own input size gives), in this mode.

        Raises:
            VitrimError: blocks were removed or replaced after `attach`.
        """
        blocks = self.adapter.blocks(self.model)
        if self._exchange is not None and not reduced_blocks(blocks, self.policy):
            raise VitrimError(CHANGED)
        training = self.model.training if training is None else training
        num_patches = self.policy.entering[training] if num_patches is None else num_patches
        return self.policy.plan(num_patches, training)

    def set_epoch(self, epoch: float, history: History = ()) -> float:
        """Move the curriculum of this model; `vitrim.set_epoch` moves its copies (EMA) too.

        Args:
            epoch: from 0; may be a fraction, for curricula that change within an epoch.
            history: one mapping for each finished epoch, for curricula that follow the run
                (`Adaptive`: "val_loss" or "attention_entropy").

        Returns:
            The strength that acts from now on, in [0, 1].
        """
        check_moment(epoch, history)
        if self.reduction is not None:
            self.set_strength(self.reduction.curriculum.strength(epoch, history))
        return self.strength

    def set_strength(self, strength: float) -> None:
        """Apply this much of the schedule, in [0, 1], until the curriculum is moved again.

        Raises:
            VitrimError: the model cannot do this; the strength stays as it was.
        """
        self.policy.set_strength(strength, self.model, self.adapter)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the weights: the strength, and what a gradient score has learnt.

        `model.state_dict()` has the same keys with and without a reduction. It carries the strength in its metadata,
        which `torch.save` keeps and safetensors does not. With a gradient score, all processes call this together.
        """
        gradients = None if self.gradients is None else self.gradients.state_dict()
        return {"strength": self.strength, "gradients": gradients}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; `VitrimError` for anything else."""
        if "strength" not in (state_dict or ()):
            raise VitrimError("load_state_dict takes what state_dict() of a handle returned")
        self.set_strength(state_dict["strength"])
        if self.gradients is not None and state_dict.get("gradients") is not None:
            self.gradients.load_state_dict(state_dict["gradients"])

    def refresh(self) -> None:
        """Plan again after the model's input size changed; a budget is solved for the new size."""
        self.policy.fit(self.model, self.adapter)

    def install(self) -> None:
        """Attach again what `remove` has removed."""
        if attached(self.model) is not None:
            raise VitrimError("a reduction is attached to this model already; call handle.remove() first")
        if (owner := self.adapter.dense_owner(self.model)) is not None:
            advice = "attach to a copy of the encoder: copy.deepcopy(model)"
            raise UnsupportedModelError(f"{needs_all_tokens(owner)}; {advice}")
        self._exchange = Exchange.of(self.model, self.adapter, self.policy)
        vars(self.model)["vitrim_handle"] = self

    def remove(self) -> None:
        """Make the model exactly what it was. Calling it twice does no harm."""
        if self._exchange is not None:
            self._exchange.undo()
            vars(self.model).pop("vitrim_handle", None)
        self._exchange = None
        self.policy.last = None

    def last_trace(self) -> Trace | PaddedTrace:
        """The trace of the latest forward pass."""
        if self.policy.last is None:
            raise VitrimError("no forward pass has been made since the reduction was attached")
        return self.policy.last

    def _state(self, trace: Trace | PaddedTrace, block: int) -> TokenState:
        return state_after(self.adapter, self.model, trace, block)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Not a model: attach returns a handle."""
        raise NotAModelError(not_a_model("handle(images)"))

    def __getattr__(self, name: str) -> NoReturn:
        # Only for names that a handle does not have.
        if not name.startswith("__") and (hasattr(nn.Module, name) or hasattr(vars(self).get("model"), name)):
            raise NotAModelError(not_a_model(f"handle.{name}"))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def not_a_model(what: str) -> str:
    """The message for a handle that was used as a model."""
    return (
        f"{what}: attach returns a handle and changes the model in place; write `handle = vitrim.attach(model, ...)` "
        "and go on using the model (it is also handle.model)"
    )
