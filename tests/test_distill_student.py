"""Distilling into reduced students: positions, gradients, checkpointing, several processes, no labels."""

import copy
import pickle

import pytest
import timm
import torch
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import vitrim
from vitrim.distill import Distiller, Teacher, Wanted, student_grid
from vitrim.distill.positions import Fused, Origin, group_means
from vitrim.errors import DistillError, VitrimError
from vitrim.models import adapter_of
from vitrim.models.outputs import Patches

ALL = "Labels() + Logits(0.7) + ClsStages(0.3) + Cls(0.5) + Tokens(0.5)"


def vit(name="vit_tiny_patch16_224", **args):
    options = {"img_size": 64, "depth": 6, "embed_dim": 48, "num_heads": 3, "num_classes": 5} | args
    return timm.create_model(name, **options)


def teacher(**args):
    return Teacher(vit(**{"embed_dim": 96, "depth": 3} | args))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


class Constant(torch.nn.Module):
    """A projection that hands the student's tokens on, so that losses are zero where positions agree."""

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "text",
    [
        "TopK() @ KeepRate(0.7, at=(1, 3, 4))",
        "TopK(norm) @ Stages({2: 0.75, 4: 0.5})",
        "TopK(fuse=sum) @ KeepRate(0.7, at=(1, 3, 4))",
        "TopK(norm, fuse=mean) @ KeepRate(0.8, at=(0, 1, 2, 3, 4, 5))",
        "TopK(fuse=sum) @ Counts([15, 15, 13, 12, 11, 10])",
        "TopK(fuse=sum) @ KeepRate(0.7, at=(1, 3), reinstate=5)",
        "ToMe() @ ConstantR(2)",
        "ToMe() @ KeepRate(0.6, at=(1, 4))",
        None,
    ],
)
def test_targets_stand_where_the_tokens_came_from(text):
    """The blocks are made to pass tokens on unchanged, so that each token shows which positions it is made of."""
    model = vit(num_classes=0).eval()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    model.norm = torch.nn.Identity()
    images = torch.randn(3, 3, 64, 64)
    embedded = model.forward_features(images)[:, 1:]  # (B, N, C), by position
    if text is not None:
        handle = vitrim.attach(model, text)
    found = adapter_of(model).outputs(model, images, Wanted.of(Patches(), Origin(), Fused()))
    where = found
    target, count = group_means(embedded, where["origin"], found["tokens"].shape[1])
    single = (count == 1) & ~where["fused"]
    merged = (count > 1) & ~where["fused"]
    torch.testing.assert_close(found["tokens"][single], embedded_at(embedded, where["origin"], single))
    torch.testing.assert_close(found["tokens"][merged], target[merged])
    if text is None or "reinstate" in text:
        assert bool(single.all())
        assert single.shape[1] == 16
    elif "ToMe" in text:
        assert int(where["fused"].sum()) == 0
        assert int(merged.sum()) > 0
    elif "fuse" in text:
        assert bool(where["fused"].any(1).all())
        assert handle.states[-1].size.shape == where["fused"].shape
        # A weighted sum is not the mean of its members, so taking it for a target would be wrong.
        assert not torch.allclose(found["tokens"][where["fused"]], target[where["fused"]], atol=1e-3)
    else:
        assert bool(single.all())
        assert single.shape[1] < 16


def embedded_at(embedded, origin, single):
    rows = []
    for b in range(single.shape[0]):
        for slot in torch.nonzero(single[b]).flatten().tolist():
            (member,) = torch.nonzero(origin[b] == slot).flatten().tolist()
            rows.append(embedded[b, member])
    return torch.stack(rows)


def test_loss_is_zero_for_a_student_that_equals_its_teacher():
    student = vit(num_classes=5).eval()
    distiller = Distiller(
        student, Teacher(copy.deepcopy(student)), "Logits() + ClsStages() + Cls() + Tokens(loss=smooth_l1)"
    )
    for name in ("cls", "tokens"):
        distiller.projections[name] = Constant()
    out = distiller.eval()(torch.randn(2, 3, 64, 64))
    assert all(float(value) < 1e-10 for value in out.terms.values())
    vitrim.attach(student, "TopK() @ KeepRate(0.5, at=(5,))")  # The last cut leaves the kept tokens as they were.
    assert float(distiller(torch.randn(2, 3, 64, 64)).terms["tokens"]) < 1e-10


