"""Evaluate a checkpoint: metrics written by hand, a report, and pictures.

    python evaluate.py                           # runs/finetune/best.pt on the digits
    python evaluate.py --checkpoint imagenet --images photo.jpg folder       # no labels

Only evaluate.py and export.py use the test split; validation is for all choices. Terms used
here:

    confusion matrix       counts of images per true class (row) and predicted class (column)
    confidence             probability of the predicted class: softmax of the logits
    class activation map   contribution of each place in the image to the logit of a class
"""

import cli  # before matplotlib, because it checks the backend

# isort: split
import csv
import glob
import io
import json
import os
import shlex
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path

import numpy
import torch
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch.nn import functional
from torchvision.models import MobileNet_V2_Weights

import data
from mobilenetv2 import CheckpointError, load_checkpoint, write_file

CHECKPOINT_HELP = "checkpoint, file with torchvision's weights, or imagenet"
UNKNOWN = -1  # the label of an image that has none


@torch.inference_mode()
def predict(model, batches):
    """Return the logits (N, C) and labels (N,) of all batches, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    logits = []
    labels = []
    for images, batch_labels in batches:
        logits.append(model(images.to(device)).cpu())
        labels.append(batch_labels.cpu())
    return torch.cat(logits), torch.cat(labels)


def score(logits, labels):
    """Return {"loss", "top1", "top5"} of logits (N, C) and labels (N,).

    Add a metric here: log.csv, curves.png and metrics.json take it from this dict.
    """
    scores = {
        "loss": functional.cross_entropy(logits, labels).item(),
        "top1": top_k_accuracy(logits, labels, 1),
    }
    if logits.shape[1] > 5:
        scores["top5"] = top_k_accuracy(logits, labels, 5)
    return scores


def top_k_accuracy(logits, labels, k):
    """Return the share of images whose true class is among the k most probable ones."""
    best = logits.topk(k, dim=1).indices  # (N, k)
    hits = (best == labels[:, None]).any(dim=1)
    return hits.double().mean().item()


def confusion_matrix(labels, predictions, num_classes):
    """Count pairs of true (row) and predicted class: (N,), (N,) -> (C, C) int64.

    Each pair is a different number, true · C + predicted, and bincount counts all numbers at
    once.
    """
    pairs = labels * num_classes + predictions
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification_report(confusion):
    """Compute precision, recall and F1 per class, and their averages, from a matrix (C, C).

        precision = true positives / all predictions of this class     (column)
        recall    = true positives / all images of this class          (row)
        F1        = 2 · precision · recall / (precision + recall)
                  = 2 · correct / (row + column)

    A division by zero, such as the precision of a class that was never predicted, gives 0.
    Returns {"macro": {...}, "weighted": {...}, "per_class": [{precision, recall, f1,
    support}]}: means over the classes, the second weighted by support, the number of images of
    a class.
    """
    confusion = confusion.double()
    correct = confusion.diagonal()
    actual = confusion.sum(dim=1)
    predicted = confusion.sum(dim=0)
    measures = {
        "precision": correct / predicted.clamp(min=1),
        "recall": correct / actual.clamp(min=1),
        "f1": 2 * correct / (actual + predicted).clamp(min=1),
    }  # (C,) each
    weights = actual / actual.sum().clamp(min=1)
    per_class = []
    for index, support in enumerate(actual.long().tolist()):
        row = {name: values[index].item() for name, values in measures.items()}
        row["support"] = support
        per_class.append(row)
    return {
        "macro": {name: values.mean().item() for name, values in measures.items()},
        "weighted": {
            name: (values * weights).sum().item() for name, values in measures.items()
        },
        "per_class": per_class,
    }


def format_report(report, scores, classes):
    """Format the report as a table with one line per class, like scikit-learn's."""
    support = sum(row["support"] for row in report["per_class"])
    width = max(columns(name) for name in [*classes, "weighted avg"])

    def line(name, row):
        text = "{precision:9.4f}  {recall:6.4f}  {f1:8.4f}  {support:7d}".format(**row)
        return f"{' ' * (width - columns(name))}{name}  {text}"

    lines = [f"{'':{width}}  precision  recall  f1-score  support", ""]
    for name, row in zip(classes, report["per_class"]):
        lines.append(line(name, row))
    lines += ["", f"{'accuracy':>{width}}{scores['top1']:29.4f}  {support:7d}"]
    for name in ("macro", "weighted"):
        lines.append(line(f"{name} avg", {**report[name], "support": support}))
    lines += ["", "  ".join(f"{name} {value:.4f}" for name, value in scores.items())]
    return "\n".join(lines)


