"""What a model costs per image: MACs with and without products of activations, parameters, tokens per block."""

from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedModelError
from ..models.finding import find_adapter
from ..models.foreign_macs import counted, num_parameters
from ..models.input_format import InputFormat
from ..models.reduction.attached import attached
from ..tokens import Plan


@dataclass(frozen=True)
class Cost:
    """Cost of one image.

    macs: multiply-accumulates of everything that is executed, attention products included.
    macs_linear_only: the same without products of activations, as some papers count.
    params: parameters, shared ones once; packed weights of quantised layers included.
    token_counts: tokens leaving each block, prefix included.
    """

    macs: int
    macs_linear_only: int
    params: int
    token_counts: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.macs / 1e9:.3f} GMACs ({self.macs_linear_only / 1e9:.3f} without attention products), "
            f"{self.params / 1e6:.2f} M parameters, tokens {' '.join(map(str, self.token_counts))}"
        )


def cost(model: nn.Module, *, training: bool | None = None) -> Cost:
    """Cost of one image of the model's own input size, with the reduction that is attached.

    It is counted from the sizes of the layers. The model is not called, so another thread may use it meanwhile.

    Args:
        model: any model that an adapter supports.
        training: in training or in eval mode; by default in the model's present mode.

    Raises:
        UnsupportedModelError: no adapter knows the model.
    """
    adapter, handle = find_adapter(model), attached(model)
    if handle is None:
        g = adapter.geometry(model)
        training = model.training if training is None else training
        patches = adapter.patches_entering(model, training=training)
        plan, reducer = Plan(patches, g.num_prefix, g.depth, ()), None
    else:
        plan, reducer = handle.plan(training=training), handle.reduction.reducer if handle.reduction else None
    macs = adapter.macs(model, plan, reducer)
    return Cost(macs.total, macs.linear, num_parameters(model), plan.token_counts)


def cost_of_any(model: nn.Module, *, training: bool | None = None) -> Cost:
    """As `cost`, also for a model without an adapter, such as a CNN: no token counts, MACs as PyTorch counts them.

    Raises:
        UncountableError: its MACs depend on values.
    """
    try:
        return cost(model, training=training)
    except UnsupportedModelError:
        macs = counted(model, (1, *InputFormat.of(model).size))
        return Cost(macs.total, macs.linear, num_parameters(model), ())
