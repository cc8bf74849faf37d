"""What is delivered instead of a video, and how it is played: low resolution, small networks, and who enlarges what.

A package is a folder of four files: ``low.mp4``, the video at low resolution; ``networks.safetensors``, the weights of
all networks with what they are; ``chunks.bin``, the network of each patch; and ``config.yaml``, by which every verb
knows what the folder is.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from convatlas.data.video import Frame
from convatlas.errors import CheckpointError, DataError, unknown
from convatlas.files import atomic_path, write_bytes, write_text
from convatlas.networks.registry import model_config
from convatlas.restoration.chunk_fitting import without_halo
from convatlas.restoration.video_chunks import PatchGrid
from convatlas.surgery import merge
from convatlas.weights import read_checkpoint

__all__ = [
    "BYTES_OF",
    "CHUNKS",
    "LOW",
    "NETWORKS",
    "Described",
    "PackageBytes",
    "Playback",
    "Store",
    "is_package",
    "network_bytes",
    "pack_index",
    "pack_weights",
    "read_package",
    "unpack_index",
    "unpack_weights",
    "write_package",
]

Index = npt.NDArray[np.uint8]
#: How weights are kept in a package.
Store = Literal["float32", "float16", "int8"]

#: Bytes of a parameter.
BYTES_OF: dict[str, int] = {"float32": 4, "float16": 2, "int8": 1}
#: File of a package that holds the small clip.
LOW = "low.mp4"
#: File of a package that holds the weights of all networks.
NETWORKS = "networks.safetensors"
#: File of a package that holds the number of the network of each patch.
CHUNKS = "chunks.bin"
_CONFIG = "config.yaml"
#: Pixels of low resolution that go through a network together.
_BATCH = 2**18


# -- playing -----------------------------------------------------------------------------------------------------------


class Playback:
    """Enlarges frames by routing each patch to its network: one batch a network and frame.

    Args:
        networks: of one scale, in evaluation mode, by chunk.
        index: (frames, patches) uint8, the network of each patch.
        grid: of the patches.
        size: height and width of the frames that are shown; what the grid adds beyond is cut off.
        halo: pixels of low resolution that a patch sees of its neighbours.

    Raises:
        ValueError: a patch has no network, networks have different scales, or the index does not fit the grid.
    """

    def __init__(
        self, networks: Sequence[nn.Module], index: Index, grid: PatchGrid, size: tuple[int, int], *, halo: int = 0
    ) -> None:
        if index.ndim != 2 or index.shape[1] != len(grid):
            raise ValueError(f"index must be (frames, {len(grid)}), got {index.shape}")
        if index.size and int(index.max()) >= len(networks):
            raise ValueError(f"index asks for network {int(index.max())}, but there are {len(networks)}")
        scales = {int(getattr(network, "scale", 0)) for network in networks}
        if len(scales) != 1:
            raise ValueError(f"networks must have one scale, got {sorted(scales)}")
        self.networks, self.index, self.grid, self.size, self.halo = list(networks), index, grid, size, halo
        self.scale = scales.pop()

    @property
    def low_size(self) -> tuple[int, int]:
        """Height and width of the frames of low resolution."""
        height, width = self.grid.filled(*self.size, self.scale)
        return height // self.scale, width // self.scale

    @torch.inference_mode()
    def filled(self, frame: Frame, number: int) -> Frame:
        """The frame (H, W, 3) uint8 of some number, enlarged, with what the grid adds.

        Raises:
            ValueError: the frame has another size, or there is no such frame.
        """
        if frame.shape[:2] != self.low_size:
            raise ValueError(f"frames must be {self.low_size} pixels of low resolution, got {frame.shape[:2]}")
        if not 0 <= number < len(self.index):
            raise ValueError(f"there are networks for {len(self.index)} frames, got frame {number}")
        weight = next(self.networks[0].parameters())
        pixels = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))).to(weight.device, weight.dtype) / 255
        patches = self.grid.cut(pixels, self.halo)
        most = max(1, _BATCH // (patches.shape[-1] * patches.shape[-2]))
        height, width = (self.scale * (length - 2 * self.halo) for length in patches.shape[-2:])
        enlarged = patches.new_empty(len(patches), 3, height, width)
        for chunk in np.unique(self.index[number]):
            places = torch.from_numpy(np.flatnonzero(self.index[number] == chunk)).to(weight.device)
            for part in places.split(most):
                enlarged[part] = without_halo(self.networks[int(chunk)](patches[part]), self.scale * self.halo)
        shown = (self.grid.join(enlarged).clamp(0, 1) * 255).round().to(torch.uint8)
        return shown.permute(1, 2, 0).contiguous().cpu().numpy()

    def enlarge(self, frame: Frame, number: int) -> Frame:
        """The frame of some number as it is shown: (height, width, 3) uint8."""
        return np.ascontiguousarray(self.filled(frame, number)[: self.size[0], : self.size[1]])

    def play(self, frames: Iterable[Frame], advance: Callable[[], None] = lambda: None) -> Iterator[Frame]:
        """Every frame enlarged, one after the other.

        Raises:
            DataError: there are fewer or more frames than the networks are for.
        """
        number = -1
        for number, frame in enumerate(frames):
            if number == len(self.index):
                break
            yield self.enlarge(frame, number)
            advance()
        if number + 1 != len(self.index):
            more = "more" if number == len(self.index) else f"{number + 1}"
            raise DataError(f"the networks are for {len(self.index)} frames, the video has {more}")


# -- weights -----------------------------------------------------------------------------------------------------------


def network_bytes(parameters: int, store: Store, count: int = 1) -> int:
    """Bytes of the weights of several networks of equal size: count * parameters * bytes of one."""
    return count * parameters * BYTES_OF[store]


def pack_weights(state: Mapping[str, Tensor], store: Store) -> dict[str, Tensor]:
    """The tensors of a network joined into few, in the order of its state dict.

    Args:
        state: state dict of a network whose weight normalisation is folded.
        store: ``float32``; ``float16``; or ``int8``, where every output channel of a kernel has a scale of its own, its
            largest value over 127, and vectors stay in float16.

    Raises:
        UnknownName: store is unknown.
        ValueError: a weight is not finite, or too large for float16.
    """
    if store not in get_args(Store):
        raise unknown("store", str(store), get_args(Store))
    kernels = [tensor.float() for tensor in state.values() if tensor.dim() > 1 or store != "int8"]
    vectors = [tensor.float() for tensor in state.values() if tensor.dim() <= 1 and store == "int8"]
    limit = torch.finfo(torch.float32 if store == "float32" else torch.float16).max
    for name, tensor in state.items():
        if not tensor.isfinite().all() or ((store != "int8" or tensor.dim() <= 1) and tensor.abs().max() > limit):
            raise ValueError(f"weights must be finite and fit {store}, those of {name} do not")
    if store != "int8":
        return {"values": torch.cat([kernel.flatten() for kernel in kernels]).to(getattr(torch, store))}
    scales = [(kernel.flatten(1).abs().amax(1) / 127).clamp(min=1e-12) for kernel in kernels]
    steps = [(kernel.flatten(1) / scale[:, None]).round() for kernel, scale in zip(kernels, scales, strict=True)]
    return {
        "values": torch.cat([step.flatten() for step in steps]).to(torch.int8),
        "scales": torch.cat(scales),
        "vectors": torch.cat([*vectors, torch.zeros(0)]).half(),
    }


def unpack_weights(network: nn.Module, packed: Mapping[str, Tensor]) -> None:
    """Put back into a network what `pack_weights` made of its state dict, or of that of one like it.

    Raises:
        CheckpointError: these are the weights of another network.
    """
    joined = {name: tensor.float() for name, tensor in packed.items()}
    quantised = "scales" in joined
    places = dict.fromkeys(joined, 0)

    def take(name: str, count: int) -> Tensor:
        start = places[name]
        places[name] += count
        if places[name] > len(joined[name]):
            raise CheckpointError("the weights are those of a smaller network")
        return joined[name][start : start + count]

    state = {}
    for name, tensor in network.state_dict().items():
        if quantised and tensor.dim() <= 1:
            values = take("vectors", tensor.numel())
        elif quantised:
            values = take("values", tensor.numel()).view(len(tensor), -1) * take("scales", len(tensor))[:, None]
        else:
            values = take("values", tensor.numel())
        state[name] = values.view(tensor.shape)
    if any(places[name] != len(joined[name]) for name in joined):
        raise CheckpointError("the weights are those of a larger network")
    network.load_state_dict(state)


# -- which network a patch has -----------------------------------------------------------------------------------------


def pack_index(index: Index, k: int, *, compress: bool = True) -> bytes:
    """The network of each patch in ceil(log2 k) bits, or fewer: neighbours in time mostly share one.

    Args:
        index: (frames, patches), below k.
        k: number of networks.
        compress: whether the differences from frame to frame are coded by zlib instead.

    Raises:
        ValueError: k is not from 1 to 256, or a number is not below k.
    """
    if not 1 <= k <= 256:
        raise ValueError(f"k must be from 1 to 256, got {k}")
    if index.size and int(index.max()) >= k:
        raise ValueError(f"index must be below {k}, got {int(index.max())}")
    if compress:
        before = np.concatenate([np.zeros_like(index[:1]), index[:-1]])
        steps = (index.astype(np.int16) - before) % k
        return zlib.compress(steps.astype(np.uint8).tobytes(), 9)
    bits = (index.reshape(-1, 1) >> np.arange(_bits(k), dtype=np.uint8)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack_index(data: bytes, shape: tuple[int, int], k: int, *, compress: bool = True) -> Index:
    """The inverse of `pack_index`.

    Raises:
        DataError: the bytes are damaged or of another number of patches.
    """
    count = shape[0] * shape[1]
    if compress:
        try:
            steps = np.frombuffer(zlib.decompress(data), np.uint8)
        except zlib.error as error:
            raise DataError(f"the networks of the patches cannot be read: {error}") from None
        found = steps.reshape(shape).cumsum(0, dtype=np.int64) % k if len(steps) == count else steps
    else:
        width = _bits(k)
        bits = np.unpackbits(np.frombuffer(data, np.uint8))[: count * width].astype(np.int64)
        whole = len(bits) == count * width
        found = (bits.reshape(count, width) << np.arange(width)).sum(1) if whole else bits[:0]
    if found.size != count or (count and int(found.max()) >= k):
        raise DataError(f"the networks of the patches must be {count} numbers below {k}, got others")
    return found.reshape(shape).astype(np.uint8)


def _bits(k: int) -> int:
    return math.ceil(math.log2(k))


# -- packages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a package says of itself.

    Attributes:
        model, options: of the networks.
        count: number of networks.
        grid: rows and columns of patches.
        halo: pixels of low resolution that a patch sees of its neighbours.
        size: height and width of the frames.
        frames: number of frames.
        store: how weights are kept.
        compress: whether the networks of the patches are compressed.
        digest: of the frames, as far as a package can be told to belong to them.
        settings: of the task.
    """

    model: str
    options: dict[str, Any]
    count: int
    grid: tuple[int, int]
    halo: int
    size: tuple[int, int]
    frames: int
    store: Store
    compress: bool
    digest: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


