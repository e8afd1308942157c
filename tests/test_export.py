"""export.py: files, verification and error messages."""

import io
import json
import logging
import re
import sys
import tokenize
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torchvision
from conftest import ROOT, call_script
from PIL import Image
from processes import CONTEXT, Python
from torch import nn
from torchvision.transforms.functional import to_pil_image

import data
import export
import mobilenetv2
from mobilenetv2 import BOTTLENECKS, MobileNetV2, load_checkpoint, save_checkpoint

ONNX = all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs the packages in requirements-onnx.txt")
# As in export.py.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:No complete tensor found")
FLOAT_FILES = ["model.torchscript.pt", "model.pt2", *(["model.onnx"] if ONNX else [])]
FILES = [*FLOAT_FILES, *(["model.int8.onnx"] if ONNX else [])]
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)


@pytest.fixture(scope="module")
def few_blocks():
    """Use the first three of the 17 blocks: ONNX takes 12 seconds for 17."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(mobilenetv2, "BOTTLENECKS", BOTTLENECKS[:2])
        yield


@pytest.fixture(scope="module")
def small(few_blocks, tmp_path_factory):
    """A checkpoint for the digits, with random BatchNorm layers."""
    model = MobileNetV2(10, 0.35)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias):
                nn.init.normal_(tensor)
            for tensor in (layer.running_var, layer.weight):
                nn.init.uniform_(tensor, 0.5, 2.0)
    path = tmp_path_factory.mktemp("small") / "best.pt"
    preprocessing = {**data.SMALL_IMAGE, "image_size": 16}
    save_checkpoint(path, model, list("0123456789"), preprocessing)
    return path


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The folder of an export of all formats. One new process verifies all files, to save time."""
    folder = tmp_path_factory.mktemp("export")
    verified = []

    def start(count, mp_context):
        assert mp_context.get_start_method() == "spawn"
        return nullcontext(SimpleNamespace(submit=submit))

    def submit(function, load, path, threads, *task):
        verified.append(path.name)
        return pool.submit(function, load, path, threads, *task)

    with ProcessPoolExecutor(1, CONTEXT) as pool, pytest.MonkeyPatch.context() as context:
        context.setattr(export, "ProcessPoolExecutor", start)
        assert call_script(export, "--checkpoint", small, "--out", folder) == 0
    assert verified == FILES
    return folder


@pytest.fixture
def here(monkeypatch):
    """Verify in this process. A new one takes seconds to start."""
    monkeypatch.setattr(
        export, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count)
    )


# --------------------------------------------------------------------------------------- files


def test_export_writes_and_reports_all_formats(exported, small):
    assert {path.name for path in exported.iterdir()} == {*FILES, "labels.txt", "report.json"}
    report = json.loads((exported / "report.json").read_text(encoding="utf-8"))
    assert (
        report["classes"] == list("0123456789") and report["preprocessing"]["image_size"] == 16
    )
    assert report["verified_on"] == "899 images of digits (test)"
    assert report["with_preprocessing"] is False
    assert list(report["formats"]) == FILES
    model, checkpoint = load_checkpoint(small)
    dataset = data.load_data("digits", checkpoint["preprocessing"])
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in dataset.batches("test")])
    accuracy = (logits.argmax(dim=1) == dataset.splits["test"][1]).double().mean().item()
    assert report["network"]["accuracy"] == accuracy
    for file, result in report["formats"].items():
        # 45,000 weights, and no images.
        assert result["bytes"] == (exported / file).stat().st_size < 600_000
        assert result["latency_ms"] > 0 and result["batch_difference"] < 1e-4
        if file in FLOAT_FILES:
            assert result["largest_difference"] < 1e-4 and result["accuracy"] == accuracy
        else:
            assert 1e-3 < result["largest_difference"] < 0.1
            assert result["accuracy"] == pytest.approx(accuracy, abs=0.0051)
            assert result["bytes"] < 0.65 * report["formats"]["model.onnx"]["bytes"]


