"""Files in the ARFF format and header of Mulan, tiny ones, for the tests."""

import gzip

import torch

NUM_FEATURES, NUM_LABELS = 12, 5


def arff_text(features, labels, feature_names=None):
    """Sparse rows of zeros and ones; the labels are the last attributes, TAG_0, TAG_1, ..."""
    names = feature_names or [f"word{i}" for i in range(features.shape[1])]
    names += [f"TAG_{i}" for i in range(labels.shape[1])]
    lines = ["@relation tiny", "", *(f"@attribute {name} {{0,1}}" for name in names), "", "@data"]
    for row in torch.cat([features, labels], 1).tolist():
        lines.append("{" + ",".join(f"{i} {int(v)}" for i, v in enumerate(row) if v) + "}")
    return "\n".join(lines) + "\n"


def tiny_rows(count, seed=0, num_features=NUM_FEATURES, num_labels=NUM_LABELS):
    """Random binary features, and labels that repeat the first of them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(0, 2, (count, num_features), generator=generator)
    return features, features[:, :num_labels].clone()


def write_bibtex(folder, num_train=40, num_test=10, num_labels=NUM_LABELS):
    """Tiny files with the names of Bibtex; the training rows gzipped."""
    train = arff_text(*tiny_rows(num_train, 0, num_labels=num_labels))
    (folder / "bibtex-train.arff.gz").write_bytes(gzip.compress(train.encode()))
    test = arff_text(*tiny_rows(num_test, 1, num_labels=num_labels))
    (folder / "bibtex-test.arff").write_text(test)
    labels = "".join(f'<label name="TAG_{i}"></label>' for i in range(num_labels))
    (folder / "bibtex.xml").write_text(
        f'<labels xmlns="http://mulan.sourceforge.net/labels">{labels}</labels>'
    )
    return folder
