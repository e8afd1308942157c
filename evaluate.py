"""How good is it? Metrics by hand, a report, and pictures.

    python evaluate.py                                                      # runs/finetune/best.pt on the digits' test split
    python evaluate.py --checkpoint runs/train/best.pt --data glyphs

Everything follows from two tensors, the logits (N, C) and the labels (N,): `confusion_matrix` counts, `classification_report`
divides. The test split is used here, once, at the end; whatever was chosen was chosen on validation.
"""

import csv
import io
import json
import shlex
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn import functional

import data
from mobilenetv2 import CheckpointError, load_checkpoint, write_file

# ------------------------------------------------------------------------------------------------- the metrics


def predict(model, split):
    """Logits (N, C) and labels (N,) of a whole split, on the CPU. Puts the model into eval mode.

    In the order of the split; of several processes each predicts a share, and they follow one another.
    """
    model.eval()
    with torch.inference_mode():
        pairs = [(model(images).cpu(), labels.cpu()) for images, labels in split.batches()]
    logits, labels = zip(*pairs, strict=True)
    return data.gather(torch.cat(logits)), data.gather(torch.cat(labels))


def score(logits, labels):
    """Cross entropy and the fractions of images whose true class is the first, or among the first five, guesses.

    Shapes (N, C), (N,). Top-5 of five classes is always right and says nothing, so it is left out there.
    """
    right = logits.argmax(dim=1) == labels  # (N,)
    scores = {"loss": functional.cross_entropy(logits, labels).item(), "top1": right.double().mean().item()}
    if logits.shape[1] > 5:
        among = logits.topk(5, dim=1).indices == labels[:, None]  # (N, 5)
        scores["top5"] = among.any(dim=1).double().mean().item()
    return scores


def confusion_matrix(labels, predictions, num_classes):
    """Count how often each class is taken for each other: (N,), (N,) -> (C, C) int64, row = true class.

    Each pair (true, predicted) is one number, true · C + predicted, and bincount counts them all at once.
    """
    pairs = labels * num_classes + predictions
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification_report(confusion):
    """Precision, recall and F1 of each class, and their averages, from a confusion matrix (C, C).

        precision = right / all that were called so          (column)
        recall    = right / all that are so                  (row)
        F1        = 2 · precision · recall / (precision + recall) = 2 · right / (row + column)

    What divides by nothing, such as the precision of a class that was never predicted, is 0.
    Returns {"per_class": [{precision, recall, f1, support}, ...], "macro": {...}, "weighted": {...}}: macro is the plain mean
    over the classes, weighted the mean by their number of images (support).
    """
    confusion = confusion.double()
    right, actual, called = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)  # (C,) each
    measures = {
        "precision": right / called.clamp(min=1),
        "recall": right / actual.clamp(min=1),
        "f1": 2 * right / (actual + called).clamp(min=1),
    }
    share = actual / actual.sum().clamp(min=1)
    rows = zip(*(values.tolist() for values in measures.values()), actual.long().tolist(), strict=True)
    return {
        "per_class": [dict(zip((*measures, "support"), row, strict=True)) for row in rows],
        "macro": {name: values.mean().item() for name, values in measures.items()},
        "weighted": {name: (values * share).sum().item() for name, values in measures.items()},
    }


def format_report(report, scores, classes):
    """The report as aligned text, a line a class."""
    width = max(len(name) for name in (*classes, "weighted"))
    lines = [f"{'':{width}}  precision  recall      f1  support"]
    total = sum(row["support"] for row in report["per_class"])
    averages = [(name, report[name] | {"support": total}) for name in ("macro", "weighted")]
    for name, row in [*zip(classes, report["per_class"], strict=True), *averages]:
        precision, recall, f1, support = row.values()
        lines.append(f"{name:>{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7d}")
    lines += ["", "  ".join(f"{name} {value:.4f}" for name, value in scores.items())]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the pictures

RIGHT, WRONG = "#1a7f37", "#cf222e"


def plot_confusion(confusion, classes, path):
    """The matrix, each row divided by its sum, with the counts written into the cells where they fit."""
    side = min(max(5.5, 0.45 * len(classes)), 16)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    title = f"{int(confusion.diagonal().sum())} of {int(confusion.sum())} right"
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= 50:
        names = [data.shorten(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(classes)), names)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_samples(split, logits, classes, path, count=32):
    """A grid of random images, the same ones every time: true class, in red what it was taken for, and the confidence."""
    indices = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count].sort().values
    images = torch.cat([batch for batch, _ in split.subset(indices).batches()])
    confidences, predictions = logits[indices].softmax(dim=1).max(dim=1)
    names, colours = [], []
    for label, guess, confidence in zip(split.labels[indices], predictions, confidences, strict=True):
        name = data.shorten(classes[label])
        if label != guess:
            name = f"{data.shorten(classes[label], 9)} → {data.shorten(classes[guess], 9)}"
        names.append(f"{name}\n{confidence:.0%}")
        colours.append(RIGHT if label == guess else WRONG)
    title = "green: right · red: true → predicted · confidence"
    data.plot_grid(path, title, data.to_pictures(images, split.preprocessing), names, colours)