def test_each_file_contains_classes_and_preprocessing(exported, small):
    assert (exported / "labels.txt").read_text() == "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    extra = {"classes.json": "", "preprocessing.json": ""}
    torch.jit.load(exported / "model.torchscript.pt", _extra_files=extra)
    found = [extra]
    with zipfile.ZipFile(exported / "model.pt2") as file:
        names = [name for name in file.namelist() if name.endswith((*extra,))]
        found.append({Path(name).name: file.read(name).decode() for name in names})
    if ONNX:
        import onnxruntime

        for file in ("model.onnx", "model.int8.onnx"):
            session = onnxruntime.InferenceSession(exported / file)
            texts = session.get_modelmeta().custom_metadata_map
            found.append({f"{key}.json": text for key, text in texts.items()})
    checkpoint = load_checkpoint(small)[1]
    assert len(found) == len(FILES)
    for texts in found:
        assert json.loads(texts["classes.json"]) == checkpoint["classes"]
        assert json.loads(texts["preprocessing.json"]) == checkpoint["preprocessing"]


def test_files_run_without_this_project(exported, small, tmp_path):
    images = torch.randn(16, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import sys, torch, warnings
assert "mobilenetv2" not in sys.modules
warnings.simplefilter("ignore")
folder = {str(exported)!r}
images = torch.load("images.pt")
networks = [torch.jit.load(folder + "/model.torchscript.pt")]
networks.append(torch.export.load(folder + "/model.pt2").module())
if {ONNX}:
    import onnxruntime
    session = onnxruntime.InferenceSession(folder + "/model.onnx")
    def run(images):
        return torch.from_numpy(session.run(["logits"], {{"input": images.numpy()}})[0])
    networks.append(run)
with torch.inference_mode():
    torch.save([[network(images[:n]) for n in (1, 3, 16)] for network in networks], "outputs.pt")
"""
    code, _, error = Python(program, cwd=tmp_path, path=(), output=tmp_path / "output").wait()
    assert code == 0, error
    model, _ = load_checkpoint(small)
    with torch.inference_mode():
        expected = [model(images[:count]) for count in (1, 3, 16)]
    outputs = torch.load(tmp_path / "outputs.pt")
    assert len(outputs) == len(FLOAT_FILES)
    for network in outputs:
        for given, logits in zip(network, expected, strict=True):
            torch.testing.assert_close(given, logits, rtol=1e-4, atol=1e-4)


@needs_onnx
def test_python_lines_of_the_shipping_page_agree_with_the_network(
    exported, small, tmp_path, monkeypatch, capsys
):
    page = (ROOT / "docs" / "shipping.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL).group(1)
    tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(program).readline)]
    assert len([kind for kind in tokens if kind not in LAYOUT]) <= 210  # 12 dense lines
    assert "data" not in re.findall(r"import (\w+)", program)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos-export").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    model, checkpoint = load_checkpoint(small)
    images = data.load_data("digits", checkpoint["preprocessing"]).splits["test"][0]
    split = (numpy.array([Path("photo.jpg")]), torch.tensor([0]))
    photo = data.Data(
        checkpoint["classes"], checkpoint["preprocessing"], {"test": split}, kind="photos"
    )
    for image in images[:3]:
        to_pil_image(image).resize((40, 30)).save("photo.jpg", quality=100)
        with torch.no_grad():
            expected = model(next(iter(photo.batches("test")))[0])
        names = {}
        exec(program, names)
        logits = torch.from_numpy(names["logits"])
        torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)
        assert capsys.readouterr().out.strip() == checkpoint["classes"][expected.argmax()]


def test_fold_batch_norm_keeps_the_outputs_and_the_network(small):
    model = load_checkpoint(small)[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = export.fold_batch_norm(model)
    images = torch.randn(4, 3, 64, 64)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    with torch.no_grad():
        expected = model(images)
        largest = expected.abs().max().item()
        torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-5 * largest)
        for part in ("expand", "depthwise", "project"):
            layer = getattr(folded.blocks[2], part)
            original = getattr(model.blocks[2], part)
            maps = torch.randn(2, layer.conv.weight.shape[1] * layer.conv.groups, 5, 5)
            torch.testing.assert_close(layer(maps), original(maps), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_with_preprocessing_files_take_pixels_and_return_probabilities(
    small, tmp_path, call, here
):
    command = ("--checkpoint", small, "--out", tmp_path, "--with-preprocessing")
    assert call(export, *command, "--formats", "torchscript", "pt2")[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["with_preprocessing"] is True
    model, checkpoint = load_checkpoint(small)
    dataset = data.load_data("digits", checkpoint["preprocessing"], batch_size=32)
    with torch.no_grad():
        expected = model(next(iter(dataset.batches("test")))[0]).softmax(dim=1)
    pixels = dataset.splits["test"][0][:32]
    assert pixels.shape == (32, 1, 16, 16) and pixels.dtype == torch.uint8
    for name in ("torchscript", "pt2"):
        entry = export.FORMATS[name]
        network = entry["load"](tmp_path / entry["file"])
        torch.testing.assert_close(network(pixels), expected, rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("channels", (1, 3))
def test_onnx_and_int8_take_pixels_too(channels, tmp_path):
    """With a network of one convolution, which exports in a second."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    whole = export.WithPreprocessing(network, data.PHOTO).eval()
    pixels = torch.randint(256, (5, channels, 8, 8), dtype=torch.uint8)
    path = tmp_path / "model.int8.onnx"
    export.export_int8(whole, pixels[:2], path, {"classes": "[]"}, [pixels[:2], pixels[2:]])
    expected = whole(pixels)
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(5))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(expected, network((pixels / 255 - mean) / std).softmax(dim=1))
    for file, tolerance in (("model.onnx", 1e-5), ("model.int8.onnx", 0.05)):
        for size in (1, 3, 5):
            given = export.load_onnx(tmp_path / file)(pixels[:size])
            torch.testing.assert_close(given, expected[:size], rtol=0, atol=tolerance)


