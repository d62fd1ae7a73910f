"""Seeded views come again bit for bit; a cache equals the live teacher and belongs to it alone."""

import json
import pickle
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Subset

import vitrim
from vitrim.data.data_sets import open_unlabelled
from vitrim.data.fingerprint import fingerprint
from vitrim.data.streams import Stream
from vitrim.data.timm_readers import _Gathered
from vitrim.distill import Distiller, Teacher, TeacherCache, Wanted, cache_writer, student_grid
from vitrim.errors import VitrimError
from vitrim.models.outputs import Logits

TERMS = "Labels() + Logits(temperature=2) + ClsStages() + Cls() + Tokens()"
SIZE = 10


class Pictures:
    """A tiny data set of coloured noise, by index."""

    def __init__(self, length=SIZE, seed=0):
        dice = np.random.default_rng(seed)
        self.pixels = dice.integers(0, 256, (length, 40, 40, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels[index]), index % 5


def augment(erasing=0.25):
    return create_transform(32, is_training=True, auto_augment="rand-m9-n2-mstd0.5", re_prob=erasing, re_mode="pixel")


def views(number=2, seed=0, pictures=None, erasing=0.25):
    return Stream(pictures or Pictures(), augment(erasing), views=number, seed=seed)


def vit(**args):
    options = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5} | args
    return timm.create_model("vit_tiny_patch16_224", **options)


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return Teacher(vit(img_size=48, embed_dim=36))


def build(folder, teacher, data=None, terms=TERMS, **options):
    return TeacherCache.build(folder, teacher, data or views(), terms, grid=(4, 4), batch_size=4, **options)


def test_views_depend_on_seed_view_and_index_alone():
    first = views()
    seen = [first[key][0] for key in range(2 * SIZE)]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    again = [views()[key][0] for key in reversed(range(2 * SIZE))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))
    assert torch.equal(first[2 * SIZE + 3][0], seen[3])  # Epoch 2 shows view 0 again.
    assert not torch.equal(seen[3], seen[SIZE + 3])
    assert not torch.equal(views(seed=1)[3][0], seen[3])
    assert first[SIZE + 3][1:] == (3, 3)


def test_views_leave_the_generators_alone():
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    expected = draws()
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    views()[3]
    assert draws() == expected


def test_views_are_the_same_in_workers():
    plain = [views()[key][0] for key in range(SIZE)]
    loaded = torch.cat([images for images, *_ in DataLoader(views(), 4, num_workers=2)])
    assert torch.equal(loaded, torch.stack(plain))


def test_fingerprints_tell_data_apart(tmp_path):
    assert fingerprint(Pictures()) == fingerprint(Pictures())
    assert fingerprint(Pictures(seed=1)) != fingerprint(Pictures())
    assert fingerprint(Subset(Pictures(), [1, 2])) != fingerprint(Subset(Pictures(), [2, 1]))
    for index, (image, target) in enumerate(Pictures()[i] for i in range(4)):
        (tmp_path / str(target)).mkdir(exist_ok=True)
        image.save(tmp_path / str(target) / f"{index}.png")
    folder = timm.data.create_dataset("", root=str(tmp_path))
    before = fingerprint(folder)
    (tmp_path / "0" / "0.png").write_bytes((tmp_path / "0" / "0.png").read_bytes() + b" ")
    assert fingerprint(folder) != before