def plot_history(history, path):
    """Loss and accuracy of a run, epoch by epoch; a dashed line where another stage begins."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    epochs = range(1, len(history) + 1)
    changes = [epoch for epoch in epochs if epoch > 1 and history[epoch - 1]["stage"] != history[epoch - 2]["stage"]]
    for axes, key, title in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "accuracy (top 1)"), strict=True):
        # Training may well look worse than validation: dropout, augmented images, and a loss with label smoothing.
        training = [row[f"train_{key}"] for row in history]
        axes.plot(epochs, training, ".-", color="#8c959f", label="training (made harder)")
        axes.plot(epochs, [row[f"val_{key}"] for row in history], ".-", color="#0969da", label="validation")
        for epoch in changes:
            axes.axvline(epoch - 0.5, color="black", ls="--", lw=1, label=f"stage: {history[epoch - 1]['stage']}")
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------------------- the script


def write_table(path, rows):
    """Write lists of values, the first one the names of the columns, as a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_file(path, text.getvalue().encode())


def write_predictions(path, split, logits, classes):
    """predictions.csv: a line an image, in the order of the split."""
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    table = [["image", "true", "predicted", "confidence"]]
    rows = zip(range(len(split)), split.labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    for index, label, guess, confidence in rows:
        table.append([split.name(index), classes[label], classes[guess], f"{confidence:.6f}"])
    write_table(path, table)


def load_for_evaluation(args, device):
    """The network of --checkpoint and the images of --data, as it was trained to see them.

    Returns (model, checkpoint, split, "test" or "val"): the test split, or where there is none the validation split.
    Raises CheckpointError or DataError, also when network and data do not have the same classes.
    """
    model, checkpoint = load_checkpoint(args.checkpoint)
    dataset = data.load_for(args, checkpoint["preprocessing"], device)
    known, there = checkpoint["classes"], dataset.classes
    if known != there:
        knows, has = (f"{len(names)} classes ({', '.join(names[:3])}, ...)" for names in (known, there))
        mend = "name the data it was trained on with --data"
        raise data.DataError(f"'{args.checkpoint}' knows {knows}, '{args.data}' has {has}: {mend}")
    model.to(device, memory_format=data.memory_format(device))
    return (model, checkpoint, dataset.test, "test") if dataset.test else (model, checkpoint, dataset.val, "val")


def main():
    parser = data.command_line("Evaluate a checkpoint on the test split.", "digits", "runs/evaluate", batch_size=256)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/finetune/best.pt"), help="network to evaluate")
    data.add_device_option(parser)
    args = parser.parse_args()
    model, checkpoint, split, split_name = load_for_evaluation(args, data.choose_device(args.device))
    classes = checkpoint["classes"]
    if split_name == "val":
        print(f"note: {args.data} has no test split; this is its validation split, on which the checkpoint was chosen")

    logits, labels = predict(model, split)
    scores = score(logits, labels)
    confusion = confusion_matrix(labels, logits.argmax(dim=1), len(classes))
    report = classification_report(confusion)
    text = f"{args.checkpoint} on {len(split)} images of {args.data} ({split_name})\n\n"
    text += format_report(report, scores, classes)
    print(text)

    metrics = {"checkpoint": str(args.checkpoint), "data": args.data, "split": split_name, "images": len(split)}
    metrics |= scores | {name: report[name] for name in ("macro", "weighted")}
    metrics["per_class"] = dict(zip(classes, report["per_class"], strict=True))
    write_file(args.out / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False).encode())
    write_file(args.out / "report.txt", (text + "\n").encode())
    write_predictions(args.out / "predictions.csv", split, logits, classes)
    data.find_fonts(classes)
    plot_confusion(confusion, classes, args.out / "confusion.png")
    plot_samples(split, logits, classes, args.out / "samples.png")
    print(f"\nwrote metrics.json, report.txt, predictions.csv, confusion.png and samples.png to {args.out}")
    print(f"next: python export.py --checkpoint {shlex.quote(str(args.checkpoint))} {data.data_options(args)}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
