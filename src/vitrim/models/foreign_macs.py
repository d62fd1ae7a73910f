"""MACs of modules: from the sizes of their layers, or by PyTorch's own counter on an empty copy.

The modules of a model are never called, moved or changed: a copy shares no tensor with them, holds no data and runs no
hook, so that another thread may use the model meanwhile.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UncountableError
from .macs import Macs

_HOOKS = (
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_LIBRARIES = frozenset({"torch", "torchao", "timm", "transformers", "vitrim"})
"""Whose layers do what their sizes say."""
_KNOWN: ContextVar[dict[tuple[int, int], tuple[nn.Module, int]] | None] = ContextVar("known MACs", default=None)


@contextmanager
def counting_once() -> Iterator[None]:
    """Within this context each layer is counted once, for many plans of models that do not change meanwhile."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def macs_per_row(layer: nn.Module, width: int) -> int:
    """MACs of a layer, or of all linear layers inside a module, for one row of input of this width.

    Layers of PyTorch and of the libraries of models are counted from their `in_features` and `out_features`, quantised
    ones too. What holds layers from elsewhere (LoRA and its kin, layers of your own) is counted by PyTorch as it runs.
    Where it cannot run without values, innermost layers that say their sizes (4-bit weights) count as plain ones.

    Warns of work that is done once per batch, however many rows it has, as on the weights in DoRA: no row has a share.

    Raises:
        UncountableError: see `counted`; or the work does not grow with the number of rows.
    """
    known, key = _KNOWN.get(), (id(layer), width)
    if known is None:
        return _macs_per_row(layer, width)
    if key not in known:  # The layer is kept too, so that no other one can get its id.
        known[key] = layer, _macs_per_row(layer, width)
    return known[key][1]


def _macs_per_row(layer: nn.Module, width: int) -> int:
    weights = sum(parameter.ndim > 1 for parameter in layer.parameters())
    unsized = weights > sum(any(p.ndim > 1 for p in one.parameters()) for one in _all_sized(layer))
    if unsized or not {type(module).__module__.partition(".")[0] for module in layer.modules()} <= _LIBRARIES:
        try:
            return _measured(layer, width)
        except UncountableError as error:
            try:
                return _measured(layer, width, plain=True)
            except UncountableError:
                raise error from None
    return sum(one.in_features * one.out_features for one in _sized(layer))


def _measured(layer: nn.Module, width: int, *, plain: bool = False) -> int:
    """MACs by row of one call, from the calls on three numbers of rows."""
    few, more, most = (counted(layer, (1, rows, width), known_only=True, plain=plain).total for rows in (8, 16, 24))
    if most - more != more - few:
        raise UncountableError(f"the MACs of this {type(layer).__qualname__} do not grow evenly with its rows of input")
    if 2 * few > more:
        warnings.warn(
            f"a {_maker(layer)} also works once per batch, however many images there are, as on its weights; these "
            "MACs are not counted per image (merge adapters into the weights to be rid of them)",
            stacklevel=2,
        )
    return (more - few) // 8


def _maker(layer: nn.Module) -> str:
    """The class of the first layer from elsewhere, which is outermost."""
    kinds = (type(module) for module in layer.modules())
    return next(
        (kind for kind in kinds if kind.__module__.partition(".")[0] not in _LIBRARIES), type(layer)
    ).__qualname__


