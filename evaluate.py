"""Evaluate a checkpoint: metrics written by hand, a report, and pictures.

    python evaluate.py                                      # runs/finetune/best.pt on the digits
    python evaluate.py --checkpoint imagenet --images photo.jpg folder --explain   # no labels

Only evaluate.py and export.py use the test split; validation is for all choices. Terms used here:

    confusion matrix       counts of images per true class (row) and predicted class (column)
    confidence             probability of the predicted class: softmax of the logits
    class activation map   contribution of each place in the image to the logit of a class
"""

import csv
import io
import json
import unicodedata
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


@torch.inference_mode()
def predict(model, batches):
    """Return the logits (N, C) and labels (N,) of all batches, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    pairs = [(model(images.to(device)).cpu(), labels.cpu()) for images, labels in batches]
    logits, labels = zip(*pairs)
    return torch.cat(logits), torch.cat(labels)


def score(logits, labels):
    """Return {"loss", "top1", "top5"} of logits (N, C) and labels (N,): cross-entropy, accuracies.

    top5: the true class is among the five most probable; left out below six classes.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, 5)
    hits = (best == labels[:, None]).double()
    loss = functional.cross_entropy(logits, labels).item()
    scores = {"loss": loss, "top1": hits[:, 0].mean().item()}
    return scores | ({"top5": hits.sum(dim=1).mean().item()} if logits.shape[1] > 5 else {})


def confusion_matrix(labels, predictions, num_classes):
    """Count pairs of true and predicted class: (N,), (N,) -> (C, C) int64, one row per true class.

    Each pair is a different number, true · C + predicted, and bincount counts all numbers at once.
    """
    pairs = labels * num_classes + predictions
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification_report(confusion):
    """Compute precision, recall and F1 per class, and their averages, from a matrix (C, C).

        precision = true positives / all predictions of this class     (column)
        recall    = true positives / all images of this class          (row)
        F1        = 2 · precision · recall / (precision + recall) = 2 · correct / (row + column)

    A division by zero, such as the precision of a class that was never predicted, gives 0.
    Returns {"macro": {...}, "weighted": {...}, "per_class": [{precision, recall, f1, support}]}:
    means over the classes, the second weighted by support, the number of images of a class.
    """
    confusion = confusion.double()
    correct, actual, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    measures = {
        "precision": correct / predicted.clamp(min=1),
        "recall": correct / actual.clamp(min=1),
        "f1": 2 * correct / (actual + predicted).clamp(min=1),
    }  # (C,) each
    weights = actual / actual.sum().clamp(min=1)
    columns = [values.tolist() for values in measures.values()] + [actual.long().tolist()]
    return {
        "macro": {name: values.mean().item() for name, values in measures.items()},
        "weighted": {name: (values * weights).sum().item() for name, values in measures.items()},
        "per_class": [dict(zip((*measures, "support"), row)) for row in zip(*columns)],
    }


def format_report(report, scores, classes):
    """Format the report as a table with one line per class, like scikit-learn's."""

    def columns(name):  # in a terminal, where a Chinese character takes two
        return len(name) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in name)

    width = max(map(columns, (*classes, "weighted avg")))
    support = {"support": sum(row["support"] for row in report["per_class"])}
    averages = {f"{name} avg": report[name] | support for name in ("macro", "weighted")}
    lines = [f"{'':{width}}  precision  recall  f1-score  support", ""]
    for name, row in [*zip(classes, report["per_class"]), *averages.items()]:
        if name == "macro avg":
            lines += ["", f"{'accuracy':>{width}}{scores['top1']:29.4f}  {row['support']:7d}"]
        text = "{precision:9.4f}  {recall:6.4f}  {f1:8.4f}  {support:7d}".format(**row)
        lines.append(f"{' ' * (width - columns(name))}{name}  {text}")
    return "\n".join([*lines, "", "  ".join(f"{name} {scores[name]:.4f}" for name in scores)])


# ---------------------------------------------------------------------------------------- pictures
GREEN, RED = "#1a7f37", "#cf222e"
UNKNOWN = -1  # the label of an image that has none
EXPLANATION = "bright: evidence for the predicted class"


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
        style, names = {"fontsize": min(10, 300 / len(classes))}, [name[:16] for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, **style)
        axes.set_yticks(range(len(classes)), names, **style)
        for row, column in confusion.nonzero().tolist():
            style["color"] = "white" if shares[row, column] > 0.3 else "black"
            count = confusion[row, column].item()
            axes.text(column, row, count, ha="center", va="center", **style)
    figure.savefig(path, dpi=120)


