"""What may be known of an image, and the data module that asks for it."""

import pytest
import torch
from completion_problems import images, seeded
from hvpopt.experiments.completion.data import KnownParts, PartlyKnownDigits
from hvpopt.experiments.completion.questions import (
    QUESTIONS,
    means,
    one_half,
    outside_rectangle,
    scattered,
    sums,
)


def test_scattered_pixels_are_as_many_as_uniform_shares_say():
    known = scattered(20_000, seeded()).double()
    shares = known.mean((1, 2, 3))
    # mean and variance of a uniform share in [0.05, 0.8], and of 64 draws with it
    assert float(shares.mean()) == pytest.approx(0.425, abs=0.006)
    within = 0.425 - (0.425**2 + 0.75**2 / 12)
    assert float(shares.var()) == pytest.approx(0.75**2 / 12 + within / 64, rel=0.04)
    assert float((known.mean(0) - 0.425).abs().max()) < 0.02  # every pixel alike


def test_the_hidden_part_is_one_rectangle_with_sides_of_4_to_7():
    hidden = ~outside_rectangle(3000, seeded())
    rows, columns = hidden.any(3).flatten(1), hidden.any(2).flatten(1)
    filled = rows.sum(1) * columns.sum(1)
    assert torch.equal(hidden.sum((1, 2, 3)), filled)  # as many as the bounding rectangle holds
    for side in (rows, columns):
        lengths = side.sum(1)
        assert lengths.unique().tolist() == [4, 5, 6, 7]
        ends = torch.diff(
            side.int(), dim=1, prepend=torch.zeros(3000, 1), append=torch.zeros(3000, 1)
        )
        assert bool(((ends != 0).sum(1) == 2).all())  # without gaps
        assert bool(side.float().mean(0).min() > 0)  # reaches every edge


def test_halves_are_the_four_in_equal_parts():
    known = one_half(4000, seeded()).squeeze(1)
    assert bool((known.sum((1, 2)) == 32).all())
    kinds = {
        "upper": known[:, :4].all((1, 2)),
        "lower": known[:, 4:].all((1, 2)),
        "left": known[:, :, :4].all((1, 2)),
        "right": known[:, :, 4:].all((1, 2)),
    }
    counts = torch.stack([kind.sum() for kind in kinds.values()])
    assert counts.sum() == 4000
    assert bool(((counts - 1000).abs() < 120).all())


def test_means_and_sums_are_those_of_the_image():
    image = images(1).double()
    blocks = torch.nn.functional.avg_pool2d(image, 2).flatten()
    torch.testing.assert_close(means().double() @ image.flatten(), blocks)
    expected = torch.cat([image.sum(3).flatten(), image.sum(2).flatten()])
    torch.testing.assert_close(sums().double() @ image.flatten(), expected)


@pytest.mark.parametrize("name", ["pixels", "rectangle", "half"])
def test_a_view_shows_known_pixels_to_the_bit_and_nothing_of_the_others(name):
    given = images()
    view = QUESTIONS[name].view(given, seeded())
    known = QUESTIONS[name].masks(12, seeded())
    assert torch.equal(view[:, 1:], known.float())
    assert torch.equal(view[:, :1][known], given[known])
    assert bool((view[:, :1][~known] == 0).all())


@pytest.mark.parametrize("name", ["means", "sums"])
def test_a_view_of_measurements_is_the_least_image_that_has_them(name):
    given, matrix = images().double(), QUESTIONS[name].matrix.double()
    view = QUESTIONS[name].view(given, seeded())
    seen = view[:, 0].flatten(1)
    torch.testing.assert_close(seen @ matrix.T, given.flatten(1) @ matrix.T)
    least = torch.linalg.lstsq(matrix, (given.flatten(1) @ matrix.T).T, driver="gelsd").solution.T
    torch.testing.assert_close(seen, least)
    # the share of a pixel that is determined: 1/4 of a block's, 15/64 by eight rows and columns
    share = {"means": 1 / 4, "sums": 15 / 64}[name]
    torch.testing.assert_close(view[:, 1], torch.full_like(view[:, 1], share))


# --- data


def test_training_asks_anew_every_epoch_and_the_seed_decides_what():
    def epoch(number, seed=0, batch_size=10):
        batches = KnownParts(images(50), "pixels", batch_size, shuffle=True, seed=seed)
        batches.sampler.set_epoch(number)
        views, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        order = targets.flatten(1).sum(1).argsort()
        return views[order], targets[order]

    (first, targets), (second, same) = epoch(0), epoch(1)
    assert torch.equal(targets, same)
    assert not torch.equal(first, second)
    assert torch.equal(first, epoch(0)[0])
    assert torch.equal(first, epoch(0, batch_size=7)[0])
    assert not torch.equal(first, epoch(0, seed=1)[0])
    known = first[:, 1:] == 1
    assert torch.equal(first[:, :1][known], targets[known])


def test_an_epoch_asks_several_times_about_each_image():
    batches = KnownParts(images(5), "pixels", 15, times=3, shuffle=True)
    ((views, targets),) = batches
    inks = targets.flatten(1).sum(1)
    assert inks.unique(return_counts=True)[1].tolist() == [3] * 5
    of_one = views[inks == inks[0], 1]
    assert not torch.equal(of_one[0], of_one[1])
    assert len(PartlyKnownDigits(times=2, batch_size=100).train_dataloader()) == 24  # of 1168 rows


def test_ranks_share_the_images_and_the_questions_about_them():
    whole = KnownParts(images(50), "pixels", 50, seed=3, shuffle=True)
    parts = [
        KnownParts(images(50), "pixels", 25, seed=3, shuffle=True, num_replicas=2, rank=rank)
        for rank in range(2)
    ]
    together = torch.cat([next(iter(part))[0] for part in parts])
    views = next(iter(whole))[0]
    assert torch.equal(
        together.flatten(1).sum(1).sort().values, views.flatten(1).sum(1).sort().values
    )


def test_digits_are_split_and_asked_about_with_the_global_generator_left_alone():
    before = torch.get_rng_state()
    data = PartlyKnownDigits(batch_size=100, seed=5)
    views, targets = next(iter(data.train_dataloader()))
    assert views.shape == (100, 2, 8, 8)
    assert targets.shape == (100, 1, 8, 8)
    assert torch.equal(before, torch.get_rng_state())
    assert len(data.images("test")) == len(data.labels("test")) == 359
    assert data.images("train").max() == 1


def test_validation_asks_the_same_whatever_the_seed():
    one, other = (next(iter(PartlyKnownDigits(seed=s).val_dataloader())) for s in (0, 1))
    assert torch.equal(one[0], other[0])
    again = PartlyKnownDigits().val_dataloader()
    assert torch.equal(next(iter(again))[0], next(iter(again))[0])


def test_an_unknown_question_is_named():
    with pytest.raises(ValueError, match=r"question='corner' is unknown; expected one of pixels,"):
        PartlyKnownDigits("corner")
    with pytest.raises(ValueError, match="times=0 is out of range"):
        PartlyKnownDigits(times=0)