def columns(name):
    """Return the width of a name in a terminal: a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name)


# ------------------------------------------------------------------------------------ pictures
GREEN = "#1a7f37"
RED = "#cf222e"
EXPLANATION = "bright: evidence for the predicted class"
SCORE_TITLES = {"top1": "accuracy (top 1)", "top5": "accuracy (top 5)"}


@data.picture_style()
def plot_confusion(confusion, classes, path):
    """Draw the matrix: the colour is the share of the true class, the number is the count."""
    side = min(max(5.5, 0.45 * len(classes)), 16)  # inches
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    norm = PowerNorm(0.5, 0, 1)  # the square root makes single mistakes visible
    picture = axes.imshow(shares.numpy(), cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    title = f"{confusion.diagonal().sum()} of {confusion.sum()} correct"
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= 50:  # more names and numbers would be too small to read
        size = min(10, 300 / len(classes))
        names = [name[:16] for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(len(classes)), names, fontsize=size)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.3 else "black"
            style = {"ha": "center", "va": "center", "color": colour, "fontsize": size}
            axes.text(column, row, confusion[row, column].item(), **style)
    figure.savefig(path, dpi=120)


def class_activation_map(model, images, classes):
    """Compute where the network sees a class: (N, 3, S, S), (N,) -> (N, h, w).

    With the head's feature maps m (N, 1280, h, w), and weights V and bias b of the classifier,
    the logit of class c is

        V_c · mean(m) + b_c  =  mean(V_c · m) + b_c        (means over the h × w places)

    so V_c · m at one place is its part of the logit (Zhou et al., arXiv:1512.04150, equation
    2).
    """
    with torch.no_grad():
        maps = model.head(model.blocks(model.stem(images)))
        return torch.einsum("nchw,nc->nhw", maps, model.classifier.weight[classes])


def overlay(maps, images, stride):
    """Draw the positive part of activation maps (N, h, w) over images (N, 3, S, S) in 0..1.

    A convolution with stride 2 reads around the pixels 0, 2, 4, ..., so place i of a feature
    map belongs to pixel i · stride of the image.
    """
    strongest = maps.amax(dim=(1, 2), keepdim=True)
    maps = maps.clamp(min=0) / strongest.clamp(min=1e-6)
    covered = 1 + stride * (maps.shape[-1] - 1)  # from the first of these pixels to the last
    maps = functional.interpolate(maps[:, None], covered, mode="bilinear", align_corners=True)
    missing = images.shape[-1] - covered
    maps = functional.pad(maps, (0, missing, 0, missing), mode="replicate")[:, 0]
    colours = colormaps["inferno"](maps.numpy())  # (N, S, S, 4): red, green, blue, opacity
    heat = torch.from_numpy(colours[..., :3]).movedim(3, 1)
    return 0.4 * images.mean(dim=1, keepdim=True) + 0.6 * heat  # on grayscale images


def plot_predictions(path, title, dataset, split, logits, indices, explain=None):
    """Draw images with predicted class and confidence: green is correct, red is incorrect.

    Red text begins with the true class; an image without a label has its file's name in black.
    explain: a model; its class activation map is drawn beside each image.
    """
    path.unlink(missing_ok=True)  # an older picture would show other predictions
    if len(indices) == 0:
        return
    images = torch.cat([images for images, _ in dataset.batches(split, indices=indices)])
    pictures = data.to_pixels(images, dataset.preprocessing)
    confidences, predictions = logits[indices].softmax(dim=1).max(dim=1)
    files, labels = dataset.splits[split]
    names = []
    colours = []
    for index, prediction, confidence in zip(indices, predictions, confidences):
        if labels[index] == UNKNOWN:
            above = data.printable(Path(files[index]).name)
            colour = "black"
        elif labels[index] == prediction:
            above = ""
            colour = GREEN
        else:
            above = f"{dataset.classes[labels[index]]} →"
            colour = RED
        names.append(f"{above}\n{dataset.classes[prediction]} · {confidence:.0%}")
        colours.append(colour)
    if explain is not None:
        device = next(explain.parameters()).device
        maps = class_activation_map(explain, images.to(device), predictions.to(device)).cpu()
        heat = overlay(maps, pictures, explain.arch["output_stride"])
        # In the order image, heat, image, heat, ...
        pictures = torch.stack([pictures, heat], dim=1).flatten(0, 1)
        names = [text for name in names for text in (name, "")]
        colours = [colour for colour in colours for _ in range(2)]
    data.plot_grid(path, title, pictures, names, colours)


@data.picture_style()
def plot_history(history, path, title=""):
    """Draw each score per epoch, with a dashed line where a stage begins."""
    scores = [name.removeprefix("val_") for name in history[-1] if name.startswith("val_")]
    figure = Figure(figsize=(5.5 * len(scores), 4), layout="constrained")
    figure.suptitle(title)
    # Training often looks worse: it has dropout, augmentation and label smoothing.
    curves = (("train_", "#8c959f", "training"), ("val_", "#0969da", "validation"))
    for axes, name in zip(figure.subplots(1, len(scores)), scores):
        for prefix, colour, label in curves:
            rows = [row for row in history if prefix + name in row]
            if rows:
                epochs = [row["epoch"] for row in rows]
                values = [row[prefix + name] for row in rows]
                axes.plot(epochs, values, ".-", color=colour, label=label)
        for before, row in zip(history, history[1:]):
            if row["stage"] != before["stage"]:
                label = f"stage: {row['stage']}"
                axes.axvline(row["epoch"] - 0.5, color="black", ls="--", lw=1, label=label)
        axes.set(xlabel="epoch", title=SCORE_TITLES.get(name, name))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------- the script
def write_table(path, rows):
    """Write dicts as a CSV file. A column that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path, text):
    """Write a text as UTF-8. A name of a file may have bytes that are no letters."""
    write_file(path, text.encode(errors="backslashreplace"))