class PackageBytes(NamedTuple):
    """Bytes of the files of a package."""

    low: int
    networks: int
    chunks: int
    config: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    @classmethod
    def of(cls, folder: str | Path) -> PackageBytes:
        """Measure the files."""
        return cls(*((Path(folder) / name).stat().st_size for name in (LOW, NETWORKS, CHUNKS, _CONFIG)))


def is_package(path: str | Path) -> bool:
    """Whether a folder is a package."""
    return all((Path(path) / name).is_file() for name in (NETWORKS, CHUNKS))


def write_package(folder: str | Path, networks: Sequence[nn.Module], index: Index, described: Described) -> None:
    """Write the networks and the index of a package beside its ``low.mp4``; weight normalisation is folded.

    Raises:
        OSError: a file cannot be written.
    """
    target = Path(folder)
    tensors: dict[str, Tensor] = {}
    for number, network in enumerate(networks):
        packed = pack_weights(merge(network).model.state_dict(), described.store)
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in packed.items()}
    write_bytes(target / CHUNKS, pack_index(index, max(1, len(networks)), compress=described.compress))
    write_text(target / _CONFIG, "task: video-delivery\n")
    with atomic_path(target / NETWORKS) as part:
        save_file(tensors, part, metadata={"convatlas": json.dumps(asdict(described), separators=(",", ":"))})


