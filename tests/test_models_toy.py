"""A family that is one file of the tests gets costs, cuts, training, distillation, extraction, files and pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitrim
from toy_family import Pooled, ToyFamily, ToyViT
from vitrim.distill import Distiller, Teacher
from vitrim.errors import UnknownNameError, VitrimError
from vitrim.measure.cost import cost
from vitrim.models import adapter_of, build_model, find_adapter, load, num_classes, open_model, save
from vitrim.models.input_format import InputFormat
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.train.specs import ModelSpec

KEPT = "TopK() @ KeepRate(0.5, at=(0, 1))"


def toy(**args: Any) -> ToyViT:
    torch.manual_seed(3)
    model = build_model("toy_vit", **args)
    assert isinstance(model, ToyViT)
    return model.eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def recipe(**options: Any) -> Recipe:
    made = Recipe(epochs=1, batch_size=32, **options)
    made.model = ModelSpec(name="toy_vit")
    made.data.name, made.data.limit, made.data.workers, made.data.holdout = "digits", 64, 0, 0.25
    return made


def test_the_port_finds_the_family_and_its_architecture() -> None:
    model = toy(num_classes=7)
    assert isinstance(find_adapter(model), ToyFamily)
    assert num_classes(model) == 7
    assert InputFormat.of(model).mode == "L"
    with pytest.raises(UnknownNameError, match="did you mean toy_vit"):
        build_model("toy_vitt")


def test_attach_and_cost_and_remove() -> None:
    model, x = toy(), images()
    dense, whole = model(x), cost(model)
    with vitrim.attach(model, KEPT) as handle:
        model(x)
        assert handle.token_counts == (9, 5, 5)
        assert cost(model).token_counts == (9, 5, 5)
        assert cost(model).macs < whole.macs
        assert handle.states[-1].size.shape == (4, 4)
    assert torch.equal(model(x), dense)


def test_hooks_on_an_attention_that_the_family_cannot_call_as_a_whole_are_refused() -> None:
    model, x = toy(), images()
    hook = model.layers[0].heads.register_forward_hook(lambda *_: None)
    with vitrim.attach(model, KEPT):
        with pytest.raises(
            VitrimError, match=r"^the heads of block 0 has a hook, which cannot run: this block computes"
        ):
            model(x)
        hook.remove()
        model(x)


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"reduction": KEPT}])
def test_it_trains_by_a_recipe_that_names_it(options: dict[str, Any], tmp_path: Path) -> None:
    result = train(recipe(**options), tmp_path / "run")
    assert 0 <= result["test_accuracy"] <= 1
    again = open_model(str(tmp_path / "run"))
    assert isinstance(again, ToyViT)
    assert (vitrim.attached(again) is not None) == ("reduction" in options)


def test_it_distils_as_student_and_as_teacher_with_a_term_and_an_output_of_its_own(tmp_path: Path) -> None:
    save(toy(width=36), tmp_path / "teacher")
    spec = ModelSpec(name=str(tmp_path / "teacher"))
    terms = "Labels() + Logits() + Pooled(0.5) + Tokens() + ClsStages()"
    result = train(recipe(teacher=spec, distill=terms, reduction=KEPT), tmp_path / "run")
    assert result["test_images"] > 0
    timm_student = ModelSpec(name="vitrim_digits_vit", args={"depth": 3, "embed_dim": 24, "num_heads": 3})
    made = recipe(teacher=spec, distill="Pooled() + Logits()")
    made.model = timm_student
    assert train(made, tmp_path / "other")["test_images"] > 0


def test_a_cache_keeps_an_output_that_only_one_term_knows(tmp_path: Path) -> None:
    save(toy(width=36), tmp_path / "teacher")
    results = []
    for name, cached in (("live", False), ("cached", True)):
        made = recipe(teacher=ModelSpec(name=str(tmp_path / "teacher")), distill="Labels() + Pooled()")
        made.augment.views = 1
        if cached:
            made.cache = vitrim.train.specs.CacheSpec(folder=str(tmp_path / "cache"))
        train(made, tmp_path / name)
        results.append(open_model(str(tmp_path / name)).state_dict())
    for one, other in zip(results[0].values(), results[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert list((tmp_path / "cache").rglob("pooled_patches@-1.npy"))


def test_the_new_output_is_what_it_says() -> None:
    student, teacher = toy(), toy(width=36)
    distiller = Distiller(student, Teacher(teacher), [Pooled()])
    found = adapter_of(student).outputs(student, images(), distiller.of_student)
    *_, last, _ = student.tokens(images())
    torch.testing.assert_close(found["pooled_patches@-1"], last[:, 1:].mean(1))
    assert distiller(images()).loss.requires_grad


def test_stratify_and_extract_and_save_and_load(tmp_path: Path) -> None:
    model, x = toy(width=48), images(16)
    net = vitrim.stratify(model, [x], width_multiple=4, say=lambda _: None)
    torch.testing.assert_close(net.model(x), model(x), rtol=1e-4, atol=1e-4)
    small = net.extract(macs=0.6)
    assert cost(small).macs <= 0.6 * cost(model).macs
    net.save(tmp_path / "net")
    assert len(vitrim.SuperNet.load(tmp_path / "net").chain) == len(net.chain)
    with vitrim.attach(small, "TopK(norm) @ KeepRate(0.5, at=1)"):
        save(small, tmp_path / "small")
        expected = small(x)
    again = load(tmp_path / "small")
    assert torch.equal(again(x), expected)
    assert cost(again).params == cost(small).params


def test_the_weights_of_a_file_and_another_number_of_classes(tmp_path: Path) -> None:
    model = toy(num_classes=4)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    same = build_model("toy_vit", checkpoint=tmp_path / "weights.pth").eval()
    assert torch.equal(same(images()), model(images()))
    other = build_model("toy_vit", checkpoint=tmp_path / "weights.pth", num_classes=6, reset_head=True)
    assert num_classes(other) == 6


def test_pictures_of_it(tmp_path: Path) -> None:
    model = toy()
    with vitrim.attach(model, KEPT):
        written = vitrim.show(model, images(2), tmp_path / "pictures", scores=True)
    assert len(list(tmp_path.rglob("*.png"))) >= 2
    assert written is not None


def test_a_network_of_no_family_has_a_port_that_refuses_cuts_by_name() -> None:
    class Own(nn.Module):
        num_classes = 3

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None].expand(-1, 3)

    assert num_classes(Own()) == 3
    assert adapter_of(Own()).predict(Own(), images()).shape == (4, 3)
    with pytest.raises(vitrim.models.finding.UnsupportedModelError, match=r"no adapter for .*Own; adapters: .*toy"):
        vitrim.attach(Own(), KEPT)
