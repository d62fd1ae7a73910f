"""Student, teacher and objective in one module, so that a training loop wraps, calls and optimises a single thing."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DistillError
from ..models import adapter_of, compile, without_limit
from ..models.outputs import Logits, ModelInfo, Output, Outputs, Wanted
from .idle import idle_parameters
from .objective import Batch, Term, Terms
from .prediction_terms import Labels
from .teacher import Teacher


class Known(Protocol):
    """Anything that can replace a live teacher, such as a `TeacherCache`."""

    info: ModelInfo


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
        student: a model of a known family, reduced by `vitrim.attach` or not; for `Labels` and `Logits`, any network.
        teacher: live, or a `TeacherCache` whose outputs then come with each batch; None where no term reads one.
        terms: the objective, or its text.
        criterion: the loss on labels of the term `Labels`: of logits (B, K) and targets.
        labels: whether targets are classes of the student; without, nothing reads them.

    Raises:
        DistillError: terms that these two networks cannot serve; class counts that differ; `Labels` without labels.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | Known | None,
        terms: Terms | Sequence[Term] | str,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        labels: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.labels = student, labels
        live = isinstance(teacher, Teacher)
        self.teacher, self.known = (teacher, None) if live else (None, teacher)
        self.terms = Terms.parse(terms)
        if not labels and any(isinstance(term, Labels) for term in self.terms.terms):
            raise DistillError(f"{self.terms} learns labels, but the labels are no classes; leave Labels() out")
        self.criterion = criterion
        self.adapter = adapter_of(student)
        self._outputs = self.adapter.outputs
        own, theirs = self.adapter.info(student), None if teacher is None else teacher.info
        projections: dict[str, nn.Module] = {}
        self.of_student, self.of_teacher = self.terms.wanted(of_teacher=False), self.terms.wanted(of_teacher=True)
        if self.classifies:  # Accuracy is that of the classifier that the student is evaluated with.
            self.of_student |= Wanted.of(Logits())
        if teacher is not None and not self.of_teacher.outputs:
            raise DistillError(
                f"no term of {self.terms} reads the teacher; leave teacher out, or add a term such as Logits()"
            )
        for term in self.terms.terms:
            check_pair(term, own, theirs)
            term.check(student)
            made = None if theirs is None else term.project(own, theirs)
            if made is not None:
                projections[term.name] = made
        self.projections = nn.ModuleDict(projections)
        if self.teacher is not None:
            held = {id(parameter) for parameter in self.teacher.parameters()}
            if any(id(parameter) in held for parameter in student.parameters()):
                raise DistillError("student and teacher share weights; give the teacher its own with copy.deepcopy")
            if self.of_teacher.per_patch:  # Raises where the places of its tokens are not known.
                self.teacher.adapter.grid(self.teacher.model, self.teacher.input_size)
        self.register_load_state_dict_post_hook(_expect_no_teacher)

    @property
    def classifies(self) -> bool:
        """Whether the terms teach classes that the labels are of, so that accuracy means something."""
        return self.labels and self.of_student.predicts

    def compile(self, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compile the student's forward pass, features included; options are those of torch.compile.

        It is compiled for every number of tokens that a curriculum gives, however many there are.
        """
        compile(self.student, **options)
        if self.of_student.inside:  # Computed by another method than the one that is compiled with a module.
            self._outputs = without_limit(torch.compile(self.adapter.outputs, **options))

    def rely_on(self, known: Known) -> None:
        """Drop the live teacher: from now on its outputs come with each batch, from this cache of them."""
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
            known: the teacher's outputs on these very images, from a cache; None runs the live teacher.
            progress: fraction of training that has passed, in [0, 1], for weights that change.
        """
        student = self._outputs(self.student, images, self.of_student)
        if known is None:
            known = self._teach(images)
        batch = Batch(student, known, targets if self.labels else None, self.criterion)
        maps = dict(self.projections.items())
        values = {term.name: term.compare(batch, maps.get(term.name)) for term in self.terms.terms}
        weighted = [term.weight_at(progress) * values[term.name] for term in self.terms.terms]
        loss = sum(weighted[1:], weighted[0])
        logits = student["logits"].detach() if self.classifies else None
        return Distilled(loss, {name: value.detach() for name, value in values.items()}, logits)

    def _teach(self, images: Tensor) -> Outputs:
        if not self.of_teacher.outputs:
            return {}
        if self.teacher is None:
            raise DistillError("there is no live teacher; give its outputs from the cache as known=")
        grid = self.adapter.grid(self.student, images.shape[-2:]) if self.of_teacher.per_patch else None
        return self.teacher(images, self.of_teacher, grid)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP, which reads this, does not exchange: the frozen teacher and parameters that no term trains.

        DDP waits for a gradient of every other parameter and broadcasts every other buffer.
        """
        frozen = [name for name, _ in (*self.named_parameters(), *self.named_buffers()) if name.startswith("teacher.")]
        if not self.of_student.inside:
            return frozen
        reads = self.terms.wanted(of_teacher=False).keys
        return [*frozen, *(f"student.{name}" for name in idle_parameters(self.student, self.of_student, reads))]


def student_grid(student: nn.Module) -> tuple[int, int]:
    """Rows and columns of the student's patch tokens at its own input size, for a cache."""
    adapter = adapter_of(student)
    return adapter.grid(student, adapter.input_format(student).size[1:])


def check_pair(term: Term, student: ModelInfo, teacher: ModelInfo | None) -> None:
    """Raise `DistillError` where these two networks cannot serve the term."""
    what = type(term).__name__
    _check_outputs(what, "student", student, term.of_student())
    if not term.of_teacher():
        return
    if teacher is None:
        raise DistillError(f"the term {what} needs a teacher")
    _check_outputs(what, "teacher", teacher, term.of_teacher())
    if any(output.predicts for output in term.of_teacher()) and student.classes != teacher.classes:
        raise DistillError(
            f"the teacher {teacher.name} has {teacher.classes} classes, the student {student.classes}; "
            f"{what} compares them one by one, so give both the same classes or use terms on features"
        )


def _check_outputs(what: str, role: str, info: ModelInfo, outputs: Sequence[Output]) -> None:
    for output in outputs:
        if fault := output.missing(info):
            raise DistillError(f"the term {what} reads {output.name} of the {role}, but {info.name} {fault}")


def _expect_no_teacher(module: nn.Module, keys: Any) -> None:
    # `Teacher.state_dict` writes nothing, so nothing of it can be missing.
    keys.missing_keys[:] = [key for key in keys.missing_keys if not f".{key}".rpartition(".teacher.")[1]]
