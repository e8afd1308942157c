"""How good is it? Metrics by hand, a report, and pictures.

    python evaluate.py                                                      # runs/finetune/best.pt on the digits' test split
    python evaluate.py --checkpoint runs/train/best.pt --data glyphs
    python evaluate.py --checkpoint imagenet --images photo.jpg folder --explain       # what is on them, and where

`confusion_matrix` counts, `classification_report` divides. The test split is used here only; choices were made on validation.
"""

import csv
import io
import json
import shlex
import unicodedata
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch.nn import functional
from torchvision.models import MobileNet_V2_Weights

import data
from mobilenetv2 import CheckpointError, load_pretrained, read_pretrained, write_file

# ------------------------------------------------------------------------------------------------- the metrics


def predict(model, split):
    """Logits (N, C) and labels (N,) of a whole split, on the CPU. Moves the model to the split's device, in eval mode.

    In the order of the split; of several processes each predicts a share, and they follow one another.
    """
    model.eval().to(split.device, memory_format=data.memory_format(split.device))
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
    Returns {"macro": {...}, "weighted": {...}, "per_class": [{precision, recall, f1, support}, ...]}: macro is the plain mean
    over the classes, weighted the mean by their number of images (support).
    """
    confusion = confusion.double().numpy()
    right, actual, called = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)  # (C,) each
    measures = {
        "precision": right / called.clip(min=1),
        "recall": right / actual.clip(min=1),
        "f1": 2 * right / (actual + called).clip(min=1),
    }
    rows = zip(*(values.tolist() for values in measures.values()), actual.astype(int).tolist(), strict=True)
    images = max(actual.sum(), 1)
    return {
        "macro": {name: float(values.mean()) for name, values in measures.items()},
        "weighted": {name: float((values * actual).sum() / images) for name, values in measures.items()},
        "per_class": [dict(zip((*measures, "support"), row, strict=True)) for row in rows],
    }


def find_notes(confusion, classes):
    """What a reader of the report should know, as lines: values that are 0 by definition, and what is confused most."""
    notes = []
    for dim, text in ((0, "never predicted, so their precision is 0"), (1, "without images, so their recall is 0")):
        names = [classes[index] for index in (confusion.sum(dim=dim) == 0).nonzero().flatten()]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        notes += [f"classes {text}: {', '.join(names[:10])}{more}"] if names else []
    wrong = confusion.clone().fill_diagonal_(0)
    most = sorted(wrong.nonzero().tolist(), key=lambda cell: -wrong[tuple(cell)])[:3]
    pairs = [f"{classes[true]} → {classes[guess]} ({wrong[true, guess]}×)" for true, guess in most]
    return notes + ([f"most often confused: {', '.join(pairs)}"] if pairs else [])


def measure_text(name):
    """Columns in a terminal, where a Chinese character is as wide as two Latin ones."""
    return len(name) + sum(unicodedata.east_asian_width(character) in "WF" for character in name)


def format_report(report, scores, classes):
    """The report as aligned text, a line a class, in scikit-learn's form."""
    width = max(map(measure_text, (*classes, "weighted avg")))
    lines = [f"{'':{width}}  precision  recall  f1-score  support", ""]
    total = sum(row["support"] for row in report["per_class"])
    averages = [(f"{name} avg", report[name] | {"support": total}) for name in ("macro", "weighted")]
    for name, row in [*zip(classes, report["per_class"], strict=True), *averages]:
        if name == "macro avg":
            lines += ["", f"{'accuracy':>{width}}  {'':9}  {'':6}  {scores['top1']:8.4f}  {total:7d}"]
        precision, recall, f1, support = row.values()
        space = " " * (width - measure_text(name))
        lines.append(f"{space}{name}  {precision:9.4f}  {recall:6.4f}  {f1:8.4f}  {support:7d}")
    lines += ["", "  ".join(f"{name} {value:.4f}" for name, value in scores.items())]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the pictures

RIGHT, WRONG = "#1a7f37", "#cf222e"
UNKNOWN = -1  # the label of an image that has none
EXPLANATION = "bright: where the network saw the class that it predicts"


