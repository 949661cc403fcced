"""Checkpoints: found by name and fingerprint, complete or refused, never overwritten."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compand
from compand import checkpoint, registry
from compand.checkpoint import CheckpointInfo, find, fingerprint, for_header, read_info
from compand.coding import container
from compand.errors import CheckpointError, UsageError
from compand.weights import SCALE, _fingerprints, build, choose_device, save, warm_start

NAMES = [entry.name for entry in registry.entries() if entry.medium == "image"]


@pytest.fixture(params=NAMES)
def folder(request, checkpoint_of, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(checkpoint_of(request.param), tmp_path / f"{request.param}-v3")


@pytest.fixture
def shipped(checkpoint_of, monkeypatch):
    """Checkpoints in the place of the released ones: factorized-v1, and two versions of hyperprior."""
    first = read_info(checkpoint_of("hyperprior"))
    other = replace(first, name="hyperprior-v2", version=2, symbols=b"\1\2\3\4", synthesis=b"\5\6\7\7")
    infos = (first, other, read_info(checkpoint_of("factorized")))
    monkeypatch.setattr(checkpoint, "_shipped", lambda: infos)
    return infos


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def rewrite(folder, change) -> None:
    """Weights changed behind the back of config.json."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configured(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


# --------------------------------------------------------------------------------------------------- what it is


def test_facts(folder):
    info = read_info(folder)
    assert (info.name, info.version, info.medium, info.path) == (folder.name, 3, "image", folder)
    assert info.codec == folder.name.removesuffix("-v3") and len(info.symbols) == len(info.synthesis) == 4
    assert info.size == (folder / "model.safetensors").stat().st_size and info.qualities == (1, 8)
    assert info.parameters == sum(
        tensor.numel() for tensor in load_file(folder / "model.safetensors").values()
    )
    assert read_info(folder.rename(folder.parent / "mine")).version == 0


def test_no_pickle_and_no_training_parts(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    names = load_file(folder / "model.safetensors").keys()
    assert not [name for name in names if "density" in name or "hyper_synthesis" in name]
    assert [name for name in names if name.startswith("frozen.")]


def test_available_and_names_need_no_torch():
    code = (
        "import sys, compand; from compand import checkpoint; a = compand.available(); "
        "[checkpoint.find(i.name) for i in a]; "
        "assert all(i.path.is_dir() and len(i.symbols) == 4 for i in a); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy'; print(len(a))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_released_checkpoints_are_what_their_configs_say():
    for info in compand.available():
        assert build(info, "cpu", reduced=False).info == info


# ------------------------------------------------------------------------------------------------------ finding


def test_found_by_codec_by_name_and_by_folder(shipped, checkpoint_of):
    assert find("hyperprior").name == "hyperprior-v2" and find("hyperprior-v1").name == "hyperprior-v1"
    assert find("factorized") is shipped[2] and find(str(checkpoint_of("hyperprior"))) == shipped[0]
    with pytest.raises(
        CheckpointError, match=r"hyperprior-v9 not found.*folder or one of hyperprior-v1"
    ) as error:
        find("hyperprior-v9")
    one_line(error)


def header_of(info: CheckpointInfo, **changes) -> container.Header:
    geometry = container.ImageGeometry(8, 8, 3, 8)
    header = container.Header(info.codec_id, "", info.symbols, info.synthesis, (32,), geometry, 0)
    return replace(header, **changes)


def test_found_by_fingerprint(shipped):
    for info in shipped:
        assert for_header(header_of(info)) is info
        assert for_header(header_of(info, synthesis=b"none")) is info
        assert for_header(header_of(info).compacted()) is info
    same = replace(shipped[0], name="hyperprior-v3", synthesis=b"new!")
    checkpoint._shipped = lambda: (*shipped, same)  # undone by the fixture's monkeypatch
    assert for_header(header_of(shipped[0])) is shipped[0]
    assert for_header(header_of(same)) is same
    assert for_header(header_of(same, synthesis=b"none")) is same


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"symbols": b"\xaa\xbb\xcc\xdd"}, "a hyperprior checkpoint with symbols fingerprint aabbccdd"),
        ({"codec_id": 2}, "a factorized checkpoint"),
        ({"codec_id": 99}, "codec id 99"),
        ({"codec_id": 0, "codec_name": "foreign"}, "a foreign checkpoint"),
    ],
)
def test_files_without_a_checkpoint(shipped, changes, fact):
    with pytest.raises(CheckpointError, match=fact) as error:
        for_header(header_of(shipped[0], **changes))
    one_line(error)