def class_activation_map(model, images, classes):
    """Compute where the network sees a class: (N, 3, S, S), (N,) -> (N, h, w), parts of the logit.

    With the head's feature maps m (N, 1280, h, w), and weights V and bias b of the classifier, the
    logit of class c is

        V_c · mean(m) + b_c  =  mean(V_c · m) + b_c        (means over the h × w places)

    so V_c · m at one place is its part of the logit (Zhou et al., arXiv:1512.04150, equation 2).
    """
    with torch.no_grad():
        maps = model.head(model.blocks(model.stem(images)))
        return torch.einsum("nchw,nc->nhw", maps, model.classifier.weight[classes])


def overlay(maps, images, stride):
    """Draw the positive part of activation maps (N, h, w) over images (N, 3, S, S) in 0..1.

    A convolution with stride 2 centres output i on input 2 · i: cell i belongs to pixel i · stride.
    """
    maps = maps.clamp(min=0) / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    covered = 1 + stride * (maps.shape[-1] - 1)  # from the centre of the first cell to the last
    maps = functional.interpolate(maps[:, None], covered, mode="bilinear", align_corners=True)
    maps = functional.pad(maps, [0, images.shape[-1] - covered] * 2, mode="replicate")[:, 0]
    heat = torch.from_numpy(colormaps["inferno"](maps.numpy())[..., :3]).movedim(3, 1)
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
    names, colours, (files, labels) = [], [], dataset.splits[split]
    for index, prediction, confidence in zip(indices, predictions, confidences):
        above, colour = f"{dataset.classes[labels[index]]} →", RED
        if labels[index] == UNKNOWN:
            above, colour = Path(files[index]).name, "black"
        elif labels[index] == prediction:
            above, colour = "", GREEN
        names.append(f"{above}\n{dataset.classes[prediction]} · {confidence:.0%}")
        colours.append(colour)
    if explain is not None:
        device = next(explain.parameters()).device
        maps = class_activation_map(explain, images.to(device), predictions.to(device)).cpu()
        heat = overlay(maps, pictures, explain.arch["output_stride"])
        pictures = torch.stack([pictures, heat], dim=1).flatten(0, 1)  # image, heat, image, ...
        names = [text for name in names for text in (name, "")]
        colours = [colour for colour in colours for _ in range(2)]
    data.plot_grid(path, title, pictures, names, colours)


def plot_history(history, path, title=""):
    """Draw loss and accuracy per epoch, with a dashed line where a stage begins."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(title)
    epochs = [row["epoch"] for row in history]
    # Training often looks worse: it has dropout, augmentation and label smoothing.
    curves = (("train_", "#8c959f", "training"), ("val_", "#0969da", "validation"))
    for axes, key in zip(figure.subplots(1, 2), ("loss", "top1")):
        for prefix, colour, label in curves:
            axes.plot(epochs, [r[prefix + key] for r in history], ".-", color=colour, label=label)
        for before, row in zip(history, history[1:]):
            if row["stage"] != before["stage"]:
                style = {"color": "black", "ls": "--", "lw": 1, "label": f"stage: {row['stage']}"}
                axes.axvline(row["epoch"] - 0.5, **style)
        axes.set(xlabel="epoch", title="loss" if key == "loss" else "accuracy (top 1)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------- the script
def write_table(path, rows):
    """Write rows as a CSV file; the first row has the column names."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_file(path, text.getvalue().encode())


def write_predictions(path, names, labels, logits, classes):
    """Write the name, true class and three most probable classes of each image. Returns rows."""
    confidences, predictions = logits.softmax(dim=1).topk(min(3, len(classes)), dim=1)
    header = ["predicted", "confidence", "second", "confidence_2", "third", "confidence_3"]
    rows = [["image", "true", *header[: 2 * predictions.shape[1]]]]
    for name, label, *best in zip(names, labels, predictions.tolist(), confidences.tolist()):
        cells = [cell for index, p in zip(*best) for cell in (classes[index], f"{p:.6f}")]
        rows.append([name, "" if label == UNKNOWN else classes[label], *cells])
    write_table(path, rows)
    return rows[1:]


def load_test(args):
    """Load the network of --checkpoint, and the dataset of --data as the network expects it.

    Returns (model, checkpoint, dataset, "test" or "val"). Raises DataError if the classes differ.
    """
    model, checkpoint = load_checkpoint(args.checkpoint)
    dataset = data.load_for(args, checkpoint["preprocessing"])
    known, found = checkpoint["classes"], dataset.classes  # no known names: compare the numbers
    if known != found and (known or len(found) != checkpoint["arch"]["num_classes"]):
        known = class_names(checkpoint)
        problem = f"'{args.checkpoint}' has {len(known)} classes ({known[:3]}...)"
        problem += f", '{args.data}' {len(found)} ({found[:3]}...)"
        raise data.DataError(f"{problem}: use other --data, or fine-tune the network on these")
    split = "test" if "test" in dataset.splits else "val"
    return model.to(args.device, memory_format=data.MEMORY_FORMAT), checkpoint, dataset, split


