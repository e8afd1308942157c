"""evaluate.py: metrics, files, pictures and error messages."""

import csv
import json
import shlex

import numpy
import pytest
import torch
import torchvision
from matplotlib.image import imread
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import data
import evaluate
import train
from evaluate import class_activation_map, classification_report, confusion_matrix, predict
from mobilenetv2 import MobileNetV2, load_checkpoint


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def photos(tmp_path):
    """A folder of 20 photos in two classes."""
    for name, colour in (("light", 200), ("dark", 0)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            image = Image.new("RGB", (40, 30), (colour + number,) * 3)
            image.save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def no_layout(monkeypatch):
    """Draw grids of images without a layout for their titles, which takes half of the time."""
    figure = data.Figure
    monkeypatch.setattr(data, "Figure", lambda figsize, layout: figure(figsize))


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw nothing, for tests that look at numbers and messages only."""
    for module, name in (
        (data, "plot_grid"),
        (evaluate, "plot_confusion"),
        (evaluate, "plot_history"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: None)


# -------------------------------------------------------------------------------------- metrics


def test_confusion_matrix_has_one_row_per_true_class():
    labels, predictions = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 0]])
    confusion = confusion_matrix(labels, predictions, 4)
    assert confusion.tolist() == [[1, 2, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.dtype == torch.int64


def test_confusion_matrix_agrees_with_a_loop():
    labels, predictions = torch.randint(7, (2, 500))
    expected = torch.zeros(7, 7, dtype=torch.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label, prediction] += 1
    assert torch.equal(confusion_matrix(labels, predictions, 7), expected)


# Results of scikit-learn 1.9.1, per class and averages, of
#   sklearn.metrics.precision_recall_fscore_support(
#       labels, predictions, labels=range(classes), zero_division=0, average=...)
# with average None, "macro" and "weighted", for the labels and predictions of `awkward_cases`.
SKLEARN = {
    "seven classes": {
        "precision": [
            0.6395348837209303, 0.7469879518072289, 0.7101449275362319, 0.7058823529411765,
            0.7945205479452054, 0.6666666666666666, 0.6721311475409836,
        ],
        "recall": [
            0.7236842105263158, 0.7469879518072289, 0.6533333333333333, 0.75,
            0.651685393258427, 0.7017543859649122, 0.7321428571428571,
        ],
        "f1": [
            0.6790123456790124, 0.7469879518072289, 0.6805555555555556, 0.7272727272727273,
            0.7160493827160493, 0.6837606837606838, 0.7008547008547008,
        ],
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
        "precision": [1],
        "recall": [1],
        "f1": [1],
        "support": [5],
        "macro": [1, 1, 1],
        "weighted": [1, 1, 1],
    },
    "1,000 classes": {
        "macro": [0.6660672071037669, 0.6604708681785285, 0.6545395262209468],
        "weighted": [0.6656448141932059, 0.65935, 0.654808218573219],
    },
}  # fmt: skip


def awkward_cases(name):
    """Return labels, predictions and the number of classes.

    Formulas make them, so that they are the same on any machine.
    """

    def spread(count, classes, start):
        return (torch.arange(count) + start) ** 2 % 10007 % classes

    if name == "one class":
        return torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long), 1
    if name == "absent classes":  # 3 and 5 do not occur, 2, 4 and 5 are never predicted
        return (
            torch.tensor([0, 0, 1, 1, 1, 2, 2, 4, 4, 0]),
            torch.tensor([0, 1, 1, 1, 3, 1, 0, 1, 1, 0]),
            6,
        )
    count, classes = {"seven classes": (500, 7), "1,000 classes": (20_000, 1000)}[name]
    labels = spread(count, classes, 0)
    return (
        labels,
        torch.where(spread(count, 3, 900) == 0, spread(count, classes, 500), labels),
        classes,
    )


@pytest.mark.parametrize("name", SKLEARN)
def test_report_agrees_with_scikit_learn_to_the_last_digit(name):
    report = classification_report(confusion_matrix(*awkward_cases(name)))
    expected = SKLEARN[name]
    for key in ("precision", "recall", "f1", "support"):
        if key in expected:
            assert [row[key] for row in report["per_class"]] == expected[key]
    for key in ("macro", "weighted"):  # another processor may add in another order
        averages = [report[key][measure] for measure in ("precision", "recall", "f1")]
        assert averages == pytest.approx(expected[key], rel=4e-16)


def test_text_report_has_one_line_per_class():
    report = classification_report(torch.tensor([[2, 1], [0, 1]]))
    text = evaluate.format_report(
        report, {"loss": 0.5, "top1": 0.75}, ["鬱金香", "a longer name"]
    )
    # A Chinese character has the width of two others.
    assert text.splitlines() == [
        "               precision  recall  f1-score  support",
        "",
        "       鬱金香     1.0000  0.6667    0.8000        3",
        "a longer name     0.5000  1.0000    0.6667        1",
        "",
        "     accuracy                       0.7500        4",
        "    macro avg     0.7500  0.8333    0.7333        4",
        " weighted avg     0.8750  0.7500    0.7667        4",
        "",
        "loss 0.5000  top1 0.7500",
    ]


def test_perfect_predictions_have_measures_of_1_and_wrong_ones_of_0():
    assert classification_report(torch.diag(torch.tensor([3, 5])))["macro"] == {
        "precision": 1,
        "recall": 1,
        "f1": 1,
    }
    wrong = classification_report(torch.tensor([[0, 3], [5, 0]]))
    assert wrong["weighted"] == {"precision": 0, "recall": 0, "f1": 0}


def test_scores_of_known_logits():
    logits = torch.log_softmax(torch.eye(8)[:4] * 3, dim=1)
    scores = evaluate.score(logits, torch.tensor([0, 1, 2, 7]))
    assert scores["top1"] == 0.75
    assert scores["loss"] == pytest.approx(
        -(logits[0, 0] * 3 + logits[3, 7]).item() / 4, rel=1e-5
    )
    assert "top5" not in evaluate.score(logits[:, :5], torch.zeros(4, dtype=torch.long))
    # Class 0 is the first of each image, class 9 the last.
    ranked = torch.arange(10.0).flip(0).repeat(10, 1)
    assert evaluate.score(ranked, torch.arange(10))["top5"] == 0.5


# ---------------------------------------------------------------- evaluation of labelled images


def test_evaluate_writes_report_tables_and_pictures(trained, tmp_path, call, no_layout):
    before = (trained / "best.pt").read_bytes()
    code, out, _ = call(
        evaluate, "--checkpoint", trained / "best.pt", "--out", tmp_path, "--explain"
    )
    assert code == 0 and (trained / "best.pt").read_bytes() == before
    pictures = [
        "confusion.png",
        "curves.png",
        "explanation.png",
        "mistakes.png",
        "samples.png",
    ]
    others = ["metrics.json", "predictions.csv", "report.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(pictures + others)
    assert all(imread(tmp_path / picture).std() > 0 for picture in pictures)
    report = (tmp_path / "report.txt").read_text()
    assert report in out and "no test split" not in report
    options = ("--checkpoint", trained / "best.pt", "--data", "digits", "--out")
    command = shlex.join(map(str, ("python", "export.py", *options, f"{trained}-export")))
    assert out.splitlines()[-1] == f"next: {command}"

    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    names = {"top1", "top5", "loss", "macro", "weighted", "per_class"}
    assert names <= metrics.keys()
    assert (metrics["split"], metrics["images"]) == ("test", 899)
    assert (metrics["checkpoint"], metrics["data"]) == (str(trained / "best.pt"), "digits")
    recall = sum(row["recall"] * row["support"] for row in metrics["per_class"].values()) / 899
    assert recall == pytest.approx(metrics["top1"])

    rows = read_csv(tmp_path / "predictions.csv")
    assert [int(row["image"]) for row in rows] == list(range(899))
    correct = sum(row["true"] == row["predicted"] for row in rows)
    assert correct / 899 == pytest.approx(metrics["top1"])
    for row in rows:
        first, second, third = (float(row[f"confidence{end}"]) for end in ("", "_2", "_3"))
        assert 1 >= first >= second >= third >= 0 and first + second + third <= 1.00001
        assert len({row["predicted"], row["second"], row["third"]}) == 3


def test_table_has_all_columns_and_empty_cells(tmp_path):
    rows = [{"image": 0, "true": "a, b"}, {"image": 1, "predicted": "鬱"}, {"true": 'c "d"'}]
    evaluate.write_table(tmp_path / "table.csv", rows)
    expected = ["image,true,predicted", '0,"a, b",', "1,,鬱", ',"c ""d""",', ""]
    assert (tmp_path / "table.csv").read_bytes().decode() == "\r\n".join(expected)
    assert read_csv(tmp_path / "table.csv") == [
        {"image": "0", "true": "a, b", "predicted": ""},
        {"image": "1", "true": "", "predicted": "鬱"},
        {"image": "", "true": 'c "d"', "predicted": ""},
    ]


def test_predictions_of_two_classes_have_two_names(tmp_path):
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, evaluate.UNKNOWN])
    path = tmp_path / "predictions.csv"
    evaluate.write_predictions(path, ["x.png", "y.png"], labels, logits, ["cat", "dog"])
    first, second = read_csv(path)
    assert list(first) == [
        "image",
        "true",
        "predicted",
        "confidence",
        "second",
        "confidence_2",
    ]
    assert list(first.values()) == ["x.png", "cat", "cat", "0.880797", "dog", "0.119203"]
    assert list(second.values()) == ["y.png", "", "dog", "0.731059", "cat", "0.268941"]