def test_photos_and_all_kinds_of_checkpoints_are_exported(tmp_path, call, here, monkeypatch):
    """All 17 blocks: a checkpoint with a Japanese class name, and a file of torchvision's."""
    monkeypatch.setattr(mobilenetv2, "BOTTLENECKS", BOTTLENECKS)
    photos = tmp_path / "photos"
    for name, colour in (("春の花", 200), ("dark", 0)):
        (photos / name).mkdir(parents=True)
        for number in range(5):
            image = Image.new("RGB", (40, 30), (colour + number,) * 3)
            image.save(photos / name / f"{number}.png")
    preprocessing = {**data.PHOTO, "image_size": 32}
    ours = MobileNetV2(2, 0.35)
    save_checkpoint(tmp_path / "ours.pt", ours, ["dark", "春の花"], preprocessing)
    theirs = torchvision.models.mobilenet_v2(num_classes=2, width_mult=0.35)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    options = ("--data", photos, "--formats", "torchscript")
    for name in ("ours.pt", "theirs.pth"):
        out = tmp_path / f"{name}-export"
        assert call(export, "--checkpoint", tmp_path / name, "--out", out, *options)[0] == 0
        assert (out / "labels.txt").read_text(encoding="utf-8") == "dark\n春の花\n"


# -------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "change, float_fault, int8_fault",
    [
        ({}, None, None),
        ({"batch_difference": 0.1}, "depend on the batch size", "depend on the batch size"),
        (
            {"batch_difference": float("nan")},
            "depend on the batch size",
            "depend on the batch size",
        ),
        ({"difference": 2e-4}, "differ by up to 2.0e-04", None),
        ({"difference": float("nan")}, "differ by up to nan", None),
        ({"lost": 5}, None, None),
        ({"lost": 6}, None, "it loses 6 of 1000 images"),
        ({"lost": 1, "images": 100}, None, None),
        ({"lost": 2, "images": 100}, None, "it loses 2 of 100 images"),
    ],
)
def test_verification_finds_faults(
    change, float_fault, int8_fault, tmp_path, monkeypatch, here
):
    case = {"batch_difference": 0.0, "difference": 1e-5, "lost": 0, "images": 1000}
    case.update(change)
    expected = torch.zeros(case["images"], 10)
    result = {
        "batch_difference": case["batch_difference"],
        "accuracy": 0.9 - case["lost"] / case["images"],
        "latency_ms": 1.0,
    }
    monkeypatch.setattr(
        export, "measure", lambda *_: (expected + case["difference"], dict(result))
    )
    entry = {
        "file": "file",
        "export": lambda network, example, path, *_: path.write_bytes(b"seven b"),
        "load": lambda path: None,
    }
    for name in export.FORMATS:
        monkeypatch.setattr(export, "FORMATS", {name: entry})
        reference = (expected, {"accuracy": 0.9})
        formats, faults = export.export_formats(
            [name], None, None, None, None, (), reference, tmp_path
        )
        fault = int8_fault if name == "int8" else float_fault
        if fault:
            assert formats == {} and len(faults) == 1 and fault in faults[0]
            assert faults[0].startswith("file (") and not (tmp_path / "file").exists()
        else:
            assert faults == [] and formats["file"]["bytes"] == 7


