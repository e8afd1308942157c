"""export.py: files, verification and error messages."""

import json
import re
import sys
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
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit", "ignore:No complete tensor found"
)  # as in export.py
FLOAT_FILES = ["model.torchscript.pt", "model.pt2", *(["model.onnx"] if ONNX else [])]
FILES = [*FLOAT_FILES, *(["model.int8.onnx"] if ONNX else [])]


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
    save_checkpoint(path, model, list("0123456789"), data.SMALL | {"image_size": 16})
    return path


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The folder of an export of all formats. One new process verifies all files, to save time."""
    folder, verified = tmp_path_factory.mktemp("export"), []

    def start(count, mp_context):
        assert mp_context.get_start_method() == "spawn"
        return nullcontext(SimpleNamespace(submit=submit))

    def submit(function, load, path, *how):
        verified.append(path.name)
        return pool.submit(function, load, path, *how)

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


# ------------------------------------------------------------------------------------------------------ files


def test_export_writes_and_reports_all_formats(exported, small):
    assert {path.name for path in exported.iterdir()} == {*FILES, "labels.txt", "report.json"}
    report = json.loads((exported / "report.json").read_text(encoding="utf-8"))
    assert report["classes"] == list("0123456789") and report["preprocessing"]["image_size"] == 16
    assert (
        report["verified_on"] == "899 images of digits (test)"
        and report["with_preprocessing"] is False
    )
    assert list(report["formats"]) == FILES
    model, checkpoint = load_checkpoint(small)
    dataset = data.load_data("digits", checkpoint["preprocessing"])
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in dataset.batches("test")])
    accuracy = (logits.argmax(dim=1) == dataset.splits["test"][1]).double().mean().item()
    assert report["network"]["accuracy"] == accuracy
    for file, result in report["formats"].items():
        assert (
            result["bytes"] == (exported / file).stat().st_size < 600_000
        )  # 45,000 weights, and no images
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
            texts = (
                onnxruntime.InferenceSession(exported / file).get_modelmeta().custom_metadata_map
            )
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
networks = [torch.jit.load(folder + "/model.torchscript.pt"), torch.export.load(folder + "/model.pt2").module()]
if {ONNX}:
    import onnxruntime
    session = onnxruntime.InferenceSession(folder + "/model.onnx")
    networks.append(lambda images: torch.from_numpy(session.run(["logits"], {{"input": images.numpy()}})[0]))
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
    program = re.search(
        r"```python\n(.*?)```",
        (ROOT / "docs" / "shipping.md").read_text(encoding="utf-8"),
        flags=re.DOTALL,
    ).group(1)
    assert len(program.strip().splitlines()) <= 12 and "data" not in re.findall(
        r"import (\w+)", program
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos-export").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    model, checkpoint = load_checkpoint(small)
    images = data.load_data("digits", checkpoint["preprocessing"]).splits["test"][0]
    split = (numpy.array([Path("photo.jpg")]), torch.tensor([0]))
    photo = data.Data(checkpoint["classes"], checkpoint["preprocessing"], {"test": split})
    for image in images[:3]:
        to_pil_image(image).resize((40, 30)).save("photo.jpg", quality=100)
        with torch.no_grad():
            expected = model(next(iter(photo.batches("test")))[0])
        names = {}
        exec(program, names)
        logits = torch.from_numpy(names["logits"])
        torch.testing.assert_close(
            logits, expected, rtol=0.02, atol=0.02
        )  # torchvision resizes differently
        assert capsys.readouterr().out.strip() == checkpoint["classes"][expected.argmax()]


def test_fold_batch_norm_keeps_the_outputs_and_the_network(small):
    model = load_checkpoint(small)[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded, images = export.fold_batch_norm(model), torch.randn(4, 3, 64, 64)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(
            folded(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
        for part in ("expand", "depthwise", "project"):
            layer, original = (getattr(network.blocks[2], part) for network in (folded, model))
            maps = torch.randn(2, layer.conv.weight.shape[1] * layer.conv.groups, 5, 5)
            torch.testing.assert_close(layer(maps), original(maps), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_with_preprocessing_files_take_pixels_and_return_probabilities(small, tmp_path, call, here):
    command = ("--checkpoint", small, "--out", tmp_path, "--with-preprocessing")
    assert call(export, *command, "--formats", "torchscript", "pt2")[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["with_preprocessing"] is True
    model, checkpoint = load_checkpoint(small)
    dataset = data.load_data("digits", checkpoint["preprocessing"], batch_size=32)
    with torch.no_grad():
        expected = model(next(iter(dataset.batches("test")))[0]).softmax(dim=1)
    pixels = dataset.splits["test"][0][:32]
    assert pixels.shape == (32, 1, 16, 16) and pixels.dtype == torch.uint8
    for file, load in (("model.torchscript.pt", torch.jit.load), ("model.pt2", export.load_pt2)):
        torch.testing.assert_close(load(tmp_path / file)(pixels), expected, rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("channels", (1, 3))
def test_onnx_and_int8_take_pixels_too(channels, tmp_path):
    """With a network of one convolution, which exports in a second."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    whole = export.WithPreprocessing(network, data.PHOTOS).eval()
    pixels = torch.randint(256, (5, channels, 8, 8), dtype=torch.uint8)
    path = tmp_path / "model.int8.onnx"
    export.export_int8(whole, pixels[:2], path, {"classes": "[]"}, [pixels[:2], pixels[2:]])
    expected = whole(pixels)
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(5))
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    torch.testing.assert_close(expected, network((pixels / 255 - mean) / std).softmax(dim=1))
    for file, tolerance in (("model.onnx", 1e-5), ("model.int8.onnx", 0.05)):
        for size in (1, 3, 5):
            given = export.load_onnx(tmp_path / file)(pixels[:size])
            torch.testing.assert_close(given, expected[:size], rtol=0, atol=tolerance)


