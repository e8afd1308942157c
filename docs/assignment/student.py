"""MobileNetV2: your implementation.

Replace the TODOs in order. handout.md explains the tasks and names the sections of the paper:

    Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    CVPR 2018, https://arxiv.org/abs/1801.04381

Grade this file as often as you like. The message names a missing TODO:

    python -m pytest tests/test_mobilenetv2.py --implementation docs/assignment/student.py
"""

import torch  # noqa: F401  (for torch.flatten and others)
from torch import nn

# The middle rows of Table 2. Each row is a group of n blocks. Only the first one has stride s.
#   t: expansion, the ratio of inner to input channels      c: output channels
#   n: number of blocks                                     s: stride of the first block
BOTTLENECKS = (
    # t,  c, n, s
    (1, 16, 1, 1),
    # TODO 4: add the other six rows.
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


def make_divisible(value, divisor=8):
    """Round a number of channels to the nearest multiple of `divisor`, never below 90% of `value`.

    The result is at least `divisor`. A half is rounded up.
    Examples: 32 -> 32, 11.2 -> 16 (8 is below 90%), 12 -> 16, 33.6 -> 32, 3 -> 8.
    """
    raise NotImplementedError("TODO 1: write make_divisible")


def convolution(in_channels, out_channels, kernel_size, stride=1, groups=1, activation=True):
    """Build convolution, BatchNorm and ReLU6: (N, in, H, W) -> (N, out, H/s, W/s).

    The convolution has no bias. With stride 1 it keeps height and width: choose the padding.
    activation=False leaves out ReLU6. Returns an nn.Sequential.
    """
    raise NotImplementedError("TODO 2: write convolution")


class InvertedResidual(nn.Module):
    """The bottleneck block (Table 1): expand, filter, project.

        input              operator                          output
        h × w × k          1×1 convolution, ReLU6            h × w × tk
        h × w × tk         3×3 depthwise, stride s, ReLU6    h/s × w/s × tk
        h/s × w/s × tk     1×1 convolution, linear           h/s × w/s × k'

    With t = 1 there is no first convolution. The input is added to the output where the stride is 1
    and the channels agree (k = k').

    Arguments: in_channels k, out_channels k', stride s (1 or 2), expansion t.
    """

    def __init__(self, in_channels, out_channels, stride, expansion):
        super().__init__()
        raise NotImplementedError("TODO 3: build the layers of a block")

    def forward(self, x):
        """Compute (N, k, H, W) -> (N, k', H/s, W/s)."""
        raise NotImplementedError("TODO 3: write the forward pass of a block")


class MobileNetV2(nn.Module):
    """The network of Table 2: stem, 17 blocks, head, average pooling, dropout and classifier.

    width_mult scales the channels of all layers, rounded by `make_divisible`. Below 1.0 the head
    keeps its 1280 channels.
    """

    def __init__(self, num_classes=1000, width_mult=1.0, dropout=0.2):
        super().__init__()
        channels = make_divisible(STEM_CHANNELS * width_mult)
        self.stem = convolution(3, channels, 3, stride=2)
        # TODO 4: add the 17 blocks of BOTTLENECKS, the head, dropout and the classifier.
        raise NotImplementedError(
            "TODO 4: build the blocks, the head, dropout and the classifier"
        )

    def forward(self, x):
        """Compute the logits: (N, 3, H, W) -> (N, num_classes)."""
        raise NotImplementedError("TODO 5: write the forward pass of the network")


if __name__ == "__main__":  # a first check of tasks 1 to 3: run this file
    assert [make_divisible(value) for value in (32, 11.2, 12, 33.6, 3)] == [32, 16, 16, 32, 8]
    block = InvertedResidual(16, 24, stride=2, expansion=6)
    assert block(torch.randn(2, 16, 8, 8)).shape == (2, 24, 4, 4)
    print("Tasks 1 to 3 have the correct numbers and shapes. Now run the grader.")