def top_classes(logits, classes):
    """Return the three most probable classes of each image: lists of (name, probability)."""
    top = logits.softmax(dim=1).topk(min(3, len(classes)), dim=1)
    rows = []
    for values, indices in zip(top.values.tolist(), top.indices.tolist()):
        rows.append([(classes[index], value) for index, value in zip(indices, values)])
    return rows


def write_predictions(path, names, labels, logits, classes):
    """Write the name, true class and three most probable classes of each image."""
    rows = []
    for name, label, top in zip(names, labels, top_classes(logits, classes)):
        row = {"image": name, "true": ""}
        if label != UNKNOWN:
            row["true"] = classes[label]
        places = (("predicted", ""), ("second", "_2"), ("third", "_3"))
        for (place, ending), (predicted, value) in zip(places, top):
            row[place] = predicted
            row[f"confidence{ending}"] = f"{value:.6f}"
        rows.append(row)
    write_table(path, rows)


def load_test(args):
    """Load the network of --checkpoint, and the images of --data to score it on.

    Returns (model, checkpoint, dataset, "test" or "val"). Raises DataError if the classes
    differ.
    """
    model, checkpoint = load_checkpoint(args.checkpoint)
    known = class_names(checkpoint)
    dataset = data.load_for(
        args,
        checkpoint["preprocessing"],
        classes=checkpoint["classes"],
        training=False,
        # Only photos have a fingerprint. The training photos are no test split.
        trained_on=checkpoint.get("data", {}).get("fingerprint"),
    )
    found = dataset.classes
    if not checkpoint["classes"] and len(known) == len(found):
        known = found  # a file without class names: compare the numbers
    if known != found:
        raise data.DataError(
            f"'{args.checkpoint}' has {len(known)} classes ({known[:3]}...), "
            f"'{args.data}' {len(found)} ({found[:3]}...): "
            "use other --data, or fine-tune the network on these"
        )
    split = "test" if "test" in dataset.splits else "val"
    dataset.keep_readable(split)
    return model, checkpoint, dataset, split


def class_names(checkpoint):
    """List the class names. torchvision's files have none: use ImageNet's, or numbers."""
    count = checkpoint["arch"]["num_classes"]
    if checkpoint["classes"]:
        return checkpoint["classes"]
    if count == 1000:
        return MobileNet_V2_Weights.IMAGENET1K_V2.meta["categories"]
    return [f"class {index}" for index in range(count)]


def print_next(script, **options):
    """Print a command that can be pasted into a terminal."""
    words = ["python", script]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    print(f"next: {shlex.join(words)}")


