"""What a family supplies about its blocks: the steps of a forward pass with a cut, one by one.

Five steps in every family (`norm_tokens`, `project`, `attend`, `feed_forward`, `head_scale`); where positions are
rotary two more (`rows_of_table`, `rotate`), where they are relative one (`position_bias`).
"""

from typing import Any, ClassVar

from torch import Tensor

from ...errors import VitrimError
from .exchange import OWN_FORWARD, Reduced, intercepted, is_new


class BlockSteps(Reduced):
    """The steps; a family overrides those that its blocks have."""

    vitrim_index: int
    vitrim_attention: str
    """Name of the attention layer within the block; "" where the family names no branches."""
    rotary_argument: ClassVar[str] = ""
    """Name of the first argument after the tokens where that is the rotary table; "" where the block gets none."""
    bias_argument: ClassVar[str] = ""
    """The same where it is a relative position bias that all blocks share; such blocks may also have one of their own.
    """
    mask_argument: ClassVar[str] = ""
    """Name of the only argument that is an attention mask; "" where any argument besides the table may be one."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        """The norm before attention."""
        raise NotImplementedError

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Streams `first` to `last` (exclusive) of (query, key, value) for these tokens, each (B, H, T, D), normed."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        """Fused attention, output projection, layer scale and drop path: what is added to the residual stream."""
        raise NotImplementedError

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        """As `attend` for all tokens, by one call of the attention layer, if `runs_whole` says so; None otherwise.

        Hooks on the layer, or a `forward` set on it, see that call, and what they return is used. A family without
        this step refuses them.
        """
        if by := self.attention_is_intercepted():
            raise VitrimError(
                f"the {self.vitrim_attention} of block {self.vitrim_index} has {by}, which cannot run: this block "
                "computes its attention in parts; put hooks on the block or on the layers inside its attention"
            )
        return None

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        """The MLP half of the block, residual included."""
        raise NotImplementedError

    @property
    def head_scale(self) -> float:
        """The factor of the attention logits."""
        raise NotImplementedError

    def rows_of_table(self, table: Any, place_BM: Tensor) -> Any:
        """The rows of the rotary table for patch tokens at these places, image by image."""
        raise NotImplementedError

    def rotate(self, stream_BHTD: Tensor, table: Any) -> Tensor:
        """Queries or keys, prefix tokens first, with the patch tokens rotated by their rows of the table."""
        raise NotImplementedError

    def position_bias(self, shared: Any) -> Tensor | None:
        """Relative position bias (H, P + N, P + N) for all tokens that the model started with; None without one.

        `shared` is what the model gave the block as `bias_argument`.
        """
        return None

    def scored(self, stream_BHTD: Tensor) -> Tensor:
        """The heads of queries or keys by which tokens are chosen."""
        return stream_BHTD

    @property
    def attends(self) -> bool:
        """False where the attention of this block was removed, so that it gives no keys or scores."""
        return True

    def runs_whole(self, bias: Tensor | None) -> bool:
        """Whether the attention layer must be called as a whole, since others act on its calls.

        Raises:
            VitrimError: a `forward` set on it would have to add sizes of tokens to its logits; it may ignore them.
        """
        by = self.attention_is_intercepted()
        if by == OWN_FORWARD and bias is not None:
            raise VitrimError(
                f"the {self.vitrim_attention} of block {self.vitrim_index} has {by}, which may ignore the mask that "
                "holds the sizes of merged tokens; del it (or undo the patch of its class), or use a reducer that "
                "needs no sizes, such as TopK() or ToMe(prop_attn=false)"
            )
        return by != ""

    def attention_is_intercepted(self) -> str:
        """What others did to the attention layer that acts on its calls alone; "" without such.

        Raises:
            VitrimError: it is another layer than the one that the reduction was attached to.
        """
        if not self.vitrim_attention:
            return ""
        attention = self.get_submodule(self.vitrim_attention)
        if is_new(attention):
            raise VitrimError(
                f"the {self.vitrim_attention} of block {self.vitrim_index} was replaced; call handle.remove(), then "
                "attach again"
            )
        return intercepted(attention)
