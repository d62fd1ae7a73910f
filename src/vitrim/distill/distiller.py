"""Student, teacher and objective in one module, so that a training loop wraps, calls and optimises a single thing."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DistillError
from ..models import find_adapter, without_limit
from .features import Anatomy, Outputs, idle_parameters, look, whereabouts
from .objective import Batch, Term, Terms
from .teacher import Teacher, grid_of


class Known(Protocol):
    """Anything that stands in for a live teacher, such as a `TeacherCache`."""

    anatomy: Anatomy


class Distilled(NamedTuple):
    """loss: weighted sum, with its graph. terms: each one unweighted, detached. logits: (B, K), detached, or None."""

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None


class Distiller(nn.Module):
    """Computes the objective in one forward call, as DDP and FSDP need it.

    Optimise `parameters()` that require gradients: those of the student and of `projections`. Checkpoints hold just
    these. `distiller.student` is the network to evaluate and to keep.

    Args:
        student: a timm model, reduced by `vitrim.attach` or not; for `Labels` and `Logits`, any network.
        teacher: live, or a `TeacherCache` whose outputs then come with each batch; None where no term asks for one.
        terms: the objective, or its text.
        criterion: the loss on labels of the term `Labels`: of logits (B, K) and targets.

    Raises:
        DistillError: terms that these two networks cannot serve; class counts that differ.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | Known | None,
        terms: Terms | Sequence[Term] | str,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        self.student = student
        live = isinstance(teacher, Teacher)
        self.teacher, self.known = (teacher, None) if live else (None, teacher)
        self.terms = Terms.parse(terms)
        self.criterion = criterion
        self._look = look
        own, theirs = Anatomy.of(student), None if teacher is None else teacher.anatomy
        projections: dict[str, nn.Module] = {}
        if teacher is not None and not any(term.asks for term in self.terms.terms):
            raise DistillError(
                f"no term of {self.terms} asks the teacher; leave teacher out, or add one such as Logits()"
            )
        for term in self.terms.terms:
            check_pair(term, own, theirs)
            term.check(student)
            made = None if theirs is None else term.project(own, theirs)
            if made is not None:
                projections[term.name] = made
        self.projections = nn.ModuleDict(projections)
        self.of_student, self.of_teacher = self.terms.wanted(of_teacher=False), self.terms.wanted(of_teacher=True)
        if self.teacher is not None:
            held = {id(parameter) for parameter in self.teacher.parameters()}
            if any(id(parameter) in held for parameter in student.parameters()):
                raise DistillError("student and teacher share weights; give the teacher its own with copy.deepcopy")
        self.register_load_state_dict_post_hook(_expect_no_teacher)

    @property
    def classifies(self) -> bool:
        """Whether the terms teach classes, so that accuracy means something."""
        return self.of_student.logits or self.of_student.dist_logits

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the student's forward pass, features included; options are those of torch.compile.

        Every number of tokens that a curriculum passes through is compiled for, however many there are.
        """
        self.student.compile(*args, **options)
        self.student._compiled_call_impl = without_limit(self.student._compiled_call_impl)
        if self.of_student.features:  # Collected by another method than the one that is compiled with a module.
            self._look = without_limit(torch.compile(look, *args, **options))

    def rely_on(self, known: Known) -> None:
        """Let go of the live teacher: from now on its outputs come with each batch, from this cache of them."""
        self.teacher, self.known = None, known

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        known: Outputs | None = None,
        progress: float = 0.0,
    ) -> Distilled:
        """The objective on one batch.

        Args:
            images: (B, channels, H, W), augmented, mixed and normalised for the student.
            targets: (B,) classes or (B, K) probabilities, for `Labels`.
            known: the teacher's outputs on these very images, from a cache; None asks the live teacher.
            progress: fraction of training that has passed, in [0, 1], for weights that change.
        """
        student = self._look(self.student, images, self.of_student)
        if "tokens" in student:
            student |= whereabouts(self.student, student["tokens"])
        if known is None:
            known = self._ask(images, student)
        batch = Batch(student, known, targets, self.criterion)
        maps = dict(self.projections.items())
        values = {term.name: term.compare(batch, maps.get(term.name)) for term in self.terms.terms}
        weighted = [term.weight_at(progress) * values[term.name] for term in self.terms.terms]
        loss = sum(weighted[1:], weighted[0])
        logits = student["logits"].detach() if "logits" in student else None
        return Distilled(loss, {name: value.detach() for name, value in values.items()}, logits)

    def _ask(self, images: Tensor, student: Outputs) -> Outputs:
        if not any(term.asks for term in self.terms.terms):
            return {}
        if self.teacher is None:
            raise DistillError("there is no live teacher; give its outputs from the cache as known=")
        grid = None
        if "origin" in student:
            grid = grid_of(student["origin"].shape[1], images.shape[-2:])
        return self.teacher(images, self.of_teacher, grid)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP, which asks for it, leaves alone: the frozen teacher and what no term teaches.

        DDP waits for a gradient of every other parameter and sends every other buffer around.
        """
        frozen = [name for name, _ in (*self.named_parameters(), *self.named_buffers()) if name.startswith("teacher.")]
        if not self.of_student.features:
            return frozen
        reads = {name for term in self.terms.terms for name in term.reads}
        return [*frozen, *(f"student.{name}" for name in idle_parameters(self.student, self.of_student, reads))]


def student_grid(student: nn.Module) -> tuple[int, int]:
    """Rows and columns of the student's patch tokens at its own input size, for a cache."""
    geometry = find_adapter(student).geometry(student)
    return grid_of(geometry.num_patches, geometry.input_size[1:])


def check_pair(term: Term, student: Anatomy, teacher: Anatomy | None) -> None:
    """Raise `DistillError` where these two networks cannot serve the term."""
    what = type(term).__name__
    if term.asks and teacher is None:
        raise DistillError(f"the term {what} needs a teacher")
    theirs = teacher if term.asks else None
    for role, anatomy, names in (("student", student, term.reads), ("teacher", theirs, term.asks)):
        if anatomy is None:
            continue
        if "logits" in names and anatomy.num_classes == 0:
            raise DistillError(f"the term {what} reads logits, but the {role} {anatomy.name} has no head")
        if "dist_logits" in names and not (anatomy.has_dist and anatomy.num_classes):
            raise DistillError(f"the term {what} needs a {role} with a distillation token, which {anatomy.name} is not")
        features = {"stages", "cls", "tokens"} & set(names)
        if features and not anatomy.depth:
            raise DistillError(f"{anatomy.name} gives the {role}'s logits alone; the term {what} reads {min(features)}")
        if {"stages", "cls"} & set(names) and not anatomy.has_cls:
            raise DistillError(f"the term {what} reads CLS, which the {role} {anatomy.name} does not have; use Tokens")
    if theirs is not None and "logits" in term.asks and student.num_classes != theirs.num_classes:
        raise DistillError(
            f"the teacher {theirs.name} has {theirs.num_classes} classes, the student {student.num_classes}; "
            f"{what} compares them one by one, so give both the same classes or use terms on features"
        )


def _expect_no_teacher(module: nn.Module, keys: Any) -> None:
    # `Teacher.state_dict` writes nothing, so nothing of it can be missing.
    keys.missing_keys[:] = [key for key in keys.missing_keys if not f".{key}".rpartition(".teacher.")[1]]