def read_package(folder: str | Path) -> tuple[Playback, Described]:
    """Rebuild the networks of a package, ready to play.

    Raises:
        DataError: it is no package, or a file of it is damaged.
        CheckpointError: the weights do not fit the networks, or those of a chunk are missing.
    """
    source = Path(folder)
    if not is_package(source):
        raise DataError(f"{folder} is no package: {NETWORKS} and {CHUNKS} must lie in it")
    checkpoint = read_checkpoint(source / NETWORKS)
    try:
        told = json.loads(checkpoint.metadata["convatlas"])
        told |= {name: tuple(told[name]) for name in ("grid", "size")}
        described = Described(**told)
    except (KeyError, TypeError, json.JSONDecodeError):
        raise CheckpointError(f"{source / NETWORKS} does not tell what its networks are") from None
    tensors: dict[str, Tensor] = checkpoint.content  # type: ignore[assignment]
    networks = []
    for number in range(described.count):
        packed = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{number}.")}
        if not packed:
            raise CheckpointError(f"{source / NETWORKS} lacks the network of chunk {number}")
        network = merge(model_config(described.model, **described.options).build()).model
        unpack_weights(network, packed)
        networks.append(network.eval())
    grid = PatchGrid(*described.grid)
    data = (source / CHUNKS).read_bytes()
    index = unpack_index(data, (described.frames, len(grid)), described.count, compress=described.compress)
    return Playback(networks, index, grid, described.size, halo=described.halo), described