def test_photos_and_all_kinds_of_checkpoints_are_exported(tmp_path, call, here, monkeypatch):
    """With all 17 blocks: a checkpoint with a Chinese class name, and torchvision's file without names."""
    monkeypatch.setattr(mobilenetv2, "BOTTLENECKS", BOTTLENECKS)
    for name, colour in (("春の花", 200), ("dark", 0)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (40, 30), (colour + number,) * 3).save(
                tmp_path / "photos" / name / f"{number}.png"
            )
    save_checkpoint(
        tmp_path / "ours.pt",
        MobileNetV2(2, 0.35),
        ["dark", "春の花"],
        data.PHOTOS | {"image_size": 32},
    )
    torch.save(
        torchvision.models.mobilenet_v2(num_classes=2, width_mult=0.35).state_dict(),
        tmp_path / "theirs.pth",
    )
    for name in ("ours.pt", "theirs.pth"):
        options = (
            "--checkpoint",
            tmp_path / name,
            "--data",
            tmp_path / "photos",
            "--formats",
            "torchscript",
        )
        assert call(export, *options, "--out", tmp_path / name[:-3])[0] == 0
        assert (tmp_path / name[:-3] / "labels.txt").read_text(encoding="utf-8") == "dark\n春の花\n"


# ----------------------------------------------------------------------------------------------------- faults


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
def test_verify_finds_faults(change, float_fault, int8_fault, tmp_path, monkeypatch):
    case = {"batch_difference": 0.0, "difference": 1e-5, "lost": 0, "images": 1000} | change
    expected = torch.zeros(case["images"], 10)
    result = {
        "batch_difference": case["batch_difference"],
        "accuracy": 0.9 - case["lost"] / case["images"],
    }
    monkeypatch.setattr(export, "measure", lambda *_: (expected + case["difference"], dict(result)))
    (tmp_path / "file").write_bytes(b"seven b")
    pool = ThreadPoolExecutor(1)
    for name in export.FORMATS:
        fault = int8_fault if name == "int8" else float_fault
        if fault:
            with pytest.raises(ValueError, match=fault):
                export.verify(name, None, tmp_path / "file", expected, 0.9, pool)
        else:
            assert export.verify(name, None, tmp_path / "file", expected, 0.9, pool)["bytes"] == 7


def test_faulty_files_are_deleted_and_the_others_written(small, tmp_path, call, here, monkeypatch):
    wrong = (
        "wrong.pt",
        export.export_torchscript,
        lambda path: lambda images: torch.zeros(len(images), 10),
    )
    unreadable = ("unreadable.pt", export.export_torchscript, lambda path: 1 / 0)
    right = export.FORMATS["torchscript"]
    monkeypatch.setattr(export, "FORMATS", {"pt2": wrong, "onnx": unreadable, "torchscript": right})
    (tmp_path / "wrong.pt").write_bytes(b"of an earlier network")
    command = ("--checkpoint", small, "--out", tmp_path, "--formats", "pt2", "onnx", "torchscript")
    code, _, err = call(export, *command)
    assert code == 2 and err.startswith(
        "export.py: not written: wrong.pt (its outputs differ by up to "
    )
    assert err.endswith("); unreadable.pt (division by zero)\n") and len(err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.torchscript.pt",
        "labels.txt",
        "report.json",
    }
    assert list(json.loads((tmp_path / "report.json").read_text())["formats"]) == [
        "model.torchscript.pt"
    ]


def test_missing_packages_are_named_and_the_other_files_written(
    small, tmp_path, call, here, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    code, _, err = call(
        export, "--checkpoint", small, "--out", tmp_path, "--formats", "torchscript", "onnx"
    )
    assert code == 0 and len(err.splitlines()) == 1
    assert err.startswith("no onnx (import of onnx halted") and err.endswith(
        "): pip install -r requirements-onnx.txt\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.torchscript.pt",
        "labels.txt",
        "report.json",
    }


def test_bad_input_ends_in_one_line(small, tmp_path, call, here):
    code, _, err = call(export, "--checkpoint", tmp_path / "nothing.pt", "--out", tmp_path / "out")
    assert (
        code == 2
        and len(err.splitlines()) == 1
        and "nothing.pt" in err
        and not (tmp_path / "out").exists()
    )
    (tmp_path / "file").write_text("")
    code, _, err = call(
        export, "--checkpoint", small, "--out", tmp_path / "file", "--formats", "torchscript"
    )
    assert code == 2 and len(err.splitlines()) == 1 and str(tmp_path / "file") in err


def test_full_disk_keeps_the_old_file(small, tmp_path, call, here, monkeypatch):
    (tmp_path / "model.torchscript.pt").write_bytes(b"old")

    def write(*_):
        raise OSError(28, "No space left on device")

    for target, name in ((mobilenetv2, "open"), (Path, "write_bytes")):  # --out; temporary folder
        with monkeypatch.context() as context:
            context.setattr(target, name, write, raising=False)
            code, _, err = call(
                export, "--checkpoint", small, "--out", tmp_path, "--formats", "torchscript"
            )
        assert code == 2 and len(err.splitlines()) == 1 and "No space left on device" in err
        assert (tmp_path / "model.torchscript.pt").read_bytes() == b"old"
