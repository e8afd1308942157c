"""The machinery of the grader. The criteria are the first part of test_mobilenetv2.py.

    python -m pytest tests/test_mobilenetv2.py --implementation path/to/student.py

The grader looks at the layers that run, not at the names of modules. Terms used here:

    submission   the class MobileNetV2 of one file, its network, and the records of its forward
                 passes
    record       the convolutions, linear layers and BatchNorm layers of one forward pass, in
                 order
    structure    number, channels, kernels and strides of the layers. It is checked first, on a
                 small image and without copies of tensors. A network with another structure is
                 not examined further, so that a network without strides needs little memory
                 and time.
"""

import contextlib
import functools
import importlib.util
import inspect
import io
import math
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent

# Criteria in the order in which they are checked: name -> points.
# docs/assignment has the same table.
CRITERIA = {
    "layers": 10,
    "channels": 10,
    "strides": 10,
    "normalisation": 10,
    "activation": 10,
    "linear bottleneck": 10,
    "shortcut": 10,
    "training and eval mode": 10,
    "parameters and multiply-adds": 5,
    "gradients": 10,
    "width": 5,
}

# Pixels per side of the test images. The first size that the network accepts is used.
SIZES = (64, 32, 224)
TIME_LIMIT = 8  # seconds for all of a student's code, its import included
WEIGHT_LIMIT = 300e6  # bytes of all weights; a correct network has 14 MB
# Bytes of one tensor in forward. A correct network has at most 10 MB, at 224 pixels.
FEATURE_LIMIT = 64e6

# Table 2 of the paper once more, so that the grader does not trust the project's own table.
# The columns are t, c, n and s.
TABLE_2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

LIMIT = "the grader's limit (the line itself may be correct)"

# Names of arguments that the grader accepts, without capitals and underscores.
# The first of each is the usual one.
CLASS_NAMES = (
    "num_classes",
    "numclasses",
    "nclasses",
    "nclass",
    "numclass",
    "classes",
    "classnum",
    "classcount",
    "nbclasses",
)
WIDTH_NAMES = (
    "width_mult",
    "widthmult",
    "widthmultiplier",
    "width",
    "alpha",
    "multiplier",
    "widthcoefficient",
)
INPUT_NAMES = (
    "in_channels",
    "inchannels",
    "inchannel",
    "inputchannels",
    "inputchannel",
    "inch",
    "chin",
    "channels",
)


class GraderLimit(BaseException):
    """The student's code needs too much time or memory.

    This is a BaseException, because `except Exception` must not catch it.
    """


# --------------------------------------------------------------------------------------- layers