def test_total_is_the_weighted_sum_and_follows_progress():
    distiller = Distiller(
        vit(), teacher(), "Labels(Linear(0.3, 0.5)) + Logits(Linear(0.7, 0.5)) + ClsStages(0.3)"
    ).eval()
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    for progress, a in ((0.0, 0.7), (0.5, 0.6), (1.0, 0.5)):
        out = distiller(images, labels, progress=progress)
        t = out.terms
        expected = (1 - a) * t["labels"] + a * t["logits"] + 0.3 * t["cls_stages"]
        torch.testing.assert_close(out.loss.detach(), expected)
        torch.testing.assert_close(t["labels"], torch.nn.functional.cross_entropy(distiller.student(images), labels))
    soft = torch.nn.functional.one_hot(labels, 5).float() * 0.8 + 0.04
    assert distiller(images, soft).loss.isfinite()


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (None, ALL),
        ("TopK(fuse=sum) @ KeepRate(0.6, at=(1, 3))", ALL),
        ("ToMe() @ ConstantR(2)", f"{ALL} + Merged(0.5)"),
    ],
)
def test_gradient_reaches_student_and_projections_only(text, terms):
    student = vit()
    if text:
        vitrim.attach(student, text)
    distiller = Distiller(student, teacher(), terms).train()
    out = distiller(torch.randn(2, 3, 64, 64), torch.tensor([0, 4]))
    out.loss.backward()
    assert out.logits.shape == (2, 5)
    assert set(out.terms) == {term.name for term in distiller.terms.terms}
    for name, parameter in distiller.named_parameters():
        assert (parameter.grad is None) == name.startswith("teacher."), name
    live = [p for name, p in distiller.named_parameters() if not name.startswith("teacher.")]
    assert all(bool(p.grad.abs().sum() > 0) for p in live)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("TopK(fuse=sum) @ KeepRate(0.6, at=(1, 3))", ALL),
        ("TopK(fuse=sum) @ KeepRate(0.6, at=(1, 3))", "Cls() + Tokens()"),
        ("ToMe() @ ConstantR(2)", f"{ALL} + Merged(0.5)"),
        ("ToMe() @ ConstantR(2)", "Cls() + Tokens()"),
    ],
)
def test_activation_checkpointing_changes_nothing(text, terms):
    student = vit().double()
    vitrim.attach(student, text)
    distiller = Distiller(student, teacher(), terms).double().train()
    images, labels = torch.randn(2, 3, 64, 64).double(), torch.tensor([0, 4])
    gradients = []
    for recompute in (False, True):
        student.set_grad_checkpointing(recompute)
        distiller.zero_grad()
        distiller(images, labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [0, 5])
def test_training_without_labels_or_head(classes):
    student = vit(num_classes=classes)
    vitrim.attach(student, "TopK(fuse=sum) @ KeepRate(0.7, at=(1, 3))")
    distiller = Distiller(student, teacher(num_classes=0), "Cls() + Tokens()").train()
    optimiser = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=1e-3)
    images = torch.randn(4, 3, 64, 64)
    head = copy.deepcopy(student.head.state_dict())
    losses = []
    for _ in range(8):
        out = distiller(images)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        losses.append(float(out.loss.detach()))
    assert out.logits is None
    assert losses[-1] < losses[0]
    assert all(torch.equal(head[name], value) for name, value in student.head.state_dict().items())


def test_distillation_token_learns_from_the_teacher_and_cls_from_labels():
    student = vit("deit_tiny_distilled_patch16_224").double()
    distiller = Distiller(student, teacher(), "Labels() + DistToken()").double().train()
    images, labels = torch.randn(2, 3, 64, 64).double(), torch.tensor([0, 4])
    out = distiller(images, labels)
    student.set_distilled_training(True)
    own, dist = student(images)
    hard = distiller.teacher.model(images).argmax(1)
    torch.testing.assert_close(out.terms["labels"], torch.nn.functional.cross_entropy(own, labels).detach())
    torch.testing.assert_close(out.terms["dist_token"], torch.nn.functional.cross_entropy(dist, hard).detach())


