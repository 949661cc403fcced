"""The contract: a codec is an analysis transform, a bottleneck and a synthesis transform.

```
samples --analysis--> y --bottleneck--> y_hat --synthesis--> samples
                           |      ^
                     symbols + tables
                           v      |
                       entropy coder <-> payload bytes <-> container (.cpd)
```

The transform knows the medium, the bottleneck knows quantisation and bits, the codec composes the two and gives
users bytes. Everything downstream (command line, training, evaluation, loaders) asks the read-only facts declared
here and never a concrete class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compand import registry
from compand.checkpoint import CheckpointInfo, matches
from compand.coding.container import Header
from compand.concealment import Concealer, nearest_fill
from compand.errors import BitstreamError, CheckpointError, UsageError
from compand.refinement import Relaxation, schedule_of
from compand.registry import QUALITY_STEPS as QUALITY_STEPS

T = TypeVar("T")
Counts = Sequence[Mapping[int, int]]
"""For each table of a set, how often each symbol was seen."""
Progress = Callable[[int, int], None]
"""Called with the number of chunks done and of all chunks."""

CONCEALER = "concealer"
"""Entry of a codec's architecture, and prefix of its parameters, for what estimates lost tokens."""

MAX_PACKETS = 255
"""Most packets that the tokens of a tile or segment can be cut into."""