@dataclass
class Norm:
    """A BatchNorm that ran."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    uses_batch: bool  # statistics of the batch, as in training mode
    given: torch.Tensor = None


@dataclass
class Layer:
    """A convolution or linear layer, as Table 2 wants it or as it ran."""

    in_channels: int
    out_channels: int
    kernel: tuple  # pixels
    stride: tuple
    groups: int
    size: int  # pixels per side of the output
    name: str = ""  # its place in Table 2
    linear: bool = False
    in_size: int = 1  # pixels per side of the input
    dilation: tuple = (1, 1)
    shares_input: bool = False  # with another convolution shortly before
    weight: torch.Tensor = None
    bias: torch.Tensor = None
    taken: torch.Tensor = None  # copy of the input
    given: torch.Tensor = None  # copy of the output, unless BatchNorm follows
    norm: Norm = None  # the BatchNorm that follows directly

    def output(self):
        """Return the output, after BatchNorm if that follows directly."""
        return self.norm.given if self.norm else self.given


@dataclass
class Dropout:
    """A dropout that was active."""

    after: int  # number of layers that ran before
    behind_norm: bool  # nothing but BatchNorm came after the last layer
    module: nn.Module  # None for functional.dropout
    line: str  # of the student's file


class Record(TorchDispatchMode):
    """Record the layers of one forward pass, in whatever style the network is written.

    Dropout keeps every value while a record is made, so that training mode is not random.
    copies: also copy the tensors that enter and leave each layer, because a network may change
    them in place.
    """

    def __init__(self, size, copies=False):
        super().__init__()
        self.size, self.copies = size, copies
        self.layers, self.norms, self.dropouts = [], [], []
        self.used = []  # (weight or statistic, index of its layer), in order of use
        self.recent = []  # inputs of the last convolutions
        self.since = []  # names of the operators since the last layer
        self.logits = self.error = None
        self.reported = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operator of PyTorch, and record it.

        Names and arguments were tried with torch 2.14.
        """
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "bernoulli_" and not any(isinstance(p, torch.Tensor) for p in args[1:]):
            # functional.dropout makes its mask in this way.
            self.add_dropout()
            return args[0].fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if name == "native_dropout":
            self.add_dropout()
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        is_layer = name in ("convolution", "addmm", "mm")
        # The input is the first argument, except in addmm(bias, x, weight).
        taken = args[name == "addmm"].clone() if is_layer and self.copies else None
        follows = name == "native_batch_norm" and self.follows_layer(args[0])
        result = function(*args, **kwargs)
        given = result[0] if isinstance(result, tuple | list) and result else result
        limit_size(given, args)
        if is_layer:
            self.add_layer(name, args, taken, given)
        elif name == "native_batch_norm":
            self.add_norm(args, given, follows)
        else:
            self.since.append(name)
        return result

    def add_layer(self, name, args, taken, given):
        if name == "convolution":
            x, weight, bias = args[:3]
            shape = tuple(weight.shape[2:]), tuple(args[3]), args[8], given.shape[-1]
            layer = Layer(x.shape[1], given.shape[1], *shape)
            layer.in_size, layer.dilation = x.shape[-1], tuple(args[5])
            layer.shares_input = any(x is other for other in self.recent)
            self.recent = [*self.recent[-2:], x]
        else:
            x, weight = args[-2:]
            weight, bias = weight.t(), args[0] if name == "addmm" else None
            layer = Layer(x.shape[1], given.shape[1], (1, 1), (1, 1), 1, 1, linear=True)
        layer.weight, layer.bias = weight, bias
        layer.taken, layer.given = taken, given.clone() if self.copies else None
        self.layers.append(layer)
        index = len(self.layers) - 1
        self.used += [(tensor, index) for tensor in (weight, bias) if tensor is not None]
        self.since = []

    def add_norm(self, args, given, follows):
        norm = Norm(args[1], args[2], args[3], args[5], given.clone() if self.copies else None)
        self.norms.append(norm)
        index = len(self.layers) - 1
        self.used += [(tensor, index) for tensor in args[1:5] if tensor is not None]
        if follows:
            self.layers[-1].norm, self.layers[-1].given = norm, None
            self.since = []

    def follows_layer(self, x):
        """Return whether BatchNorm's input x is the output of the last layer."""
        if not self.layers or self.layers[-1].norm:
            return False
        return same(x, self.layers[-1].given) if self.copies else not self.since

    def add_dropout(self):
        module, line = None, ""
        frame = sys._getframe(2)
        while frame and not line:
            file = Path(frame.f_code.co_filename)
            if not is_library(file):
                line = f"{file.name}, line {frame.f_lineno}"
            elif file.name == "dropout.py":
                module = frame.f_locals.get("self", module)
            frame = frame.f_back
        # The mask is made first: these operators change no feature.
        behind_norm = set(self.since) <= {
            "empty_like",
            "empty",
            "new_empty",
            "new_ones",
            "ones",
            "clone",
            "detach",
            "view",
        }
        self.dropouts.append(Dropout(len(self.layers), behind_norm, module, line))


def is_library(file):
    """Return whether a file of a traceback is PyTorch's or the grader's, not the student's."""
    folders = Path(torch.__file__).parent, Path(__file__).parent
    in_folders = any(Path(file).is_relative_to(folder) for folder in folders)
    return in_folders or str(file).startswith("<frozen")


