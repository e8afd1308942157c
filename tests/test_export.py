"""Exported files: the same outputs as the network, for any batch size, without this project; and what is told and kept when not."""

import json
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, call_script
from test_data import write_image
from torch import nn
from torchvision.transforms.functional import to_pil_image

import data
import export
import mobilenetv2
from mobilenetv2 import BOTTLENECKS, MobileNetV2, load_checkpoint, save_checkpoint

ONNX = all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs the packages in requirements-onnx.txt")
FILES = ["model.torchscript.pt", "model.pt2", *(["model.onnx", "model.int8.onnx"] if ONNX else [])]


@pytest.fixture(scope="module")
def few_blocks():
    """The first four of the 17 blocks: export does to all what it does to these, and ONNX takes 12 seconds for 17."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(mobilenetv2, "BOTTLENECKS", mobilenetv2.BOTTLENECKS[:3])
        yield


@pytest.fixture(scope="module")
def small(few_blocks, tmp_path_factory):
    """A checkpoint for the digits, every tensor of which is random."""
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
    """The folder of an export of everything, the pt2 file verified in a process of its own, the others here: seconds less."""
    folder, afresh = tmp_path_factory.mktemp("export"), export.measure_afresh
    with pytest.MonkeyPatch.context() as context:
        choose = lambda load, *rest: (afresh if load is export.load_pt2 else export.measure)(load, *rest)  # noqa: E731
        context.setattr(export, "measure_afresh", choose)
        assert call_script(export, "--checkpoint", small, "--out", folder) == 0
    return folder


@pytest.fixture
def here(monkeypatch):
    """Verify in this process, which takes seconds less a file."""
    monkeypatch.setattr(export, "measure_afresh", export.measure)
    monkeypatch.setattr(export, "time_batches", lambda *_: 1.0)


def test_export_writes_and_reports_all_formats(exported, small):
    assert {path.name for path in exported.iterdir()} == {*FILES, "labels.txt", "report.json"}
    report = json.loads((exported / "report.json").read_text(encoding="utf-8"))
    assert report["classes"] == list("0123456789") and report["preprocessing"]["image_size"] == 16
    assert report["verified_on"] == "899 images of digits (test)" and report["threads"] == 1
    assert [entry["file"] for entry in report["formats"].values()] == FILES
    eager = report["network"]["eager"]
    for name, entry in (report["formats"] | report["network"]).items():
        assert name in report["network"] or entry["bytes"] == (exported / entry["file"]).stat().st_size
        assert name in report["network"] or entry["bytes"] < 600_000  # 45,000 weights, and no images
        assert entry["latency_ms"] > 0 and entry["images_per_second"] > 0 and entry["load_seconds"] >= 0
        assert entry["batch_difference"] < 1e-4 and entry["accuracy"] == pytest.approx(eager["accuracy"], abs=0.0051)
        if name != "int8":
            assert entry["largest_difference"] < 1e-4 and entry["accuracy"] == eager["accuracy"]
    model, checkpoint = load_checkpoint(small)
    split = data.load_data("digits", checkpoint["preprocessing"]).test
    logits = torch.cat([model(images) for images, _ in split.batches()])
    assert eager["accuracy"] == (logits.argmax(dim=1) == split.labels).double().mean().item()
    if ONNX:
        int8 = report["formats"]["int8"]
        assert int8["bytes"] < 0.65 * report["formats"]["onnx"]["bytes"] and 0.1 > int8["largest_difference"] > 1e-3


def test_classes_and_preprocessing_travel_in_each_file(exported, small):
    checkpoint = load_checkpoint(small)[1]
    assert (exported / "labels.txt").read_text() == "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    extra = {"classes.json": "", "preprocessing.json": ""}
    torch.jit.load(exported / "model.torchscript.pt", _extra_files=extra)
    found = {"torchscript": extra}
    with zipfile.ZipFile(exported / "model.pt2") as file:
        names = [name for name in file.namelist() if name.endswith((*extra,))]
        found["pt2"] = {Path(name).name: file.read(name).decode() for name in names}
    if ONNX:
        import onnxruntime

        for file in ("model.onnx", "model.int8.onnx"):
            texts = onnxruntime.InferenceSession(exported / file).get_modelmeta().custom_metadata_map
            found[file] = {f"{key}.json": text for key, text in texts.items()}
    for texts in found.values():
        assert json.loads(texts["classes.json"]) == checkpoint["classes"]
        assert json.loads(texts["preprocessing.json"]) == checkpoint["preprocessing"]


def test_exported_files_run_in_a_process_without_this_project(exported, small, tmp_path):
    images = torch.randn(16, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import os, torch, warnings
warnings.simplefilter("ignore")
os.chdir({str(tmp_path)!r})
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
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    model, _ = load_checkpoint(small)
    with torch.inference_mode():
        expected = [model(images[:count]) for count in (1, 3, 16)]
    outputs = torch.load(tmp_path / "outputs.pt")
    assert len(outputs) == (3 if ONNX else 2)
    for network in outputs:
        for given, logits in zip(network, expected, strict=True):
            torch.testing.assert_close(given, logits, rtol=1e-4, atol=1e-4)


@needs_onnx
def test_the_lines_of_the_readme_say_what_the_network_says(exported, small, tmp_path, monkeypatch, capsys):
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL).group(1)
    assert len(program.strip().splitlines()) <= 12 and "data" not in re.findall(r"import (\w+)", program)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "export").symlink_to(exported)
    model, checkpoint = load_checkpoint(small)
    monkeypatch.chdir(tmp_path)
    for image in data.load_data("digits", checkpoint["preprocessing"]).test.images[:3, 0]:
        to_pil_image(image).resize((40, 30)).save("photo.jpg", quality=100)
        common = {"preprocessing": checkpoint["preprocessing"], "batch_size": 2, "workers": 0}
        expected = model(next(data.load_pictures([Path("photo.jpg")], **common).batches())[0])
        names = {}
        exec(program, names)
        torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, rtol=0.02, atol=0.02)  # torchvision's resizing
        assert capsys.readouterr().out.strip() == checkpoint["classes"][expected.argmax()]


def test_folded_batch_norm_gives_the_same_and_leaves_the_network_alone(small):
    model = load_checkpoint(small)[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded, images = export.fold_batch_norm(model), torch.randn(4, 3, 64, 64)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        for part in ("expand", "depthwise", "project"):
            layer, as_it_was = (getattr(network.blocks[2], part) for network in (folded, model))
            maps = torch.randn(2, layer.conv.weight.shape[1] * layer.conv.groups, 5, 5)
            torch.testing.assert_close(layer(maps), as_it_was(maps), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_with_preprocessing_pixels_go_in_and_probabilities_come_out(small, tmp_path, call, here):
    command = ("--checkpoint", small, "--out", tmp_path, "--with-preprocessing")
    assert call(export, *command, "--formats", "torchscript", "pt2")[0] == 0
    model, checkpoint = load_checkpoint(small)
    split = data.load_data("digits", checkpoint["preprocessing"], batch_size=32).test
    with torch.no_grad():
        expected = model(next(split.batches())[0]).softmax(dim=1)
    pixels = split.images[:32]
    assert pixels.shape == (32, 1, 16, 16) and pixels.dtype == torch.uint8
    for file, load in (("model.torchscript.pt", torch.jit.load), ("model.pt2", export.load_pt2)):
        torch.testing.assert_close(load(tmp_path / file)(pixels), expected, rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("channels", (1, 3))
def test_onnx_and_int8_take_pixels_too(channels, tmp_path):
    """With a network of one layer, whose export takes a second."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    whole = export.Whole(network, data.PREPROCESSING["flowers"]).eval()
    pixels = torch.randint(256, (5, channels, 8, 8), dtype=torch.uint8)
    calibration = ({"input": part.numpy()} for part in (pixels[:2], pixels[2:]))
    export.export_int8(whole, pixels[:2], tmp_path / "model.int8.onnx", {"classes": "[]"}, calibration)
    expected = whole(pixels)
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(5))
    normal = (pixels.float() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(expected, network(normal).softmax(dim=1))
    for file, tolerance in (("model.onnx", 1e-5), ("model.int8.onnx", 0.05)):
        for size in (1, 3, 5):
            given = export.load_onnx(tmp_path / file)(pixels[:size])
            torch.testing.assert_close(given, expected[:size], rtol=0, atol=tolerance)


def test_faults_are_seen():
    fine = {"batch_difference": 0.0, "largest_difference": 1e-5, "accuracy_lost": 0.0}
    for name in export.FORMATS:
        assert export.find_fault(name, fine, 1000) is None
        assert "size of the batch" in export.find_fault(name, fine | {"batch_difference": 0.1}, 1000)
        for difference in (2e-4, float("nan")):
            fault = export.find_fault(name, fine | {"largest_difference": difference}, 1000)
            assert (fault is None) == (name == "int8")
    for lost, images, bad in ((0.005, 1000, False), (0.006, 1000, True), (1 / 100, 100, False), (2 / 100, 100, True)):
        assert (export.find_fault("int8", fine | {"accuracy_lost": lost}, images) is not None) == bad


def test_a_file_that_differs_is_deleted_and_named_and_the_others_are_written(small, tmp_path, call, here, monkeypatch):
    wrong = ("wrong.pt", export.export_torchscript, lambda path: lambda images: torch.zeros(len(images), 10))
    unreadable = ("unreadable.pt", export.export_torchscript, lambda path: 1 / 0)
    right = export.FORMATS["torchscript"]
    monkeypatch.setattr(export, "FORMATS", {"wrong": wrong, "unreadable": unreadable, "torchscript": right})
    (tmp_path / "wrong.pt").write_bytes(b"of an earlier network")
    given = ("--formats", "torchscript", "unreadable", "wrong")  # they come in the order of FORMATS
    code, out, err = call(export, "--checkpoint", small, "--out", tmp_path, *given)
    assert code == 1 and err.startswith("export.py: not written, for wrong.pt: its outputs differ by up to ")
    assert "; unreadable.pt: it cannot be made or run (ZeroDivisionError: division by zero)" in err and len(err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model.torchscript.pt", "labels.txt", "report.json"}
    assert list(json.loads((tmp_path / "report.json").read_text())["formats"]) == ["torchscript"]


def test_without_the_extra_packages_a_line_says_how_and_the_others_are_written(small, tmp_path, call, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed, or could not be imported
    code, _, err = call(export, "--checkpoint", small, "--out", tmp_path, "--formats", "torchscript", "onnx")
    assert code == 0 and len(err.splitlines()) == 1
    assert err.startswith("no onnx (import of onnx halted") and err.endswith("): pip install -r requirements-onnx.txt\n")
    assert {path.name for path in tmp_path.iterdir()} == {"model.torchscript.pt", "labels.txt", "report.json"}
    (tmp_path / "model.onnx").write_bytes(b"old")
    _, _, err = call(export, "--checkpoint", small, "--out", tmp_path, "--formats", "torchscript")
    assert err.startswith("model.onnx in ") and "from an earlier export" in err


def test_photos_of_any_starting_point_are_exported(tmp_path, call, here, monkeypatch):
    """A whole network as finetune.py leaves it, with class names in any script, and a file in torchvision's names."""
    monkeypatch.setattr(mobilenetv2, "BOTTLENECKS", BOTTLENECKS)
    for number in range(5):
        for name, colour in (("春の花", 200), ("dark", 0)):
            write_image(tmp_path / "photos" / name / f"{number}.png", (colour + number,) * 3)
    model = MobileNetV2(2, 0.35)
    preprocessing = data.PREPROCESSING["flowers"] | {"image_size": 32}
    save_checkpoint(tmp_path / "ours.pt", model, ["dark", "春の花"], preprocessing, [])
    torch.save(torchvision.models.mobilenet_v2(num_classes=2, width_mult=0.35).state_dict(), tmp_path / "theirs.pth")
    for name in ("ours.pt", "theirs.pth"):
        options = ("--checkpoint", tmp_path / name, "--data", tmp_path / "photos", "--formats", "torchscript")
        assert call(export, *options, "--out", tmp_path / "out")[0] == 0
        assert (tmp_path / "out" / "labels.txt").read_text(encoding="utf-8") == "dark\n春の花\n"


def test_bad_input_ends_in_one_line(tmp_path, call):
    code, _, err = call(export, "--checkpoint", tmp_path / "nothing.pt", "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and "nothing.pt" in err
    (tmp_path / "file").write_text("")
    code, _, err = call(export, "--checkpoint", tmp_path / "nothing.pt", "--out", tmp_path / "file")
    assert (code, err) == (2, f"export.py: --out {tmp_path / 'file'} is a file: name a folder\n")


def test_a_full_disk_leaves_the_old_export(small, tmp_path, call, here, monkeypatch):
    (tmp_path / "model.torchscript.pt").write_bytes(b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    code, _, err = call(export, "--checkpoint", small, "--out", tmp_path, "--formats", "torchscript")
    assert code == 2 and len(err.splitlines()) == 1
    assert "No space left on device" in err and "model.torchscript.pt" in err
    assert (tmp_path / "model.torchscript.pt").read_bytes() == b"old"
