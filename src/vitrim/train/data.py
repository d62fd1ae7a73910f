"""Images for training and evaluation, through timm's readers and transforms; scikit-learn's digits are built in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset, create_transform, rand_augment_transform, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

from ..errors import DataError
from .recipe import AugmentSpec, DataSpec
from .seeding import mix, seed_everything

Batch = tuple[Tensor, Tensor, Tensor]


class Images:
    """Labelled images by index, decoded but not transformed; knows the name of each and of its classes."""

    def __init__(self, source: Any, classes: Sequence[str], mode: str = "RGB") -> None:
        self.source, self.classes, self.mode = source, list(classes), mode

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Where image `index` comes from."""
        reader = getattr(self.source, "reader", None)
        return str(reader.filename(index, absolute=True)) if reader is not None else f"image {index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decode image `index`; `DataError` names the file if that fails."""
        try:
            reader = getattr(self.source, "reader", None)
            if reader is not None:  # timm's own data set would hide an unreadable file behind its neighbour.
                item, target = reader[index][:2]
                with Image.open(item) as opened:
                    return opened.convert(self.mode), int(target)
            image, target = self.source[index][:2]
            return image.convert(self.mode), int(target)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot read {self.name(index)}: {error}") from None


class _Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8: every fifth of each class is for testing."""

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        position = np.zeros(len(bunch.target), dtype=int)
        for digit in range(10):
            where = np.flatnonzero(bunch.target == digit)
            position[where] = np.arange(len(where))
        chosen = (position % 5 != 0) if train else (position % 5 == 0)
        self.pixels = (bunch.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.targets = bunch.target[chosen]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.targets[index])


def open_images(spec: DataSpec, train: bool) -> Images:
    """The training or test images of a data set.

    Raises:
        DataError: folder missing, split missing, class without images, unknown data set.
    """
    if spec.name == "digits":
        return Images(_Digits(train), [str(digit) for digit in range(10)])
    if spec.name == "folder":
        return _open_folder(spec, train)
    split = spec.train_split if train else spec.test_split or "validation"
    try:
        source = create_dataset(spec.name, root=spec.root, split=split, is_training=train, download=spec.download)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot open data set {spec.name!r} in {spec.root}: {reason}") from None
    if not hasattr(source, "__getitem__"):
        raise DataError(
            f"{spec.name!r} is read as a stream; use a data set that can be read by index (hfds/, torch/, folder)"
        )
    classes = getattr(source, "classes", None) or getattr(getattr(source, "reader", None), "class_to_idx", None)
    if classes is None:
        raise DataError(f"data set {spec.name!r} does not name its classes")
    return Images(source, list(classes))


def _open_folder(spec: DataSpec, train: bool) -> Images:
    if spec.root is None:
        raise DataError("a folder of images needs data.root")
    root = Path(spec.root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    wanted = [spec.train_split] if train else [spec.test_split] if spec.test_split else ["test", "val", "validation"]
    found = next((root / name for name in wanted if (root / name).is_dir()), None)
    if found is None:
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise DataError(f"{root} has no folder {' or '.join(wanted)}; folders there: {have}")
    classes = sorted(p for p in found.iterdir() if p.is_dir())
    if not classes:
        raise DataError(f"{found} has no class folders; expected {found}/CLASS/image.jpg")
    try:
        source = create_dataset("", root=str(found), search_split=False)
    except RuntimeError:
        raise DataError(f"{found} holds no images") from None
    names = source.reader.class_to_idx
    empty = [p.name for p in classes if p.name not in names]
    if empty:
        raise DataError(f"class folder {found / empty[0]} holds no images; fill it or remove it")
    return Images(source, list(names))


class Stream(Dataset[tuple[Tensor, int, int]]):
    """Transformed images by key = epoch * len + index; what happens to an image depends on (seed, epoch, index) alone.

    An item is (image (C, H, W), class, index). An unreadable image is replaced by the next one if `skip` is set;
    its item then carries -1 - index, so that it can be counted and left out of metrics.
    """

    def __init__(
        self, images: Images, indices: Sequence[int], transform: Callable[[Image.Image], Tensor], seed: int, skip: bool
    ) -> None:
        self.images, self.indices, self.transform, self.seed, self.skip = images, list(indices), transform, seed, skip

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int) -> tuple[Tensor, int, int]:
        epoch, position = divmod(int(key), len(self.indices))
        index = self.indices[position]
        label = index
        for step in range(len(self.indices)):
            at = self.indices[(position + step) % len(self.indices)]
            try:
                image, target = self.images.load(at)
                break
            except DataError:
                if not self.skip:
                    raise
                label = -1 - index
        else:
            raise DataError("none of the images can be read")
        seed_everything(self.seed, epoch, index)
        return self.transform(image), target, label


class EpochSampler(Sampler[int]):
    """Keys of one epoch, shuffled by (seed, epoch) or in order."""

    def __init__(self, length: int, seed: int, shuffle: bool) -> None:
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(mix(self.seed, self.epoch)))
        return iter((order + self.epoch * self.length).tolist())


@dataclass
class Splits:
    """Streams of the images to learn from, to choose the epoch with (None: nothing held out), and to report on."""

    train: Stream
    select: Stream | None
    test: Stream
    classes: list[str]


def transforms_for(
    model: nn.Module, spec: DataSpec, augment: AugmentSpec | None = None
) -> Callable[[Image.Image], Tensor]:
    """The model's own preprocessing; with `augment`, the varied form for training."""
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    size = (spec.image_size, spec.image_size) if spec.image_size else (height, width)
    if augment is None:
        crop_pct = spec.crop_pct or config["crop_pct"]
        return create_transform(
            (channels, *size), is_training=False, interpolation=config["interpolation"], mean=config["mean"],
            std=config["std"], crop_pct=crop_pct,
        )  # fmt: skip
    how = str_to_interp_mode(config["interpolation"])
    steps: list[Callable[[Any], Any]] = []
    if augment.crop == "resized":
        steps.append(
            RandomResizedCropAndInterpolation(size, scale=(augment.scale, 1.0), interpolation=config["interpolation"])
        )
    else:
        steps.append(T.Resize(size, how))
        if augment.crop == "pad":
            steps.append(T.RandomCrop(size, padding=max(1, min(size) // 8)))
    if augment.flip:
        steps.append(T.RandomHorizontalFlip())
    if augment.randaugment:
        grey = tuple(min(255, round(255 * m)) for m in config["mean"])
        params = {"translate_const": int(min(size) * 0.45), "img_mean": grey}
        steps.append(rand_augment_transform(augment.randaugment, params))
    steps += [T.ToTensor(), T.Normalize(config["mean"], config["std"])]
    if augment.erasing > 0:
        steps.append(RandomErasing(augment.erasing, mode="pixel", device="cpu"))
    return T.Compose(steps)


def open_both(spec: DataSpec) -> tuple[Images, Images]:
    """The training and the test images of a data set, which must have the same classes."""
    train, test = open_images(spec, True), open_images(spec, False)
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"training and test images have different classes: {', '.join(only[:5])}")
    return train, test


def make_splits(
    train: Images, test: Images, model: nn.Module, spec: DataSpec, augment: AugmentSpec, seed: int
) -> Splits:
    """Streams for a model. Epochs are chosen on a held-out part of the training images."""
    train.mode = test.mode = "L" if resolve_model_data_config(model)["input_size"][0] == 1 else "RGB"
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(seed, 1))).tolist()
    order = order[: spec.limit]
    held = round(spec.holdout * len(order))
    if spec.holdout > 0 and not 0 < held < len(order):
        raise DataError(f"{len(order)} training images are too few to hold {spec.holdout:.0%} of them out")
    skip = spec.on_corrupt == "skip"
    plain, varied = transforms_for(model, spec), transforms_for(model, spec, augment)
    return Splits(
        train=Stream(train, sorted(order[held:]), varied, seed, skip),
        select=Stream(train, sorted(order[:held]), plain, seed, skip) if held else None,
        test=Stream(test, range(len(test)), plain, seed, skip),
        classes=train.classes,
    )


def test_stream(model: nn.Module, spec: DataSpec) -> Stream:
    """The test images of a data set as this model wants to see them."""
    images = open_images(spec, False)
    images.mode = "L" if resolve_model_data_config(model)["input_size"][0] == 1 else "RGB"
    return Stream(images, range(len(images)), transforms_for(model, spec), 0, spec.on_corrupt == "skip")


def make_loader(
    stream: Stream, batch_size: int, workers: int, seed: int = 0, shuffle: bool = False, drop_last: bool = False
) -> tuple[DataLoader[Any], EpochSampler]:
    """Batches of (images, classes, indices), and the sampler whose `epoch` says which epoch comes next."""
    sampler = EpochSampler(len(stream), seed, shuffle)
    loader: DataLoader[Any] = DataLoader(
        stream, batch_size, sampler=sampler, num_workers=workers, drop_last=drop_last, persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    return loader, sampler
