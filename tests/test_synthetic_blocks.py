"""The synthetic block data."""

import pytest
import torch

from hvpopt.lightning.synthetic_blocks import SyntheticBlocks


def rows(split="train", **arguments):
    data = SyntheticBlocks(**arguments)
    data.setup()
    return data._splits[split]


def test_each_block_has_one_label():
    labels = rows().labels
    assert labels.shape == (1500, 16)
    assert torch.equal(labels.unflatten(1, (4, 4)).sum(2), torch.ones(1500, 4))


def test_labels_are_the_largest_scores_of_one_matrix_for_all_splits():
    # 16 scores are linear in 64 features: the differences within a block must separate the labels
    # of every split by the same weights, which least squares finds from many rows.
    train, test = rows(num_train=20_000), rows("test")
    weights = torch.linalg.lstsq(train.features, train.labels - train.labels.mean(0)).solution
    scores = (test.features @ weights).unflatten(1, (4, 4))
    right = scores.argmax(2) == test.labels.unflatten(1, (4, 4)).argmax(2)
    assert right.float().mean() > 0.9


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one():
    small, large = rows(num_train=150), rows(num_train=1500)
    assert torch.equal(small.features, large.features[:150])
    assert torch.equal(rows("test", num_train=150).features, rows("test").features)


def test_the_seed_of_the_data_decides_them_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    assert torch.equal(rows(seed=0).features, rows(seed=1).features)
    assert not torch.equal(rows(data_seed=0).features, rows(data_seed=1).features)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "name", ["num_features", "num_blocks", "block_size", "num_train", "num_val", "num_test"]
)
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 is out of range"):
        SyntheticBlocks(**{name: 0})


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="data_seed=-1 is no seed"):
        SyntheticBlocks(data_seed=-1)
