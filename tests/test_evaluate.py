"""The arithmetic of the metrics, the files, the pictures, and bad input."""

import csv
import json

import pytest
import torch
from matplotlib.image import imread

import data
import evaluate
import train
from evaluate import classification_report, confusion_matrix
from mobilenetv2 import load_checkpoint


def test_the_confusion_matrix_counts_true_classes_in_rows():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 1, 1, 1, 1, 0])
    confusion = confusion_matrix(labels, predictions, 4)
    assert confusion.tolist() == [[1, 2, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.dtype == torch.int64


def test_the_confusion_matrix_agrees_with_a_loop():
    labels, predictions = torch.randint(7, (2, 500))
    expected = torch.zeros(7, 7, dtype=torch.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label, prediction] += 1
    assert torch.equal(confusion_matrix(labels, predictions, 7), expected)


# sklearn.metrics.precision_recall_fscore_support (1.9.1), zero_division=0, of
#   true      0 0 0 0 1 1 2 2 2 3      (class 4 does not occur, class 3 is never predicted)
#   predicted 0 0 1 2 1 1 2 2 0 2
EXPECTED = {
    "precision": [2 / 3, 2 / 3, 0.5, 0.0, 0.0],
    "recall": [0.5, 1.0, 2 / 3, 0.0, 0.0],
    "f1": [4 / 7, 0.8, 4 / 7, 0.0, 0.0],
    "support": [4, 2, 3, 1, 0],
}


def test_the_report_divides_by_hand_as_scikit_learn_does():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    predictions = torch.tensor([0, 0, 1, 2, 1, 1, 2, 2, 0, 2])
    report = classification_report(confusion_matrix(labels, predictions, 5))
    for name, values in EXPECTED.items():
        assert [row[name] for row in report["per_class"]] == pytest.approx(values)
    for name in ("precision", "recall", "f1"):
        assert report["macro"][name] == pytest.approx(sum(EXPECTED[name]) / 5)
        weighted = sum(v * s for v, s in zip(EXPECTED[name], EXPECTED["support"], strict=True)) / 10
        assert report["weighted"][name] == pytest.approx(weighted)


def test_perfect_and_hopeless_predictions():
    assert classification_report(torch.diag(torch.tensor([3, 5])))["macro"] == {"precision": 1, "recall": 1, "f1": 1}
    hopeless = classification_report(torch.tensor([[0, 3], [5, 0]]))
    assert hopeless["weighted"] == {"precision": 0, "recall": 0, "f1": 0}


def test_scores_of_known_logits():
    logits = torch.log_softmax(torch.eye(8)[:4] * 3, dim=1)
    scores = evaluate.score(logits, torch.tensor([0, 1, 2, 7]))
    assert scores["top1"] == 0.75
    assert scores["loss"] == pytest.approx(-(logits[0, 0] * 3 + logits[3, 7]).item() / 4, rel=1e-5)
    assert "top5" not in evaluate.score(logits[:, :5], torch.zeros(4, dtype=torch.long))
    ranked = torch.arange(10.0).flip(0).repeat(10, 1)  # every image: class 0 first, class 9 last
    assert evaluate.score(ranked, torch.arange(10))["top5"] == 0.5


def test_evaluate_writes_what_the_readme_says(trained, tmp_path, call):
    code, out, _ = call(evaluate, "--checkpoint", trained / "best.pt", "--out", tmp_path)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "confusion.png", "metrics.json", "predictions.csv", "report.txt", "samples.png",
    ]  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert {"top1", "top5", "loss", "macro", "weighted", "per_class", "images", "split"} <= metrics.keys()
    assert (metrics["split"], metrics["images"]) == ("test", 899)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["image"]) for row in rows] == list(range(899))
    assert sum(row["true"] == row["predicted"] for row in rows) / 899 == pytest.approx(metrics["top1"])
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    assert (tmp_path / "report.txt").read_text() in out
    for picture in ("confusion.png", "samples.png"):
        assert imread(tmp_path / picture).std() > 0
    recall = sum(row["recall"] * row["support"] for row in metrics["per_class"].values()) / 899
    assert recall == pytest.approx(metrics["top1"])


