"""Reference models: folders NAME-vN with model.safetensors, config.json and CARD.md, as codecs' checkpoints are.

Their config.json names a task where a codec's names a codec, so neither is taken for the other. It names its network
by a key of `NETWORKS`: a downloaded config can choose among these classes, and import nothing else.
"""

from __future__ import annotations

import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compand.checkpoint import fingerprint
from compand.errors import CheckpointError, UsageError
from compand.weights import check_new, choose_device

NETWORKS = {
    "residual-classifier": "compand.eval.perception.networks.vision:ResidualClassifier",
    "plain-classifier": "compand.eval.perception.networks.vision:PlainClassifier",
    "pyramid-segmenter": "compand.eval.perception.networks.vision:PyramidSegmenter",
    "sound-classifier": "compand.eval.perception.networks.audio:SoundClassifier",
    "separator": "compand.eval.perception.networks.audio:Separator",
}
"""Name in config.json -> "module:Class" of a `TaskNetwork`. Names are for ever: released models carry them."""

_FLOAT16_LEAST = 2.0**-14
"""Smallest normal float16. A kernel whose largest value is below it would lose most of its digits."""


def register_network(name: str, target: str) -> None:
    """Adds a network of another package, "module:Class", for the models of its tasks. Raises UsageError if the name is
    taken."""
    if NETWORKS.get(name, target) != target:
        raise UsageError(f"a network named {name} exists already: choose another name")
    NETWORKS[name] = target


class TaskNetwork(nn.Module, ABC):
    """A network of a task model.

    Attributes:
        kind: a key of `compand.eval.perception.task.KINDS`: what `predict` takes and gives.
        architecture: constructor arguments, as config.json keeps them (of JSON's types).
    """

    kind: str
    architecture: dict[str, Any]

    @abstractmethod
    def predict(self, signal: Any) -> Any:
        """The answer on one undamaged or decoded item, of any size or sampling rate, with all preparation inside.

        Called in evaluation mode, without gradients; computes on the device of the parameters. Input and answer are
        NumPy arrays or a Sound, as `kind` says.
        """


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a reference model, read from its config.json.

    Attributes:
        name: "imagenette-classifier-v1".
        version: number behind "-v"; 0 for a folder of another name.
        task: the task it solves.
        network: key of `NETWORKS`.
        architecture: constructor arguments of the network.
        labels: classes in the order of logits; () where there are none.
        trained_on: {"codec": ..., "quality": ...} if it was trained on decoded items, None for clean ones.
        parameters: number of values stored.
        size: bytes of model.safetensors.
        weights: fingerprint of all tensors together, hexadecimal.
        path: its folder.
    """

    name: str
    version: int
    task: str
    network: str
    architecture: Mapping[str, Any]
    labels: tuple[str, ...]
    trained_on: Mapping[str, Any] | None
    parameters: int
    size: int
    weights: str
    path: Path


class ReferenceModel:
    """A loaded reference model: a `compand.eval.perception.task.TaskModel`."""

    def __init__(self, network: TaskNetwork, info: ModelInfo) -> None:
        self.network = network
        self.info = info
        self.name = info.name
        self.identity = info.weights
        self.kind = network.kind
        self.trained_on = info.trained_on

    def __call__(self, signal: Any, /) -> Any:
        with torch.inference_mode():
            return self.network.predict(signal)


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of names and contents, hexadecimal."""
    contents = {
        name: tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }
    return fingerprint(contents).hex()