def test_metrics_do_not_depend_on_batch_size_or_workers(trained, photos):
    model, checkpoint = load_checkpoint(trained / "best.pt")
    for name, split, settings in (
        ("digits", "test", ((7, 0), (899, 0))),
        (photos, "train", ((2, 0), (3, 2), (50, 0))),
    ):
        counts = []
        for size, workers in settings:
            dataset = data.load_data(
                name, checkpoint["preprocessing"], batch_size=size, workers=workers
            )
            logits, labels = predict(model, dataset.batches(split))
            counts.append(confusion_matrix(labels, logits.argmax(dim=1), 10))
        assert counts[0].sum() == len(labels)
        assert all(torch.equal(counts[0], others) for others in counts)


def test_validation_images_are_used_without_a_test_split(photos, tmp_path, call, no_pictures):
    options = ("--data", photos, "--workers", 0)
    network = ("--width", 0.35, "--image-size", 32, "--epochs", 1, "--batch-size", 8)
    assert call(train, *options, *network, "--out", tmp_path / "run")[0] == 0
    checkpoint = tmp_path / "run" / "best.pt"
    out = tmp_path / "eval"
    code, text, _ = call(evaluate, *options, "--checkpoint", checkpoint, "--out", out)
    line = "no test split: these images also chose the checkpoint\n"
    assert code == 0 and line in text
    assert (out / "report.txt").read_text().endswith(line)
    rows = read_csv(tmp_path / "eval" / "predictions.csv")
    assert len(rows) == 4 and all(row["image"].endswith(".png") for row in rows)
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["split"] == "val"