def plot_confusion(confusion, classes, path):
    """The matrix, each row divided by its sum; in the cells, where they fit, the counts, and these shares below them."""
    side = min(max(5.5, 0.45 * len(classes)), 16)  # inches
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    # The square root lets single mistakes be seen; among 1,000 classes a cell is a pixel or two.
    picture = axes.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(picture, label="share of the true class", shrink=0.8, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    axes.set(xlabel="predicted", ylabel="true", title=f"{confusion.diagonal().sum()} of {confusion.sum()} right")
    cell = 0.8 * 72 * side / len(classes)  # points
    if cell >= 8:
        names, size = [data.shorten(name) for name in classes], min(10, cell)
        rotation = 90 if size * max(map(len, names)) > cell else 0  # no letter is wider than it is high
        axes.set_xticks(range(len(classes)), names, rotation=rotation, fontsize=size)
        axes.set_yticks(range(len(classes)), names, fontsize=size)
    size = min(10, cell / (0.65 * max(len(str(int(confusion.max()))), 2)))  # a digit is as wide as 0.65 of its height
    for row, column in confusion.nonzero().tolist() if size >= 5 else ():
        share = shares[row, column].item()
        text = f"{confusion[row, column]}\n{share:.0%}" if cell >= 25 else f"{confusion[row, column]}"
        colour = "white" if share > 0.3 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size, linespacing=1)
    figure.savefig(path, dpi=120)


def plot_predictions(path, split, logits, classes, title, indices, model=None):
    """A grid of images of `split`: predicted class and confidence, in green if right; in red the true class, too.

    Those of the label UNKNOWN have their file's name instead, in black. model: beside each image, where this network looked.
    Returns the picture's name in a list, which is empty without images.
    """
    if len(indices) == 0:
        path.unlink(missing_ok=True)  # that of an earlier run would tell of other images
        return []
    images = torch.cat([batch for batch, _ in split.subset(indices).batches()])
    pictures = data.to_pictures(images, split.preprocessing)
    confidences, guesses = logits[indices].softmax(dim=1).max(dim=1)
    names, colours = [], []
    for index, guess, confidence in zip(indices.tolist(), guesses.tolist(), confidences, strict=True):
        label = split.labels[index].item()
        before = Path(split.name(index)).name if label == UNKNOWN else classes[label] + " →" if label != guess else ""
        names.append(f"{data.shorten(before)}\n{data.shorten(classes[guess], 11)} · {confidence:.0%}")
        colours.append("black" if label == UNKNOWN else RIGHT if label == guess else WRONG)
    if model is not None:
        heat = colour_activations(find_activations(model, images, guesses), pictures, model.arch["output_stride"])
        pictures = [picture for pair in zip(pictures, heat, strict=True) for picture in pair]
        names = [text for name in names for text in (name, "")]
        colours = [colour for colour in colours for _ in range(2)]
    data.plot_grid(path, title, pictures, names, colours)
    return [path.name]


def find_activations(model, images, chosen):
    """Where the network saw the classes `chosen`: class activation maps, (N, 3, S, S), (N,) -> (N, h, w), in logits.

    With the head's maps m (N, 1280, h, w), the classifier's weights w and bias b, the logit of class c is

        w_c · mean(m) + b_c  =  mean(w_c · m) + b_c        (means over the h × w places)

    so that w_c · m says of each place how much it adds to the logit (Zhou et al., arXiv:1512.04150, equations 1 and 2).
    """
    with torch.inference_mode():
        maps = model.head(model.blocks(model.stem(images)))
        return torch.einsum("nchw,nc->nhw", maps, model.classifier.weight[chosen.to(images.device)]).cpu()


def colour_activations(maps, pictures, stride):
    """Activation maps (N, h, w), what speaks against the class left out, as heat over numpy pictures (N, S, S, 3).

    A convolution of stride 2 centres its output i on its input 2 · i, so that cell i of the map belongs around pixel i · stride.
    """
    maps = maps.clamp(min=0) / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    reach = 1 + stride * (maps.shape[-1] - 1)
    maps = functional.interpolate(maps[:, None], size=(reach, reach), mode="bilinear", align_corners=True)
    maps = functional.pad(maps, [0, pictures.shape[1] - reach] * 2, mode="replicate")[:, 0]
    grey = pictures.mean(axis=3, keepdims=True)  # colours would mix with those of the heat
    return 0.4 * grey + 0.6 * colormaps["inferno"](maps.numpy())[..., :3]


