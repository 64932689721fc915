"""The command that trains, compares and draws, and its picture."""

import json
from pathlib import Path

import pytest
import torch
from completion_problems import images, module_of, seeded
from hvpopt.experiments import completion
from hvpopt.experiments.completion import exam, runs
from hvpopt.experiments.completion.__main__ import main, table
from hvpopt.experiments.completion.figure import HIDDEN, Panel, known, write
from hvpopt.experiments.completion.questions import QUESTIONS
from hvpopt.experiments.completion.scores import Score
from PIL import Image

RESULTS = Path(completion.__file__).parent / "results"


def size(path):
    with Image.open(path) as picture:
        return picture.size


def test_pixels_are_drawn_in_their_places_and_hidden_ones_blue():
    (image,), question = images(1), QUESTIONS["half"]
    (view,) = question.view(image[None], seeded())
    drawn, is_known = known(question, image, view), view[1] == 1
    assert torch.equal(drawn[~is_known], HIDDEN.expand(32, 3))
    assert torch.equal(drawn[is_known], (1 - image[0][is_known]).unsqueeze(1).expand(-1, 3))


def test_means_are_drawn_as_blocks():
    (image,), question = images(1), QUESTIONS["means"]
    (view,) = question.view(image[None], seeded())
    block = known(question, image, view)[2:4, 6:8]
    expected = (1 - image[0, 2:4, 6:8].mean()).expand(2, 2, 3)
    torch.testing.assert_close(block, expected, atol=1e-5, rtol=0)


def test_sums_are_drawn_beside_the_hidden_image_the_largest_black():
    (image,), question = images(1), QUESTIONS["sums"]
    (view,) = question.view(image[None], seeded())
    drawn = known(question, image, view)
    assert drawn.shape == (10, 10, 3)
    assert torch.equal(drawn[:8, :8], HIDDEN.expand(8, 8, 3))
    sums = torch.stack([image[0].sum(1), image[0].sum(0)])
    margins = torch.stack([drawn[:8, 9, 0], drawn[9, :8, 0]])
    torch.testing.assert_close(margins, 1 - sums / sums.max())


def test_the_picture_is_written_with_a_panel_for_each_question(tmp_path):
    given, panels = images(2), []
    for question in QUESTIONS.values():
        view = question.view(given, seeded())
        panels.append(Panel(question, given, view, {"energy": given}, {"energy": "error"}, "new"))
    write(tmp_path / "some.png", panels[:2])
    write(tmp_path / "all.png", panels)
    (width, height), (whole, same) = size(tmp_path / "some.png"), size(tmp_path / "all.png")
    assert height == same > 300
    assert whole > width > 500


def test_the_committed_picture_is_small_and_its_numbers_are_there():
    assert 20_000 < (RESULTS / "completion.png").stat().st_size <= 150_000
    content = json.loads((RESULTS / "completion.json").read_text())
    assert not content["quick"]
    assert set(content["scores"]) == set(exam.METHODS)


def test_the_table_has_means_spreads_and_gaps():
    scores = {method: {name: [] for name in QUESTIONS} for method in exam.METHODS}
    scores["energy"]["sums"] = [Score(0.1, 90.0), Score(0.2, 80.0), Score(0.3, 100.0)]
    scores["gaussian"]["pixels"] = [Score(0.25, 50.0)]
    header, error, read, *_, gaussian, _, _, _ = table(scores).splitlines()
    assert header.split() == list(QUESTIONS)
    assert error.split() == ["energy", "–", "–", "–", "–", "0.2000", "±", "0.1000"]
    assert read.split() == ["read", "rightly", "–", "–", "–", "–", "90.0%"]
    assert gaussian.split()[-5:] == ["0.2500", "–", "–", "–", "–"]


def test_the_command_scores_all_methods_and_writes_its_files(tmp_path, monkeypatch, capsys):
    """With networks fresh from their constructors in place of trained ones."""
    asked = []

    def untrained(folder, name, seed, overrides):
        asked.append((name, seed))
        return module_of("energy" if name == "energy" else "feedforward", num_steps=2)

    monkeypatch.setattr(exam, "trained", untrained)
    monkeypatch.setattr(exam, "NOISES", (1e-3,))
    picture, scores = tmp_path / "c.png", tmp_path / "c.json"
    main([str(picture), "--json", str(scores), "--seeds", "4", "5"])
    once = [("specialist_means", 4), ("specialist_sums", 4)]
    assert asked == [(n, s) for s in (4, 5) for n in ("energy", "feedforward")] + once
    assert size(picture)[0] > 1000
    content = json.loads(scores.read_text())
    assert content["seeds"] == [4, 5]
    counts = {
        method: {q: len(s) for q, s in by.items()} for method, by in content["scores"].items()
    }
    assert counts["energy"] == counts["feedforward"] == dict.fromkeys(QUESTIONS, 2)
    assert counts["gaussian"] == dict.fromkeys(QUESTIONS, 1)
    assert counts["specialist"] == {name: int(name in ("means", "sums")) for name in QUESTIONS}
    gaussian = content["scores"]["gaussian"]["sums"][0]
    assert 0.1 < gaussian["error"] < 0.2  # on these digits, whoever computes it
    assert "of whole digits 9" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_named_before_anything_is_trained(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none" / "c.png")])
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_trained_by_the_command_once_and_loaded(tmp_path):
    quick = ["trainer.max_epochs=1", "+trainer.limit_train_batches=1", "logger=none"]
    module = runs.trained(tmp_path, "specialist_sums", 3, quick)
    run = tmp_path / "specialist_sums" / "3"
    state = torch.load(runs.checkpoint(run), weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    written = (run / "summary.json").stat().st_mtime_ns
    assert "question: sums" in (run / "config.yaml").read_text()
    runs.trained(tmp_path, "specialist_sums", 3, quick)
    assert (run / "summary.json").stat().st_mtime_ns == written