def class_names(checkpoint):
    """List the class names; a file of torchvision's weights has none: ImageNet's, or numbers."""
    names, count = checkpoint["classes"], checkpoint["arch"]["num_classes"]
    if not names and count == 1000:
        names = MobileNet_V2_Weights.IMAGENET1K_V2.meta["categories"]
    return names or [f"class {index}" for index in range(count)]


def evaluate(args):
    """Score a checkpoint on labelled images, and write the report and the pictures."""
    model, checkpoint, dataset, split = load_test(args)
    logits, labels = predict(model, dataset.batches(split))
    predictions, classes, out = logits.argmax(dim=1), dataset.classes, args.out
    scores, confusion = score(logits, labels), confusion_matrix(labels, predictions, len(classes))
    report = classification_report(confusion)
    text = f"{args.checkpoint} on {len(labels)} images of {args.data} ({split})\n\n"
    text += format_report(report, scores, classes)
    text += "\nno test split: these images also chose the checkpoint" if split == "val" else ""
    print(text)
    write_file(out / "report.txt", f"{text}\n".encode())
    metrics = {"checkpoint": args.checkpoint, "data": args.data, "split": split} | scores | report
    metrics |= {"images": len(labels), "per_class": dict(zip(classes, report["per_class"]))}
    write_file(out / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False).encode())
    images = dataset.splits[split][0]
    names = range(len(images)) if isinstance(images, torch.Tensor) else images
    write_predictions(out / "predictions.csv", names, labels, logits, classes)
    plot_confusion(confusion, classes, out / "confusion.png")
    if checkpoint["history"]:
        plot_history(checkpoint["history"], out / "curves.png", "up to the chosen epoch")
    some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))[:32]
    correct = predictions == labels
    confidences = logits.softmax(dim=1).amax(dim=1).masked_fill(correct, -1)
    mistakes = confidences.argsort(descending=True)[: (~correct).sum()]
    source, title = (dataset, split, logits), "green: correct · red: true class → predicted class"
    plot_predictions(out / "samples.png", title, *source, some.sort().values)
    plot_predictions(out / "mistakes.png", "most confident mistakes", *source, mistakes[:32])
    chosen = torch.cat([mistakes[:8], some[correct[some]][:8]]) if args.explain else ()
    plot_predictions(out / "explanation.png", EXPLANATION, *source, chosen, model)


def classify(args):
    """Predict the classes of --images, which have no labels."""
    model, checkpoint = load_checkpoint(args.checkpoint)
    folders = [data.find_images(path) if path.is_dir() else [path] for path in args.images]
    paths = numpy.array([path for folder in folders for path in folder])
    if len(paths) == 0:
        raise data.DataError("--images: no images found; name files, or folders of images")
    classes, splits = class_names(checkpoint), {"test": (paths, torch.full((len(paths),), UNKNOWN))}
    options = {"batch_size": args.batch_size, "workers": args.workers}
    dataset = data.Data(classes, data.PHOTOS | checkpoint["preprocessing"], splits, **options)
    model.to(args.device, memory_format=data.MEMORY_FORMAT)
    logits, labels = predict(model, dataset.batches("test"))
    rows = write_predictions(args.out / "images.csv", paths, labels, logits, classes)
    print(f"{args.checkpoint}: {len(classes)} classes, from {classes[0]} to {classes[-1]}")
    for path, _, *best in rows:
        best = [f"{name} {float(p):.1%}" for name, p in zip(best[::2], best[1::2])]
        print(f"{path}: {', '.join(best)}")
    source, first = (dataset, "test", logits), torch.arange(len(paths))[:32]
    plot_predictions(args.out / "images.png", "predicted class · confidence", *source, first)
    shown = first[:16] if args.explain else ()  # none: only removes an older picture
    plot_predictions(args.out / "images-explanation.png", EXPLANATION, *source, shown, model)


def main():
    defaults = {"data": "digits", "out": Path("runs/evaluate"), "batch_size": 256}
    defaults |= {"checkpoint": "runs/finetune/best.pt", "images": None, "explain": False}
    args = data.parse_arguments("Evaluate a checkpoint.", defaults)
    (classify if args.images else evaluate)(args)
    print(f"\nwrote the results to {args.out}")
    if not args.images:
        out = f"{args.checkpoint.removesuffix('/best.pt')}-export"
        options = f'--checkpoint "{args.checkpoint}" --data "{args.data}" --out "{out}"'
        print(f"next: python export.py {options}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
