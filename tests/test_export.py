"""Exported files: the same logits as the network, for any batch size, without this project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
from mobilenetv2 import load_checkpoint


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    command = [sys.executable, str(export.__file__), "--checkpoint", str(trained / "best.pt"), "--out", str(folder)]
    return folder, subprocess.run(command, capture_output=True, text=True)


def test_export_writes_and_reports_both_formats(exported):
    folder, result = exported
    assert result.returncode == 0 and result.stderr == ""
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt2", "model.torchscript.pt", "report.json"]
    report = json.loads((folder / "report.json").read_text())
    assert report["classes"] == list("0123456789") and report["preprocessing"]["image_size"] == 16
    assert list(report["formats"]) == ["torchscript", "pt2"]
    for entry in report["formats"].values():
        assert entry["bytes"] == (folder / entry["file"]).stat().st_size
        assert entry["largest_difference"] < 1e-4 and entry["agreement"] == 1


def test_exported_files_run_in_a_process_without_this_project(exported, trained, tmp_path):
    folder, _ = exported
    images = torch.randn(16, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import torch, warnings
warnings.simplefilter("ignore")
images = torch.load("images.pt")
for name, load in (("torchscript", lambda: torch.jit.load(r"{folder}/model.torchscript.pt")),
                   ("pt2", lambda: torch.export.load(r"{folder}/model.pt2").module())):
    model = load()
    with torch.inference_mode():
        torch.save([model(images[:n]) for n in (1, 3, 16)], name + ".out")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    model, _ = load_checkpoint(trained / "best.pt")
    with torch.inference_mode():
        expected = [model(images[:count]) for count in (1, 3, 16)]
    for name in ("torchscript", "pt2"):
        for given, logits in zip(torch.load(tmp_path / f"{name}.out"), expected, strict=True):
            torch.testing.assert_close(given, logits, rtol=1e-4, atol=1e-4)


def test_verify_sees_a_difference():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.randn(20, 3, 2, 2)
    assert export.verify(model, model, images) == {"largest_difference": 0, "agreement": 1}
    result = export.verify(model, lambda x: model(x).roll(1, dims=1), images)
    assert result["largest_difference"] > 0.1 and result["agreement"] < 1


def test_a_file_that_differs_is_deleted_and_named(trained, tmp_path, call, monkeypatch):
    wrong = ("wrong.pt", export.export_torchscript, lambda file: lambda images: torch.zeros(len(images), 10))
    monkeypatch.setattr(export, "FORMATS", {"wrong": wrong})
    (tmp_path / "wrong.pt").write_bytes(b"of an earlier network")
    code, _, _ = call(export, "--checkpoint", trained / "best.pt", "--out", tmp_path)
    assert code == "not written, for they differ from the network: wrong"  # a message as exit code is exit code 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_bad_input_ends_in_one_line(tmp_path, call):
    code, _, err = call(export, "--checkpoint", tmp_path / "nothing.pt", "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and "nothing.pt" in err


def test_a_full_disk_leaves_the_old_export(trained, tmp_path, call, monkeypatch):
    (tmp_path / "model.torchscript.pt").write_bytes(b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    code, _, err = call(export, "--checkpoint", trained / "best.pt", "--out", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1
    assert "No space left on device" in err and "model.torchscript.pt" in err
    assert (tmp_path / "model.torchscript.pt").read_bytes() == b"old"
