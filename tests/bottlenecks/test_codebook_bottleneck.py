"""The bottleneck of discrete codecs: what it decodes, what it costs, and which packets survive damage."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compand.bottlenecks import codebook
from compand.bottlenecks.codebook import LENGTH, PRIORS, CodebookBottleneck
from compand.codec import QUALITY_STEPS
from compand.errors import BitstreamError, CheckpointError, UsageError

NESTED: dict[str, Any] = {"kind": "nested", "sizes": [8, 20, 64]}
RVQ: dict[str, Any] = {"kind": "rvq", "layers": 3, "size": 32}
FSQ: dict[str, Any] = {"kind": "fsq", "levels": [5, 5, 3], "groups": 2}
CHANNELS = 6

KINDS = [kind.name for kind in PRIORS]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_quantiser = pytest.mark.parametrize(("quantiser", "dimensions"), [(NESTED, 2), (RVQ, 1), (FSQ, 1)])


def latents(dimensions: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Smooth latents, so that neighbours tell something."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, CHANNELS, *((6, 9) if dimensions == 2 else (1, 40)))
    y = torch.randn(shape, generator=generator)
    for axis in (2, 3) * 4:
        y = y + y.roll(1, axis)
    return y


def made(kind: str, quantiser: dict[str, Any], dimensions: int, trainable: bool = True) -> CodebookBottleneck:
    options = {"embedding": 8, "hidden": 16} if kind == "context" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bottleneck = CodebookBottleneck(
            CHANNELS, quantiser, {"kind": kind, **options}, trainable=trainable, dimensions=dimensions
        )
        bottleneck.quantiser.initialise(latents(dimensions, 24, 1))
    return bottleneck.eval()


def counted(bottleneck: CodebookBottleneck, dimensions: int, batches: int = 12) -> list[list[Counter[int]]]:
    totals: list[list[Counter[int]]] = [
        [Counter() for _ in range(number)] for number in bottleneck.table_counts()
    ]
    for seed in range(batches):
        y = latents(dimensions, 4, 10 + seed)
        for depth in range(1, bottleneck.quantiser.depths + 1):
            parts = bottleneck.count(y, depth * QUALITY_STEPS)
            for total, (tables, symbols) in zip(totals, parts, strict=True):
                for table, symbol in zip(tables.tolist(), symbols.tolist(), strict=True):
                    total[table][symbol] += 1
    return totals


def frozen(kind: str, quantiser: dict[str, Any], dimensions: int) -> CodebookBottleneck:
    bottleneck = made(kind, quantiser, dimensions)
    bottleneck.freeze()
    bottleneck.freeze(counted(bottleneck, dimensions))
    return bottleneck.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ contract


@every_kind
@every_quantiser
def test_decoded_is_what_forward_gives(kind, quantiser, dimensions):
    bottleneck = frozen(kind, quantiser, dimensions)
    y = latents(dimensions, 3, 5)
    qualities = torch.tensor([QUALITY_STEPS, 2 * QUALITY_STEPS + 31, 3 * QUALITY_STEPS])
    output = bottleneck(y, qualities)
    for item, quality in enumerate(qualities.tolist()):
        (payload,) = bottleneck.compress(y[item : item + 1], quality)
        decoded = bottleneck.decompress([payload], tuple(y.shape[2:]), quality)
        assert torch.equal(decoded[0], output.y_hat[item])
        assert 8 * len(payload) == pytest.approx(float(output.bits[item]), abs=48)
        integers = bottleneck.quantise(y[item : item + 1], quality)
        assert integers.dtype == torch.int32
        assert torch.equal(bottleneck.dequantise(integers, quality)[0], output.y_hat[item])
        assert 8 * len(payload) >= bottleneck.least_bits(tuple(y.shape[2:])) - 64


@every_kind
@every_quantiser
def test_a_checkpoint_decodes_alike(kind, quantiser, dimensions):
    bottleneck = frozen(kind, quantiser, dimensions)
    bare = made(kind, quantiser, dimensions, trainable=False)
    state = bottleneck.state_dict()
    bare.load_state_dict({name: state[name] for name in bare.state_dict()})
    bare.load_frozen(bottleneck.frozen_arrays())
    y = latents(dimensions)
    for quality in (QUALITY_STEPS, 3 * QUALITY_STEPS):
        payloads = bottleneck.compress(y, quality)
        assert bare.compress(y, quality) == payloads
        shape = tuple(y.shape[2:])
        assert torch.equal(
            bare.decompress(payloads, shape, quality), bottleneck.decompress(payloads, shape, quality)
        )
    assert all(array.dtype == np.int32 for array in bare.frozen_arrays().values())
    with pytest.raises(CheckpointError, match="trainable"):
        bare.train()(y, torch.tensor([32, 32]))
    with pytest.raises(CheckpointError, match="frozen already"):
        bare.freeze()


def test_qualities_between_levels_are_the_level_below():
    bottleneck = frozen("static", NESTED, 2)
    y = latents(2, 1)
    assert bottleneck.compress(y, 95) == bottleneck.compress(y, 64) != bottleneck.compress(y, 96)
    assert [bottleneck.depth(quality) for quality in (32, 63, 64, 96, 500)] == [1, 1, 2, 3, 3]
    assert bottleneck.vocabulary == ((8,), (20,), (64,))


def test_an_unfrozen_bottleneck_does_not_code():
    bottleneck = made("static", NESTED, 2)
    y = latents(2)
    for action in (
        lambda: bottleneck.compress(y, 32),
        lambda: bottleneck.least_bits((2, 2)),
        bottleneck.frozen_arrays,
    ):
        with pytest.raises(CheckpointError, match="export it first"):
            action()


@pytest.mark.parametrize(
    ("prior", "dimensions"),
    [
        ({"kind": "huffman"}, 2),
        ({"kind": "static", "hidden": 4}, 2),
        ({"kind": "context", "depth": 4}, 2),
        ({}, 3),
    ],
)
def test_what_does_not_exist(prior, dimensions):
    with pytest.raises(UsageError):
        CodebookBottleneck(CHANNELS, NESTED, prior, dimensions=dimensions)


# ---------------------------------------------------------------------------------------------------------- bits


@every_kind
@every_quantiser
def test_no_payload_is_longer_than_log2_bits_and_a_byte(kind, quantiser, dimensions):
    """Whatever the indices: those that the prior does not expect are stored as they are."""
    bottleneck = frozen(kind, quantiser, dimensions)
    generator = torch.Generator().manual_seed(0)
    for depth, sizes in enumerate(bottleneck.quantiser.sizes, 1):
        for shape in ((1, 1), (1, 7), (6, 9) if dimensions == 2 else (1, 54)):
            grid = torch.stack([torch.randint(0, codes, shape, generator=generator) for codes in sizes])
            raw = shape[0] * shape[1] * sum(map(math.log2, sizes))
            for name in KINDS[: KINDS.index(kind) + 1]:
                payload = bottleneck.compress_indices(grid, depth * QUALITY_STEPS, prior=name)
                assert len(payload) <= math.ceil(raw / 8) + 1
                found = bottleneck.decompress_indices(payload, shape, depth * QUALITY_STEPS)
                assert torch.equal(found, grid) and found.dtype == torch.int64


@every_quantiser
def test_priors_save_bits_where_there_is_something_to_know(quantiser, dimensions):
    bottleneck = frozen("conditional", quantiser, dimensions)
    y = latents(dimensions, 16, 99)
    for depth in range(1, bottleneck.quantiser.depths + 1):
        grids = bottleneck.indices(y, depth * QUALITY_STEPS)
        total = {
            name: sum(
                len(bottleneck.compress_indices(grid, depth * QUALITY_STEPS, prior=name)) for grid in grids
            )
            for name in (None, "uniform", "static", "conditional")
        }
        assert total[None] <= min(total["uniform"], 1.02 * total["static"], 1.02 * total["conditional"])
    assert bottleneck._best[-1] != "uniform"


def test_a_prior_that_is_not_there():
    bottleneck = frozen("static", NESTED, 2)
    grid = bottleneck.indices(latents(2, 1), 32)[0]
    with pytest.raises(UsageError, match="choose one of uniform, static"):
        bottleneck.compress_indices(grid, 32, prior="context")


def test_levels_that_were_not_counted_stay_uniform():
    bottleneck = made("context", NESTED, 2)
    bottleneck.freeze()
    assert bottleneck._best == ["uniform"] * 3


@pytest.mark.parametrize(
    "change", [lambda g: g + 64, lambda g: g - 9, lambda g: g[0], lambda g: g.repeat(2, 1, 1)]
)
def test_indices_that_a_level_does_not_have(change):
    bottleneck = frozen("static", NESTED, 2)
    grid = bottleneck.indices(latents(2, 1), 96)[0]
    with pytest.raises(UsageError, match=r"give \[1, h, w\] below 64"):
        bottleneck.compress_indices(change(grid), 96)


# ------------------------------------------------------------------------------------------------------ training


@every_quantiser
def test_the_prior_learns_beside_the_codec_and_not_through_it(quantiser, dimensions):
    bottleneck = made("context", quantiser, dimensions).train()
    y = latents(dimensions, 4).requires_grad_()
    depths = torch.tensor([1, 2, 3, 3]) if quantiser is not FSQ else torch.ones(4, dtype=torch.long)
    output = bottleneck(y, depths * QUALITY_STEPS)
    assert {"commitment", "codebook", "prior"} <= output.losses.keys()
    assert not output.bits.requires_grad
    output.losses["prior"].backward()
    reached = {name.split(".")[0] for name, p in bottleneck.named_parameters() if p.grad is not None}
    assert reached == {"prior"} and y.grad is None
    planes = [bottleneck.quantiser.planes(depth) for depth in depths.tolist()]
    symbols = sum(planes) * y.shape[2] * y.shape[3]
    assert float(output.losses["prior"].detach()) == pytest.approx(
        float(output.bits.sum()) / symbols, rel=1e-5
    )


def test_training_makes_the_context_prior_the_cheapest():
    bottleneck = made("context", RVQ, 1)
    assert bottleneck.prior is not None
    optimizer = torch.optim.Adam(bottleneck.prior.parameters(), 1e-2)
    for step in range(150):
        y = latents(1, 16, 1000 + step)
        indices = bottleneck.quantiser.encode(y, 3)
        loss = bottleneck.prior(indices, torch.full((16,), 3)).sum() / indices.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bottleneck.freeze()
    bottleneck.freeze(counted(bottleneck, 1, 20))
    y = latents(1, 12, 5000)
    grids = bottleneck.indices(y, 96)
    lengths = [sum(len(bottleneck.compress_indices(g, 96, prior=name)) for g in grids) for name in KINDS]
    assert bottleneck._best[2] == KINDS[int(np.argmin(lengths))] and lengths[3] < lengths[0]


@every_kind
def test_without_a_network_bits_are_those_of_the_codebooks(kind):
    bottleneck = made(kind, NESTED, 2)
    bits = bottleneck(latents(2), torch.tensor([40, 96])).bits
    expected = [54 * 3, 54 * 6]
    assert bits.tolist() == pytest.approx(expected, rel=0.1 if kind == "context" else 1e-6)


def test_thawed_networks_are_those_of_the_checkpoint():
    bottleneck, other = frozen("context", NESTED, 2), made("context", NESTED, 2)
    with torch.no_grad():
        for parameter in other.prior.parameters():
            parameter.normal_()
    other.thaw(bottleneck.frozen_arrays())
    other.freeze()
    names = [name for name in bottleneck.frozen_arrays() if name.startswith("context.")]
    assert names
    for name in names:
        assert np.array_equal(other.frozen_arrays()[name], bottleneck.frozen_arrays()[name])
    other.thaw({})


# --------------------------------------------------------------------------------------------------- checkpoints


@every_kind
def test_malformed_arrays(kind):
    bottleneck = frozen(kind, RVQ, 1)
    arrays = bottleneck.frozen_arrays()
    for name in arrays:
        bare = made(kind, RVQ, 1, trainable=False)
        with pytest.raises(CheckpointError):
            bare.load_frozen({key: value for key, value in arrays.items() if key != name})
    with pytest.raises(CheckpointError):
        made(kind, NESTED, 1, trainable=False).load_frozen(arrays)
    with pytest.raises(CheckpointError):
        bare.load_frozen(arrays | {"best": np.full(3, len(PRIORS), np.int32)})


# ------------------------------------------------------------------------------------------------------- packets


def framed(kind: str, packets: int) -> tuple[CodebookBottleneck, Tensor, bytes]:
    bottleneck = frozen(kind, NESTED, 2)
    grid = bottleneck.indices(latents(2, 1, 7), 96)[0]
    return bottleneck, grid, bottleneck.compress_indices(grid, 96, packets=packets)


@every_kind
@pytest.mark.parametrize("packets", [1, 2, 4, 6, 100])
def test_packets_hold_rows(kind, packets):
    bottleneck, grid, payload = framed(kind, packets)
    assert torch.equal(bottleneck.decompress_indices(payload, (6, 9), 96), grid)
    assert torch.equal(bottleneck.decompress_indices(payload, (6, 9), 96, erasures=True), grid)
    assert payload[0] // 4 == min(packets, 6)
    assert bottleneck.compress(latents(2, 1, 7), 96, packets=packets) == [payload]


def test_packets_of_sounds_hold_frames():
    bottleneck = frozen("static", RVQ, 1)
    grid = bottleneck.indices(latents(1, 1), 96)[0]
    payload = bytearray(bottleneck.compress_indices(grid, 96, packets=4))
    payload[-1] ^= 1
    found = bottleneck.decompress_indices(bytes(payload), (1, 40), 96, erasures=True)
    assert (found[:, :, 30:] == -1).all() and torch.equal(found[:, :, :30], grid[:, :, :30])


@every_kind
def test_any_damaged_byte_costs_one_packet(kind):
    """Also where it is the length that is damaged: the next packet is found again."""
    bottleneck, grid, payload = framed(kind, 3)
    rows = [slice(0, 2), slice(2, 4), slice(4, 6)]
    for place in range(1, len(payload)):
        damaged = bytearray(payload)
        damaged[place] ^= 0x81
        with pytest.raises(BitstreamError, match="damaged"):
            bottleneck.decompress_indices(bytes(damaged), (6, 9), 96)
        found = bottleneck.decompress_indices(bytes(damaged), (6, 9), 96, erasures=True)
        lost = [bool((found[:, part] == -1).all()) for part in rows]
        assert sum(lost) == 1
        for part, gone in zip(rows, lost, strict=True):
            assert gone or torch.equal(found[:, part], grid[:, part])


def test_what_is_cut_off_is_erased():
    bottleneck, grid, payload = framed("static", 6)
    for stop in range(1, len(payload)):
        found = bottleneck.decompress_indices(payload[:stop], (6, 9), 96, erasures=True)
        intact = (found >= 0).all(2)[0]
        assert torch.equal(found[:, intact], grid[:, intact]) and not intact[5]
        assert not intact.int().diff().gt(0).any()


def test_packets_do_not_change_places():
    bottleneck, _, payload = framed("uniform", 2)
    size = (len(payload) - 1) // 2
    assert LENGTH.size(size) == 1
    swapped = payload[:1] + payload[1 + size :] + payload[1 : 1 + size]
    assert (bottleneck.decompress_indices(swapped, (6, 9), 96, erasures=True) == -1).all()


@pytest.mark.parametrize("packets", [-1, 256])
def test_packets_that_cannot_be_made(packets):
    bottleneck = frozen("uniform", NESTED, 2)
    with pytest.raises(UsageError, match="255"):
        bottleneck.compress_indices(torch.zeros(1, 6, 9, dtype=torch.long), 96, packets=packets)


def test_payloads_without_packets_cannot_be_concealed():
    bottleneck, _, payload = framed("static", 0)
    with pytest.raises(BitstreamError, match="without packets"):
        bottleneck.decompress_indices(payload, (6, 9), 96, erasures=True)


@every_kind
@pytest.mark.parametrize("packets", [0, 3])
def test_noise_is_refused_or_decodes_to_indices(kind, packets):
    bottleneck, _, payload = framed(kind, packets)
    generator = np.random.default_rng(0)
    for attempt in range(60):
        noise = bytearray(generator.bytes(int(generator.integers(0, 80))))
        if attempt % 2:
            noise = bytearray(payload)
            noise[int(generator.integers(0, len(noise)))] ^= int(generator.integers(1, 256))
        for erasures in (False, True):
            try:
                found = bottleneck.decompress_indices(bytes(noise), (6, 9), 96, erasures=erasures)
            except BitstreamError:
                continue
            assert found.shape == (1, 6, 9) and found.max() < 64 and found.min() >= (-1 if erasures else 0)


@every_kind
@pytest.mark.parametrize("packets", [2, 3, 6])
def test_packets_tell_what_a_damaged_head_was(kind, packets):
    bottleneck, grid, payload = framed(kind, packets)
    for value in range(256):
        damaged = bytes([value]) + payload[1:]
        if value != payload[0]:
            with pytest.raises(BitstreamError):
                bottleneck.decompress_indices(damaged, (6, 9), 96)
        assert torch.equal(bottleneck.decompress_indices(damaged, (6, 9), 96, erasures=True), grid)
    # With a packet lost besides, whose length is damaged too.
    both = bytes([payload[0] ^ 0x40]) + payload[1:-1] + bytes([payload[-1] ^ 1])
    if packets > 2:
        found = bottleneck.decompress_indices(both, (6, 9), 96, erasures=True)
        assert torch.equal(found[:, :4], grid[:, :4]) and bool((found[:, -1] == -1).all())


def test_forged_lengths_do_not_cost_time(monkeypatch):
    """Work is bounded by the size of indices and not by that of the file, nor by the number of packets."""
    bottleneck = frozen("static", RVQ, 1)
    worked: list[int] = []
    checksum = codebook._checksum

    def counted_checksum(head, number, body):
        worked.append(len(body) + codebook.CHECK_BYTES)
        return checksum(head, number, body)

    monkeypatch.setattr(codebook, "_checksum", counted_checksum)
    for length in (3, 700, 15_000):
        packed = LENGTH.pack(length)
        payload = codebook.HEAD.pack(4 * 255 + 1) + (packed * 30_000)[:30_000]
        found = bottleneck.decompress_indices(payload, (1, 410), 96, erasures=True)
        assert bool((found == -1).all())
        assert sum(worked) < 3 * codebook.EFFORT
        assert max(worked, default=0) <= codebook.CHECK_BYTES + 3 * 410
        worked.clear()


def test_a_codebook_too_large_for_the_prior_is_told_by_its_name():
    with pytest.raises(UsageError, match="'context' does not take codebooks of 5000"):
        CodebookBottleneck(CHANNELS, {"kind": "vq", "size": 5000}, {"kind": "context"})