def test_torchvision_weights_take_the_classes_of_the_dataset(
    photos, tmp_path, call, no_pictures
):
    options = ("--out", tmp_path / "out", "--checkpoint", tmp_path / "theirs.pth")
    for count, known in (
        (2, None),
        (3, "['class 0', 'class 1', 'class 2']"),
        (1000, "['tench', 'goldfish', "),
    ):
        theirs = torchvision.models.mobilenet_v2(num_classes=count, width_mult=0.35)
        torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
        code, out, err = call(evaluate, *options, "--data", photos)
        if known is None:
            assert (code, err) == (0, "") and "  dark  " in out
            assert out.endswith("theirs.pth-export\n")
        else:
            assert code == 2 and known in err
    # The last weights have the classes of ImageNet.
    assert call(evaluate, *options, "--images", photos)[0] == 0
    names = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2.meta["categories"]
    rows = read_csv(tmp_path / "out" / "images.csv")
    assert {row["predicted"] for row in rows} <= set(names)


def test_checkpoint_with_other_classes_is_refused(trained, tmp_path, call):
    code, _, err = call(
        evaluate, "--checkpoint", trained / "best.pt", "--data", "glyphs", "--out", tmp_path
    )
    assert code == 2 and len(err.splitlines()) == 1
    found = "best.pt' has 10 classes (['0', '1', '2']...), 'glyphs' 37 (['A', 'B', 'C']...)"
    assert f"{found}: use other --data" in err


