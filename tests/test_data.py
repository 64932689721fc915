"""The data: IDX files, batches in memory, the two data modules."""

import gzip

import lightning
import pytest
import torch
from idx_files import idx_bytes, write_fashion_mnist

from hvpopt.lightning import fashion_mnist
from hvpopt.lightning.batches import Batches
from hvpopt.lightning.data import Digits, FashionMNIST
from hvpopt.lightning.idx import read_idx

# --- IDX


@pytest.mark.parametrize("name", ["plain", "zipped.gz"])
def test_read_idx_gives_the_array_that_was_written(tmp_path, name):
    values = torch.arange(24).reshape(2, 3, 4)
    content = idx_bytes(values)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    read = read_idx(tmp_path / name, 3)
    assert read.dtype == torch.uint8
    assert torch.equal(read.long(), values)


@pytest.mark.parametrize(
    ("content", "ndim", "match"),
    [
        (idx_bytes(torch.arange(6).reshape(2, 3)), 1, "begin with 00 00 08 01, found 00 00 08 02"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 0]), 1, "begin with 00 00 08 01, found 00 00 0d 01"),
        (b"", 1, "found nothing"),
        (bytes([0, 0, 8, 3, 0, 0]), 3, "ends within its header: expected 16 bytes, found 6"),
        (idx_bytes(torch.arange(6).reshape(2, 3))[:-1], 2, "truncated: .* 2 x 3 = 6 .* found 5"),
        (idx_bytes(torch.arange(6)) + b"x", 1, "too long: .* 6 = 6 values, found 7"),
    ],
)
def test_read_idx_refuses_a_malformed_file_by_name(tmp_path, content, ndim, match):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        read_idx(path, ndim)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-10], lambda b: b"x" + b, lambda b: b[:12] + b"\xff" * 9 + b[21:]]
)
def test_read_idx_refuses_a_damaged_gzip_file(tmp_path, damage):
    path = tmp_path / "file.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(torch.arange(200)))))
    with pytest.raises(ValueError, match="is not a complete gzip file"):
        read_idx(path, 1)


# --- batches


def test_an_epoch_shows_every_sample_once_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    batches = Batches(torch.arange(10.0), torch.arange(10), 4, shuffle=True)
    parts = list(batches)
    assert [len(targets) for _, targets in parts] == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(torch.cat([targets for _, targets in parts]).tolist()) == list(range(10))
    assert all(torch.equal(inputs.long(), targets) for inputs, targets in parts)
    assert torch.equal(before, torch.get_rng_state())


def order(seed, epoch, **world):
    batches = Batches(torch.arange(50), torch.arange(50), 50, shuffle=True, seed=seed, **world)
    batches.sampler.set_epoch(epoch)
    return next(iter(batches))[1].tolist()


