"""The exchange of a model's classes for their reduced ones, and its exact undoing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from inspect import isfunction
from types import MethodType
from typing import Any, ClassVar, Concatenate, NoReturn, ParamSpec, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

from ...errors import UnsupportedModelError, VitrimError
from ..adapter import Adapter
from ..own_code import replaced, set_on
from .policy import Policy

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Module = TypeVar("Module", bound=nn.Module)
OWN_FORWARD = "a forward of its own"
_REPLACES = "vitrim_replaces"
"""Attribute of each module whose class was exchanged, and of the attention of blocks: by name, the methods of its own
class, when the reduction was attached, whose work is done in another way. None in place of a method that was not the
library's own then."""
Method = tuple[nn.Module, str, object, object]
"""Module, name of a method set on it, its value before, and ours."""


class Reduced(nn.Module):
    """Base of the classes that replace foreign ones while a reduction is attached."""

    vitrim_policy: Policy
    vitrim_foreign: ClassVar[type[nn.Module]]
    """The class of the module without a reduction."""
    vitrim_free: tuple[str, ...] = ()
    """Overridden methods that may also be set on the instance by others, since the reduction acts without them."""
    vitrim_heads: tuple[str, ...] = ()
    """Methods on which the weighing of merged tokens relies, so that they must be the library's own."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.vitrim_foreign = next(one for one in cls.__mro__ if not issubclass(one, Reduced))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a model gets its reduction by `attach`, which exchanges its class."""
        foreign = self.vitrim_foreign
        raise VitrimError(
            f"type(model) is the class of a reduced {foreign.__name__}, which makes no new models; make one by "
            f"{foreign.__module__.partition('.')[0]}'s own {foreign.__name__}, or copy this one: copy.deepcopy(model)"
        )

    def check_own(self, method: str, where: str) -> None:
        """Raise `VitrimError` where a method was replaced after attach: this one, or one that is called no more."""
        kept = vars(self).get(_REPLACES, {})
        for name in (method,) if "vitrim_index" in vars(self) else kept:
            if name in kept and kept[name] is not getattr(self.vitrim_foreign, name):
                raise VitrimError(
                    f"the {name} of the class of {where} was replaced, which a reduction does not run; undo that "
                    "patch, or put hooks on the module"
                )
            if name != "forward" and name in vars(self) and self.vitrim_policy.fuses and set_on(self, name):
                raise VitrimError(
                    f"{where} has a {name} of its own, set on the instance, which would count a token that stands "
                    "for several patches once; `del` it, or put hooks on the module"
                )

    def __prepare_scriptable__(self) -> NoReturn:
        """What `torch.jit.script` calls first."""
        raise VitrimError(
            "torch.jit.script cannot compile a model with a reduction; use torch.jit.trace or torch.export, which keep "
            "it, or call handle.remove() first"
        )


def while_attached(
    method: Callable[Concatenate[Module, Arguments], Result],
) -> Callable[Concatenate[Module, Arguments], Result]:
    """A method of a reduced class that, once the reduction is removed, becomes that of the class which is back.

    Wrappers such as accelerate's hooks keep `module.forward` as it was when they came.
    """

    @wraps(method)
    def run(self: Module, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if isinstance(self, Reduced):
            if "vitrim_index" not in vars(self):  # A block runs its own forward wherever it does not cut.
                self.check_own(method.__name__, f"this {self.vitrim_foreign.__name__}")
            return method(self, *args, **kwargs)
        return getattr(type(self), method.__name__)(self, *args, **kwargs)

    return run


@dataclass
class Exchange:
    """What was changed in a model: classes, and the methods that were set on instances."""

    classes: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = field(default_factory=list)
    methods: list[Method] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, adapter: Adapter, policy: Policy) -> "Exchange":
        """Exchange the classes of the blocks, of the parts that read their tokens, and of the model itself."""
        blocks = adapter.blocks(model)
        parts = [part for part in adapter.parts(model) if part is not model]
        if len({id(block) for block in blocks}) < len(blocks):
            raise UnsupportedModelError("two blocks of this model are the same module, which cannot be reduced")
        # Everything is looked up before anything is changed, so that a refusal leaves the model as it was.
        exchange = cls()
        for module in (*blocks, *parts, model):
            reduced = adapter.reduced_class(module)
            exchange.classes.append((module, type(module), reduced))
            at = len(exchange.classes) - 1
            name = "the model" if module is model else f"block {at}" if at < len(blocks) else type(module).__name__
            exchange.methods += _bound_again(module, reduced, name, policy)
            for method in _computed_otherwise(type(module), reduced, policy):
                if replaced(type(module), method):
                    hooks = ", or put hooks on the blocks" if at < len(blocks) else ""
                    raise UnsupportedModelError(
                        f"the {method} of the class {type(module).__name__} was replaced, which a reduction would not "
                        f"run; undo that patch before attach{hooks}"
                    )
        for index, (module, own, reduced) in enumerate(exchange.classes):
            module.__class__ = reduced
            vars(module)["vitrim_policy"] = policy
            vars(module)[_REPLACES] = {name: getattr(own, name) for name in _computed_otherwise(own, reduced, policy)}
            if index < len(blocks):
                vars(module)["vitrim_index"] = index
                vars(module)["vitrim_attention"] = next(iter(adapter.branches_of(model)), "")
                for attention in _done_in_parts(module):
                    forward = None if replaced(type(attention)) else type(attention).forward
                    vars(attention)[_REPLACES] = {"forward": forward}
        for module, name, _, ours in exchange.methods:
            vars(module)[name] = ours
        return exchange

    def undo(self) -> None:
        """Put everything back."""
        for module, _, reduced in self.classes:
            if type(module) is not reduced:
                raise VitrimError(
                    f"the class of a {reduced.__name__} was changed to {type(module).__name__} after attach (as by "
                    "fully_shard or a parametrization); undo that first"
                )
        for module, original, _ in self.classes:
            module.__class__ = original
            if "vitrim_attention" in vars(module):
                for attention in _done_in_parts(module):
                    vars(attention).pop(_REPLACES, None)
            for name in ("vitrim_policy", "vitrim_index", "vitrim_attention", _REPLACES):
                vars(module).pop(name, None)
        for module, name, before, ours in self.methods:
            if vars(module).get(name) is ours:
                vars(module)[name] = before


