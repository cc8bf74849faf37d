"""UniRepLKNet for time series: all times and channels of a node become one image, whose features a decoder reads.

Ding et al.: "UniRepLKNet", CVPR 2024, arXiv 2311.15599, section 3.3: the encoder of Corrformer
(`convatlas.networks.unireplknet.corrformer`) is replaced. Published training on Global Temp and Global Wind: the mean
squared error, Adam with lr 1e-4 halved after every epoch, one sample a batch, at most 10 epochs, stopped after 3
without improvement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from convatlas.networks.base import NetworkConfig
from convatlas.networks.unireplknet.backbone import UniRepLKNet, UniRepLKNetConfig, stage_kernels
from convatlas.networks.unireplknet.corrformer import CorrformerDecoder, decompose

__all__ = [
    "VARIANTS",
    "SeriesEmbedding",
    "UniRepLKNetSeries",
    "UniRepLKNetSeriesConfig",
    "forecast_errors",
    "image_to_series",
    "series_to_image",
]

#: By which the values of Global Temp and Global Wind are stored, and the published errors are not.
_STORED_SCALE = 10.0


def series_to_image(series: Tensor) -> Tensor:
    """Read the values of series (N, T, C) in their order in memory as square images (N, 1, S, S), S S = T C.

    Raises:
        ValueError: T C is no square number, or series is not (N, T, C).
    """
    side = math.isqrt(math.prod(series.shape[1:]))
    if series.dim() != 3 or side * side != series.shape[1] * series.shape[2]:
        raise ValueError(f"series must be (N, T, C) with a square number T * C of values, got {tuple(series.shape)}")
    return series.flatten(1).unflatten(1, (1, side, side))


def image_to_series(maps: Tensor) -> Tensor:
    """Read the values of maps (N, C, H, W) in their order in memory as series (N, H W, C); no axis moves."""
    if maps.dim() != 4:
        raise ValueError(f"maps must be (N, C, H, W), got {tuple(maps.shape)}")
    return maps.flatten(1).unflatten(1, (maps.shape[2] * maps.shape[3], maps.shape[1]))


def forecast_errors(prediction: Tensor, target: Tensor, scale: float = _STORED_SCALE) -> tuple[float, float]:
    """Mean squared and mean absolute error of what is stored ``scale`` times as large, as published."""
    difference = (prediction.double() - target.double()) / scale
    return float(difference.square().mean()), float(difference.abs().mean())


class SeriesEmbedding(nn.Module):
    """The sum of a circular convolution over the values, a projection of the time and one of the places of a node.

    Args:
        in_channels: series of a node.
        channels: channels of the embedding.
        time_features: numbers that tell the time; 4 for hourly data.
    """

    def __init__(self, in_channels: int, channels: int, time_features: int = 4) -> None:
        super().__init__()
        self.values = nn.Conv1d(in_channels, channels, 3, padding=1, padding_mode="circular", bias=False)
        self.time = nn.Linear(time_features, channels, bias=False)
        self.place = nn.Linear(3 * in_channels, channels)

    def forward(self, series: Tensor, time: Tensor, positions: Tensor) -> Tensor:
        """Embed (B, N, T, in_channels) at times (B, T, time_features) and places (N, 3 in_channels): (B, N, T, C)."""
        values = self.values(series.flatten(0, 1).transpose(1, 2)).transpose(1, 2).unflatten(0, series.shape[:2])
        return values + self.time(time).unsqueeze(1) + self.place(positions).unsqueeze(1)


_S = UniRepLKNetConfig(
    depths=(3, 3, 27, 3),
    dims=(96, 192, 384, 768),
    kernel_sizes=stage_kernels((3, 3, 27, 3), period=3, last=11),
    drop_path=0.4,
    in_channels=1,
    num_classes=0,
)


@dataclass(frozen=True, kw_only=True)
class UniRepLKNetSeriesConfig(NetworkConfig):
    """Config of `UniRepLKNetSeries`.

    Attributes:
        network: the encoder, for images of one channel.
        tree: children of the nodes at each level; their product is the number of nodes.
        node_series: series (stations) of each node.
        length, label_length, horizon: times that are known, those of them that the decoder sees, and those to foretell.
        dim: channels of the embedding, which are those of the encoder's last stage.
        num_heads, hidden_channels, depth, window, factor, num_layers: of the decoder.
        time_features: numbers that tell the time.
        dropout: in embedding and decoder.
    """

    network: UniRepLKNetConfig = field(default_factory=lambda: _S)
    tree: tuple[int, ...] = (7, 50)
    node_series: int = 11
    length: int = 48
    label_length: int = 24
    horizon: int = 24
    dim: int = 768
    num_heads: int = 16
    hidden_channels: int = 2048
    depth: int = 1
    window: int = 25
    factor: float = 1.0
    num_layers: int = 3
    time_features: int = 4
    dropout: float = 0.05

    def build(self) -> UniRepLKNetSeries:
        return UniRepLKNetSeries(self)


class UniRepLKNetSeries(nn.Module):
    """Forecast many series that lie at places: normalise, embed, encode as images, decode, undo the normalisation.

    The series of a node stand beside each other. Their places are set once by `set_positions`.

    Args:
        config: what to build.

    Raises:
        ValueError: dim is not the width of the encoder's last stage, an image would not be square, or label_length is
            longer than length.
    """

    positions: Tensor

    def __init__(self, config: UniRepLKNetSeriesConfig) -> None:
        super().__init__()
        if config.network.in_channels != 1 or config.network.dims[-1] != config.dim:
            raise ValueError(
                f"the network must take 1 channel and end in dim = {config.dim} channels, got "
                f"{config.network.in_channels} and {config.network.dims[-1]}"
            )
        if not 0 < config.label_length <= config.length:
            raise ValueError(f"label_length must be from 1 to length {config.length}, got {config.label_length}")
        if math.isqrt(config.length * config.dim) ** 2 != config.length * config.dim:
            raise ValueError(f"length * dim must be a square number, got {config.length} * {config.dim}")
        self.config = config
        self.nodes = math.prod(config.tree)
        count = config.node_series
        self.affine_weight = nn.Parameter(torch.ones(count))
        self.affine_bias = nn.Parameter(torch.zeros(count))
        self.encoder_embedding = SeriesEmbedding(count, config.dim, config.time_features)
        self.decoder_embedding = SeriesEmbedding(count, config.dim, config.time_features)
        self.dropout = nn.Dropout(config.dropout)
        self.network = UniRepLKNet(config.network.override(num_classes=0))
        self.network.norm = nn.Identity()
        self.decoder = CorrformerDecoder(
            config.dim,
            config.num_heads,
            count,
            length=config.label_length + config.horizon,
            tree=config.tree,
            depth=config.depth,
            window=config.window,
            hidden_channels=config.hidden_channels,
            factor=config.factor,
            num_layers=config.num_layers,
            dropout=config.dropout,
        )
        self.register_buffer("positions", torch.zeros(self.nodes, 3 * count))

    def set_positions(self, positions: Tensor) -> None:
        """Set the places (series, 3) of all series, e.g. longitude, latitude, height; they are standardised.

        Raises:
            ValueError: there are not so many.
        """
        count = self.nodes * self.config.node_series
        if tuple(positions.shape) != (count, 3):
            raise ValueError(f"positions must be ({count}, 3), got {tuple(positions.shape)}")
        wide = positions.double()
        standard = (wide - wide.mean(0)) / wide.std(0, correction=0).clamp_min(1e-12)
        self.positions.copy_(standard.reshape_as(self.positions))

    def forward(self, series: Tensor, time: Tensor | None = None, future_time: Tensor | None = None) -> Tensor:
        """Forecast (B, horizon, series) of series (B, length, series).

        Args:
            series: the known values.
            time: features of their times, (B, length, time_features); zeros when left out.
            future_time: features of the times to foretell, (B, horizon, time_features); zeros when left out.

        Raises:
            ValueError: an argument has another shape.
        """
        config = self.config
        batch, features = series.shape[0], config.time_features
        time = series.new_zeros(batch, config.length, features) if time is None else time
        future_time = series.new_zeros(batch, config.horizon, features) if future_time is None else future_time
        self._check(series, time, future_time)
        nodes = series.unflatten(2, (self.nodes, -1)).transpose(1, 2)  # (B, N, T, series of a node)
        wide = nodes.to(torch.promote_types(nodes.dtype, torch.float32))
        mean = wide.mean(2, keepdim=True)
        deviation = (wide.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        known = ((wide - mean) / deviation).to(self.affine_weight.dtype) * self.affine_weight + self.affine_bias

        embedded = self.dropout(self.encoder_embedding(known, time, self.positions)).flatten(0, 1)
        encoded = image_to_series(self.network.forward_maps(series_to_image(embedded))[-1])

        seasonal, trend = decompose(known.flatten(0, 1), config.window)
        level = known.flatten(0, 1).mean(1, keepdim=True).expand(-1, config.horizon, -1)
        seasonal = torch.cat([seasonal[:, -config.label_length :], torch.zeros_like(level)], dim=1)
        trend = torch.cat([trend[:, -config.label_length :], level], dim=1)
        times = torch.cat([time[:, -config.label_length :], future_time], dim=1)
        start = self.decoder_embedding(seasonal.unflatten(0, known.shape[:2]), times, self.positions)
        seasonal, trend = self.decoder(self.dropout(start).flatten(0, 1), encoded, trend)

        forecast = (seasonal + trend)[:, -config.horizon :].unflatten(0, known.shape[:2])
        forecast = (forecast - self.affine_bias) / (self.affine_weight + 1e-10) * deviation + mean
        return forecast.to(series.dtype).transpose(1, 2).flatten(2)

    def _check(self, series: Tensor, time: Tensor, future_time: Tensor) -> None:
        config = self.config
        wanted = {
            "series": (series, (config.length, self.nodes * config.node_series)),
            "time": (time, (config.length, config.time_features)),
            "future_time": (future_time, (config.horizon, config.time_features)),
        }
        for name, (given, shape) in wanted.items():
            if given.dim() != 3 or tuple(given.shape[1:]) != shape:
                raise ValueError(f"{name} must be (B, {shape[0]}, {shape[1]}), got {tuple(given.shape)}")

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random series and times."""
        config = self.config
        series = torch.randn(batch, config.length, self.nodes * config.node_series)
        time = torch.rand(batch, config.length + config.horizon, config.time_features) - 0.5
        return series, time[:, : config.length], time[:, config.length :]


VARIANTS: dict[str, UniRepLKNetSeriesConfig] = {"unireplknet_s_weather": UniRepLKNetSeriesConfig()}