def macs_of_convolutions(layers: nn.Module, height: int, width: int) -> int | None:
    """MACs of plain convolutions one after another, on one image; None where anything else may cost some."""
    total = 0
    for layer in layers if type(layers) is nn.Sequential else [layers]:
        if type(layer) is nn.Conv2d and not isinstance(layer.padding, str):
            sizes = zip((height, width), layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
            height, width = ((n + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for n, kernel, step, pad, gap in sizes)
            total += height * width * layer.weight.numel()
        elif type(layer) not in (nn.BatchNorm2d, nn.GELU, nn.ReLU, nn.Identity):
            return None
    return total


def num_parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones once; the weights of quantised layers that hide them count by their sizes."""
    packed = [one for one in _all_sized(model) if not any(True for _ in one.parameters())]
    hidden = sum((one.in_features + (getattr(one, "bias", None) is not None)) * one.out_features for one in packed)
    return sum(parameter.numel() for parameter in model.parameters()) + hidden


def counted(module: nn.Module, *shapes: Sequence[int], known_only: bool = False, plain: bool = False) -> Macs:
    """MACs of one call in eval mode on tensors of these shapes, by PyTorch's own counter on an empty copy.

    Args:
        module: what is called.
        shapes: of its arguments.
        known_only: whether to refuse operations that are not PyTorch's own, of which its counter knows nothing.
        plain: whether innermost layers that say their sizes are replaced by plain ones.

    Raises:
        UncountableError: the module cannot run on tensors without values.
    """
    seen = _Namespaces()
    counter = FlopCounterMode(display=False)
    # PyTorch's tracker of modules hooks every call of every module in the process, those of other threads too.
    counter.mod_tracker = _NoTracker()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        empty = _with_plain_layers(empty_copy(module)) if plain else empty_copy(module)
        dtype = next((p.dtype for p in empty.parameters() if p.is_floating_point()), torch.get_default_dtype())
        with torch.no_grad(), counter, seen if known_only else nullcontext():
            empty(*(torch.empty(tuple(shape), device="meta", dtype=dtype) for shape in shapes))
    except Exception as error:  # Foreign code may raise anything where tensors hold no values.
        reason = str(error).strip().partition("\n")[0][:200]
        raise UncountableError(
            f"the MACs of this {type(module).__qualname__} cannot be counted, since it does not run on tensors without "
            f"values ({type(error).__name__}: {reason})"
        ) from error
    if foreign := seen.found - {"aten", "prim", "prims"}:
        raise UncountableError(f"this {type(module).__qualname__} runs operations of {', '.join(sorted(foreign))}")
    counts = counter.get_flop_counts().get("Global", {})
    products = sum(flops for op, flops in counts.items() if "bmm" in str(op) or "attention" in str(op))
    return Macs((counter.get_total_flops() - products) // 2, products // 2)


def empty_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode with every tensor on the meta device, without hooks and without patched `forward` methods.

    No code of the module runs. Lists and dicts among its attributes are copied; other objects are shared.
    """
    return _empty(module, {})


class _Namespaces(TorchDispatchMode):
    """Notes whose operations are run, such as "aten" for PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(func.namespace)
        return func(*args, **(kwargs or {}))


class _NoTracker:
    """Counts everything under one name, without hooks."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _has_sizes(module: Any) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def _all_sized(module: nn.Module) -> Iterator[Any]:
    """The innermost layers that say their sizes."""
    inner = [one for child in module.children() for one in _all_sized(child)]
    if inner or not _has_sizes(module):
        yield from inner
    else:
        yield module


def _with_plain_layers(module: nn.Module) -> nn.Module:
    """An empty module with plain linear layers where its innermost layers say their sizes, all of one dtype."""
    for inner in [one for one in _all_sized(module) if type(one) is not nn.Linear]:
        bias = getattr(inner, "bias", None) is not None
        linear = nn.Linear(inner.in_features, inner.out_features, bias, device="meta")
        if inner is module:
            return linear
        for name in [name for name, one in module.named_modules() if one is inner]:
            module.set_submodule(name, linear)
    return module.float()


def _sized(layer: Any) -> Iterator[Any]:
    """The same without low-rank parts that are merged or disabled, which do not run."""
    if getattr(layer, "merged", False) is True or getattr(layer, "disable_adapters", False) is True:
        layer = getattr(layer, "base_layer", layer)
    inner = [one for child in layer.children() for one in _sized(child)]
    if inner or not _has_sizes(layer):
        yield from inner
    else:
        yield layer


def _empty(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        tensor = torch.empty(value.shape, dtype=value.dtype, device="meta")
        copy = nn.Parameter(tensor, requires_grad=False) if isinstance(value, nn.Parameter) else tensor
    elif isinstance(value, nn.Module):
        copy = memo[id(value)] = value.__class__.__new__(value.__class__)
        state = {name: _empty(part, memo) for name, part in vars(value).items() if name not in _HOOKS}
        state.update({name: OrderedDict() for name in _HOOKS}, training=False)
        for patched in ("forward", "_compiled_call_impl"):
            state.pop(patched, None)
        copy.__dict__.update(state)
        return copy
    elif type(value) in (dict, OrderedDict):
        copy = type(value)((name, _empty(part, memo)) for name, part in value.items())
    elif type(value) in (list, tuple, set):
        copy = type(value)(_empty(part, memo) for part in value)
    else:
        return value
    memo[id(value)] = copy
    return copy