def test_the_order_is_a_function_of_seed_and_epoch():
    assert order(1, 2) == order(1, 2)
    orders = {tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9  # also epoch 1 of seed 0 and epoch 0 of seed 1 differ


def test_ranks_share_an_epoch_between_them():
    first, second = (order(0, 3, num_replicas=2, rank=rank) for rank in range(2))
    assert sorted(first + second) == list(range(50))


def test_batches_refuse_inputs_without_targets():
    with pytest.raises(ValueError, match=r"as many inputs as targets .* got 3 and 2"):
        Batches(torch.zeros(3), torch.zeros(2), 1)


class EpochOrders(lightning.Callback):
    """Keeps the labels of each training epoch in the order in which the trainer saw them."""

    def __init__(self):
        self.epochs = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.epochs.setdefault(trainer.current_epoch, []).extend(batch[1].tolist())


class Nothing(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("overfit", [0, 2])
def test_lightning_sets_the_epoch_and_overfitting_stops_the_shuffling(tmp_path, overfit):
    orders = EpochOrders()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        overfit_batches=overfit,
        callbacks=[orders],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = Digits(num_train=256)
    trainer.fit(Nothing(), datamodule=data)
    first, second = orders.epochs[0], orders.epochs[1]
    assert sorted(first) == sorted(second)
    assert (first == second) == bool(overfit)


# --- digits


def test_digits_are_split_at_random_by_class_and_without_overlap():
    data = Digits()
    data.setup()
    splits = data._splits
    assert {name: len(labels) for name, (_, labels) in splits.items()} == {
        "train": 1168,
        "val": 270,
        "test": 359,
    }
    for images, labels in splits.values():
        assert images.shape[1:] == data.image_shape
        assert images.min() == 0
        assert images.max() == 1
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert (shares - 0.1).abs().max() < 0.01
    everything = torch.cat([images.flatten(1) for images, _ in splits.values()])
    assert len(everything.unique(dim=0)) == 1797


def test_the_split_has_a_seed_of_its_own():
    def labels_of_test(**seeds):
        return next(iter(Digits(**seeds).test_dataloader()))[1]

    assert torch.equal(labels_of_test(seed=0), labels_of_test(seed=1))
    assert not torch.equal(labels_of_test(), labels_of_test(split_seed=1))


def test_num_train_takes_a_part_of_the_training_images_only():
    data = Digits(num_train=100, batch_size=64)
    assert [len(labels) for _, labels in data.train_dataloader()] == [64, 36]
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 359


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1 .*, got 0.0"),
        ({"test_fraction": 1.5}, "test_fraction must be between 0 and 1 .*, got 1.5"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing for training"),
        ({"split_seed": -1}, "split_seed must be an integer from 0"),
        ({"seed": 2**32}, "seed must be an integer from 0"),
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
    ],
)
def test_digits_refuse_arguments_out_of_range(arguments, match):
    with pytest.raises(ValueError, match=match):
        Digits(**arguments)


def test_more_training_images_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_train=5000 is more than the 1168 training images"):
        Digits(num_train=5000).setup()


# --- Fashion-MNIST


def test_fashion_mnist_reads_a_folder(tmp_path):
    data = FashionMNIST(root=write_fashion_mnist(tmp_path), num_val=10, batch_size=25)
    data.prepare_data()
    assert [len(labels) for _, labels in data.train_dataloader()] == [25, 25]
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (20, *data.image_shape)
    assert torch.equal(labels, torch.arange(20) % 10)
    raw = read_idx(tmp_path / "t10k-images-idx3-ubyte", 3)
    torch.testing.assert_close(images.squeeze(1) * 255, raw.float())
    assert torch.bincount(next(iter(data.val_dataloader()))[1]).tolist() == [1] * 10


def test_a_folder_that_lacks_a_file_is_refused_at_once(tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="holds no t10k-labels-idx1-ubyte"):
        FashionMNIST(root=tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(torch.arange(9))))
    with pytest.raises(ValueError, match=r"holds 60 images, but .* 9 labels"):
        FashionMNIST(root=tmp_path).setup()


def test_images_of_another_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="images of 8 x 8 pixels, expected 28 x 28"):
        FashionMNIST(root=write_fashion_mnist(tmp_path, side=8)).setup()


def test_a_validation_set_as_large_as_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_val=60 leaves nothing for training"):
        FashionMNIST(root=write_fashion_mnist(tmp_path), num_val=60).setup()


def test_without_files_and_network_the_error_names_three_remedies(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_ROOT", tmp_path)
    monkeypatch.setattr("sklearn.datasets.fetch_openml", unreachable)
    data = FashionMNIST()
    with pytest.raises(FileNotFoundError, match="no route to host") as error:
        data.prepare_data()
    for remedy in (str(tmp_path), "apt install", "data.root=DIR", "connect to the network"):
        assert remedy in str(error.value)


def test_openml_is_split_where_the_test_images_begin(monkeypatch, tmp_path):
    from sklearn.utils import Bunch

    pixels = torch.arange(70_000).remainder(256).unsqueeze(1).expand(-1, 784).numpy()
    labels = torch.arange(70_000).remainder(10).numpy().astype(str).astype(object)
    answer = Bunch(data=pixels, target=labels)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_ROOT", tmp_path)
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *args, **kwargs: answer)
    parts = fashion_mnist.load_from_openml()
    assert parts["train"][0].shape == (60_000, 28, 28)
    assert parts["test"][1][:3].tolist() == [0, 1, 2]
    assert parts["test"][0][0, 0, 0] == 60_000 % 256