def test_fingerprints_of_listed_files_and_of_streams_do_not_depend_on_place_or_process(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for index in range(3):
            Pictures()[index][0].save(tmp_path / place / f"{index}.png")
    here, there = (fingerprint(open_unlabelled(tmp_path / place).source) for place in ("here", "there"))
    assert here == there
    (tmp_path / "there" / "2.png").unlink()
    assert fingerprint(open_unlabelled(tmp_path / "there").source) != here
    gathered = [_Gathered(Pictures(seed=seed)[i] for i in range(4)) for seed in (0, 0, 1)]
    first, again, other = map(fingerprint, gathered)
    assert first == again != other, "the pixels count, not where they lie in memory"


def test_cache_equals_the_live_teacher(tmp_path, teacher):
    data = views()
    kept = build(tmp_path / "c", teacher, data)
    wanted = Distiller(vit(), teacher, TERMS).of_teacher
    images = torch.stack([data[row][0] for row in range(len(kept))])
    live = teacher(images, wanted, (4, 4))
    assert len(kept) == 2 * SIZE
    assert set(kept[0]) == set(live) == {"logits", "stages@3", "cls", "tokens"}
    for row in range(len(kept)):
        for name, value in kept[row].items():
            exact = live[name][row]
            bound = 2.0**-10 * exact.abs() + 1e-5 if name != "logits" else torch.full_like(exact, 1e-5)
            assert bool(((value.float() - exact).abs() <= bound).all())
            assert value.dtype == (torch.float32 if name == "logits" else torch.float16)


@pytest.mark.parametrize("top_k", [128, 2])
def test_losses_from_the_cache_equal_live_ones(tmp_path, teacher, top_k):
    data = views()
    kept = build(tmp_path / "c", teacher, data, top_k=top_k)
    student = vit()
    vitrim.attach(student, "TopK(fuse=sum) @ KeepRate(0.6, at=(1,))")
    assert student_grid(student) == (4, 4)
    torch.manual_seed(0)
    live = Distiller(student, teacher, TERMS).eval()
    cached = Distiller(student, kept, TERMS).eval()
    cached.projections.load_state_dict(live.projections.state_dict())
    data.known = kept
    loader = DataLoader(data, batch_size=5, num_workers=1)
    for images, targets, _, known in loader:
        a, b = live(images, targets), cached(images, targets, known)
        for name in a.terms:
            if name == "logits" and top_k == 2:
                assert 0 < float(b.terms[name]) <= float(a.terms[name]) * (1 + 1e-5)
            else:
                torch.testing.assert_close(b.terms[name], a.terms[name], rtol=2e-3, atol=1e-5)
    with pytest.raises(VitrimError, match="no live teacher"):
        cached(images, targets)


def test_top_logits_of_the_cache_hold_the_rest(tmp_path, teacher):
    data = views(1)
    kept = build(tmp_path / "c", teacher, data, "Logits(temperature=2)", top_k=2)
    for row in range(SIZE):
        logits = teacher(data[row][0].unsqueeze(0), kept_wanted(), None)["logits"][0]
        order = logits.sort(descending=True)
        torch.testing.assert_close(kept[row]["top"], order.values[:2], rtol=1e-4, atol=1e-5)
        assert kept[row]["index"].tolist() == order.indices[:2].tolist()
        torch.testing.assert_close(kept[row]["rest@2"], (order.values[2:] / 2).exp().sum().log(), rtol=1e-4, atol=1e-5)


def kept_wanted():
    return Wanted.of(Logits())


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path, teacher, monkeypatch):
    whole = build(tmp_path / "whole", teacher)
    monkeypatch.setattr(cache_writer, "FLUSH_EVERY", 1)

    def stop(done, _):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", teacher, tick=stop)
    with pytest.raises(VitrimError, match="lacks 12 of 20 rows"):
        TeacherCache.open(tmp_path / "c", teacher, views(), TERMS, grid=(4, 4))
    seen = []
    again = build(tmp_path / "c", teacher, tick=lambda done, total: seen.append((done, total)))
    assert seen == [(12, 20), (16, 20), (20, 20)]
    for row in range(20):
        for name, value in whole[row].items():
            torch.testing.assert_close(again[row][name], value, rtol=1e-3, atol=1e-4)
    assert build(tmp_path / "c", teacher, tick=lambda *_: pytest.fail("nothing was left to do")).rows == 20


def test_one_cache_serves_fewer_terms(tmp_path, teacher):
    build(tmp_path / "c", teacher)
    opened = TeacherCache.open(tmp_path / "c", teacher, views(), "Cls()")
    assert set(opened[3]) == {"cls"}
    assert set(pickle.loads(pickle.dumps(opened))[3]) == {"cls"}