def save_model(
    network: TaskNetwork,
    folder: Path,
    *,
    task: str,
    labels: Sequence[str] = (),
    trained_on: Mapping[str, Any] | None = None,
) -> ModelInfo:
    """Writes model.safetensors and config.json of a trained network, whole or not at all.

    Kernels (tensors of two axes and more) are stored in float16, all else as it is. Measure the model as it loads,
    not as it was trained.

    Args:
        network: of a class in `NETWORKS`.
        folder: new folder NAME-vN.
        task: name of the task it solves.
        labels: classes in the order of logits.
        trained_on: {"codec": name, "quality": number} if it was trained on decoded items.

    Raises:
        CheckpointError: the folder holds something already, or the network's class has no name in `NETWORKS`.
    """
    check_new(folder)
    target = f"{type(network).__module__}:{type(network).__qualname__}"
    names = [name for name, known in NETWORKS.items() if known == target]
    if not names:
        raise CheckpointError(f"{target} has no name: call compand.eval.perception.models.register_network")
    tensors = {name: _stored(value) for name, value in network.state_dict().items()}
    config = {
        "task": task,
        "network": names[0],
        "architecture": network.architecture,
        "labels": list(labels),
        "trained_on": dict(trained_on) if trained_on else None,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "weights": weights_fingerprint(tensors),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as draft:
        written = Path(draft, folder.name)
        written.mkdir()
        save_file(tensors, written / "model.safetensors")
        (written / "model.safetensors").chmod(0o644)
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if folder.exists():  # and is empty
            folder.rmdir()
        written.rename(folder)
    return read_info(folder)


def _stored(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous().clone()
    if value.ndim < 2 or not value.is_floating_point() or not value.numel():
        return value
    largest = float(value.abs().max())
    return value.half() if _FLOAT16_LEAST <= largest <= torch.finfo(torch.float16).max else value


def read_info(folder: Path) -> ModelInfo:
    """Facts of the reference model in a folder. Raises CheckpointError if it is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and "codec" in config:
            raise CheckpointError(f"{folder} holds a codec, not a task model: choose a model of a task")
        version = re.search(r"-v(\d+)$", folder.name)
        trained_on = config["trained_on"]
        return ModelInfo(
            name=folder.name,
            version=int(version[1]) if version else 0,
            task=str(config["task"]),
            network=str(config["network"]),
            architecture=dict(config["architecture"]),
            labels=tuple(config["labels"]),
            trained_on={"codec": str(trained_on["codec"]), "quality": float(trained_on["quality"])}
            if trained_on is not None
            else None,
            parameters=int(config["parameters"]),
            size=(folder / "model.safetensors").stat().st_size,
            weights=str(config["weights"]),
            path=folder,
        )
    except OSError as error:
        raise CheckpointError(f"{folder} is no task model: {error.strerror} ({error.filename})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): restore the model or train it again") from None


def available(task: str | None = None) -> list[ModelInfo]:
    """The reference models that ship with compand, or those of one task, by name and version.

    Raises CheckpointError if a config.json among the shipped ones cannot be read.
    """
    import compand.checkpoints

    found = []
    for root in compand.checkpoints.__path__:
        for path in Path(root).glob("*-v*/config.json"):
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}): restore or remove its folder"
                ) from None
            # One of another type or without a task is a codec's: `compand.checkpoint` judges it.
            if isinstance(config, dict) and "task" in config:
                found.append(read_info(path.parent))
    chosen = [info for info in found if task in (None, info.task)]
    return sorted(chosen, key=lambda info: (info.name.rpartition("-v")[0], info.version))


def find(name: str | Path) -> ModelInfo:
    """A reference model by name (with its version, or the newest without), or by folder.

    Raises:
        CheckpointError: nothing of that name.
    """
    shipped = available()
    matches = [info for info in shipped if str(name) in (info.name, info.name.rpartition("-v")[0])]
    if matches:
        return matches[-1]
    if Path(name).is_dir():
        return read_info(Path(name))
    known = ", ".join(info.name for info in shipped) or "none are shipped"
    raise CheckpointError(f"task model {name} not found: give a folder or one of {known}")


def load_model(name_or_info: str | Path | ModelInfo, device: str = "cpu") -> ReferenceModel:
    """A reference model, ready to judge.

    Args:
        name_or_info: name, folder or facts.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        CheckpointError: unknown, or its weights are missing, damaged, of another architecture or not those that its
            config.json names.
        UsageError: the device does not exist.
    """
    info = name_or_info if isinstance(name_or_info, ModelInfo) else find(name_or_info)
    place = choose_device(device)
    path = info.path / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded ({error}): restore the model") from None
    if weights_fingerprint(tensors) != info.weights:
        raise CheckpointError(f"{path} is not the file that its config.json names: restore the model")
    if info.network not in NETWORKS:
        raise CheckpointError(
            f"{info.path}/config.json names network {info.network}, unknown here: a newer compand may have it"
        )
    module, _, class_name = NETWORKS[info.network].partition(":")
    network_class: type[TaskNetwork] = getattr(import_module(module), class_name)
    try:
        network = network_class(**info.architecture)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{info.path}/config.json does not describe a network ({problem})") from None
    own = network.state_dict()
    restored = {name: value.to(own[name].dtype) if name in own else value for name, value in tensors.items()}
    try:
        network.load_state_dict(restored, strict=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit its config.json: {problem}") from None
    return ReferenceModel(network.requires_grad_(False).eval().to(place), info)