def test_faulty_files_are_deleted_and_the_others_written(
    small, tmp_path, call, here, monkeypatch
):
    torchscript = export.FORMATS["torchscript"]
    wrong = {
        **torchscript,
        "file": "wrong.pt",
        "load": lambda path: lambda images: torch.zeros(len(images), 10),
    }
    unreadable = {**torchscript, "file": "unreadable.pt", "load": lambda path: 1 / 0}
    formats = {"pt2": wrong, "onnx": unreadable, "torchscript": torchscript}
    monkeypatch.setattr(export, "FORMATS", formats)
    (tmp_path / "wrong.pt").write_bytes(b"of an earlier network")
    command = ("--checkpoint", small, "--out", tmp_path, "--formats", *formats)
    code, _, err = call(export, *command)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith("export.py: not written: wrong.pt (its outputs differ by up to ")
    assert err.endswith("); unreadable.pt (division by zero)\n")
    written = {"model.torchscript.pt", "labels.txt", "report.json"}
    assert {path.name for path in tmp_path.iterdir()} == written
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["formats"]) == ["model.torchscript.pt"]


def test_missing_packages_are_named_and_the_other_files_written(
    small, tmp_path, call, here, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    code, _, err = call(
        export, "--checkpoint", small, "--out", tmp_path, "--formats", "torchscript", "onnx"
    )
    assert code == 0 and len(err.splitlines()) == 1
    assert err.startswith("no onnx (import of onnx halted")
    assert err.endswith("): pip install -r requirements-onnx.txt\n")
    written = {"model.torchscript.pt", "labels.txt", "report.json"}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_bad_input_ends_in_one_line(small, tmp_path, call, here):
    out = tmp_path / "out"
    code, _, err = call(export, "--checkpoint", tmp_path / "nothing.pt", "--out", out)
    assert code == 2 and len(err.splitlines()) == 1 and "nothing.pt" in err
    assert not out.exists()
    (tmp_path / "file").write_text("")
    code, _, err = call(
        export, "--checkpoint", small, "--out", tmp_path / "file", "--formats", "torchscript"
    )
    assert code == 2 and len(err.splitlines()) == 1 and str(tmp_path / "file") in err


def test_unknown_option_is_refused(small, tmp_path, call):
    """The files are for the CPU, so --device would be ignored."""
    out = tmp_path / "out"
    code, _, err = call(export, "--checkpoint", small, "--out", out, "--device", "cpu")
    assert (code, err) == (
        2,
        "export.py: unrecognized arguments: --device cpu; see --help\n",
    )
    assert not out.exists()


def test_exporters_are_quiet_only_while_they_run(caplog):
    root = logging.getLogger()
    before = [list(warnings.filters), list(root.filters)]
    with export.quiet_exporters():
        root.warning("use this tool before quantization")
        root.warning("another message")
    assert [record.getMessage() for record in caplog.records] == ["another message"]
    assert [warnings.filters, root.filters] == before
    with pytest.raises(OSError), export.quiet_exporters():
        raise OSError("No space left on device")
    assert [warnings.filters, root.filters] == before


@pytest.mark.parametrize("file", FILES)
def test_verification_shows_no_warnings(file, exported, small):
    """It runs in a process of its own, which prints warnings between the rows of the table."""
    checkpoint = load_checkpoint(small)[1]
    dataset = data.load_data("digits", checkpoint["preprocessing"])
    (load,) = [entry["load"] for entry in export.FORMATS.values() if entry["file"] == file]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        export.load_and_measure(load, exported / file, 1, dataset, "test", False)
    assert [str(warning.message) for warning in shown] == []


def test_full_disk_keeps_the_old_file(small, tmp_path, call, here, monkeypatch):
    (tmp_path / "model.torchscript.pt").write_bytes(b"old")

    def write(*_):
        raise OSError(28, "No space left on device")

    for target, name in (
        (mobilenetv2, "open"),
        (Path, "write_bytes"),
    ):  # --out; temporary folder
        with monkeypatch.context() as context:
            context.setattr(target, name, write, raising=False)
            code, _, err = call(
                export, "--checkpoint", small, "--out", tmp_path, "--formats", "torchscript"
            )
        assert code == 2 and len(err.splitlines()) == 1 and "No space left on device" in err
        assert (tmp_path / "model.torchscript.pt").read_bytes() == b"old"
