"""The arithmetic of the metrics, the files, the pictures, and bad input."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
import torchvision
from matplotlib.image import imread
from test_data import write_image
from torchvision.transforms.functional import to_pil_image

import data
import evaluate
import train
from evaluate import classification_report, confusion_matrix
from mobilenetv2 import MobileNetV2, load_checkpoint


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


# What scikit-learn 1.9.1 gives: per class and averages of
#   sklearn.metrics.precision_recall_fscore_support(labels, predictions, labels=range(classes), zero_division=0, average=...)
# with average None, "macro" and "weighted"; the labels and predictions are those of `awkward_cases`.
SKLEARN = {
    "seven classes": {
        "precision": [0.6395348837209303, 0.7469879518072289, 0.7101449275362319, 0.7058823529411765, 0.7945205479452054,
                      0.6666666666666666, 0.6721311475409836],
        "recall": [0.7236842105263158, 0.7469879518072289, 0.6533333333333333, 0.75, 0.651685393258427, 0.7017543859649122,
                   0.7321428571428571],
        "f1": [0.6790123456790124, 0.7469879518072289, 0.6805555555555556, 0.7272727272727273, 0.7160493827160493,
               0.6837606837606838, 0.7008547008547008],
        "support": [76, 83, 75, 64, 89, 57, 56],
        "macro": [0.7051240683083462, 0.7085125902904391, 0.7049276210922797],
        "weighted": [0.7107873286913235, 0.706, 0.7062853535353535],
    },
    "absent classes": {
        "precision": [0.6666666666666666, 0.3333333333333333, 0, 0, 0, 0],
        "recall": [0.6666666666666666, 0.6666666666666666, 0, 0, 0, 0],
        "f1": [0.6666666666666666, 0.4444444444444444, 0, 0, 0, 0],
        "support": [3, 3, 2, 0, 2, 0],
        "macro": [0.16666666666666666, 0.2222222222222222, 0.1851851851851852],
        "weighted": [0.3, 0.4, 0.3333333333333333],
    },
    "one class": {
        "precision": [1], "recall": [1], "f1": [1], "support": [5], "macro": [1, 1, 1], "weighted": [1, 1, 1],
    },
    "1,000 classes": {
        "macro": [0.6660672071037669, 0.6604708681785285, 0.6545395262209468],
        "weighted": [0.6656448141932059, 0.65935, 0.654808218573219],
    },
}  # fmt: skip


def awkward_cases(name):
    """Labels and predictions, by formulas that draw the same everywhere, and the number of classes."""

    def spread(count, classes, start):
        return (torch.arange(count) + start) ** 2 % 10007 % classes

    if name == "one class":
        return torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long), 1
    if name == "absent classes":  # 3 and 5 do not occur, 2, 4 and 5 are never predicted
        return torch.tensor([0, 0, 1, 1, 1, 2, 2, 4, 4, 0]), torch.tensor([0, 1, 1, 1, 3, 1, 0, 1, 1, 0]), 6
    count, classes = {"seven classes": (500, 7), "1,000 classes": (20_000, 1000)}[name]
    labels = spread(count, classes, 0)
    return labels, torch.where(spread(count, 3, 900) == 0, spread(count, classes, 500), labels), classes


@pytest.mark.parametrize("name", SKLEARN)
def test_the_report_agrees_with_scikit_learn_to_the_last_digit(name):
    report, expected = classification_report(confusion_matrix(*awkward_cases(name))), SKLEARN[name]
    for key in ("precision", "recall", "f1", "support"):
        assert key not in expected or [row[key] for row in report["per_class"]] == expected[key]
    for key in ("macro", "weighted"):  # sums, which numpy may add up in another order on another processor
        assert [report[key][measure] for measure in ("precision", "recall", "f1")] == pytest.approx(expected[key], rel=4e-16)


def test_what_is_undefined_is_zero_with_a_note_and_what_is_confused_is_told():
    confusion = confusion_matrix(*awkward_cases("absent classes"))
    assert evaluate.find_notes(confusion, list("abcdef")) == [
        "classes never predicted, so their precision is 0: c, e, f",
        "classes without images, so their recall is 0: d, f",
        "most often confused: e → b (2×), a → b (1×), b → d (1×)",
    ]
    many = evaluate.find_notes(torch.zeros(30, 30, dtype=torch.long), [f"class {index}" for index in range(30)])
    assert len(many) == 2 and many[0].endswith("class 9 and 20 more")
    assert evaluate.find_notes(torch.eye(3, dtype=torch.long), list("abc")) == []


def test_the_text_report_has_the_form_that_people_know():
    report = classification_report(torch.tensor([[2, 1], [0, 1]]))
    assert evaluate.format_report(report, {"loss": 0.5, "top1": 0.75}, ["cat", "a longer name"]).splitlines() == [
        "               precision  recall  f1-score  support",
        "",
        "          cat     1.0000  0.6667    0.8000        3",
        "a longer name     0.5000  1.0000    0.6667        1",
        "",
        "     accuracy                       0.7500        4",
        "    macro avg     0.7500  0.8333    0.7333        4",
        " weighted avg     0.8750  0.7500    0.7667        4",
        "",
        "loss 0.5000  top1 0.7500",
    ]


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
    before = (trained / "best.pt").read_bytes()
    code, out, _ = call(evaluate, "--checkpoint", trained / "best.pt", "--out", tmp_path)
    assert code == 0 and (trained / "best.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "confusion.png", "curves.png", "metrics.json", "mistakes.png", "predictions.csv", "report.txt", "samples.png",
    ]  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert {"top1", "top5", "loss", "macro", "weighted", "per_class", "images", "split"} <= metrics.keys()
    assert (metrics["split"], metrics["images"]) == ("test", 899)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["image"]) for row in rows] == list(range(899))
    assert sum(row["true"] == row["predicted"] for row in rows) / 899 == pytest.approx(metrics["top1"])
    for row in rows:
        confidences = [float(row[f"confidence{end}"]) for end in ("", "_2", "_3")]
        assert 1 >= confidences[0] >= confidences[1] >= confidences[2] >= 0 and sum(confidences) <= 1.00001
        assert len({row["predicted"], row["second"], row["third"]}) == 3
    assert (tmp_path / "report.txt").read_text() in out
    for picture in ("confusion.png", "curves.png", "mistakes.png", "samples.png"):
        assert imread(tmp_path / picture).std() > 0
    recall = sum(row["recall"] * row["support"] for row in metrics["per_class"].values()) / 899
    assert recall == pytest.approx(metrics["top1"])


def test_metrics_do_not_depend_on_the_batch_size_or_the_workers(trained, photos):
    model, checkpoint = load_checkpoint(trained / "best.pt")
    for name, settings in (("digits", ((7, 0), (899, 0))), (photos, ((2, 0), (3, 2), (50, 0)))):
        counts = []
        for size, workers in settings:
            dataset = data.load_data(name, checkpoint["preprocessing"], batch_size=size, workers=workers)
            logits, labels = evaluate.predict(model, dataset.test or dataset.train)
            counts.append(confusion_matrix(labels, logits.argmax(dim=1), 10))
        assert counts[0].sum() == len(labels) and all(torch.equal(counts[0], others) for others in counts)


def test_a_folder_without_test_images_is_evaluated_on_validation_and_says_so(photos, tmp_path, call):
    options = ("--data", photos, "--workers", 0)
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
        ((0, 0), "5\n83%"),
        ((1, 0), "1\n17%"),
        ((1, 1), "3\n100%"),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert axes.get_title() == "8 of 9 right"

    split = data.load_data("digits").val
    logits = torch.nn.functional.one_hot(split.labels, 10).float() * 9
    logits[::2] = logits[::2].roll(1, dims=1)  # every second image is taken for the next digit
    indices = torch.tensor([3, 4, 8, 9, 10, 20, 21, 30, 31, 41])
    digits = list("0123456789")
    path = tmp_path / "samples.png"
    assert evaluate.plot_predictions(path, split, logits, digits, "a title", indices) == ["samples.png"]
    titles = [axes.title for axes in drawn[-1].axes if axes.get_title()]
    assert len(titles) == 10 and drawn[-1].get_suptitle() == "a title"
    for title, index in zip(titles, indices.tolist(), strict=True):
        label = split.labels[index].item()
        before, guess = title.get_text().split("\n")
        wrong = index % 2 == 0
        assert (before, int(guess.split(" · ")[0])) == ((f"{label} →", (label + 1) % 10) if wrong else ("", label))
        assert title.get_color() == (evaluate.WRONG if wrong else evaluate.RIGHT)
    assert {title.get_color() for title in titles} == {evaluate.RIGHT, evaluate.WRONG}

    path.write_bytes(b"of an earlier run")  # a picture of nothing is not drawn, and does not stay either
    assert evaluate.plot_predictions(path, split, logits, digits, "a title", indices[:0]) == [] and not path.exists()

    scores = {f"{part}_{key}": 0.5 for part in ("train", "val") for key in ("loss", "top1")}
    evaluate.plot_history([{"stage": stage, "epoch": 1} | scores for stage in ("head", "head", "blocks")], "unused")
    dashed = [line.get_xdata()[0] for line in drawn[-1].axes[0].lines if line.get_linestyle() == "--"]
    assert dashed == [2.5]


@pytest.mark.parametrize("count, cells, ticks", ((2, 2, 2), (10, 10, 10), (37, 37, 37), (100, 100, 100), (1000, 0, 0)))
def test_the_confusion_matrix_has_numbers_and_names_where_they_fit(count, cells, ticks, tmp_path, monkeypatch):
    figures, real = [], evaluate.Figure.savefig
    monkeypatch.setattr(evaluate.Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or real(figure, *a, **k))
    names = [f"class {index}" for index in range(count)]
    evaluate.plot_confusion(11 * torch.eye(count, dtype=torch.long), names, tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    assert len(axes.texts) == cells and (axes.get_yticklabels()[0].get_text() == "class 0") == (ticks > 0)
    cell = axes.get_window_extent().width / count
    for texts, side in ((axes.texts, "width"), (axes.texts, "height"), (axes.get_yticklabels()[:ticks], "height")):
        assert all(getattr(text.get_window_extent(), side) <= 1.15 * cell for text in texts[:3])


def test_activation_maps_average_to_the_logits_and_lie_where_they_belong():
    model = MobileNetV2(5, 0.35, output_stride=16).eval()
    torch.nn.init.normal_(model.classifier.bias)
    images, chosen = torch.randn(3, 3, 64, 64), torch.tensor([4, 0, 2])
    maps = evaluate.find_activations(model, images, chosen)
    assert maps.shape == (3, 4, 4)
    with torch.no_grad():
        logits = model(images)[torch.arange(3), chosen] - model.classifier.bias[chosen]
    torch.testing.assert_close(maps.mean(dim=(1, 2)), logits)
    maps = torch.full((1, 4, 4), -1.0)
    maps[0, 1, 2] = 3.0
    heat = evaluate.colour_activations(maps, numpy.zeros((1, 64, 64, 3)), 16)[0].sum(axis=2)
    assert numpy.unravel_index(heat.argmax(), heat.shape) == (16, 32) and heat.shape == (64, 64)


def test_the_middle_of_a_cell_is_a_multiple_of_the_stride():
    """What `colour_activations` relies on: which pixels an inner cell of the map depends on, by the gradient."""
    model = MobileNetV2(5, 0.35, output_stride=8).double().eval()
    images = torch.rand(1, 3, 161, 161, dtype=torch.double, requires_grad=True)
    model.blocks[:14](model.stem(images))[0, :, 10, 10].sum().backward()  # all strides of 2; the other blocks have 1
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert (rows.min() + rows.max()).item() / 2 == 8 * 10


@pytest.fixture
def photos(tmp_path):
    for number in range(10):
        for name, colour in (("light", 200 + number), ("dark", number)):
            write_image(tmp_path / "photos" / name / f"{number}.png", (colour,) * 3)
    return tmp_path / "photos"


def test_pictures_without_labels_are_named_and_explained(trained, photos, tmp_path, call):
    (photos / "damaged.jpg").write_bytes(b"not an image")
    options = ("--checkpoint", trained / "best.pt", "--out", tmp_path / "out", "--images")
    code, out, err = call(evaluate, *options, photos, photos / "light" / "3.png", "--explain")
    assert code == 0 and "1 unreadable image left out" in err and len(err.splitlines()) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images.csv", "images.png", "images-explanation.png"}
    with open(tmp_path / "out" / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21 and rows[-1]["image"] == str(photos / "light" / "3.png")
    assert {row["true"] for row in rows} == {""}
    model, checkpoint = load_checkpoint(trained / "best.pt")
    logits, _ = evaluate.predict(model, data.load_pictures(
        [photos], preprocessing=checkpoint["preprocessing"], batch_size=32, workers=0))  # fmt: skip
    best = logits.softmax(dim=1).topk(3, dim=1)
    for row, line, guesses, confidences in zip(rows, out.splitlines(), best.indices, best.values, strict=False):
        assert [row["predicted"], row["second"], row["third"]] == [str(guess.item()) for guess in guesses]
        assert float(row["confidence_2"]) == pytest.approx(confidences[1].item(), abs=1e-5)
        assert line.startswith(f"{row['image']}: {row['predicted']} {float(row['confidence']):.1%}, ")
    for picture in ("images.png", "images-explanation.png"):
        assert imread(tmp_path / "out" / picture).std() > 0


@pytest.mark.parametrize("kind, message", (("missing", "there is no"), ("text", "cannot read"), ("folder", "no image in")))
def test_pictures_that_are_none_end_in_one_line(kind, message, trained, tmp_path, call):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not an image")
    code, _, err = call(evaluate, "--checkpoint", trained / "best.pt", "--out", tmp_path, "--images", tmp_path / kind)
    assert code == 2 and len(err.splitlines()) == 1 and message in err and str(tmp_path / kind) in err


def test_weights_in_torchvisions_names_take_the_classes_of_the_data_or_those_of_imagenet(photos, tmp_path, call):
    options = ("--out", tmp_path / "out", "--checkpoint", tmp_path / "theirs.pth")
    for count in (2, 3, 1000):
        weights = torchvision.models.mobilenet_v2(num_classes=count, width_mult=0.35).state_dict()
        torch.save(weights, tmp_path / "theirs.pth")
        code, out, err = call(evaluate, *options, "--data", photos)
        assert code == (0 if count == 2 else 2)
        assert "  dark  " in out if count == 2 else {3: "3 classes (class 0, class 1,", 1000: "(tench, goldfish,"}[count] in err
    assert call(evaluate, *options, "--images", photos)[0] == 0
    with open(tmp_path / "out" / "images.csv", newline="") as file:
        names = set(torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2.meta["categories"])
        assert all(row["predicted"].partition(" (")[0] in names for row in csv.DictReader(file))
    checkpoint = {"arch": {"num_classes": 1000}, "classes": []}
    assert len(set(evaluate.name_classes(checkpoint))) == 1000


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys):
    """python evaluate.py | head: what is printed last finds a closed pipe, and so would what Python flushes at the end."""
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(fileno=lambda: 1))
    replaced = []
    monkeypatch.setattr(data.os, "dup2", lambda source, target: replaced.append(target))

    def print_to_nobody():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit) as stop:
        data.run(print_to_nobody)
    assert (stop.value.code, replaced, capsys.readouterr().err) == (0, [1], "")


def test_a_checkpoint_of_other_classes_is_refused_with_both_named(trained, tmp_path, call):
    code, _, err = call(evaluate, "--checkpoint", trained / "best.pt", "--data", "glyphs", "--out", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1
    assert "knows 10 classes (0, 1, 2, ...), 'glyphs' has 37 (A, B, C, ...): name the data" in err


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


def test_a_digit_in_a_file_gives_what_the_same_digit_in_memory_gives(trained, tmp_path):
    """Photos are seen through their middle; what a network has learned whole, it is shown whole."""
    model, checkpoint = load_checkpoint(trained / "best.pt")
    split = data.load_data("digits", checkpoint["preprocessing"]).test.subset(torch.arange(20))
    for index, image in enumerate(split.images):
        to_pil_image(image).save(tmp_path / f"{index:02}.png")
    common = {"preprocessing": checkpoint["preprocessing"], "batch_size": 32, "workers": 0}
    from_files = evaluate.predict(model, data.load_pictures([tmp_path], **common))[0]
    torch.testing.assert_close(from_files, evaluate.predict(model, split)[0])
