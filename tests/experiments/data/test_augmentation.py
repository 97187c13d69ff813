"""Random changes of images, against loops over the images; and a run that continues with the same ones."""

from pathlib import Path

import pytest
import torch
from osculate.errors import ArgumentError
from osculate.experiments.data.augmentation import Chain, ColourJitter, RandomCrop, RandomFlip
from osculate.experiments.runs.batches import augmentation_generator
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.runs import Resume, run_in_folder
from rich.console import Console
from torch import Tensor

from ..conftest import TinyProblem

IMAGES = torch.randint(0, 256, (40, 3, 8, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
JITTER = ColourJitter((0.5, 1.5), (0.2, 1.8), (0.5, 1.5))


def test_a_crop_is_a_window_of_the_image_with_black_margins() -> None:
    margin = 2
    cropped = RandomCrop(margin)(IMAGES, augmentation_generator(3, 5))
    places = set()
    for image, found in zip(IMAGES, cropped, strict=True):
        padded = torch.zeros(3, 8 + 2 * margin, 6 + 2 * margin, dtype=torch.uint8)
        padded[:, margin:-margin, margin:-margin] = image
        windows = {
            (row, column): padded[:, row : row + 8, column : column + 6]
            for row in range(2 * margin + 1)
            for column in range(2 * margin + 1)
        }
        matching = [place for place, window in windows.items() if torch.equal(window, found)]
        assert len(matching) == 1
        places.update(matching)
    assert len(places) > 12  # of 25


def test_a_flip_exchanges_left_and_right_of_about_half_the_images() -> None:
    flipped = RandomFlip()(IMAGES, augmentation_generator(3, 5))
    changed = [not torch.equal(image, found) for image, found in zip(IMAGES, flipped, strict=True)]
    assert 10 < sum(changed) < 30
    for image, found, other in zip(IMAGES, flipped, changed, strict=True):
        assert torch.equal(image.flip(2) if other else image, found)


def test_colours_are_blended_with_black_mean_grey_and_grey() -> None:
    first = IMAGES.float()
    grey = (0.2989 * first[:, 0] + 0.587 * first[:, 1] + 0.114 * first[:, 2]).unsqueeze(1).floor()
    mean = torch.stack([image.mean() for image in grey]).view(-1, 1, 1, 1)
    still = (1.0, 1.0)
    for jitter, other in (
        (ColourJitter((0.5, 0.5), still, still), torch.zeros(1)),
        (ColourJitter(still, (0.5, 0.5), still), mean),
        (ColourJitter(still, still, (0.5, 0.5)), grey),
    ):
        found = jitter(IMAGES, augmentation_generator(0, 0)).float()
        assert float((found - (0.5 * first + 0.5 * other)).abs().max()) <= 1
    nothing = ColourJitter(still, still, still)
    assert torch.equal(nothing(IMAGES, augmentation_generator(0, 0)), IMAGES)


def test_factors_differ_between_images_and_stay_in_their_intervals() -> None:
    white = torch.full((200, 3, 2, 2), 200, dtype=torch.uint8)
    found = ColourJitter((0.5, 1.0), (1.0, 1.0), (1.0, 1.0))(white, augmentation_generator(1, 1))[:, 0, 0, 0]
    assert int(found.min()) >= 99
    assert int(found.max()) <= 200
    assert len(found.unique()) > 50


@pytest.mark.parametrize("change", [RandomCrop(), RandomFlip(), JITTER, Chain((RandomCrop(1), RandomFlip(), JITTER))])
def test_changes_depend_on_seed_and_iteration_alone(change) -> None:
    kept = IMAGES.clone()
    torch.manual_seed(1)
    first = change(IMAGES, augmentation_generator(7, 3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, change(IMAGES, augmentation_generator(7, 3)))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(kept, IMAGES)
    assert first.dtype == torch.uint8
    assert not torch.equal(first, change(IMAGES, augmentation_generator(7, 4)))
    assert not torch.equal(first, change(IMAGES, augmentation_generator(8, 3)))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ArgumentError, match="margin"):
        RandomCrop(0)
    with pytest.raises(ArgumentError, match="contrast"):
        ColourJitter((0.5, 1.5), (1.8, 0.2), (0.5, 1.5))


def noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + torch.randn(inputs.shape, generator=generator)


def test_a_run_that_continues_sees_the_same_changes(tiny: TinyProblem, tmp_path: Path) -> None:
    def trained(folder: str, *epochs: int) -> dict[str, Tensor]:
        for count in epochs:
            config = RunConfig("tiny", "sgdm")
            run_in_folder(config, Budget(count), RunFolder(tmp_path / folder), None, Resume.AUTO, Console(quiet=True))
        checkpoint = RunFolder(tmp_path / folder).load_checkpoint(torch.device("cpu"))
        model: dict[str, Tensor] = checkpoint["model"]
        return model

    plain = trained("plain", 3)
    tiny.augmentation = noise
    whole, continued = trained("whole", 3), trained("parts", 1, 2, 3)
    assert all(torch.equal(value, continued[name]) for name, value in whole.items())
    assert not any(torch.equal(value, whole[name]) for name, value in plain.items())