def _bound_again(module: nn.Module, reduced: type[nn.Module], where: str, policy: Policy) -> list[Method]:
    """Methods set on an instance, bound to the reduced class in place of the foreign one.

    accelerate's hooks keep the original in `_old_forward`, and leave `forward` on the instance when they are removed.
    """
    changes: list[Method] = []
    needed = _computed_otherwise(type(module), reduced, policy)
    for name in dict.fromkeys((*_overridden(type(module), reduced), *needed)):
        held = vars(module).get(name)
        if held is None:
            continue
        original, ours = getattr(type(module), name), MethodType(getattr(reduced, name), module)
        if original is getattr(reduced, name) and not set_on(module, name):
            continue  # Bound to the instance, and not overridden.
        kept = vars(module).get("_old_forward") if name == "forward" else None
        if getattr(held, "__func__", None) is original:
            changes.append((module, name, held, ours))
        elif getattr(kept, "__func__", None) is original:
            changes.append((module, "_old_forward", kept, ours))
        elif name in needed:
            later = "attach first and set it afterwards, or `del` it" if name == "forward" else "`del` it, or use hooks"
            raise UnsupportedModelError(
                f"{where} has a {name} of its own, set on the instance, which the reduction would not reach; {later}"
            )
    return changes


def _overridden(original: type[nn.Module], reduced: type[nn.Module]) -> list[str]:
    ours = [cls for cls in reduced.__mro__ if issubclass(cls, Reduced) and cls is not Reduced]
    names = dict.fromkeys(name for cls in ours for name in vars(cls) if not name.startswith("_"))
    return [name for name in names if name == "forward" or (hasattr(original, name) and not hasattr(nn.Module, name))]


def _computed_otherwise(original: type[nn.Module], reduced: type[nn.Module], policy: Policy) -> list[str]:
    """The methods of a foreign class whose work its reduced class may do in another way, or which it relies on."""
    free = getattr(reduced, "vitrim_free", ())
    heads = getattr(reduced, "vitrim_heads", ()) if policy.fuses else ()
    names = dict.fromkeys((*(name for name in _overridden(original, reduced) if name not in free), *heads))
    return [name for name in names if isfunction(getattr(original, name, None))]


def _done_in_parts(block: nn.Module) -> list[nn.Module]:
    """The layers inside a block whose work a block that cuts does in their place."""
    if name := vars(block)["vitrim_attention"]:
        return [block.get_submodule(name)]
    return [module for module in block.modules() if module is not block]


def reduced_blocks(blocks: Sequence[nn.Module], policy: Policy) -> bool:
    """Whether these are the blocks of the policy, in their order; each may be inside a wrapper."""
    found = [
        vars(module)["vitrim_index"]
        for block in blocks
        for module in block.modules()
        if isinstance(module, Reduced) and module.vitrim_policy is policy and "vitrim_index" in vars(module)
    ]
    return found == list(range(policy.geometry.depth)) and len(blocks) == len(found)


def intercepted(module: nn.Module) -> str:
    """What else acts on calls of this module: "a hook", "a forward of its own", or nothing."""
    # torch's own shortcut in `Module.__call__` checks the same four.
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a hook"
    if module._forward_hooks and any(acts(hook) for hook in module._forward_hooks.values()):
        return "a hook"
    if vars(module).get(_REPLACES, {}).get("forward", type(module).forward) is not type(module).forward:
        return OWN_FORWARD
    own: Any = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return OWN_FORWARD
    return ""


def is_new(attention: nn.Module) -> bool:
    """Whether this attention layer was not there when the reduction was attached."""
    return _REPLACES not in vars(attention)


def acts(hook: object) -> bool:
    """Whether a hook can do anything: those of transformers stay after the first `output_hidden_states=True`.

    On layers inside a block they act only where attention maps are asked for, which reduced models refuse.
    """
    return getattr(hook, "__module__", "") != "transformers.utils.output_capturing"


def observed(block: nn.Module) -> bool:
    """Whether anybody sees the calls inside this block: hooks anywhere in it, or on all modules."""
    return bool(torch_module._has_any_global_hook()) or any(
        intercepted(module) != "" for module in block.modules() if module is not block
    )
