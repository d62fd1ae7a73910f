"""Whether a converted network is the same: all weights of the old one are in it, and both give the same outputs."""

import copy

import torch
from torch import Tensor, nn

from ....errors import UnsupportedModelError, VitrimError
from ....text import short_name
from ....tokens.precision import rounding, without_autocast
from ...adapter import State
from ...evaluating import evaluating
from ...finding import adapter_of
from .weight_names import Named

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""In transformers -> in timm."""
_UNUSED_IN_EVALUATION = "mask_token"


def weights_of(model: nn.Module) -> State:
    """All weights and buffers of the model that it saves, on the CPU."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def epsilon(model: nn.Module) -> float:
    """That of all norms; `UnsupportedModelError` where they have several, which neither library builds."""
    found = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(found) != 1:
        raise UnsupportedModelError(
            f"the norms of this {type(model).__name__} are not all LayerNorm with one epsilon; the other library "
            "builds no such network"
        )
    return found.pop()


def load_weights(new: nn.Module, state: State, named: Named) -> None:
    """Load weights into the new model.

    Args:
        new: the new model.
        state: all weights of the old one.
        named: what of the new model they become; names that it does not have are left out.

    Raises:
        UnsupportedModelError: a weight of the old model has no place in the new one, or the other way round.
    """
    own, found, used = new.state_dict(), State(), set[str]()
    kind = type(new).__name__
    for name, value, read in named:
        if name in own:
            if value.shape != own[name].shape:
                shapes = " and ".join(str(tuple(each.shape)) for each in (value, own[name]))
                raise UnsupportedModelError(f"{read[0]} and {name} of a {kind} differ in shape: {shapes}")
            found[name] = value
            used.update(read)
    for name, _ in new.named_parameters():
        if name not in found and not name.endswith(_UNUSED_IN_EVALUATION):
            found[name] = _without_effect(new, name)
    for name, value in state.items():
        zero_bias = name.endswith("bias") and not value.any()
        if name not in used and not name.endswith(_UNUSED_IN_EVALUATION) and not zero_bias:
            hint = "; set it to zero to convert the model without it" if name.endswith("bias") else ""
            raise UnsupportedModelError(f"a {kind} has no place for {name} of this model{hint}")
    new.load_state_dict({**own, **found})


def _without_effect(new: nn.Module, name: str) -> Tensor:
    """The value with which this weight, which the old model lacks, changes nothing."""
    module, _, part = name.rpartition(".")
    if part == "bias" and isinstance(new.get_submodule(module), nn.Linear | nn.Conv2d):
        return torch.zeros_like(new.get_parameter(name))
    if part == "lambda1":  # Of a layer scale.
        return torch.ones_like(new.get_parameter(name))
    raise UnsupportedModelError(f"nothing in the model belongs to {name} of a {type(new).__name__}")


@torch.no_grad()
def check_same(old: nn.Module, new: nn.Module) -> None:
    """Compare the tokens that leave the last block, and the outputs, on one batch of noise in float32.

    Args:
        old: stays as it is.
        new: in float32 on the CPU.

    Raises:
        UnsupportedModelError: they differ by more than rounding, or one of them cannot run.
        VitrimError: the old one gives values that are not finite.
    """
    size = adapter_of(old).input_format(old).size
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0), device="cpu")
    if any(value.is_floating_point() and (value.dtype, value.device) != (images.dtype, images.device)
           for value in old.state_dict().values()):  # fmt: skip
        old = copy.deepcopy(old).cpu().float()
    expected, found = _outputs(old, images), _outputs(new, images)
    for name, value in expected.items():
        if not value.isfinite().all():
            raise VitrimError(f"the model gives {name} that are not finite, so that no other can be compared with it")
        if found[name].shape != value.shape:
            shapes = " where this model gives ".join(str(tuple(each.shape)) for each in (found[name], value))
            raise UnsupportedModelError(f"a {type(new).__name__} gives {name} of shape {shapes}")
        worst, allowed = float((found[name] - value).abs().max()), rounding(value)
        if not worst <= allowed:
            raise UnsupportedModelError(
                f"a {type(new).__name__} with the weights of this {type(old).__name__} gives {name} that differ by "
                f"{worst:.1e}, where rounding explains {allowed:.1e}: the other library builds no such network"
            )


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    adapter = adapter_of(model)
    last = len(adapter.blocks(model)) - 1
    try:
        with evaluating(model), without_autocast(images):
            final, after = adapter.features(model, images, [last])
            return {"tokens": torch.cat(after[last], 1), "outputs": adapter.head(model, final)}
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = short_name(" ".join(str(error).split()), 200)
        size = " x ".join(map(str, images.shape[1:]))
        raise UnsupportedModelError(f"this {type(model).__name__} cannot run on images of {size}: {reason}") from error