def test_eager_and_compiled_agree():
    student = vit(depth=4)
    vitrim.attach(student, "TopK(fuse=sum) @ KeepRate(0.7, at=(1, 3))")
    distiller = Distiller(student, teacher(), "Logits() + ClsStages() + Cls() + Tokens()").eval()
    images = torch.randn(2, 3, 64, 64)
    plain = distiller(images)
    compiled = torch.compile(distiller, backend="eager")(images)
    torch.testing.assert_close(compiled.loss, plain.loss)
    torch.testing.assert_close(compiled.terms, plain.terms)


@pytest.mark.parametrize("terms", ["Labels() + Logits()", "Logits() + ClsStages() + Cls() + Tokens()"])
def test_compiled_training_has_the_losses_of_eager_training(terms: str):
    """Also with terms on features, which come from another method than the one compiled with a module."""
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        def run(*args: torch.Tensor):
            calls.append(sum(node.op != "placeholder" for node in graph.graph.nodes))
            return graph.forward(*args)

        return run

    losses: dict[str, list[float]] = {}
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        student = vit(depth=4)
        vitrim.attach(student, "TopK(fuse=sum) @ KeepRate(0.7, at=(1, 3))")
        distiller = Distiller(student, teacher(), terms).train()
        if name == "compiled":
            distiller.compile(backend=backend)
        optimiser = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
        losses[name] = []
        for step in range(3):
            torch.manual_seed(step)
            out = distiller(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))
            out.loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[name].append(out.loss.item())
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-5)
    assert len(calls) == 3  # One graph per step,
    assert min(calls) > 100  # and in it the whole student.