def plot_history(history, path, title=""):
    """Loss and accuracy of a run, epoch by epoch; a dashed line where another stage begins."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(title)
    epochs = range(1, len(history) + 1)
    changes = [done for done in range(1, len(history)) if history[done]["stage"] != history[done - 1]["stage"]]
    for axes, key, title in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "accuracy (top 1)"), strict=True):
        # Training may well look worse than validation: dropout, augmented images, and a loss with label smoothing.
        for part, colour, label in (("train", "#8c959f", "training (made harder)"), ("val", "#0969da", "validation")):
            axes.plot(epochs, [row[f"{part}_{key}"] for row in history], ".-", color=colour, label=label)
        for done in changes:
            axes.axvline(done + 0.5, color="black", ls="--", lw=1, label=f"stage: {history[done]['stage']}")
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


def likeliest(logits, classes):
    """The three likeliest classes of each image, (N, C) -> N lists of (name, confidence)."""
    confidences, guesses = logits.softmax(dim=1).topk(min(3, len(classes)), dim=1)
    rows = zip(guesses.tolist(), confidences.tolist(), strict=True)
    return [[(classes[guess], confidence) for guess, confidence in zip(*row, strict=True)] for row in rows]


def write_predictions(path, split, logits, classes):
    """A line an image, in the order of the split: its name, its class where that is known, the three likeliest ones."""
    header = ["image", "true", "predicted", "confidence", "second", "confidence_2", "third", "confidence_3"]
    table = [header[: 2 + 2 * min(3, len(classes))]]
    for index, (label, named) in enumerate(zip(split.labels.tolist(), likeliest(logits, classes), strict=True)):
        cells = [cell for name, confidence in named for cell in (name, f"{confidence:.6f}")]
        table.append([split.name(index), "" if label == UNKNOWN else classes[label], *cells])
    write_table(path, table)


def name_classes(checkpoint):
    """The names that a checkpoint has for its classes; a file in torchvision's names has none: ImageNet's, or numbers."""
    count, names = checkpoint["arch"]["num_classes"], checkpoint["classes"]
    if count == 1000 and not names:
        names = MobileNet_V2_Weights.IMAGENET1K_V2.meta["categories"]  # two of which it has twice
        names = [f"{name} ({index})" if names.count(name) > 1 else name for index, name in enumerate(names)]
    return names or [f"class {index}" for index in range(count)]


def load_for_evaluation(args, device):
    """The network of --checkpoint and the images of --data, as it was trained to see them.

    Returns (model, checkpoint, dataset, split, "test" or "val", where there is no test split). Raises CheckpointError or
    DataError, also when their classes differ; a file in torchvision's names says only how many, and takes those of the data.
    """
    checkpoint = read_pretrained(args.checkpoint)
    dataset = data.load_for(args, checkpoint["preprocessing"], device)
    there, count = dataset.classes, checkpoint["arch"]["num_classes"]
    if not checkpoint["classes"] and count == len(there):
        checkpoint["classes"] = there
    known = name_classes(checkpoint)
    if known != there:
        knows, has = (", ".join(names[:3]) for names in (known, there))
        counts = f"'{args.checkpoint}' knows {count} classes ({knows}, ...), '{args.data}' has {len(there)} ({has}, ...)"
        raise data.DataError(f"{counts}: name the data it was trained on with --data, or fine-tune it on these")
    split = (dataset.test, "test") if dataset.test else (dataset.val, "val")
    return load_pretrained(checkpoint), checkpoint, dataset, *split


def draw(args, model, checkpoint, split, logits, confusion):
    """Draw all pictures of an evaluation. Returns their names."""
    classes = checkpoint["classes"]
    data.find_fonts(classes)
    plot_confusion(confusion, classes, args.out / "confusion.png")
    written = ["confusion.png"]
    if checkpoint["history"]:
        plot_history(checkpoint["history"], args.out / "curves.png", "the run up to the epoch whose weights these are")
        written.append("curves.png")
    some = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:32]  # the same ones every time
    confidences, guesses = logits.softmax(dim=1).max(dim=1)
    right = guesses == split.labels
    mistakes = confidences.masked_fill(right, -1).argsort(descending=True)[: (~right).sum()]
    looked = torch.cat([mistakes[:8], some[right[some]][:8]]) if args.explain else some[:0]
    for name, *about in (
        ("samples.png", "green: right · red: true → predicted · confidence", some.sort().values),
        ("mistakes.png", "the most confident mistakes: true → predicted", mistakes[:32]),
        ("explanation.png", f"{EXPLANATION}; the most confident mistakes, and some that are right", looked, model),
    ):
        written += plot_predictions(args.out / name, split, logits, classes, *about)
    return written


def evaluate(args, device):
    """Score a checkpoint on images whose classes are known. Returns the names of the files that it wrote."""
    model, checkpoint, _, split, split_name = load_for_evaluation(args, device)
    classes = checkpoint["classes"]
    if split_name == "val":
        print(f"note: {args.data} has no test split; this is its validation split, on which the checkpoint was chosen")
    logits, labels = predict(model, split)
    scores = score(logits, labels)
    confusion = confusion_matrix(labels, logits.argmax(dim=1), len(classes))
    report, notes = classification_report(confusion), find_notes(confusion, classes)
    title = f"{args.checkpoint} on {len(split)} images of {args.data} ({split_name})"
    text = "\n".join([title, "", format_report(report, scores, classes), *notes])

    metrics = {"checkpoint": args.checkpoint, "data": args.data, "split": split_name, "images": len(split)}
    metrics |= scores | report | {"notes": notes, "per_class": dict(zip(classes, report["per_class"], strict=True))}
    write_file(args.out / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False).encode())
    write_file(args.out / "report.txt", (text + "\n").encode())
    write_predictions(args.out / "predictions.csv", split, logits, classes)
    written = ["metrics.json", "report.txt", "predictions.csv"]
    written += draw(args, model, checkpoint, split, logits, confusion)
    print(text)
    return written


def classify(args, device):
    """Say what is on pictures without labels. Returns the names of the files that it wrote."""
    checkpoint = read_pretrained(args.checkpoint)
    model, classes = load_pretrained(checkpoint), name_classes(checkpoint)
    common = {"batch_size": args.batch_size, "workers": args.workers, "device": device}
    split = data.load_pictures(args.images, preprocessing=checkpoint["preprocessing"], **common)
    split.labels.fill_(UNKNOWN)
    logits, _ = predict(model, split)
    write_predictions(args.out / "images.csv", split, logits, classes)
    first = torch.arange(len(split))[:32]
    data.find_fonts([*classes, *(Path(split.name(index)).name for index in first)])
    title = f"predicted class · confidence{' · the first 32' * (len(split) > 32)}"
    written = ["images.csv", *plot_predictions(args.out / "images.png", split, logits, classes, title, first)]
    looked = first[:16] if args.explain else first[:0]
    written += plot_predictions(args.out / "images-explanation.png", split, logits, classes, EXPLANATION, looked, model)
    for index, named in enumerate(likeliest(logits, classes)):
        print(f"{split.name(index)}: {', '.join(f'{name} {confidence:.1%}' for name, confidence in named)}")
    return written


def main():
    parser = data.command_line("Evaluate a checkpoint, or classify --images.", "digits", "runs/evaluate", batch_size=256)
    parser.add_argument("--checkpoint", default="runs/finetune/best.pt", help="a torchvision .pth, or imagenet, will do, too")
    parser.add_argument("--images", nargs="+", type=Path, help="pictures and folders of them, to classify without labels")
    parser.add_argument("--explain", action="store_true", help="draw where the network looked, too")
    data.add_device_option(parser)
    args = parser.parse_args()
    device = data.choose_device(args.device)
    written = classify(args, device) if args.images else evaluate(args, device)
    print(f"\nwrote {', '.join(written)} to {args.out}")
    if not args.images:
        print(f"next: python export.py --checkpoint {shlex.quote(args.checkpoint)} {data.data_options(args)}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
