"""Whether a converted network is the same: all weights of the old one are in it, and both give the same outputs."""

import torch
from torch import Tensor, nn

from ....errors import UnsupportedModelError, VitrimError
from ....text import short_name
from ....tokens.precision import rounding, without_autocast
from ...adapter import State
from ...copying import copied
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
                source = read[0] if read else name
                raise UnsupportedModelError(f"{source} of this model and {name} of {kind} differ in shape: {shapes}")
            found[name] = value
            used.update(read)
    for name, _ in new.named_parameters():
        if name not in found and not name.endswith(_UNUSED_IN_EVALUATION):
            found[name] = _without_effect(new, name)
    for name, value in state.items():
        bias = name.endswith("bias")
        without_effect = name.endswith(_UNUSED_IN_EVALUATION) or not value.numel() or (bias and not value.any())
        if name not in used and not without_effect:
            hint = "; set it to zero to convert the model without it" if bias else ""
            raise UnsupportedModelError(f"{name} of this model has no place in {kind} of the other library{hint}")
    new.load_state_dict({**own, **found})


def _without_effect(new: nn.Module, name: str) -> Tensor:
    """The value with which this weight, which the old model lacks, changes nothing."""
    module, _, part = name.rpartition(".")
    if not new.get_parameter(name).numel():  # No registers.
        return new.get_parameter(name).detach()
    if part == "bias" and isinstance(new.get_submodule(module), nn.Linear | nn.Conv2d):
        return torch.zeros_like(new.get_parameter(name))
    if part == "lambda1":  # Of a layer scale.
        return torch.ones_like(new.get_parameter(name))
    raise UnsupportedModelError(f"nothing in the model belongs to {name} of {type(new).__name__}")


@torch.no_grad()
def check_same(old: nn.Module, new: nn.Module) -> None:
    """Compare the tokens that leave the last block, and the outputs, on one batch of noise in float32.

    Args:
        old: stays as it is.
        new: the converted one.

    Raises:
        UnsupportedModelError: they differ by more than rounding, or one of them cannot run.
        VitrimError: the old one gives values that are not finite.
    """
    size = adapter_of(old).input_format(old).size
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0), device="cpu")
    # Rotary tables that were made in half precision stay rounded in a copy in float32.
    coarsest = max((dtype for dtype, _ in _kinds(old)), key=lambda dtype: torch.finfo(dtype).eps)
    expected, found = (_outputs(_in_float32(model), images) for model in (old, new))
    for name, value in expected.items():
        if not value.isfinite().all():
            raise VitrimError(f"the model gives {name} that are not finite, so that no other can be compared with it")
        if found[name].shape != value.shape:
            shapes = " where this model gives ".join(str(tuple(each.shape)) for each in (found[name], value))
            raise UnsupportedModelError(f"{type(new).__name__} gives {name} of shape {shapes}")
        worst, allowed = float((found[name] - value).abs().max()), rounding(value, coarsest)
        if not worst <= allowed:
            raise UnsupportedModelError(
                f"{type(new).__name__} with the weights of this {type(old).__name__} gives {name} that differ by "
                f"{worst:.1e}, where rounding explains {allowed:.1e}: the other library builds no such network"
            )


def _kinds(model: nn.Module) -> set[tuple[torch.dtype, str]]:
    return {(value.dtype, value.device.type) for value in model.state_dict().values() if value.is_floating_point()}


def _in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy of it in float32 on the CPU."""
    return model if _kinds(model) == {(torch.float32, "cpu")} else copied(model).cpu().float()


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