@pytest.mark.parametrize("kind", ("missing", "truncated", "other", "torchvision"))
def test_bad_checkpoint_ends_in_one_line(kind, trained, tmp_path, call):
    path = tmp_path / "bad.pt"
    if kind == "truncated":
        path.write_bytes((trained / "best.pt").read_bytes()[:10_000])
    elif kind == "other":
        torch.save({"epoch": 3}, path)
    elif kind == "torchvision":
        torch.save({"features.0.0.weight": torch.zeros(1)}, path)
    code, _, err = call(evaluate, "--checkpoint", path, "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and f"cannot load '{path}'" in err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- pictures


@pytest.fixture
def drawn(monkeypatch):
    """The list of the figures that are drawn, which are still written."""
    figures = []
    save = evaluate.Figure.savefig

    def savefig(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(evaluate.Figure, "savefig", savefig)
    return figures


def test_confusion_picture_has_counts_and_names(tmp_path, drawn):
    evaluate.plot_confusion(
        torch.tensor([[5, 1], [0, 3]]), ["cat", "dog"], tmp_path / "confusion.png"
    )
    axes = drawn[0].axes[0]
    texts = {(text.get_position(), text.get_text()) for text in axes.texts}
    # Positions are (column, row), and 0 has no number.
    assert texts == {((0, 0), "5"), ((1, 0), "1"), ((1, 1), "3")}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert (axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) == (
        "8 of 9 correct",
        "true",
        "predicted",
    )


@pytest.mark.parametrize(
    "count, cells", ((2, 2), (10, 10), (37, 37), (50, 50), (51, 0), (1000, 0))
)
def test_confusion_picture_has_text_only_where_it_fits(count, cells, tmp_path, drawn):
    names = [f"class {index}" for index in range(count)]
    evaluate.plot_confusion(
        11 * torch.eye(count, dtype=torch.long), names, tmp_path / "confusion.png"
    )
    axes = drawn[0].axes[0]
    assert len(axes.texts) == cells
    assert (axes.get_yticklabels()[0].get_text() == "class 0") == (cells > 0)
    cell = axes.get_window_extent().width / count
    for texts, side in (
        (axes.texts, "width"),
        (axes.texts, "height"),
        (axes.get_yticklabels()[:cells], "height"),
    ):
        for text in texts[:3]:
            assert getattr(text.get_window_extent(), side) <= 1.15 * cell


def test_predictions_are_green_if_correct_and_red_if_incorrect(tmp_path, drawn):
    dataset = data.load_data("digits")
    path = tmp_path / "samples.png"
    labels = dataset.splits["val"][1]
    logits = torch.nn.functional.one_hot(labels, 10).float() * 9
    logits[::2] = logits[::2].roll(1, dims=1)  # every second image gets the next digit
    indices = torch.tensor([3, 4, 8, 9, 10, 20, 21, 30, 31, 41])
    evaluate.plot_predictions(path, "a title", dataset, "val", logits, indices)
    titles = [axes.title for axes in drawn[0].axes if axes.get_title()]
    assert len(titles) == 10 and drawn[0].get_suptitle() == "a title" and path.exists()
    for title, index in zip(titles, indices.tolist(), strict=True):
        label = labels[index].item()
        if index % 2:
            expected = (f"\n{label} · 100%", evaluate.GREEN)
        else:
            expected = (f"{label} →\n{(label + 1) % 10} · 100%", evaluate.RED)
        assert (title.get_text(), title.get_color()) == expected

    evaluate.plot_predictions(path, "a title", dataset, "val", logits, indices[:0])
    assert len(drawn) == 1 and not path.exists()  # the picture of an earlier run is deleted


def test_history_picture_marks_the_second_stage(tmp_path, drawn):
    scores = {f"{split}_{key}": 0.5 for split in ("train", "val") for key in ("loss", "top1")}
    stages = enumerate(("classifier", "classifier", "blocks"), start=1)
    history = [{"stage": stage, "epoch": epoch, **scores} for epoch, stage in stages]
    evaluate.plot_history(history, tmp_path / "curves.png")
    for axes in drawn[0].axes:
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in dashed] == [2.5]


def test_history_picture_has_one_panel_per_validation_score(tmp_path, drawn):
    """val_top5 has no training score. A new metric gets its name as title."""
    row = {"stage": "scratch", "train_loss": 1.5, "train_top1": 0.5}
    row.update({"val_loss": 1.0, "val_top1": 0.6, "val_top5": 0.9, "val_new": 0.7})
    history = [{**row, "epoch": epoch, "learning_rate": 0.1} for epoch in (1, 2)]
    evaluate.plot_history(history, tmp_path / "curves.png")
    panels = {
        axes.get_title(): {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        for axes in drawn[0].axes
    }
    assert panels == {
        "loss": {"training": [1.5, 1.5], "validation": [1.0, 1.0]},
        "accuracy (top 1)": {"training": [0.5, 0.5], "validation": [0.6, 0.6]},
        "accuracy (top 5)": {"validation": [0.9, 0.9]},
        "new": {"validation": [0.7, 0.7]},
    }


def test_history_of_an_earlier_version_is_drawn(tmp_path, drawn):
    """It has no val_top5 in its first rows."""
    row = {"stage": "scratch", "train_loss": 1.5, "val_loss": 1.0}
    history = [{**row, "epoch": 1}, {**row, "epoch": 2, "val_top5": 0.9}]
    evaluate.plot_history(history, tmp_path / "curves.png")
    (line,) = drawn[0].axes[1].lines
    assert list(line.get_xdata()) == [2]


def test_class_activation_maps_average_to_the_logits():
    model = MobileNetV2(5, 0.35, output_stride=16)
    images = torch.randn(3, 3, 64, 64)
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.classifier.bias)
    for _ in range(20):
        model(images)  # with the initial statistics of BatchNorm all features would be near 0
    classes = torch.tensor([4, 0, 2])
    maps = class_activation_map(model.eval(), images, classes)
    with torch.no_grad():
        logits = model(images)[torch.arange(3), classes] - model.classifier.bias[classes]
    assert maps.shape == (3, 4, 4) and logits.abs().min() > 0.1
    torch.testing.assert_close(maps.mean(dim=(1, 2)), logits, rtol=1e-4, atol=1e-4)


def test_overlay_puts_each_cell_at_its_pixel():
    maps = torch.full((1, 4, 4), -1.0)
    maps[0, 1, 2] = 3.0
    heat = evaluate.overlay(maps, torch.zeros(1, 3, 64, 64), stride=16)
    assert heat.shape == (1, 3, 64, 64) and heat.min() >= 0 and heat.max() <= 1
    assert divmod(heat[0].sum(dim=0).argmax().item(), 64) == (16, 32)


def test_centre_of_a_cell_is_a_multiple_of_the_stride():
    """`overlay` relies on it. The gradient shows which pixels an inner cell depends on."""
    model = MobileNetV2(5, 0.35, output_stride=8).double().eval()
    images = torch.rand(1, 3, 161, 161, dtype=torch.double, requires_grad=True)
    # The first 14 blocks have all strides of 2; the others have stride 1.
    features = model.blocks[:14](model.stem(images))
    features[0, :, 10, 10].sum().backward()
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert (rows.min() + rows.max()).item() / 2 == 8 * 10


# ------------------------------------------------------------------------ images without labels


def predict_files(model, preprocessing, paths):
    """Return the logits of image files, as --images computes them."""
    split = (numpy.array(paths), torch.full((len(paths),), evaluate.UNKNOWN))
    dataset = data.Data([], preprocessing, {"test": split}, kind="photos")
    return predict(model, dataset.batches("test"))[0]


def test_images_without_labels_are_classified_and_explained(
    trained, photos, tmp_path, call, no_layout
):
    (photos / "damaged.jpg").write_bytes(b"not an image")
    options = ("--checkpoint", trained / "best.pt", "--out", tmp_path / "out", "--images")
    code, out, err = call(evaluate, *options, photos, photos / "light" / "3.png", "--explain")
    assert code == 0 and len(err.splitlines()) == 1
    assert err.startswith("unreadable photo 1, left out: ") and "damaged.jpg" in err
    written = {"images.csv", "images.png", "images-explanation.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    assert out.startswith(f"{trained / 'best.pt'}: 10 classes, from 0 to 9")
    rows = read_csv(tmp_path / "out" / "images.csv")
    paths = [*sorted(photos.rglob("*.png")), photos / "light" / "3.png"]
    assert [row["image"] for row in rows] == list(map(str, paths))
    assert {row["true"] for row in rows} == {""}
    model, checkpoint = load_checkpoint(trained / "best.pt")
    logits = predict_files(model, checkpoint["preprocessing"], paths)
    best = logits.softmax(dim=1).topk(3, dim=1)
    lines = out.splitlines()[1:]
    for row, line, guesses, confidences in zip(rows, lines, best.indices, best.values):
        names = [str(guess.item()) for guess in guesses]
        assert [row["predicted"], row["second"], row["third"]] == names
        assert float(row["confidence_2"]) == pytest.approx(confidences[1].item(), abs=1e-5)
        first = f"{row['predicted']} {float(row['confidence']):.1%}"
        assert line.startswith(f"{row['image']}: {first}, ")
    for picture in ("images.png", "images-explanation.png"):
        assert imread(tmp_path / "out" / picture).std() > 0


@pytest.mark.parametrize("size", (None, 64))
def test_image_size_of_images_without_labels(
    size, trained, photos, tmp_path, call, monkeypatch
):
    sizes = set()

    def spy(model, batches):
        batches = list(batches)
        sizes.update(images.shape[-2:] for images, _ in batches)
        return predict(model, batches)

    monkeypatch.setattr(evaluate, "predict", spy)
    monkeypatch.setattr(data, "plot_grid", lambda *_, **__: None)
    options = ["--checkpoint", trained / "best.pt", "--out", tmp_path / "out"]
    if size is not None:
        options += ["--image-size", size]
    assert call(evaluate, *options, "--images", photos)[0] == 0
    side = size or 16  # the checkpoint's
    assert sizes == {(side, side)}


@pytest.mark.parametrize(
    "kind, message",
    (("missing", "No such file"), ("text", "cannot read"), ("folder", "no images found")),
)
def test_unreadable_images_end_in_one_line(kind, message, trained, tmp_path, call):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not an image")
    options = ("--checkpoint", trained / "best.pt", "--out", tmp_path)
    code, _, err = call(evaluate, *options, "--images", tmp_path / kind)
    assert code == 2 and len(err.splitlines()) == 1 and message in err
    assert kind == "folder" or str(tmp_path / kind) in err


def test_image_in_a_file_has_the_same_logits_as_in_memory(trained, tmp_path):
    model, checkpoint = load_checkpoint(trained / "best.pt")
    dataset = data.load_data("digits", checkpoint["preprocessing"])
    paths = [tmp_path / f"{index}.png" for index in range(20)]
    for path, image in zip(paths, dataset.splits["test"][0]):
        to_pil_image(image).save(path)
    expected = predict(model, dataset.batches("test", indices=torch.arange(20)))[0]
    torch.testing.assert_close(
        predict_files(model, checkpoint["preprocessing"], paths), expected
    )