@pytest.mark.parametrize(("terms", "modes"), [("Labels()", (True, False)), ("Cls()", (True,))])
def test_every_strength_of_a_curriculum_is_compiled(terms: str, modes: tuple[bool, ...], two_forms: None):
    """Evaluation calls the student itself; torch counts its forms with those of training."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    student = vit(depth=1)
    handle = vitrim.attach(student, "TopK() @ KeepRate(0.2, at=(0,))")
    distiller = Distiller(student, None if terms == "Labels()" else teacher(depth=1), terms)
    distiller.compile(backend=backend)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 4])
    numbers = {1: 3, 2: 2}[len(modes)]  # Together more than 2, torch's own limit here.
    for _ in range(2):  # Once compiled, each is there to stay.
        for training in modes:
            distiller.train(training)
            for number in range(numbers):
                handle.set_strength((number + 1) / 12)
                assert handle.token_counts == (16 - number,)
                _ = distiller(images, labels) if training else student(images)
        assert len(graphs) == numbers * len(modes)


def test_half_precision_sums_in_float32():
    distiller = Distiller(vit(), teacher(), "Logits() + ClsStages() + Cls() + Tokens()").eval()
    images = torch.randn(2, 3, 64, 64)
    plain = distiller(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = distiller(images)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, plain.loss, rtol=0.05, atol=0.01)


def test_student_is_left_as_it_was():
    student = vit()
    state = pickle.dumps(student)
    distiller = Distiller(student, teacher(), "Cls() + Tokens()")
    distiller(torch.randn(2, 3, 64, 64))
    assert pickle.dumps(student) == state
    assert student_grid(student) == (4, 4)
    clone = copy.deepcopy(distiller)
    assert clone.student is not student


def _pair(name, terms):
    torch.manual_seed(0)
    student = vit(name, depth=3)
    vitrim.attach(student, "ToMe() @ ConstantR(2)")
    return Distiller(student, teacher(depth=2), terms).train()


def _worker(rank, folder, name, terms):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    wrapped = DistributedDataParallel(_pair(name, terms))
    torch.manual_seed(1)
    images = torch.randn(4, 3, 64, 64)
    for _ in range(2):  # The second pass is the one that complains of parameters without a gradient.
        wrapped.zero_grad()
        wrapped(images[2 * rank : 2 * rank + 2]).loss.backward()
    if rank == 0:
        grads = {n: p.grad for n, p in wrapped.module.named_parameters() if p.grad is not None}
        torch.save(grads, f"{folder}/grads.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("vit_tiny_patch16_224", "Cls() + Tokens() + Merged()"),
        ("vit_tiny_patch16_224", "ClsStages(stages=2)"),
        ("deit_tiny_distilled_patch16_224", "DistToken()"),
    ],
)
def test_two_processes_equal_one(tmp_path, name, terms):
    """DDP must not wait for parts of the student that no term reads, nor for the teacher."""
    mp.start_processes(_worker, (str(tmp_path), name, terms), nprocs=2, start_method="forkserver")
    distiller = _pair(name, terms)
    torch.manual_seed(1)
    distiller(torch.randn(4, 3, 64, 64)).loss.backward()
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)
    alone = {n: p.grad for n, p in distiller.named_parameters() if p.grad is not None}
    assert grads.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", [None, "TopK(fuse=sum) @ KeepRate(0.7, at=(1, 3))"])
@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("vit_tiny_patch16_224", "Labels() + Logits()"),
        ("vit_tiny_patch16_224", "ClsStages(stages=2)"),
        ("vit_tiny_patch16_224", "ClsStages(stages=3, weight=0.5) + Logits()"),
        ("vit_tiny_patch16_224", "ClsStages(stages=2) + Tokens()"),
        ("vit_tiny_patch16_224", "Cls()"),
        ("vit_tiny_patch16_224", "Tokens()"),
        ("vit_tiny_patch16_224", "Cls() + Labels()"),
        ("deit_tiny_distilled_patch16_224", "DistToken()"),
        ("deit_tiny_distilled_patch16_224", "DistToken() + Labels() + ClsStages()"),
        ("deit_tiny_distilled_patch16_224", "Cls()"),
        ("deit_tiny_distilled_patch16_224", "Labels() + Tokens()"),
        ("vit_base_patch16_siglip_224", "Tokens()"),
        ("vit_base_patch16_siglip_224", "Logits() + Tokens()"),
        ("eva02_tiny_patch14_224", "ClsStages()"),
        ("eva02_tiny_patch14_224", "Logits() + Tokens()"),
    ],
)
def test_several_processes_wait_for_just_what_learns(name, terms, reduction):
    student = vit(name, **({"img_size": 56} if "patch14" in name else {}))
    if reduction and "siglip" not in name:
        vitrim.attach(student, reduction)
    distiller = Distiller(student, teacher(img_size=student.patch_embed.img_size), terms).train()
    draw = torch.get_rng_state()
    ignored = set(distiller._ddp_params_and_buffers_to_ignore)
    assert torch.equal(torch.get_rng_state(), draw)
    distiller(torch.randn(2, 3, *student.patch_embed.img_size), torch.tensor([0, 4])).loss.backward()
    idle = {name for name, parameter in distiller.named_parameters() if parameter.grad is None}
    assert {name for name in ignored if not name.startswith("teacher.") or name in idle} == idle
    assert ("student.head.weight" in idle) == ("logits" not in distiller.terms.wanted(of_teacher=False).keys)


@pytest.mark.parametrize(
    ("student", "teach", "terms", "part"),
    [
        ({}, {"num_classes": 7}, "Logits()", "has 7 classes, the student 5"),
        ({"num_classes": 0}, {}, "Logits()", "of the student, but vit_tiny_patch16_224 has no classifier"),
        ({}, {"num_classes": 0}, "Logits()", "of the teacher, but vit_tiny_patch16_224 has no classifier"),
        ({}, {}, "DistToken()", "has no distillation token with a classifier"),
        ({"class_token": False, "global_pool": "avg"}, {}, "Cls()", "has no CLS token"),
        ({"depth": 2}, {}, "ClsStages()", None),
        ({}, {}, "Labels()", "no term of Labels() reads the teacher; leave teacher out"),
        ({}, {}, "Tokens() + Merged()", "compares merged tokens, but no token reduction is attached to the student"),
    ],
)
def test_pairs_that_do_not_fit_take_one_line(student, teach, terms, part):
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(VitrimError) as told:
        Distiller(vit(**student), teacher(**teach), terms)(images)
    assert "\n" not in str(told.value)
    assert (part or "too few for 3 stages") in str(told.value)


@pytest.mark.parametrize(
    ("text", "phase", "part"),
    [
        ("TopK() @ KeepRate(0.7)", "both", r"the student's TopK\(\) merges none"),
        (
            "TopK(fuse=sum) @ KeepRate(0.7)",
            "both",
            r"TopK\(fuse='sum'\) merges none; leave Merged out, or reduce by ToMe",
        ),
        ("ToMe() @ KeepRate(0.7)", "eval", "acts only in phase eval"),
        ("ToMe() @ KeepRate(0.7, at=1, reinstate=3)", "both", "tokens return before block 3"),
        ("ToMe() @ Budget(0.95, shape=KeepRate(0.5, at=1, reinstate=3))", "both", "tokens return before block 3"),
    ],
)
def test_merged_needs_tokens_that_are_merged(text, phase, part):
    student = vit()
    vitrim.attach(student, text, phase=phase)
    with pytest.raises(VitrimError, match=part):
        Distiller(student, teacher(), "Cls() + Merged()")


@pytest.mark.parametrize("text", ["ToMe() @ ConstantR(2)", "ToMe() @ Budget(0.8) @ Delayed(3)"])
def test_merged_learns_where_tokens_are_merged(text):
    student = vit()
    handle = vitrim.attach(student, text)
    distiller = Distiller(student, teacher(), "Merged()").train()
    handle.set_epoch(3)
    assert float(distiller(torch.randn(2, 3, 64, 64)).terms["merged"]) > 0


@pytest.mark.parametrize("reduction", [None, "ToMe() @ ConstantR(2)"])
@pytest.mark.parametrize("terms", ["Tokens()", "Tokens() + Merged()"])
def test_a_student_that_drops_patches_itself_is_not_matched_to_a_teacher(reduction, terms):
    student = vit(patch_drop_rate=0.5)
    if reduction is not None:
        vitrim.attach(student, reduction)
    with pytest.raises(DistillError, match=r"drops patches at its input \(patch_drop_rate\), .*; set it to 0"):
        Distiller(student, teacher(), terms)
    assert Distiller(student, teacher(), "Cls()").train()(torch.randn(2, 3, 64, 64)).loss.isfinite()


def test_tokens_are_matched_only_where_both_have_all_patches():
    origin = torch.arange(8).expand(2, -1)
    with pytest.raises(DistillError, match="the student drops patches at its input"):
        group_means(torch.randn(2, 16, 4), origin, 8)
    with pytest.raises(DistillError, match="tokens of 4 patches, and the student reads 8"):
        group_means(torch.randn(2, 4, 4), origin, 8)
    teach = Teacher(vit(patch_drop_rate=0.5))  # In eval mode it keeps them all.
    assert Distiller(vit(), teach, "Tokens()").train()(torch.randn(2, 3, 64, 64)).loss.isfinite()
    teach.model.patch_drop.train()
    with pytest.raises(DistillError, match="8 patch tokens of a teacher do not fill its grid"):
        Distiller(vit(), teach, "Tokens()")(torch.randn(2, 3, 64, 64))
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    masked = transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, intermediate_size=48))
    with pytest.raises(VitrimError, match="takes its patches in random order"):
        Distiller(vit(), Teacher(masked), "Tokens()")


def test_other_mistakes_take_one_line():
    student, images = vit(), torch.randn(2, 3, 64, 64)
    with pytest.raises(VitrimError, match="needs a teacher"):
        Distiller(student, None, "Cls()")
    with pytest.raises(VitrimError, match="share weights"):
        Distiller(student, Teacher(student), "Cls()")
    with pytest.raises(VitrimError, match="needs labels"):
        Distiller(vit(), None, "Labels()")(images)
    pruned = vit()
    vitrim.attach(pruned, "TopK() @ KeepRate(0.7)", cls_only=True)
    with pytest.raises(VitrimError, match="cls_only=False"):
        Distiller(pruned, teacher(), "Tokens()")(images)
    assert Distiller(pruned, teacher(), "Cls()")(images).loss.isfinite()


class Foreign(torch.nn.Module):
    """A network that answers as Hugging Face's do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 5)
        self.config = type("Config", (), {"num_labels": 5})

    def forward(self, images):
        return type("Output", (), {"logits": self.layer(images.mean((2, 3)))})


def test_any_network_can_learn_from_logits():
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 4])
    format = {"input_size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    distiller = Distiller(Foreign(), Teacher(Foreign(), **format), "Labels() + Logits()")
    out = distiller(images, labels)
    torch.testing.assert_close(out.logits, distiller.student(images).logits)
    assert float(out.terms["logits"]) > 0
    with pytest.raises(VitrimError, match="reads tokens of the student, but Foreign gives logits only"):
        Distiller(Foreign(), teacher(), "Tokens()")
