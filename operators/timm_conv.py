"""Decoupled counterparts of timm's own convolutions, which are known by name: timm need not be installed.

``convert_decoupled`` makes them by changing a layer's class; they read the attributes that timm's layer has.
"""

import torch.nn.functional as F
from torch import Tensor

from operators.conv import DecoupledConv2d


class DecoupledConv2dSame(DecoupledConv2d):
    """Counterpart of timm's ``Conv2dSame``: padded as TensorFlow pads, by the size of the input."""

    plain = "timm.layers.conv2d_same:Conv2dSame"
    same_pad = True

    @property
    def effective_padding(self) -> int | tuple[int, int] | str:
        return "dynamic_same" if self.same_pad else self.padding


class DecoupledStdConv2d(DecoupledConv2d):
    """Counterpart of timm's ``StdConv2d``: the filters are ``(w - mean w) / sqrt(var w + eps)``.

    Source: Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019.
    """

    plain = "timm.layers.std_conv:StdConv2d"
    eps: float

    def effective_weight(self) -> Tensor:
        return self._standardised(None)

    def _standardised(self, gain: Tensor | None) -> Tensor:
        # Each filter is a channel of a batch of one.
        filters = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(filters, None, None, gain, training=True, eps=self.eps).reshape_as(self.weight)


class DecoupledStdConv2dSame(DecoupledStdConv2d, DecoupledConv2dSame):
    """Counterpart of timm's ``StdConv2dSame``."""

    plain = "timm.layers.std_conv:StdConv2dSame"


class DecoupledScaledStdConv2d(DecoupledStdConv2d):
    """Counterpart of timm's ``ScaledStdConv2d``: standardised filters times a learned ``gain`` / sqrt(fan-in).

    Source: Brock et al., Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets, 2021.
    """

    plain = "timm.layers.std_conv:ScaledStdConv2d"
    gain: Tensor
    scale: float

    def effective_weight(self) -> Tensor:
        return self._standardised((self.gain * self.scale).flatten())


class DecoupledScaledStdConv2dSame(DecoupledScaledStdConv2d, DecoupledConv2dSame):
    """Counterpart of timm's ``ScaledStdConv2dSame``."""

    plain = "timm.layers.std_conv:ScaledStdConv2dSame"


COUNTERPARTS: dict[str, type[DecoupledConv2d]] = {
    layer.plain: layer
    for layer in (
        DecoupledConv2d,
        DecoupledConv2dSame,
        DecoupledStdConv2d,
        DecoupledStdConv2dSame,
        DecoupledScaledStdConv2d,
        DecoupledScaledStdConv2dSame,
    )
}
