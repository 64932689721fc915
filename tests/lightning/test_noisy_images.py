"""Pairs of noisy and clean images: which noise, when another, and from which seed."""

import lightning
import pytest
import torch
from idx_files import write_fashion_mnist
from torch import nn

from hvpopt.lightning.batches import Batches
from hvpopt.lightning.idx import read_idx
from hvpopt.lightning.noisy_images import NoisyBatches, NoisyFashionMNIST


@pytest.fixture
def folder(tmp_path):
    return write_fashion_mnist(tmp_path)


def images(folder, batch_size=16, **arguments):
    sizes = {"num_val": 10, "num_test": 20}
    return NoisyFashionMNIST(batch_size, root=folder, **sizes | arguments)


def joined(batches, epoch=0):
    """All noisy and all clean images of an epoch."""
    if hasattr(batches.sampler, "set_epoch"):
        batches.sampler.set_epoch(epoch)
    noisy, clean = zip(*batches, strict=True)
    return torch.cat(noisy), torch.cat(clean)


def noise_by_image(noisy, clean):
    """The noise of each image, in an order that does not depend on the batches'."""
    order = sorted(range(len(clean)), key=lambda i: clean[i].flatten().tolist())
    return (noisy - clean)[order]


# --- the pairs


def test_the_clean_images_are_those_of_the_files_and_the_noise_is_gaussian(folder):
    data = images(folder, noise=0.3)
    data.prepare_data()
    noisy, clean = joined(data.test_dataloader())
    raw = read_idx(folder / "t10k-images-idx3-ubyte", 3)
    torch.testing.assert_close(clean.squeeze(1) * 255, raw.float())
    assert noisy.shape == clean.shape == (20, *data.image_shape)
    z = (noisy - clean).double() / 0.3
    n = z.numel()  # 15,680: four standard errors of mean, variance and fourth moment
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert noisy.min() < 0  # not clipped
    assert noisy.max() > 1


def test_the_parts_have_the_sizes_that_were_asked_for(folder):
    data = images(folder, num_train=30, num_test=7, eval_batch_size=5)
    assert [len(x) for x, _ in data.train_dataloader()] == [16, 14]
    assert [len(x) for x, _ in data.val_dataloader()] == [5, 5]
    assert [len(x) for x, _ in data.test_dataloader()] == [5, 2]


def test_no_number_of_test_images_means_all(folder):
    assert len(joined(images(folder, num_test=None).test_dataloader())[0]) == 20


# --- when the noise changes


def test_each_training_epoch_has_its_own_noise_and_order(folder):
    batches = images(folder).train_dataloader()
    epochs = [joined(batches, epoch) for epoch in (0, 1)]
    assert not torch.equal(epochs[0][1], epochs[1][1])
    first, second = (noise_by_image(*epoch) for epoch in epochs)
    assert (first * second).mean().abs() < 5 * 0.2**2 / first.numel() ** 0.5  # uncorrelated


def test_an_epochs_batches_share_no_noise(folder):
    noisy, clean = joined(images(folder, batch_size=25).train_dataloader())
    first, second = (noisy - clean).split(25)
    assert not torch.isclose(first, second).all(dim=(1, 2, 3)).any()


def test_training_noise_is_a_function_of_seed_and_epoch(folder):
    def epoch(seed, number):
        return joined(images(folder, seed=seed).train_dataloader(), number)[0]

    assert torch.equal(epoch(3, 2), epoch(3, 2))
    assert not torch.equal(epoch(3, 2), epoch(4, 2))


def test_the_noise_of_validation_and_test_images_stays(folder):
    data = images(folder)
    for loader in (data.val_dataloader, data.test_dataloader):
        torch.testing.assert_close(joined(loader()), joined(loader()), rtol=0, atol=0)
    for name, other in {
        "seed": images(folder, seed=1),
        "batches": images(folder, eval_batch_size=3, batch_size=2),
    }.items():
        for loader in ("val_dataloader", "test_dataloader"):
            theirs = joined(getattr(other, loader)())
            assert torch.equal(joined(getattr(data, loader)())[0], theirs[0]), name


def test_validation_and_test_noise_differ_and_have_a_seed_of_their_own(folder):
    data, other = images(folder, num_test=10), images(folder, num_test=10, noise_seed=1)
    noise = [
        torch.sub(*joined(loader()))
        for loader in (
            data.val_dataloader,
            data.test_dataloader,
            other.val_dataloader,
            other.test_dataloader,
        )
    ]
    for i, first in enumerate(noise):
        for second in noise[i + 1 :]:
            assert not torch.isclose(first, second).all(dim=(1, 2, 3)).any()


def test_another_noise_level_scales_the_same_noise(folder):
    clean = joined(images(folder).test_dataloader())[1]
    low, high = (joined(images(folder, noise=s).test_dataloader())[0] for s in (0.1, 0.4))
    torch.testing.assert_close((high - clean) / 4, low - clean, atol=1e-6, rtol=0)


def test_the_global_generators_are_left_alone(folder):
    before = torch.get_rng_state()
    data = images(folder)
    for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
        joined(loader())
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_share_the_images_of_an_epoch_and_no_noise():
    clean = torch.arange(40.0)[:, None].expand(-1, 9)
    parts = []
    for rank in range(2):
        batches = Batches(clean, clean, 8, shuffle=True, num_replicas=2, rank=rank)
        parts.append(joined(NoisyBatches(batches, noise=0.1)))
    shown = torch.cat([clean[:, 0] for _, clean in parts])
    assert sorted(shown.tolist()) == list(range(40))
    first, second = (noisy - clean for noisy, clean in parts)
    assert not torch.isclose(first, second).all(1).any()


class Inputs(lightning.LightningModule):
    """Keeps the noisy images that each epoch shows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.epochs = {}

    def training_step(self, batch, batch_idx):
        self.epochs.setdefault(self.current_epoch, []).append(batch[0])
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("overfit", [0, 2])
def test_lightning_sets_the_epoch_and_overfitting_keeps_the_noise(folder, tmp_path, overfit):
    module = Inputs()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        overfit_batches=overfit,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=images(folder))
    first, second = (torch.cat(module.epochs[epoch]) for epoch in range(2))
    assert first.shape == second.shape
    assert torch.equal(first, second) == bool(overfit)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"noise": 0.0}, "noise=0 leaves nothing to remove"),
        ({"noise": -0.1}, "noise=-0.1 is out of range"),
        ({"noise": float("nan")}, "noise=nan is out of range"),
        ({"num_test": 0}, "num_test=0 is out of range"),
        ({"noise_seed": -1}, "noise_seed=-1 is no seed"),
        ({"num_val": 0}, "num_val must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(folder, arguments, match):
    with pytest.raises(ValueError, match=match):
        images(folder, **arguments)


def test_more_test_images_than_there_are_is_refused(folder):
    with pytest.raises(ValueError, match="num_test=21 is more than the 20 test images"):
        images(folder, num_test=21).setup()


def test_a_folder_without_the_files_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no train-images-idx3-ubyte"):
        NoisyFashionMNIST(root=tmp_path)