def other_weights():
    torch.manual_seed(2)
    return Teacher(vit(img_size=48, embed_dim=36))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"teacher": other_weights}, "is of another teacher"),
        ({"data": lambda: views(pictures=Pictures(seed=5))}, "is of other images"),
        ({"data": lambda: views(erasing=0.5)}, "is of another augmentation"),
        ({"data": lambda: views(seed=3)}, "was made with seed 0, not 3"),
        ({"data": lambda: views(number=3)}, "was made with views 2, not 3"),
        ({"terms": lambda: "Logits(temperature=3)"}, "the terms need"),
        ({"terms": lambda: "ClsStages(stages=2)"}, "the terms need"),
        ({"grid": lambda: (2, 2)}, r"grid of \(4, 4\), not of \(2, 2\)"),
        ({"top_k": lambda: 3}, "holds the top 128 logits, not 3"),
    ],
)
def test_a_cache_of_other_things_is_refused(tmp_path, teacher, change, part):
    build(tmp_path / "c", teacher)
    made = {name: make() for name, make in change.items()}
    given = {"teacher": teacher, "data": views(), "terms": TERMS, "grid": (4, 4), "top_k": 128} | made
    for verb in (TeacherCache.open, TeacherCache.build):
        with pytest.raises(VitrimError, match=part) as refused:
            verb(
                tmp_path / "c", given["teacher"], given["data"], given["terms"],
                grid=given["grid"], top_k=given["top_k"],
            )  # fmt: skip
        assert "\n" not in str(refused.value)


def test_other_mistakes_take_one_line(tmp_path, teacher, monkeypatch):
    with pytest.raises(VitrimError, match="no teacher cache in"):
        TeacherCache.open(tmp_path / "none", teacher, views(), "Cls()")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(VitrimError, match="is not empty and holds no teacher cache"):
        build(tmp_path / "full", teacher)
    with pytest.raises(VitrimError, match="grid=student_grid"):
        TeacherCache.build(tmp_path / "c", teacher, views(), "Tokens()")
    build(tmp_path / "c", teacher)
    (tmp_path / "c" / "manifest.json").write_text("{")
    with pytest.raises(VitrimError, match="or is damaged"):
        TeacherCache.open(tmp_path / "c", teacher, views(), "Cls()")
    with pytest.raises(VitrimError, match="1 view or more"):
        views(0)
    with pytest.raises(VitrimError, match="limited number of views"):
        TeacherCache.build(tmp_path / "c", teacher, Stream(Pictures(), augment()), "Cls()")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(VitrimError, match="where 100 B are free"):
        build(tmp_path / "d", teacher)
    assert not (tmp_path / "d" / "manifest.json").exists()
    with torch.no_grad():
        teacher.model.norm.bias += 1e5
    monkeypatch.undo()
    with pytest.raises(VitrimError, match="beyond the range of float16"):
        build(tmp_path / "e", teacher)


@pytest.mark.parametrize("name", ["done", "logits", "tokens"])
@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lambda path: path.unlink(), "is missing; remove"),
        (lambda path: path.write_bytes(b""), "is damaged or cut short; remove"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "is damaged or cut short; remove"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged or cut short; remove"),
        (lambda path: path.write_bytes(b"What is this?" * 20), "is damaged or cut short; remove"),
        (lambda path: np.save(path, np.load(path)[1:]), "does not fit the manifest; remove"),
        (lambda path: np.save(path, np.load(path).astype("int64")), "does not fit the manifest; remove"),
    ],
)
def test_a_damaged_cache_takes_one_line(tmp_path, teacher, name, harm, part):
    build(tmp_path / "c", teacher)
    harm(tmp_path / "c" / f"{name}.npy")
    for verb in (TeacherCache.open, TeacherCache.build):
        with pytest.raises(VitrimError, match=part) as refused:
            verb(tmp_path / "c", teacher, views(), TERMS, grid=(4, 4))
        assert "\n" not in str(refused.value)
        assert str(refused.value).startswith(f"{tmp_path / 'c' / name}.npy ")


def test_a_cache_that_is_damaged_half_way_takes_one_line(tmp_path, teacher):
    def stop(done, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", teacher, tick=stop)
    (tmp_path / "c" / "cls.npy").write_bytes(b"")
    with pytest.raises(VitrimError, match=r"cls.npy is damaged or cut short; remove .* and build the cache again"):
        build(tmp_path / "c", teacher)


def test_manifest_is_plain_json(tmp_path, teacher):
    build(tmp_path / "c", teacher)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["teacher"] == teacher.fingerprint()
    assert manifest["fields"]["tokens"] == ["float16", 16, 36]
    assert "0x" not in manifest["views"]["augmentation"]
