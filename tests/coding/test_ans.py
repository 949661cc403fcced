"""The entropy coder: exactness, rate, a fixed stream, two equal backends, and damaged data."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compand.coding import ans, ans_reference
from compand.coding.ans import BLOCK, AnsReader, AnsWriter
from compand.coding.tables import PRECISION, TableSet
from compand.errors import BitstreamError, UsageError

constriction = pytest.importorskip("constriction")

TOTAL = 1 << PRECISION
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
BACKENDS = ("constriction", "reference")

int32s = st.one_of(
    st.integers(-40, 40),
    st.integers(INT32_MIN, INT32_MAX),
    st.sampled_from([INT32_MIN, INT32_MIN + 1, INT32_MAX - 1, INT32_MAX]),
)


def encode(values, indexes, tables: TableSet, backend: str = "constriction") -> bytes:
    writer = AnsWriter(backend)
    writer.push(values, indexes, tables)
    return writer.finish()


def decode(data: bytes, indexes, tables: TableSet, backend: str = "constriction") -> np.ndarray:
    reader = AnsReader(data, backend)
    values = reader.pull(indexes, tables)
    reader.finish()
    return values


@st.composite
def table_sets(draw: st.DrawFn) -> TableSet:
    count = draw(st.integers(1, 6))
    weights = st.lists(st.sampled_from([0.0, 1e-9, 0.01, 1.0, 1e6]), min_size=1, max_size=40)
    lows = st.one_of(st.integers(-50, 50), st.sampled_from([INT32_MIN, INT32_MAX - 39]))
    return TableSet.from_masses(
        [np.array(draw(weights)) for _ in range(count)],
        np.array([draw(lows) for _ in range(count)]),
        [draw(st.sampled_from([1e-12, 1e-3, 1.0])) for _ in range(count)],
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data(), tables=table_sets())
def test_any_pushes_come_back_from_either_backend(data: st.DataObject, tables: TableSet) -> None:
    pushes = []
    for _ in range(data.draw(st.integers(0, 3))):
        values = data.draw(hnp.arrays(np.int32, st.integers(0, 60), elements=int32s))
        dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]))
        indexes = data.draw(hnp.arrays(dtype, values.size, elements=st.integers(0, len(tables) - 1)))
        pushes.append((values, indexes))
    streams = []
    for backend in BACKENDS:
        writer = AnsWriter(backend)
        for values, indexes in pushes:
            writer.push(values, indexes, tables)
        streams.append(writer.finish())
        assert writer.finish() == streams[-1], "finish must not change what it encodes"
    assert streams[0] == streams[1]
    for backend in BACKENDS:
        reader = AnsReader(streams[0], backend)
        for values, indexes in pushes:
            decoded = reader.pull(indexes, tables)
            assert decoded.dtype == np.int32
            assert decoded.tolist() == values.tolist()
        reader.finish()


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
def test_blocks_join_without_a_seam(count: int) -> None:
    rng = np.random.default_rng(count)
    scales = np.geomspace(0.1, 60, 40)
    tables = TableSet.gaussian(scales)
    indexes = rng.integers(0, 40, count).astype(np.uint8)
    values = np.rint(rng.normal(size=count) * scales[indexes]).astype(np.int32)
    values[:: max(1, count // 50)] = INT32_MIN  # escapes in every block
    data = encode(values, indexes, tables)
    assert (decode(data, indexes, tables) == values).all()
    assert (decode(data, indexes, tables, "reference") == values).all()


@pytest.mark.parametrize("scale", [0.05, 0.15, 0.4, 1.0, 3.0, 20.0, 300.0])
def test_bytes_match_the_information_content(scale: float) -> None:
    rng = np.random.default_rng(1)
    tables = TableSet.gaussian([scale])
    values = np.rint(rng.normal(0, scale, 200_000)).astype(np.int32)
    indexes = np.zeros(values.size, dtype=np.uint8)
    content = tables.bits(values, indexes).sum()
    # The density's own entropy guards against tables that are wrong in the coder and in `bits` alike.
    probabilities = np.unique(values, return_counts=True)[1] / values.size
    entropy = -(probabilities * np.log2(probabilities)).sum() * values.size
    assert content == pytest.approx(entropy, rel=0.005, abs=200)
    assert abs(8 * len(encode(values, indexes, tables)) - content) < 0.001 * content + 64


def test_mixed_tables_and_escapes_match_the_information_content() -> None:
    rng = np.random.default_rng(2)
    scales = np.geomspace(0.05, 300, 64)
    tables = TableSet.gaussian(scales)
    indexes = rng.integers(0, 64, 300_000).astype(np.uint8)
    values = np.rint(rng.standard_t(3, indexes.size) * scales[indexes]).astype(np.int32)
    reach = tables.sizes[indexes] // 2
    assert np.count_nonzero(np.abs(values) > reach) > 1000
    content = tables.bits(values, indexes).sum()
    assert abs(8 * len(encode(values, indexes, tables)) - content) < 0.001 * content + 64


GOLDEN_TABLES = TableSet(
    [
        [TOTAL // 4, TOTAL // 2, TOTAL // 4 - 1, 1],
        [TOTAL - 3, 1, 1, 1],
        [3, 1 << 20, 5_000_000, TOTAL - 5_000_004 - (1 << 20), 1],
    ],
    [-1, 0, 100],
)
GOLDEN_INDEXES = np.array([2, 0, 1, 0, 2, 0, 1, 2, 0, 2, 0, 1, 0, 2], dtype=np.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "golden"),
    [
        ([101, 0, 0, -1, 102, 1, 0, 103, 0, 100, 0, 0, 1, 102], "19425b3eff459403"),
        (
            [101, 0, 2, -2, 102, 1, -1, 103, 0, 104, 70_000, INT32_MIN, 1, INT32_MAX],
            "ed2fff0000dd220000f80740ffffff0498970b75ffffffd5fffffff88ee9c48fffffbfd3090cf701",
        ),
        ([], ""),
    ],
    ids=["listed values", "escapes", "nothing"],
)
def test_the_stream_is_fixed(backend: str, values: list[int], golden: str) -> None:
    """Released files hold these words: a change here is a new format version."""
    indexes = GOLDEN_INDEXES[: len(values)]
    assert encode(values, indexes, GOLDEN_TABLES, backend).hex() == golden
    assert decode(bytes.fromhex(golden), indexes, GOLDEN_TABLES, backend).tolist() == values


def frequency_tables() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    tables = {
        "two symbols": np.array([1, TOTAL - 1]),
        "two symbols, reversed": np.array([TOTAL - 1, 1]),
        "even": np.full(1 << 16, 1 << 8),
        "longest": np.r_[np.ones(1 << 16, dtype=np.int64), TOTAL - (1 << 16)],
        "longest, peak first": np.r_[TOTAL - (1 << 16), np.ones(1 << 16, dtype=np.int64)],
        "escape even": np.array([TOTAL // 3, TOTAL // 3, TOTAL - 2 * (TOTAL // 3)]),
    }
    for t in range(60):
        masses = rng.exponential(size=int(rng.integers(1, 4000))) ** rng.uniform(0.2, 12)
        tables[f"random {t}"] = TableSet.from_masses([masses], [0], [masses.max() * 1e-9]).frequencies[0]
    return tables


@pytest.mark.parametrize(
    "name", ["two symbols", "two symbols, reversed", "even", "longest", "longest, peak first"]
)
def test_constriction_uses_extreme_frequencies_as_they_are(name: str) -> None:
    _assert_same_quantiles(frequency_tables()[name].astype(np.uint32))


def test_constriction_uses_random_frequencies_as_they_are() -> None:
    for name, frequencies in frequency_tables().items():
        if name.startswith("random"):
            _assert_same_quantiles(frequencies.astype(np.uint32))


def _assert_same_quantiles(frequencies: np.ndarray) -> None:
    """A lone word with quantile q decodes to the symbol that owns q: probe both ends of each range."""
    cumulative = np.r_[0, np.cumsum(frequencies.astype(np.int64))]
    table = TableSet([frequencies], [0])
    symbols = np.arange(frequencies.size, dtype=np.int32)
    if symbols.size > 200:
        symbols = np.r_[symbols[:60], symbols[len(symbols) // 2 :][:60], symbols[-60:]]
    model = ans._BACKENDS["constriction"].models(table)(0)
    for symbol in symbols:
        for quantile in (cumulative[symbol], cumulative[symbol + 1] - 1):
            words = np.array([quantile | (1 << PRECISION)], dtype=np.uint32)
            assert constriction.stream.stack.AnsCoder(words).decode(model) == symbol


def test_every_type_of_index_gives_the_same_bytes() -> None:
    tables = TableSet.gaussian(np.geomspace(0.2, 9, 30))
    rng = np.random.default_rng(4)
    indexes, values = rng.integers(0, 30, 500), rng.integers(-9, 9, 500)
    streams = {
        encode(values.astype(value_type), indexes.astype(index_type), tables)
        for index_type in (np.uint8, np.int8, np.uint16, np.int32, np.int64, np.uint64)
        for value_type in (np.int8, np.int16, np.int32, np.int64)
    }
    assert len(streams) == 1
    assert encode(values.tolist(), indexes.tolist(), tables) in streams


def test_65536_tables() -> None:
    shapes = [[TOTAL - 1 - k, k, 1] for k in range(1, 17)]
    tables = TableSet([shapes[t % 16] for t in range(1 << 16)], np.arange(1 << 16) % 1000)
    rng = np.random.default_rng(5)
    indexes = rng.integers(0, 1 << 16, 2000)
    indexes[:2] = 0, (1 << 16) - 1
    values = (indexes % 1000 + rng.integers(0, 3, 2000)).astype(np.int32)
    data = encode(values, indexes.astype(np.uint16), tables)
    assert encode(values, indexes.astype(np.int64), tables) == data
    assert (decode(data, indexes, tables) == values).all()
    assert (decode(data, indexes, tables, "reference") == values).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_takes_no_bytes(backend: str) -> None:
    tables = TableSet.gaussian([1.0])
    assert AnsWriter(backend).finish() == b""
    assert encode([], [], tables, backend) == b""
    assert decode(b"", np.zeros(0, dtype=np.uint8), tables, backend).shape == (0,)


@pytest.mark.parametrize(
    ("values", "indexes"),
    [
        ([1, 2], [0]),
        ([[1, 2]], [[0, 0]]),
        ([1.0], [0]),
        ([1], [0.0]),
        ([1], [2]),
        ([1], [-1]),
        ([2**31], [0]),
        ([-(2**31) - 1], [0]),
        (np.array([2**63], dtype=np.uint64), [0]),
        (np.ones(BLOCK + 1, dtype=np.int32), np.r_[np.zeros(BLOCK, dtype=np.uint8), np.uint8(2)]),
    ],
)
def test_a_refused_push_leaves_the_writer_as_it_was(values, indexes) -> None:
    tables = TableSet.gaussian([1.0, 2.0])
    writer = AnsWriter()
    with pytest.raises(UsageError) as caught:
        writer.push(values, indexes, tables)
    assert "\n" not in str(caught.value)
    assert writer.finish() == b""


def test_an_unknown_table_is_refused_in_reading_too() -> None:
    with pytest.raises(UsageError, match="1 tables"):
        AnsReader(b"\x01").pull([1], TableSet.gaussian([1.0]))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="constriction, reference"):
        AnsWriter("other")


def valid_stream(*, escapes: bool) -> tuple[bytes, np.ndarray, TableSet, np.ndarray]:
    rng = np.random.default_rng(6)
    scales = np.geomspace(0.3, 30, 8)
    tables = TableSet.gaussian(scales, tail=1e-2)
    indexes = rng.integers(0, 8, 400).astype(np.uint8)
    values = np.rint(rng.standard_t(2, 400) * scales[indexes]).astype(np.int32)
    if not escapes:
        values = values.clip(tables.lows[indexes], -tables.lows[indexes])
    return encode(values, indexes, tables), indexes, tables, values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("escapes", [False, True])
def test_truncated_and_extended_streams_are_noticed(backend: str, escapes: bool) -> None:
    data, indexes, tables, values = valid_stream(escapes=escapes)
    damaged = [data[:cut] for cut in range(len(data))] + [data[cut:] for cut in range(1, len(data))]
    damaged += [data + b"\1", data + b"\0", data + b"\0\0\0\1", data + data]
    for stream in damaged:
        with pytest.raises(BitstreamError):
            decode(stream, indexes, tables, backend)
    assert (decode(data, indexes, tables, backend) == values).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_flipped_bit_is_noticed_where_nothing_escapes(backend: str) -> None:
    data, indexes, tables, _ = valid_stream(escapes=False)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            decode(bytes(changed), indexes, tables, backend)


def test_other_tables_and_other_indexes_are_noticed() -> None:
    data, indexes, tables, _ = valid_stream(escapes=False)
    changed = indexes.copy()
    changed[200] ^= 1
    for wrong_indexes, wrong_tables in (
        (indexes, TableSet.gaussian(np.geomspace(0.31, 31, 8), tail=1e-2)),
        (changed, tables),
        (indexes[:-1], tables),
        (np.append(indexes, np.uint8(7)), tables),
    ):
        with pytest.raises(BitstreamError):
            decode(data, wrong_indexes, wrong_tables)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400))
def test_noise_never_crashes_and_both_backends_read_it_alike(data: bytes) -> None:
    _, indexes, tables, _ = valid_stream(escapes=True)
    outcomes = []
    for backend in BACKENDS:
        try:
            reader = AnsReader(data, backend)
            outcomes.append(reader.pull(indexes, tables).tolist())
        except BitstreamError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def forge_escape(length: int, pieces: list[tuple[int, int]]) -> tuple[bytes, TableSet]:
    """One escape whose length and bits are chosen freely; the bits are (value, width) from the lowest on."""
    coder = ans_reference.Coder(np.array([ans.FIRST_STATE], dtype=np.uint32))
    for value, width in reversed([(length, 6), *pieces]):
        coder.encode_bits_reverse(np.array([value]), np.array([width]))
    tables = TableSet([[1, TOTAL - 1]], [0])
    coder.encode_reverse(np.array([1]), ans_reference.build_model(tables.frequencies[0]))
    return coder.words().tobytes().rstrip(b"\0"), tables


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("length", "pieces", "complaint"),
    [
        (34, [(0, 16), (0, 16), (0, 2)], "34 bits"),
        (63, [(65535, 16)] * 4, "63 bits"),
        (33, [(65535, 16), (65535, 16), (1, 1)], "beyond the 32-bit"),
        (32, [(65535, 16), (65535, 16)], "beyond the 32-bit"),
    ],
)
def test_forged_escapes_are_refused(backend: str, length: int, pieces: list, complaint: str) -> None:
    data, tables = forge_escape(length, pieces)
    with pytest.raises(BitstreamError, match=complaint):
        AnsReader(data, backend).pull([0], tables)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_forger_itself_writes_streams_that_are_read(backend: str) -> None:
    data, tables = forge_escape(17, [(0x1234, 16), (1, 1)])
    assert decode(data, [0], tables, backend).tolist() == [-((0x31234 - 1) >> 1) - 1]


def test_tables_are_shared_between_threads() -> None:
    data, indexes, tables, values = valid_stream(escapes=True)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(bool((decode(data, indexes, tables) == values).all())))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_models_go_with_their_tables() -> None:
    tables = TableSet.gaussian([1.0])
    encode([1], [0], tables)
    gone = weakref.ref(tables)
    del tables
    gc.collect()
    assert gone() is None


def test_without_constriction_the_reference_takes_over() -> None:
    program = (
        "import sys; sys.modules['constriction'] = None\n"
        "from compand.coding import ans\n"
        "from compand.coding.tables import TableSet\n"
        "tables = TableSet.gaussian([2.0])\n"
        "writer = ans.AnsWriter(); writer.push([1, -3, 5], [0, 0, 0], tables)\n"
        "print(ans.BACKEND, writer.finish().hex())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [
        "reference",
        encode([1, -3, 5], [0, 0, 0], TableSet.gaussian([2.0])).hex(),
    ]
    assert ans.BACKEND == "constriction"