def evaluate(args):
    """Score a checkpoint on labelled images, and write the report and the pictures."""
    model, checkpoint, dataset, split = load_test(args)
    model.to(args.device, memory_format=data.MEMORY_FORMAT)
    logits, labels = predict(model, dataset.batches(split))
    predictions = logits.argmax(dim=1)
    scores = score(logits, labels)
    confusion = confusion_matrix(labels, predictions, len(dataset.classes))
    report = classification_report(confusion)
    text = f"{args.checkpoint} on {len(labels)} images of {args.data} ({split})\n\n"
    text += format_report(report, scores, dataset.classes)
    if split == "val":
        text += "\nno test split: these images also chose the checkpoint"
    print(text)
    write_text(args.out / "report.txt", f"{text}\n")
    metrics = {
        "checkpoint": args.checkpoint,
        "data": args.data,
        "split": split,
        "images": len(labels),
        **scores,
        **report,
        "per_class": dict(zip(dataset.classes, report["per_class"])),
    }
    write_text(args.out / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False))
    images, _ = dataset.splits[split]
    names = images if dataset.kind == "photos" else range(len(images))  # paths or numbers
    write_predictions(args.out / "predictions.csv", names, labels, logits, dataset.classes)
    plot_confusion(confusion, dataset.classes, args.out / "confusion.png")
    if checkpoint["history"]:
        plot_history(checkpoint["history"], args.out / "curves.png", "up to the chosen epoch")
    torch.manual_seed(args.seed)
    some = dataset.choose(split, 32).sort().values
    confidences = logits.softmax(dim=1).amax(dim=1)
    mistakes = (predictions != labels).nonzero().flatten()
    order = confidences[mistakes].argsort(descending=True)
    mistakes = mistakes[order][:32]
    draw = partial(plot_predictions, dataset=dataset, split=split, logits=logits)
    title = "green: correct · red: true class → predicted class"
    draw(args.out / "samples.png", title, indices=some)
    draw(args.out / "mistakes.png", "most confident mistakes", indices=mistakes)
    explanation = args.out / "explanation.png"
    explanation.unlink(missing_ok=True)  # of an earlier network
    if args.explain:
        both = torch.cat([mistakes[:8], some])
        draw(explanation, EXPLANATION, indices=both[:16], explain=model)
    print(f"\nwrote the results to {args.out}")
    out = f"{args.checkpoint.removesuffix('/best.pt')}-export"
    print_next("export.py", checkpoint=args.checkpoint, data=args.data, out=out)


def find_images(arguments):
    """List the images that files, folders and patterns such as *.jpg name."""
    paths = []
    for argument in map(str, arguments):
        if os.path.isdir(argument):
            paths += data.list_images(argument, Counter())
        else:  # PowerShell does not expand patterns
            paths += sorted(glob.glob(argument)) or [argument]
    if not paths:
        raise data.DataError("--images: no images found; name files, or folders of images")
    return paths


def classify(args):
    """Predict the classes of --images, which have no labels."""
    model, checkpoint = load_checkpoint(args.checkpoint)
    paths = find_images(args.images)
    classes = class_names(checkpoint)
    preprocessing = {**data.PHOTO, **checkpoint["preprocessing"]}
    if args.image_size is not None:
        preprocessing["image_size"] = args.image_size
    labels = torch.full((len(paths),), UNKNOWN)
    paths = numpy.array(paths, dtype=object)
    dataset = data.Data(
        classes,
        preprocessing,
        {"test": (paths, labels)},
        kind="photos",
        batch_size=args.batch_size,
        workers=args.workers,
    )
    dataset.keep_readable("test")
    paths, _ = dataset.splits["test"]
    model.to(args.device, memory_format=data.MEMORY_FORMAT)
    logits, labels = predict(model, dataset.batches("test"))
    print(f"{args.checkpoint}: {len(classes)} classes, from {classes[0]} to {classes[-1]}")
    for path, top in zip(paths, top_classes(logits, classes)):
        predicted = ", ".join(f"{name} {value:.1%}" for name, value in top)
        print(f"{data.printable(path)}: {predicted}")
    write_predictions(args.out / "images.csv", paths, labels, logits, classes)
    draw = partial(plot_predictions, dataset=dataset, split="test", logits=logits)
    first = torch.arange(len(paths))[:32]
    draw(args.out / "images.png", "predicted class · confidence", indices=first)
    explanation = args.out / "images-explanation.png"
    explanation.unlink(missing_ok=True)  # of an earlier network
    if args.explain:
        draw(explanation, EXPLANATION, indices=first[:16], explain=model)
    print(f"\nwrote the results to {args.out}")


def main():
    parser = cli.make_parser(__doc__, data="digits", out="runs/evaluate", batch_size=64)
    parser.add_argument("--checkpoint", default="runs/finetune/best.pt", help=CHECKPOINT_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        help="images and folders to classify without labels (default: none)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="draw where the network sees the predicted class",
    )
    args = cli.parse(parser)
    if args.images:
        classify(args)
    else:
        evaluate(args)


if __name__ == "__main__":
    cli.run(main, CheckpointError)