def limit_size(tensor, args):
    """Raise GraderLimit if a tensor is too large and not a view of its operator's input."""
    size = tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
    if size > FEATURE_LIMIT and not (
        isinstance(args[0], torch.Tensor) and args[0].data_ptr() == tensor.data_ptr()
    ):
        raise GraderLimit(
            f"a tensor of shape {tuple(tensor.shape)} needs {size / 1e6:,.0f} MB"
        )


@contextlib.contextmanager
def limit_weights():
    """Stop the building of a network as soon as it has too many weights.

    It stops before these weights are initialised.
    """
    total = 0

    def count(module, name, parameter):
        nonlocal total
        total += (
            0
            if parameter is None or nn.parameter.is_lazy(parameter)
            else parameter.numel() * parameter.element_size()
        )
        if total > WEIGHT_LIMIT:
            kind = type(module).__name__
            raise GraderLimit(
                f"with this {kind} the network has {total / 1e6:,.0f} MB of weights, expected 14 MB"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def same(one, other):
    """Return whether two tensors are equal except for rounding.

    `other` may have a border of zeros: explicit padding.
    """
    border = other.shape[-1] - one.shape[-1]
    if one.dim() == other.dim() == 4 and border > 0:
        inside = slice(border // 2, -(border - border // 2))
        other = other[:, :, inside, inside]
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= 1e-4 * one.abs().max())


@functools.lru_cache
def expected_layers(width=1.0, size=224, expand_first=False):
    """Return the 53 layers of Table 2 for images of `size` pixels, with their places in it.

    expand_first: with a 1×1 convolution for t = 1, too. That is no fault of the structure; see
    `Submission.expected`.
    """

    def scaled(channels):
        # As in the paper's reference implementation: a multiple of 8, not below 90%.
        rounded = max(8, int(channels * width + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * channels * width else rounded + 8

    channels, size = scaled(32), size // 2
    layers = [
        Layer(3, channels, (3, 3), (2, 2), 1, size, "row 1 of Table 2 (the stem, conv2d 3×3)")
    ]
    for row, (t, c, n, s) in enumerate(TABLE_2, start=2):
        for block in range(n):
            name = (
                f"row {row} of Table 2 (t={t}, c={c}, n={n}, s={s}), block {block + 1} of {n}"
            )
            stride, wide = s if block == 0 else 1, channels * t
            if t > 1 or expand_first:
                layers.append(
                    Layer(channels, wide, (1, 1), (1, 1), 1, size, f"{name}, expansion")
                )
            size //= stride
            layers.append(
                Layer(
                    wide,
                    wide,
                    (3, 3),
                    (stride, stride),
                    wide,
                    size,
                    f"{name}, depthwise convolution",
                )
            )
            layers.append(
                Layer(wide, scaled(c), (1, 1), (1, 1), 1, size, f"{name}, projection")
            )
            channels = layers[-1].out_channels
    head = max(1280, scaled(1280))
    layers.append(
        Layer(
            channels, head, (1, 1), (1, 1), 1, size, "row 9 of Table 2 (the head, conv2d 1×1)"
        )
    )
    return [
        *layers,
        Layer(head, 1000, (1, 1), (1, 1), 1, 1, "row 11 of Table 2 (the classifier)"),
    ]


def count_products(layers):
    """Count the multiply-adds.

    Each output is a sum of kernel area × input channels / groups products.
    """
    return sum(
        layer.size**2
        * layer.out_channels
        * math.prod(layer.kernel)
        * layer.in_channels
        // layer.groups
        for layer in layers
    )


def randomise(model):
    """Randomise all weights and statistics, so that no two layers are interchangeable."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim():
            if "var" in name:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(std=1.0 if tensor.dim() == 1 else tensor[0].numel() ** -0.5)
    return model


# ------------------------------------------------------------------------------- the submission


def expect(correct, message):
    """Fail with the message alone.

    It is for students, and a traceback would show the grader's code.
    """
    if not correct:
        pytest.fail(message, pytrace=False)


class Submission:
    """The class MobileNetV2 of one file, its network, and the records of its forward passes."""

    def __init__(self, network_class=None):
        self.network_class = network_class
        self.seconds = TIME_LIMIT  # left for the student's code
        self.failed = None  # the first criterion that failed
        self.stopped = None  # the first failed criterion after which nothing can be judged
        self.records = {}

    @contextlib.contextmanager
    def contain(self):
        """Run a student's code without its prints and warnings.

        Raise GraderLimit when its time is up.
        """

        def stop(*_):
            raise GraderLimit(f"it takes more than {TIME_LIMIT} seconds")

        start = time.monotonic()
        can_stop = (
            hasattr(signal, "SIGALRM")
            and threading.current_thread() is threading.main_thread()
        )
        handler = can_stop and signal.signal(signal.SIGALRM, stop)
        try:
            if can_stop:
                signal.setitimer(signal.ITIMER_REAL, max(0.01, self.seconds))
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            if can_stop:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, handler)
            self.seconds -= time.monotonic() - start

    def attempt(self, what, function, hint=lambda fault: ""):
        """Call a student's code.

        An exception fails the test with the student's line, not with a page of PyTorch's.
        """
        try:
            with self.contain():
                return function()
        except (Exception, SystemExit, GraderLimit) as error:
            frames = [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if not is_library(frame.filename)
            ]
            place = [
                f"{Path(frame.filename).name}, line {frame.lineno} ({frame.line})"
                for frame in frames[-1:]
            ]
            reason = " ".join(str(error).split())
            kind = type(error).__name__
            if (
                isinstance(error, GraderLimit | MemoryError)
                or "allocate memory" in reason
                or "enough memory" in reason
            ):
                kind = LIMIT
            fault = ": ".join([what, *place, kind, reason])
        fault += hint(fault)
        expect(False, fault if fault.endswith((".", ")")) else f"{fault}.")
        return None

    @property
    def expands_first(self):
        """Whether the first block has an expansion with t = 1.

        That is against a convention, but all other criteria can be judged.
        """
        layers = self.structure.layers
        if len(layers) != 54:
            return False
        return layers[1].kernel == (1, 1) and layers[1].out_channels == 32

    def expected(self, width=1.0, size=224):
        return expected_layers(width, size, self.expands_first)

    # --------------------------------------------------------------------------------- building

    @functools.cached_property
    def parameters(self):
        """Parameters of MobileNetV2(...), by name."""
        with contextlib.suppress(TypeError, ValueError):
            return dict(inspect.signature(self.network_class).parameters)
        return {}

    @property
    def signature(self):
        return f"({', '.join(map(str, self.parameters.values()))})"

    def accepts(self, names):
        """Return the parameter that has one of `names`.

        Without one, return the first of `names` if there is a **kwargs, and None otherwise.
        """
        known = next(
            (name for name in self.parameters if name.lower().replace("_", "") in names), None
        )
        any_name = any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters.values()
        )
        return known or (names[0] if any_name else None)

    def takes_classes_first(self):
        """Return whether the first parameter is probably num_classes under another name."""
        first = next(iter(self.parameters.values()), None)
        if (
            first is None
            or re.search("chan|input|size|width|alpha|mult|in_|dropout", first.name)
            or first.kind > 1
        ):
            return False
        return first.default is first.empty or (
            isinstance(first.default, int) and first.default >= 2
        )

    def build(self, classes=1000, width=None):
        """Build the network. Returns it in eval mode."""
        named, first = {}, []
        if self.accepts(CLASS_NAMES):
            named[self.accepts(CLASS_NAMES)] = classes
        elif self.takes_classes_first():
            first = [classes]
        channels = self.parameters.get(self.accepts(INPUT_NAMES))
        if channels is not None and channels.default is channels.empty:
            named[channels.name] = 3
        if width is not None:
            named[self.accepts(WIDTH_NAMES)] = width
        by_name = [f"{name}={value}" for name, value in named.items()]
        call = ", ".join([*map(str, first), *by_name])

        def hint(fault):
            if "TypeError" not in fault:
                return ""
            wanted = "num_classes=1000, width_mult=1.0, and defaults for all others"
            return f". The parameters are {self.signature}; expected {wanted}."

        with limit_weights():
            construct = functools.partial(self.network_class, *first, **named)
            network = self.attempt(f"MobileNetV2({call}) cannot be built", construct, hint)
        expect(
            isinstance(network, nn.Module),
            "MobileNetV2 is not an nn.Module; write class MobileNetV2(nn.Module).",
        )
        borrowed = [
            module
            for module in network.modules()
            if type(module).__module__.startswith("torchvision.models")
        ]
        kind = type(borrowed[0]).__name__ if borrowed else ""
        expect(
            not borrowed or borrowed[0] is network,
            f"the network uses torchvision's {kind}; write all parts yourself.",
        )
        return network.eval()

    @functools.cached_property
    def network(self):
        """The network with num_classes=1000 and default width."""
        torch.manual_seed(0)
        return self.build()

    # ---------------------------------------------------------------------------------- forward

    def forward(self, images, record=None, network=None, note=""):
        """Return the logits of a forward pass that must succeed."""

        def run():
            with record or contextlib.nullcontext():
                return (network or self.network)(images)

        def hint(fault):
            return explain_error(fault, record.layers if record else [])

        side = images.shape[-1]
        what = f"{note}forward fails for images of {side} × {side} pixels"
        logits = self.attempt(what, run, hint)
        kind = type(logits).__name__
        fix = "is a return missing?" if logits is None else "return the logits alone"
        expect(
            isinstance(logits, torch.Tensor),
            f"forward returns {kind}, expected one tensor of logits ({fix}).",
        )
        return logits

    def record_structure(self, size, network=None, note=""):
        """Record the layers that run, without copies of tensors."""
        record = Record(size)
        with torch.no_grad():
            record.logits = self.forward(torch.randn(2, 3, size, size), record, network, note)
        return record

    @functools.cached_property
    def structure(self):
        """The record for the first of SIZES that the network accepts.

        If there is none, `error` says why.
        """
        network, failed = self.network, None
        for size in SIZES:
            record = Record(size)
            try:
                with torch.no_grad():
                    images = torch.randn(2, 3, size, size)
                    record.logits = self.forward(images, record, network)
                return record
            except pytest.fail.Exception as failure:
                record.error = str(failure)
                # The student's own error tells more than the grader's limit.
                if failed is None or LIMIT not in record.error:
                    failed = record
        return failed

    def record(self, training=False):
        """Record a forward pass of two images through random weights, and copy the tensors."""
        if training not in self.records:
            torch.manual_seed(0)
            size = self.structure.size
            images = torch.randn(2, 3, size, size)
            network = randomise(self.network).train(training)
            record = Record(size, copies=True)
            record.images = images.clone()
            record.buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
            note = "in training mode, " if training else ""
            try:
                with torch.no_grad():
                    record.logits = self.forward(images, record, note=note)
                record.changed = {
                    n
                    for n, b in network.named_buffers()
                    if not torch.equal(b, record.buffers[n])
                }
            except pytest.fail.Exception as failure:
                record.error = str(failure)
            network.eval()
            self.records[training] = record
        record = self.records[training]
        if record.error and record.reported:
            pytest.skip(f"because of {self.failed}")
        record.reported = True
        expect(record.error is None, record.error)
        return record

    def pairs(self, training=False):
        """Return pairs (layer as it ran, layer as Table 2 wants it)."""
        record = self.record(training)
        expected = self.expected(size=record.size)
        note = "in training mode, " if training else ""
        expect(
            len(record.layers) == len(expected),
            f"{note}{len(record.layers)} layers run, expected {len(expected)}.",
        )
        return list(zip(record.layers, expected, strict=True))


def explain_error(fault, layers):
    """Return a hint for PyTorch's message about shapes that do not fit, or an empty text."""
    shapes = re.search(r"\(\d+x(\d+) and (\d+)x\d+\)", fault)
    if shapes:
        found, wanted = map(int, shapes.groups())
        side = math.isqrt(found // wanted)
        convolutions = [layer for layer in layers if not layer.linear]
        if len(convolutions) < 20:
            return (
                f". {len(convolutions)} of 52 convolutions ran before the classifier: the blocks"
                " are missing. Table 2 has 17 blocks between stem and head."
            )
        if found == wanted * side * side and side > 1:
            return (
                f". {found} = {wanted} · {side} · {side}: the pooling in front of the classifier"
                " is not global. Row 10 of Table 2 takes the average of all places; write"
                " x.mean(dim=(2, 3)) or nn.AdaptiveAvgPool2d(1)."
            )
        if found == convolutions[-1].out_channels == 320:
            return (
                ". The head is missing: after the blocks, row 9 of Table 2 has a 1×1 convolution"
                " from 320 to 1280 channels."
            )
    if "must match the size" in fault and "dimension 1" in fault:
        return " (a shortcut is only where the channels agree)"
    if "must match the size" in fault:
        return (
            " (a 3×3 convolution has padding=1 and a 1×1 none, so that only strides make feature"
            " maps smaller; a shortcut is only where the stride is 1)"
        )
    return ""


def criterion(name, stops=False):
    """Mark a test as part of a criterion.

    stops: after a failure nothing else can be judged, so later tests are skipped.
    """
    assert name in CRITERIA

    def decorate(test):
        @functools.wraps(test)
        def run(submission, **arguments):
            if submission.stopped:
                pytest.skip(f"because of {submission.stopped}")
            try:
                test(submission, **arguments)
            except pytest.skip.Exception:
                raise
            except BaseException:
                submission.failed = submission.failed or name
                if stops:
                    submission.stopped = submission.stopped or name
                raise

        return pytest.mark.criterion(name)(run)

    return decorate


@dataclass
class Reference:
    """torchvision's network with random weights and statistics of real feature maps."""

    network: nn.Module
    learned: list  # weights and statistics in order of use
    images: torch.Tensor
    direction: torch.Tensor  # the loss is the sum of logits · direction

    def run(self, training):
        """Return logits and gradients: of the image, then of all parameters in order of use."""
        for tensor, value in zip(self.used, self.learned, strict=True):
            tensor.data.copy_(value)
        parameters = {id(parameter) for parameter in self.network.parameters()}
        self.network.train(training).zero_grad()
        images = self.images.clone().requires_grad_()
        logits = self.network(images)
        (logits * self.direction).sum().backward()
        return logits.detach(), [
            images.grad,
            *(tensor.grad for tensor in self.used if id(tensor) in parameters),
        ]


@functools.lru_cache(maxsize=2)
def reference(size):
    torch.manual_seed(1)
    network = randomise(torchvision.models.MobileNetV2(dropout=0.0))
    images = torch.randn(2, 3, size, size)
    # With random statistics the logits would hardly depend on the image. Therefore the network
    # takes the statistics of real feature maps.
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
            layer.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    record = Record(size)
    with torch.no_grad(), record:
        network.eval()(images)
    found = Reference(network, [], torch.randn(2, 3, size, size), torch.randn(2, 1000))
    by_address = {
        tensor.data_ptr(): tensor for tensor in [*network.parameters(), *network.buffers()]
    }
    found.used = [by_address[tensor.data_ptr()] for tensor, _ in record.used]
    found.learned = [tensor.detach().clone() for tensor in found.used]
    found.results = {training: found.run(training) for training in (False, True)}
    return found


# ------------------------------------------------------------------------------------- the file


def load_submission(path):
    """Return the Submission of a student's file.

    Raises UsageError, which pytest prints in one line.
    """

    def refuse(reason):
        raise pytest.UsageError(f"--implementation {path}: {reason}")

    submission = Submission()
    modules = {
        name: sys.modules.pop(name)
        for name in [file.stem for file in ROOT.glob("*.py")]
        if name in sys.modules
    }
    # The file may import others beside it, even one called data.py.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec = importlib.util.spec_from_file_location("implementation", path.resolve())
        module = sys.modules["implementation"] = importlib.util.module_from_spec(spec)
        with submission.contain():
            spec.loader.exec_module(module)
    except (Exception, SystemExit, GraderLimit) as error:
        # A student's file may raise anything.
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path.resolve())
        ]
        kind = "the grader's limit" if isinstance(error, GraderLimit) else type(error).__name__
        place = f", line {frames[-1].lineno}" if frames else ""
        reason = " ".join(str(error).split())
        fix = (
            "give a Python file with a class MobileNetV2; put code that trains or prints under"
            " if __name__ == '__main__':"
        )
        if isinstance(error, ModuleNotFoundError):
            fix = (
                "remove the import, or put it under if __name__ == '__main__': if the network"
                " does not need it"
            )
        refuse(f"{kind}{place}: {reason} ({fix})")
    finally:
        sys.path.pop(0)
        sys.modules.update(modules)
    if not hasattr(module, "MobileNetV2"):
        classes = [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == "implementation"
        ]
        found = "it has no class at all"
        if classes:
            found = f"its classes are {', '.join(classes)}"
        refuse(f"no class MobileNetV2; {found} (rename the network's class to MobileNetV2)")
    found = module.MobileNetV2
    if not inspect.isclass(found):
        refuse(f"MobileNetV2 is {found!r}, not a class (write class MobileNetV2(nn.Module))")
    if any(base.__module__.startswith("torchvision") for base in found.__mro__):
        refuse("MobileNetV2 is torchvision's class or a subclass of it (write it yourself)")
    submission.network_class = found
    return submission


# ------------------------------------------------------------------------------------ the score


class Score:
    """Outcomes of the tests, by criterion."""

    def __init__(self, file):
        self.file = file
        self.outcomes = {name: [] for name in CRITERIA}

    def add(self, name, outcome, message):
        self.outcomes[name].append((outcome, message))

    def status(self, name):
        """Return the outcome of a criterion, and the message of the first test that has it.

        The outcome is 'passed', 'failed', 'skipped' or 'not run'. A test that is skipped
        because of a later criterion does not count: layers can pass when strides fail.
        """
        later = [
            f"because of {other}" for other in list(CRITERIA)[list(CRITERIA).index(name) + 1 :]
        ]
        outcomes = [
            (outcome, message)
            for outcome, message in self.outcomes[name]
            if message not in later
        ]
        for status in ("failed", "skipped", "passed"):
            messages = [message for outcome, message in outcomes if outcome == status]
            if messages:
                return status, messages[0]
        return "not run", ""

    @property
    def points(self):
        return sum(
            points for name, points in CRITERIA.items() if self.status(name)[0] == "passed"
        )

    @property
    def complete(self):
        return self.points == sum(CRITERIA.values())

    def lines(self):
        """Return the lines of the summary.

        These are a line per criterion, the points, and the first message of each failed
        criterion.
        """
        width = max(map(len, CRITERIA)) + 2
        lines = []
        for name, points in CRITERIA.items():
            status, message = self.status(name)
            given = points if status == "passed" else 0
            reason = message if status == "skipped" else ""
            line = f"{name:<{width}}{status:<9}{given:>3} / {points:<5}{reason}"
            lines.append(line.rstrip())
        lines.append(f"{'total':<{width}}{'':<9}{self.points:>3} / {sum(CRITERIA.values())}")
        failed = [name for name in CRITERIA if self.status(name)[0] == "failed"]
        for name in failed:
            lines += [
                "",
                *textwrap.wrap(f"{name}: {self.status(name)[1]}", 100, break_on_hyphens=False),
            ]
        others = {self.status(name)[0] for name in CRITERIA if name != "width"}
        if others == {"passed"} and self.status("width")[0] != "passed":
            lines += [
                "",
                "Correct at width 1.0. The points of width are missing, so the exit code is 1.",
            ]
        elif len(failed) > 1:
            lines += ["", f"Begin with {failed[0]}: it may be the cause of the others."]
        return lines