@dataclass
class BottleneckOutput:
    """What a bottleneck gives in training and evaluation.

    Attributes:
        y_hat: reconstructed latents, same shape as y.
        bits: estimated information content of each item of the batch, in bits, shape [batch].
        losses: further terms to be added to the rate-distortion loss (the auxiliary quantile loss, for instance).
    """

    y_hat: Tensor
    bits: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class Transform(nn.Module, ABC):
    """Maps samples to latents and back; no quantisation, no bits.

    Attributes:
        stride: samples of one axis per latent position.
        latent_channels: channels M of the latent y.
        context: samples beyond a position that analysis and synthesis look at; a tile that is given this much of its
            surroundings is transformed as if it were not cut out.
        edge: samples before the first and after the last one of a signal that have to be coded too for its ends to be
            restored, a multiple of `stride` up to `context`; 0 where the transform extends signals by itself.
        takes_bytes: whether analysis takes 8-bit samples too, 0 .. 255 for [0, 1].
        one_analysis: whether analysis gives the same latents at all qualities.
        encoder_parts: prefixes of the parameters that decoding does not need.
        coarse_parts: prefixes of convolution kernels that a checkpoint may keep in 8 bits.
    """

    stride: int
    latent_channels: int
    context: int
    edge: int = 0
    takes_bytes: bool = False
    one_analysis: bool = False
    encoder_parts: tuple[str, ...]
    coarse_parts: tuple[str, ...] = ()

    @abstractmethod
    def analysis(self, x: Tensor, quality: Tensor) -> Tensor:
        """g_a. x: [batch, channels, height, width], values in [0, 1], both edges multiples of `stride`;
        quality: integers [batch] in 1/32 level. Returns y: [batch, M, height / stride, width / stride]."""

    @abstractmethod
    def synthesis(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        """g_s, the mirror of `analysis`. The result is float32 and not clamped to [0, 1]."""

    @abstractmethod
    def reduce_precision(self, dtype: torch.dtype) -> None:
        """Converts what tolerates it to `dtype`, for speed; interfaces stay float32."""

    def settle_new_parts(self, learned: Collection[str]) -> None:
        """After the start from a checkpoint: lets residual parts that it has no weights for begin as the identity.

        Args:
            learned: names of the parameters that the checkpoint gave, as in `state_dict`.
        """


class Bottleneck(nn.Module, ABC):
    """Quantises latents and turns them into bytes.

    A bottleneck is *trainable* (floating-point densities) until `freeze()` has made its integer tables and integer
    prior; then `forward` in evaluation mode, `compress` and `decompress` use the same integers.

    Attributes:
        latent_channels: channels M of the latent y.
        encoder_parts: prefixes of the parameters that decoding does not need.
        coarse_parts: prefixes of convolution kernels that a checkpoint may keep in 8 bits.
        refinable: whether `relaxed` gives something to search for better symbols with.
    """

    latent_channels: int
    encoder_parts: tuple[str, ...]
    coarse_parts: tuple[str, ...] = ()
    refinable: bool = False

    @abstractmethod
    def forward(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        """y: [batch, M, h, w]; quality: integers [batch] in 1/32 level."""

    @abstractmethod
    def compress(self, y: Tensor, quality: int) -> list[bytes]:
        """y: [batch, M, h, w] -> one payload an item. Needs the frozen state."""

    @abstractmethod
    def decompress(self, payloads: Sequence[bytes], shape: tuple[int, int], quality: int) -> Tensor:
        """Payloads of `batch` items of latent shape (h, w) -> y_hat [batch, M, h, w], exactly the y_hat that the
        encoder's `forward` in evaluation mode gives. Raises BitstreamError on a damaged payload."""

    def quantise(self, y: Tensor, quality: int) -> Tensor:
        """The integers of a packed set: y in quantisation steps, rounded around zero whatever the prior expects there,
        so that they mean the same in every row. y: [batch, M, h, w]; quality in 1/32 level; int32 of the same shape.

        Raises:
            UsageError: this bottleneck has no such integers.
        """
        raise _no_integers(self)

    def dequantise(self, integers: Tensor, quality: int) -> Tensor:
        """The latents that `quantise` rounded: integers [batch, M, h, w] -> float32 of the same shape, each a function
        of its integer and its channel alone."""
        raise _no_integers(self)

    def relaxed(self, y: Tensor, quality: int) -> Relaxation:
        """The latents y [1, M, h, w] of the frozen state, with a rate that has a gradient; see `compand.refinement`.

        Raises:
            UsageError: this bottleneck has no such rate (not `refinable`).
        """
        raise UsageError(f"the rate of {type(self).__name__} has no gradient: leave out --effort")

    @property
    def vocabulary(self) -> tuple[tuple[int, ...], ...]:
        """Number of codes of each codebook that a quality level uses, level by level; empty where latents are coded as
        numbers. With a vocabulary, `quantise` and `dequantise` go between y and tokens int32 [batch, planes, h, w]."""
        return ()

    def compress_indices(self, indices: Tensor, quality: int, *, packets: int = 0) -> bytes:
        """Tokens to a payload, as `compress` makes one.

        Args:
            indices: int64 [planes, h, w].
            quality: in 1/32 level.
            packets: number of parts, cut along the rows of pictures or along time, each of which has a checksum and
                decodes without the others; 0: one piece without a checksum.

        Raises:
            UsageError: this bottleneck has no tokens.
        """
        raise _no_tokens(self)

    def decompress_indices(
        self, payload: bytes, shape: tuple[int, int], quality: int, *, erasures: bool = False
    ) -> Tensor:
        """Inverse of `compress_indices`: int64 [planes, h, w].

        Args:
            shape: (h, w).
            erasures: give -1 for the tokens of packets that are damaged, instead of raising.

        Raises:
            BitstreamError: the payload is damaged; with `erasures`, if it has no packets.
            UsageError: this bottleneck has no tokens.
        """
        raise _no_tokens(self)

    @abstractmethod
    def least_bits(self, shape: tuple[int, int]) -> float:
        """A number of bits that no payload of latent shape (h, w) can be shorter than, up to the coder's rounding.
        Readers hold it against a payload before they work on the size that a header claims."""

    @abstractmethod
    def count(self, y: Tensor, quality: int) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """(table indexes, symbols) of each table set as `compress` codes y; needs the frozen state. What the export
        counts on training data before it freezes again."""

    @abstractmethod
    def table_counts(self) -> list[int]:
        """Number of tables of each table set."""

    @abstractmethod
    def freeze(self, counts: Sequence[Counts] | None = None) -> None:
        """Makes integer tables (and an integer prior) from the trained densities, for the device it is on.

        Args:
            counts: for each table set, how often each symbol was seen with each table; None: the densities alone.
        """

    @abstractmethod
    def thaw(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        """Sets trainable parameters from the integers of a frozen state, as far as they determine them, so that
        training can go on from a released checkpoint."""

    @abstractmethod
    def frozen_arrays(self) -> dict[str, NDArray[np.int32]]:
        """All integers that decide symbols; their bytes make the symbols fingerprint."""

    @abstractmethod
    def load_frozen(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        """Enters the frozen state with integers made by `frozen_arrays`. Raises CheckpointError if they do not fit."""


def level_table_at(table: Tensor, quality: Tensor) -> Tensor:
    """Linear interpolation between the rows of a table that has one row a quality level.

    Args:
        table: [levels, channels].
        quality: integers in 1/32 level, [batch]; level 1 (32) is row 0.

    Returns:
        [batch, channels].
    """
    position = (quality - QUALITY_STEPS).clamp(0, (table.shape[0] - 1) * QUALITY_STEPS)
    low = position.div(QUALITY_STEPS, rounding_mode="floor").clamp(max=max(table.shape[0] - 2, 0))
    fraction = (position - low * QUALITY_STEPS).to(table.dtype)[:, None] / QUALITY_STEPS
    return torch.lerp(table[low], table[(low + 1).clamp(max=table.shape[0] - 1)], fraction)


def _no_integers(bottleneck: Bottleneck) -> UsageError:
    return UsageError(f"{type(bottleneck).__name__} has no integers of its own: pack with --profile cpd")


def _no_tokens(part: nn.Module) -> UsageError:
    return UsageError(f"{type(part).__name__} has no tokens: choose a codec with codebooks (compand codecs)")


def first_level(low: int, high: int, reaches: Callable[[int], bool]) -> int:
    """The first quality from `low` to `high`, in 1/32 level, for which `reaches` holds, by bisection; `high` + 1 if
    there is none."""
    last = high + 1
    while low < last:
        middle = (low + last) // 2
        low, last = (low, middle) if reaches(middle) else (middle + 1, last)
    return low


def subset(arrays: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


class Codec(nn.Module, ABC):
    """A transform and a bottleneck under one name: samples to bytes and back.

    Made by `compand.load` (frozen, ready to code) or by its class (trainable, for `compand train`).

    Attributes:
        transform, bottleneck: the parts.
        lambdas: Lagrange multiplier of each quality level, for R in bits per pixel and D = 255^2 x mean squared
            error of samples in [0, 1].
        architecture: constructor arguments, as config.json keeps them.
        half_kernels: whether checkpoints keep convolution kernels in half precision.
        prior_sources: other codecs, by name, whose integer prior training can start from.
        info: the checkpoint this codec was loaded from; None while it is being trained.
        concealer: estimates lost tokens; None: the nearest ones stand in for them.
    """

    codec_id: ClassVar[int]
    medium: ClassVar[str]
    half_kernels: ClassVar[bool] = True
    prior_sources: ClassVar[tuple[str, ...]] = ()
    architecture: dict[str, Any]

    def __init__(self, transform: Transform, bottleneck: Bottleneck, lambdas: Sequence[float]) -> None:
        super().__init__()
        self.transform = transform
        self.bottleneck = bottleneck
        self.lambdas = tuple(lambdas)
        self.info: CheckpointInfo | None = None
        self.concealer: Concealer | None = None

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any], *, trainable: bool) -> Codec:
        """A codec of this class from the constructor arguments that config.json keeps, and its concealer if it has one;
        weights are still to come."""
        construct: Callable[..., Codec] = cls
        arguments = {name: value for name, value in architecture.items() if name != CONCEALER}
        codec = construct(**arguments, trainable=trainable)
        if CONCEALER in architecture:
            codec.add_concealer(**architecture[CONCEALER])
        return codec

    def add_concealer(self, **options: Any) -> None:
        """Gives the codec an untrained `Concealer`; options: of its network. Raises UsageError where there are no
        tokens."""
        self.concealer = Concealer(self.vocabulary, self.latent_layout()["axes"], **options)
        self.architecture = {**self.architecture, CONCEALER: options}

    @property
    def name(self) -> str:
        """The codec's registered name."""
        return registry.name_of(self)

    @property
    def levels(self) -> int:
        """Number of quality levels; qualities run continuously from 1 to this."""
        return len(self.lambdas)

    @property
    def vocabulary(self) -> tuple[tuple[int, ...], ...]:
        """Number of codes of each codebook that a quality level uses, level by level: tokens of a codebook count from 0
        to below it. Empty for codecs without tokens."""
        return self.bottleneck.vocabulary

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def latent_layout(self) -> dict[str, Any]:
        """What config.json says of the latents, so that their shape is known without the weights: their channels, and
        the samples a position along each of `axes` (1: time, 2: height and width) and, of a codec with tokens, its
        `vocabulary`."""
        own: dict[str, Any] = (
            {"vocabulary": [list(sizes) for sizes in self.vocabulary]} if self.vocabulary else {}
        )
        return {"channels": self.transform.latent_channels, "stride": self.transform.stride, "axes": 2} | own

    def quality_units(self, quality: float) -> int:
        """A quality in 1/32 level, as files store it. Raises UsageError outside 1 .. levels."""
        if not isinstance(quality, (int, float)) or not 1 <= quality <= self.levels:
            raise UsageError(f"quality {quality} does not exist: choose 1 to {self.levels}")
        return round(quality * QUALITY_STEPS)

    def multiplier_at(self, level: int) -> float:
        """The Lagrange multiplier of a quality in 1/32 level, interpolated geometrically between `lambdas`."""
        log2_lambdas = torch.tensor(self.lambdas, dtype=torch.float64).log2()[:, None]
        return 2.0 ** float(level_table_at(log2_lambdas, torch.tensor([level])))

    def decoder_state(self) -> dict[str, Tensor]:
        """The floating-point tensors that decoding intact files uses; their bytes make the synthesis fingerprint."""
        others = [f"transform.{part}" for part in self.transform.encoder_parts]
        others += [f"bottleneck.{part}" for part in self.bottleneck.encoder_parts]
        others.append(f"{CONCEALER}.")
        return {
            name: value for name, value in self.state_dict().items() if not name.startswith(tuple(others))
        }

    def _frozen_info(self) -> CheckpointInfo:
        """The checkpoint this codec was loaded from. Raises CheckpointError if it was not."""
        if self.info is None:
            raise CheckpointError(
                "this codec was not loaded from a checkpoint: export it and use compand.load"
            )
        return self.info

    def _info_for(self, header: Header) -> CheckpointInfo:
        """The checkpoint, if a file of this header was written with its tables. Raises CheckpointError if not."""
        info = self._frozen_info()
        if not matches(info, header):
            raise CheckpointError(
                f"file was written with symbols fingerprint {header.symbols.hex()}, "
                f"{info.name} has {info.symbols.hex()}: decode it with the checkpoint that it names (compand info)"
            )
        return info

    @abstractmethod
    def encode(
        self,
        source: Any,
        *,
        quality: float | None = None,
        bpp: float | None = None,
        psnr: float | None = None,
        compact: bool | None = None,
        packets: int = 0,
        effort: int = 0,
        progress: Progress | None = None,
    ) -> bytes:
        """Samples to the bytes of a .cpd file."""

    @abstractmethod
    def decode(
        self, data: bytes, *, partial: bool = False, conceal: bool = False, progress: Progress | None = None
    ) -> Any:
        """The bytes of a .cpd file to samples."""

    @abstractmethod
    def latents(self, data: bytes) -> Tensor:
        """The dequantised latents of a file, without synthesis: what compressed-domain learning reads."""

    @abstractmethod
    def tokens(self, data: bytes) -> Tensor:
        """The tokens of a file, without synthesis: what language models read. Raises UsageError if there are none."""

    @abstractmethod
    def token_geometry(self, data: bytes) -> dict[str, Any]:
        """What `detokenize` has to be told beside the tokens of a file to give what `decode` gives."""

    @abstractmethod
    def detokenize(self, tokens: Any, *, quality: float | None = None) -> Any:
        """Tokens to samples, whether they come from a file or from a language model."""

    @abstractmethod
    def quantise(self, source: Any, *, quality: float) -> NDArray[np.int32]:
        """Samples to the integers of a packed set: latents in quantisation steps, rounded without a prior, or
        tokens."""

    @torch.inference_mode()
    def dequantise(self, integers: NDArray[np.integer[Any]] | Tensor, *, quality: float) -> Tensor:
        """The latents that integers of a packed set stand for.

        Args:
            integers: as `quantise` gives them, of any integer type: [M, ...] or, tokens, [planes, ...]; dimensions of
                items and groups may come before.
            quality: the one that they were made with.

        Returns:
            float32 of the same shape, [..., M, ...] of tokens, on the codec's device.
        """
        given = torch.as_tensor(integers).to(self.device)
        axes = self.latent_layout()["axes"]
        y = given.reshape(-1, *given.shape[-axes - 1 :])
        y_hat = self.bottleneck.dequantise(y if axes == 2 else y[:, :, None], self.quality_units(quality))
        return y_hat.reshape(*given.shape[: -axes - 1], -1, *given.shape[-axes:])

    @torch.inference_mode()
    def level_values(self, quality: float) -> Tensor:
        """What the 8-bit integers of each channel stand for: float32 [M, 256] on the codec's device, entry k + 128 for
        the integer k. Dequantising is one look-up in it. Raises UsageError for codecs with tokens."""
        if self.vocabulary:
            raise UsageError(f"tokens of {self.name} are no amounts, each by itself: use Codec.dequantise")
        channels = self.transform.latent_channels
        every = torch.arange(-128, 128, dtype=torch.int32, device=self.device).expand(1, channels, 1, 256)
        return self.bottleneck.dequantise(every.contiguous(), self.quality_units(quality))[0, :, 0]

    @abstractmethod
    def check(self, data: bytes, progress: Progress | None = None) -> None:
        """Decodes every symbol of a file without synthesis. Raises BitstreamError at the first fault."""

    # --------------------------------------------------------------------------------------------------- tokens

    def level_vocabulary(self, quality: float) -> tuple[int, ...]:
        """Codes of each codebook that a quality uses; qualities between levels use those of the level below. Raises
        UsageError for codecs without tokens, and outside 1 .. levels."""
        units = self.quality_units(quality)
        if not self.vocabulary:
            raise _no_tokens(self)
        return self.vocabulary[units // QUALITY_STEPS - 1]

    def _require_tokens(self) -> None:
        if not self.vocabulary:
            raise _no_tokens(self)

    def _best_whole_level(
        self,
        encode: Callable[[int], bytes],
        suits: Callable[[bytes], bool],
        merit: Callable[[bytes], tuple[float, float]],
    ) -> tuple[bytes | None, list[bytes]]:
        """The file of greatest merit among those that suit, None if none does, and the files of all levels.

        Codes of a codebook have no levels in between, and neither bytes nor errors need be monotonic in the level: each
        is tried.

        Args:
            encode: makes a file of a level in 1/32.
        """
        files = [encode(level * QUALITY_STEPS) for level in range(1, self.levels + 1)]
        return max(filter(suits, files), key=merit, default=None), files

    def _check_packets(self, packets: int) -> None:
        """Raises UsageError unless tokens can be cut into so many packets, or 0."""
        if packets:
            self._require_tokens()
        if not 0 <= packets <= MAX_PACKETS:
            raise UsageError(f"{packets} packets cannot be made: choose 0 (none) to {MAX_PACKETS}")

    def _check_effort(self, effort: int) -> None:
        """Raises UsageError unless there is such an effort and files of this codec can be refined."""
        if schedule_of(effort).steps and not (self.bottleneck.refinable and self.medium == "image"):
            raise UsageError(
                f"files of {self.name} are not refined: leave out --effort, or choose another codec"
            )

    def _payloads(self, y: Tensor, level: int, packets: int) -> list[bytes]:
        """One payload an item of y [batch, M, h, w]."""
        if not packets:
            return self.bottleneck.compress(y, level)
        rows = y.shape[4 - self.latent_layout()["axes"]]
        return [
            self.bottleneck.compress_indices(indices, level, packets=min(packets, rows))
            for indices in self.bottleneck.quantise(y, level).long()
        ]

    @torch.inference_mode()
    def _concealed(self, payload: bytes, shape: tuple[int, int], level: int) -> tuple[Tensor, int]:
        """The latents of a damaged payload with estimates for what is lost, [M, h, w], and how many of h x w positions
        are estimated. Raises BitstreamError where nothing is intact."""
        indices = self.bottleneck.decompress_indices(payload, shape, level, erasures=True)
        lost = (indices < 0).any(0)
        if lost.all():
            raise BitstreamError("no packet is intact")
        return self.restore(indices, level), int(lost.sum())

    @torch.inference_mode()
    def restore(self, indices: Tensor, level: int) -> Tensor:
        """The latents that `decode` with `conceal` makes of tokens.

        Lost ones are, with a concealer, what `Concealer.estimate` holds their latents to be where there is one
        codebook, and what `Concealer.fill` gives where there are several; without one, those of the nearest tokens.

        Args:
            indices: int64 [planes, h, w], -1 where one is lost.
            level: quality in 1/32 level.

        Returns:
            float32 [M, h, w] on the codec's device.

        Raises:
            UsageError: this codec has no tokens, or these are not of the level.
        """
        self._require_tokens()
        depth = min(max(level // QUALITY_STEPS, 1), len(self.vocabulary))
        if bool((indices < 0).any()):
            if self.concealer is None:
                indices = nearest_fill(indices)
            elif len(self.vocabulary[depth - 1]) == 1:
                return self.concealer.estimate(indices, depth, self.code_values(depth))
            else:
                indices = self.concealer.fill(indices, depth)
        return self.bottleneck.dequantise(indices[None].to(self.device), level)[0]

    def code_values(self, depth: int) -> Tensor:
        """What the codes of a level of one codebook stand for: float32 [K, M] on the codec's device.

        Args:
            depth: quality level, from 1.

        Raises:
            UsageError: the level has several codebooks, or none.
        """
        sizes = self.vocabulary[depth - 1] if self.vocabulary else ()
        if len(sizes) != 1:
            raise UsageError(f"level {depth} of {self.name} has {len(sizes)} codebooks: this is for one")
        every = torch.arange(sizes[0], device=self.device)[None, None, None]
        return self.bottleneck.dequantise(every, depth * QUALITY_STEPS)[0, :, 0].T.contiguous()

    def _checked_tokens(self, tokens: Any, quality: float | None) -> tuple[Tensor, float]:
        """Tokens int64 [..., planes, n] or [planes, h, w] and their quality, where it follows from the planes.

        Raises:
            UsageError: no integers, another shape, codes beyond the vocabulary, or a quality that has to be told.
        """
        self._require_tokens()
        axes = self.latent_layout()["axes"]
        given = torch.as_tensor(tokens)
        if given.ndim == axes and axes == 2:
            given = given[None]
        wanted = "[height, width] or [codebooks, height, width]"
        if axes == 1:
            wanted = "[codebooks, frames] or [groups, codebooks, frames]"
        integral = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if not integral or given.ndim not in ((3,) if axes == 2 else (2, 3)) or not given.numel():
            raise UsageError(f"tokens are {given.dtype} {list(given.shape)}: give integers {wanted}")
        planes = given.shape[-axes - 1]
        if quality is None:
            fitting = [level for level, sizes in enumerate(self.vocabulary, 1) if len(sizes) == planes]
            if len(fitting) > 1:
                fact = f"qualities {fitting[0]} to {fitting[-1]} all have tokens of {planes} codebook"
                raise UsageError(f"{fact}{'s' * (planes != 1)}: say which one it is (quality)")
            if not fitting:
                raise UsageError(f"no quality has {planes} codebooks: see the codec's vocabulary")
            quality = float(fitting[0])
        sizes = self.level_vocabulary(quality)
        if len(sizes) != planes:
            raise UsageError(
                f"quality {quality:g} has {len(sizes)} codebooks, tokens have {planes}: give as many"
            )
        for plane, size in enumerate(sizes):
            values = given.select(given.ndim - axes - 1, plane)
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= size:
                fact = f"tokens of codebook {plane} run from {low} to {high}"
                raise UsageError(f"{fact}: those of quality {quality:g} are 0 to {size - 1}")
        return given.long(), quality