def test_metrics_do_not_depend_on_the_batch_size(trained):
    model, checkpoint = load_checkpoint(trained / "best.pt")
    counts = []
    for size in (7, 899):
        split = data.load_data("digits", checkpoint["preprocessing"], batch_size=size).test
        logits, labels = evaluate.predict(model, split)
        counts.append(confusion_matrix(labels, logits.argmax(dim=1), 10))
    assert counts[0].sum() == 899 and torch.equal(*counts)


def test_a_folder_without_test_images_is_evaluated_on_validation_and_says_so(tmp_path, call):
    from test_data import write_image

    for number in range(10):
        write_image(tmp_path / "photos" / "light" / f"{number}.png", (200 + number,) * 3)
        write_image(tmp_path / "photos" / "dark" / f"{number}.png", (number,) * 3)
    options = ("--data", tmp_path / "photos", "--workers", 0)
    network = ("--width", 0.35, "--image-size", 32, "--epochs", 1, "--batch-size", 8)
    assert call(train, *options, *network, "--out", tmp_path / "run")[0] == 0
    code, out, _ = call(evaluate, *options, "--checkpoint", tmp_path / "run" / "best.pt", "--out", tmp_path / "eval")
    assert code == 0 and "has no test split; this is its validation split" in out
    with open(tmp_path / "eval" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(row["image"].endswith(".png") for row in rows)
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["split"] == "val"


def test_the_pictures_have_the_right_cells_and_names(trained, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    confusion = torch.tensor([[5, 1], [0, 3]])
    evaluate.plot_confusion(confusion, ["cat", "dog"], "unused")
    axes = drawn[-1].axes[0]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "5"),
        ((1, 0), "1"),
        ((1, 1), "3"),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert axes.get_title() == "8 of 9 right"

    split = data.load_data("digits").val
    logits = torch.nn.functional.one_hot(split.labels, 10).float() * 9
    logits[::2] = logits[::2].roll(1, dims=1)  # every second image is taken for the next digit
    evaluate.plot_samples(split, logits, list("0123456789"), "unused", count=10)
    titles = [axes.title for axes in drawn[-1].axes if axes.get_title()]
    assert len(titles) == 10
    for title in titles:
        names = title.get_text().splitlines()[0].split(" → ")
        assert title.get_color() == (evaluate.RIGHT if len(names) == 1 else evaluate.WRONG)
        assert len(names) == 1 or int(names[1]) == (int(names[0]) + 1) % 10
    assert {title.get_color() for title in titles} == {evaluate.RIGHT, evaluate.WRONG}

    scores = {f"{part}_{key}": 0.5 for part in ("train", "val") for key in ("loss", "top1")}
    evaluate.plot_history([{"stage": stage, "epoch": 1} | scores for stage in ("head", "head", "blocks")], "unused")
    dashed = [line.get_xdata()[0] for line in drawn[-1].axes[0].lines if line.get_linestyle() == "--"]
    assert dashed == [2.5]


def test_a_checkpoint_of_other_classes_is_refused_with_both_named(trained, tmp_path, call):
    code, _, err = call(evaluate, "--checkpoint", trained / "best.pt", "--data", "glyphs", "--out", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1
    assert "knows 10 classes (0, 1, 2, ...)" in err and "has 37 classes (A, B, C, ...)" in err


@pytest.mark.parametrize("kind", ("missing", "truncated", "other", "torchvision"))
def test_bad_checkpoints_end_in_one_line(kind, trained, tmp_path, call):
    path = tmp_path / "bad.pt"
    if kind == "truncated":
        path.write_bytes((trained / "best.pt").read_bytes()[:10_000])
    elif kind == "other":
        torch.save({"epoch": 3}, path)
    elif kind == "torchvision":
        torch.save({"features.0.0.weight": torch.zeros(1)}, path)
    code, _, err = call(evaluate, "--checkpoint", path, "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and str(path) in err
    assert not (tmp_path / "out").exists()


def test_evaluation_leaves_the_checkpoint_alone(trained, tmp_path, call):
    before = (trained / "best.pt").read_bytes()
    call(evaluate, "--checkpoint", trained / "best.pt", "--out", tmp_path)
    assert (trained / "best.pt").read_bytes() == before
    assert load_checkpoint(trained / "best.pt")
