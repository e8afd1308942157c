"""The network against torchvision's, against the paper's tables, and layer by layer."""

import hashlib
import io
import pickle
import sys

import pytest
import torch
import torchvision
from torch import nn

import mobilenetv2
from mobilenetv2 import (
    BOTTLENECKS,
    CheckpointError,
    InvertedResidual,
    MobileNetV2,
    count_macs,
    count_parameters,
    from_torchvision,
    load_checkpoint,
    load_pretrained,
    make_divisible,
    save_checkpoint,
    to_torchvision,
)

WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)
PREPROCESSING = {"image_size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}


def randomise(model):
    """Random statistics and weights everywhere, so that no two layers could be exchanged unnoticed."""
    for name, tensor in model.state_dict().items():
        if "num_batches" not in name:
            spread = 1.0 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * spread)
    return model


def pair(width):
    """torchvision's network and ours with the same weights."""
    theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width))
    ours = MobileNetV2(width_mult=width)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return theirs, ours


# ------------------------------------------------------------------------------------- against torchvision


@pytest.mark.parametrize("width", WIDTHS)
def test_logits_and_gradients_equal_torchvision_bit_for_bit(width):
    theirs, ours = pair(width)
    images = torch.randn(2, 3, 64, 64)
    theirs.eval(), ours.eval()
    assert torch.equal(theirs(images), ours(images))

    theirs.train(), ours.train()
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(1)  # the same dropout mask
        outputs.append(model(images))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours_gradients = to_torchvision({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert list(gradients) == list(ours_gradients)
    assert all(torch.equal(gradients[name], ours_gradients[name]) for name in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    # the running statistics after a step in training mode, too
    after = to_torchvision(ours.state_dict())
    assert all(torch.equal(tensor, after[name]) for name, tensor in theirs.state_dict().items())


def test_logits_equal_torchvision_at_224():
    theirs, ours = pair(1.0)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(theirs.eval()(images), ours.eval()(images))


@pytest.mark.parametrize("width", WIDTHS)
def test_names_make_the_round_trip_byte_for_byte(width):
    def to_bytes(state_dict):
        buffer = io.BytesIO()
        torch.save(dict(state_dict), buffer)
        return buffer.getvalue()

    state_dict = torchvision.models.mobilenet_v2(width_mult=width).state_dict()
    renamed = from_torchvision(state_dict)
    assert list(renamed) == list(MobileNetV2(width_mult=width).state_dict())
    assert to_bytes(to_torchvision(renamed)) == to_bytes(state_dict)


def test_a_name_of_another_network_is_refused():
    with pytest.raises(CheckpointError, match="'layer1.0.conv1.weight' is not a weight of MobileNetV2"):
        from_torchvision({"layer1.0.conv1.weight": torch.zeros(1)})


def test_initial_weights_are_torchvisions_bit_for_bit():
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(num_classes=5).state_dict()
    torch.manual_seed(0)
    ours = to_torchvision(MobileNetV2(num_classes=5).state_dict())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


# ----------------------------------------------------------------------------------- against published tables

# tensorflow/models, research/slim/nets/mobilenet/README.md: width, image size, million multiply-adds, million parameters
PUBLISHED = [
    (1.4, 224, 582, 6.06),
    (1.3, 224, 509, 5.34),
    *[(1.0, size, macs, 3.47) for size, macs in zip((224, 192, 160, 128, 96), (300, 221, 154, 99, 56), strict=True)],
    *[(0.75, size, macs, 2.61) for size, macs in zip((224, 192, 160, 128, 96), (209, 153, 107, 69, 39), strict=True)],
    *[(0.5, size, macs, 1.95) for size, macs in zip((224, 192, 160, 128, 96), (97, 71, 50, 32, 18), strict=True)],
    *[(0.35, size, macs, 1.66) for size, macs in zip((224, 192, 160, 128, 96), (59, 43, 30, 20, 11), strict=True)],
]


@pytest.mark.parametrize("width, size, million_macs, million_parameters", PUBLISHED)
def test_costs_are_the_published_ones(width, size, million_macs, million_parameters):
    model = MobileNetV2(width_mult=width)
    assert count_macs(model, size) // 1_000_000 == million_macs
    assert round(count_parameters(model, batch_norm=False) / 1e6, 2) == million_parameters


def test_all_22_rows_are_there_and_the_exact_totals():
    assert len(PUBLISHED) == 22
    assert count_parameters(MobileNetV2()) == 3_504_872
    assert count_macs(MobileNetV2(), 224) == 300_774_272


def test_make_divisible():
    assert [make_divisible(value) for value in (8, 11.2, 12, 20, 22.4, 33.6, 1280)] == [8, 16, 16, 24, 24, 32, 1280]
    for value in torch.arange(8, 2000, 0.7).tolist():
        assert make_divisible(value) % 8 == 0
        assert make_divisible(value) >= 0.9 * value


def test_head_keeps_1280_channels_below_width_1():
    assert [MobileNetV2(width_mult=w).classifier.in_features for w in (0.35, 0.75, 1.0, 1.4)] == [
        1280,
        1280,
        1280,
        1792,
    ]


# ------------------------------------------------------------------------------------------ layer by layer


def shapes_after_rows(model, size):
    """(C, H) after the stem, after each row of Table 2, and after the head."""
    x = model.stem(torch.zeros(1, 3, size, size))
    shapes, index = [(x.shape[1], x.shape[2])], 0
    for _, _, repeats, _ in BOTTLENECKS:
        x = model.blocks[index : index + repeats](x)
        shapes.append((x.shape[1], x.shape[2]))
        index += repeats
    assert index == len(model.blocks) == 17
    x = model.head(x)
    return shapes + [(x.shape[1], x.shape[2])]


@pytest.mark.parametrize(
    "output_stride, size, sides",
    [
        (32, 224, (112, 112, 56, 28, 14, 14, 7, 7, 7)),
        (32, 32, (16, 16, 8, 4, 2, 2, 1, 1, 1)),
        (16, 32, (32, 32, 16, 8, 4, 4, 2, 2, 2)),
        (8, 32, (32, 32, 32, 16, 8, 8, 4, 4, 4)),
    ],
)
def test_shapes_after_every_row(output_stride, size, sides):
    model = MobileNetV2(output_stride=output_stride).eval()
    channels = (32, 16, 24, 32, 64, 96, 160, 320, 1280)
    assert shapes_after_rows(model, size) == list(zip(channels, sides, strict=True))
    assert model.features(torch.zeros(2, 3, size, size)).shape == (2, 1280)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 1000)


def test_output_stride_keeps_the_shapes_of_the_weights():
    shapes = [{k: v.shape for k, v in MobileNetV2(output_stride=s).state_dict().items()} for s in (32, 16, 8)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("output_stride", (32, 8))
def test_a_gradient_reaches_every_parameter(output_stride):
    model = MobileNetV2(num_classes=7, output_stride=output_stride).train()
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_projection_is_linear():
    block = randomise(InvertedResidual(16, 24, 1, 6)).eval()
    assert not any(isinstance(layer, nn.ReLU6 | nn.ReLU) for layer in block.project)
    wide = torch.randn(2, 96, 8, 8)
    offset = block.project(torch.zeros_like(wide))
    torch.testing.assert_close(block.project(-2 * wide) - offset, -2 * (block.project(wide) - offset))
    # nothing follows the projection inside the block either: its output takes both signs
    out = block(torch.randn(2, 16, 8, 8))
    assert out.min() < 0 < out.max()


def test_expansion_and_depthwise_end_in_relu6():
    block = randomise(InvertedResidual(16, 16, 1, 6)).eval()
    wide = block.expand(100 * torch.randn(2, 16, 8, 8))
    assert (wide.min(), wide.max()) == (0, 6)
    filtered = block.depthwise(100 * wide)
    assert (filtered.min(), filtered.max()) == (0, 6)


def test_shortcuts_where_stride_is_1_and_channels_agree():
    blocks = MobileNetV2().blocks
    with_shortcut = [index for index, block in enumerate(blocks) if block.use_residual]
    assert with_shortcut == [2, 4, 5, 7, 8, 9, 11, 12, 14, 15]
    for block in blocks:
        same = (
            block.depthwise.conv.stride == (1, 1)
            and block.depthwise.conv.in_channels == block.depthwise.conv.out_channels
        )
        first = block.expand.conv if isinstance(block.expand, nn.Sequential) else block.depthwise.conv
        assert block.use_residual == (same and first.in_channels == block.project.conv.out_channels)


def test_a_block_with_a_zero_projection_is_the_identity():
    for block in MobileNetV2().eval().blocks:
        nn.init.zeros_(block.project.conv.weight)
        channels = (block.expand.conv if isinstance(block.expand, nn.Sequential) else block.depthwise.conv).in_channels
        x = torch.randn(1, channels, 8, 8)
        expected = x if block.use_residual else torch.zeros_like(block(x))
        assert torch.equal(block(x), expected)


def test_eval_is_deterministic_and_knows_nothing_of_the_rest_of_the_batch():
    model = randomise(MobileNetV2(num_classes=10)).eval()
    images = torch.randn(5, 3, 64, 64)
    logits = model(images)
    assert torch.equal(logits, model(images))
    torch.testing.assert_close(model(images[3:4]), logits[3:4], rtol=1e-4, atol=1e-4)
    replaced = torch.cat([images[:1], 100 * torch.randn(4, 3, 64, 64)])
    assert torch.equal(model(replaced)[:1], logits[:1])


def test_dropout_only_in_training():
    model = MobileNetV2(num_classes=10, width_mult=0.35, dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    model.train()(images)
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)  # so that dropout alone is random
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize(
    "arguments",
    [{"num_classes": 0}, {"width_mult": 0}, {"width_mult": float("nan")}, {"output_stride": 4}, {"dropout": 1.5}],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError):
        MobileNetV2(**arguments)


def test_table_2_is_printed_with_live_numbers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobilenetv2.py", "--width", "0.5", "--image-size", "160"])
    mobilenetv2.main()
    lines = capsys.readouterr().out.splitlines()
    # by hand for the third row: 8·48·80² + 9·48·40² + 48·16·40², then 16·96·40² + 9·96·40² + 96·16·40²
    assert lines[1].split() == ["conv2d", "3×3", "3×160×160", "16×80×80", "-", "16", "1", "2", "464", "2,764,800"]
    assert lines[3].split() == ["bottleneck", "8×80×80", "16×40×40", "6", "16", "2", "2", "6,160", "10,675,200"]
    assert [line.split()[-3] for line in lines[1:10]] == ["2", "1", "2", "2", "2", "1", "2", "1", "1"]  # s
    assert lines[11].split() == ["total", "1,968,680", f"{count_macs(MobileNetV2(width_mult=0.5), 160):,}"]


@pytest.mark.parametrize("option", (["--width", "-1"], ["--image-size", "0"], ["--output-stride", "7"]))
def test_table_2_refuses_absurd_options_in_one_line(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobilenetv2.py", *option])
    with pytest.raises(SystemExit) as stop:
        mobilenetv2.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# --------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    model = randomise(MobileNetV2(num_classes=3, width_mult=0.35, output_stride=8))
    path = tmp_path / "runs" / "model.pt"
    save_checkpoint(path, model, ["a", "b", "鬱金香"], PREPROCESSING, [{"epoch": 1, "val_top1": 0.5}])
    return path


def test_a_checkpoint_gives_back_the_network_and_what_belongs_to_it(checkpoint):
    model, contents = load_checkpoint(checkpoint)
    assert model.arch == {"num_classes": 3, "width_mult": 0.35, "dropout": 0.2, "output_stride": 8}
    assert not model.training
    assert contents["classes"] == ["a", "b", "鬱金香"] and contents["preprocessing"] == PREPROCESSING
    assert contents["history"] == [{"epoch": 1, "val_top1": 0.5}]
    again = checkpoint.with_name("again.pt")
    save_checkpoint(again, model, contents["classes"], contents["preprocessing"], contents["history"])
    assert again.read_bytes() == checkpoint.read_bytes()


def test_loading_leaves_the_random_state_alone(checkpoint):
    before = torch.get_rng_state()
    load_checkpoint(checkpoint)
    assert torch.equal(before, torch.get_rng_state())


def test_a_failed_write_leaves_the_old_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mobilenetv2.os, "replace", full_disk)
    with pytest.raises(OSError):
        save_checkpoint(checkpoint, MobileNetV2(num_classes=2), ["a", "b"], PREPROCESSING)
    assert checkpoint.read_bytes() == before
    assert [file.name for file in checkpoint.parent.iterdir()] == ["model.pt"]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*nothing.pt"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("share", (0, 0.001, 0.3, 0.9, 0.9999))
def test_a_truncated_checkpoint_is_refused(checkpoint, share):
    contents = checkpoint.read_bytes()
    checkpoint.write_bytes(contents[: int(len(contents) * share)])
    with pytest.raises(CheckpointError, match="model.pt"):
        load_checkpoint(checkpoint)


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    for name, write in (
        ("plain.pt", lambda p: p.write_bytes(pickle.dumps(Hostile()))),
        ("zip.pt", lambda p: torch.save(Hostile(), p)),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    assert "must never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"].pop("stem.conv.weight"), "'stem.conv.weight' is missing"),
        (lambda c: c["model"].update(extra=torch.zeros(1)), "'extra' is unexpected"),
        (
            lambda c: c["model"].update({"stem.conv.weight": torch.zeros(2, 3)}),
            r"'stem.conv.weight' is \(2, 3\) where \(16, 3, 3, 3\)",
        ),
        (lambda c: c["model"].update({"stem.conv.weight": 3}), "'stem.conv.weight' is int where"),
        (lambda c: c["arch"].update(width_mult=1.0), "and [0-9]+ more"),
        (lambda c: c["arch"].update(num_classes=10**12), "names 3 classes for a network of 1000000000000"),
        (lambda c: c["arch"].update(width_mult="many"), "cannot be built"),
        (lambda c: c["arch"].update(hidden=1), "cannot be built"),
        (lambda c: c.pop("classes"), "has no 'classes'"),
        (lambda c: c["classes"].pop(), "names 2 classes"),
        (
            lambda c: c["model"]["stem.conv.weight"].fill_(float("nan")),
            "'stem.conv.weight' has numbers that are not finite",
        ),
        (
            lambda c: c["model"].update({"head.norm.bias": torch.zeros(1280, dtype=torch.int)}),
            "numbers of type torch.int32",
        ),
        (lambda c: c["preprocessing"].pop("mean"), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(mean=[0.5]), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(std=[0.5, 0, 0.5]), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(image_size="32"), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(image_size=32.5), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(std=(0.5, 0.5, 0.5)), "lacks a usable preprocessing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, change, message):
    contents = torch.load(checkpoint, weights_only=True)
    change(contents)
    torch.save(contents, checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


def test_a_file_of_something_else_is_refused(tmp_path):
    for contents in ([1, 2], {"epoch": 3}, torch.zeros(2)):
        torch.save(contents, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
            load_checkpoint(tmp_path / "other.pt")


# ---------------------------------------------------------------------------------------- pretrained weights


def test_pretrained_from_a_torchvision_file(tmp_path, capsys):
    for width in (*WIDTHS, 0.97, 0.22):
        theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width, num_classes=4)).eval()
        torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(load_pretrained(tmp_path / "theirs.pth")(images), theirs(images))
        assert capsys.readouterr().out == ""
        fresh = load_pretrained(tmp_path / "theirs.pth", num_classes=9, output_stride=16)
        assert "fresh, for 9 classes (the weights know 4)" in capsys.readouterr().out
        assert fresh.arch["num_classes"] == 9 and fresh.arch["output_stride"] == 16
        assert width not in WIDTHS or fresh.arch["width_mult"] == width
        assert fresh(images).shape == (2, 9)
        assert torch.equal(fresh.head.conv.weight, theirs.features[18][0].weight)


def test_pretrained_from_a_checkpoint_of_ours(checkpoint):
    model = load_checkpoint(checkpoint)[0]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pretrained(checkpoint)(images), model(images))
    assert load_pretrained(checkpoint, num_classes=5)(images).shape == (2, 5)


def test_a_torchvision_file_with_a_missing_weight_is_refused(tmp_path):
    state_dict = torchvision.models.mobilenet_v2(num_classes=4).state_dict()
    for name in ("features.5.conv.0.0.weight", "classifier.1.weight", "features.17.conv.2.weight"):
        torch.save({key: tensor for key, tensor in state_dict.items() if key != name}, tmp_path / "part.pth")
        with pytest.raises(CheckpointError, match="missing|not a whole"):
            load_pretrained(tmp_path / "part.pth")


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """torchvision's address replaced by a local file whose name carries its hash, and an empty download folder."""
    path = tmp_path / "server" / "weights.pth"
    path.parent.mkdir()
    torch.save(torchvision.models.mobilenet_v2().state_dict(), path)
    path = path.rename(path.with_name(f"mobilenet_v2-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
    assert weights.url.endswith("/mobilenet_v2-7ebf99e0.pth")
    monkeypatch.setattr(weights.value, "url", path.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return path


def test_imagenet_weights_are_fetched_once_and_verified(imagenet, tmp_path):
    model = load_pretrained("imagenet", num_classes=6)
    assert model.arch["num_classes"] == 6
    expected = torch.load(imagenet, weights_only=True)["features.18.0.weight"]
    assert torch.equal(model.head.conv.weight, expected)
    imagenet.unlink()
    load_pretrained("imagenet", num_classes=6)
    cached = tmp_path / "home" / "hub" / "checkpoints" / imagenet.name
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_pretrained("imagenet", num_classes=6)


def test_imagenet_weights_with_a_wrong_hash_are_not_kept(imagenet, tmp_path):
    imagenet.write_bytes(imagenet.read_bytes() + b"!")
    with pytest.raises(CheckpointError, match="no ImageNet weights .*invalid hash"):
        load_pretrained("imagenet", num_classes=6)
    assert not list((tmp_path / "home" / "hub" / "checkpoints").iterdir())


def test_imagenet_without_a_network_names_the_file_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"fetch https://.*/mobilenet_v2-7ebf99e0.pth and put it at") as caught:
        load_pretrained("imagenet", num_classes=6)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