def test_the_api_from_end_to_end(shipped, scenery, tmp_path):
    data = compand.encode(scenery[:40, :60], "factorized", quality=7)
    decoded = compand.decode(data, device="cpu")
    assert decoded.pixels.shape == (40, 60, 3)
    direct = compand.load("factorized", device="cpu").decode(data)
    assert np.array_equal(decoded.pixels, direct.pixels)


# ------------------------------------------------------------------------------------------------------- damage


def test_missing_things(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No such file") as error:
        compand.load(folder)
    assert "model.safetensors" in one_line(error)
    with pytest.raises(CheckpointError, match="No such file") as error:
        compand.load(tmp_path)
    assert "config.json" in one_line(error)
    with pytest.raises(CheckpointError, match="not found"):
        compand.load(tmp_path / "nothing")


@pytest.mark.parametrize("place", [0, 1, 100, 0.5, -1])
def test_truncated_weights(folder, place):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(place * len(data)) if isinstance(place, float) else place])
    with pytest.raises(CheckpointError, match="cannot be loaded") as error:
        compand.load(folder, device="cpu")
    one_line(error)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"codec": 3}', '{"codec": "hyperprior"}', "\x00", '{"codec": []}']
)
def test_damaged_configs(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        compand.load(folder)
    one_line(error)


@pytest.mark.parametrize(
    "values",
    [
        {"codec": "unheard"}, {"symbols": "zz"}, {"symbols": 5}, {"qualities": []}, {"qualities": None},
        {"parameters": "many"}, {"architecture": None}, {"architecture": {"unknown": 1}},
        {"architecture": {"stages": []}}, {"architecture": {"levels": 1}}, {"architecture": {"levels": "x"}},
        {"architecture": {"latent_channels": -4}}, {"architecture": {"stages": [[8, 24]]}},
        {"architecture": {"lambda_range": [0, 0]}}, {"architecture": {"lambda_range": []}},
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_name_something_else(folder, values):
    configured(folder, **values)
    with pytest.raises(CheckpointError) as error:
        compand.load(folder, device="cpu")
    one_line(error)


def test_weights_of_another_architecture(folder):
    architecture = read_info(folder).architecture | {"latent_channels": 40}
    if "context" in architecture:
        architecture["context"] = architecture["context"] | {"slices": [10, 30]}
    configured(folder, architecture=architecture)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json") as error:
        compand.load(folder, device="cpu")
    one_line(error)


def test_loading_is_strict(folder):
    original = (folder / "model.safetensors").read_bytes()
    names = list(load_file(folder / "model.safetensors"))
    gains = [name for name in names if name.endswith("y_gain.log2_gain")]
    for name in (names[0], names[-1], *gains):
        (folder / "model.safetensors").write_bytes(original)
        rewrite(folder, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError) as error:
            compand.load(folder, device="cpu")
        one_line(error)
    for name in ("surplus", "frozen.surplus", "transform.surplus"):
        (folder / "model.safetensors").write_bytes(original)
        rewrite(folder, lambda tensors, name=name: tensors.update({name: torch.zeros(2)}))
        with pytest.raises(CheckpointError) as error:
            compand.load(folder, device="cpu")
        one_line(error)


def test_every_changed_decoder_number_is_noticed(folder):
    original = (folder / "model.safetensors").read_bytes()
    codec = build(read_info(folder), "cpu")
    integers = [name for name in load_file(folder / "model.safetensors") if name.startswith("frozen.")]
    for name in [*codec.decoder_state(), *integers]:
        (folder / "model.safetensors").write_bytes(original)
        rewrite(folder, lambda tensors, name=name: tensors[name].flatten()[-1:].add_(1))
        with pytest.raises(CheckpointError, match="is not the file that its config"):
            compand.load(folder, device="cpu")


def test_weights_of_another_run_are_noticed(folder, checkpoint_of, trained, tmp_path):
    info = read_info(folder)
    codec = trained(info.codec, seed=1, steps=2)
    codec.bottleneck.freeze()
    save(codec, tmp_path / "other-v1")
    shutil.copy(tmp_path / "other-v1" / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="is not the file that its config"):
        compand.load(folder, device="cpu")


# --------------------------------------------------------------------------------------- saving and fingerprints


def test_a_checkpoint_is_never_overwritten(folder):
    codec = compand.load(folder, device="cpu")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="export to a new version") as error:
        save(codec, folder)
    one_line(error)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_needs_the_frozen_state(trained, tmp_path):
    with pytest.raises(CheckpointError, match="no tables yet"):
        save(trained("factorized", steps=0), tmp_path / "x-v1")
    assert not (tmp_path / "x-v1").exists()


def test_saving_again_keeps_fingerprints_and_bytes(folder, tmp_path, scenery):
    """Half precision and 8 bits are where rounding stops: what was loaded is stored as it is."""
    codec = build(read_info(folder), "cpu", reduced=False)
    save(codec, tmp_path / "again-v1")
    again = read_info(tmp_path / "again-v1")
    assert (again.symbols, again.synthesis) == (codec.info.symbols, codec.info.synthesis)
    copy = build(again, "cpu", reduced=False)
    assert copy.encode(scenery[:64, :64]) == codec.encode(scenery[:64, :64])


def test_fingerprints_separate_prior_and_synthesis(checkpoint_of, tmp_path):
    def fingerprints(change) -> tuple[bytes, bytes]:
        codec = build(read_info(checkpoint_of("hyperprior")), "cpu", reduced=False)
        with torch.no_grad():
            change(codec)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}-v1"
        save(codec, folder)
        info = read_info(folder)
        return info.symbols, info.synthesis

    symbols, synthesis = fingerprints(lambda codec: None)
    changed = fingerprints(lambda codec: codec.transform.synthesis_latent.bias.add_(1))
    assert changed[0] == symbols and changed[1] != synthesis
    changed = fingerprints(lambda codec: codec.bottleneck.y_gain.log2_inverse_offset.add_(1))
    assert changed[0] == symbols and changed[1] != synthesis
    changed = fingerprints(lambda codec: codec.bottleneck._shift.add_(1))
    assert changed[0] != symbols and changed[1] == synthesis
    changed = fingerprints(lambda codec: codec.bottleneck.prior.layers[0].offset.add_(1))
    assert changed[0] != symbols and changed[1] == synthesis
    # What only the encoder uses is neither: another encoder may write for the same decoder.
    assert fingerprints(lambda codec: codec.transform.analysis_latent.bias.add_(1)) == (symbols, synthesis)
    assert fingerprints(lambda codec: codec.bottleneck.hyper_analysis[0].bias.add_(1)) == (symbols, synthesis)


def test_the_fingerprint_is_of_names_lengths_and_contents():
    base = {"a": b"12", "b": b"3"}
    assert fingerprint(base) == fingerprint({"b": b"3", "a": b"12"}) and len(fingerprint(base)) == 4
    others = (
        {"a": b"1", "b": b"23"},
        {"a": b"12", "c": b"3"},
        {"a": b"12"},
        {"a": b"12", "b": b"4"},
        {"a\0002": b""},
    )
    assert len({fingerprint(base), *map(fingerprint, others)}) == 6


@pytest.mark.parametrize("name", ["hyperprior", "vqgan", "codebook-audio"])
def test_stored_weights_are_those_of_the_run(trained, name, tmp_path):
    codec = trained(name, steps=5)
    codec.bottleneck.freeze()
    save(codec, tmp_path / "x-v1")
    info = read_info(tmp_path / "x-v1")
    frozen = build(info, "cpu", reduced=False)
    loaded, own = frozen.state_dict(), codec.state_dict()
    coarse = tuple(
        f"{part}.{prefix}"
        for part in ("transform", "bottleneck")
        for prefix in getattr(codec, part).coarse_parts
    )
    for key, value in loaded.items():
        relative = 1 / 254 + 1e-3 if value.ndim == 4 and key.startswith(coarse) else 2**-10
        bound = own[key].abs().max() * (relative if value.ndim >= 3 else 0)
        assert float((value - own[key]).abs().max()) <= float(bound) + 1e-7, key
    # What decides how a file sounds or looks is in the fingerprint, the scales of 8-bit kernels too.
    tensors = load_file(info.path / "model.safetensors")
    decoding = [key for key in frozen.decoder_state() if key + SCALE in tensors]
    assert bool(decoding) == (name != "hyperprior")
    for key in decoding[:1]:
        tensors[key + SCALE] = 2 * tensors[key + SCALE]
        assert _fingerprints(frozen, tensors)[1] != info.synthesis


# --------------------------------------------------------------------------------------------------- warm starts


def test_a_warm_start_restores_the_run(checkpoint_of, tmp_path):
    """Exporting what was started from a checkpoint gives its prior again, to the last integer."""
    for name in NAMES:
        info = read_info(checkpoint_of(name))
        reference = build(info, "cpu", reduced=False)
        codec = registry.by_name(name).load_class()(**info.architecture)
        warm_start(codec, info)
        for key, value in reference.state_dict().items():
            assert torch.equal(codec.state_dict()[key], value), key
        codec.eval().bottleneck.freeze()
        expected, got = reference.bottleneck.frozen_arrays(), codec.bottleneck.frozen_arrays()
        for key in expected:
            if key.startswith("prior") or key in ("multiplier", "shift"):
                assert np.array_equal(got[key], expected[key]), key


def test_a_warm_start_from_another_codec(checkpoint_of):
    info = read_info(checkpoint_of("hyperprior"))
    codec = registry.by_name("factorized").load_class()(**read_info(checkpoint_of("factorized")).architecture)
    warm_start(codec, info)
    reference = build(info, "cpu", reduced=False).transform.state_dict()
    assert all(torch.equal(codec.transform.state_dict()[key], value) for key, value in reference.items())


def test_a_warm_start_that_does_not_fit(checkpoint_of):
    info = read_info(checkpoint_of("hyperprior"))
    stranger = registry.by_name("hyperprior").load_class()(7, [[4, 5, 1]], 3, [4, 4, 4], levels=3)
    with pytest.raises(CheckpointError, match="no weights in common") as error:
        warm_start(stranger, info)
    one_line(error)
    narrow = registry.by_name("hyperprior").load_class()(
        **dict(info.architecture) | {"hyper_widths": [8, 8, 8]}
    )
    with pytest.raises(CheckpointError, match="start_prior: false") as error:
        warm_start(narrow, info)
    one_line(error)
    warm_start(narrow, info, prior=False)
    reference = build(info, "cpu", reduced=False).transform.state_dict()
    assert all(torch.equal(narrow.transform.state_dict()[key], value) for key, value in reference.items())


# ------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "nonsense", ""])
def test_devices_that_are_not_here(checkpoint_of, device):
    with pytest.raises(UsageError, match="cannot be used here") as error:
        compand.load(checkpoint_of("factorized"), device=device)
    assert "\n" not in str(error.value)


def test_devices_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
