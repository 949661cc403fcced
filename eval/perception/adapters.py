"""Task models by name: reference models of compand, and models of other libraries whose weights the user has.

| name | models |
|---|---|
| `imagenette-classifier`, `FOLDER` | reference models (`compand.eval.perception.models`) |
| `timm:NAME` | image classifiers of timm |
| `torchvision:NAME` | image classifiers and segmenters of torchvision, with their default weights |
| `transformers:NAME` | image classifiers, segmenters and speech recognisers (CTC or sequence to sequence), NAME on the Hugging Face hub or a folder |
| `torchaudio:BUNDLE` | the Wav2Vec2ASRBundles of `torchaudio.pipelines`, decoded greedily |

Weights are those that the library finds in its cache or downloads, prepared and read by the library's own transforms.
Only behind `?random` (`timm:resnet18?random`) a model is left as it is initialised, from a fixed seed: that tests the
plumbing and recognises nothing.

A model that knows other classes than the task is restricted to those that are the task's, by name or by the task's
`foreign_classes`: among the 1,000 logits of an ImageNet classifier, the ten of Imagenette.
"""  # noqa: E501 (a table)

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compand.errors import CheckpointError, UsageError
from compand.eval.perception import models
from compand.eval.perception.task import Task, TaskModel
from compand.pictures import UInt8Array
from compand.sounds import Sound, resample
from compand.weights import choose_device

RANDOM = "?random"
_LEAST_SECONDS = 0.1
"""Recognisers get shorter sounds with silence behind them: their first convolutions see 25 ms."""


class _Request(NamedTuple):
    """What an adapter is asked for."""

    name: str  # as the library knows it
    random: bool  # initialised instead of loaded
    kind: str
    task: type[Task]
    device: torch.device


class _Answerer(NamedTuple):
    """What an adapter gives."""

    network: nn.Module
    predict: Callable[[Any], Any]  # takes and gives what the kind says
    note: str = ""


class ForeignModel:
    """A model of another library: a `compand.eval.perception.task.TaskModel`.

    Attributes:
        note: one sentence that a reader of its scores should know; "" for none.
    """

    trained_on: Mapping[str, Any] | None = None

    def __init__(self, name: str, kind: str, answerer: _Answerer) -> None:
        self.name = name
        self.kind = kind
        self.note = answerer.note
        self.identity = models.weights_fingerprint(answerer.network.state_dict())
        self._predict = answerer.predict

    def __call__(self, signal: Any, /) -> Any:
        with torch.inference_mode():
            return self._predict(signal)


def load(name: str, task: type[Task], device: str = "cpu") -> TaskModel:
    """The task model of that name.

    Args:
        name: see the module.
        task: the task that it has to solve.
        device: see `compand.weights.choose_device`.

    Raises:
        CheckpointError: not found, damaged, not downloadable, or of another task.
        UsageError: the library is not installed or has no model that fits the task.
    """
    library, _, rest = name.partition(":")
    if library not in _LIBRARIES:
        return _reference(name, task, device)
    adapt, kinds = _LIBRARIES[library]
    kind = next((kind for kind in task.kinds if kind in kinds), None)
    if kind is None:
        raise UsageError(
            f"{name} cannot solve {task.name}: {library} is adapted for {', '.join(kinds)} models, "
            f"the task takes {', '.join(task.kinds)}"
        )
    random = rest.endswith(RANDOM)
    request = _Request(rest.removesuffix(RANDOM), random, kind, task, choose_device(device))
    try:
        # Seeded, so that every process of a run has the same one; the state of the caller's generator is kept.
        with torch.random.fork_rng(devices=[]), _no_pickles():
            torch.manual_seed(0)
            answerer = adapt(request)
    except (CheckpointError, UsageError):
        raise
    except ImportError as error:
        package = (error.name or library).partition(".")[0]
        raise UsageError(f"{name} needs {package}, not installed here: pip install {package}") from error
    except Exception as error:  # libraries raise many types where weights are missing or do not fit
        fact = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{name} cannot be loaded ({fact}): check the name, and that its weights are in {library}'s cache or "
            "can be downloaded"
        ) from error
    answerer.network.requires_grad_(False)
    return ForeignModel(name, kind, answerer)


@contextmanager
def _no_pickles() -> Iterator[None]:
    """Makes `torch.load` refuse whatever is not plain tensors, also where a library asks for less caution."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _reference(name: str, task: type[Task], device: str) -> TaskModel:
    info = models.find(name)
    if info.task != task.name:
        raise CheckpointError(f"{info.name} solves {info.task}, not {task.name}: choose another model")
    if info.labels and info.labels != task.labels:
        raise CheckpointError(f"{info.name} knows other classes than {task.name} has now: train it again")
    model = models.load_model(info, device)
    if model.kind not in task.kinds:
        raise CheckpointError(
            f"{info.name} is of the kind {model.kind}; {task.name} takes {', '.join(task.kinds)}: choose another model"
        )
    return model


# ------------------------------------------------------------------------------------------------------ classes


def class_map(classes: int, names: Sequence[str], task: type[Task]) -> NDArray[np.int64]:
    """Which class of the task each class of a model is.

    In this order: by name, if the model names all classes of the task; by the task's `foreign_classes` for that many
    classes; one to one, if the numbers are equal; by the names that do agree.

    Args:
        classes: number of classes of the model.
        names: their names; () where they are unknown.
        task: the task.

    Returns:
        int64 [classes]; -1 for classes that the task does not have.

    Raises:
        UsageError: none agrees.
    """
    own = {_plain(label): index for index, label in enumerate(task.labels)}
    by_name = {place: own[_plain(name)] for place, name in enumerate(names) if _plain(name) in own}
    if task.labels and set(by_name.values()) == set(range(len(task.labels))):
        chosen: Mapping[int, int] = by_name
    elif classes in task.foreign_classes:
        chosen = task.foreign_classes[classes]
    elif classes == len(task.labels):
        chosen = {index: index for index in range(classes)}
    else:
        chosen = by_name
    if not chosen:
        raise UsageError(
            f"a model of {classes} classes has none of the {len(task.labels)} of {task.name}: choose another model"
        )
    result = np.full(classes, -1, np.int64)
    for theirs, ours in chosen.items():
        result[theirs] = ours
    return result


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _select(logits: Tensor, mapping: NDArray[np.int64], labels: int) -> Tensor:
    """Logits of a model, classes along the first axis, as logits of the task: the largest of those that map to a
    class, minus infinity where none does."""
    selected = torch.full((labels, *logits.shape[1:]), -torch.inf, device=logits.device)
    for theirs in np.flatnonzero(mapping >= 0).tolist():
        ours = int(mapping[theirs])
        selected[ours] = torch.maximum(selected[ours], logits[theirs].float())
    return selected


def _vision(
    request: _Request, network: nn.Module, names: Sequence[str], logits_of: Callable[[UInt8Array], Tensor]
) -> _Answerer:
    """An answerer of the request's kind.

    Args:
        names: of the model's classes, () where unknown.
        logits_of: uint8 pixels [H, W, 3] -> logits of one item, [classes], or [classes, h, w] of any size.
    """
    # One small gray picture says how many classes there are, which not every model declares.
    with torch.inference_mode():
        classes = logits_of(np.full((96, 96, 3), 128, np.uint8)).shape[0]
    task = request.task
    mapping = class_map(classes, names, task)

    def classify(pixels: UInt8Array) -> NDArray[np.float32]:
        return _select(logits_of(pixels), mapping, len(task.labels)).cpu().numpy()

    def segment(pixels: UInt8Array) -> NDArray[np.int64]:
        logits = _select(logits_of(pixels), mapping, len(task.labels))
        # Classes that the model does not have are minus infinity, which interpolation would turn into NaN.
        known = torch.from_numpy(np.unique(mapping[mapping >= 0])).to(logits.device)
        enlarged = F.interpolate(
            logits[known][None], size=pixels.shape[:2], mode="bilinear", align_corners=False
        )
        return known[enlarged[0].argmax(0)].cpu().numpy()

    known = len(set(mapping[mapping >= 0].tolist()))
    note = (
        f"It knows {known} of the {len(task.labels)} classes of {task.name}."
        if known < len(task.labels)
        else ""
    )
    return _Answerer(network, segment if request.kind == "segmenter" else classify, note)


# ---------------------------------------------------------------------------------------------------- libraries


def _timm(request: _Request) -> _Answerer:
    import timm
    from PIL import Image
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    network: Any = timm.create_model(request.name, pretrained=not request.random)
    network.eval().to(request.device)
    config = resolve_model_data_config(network)
    prepare = create_transform(**config, is_training=False)

    def logits_of(pixels: UInt8Array) -> Tensor:
        batch = prepare(Image.fromarray(pixels))[None].to(request.device)
        return network(batch)[0]

    return _vision(request, network, network.pretrained_cfg.get("label_names") or (), logits_of)


def _torchvision(request: _Request) -> _Answerer:
    from torchvision import models as library

    segmenting = request.kind == "segmenter"
    known = library.list_models(module=library.segmentation if segmenting else library)
    if request.name not in known:
        raise UsageError(
            f"torchvision has no {request.kind} named {request.name}: choose from {', '.join(known)}"
        )
    weights = library.get_model_weights(request.name).DEFAULT
    backbone = {"weights_backbone": None} if segmenting else {}
    network = library.get_model(request.name, weights=None if request.random else weights, **backbone)
    network.eval().to(request.device)
    prepare = weights.transforms()

    def logits_of(pixels: UInt8Array) -> Tensor:
        batch = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None]).to(request.device)
        answer = network(batch)
        return (answer["out"] if segmenting else answer)[0]

    return _vision(request, network, weights.meta.get("categories") or (), logits_of)


def _transformers(request: _Request) -> _Answerer:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(request.name, trust_remote_code=False)
    if request.kind == "recogniser":
        return _transformers_recogniser(request, config)
    segmenting = request.kind == "segmenter"
    family = (
        transformers.AutoModelForSemanticSegmentation
        if segmenting
        else transformers.AutoModelForImageClassification
    )
    network = (
        family.from_config(config)
        if request.random
        else family.from_pretrained(request.name, trust_remote_code=False)
    )
    network.eval().to(request.device)
    processor = transformers.AutoImageProcessor.from_pretrained(request.name, trust_remote_code=False)

    def logits_of(pixels: UInt8Array) -> Tensor:
        batch = processor(images=pixels, input_data_format="channels_last", return_tensors="pt")
        return network(batch["pixel_values"].to(request.device)).logits[0]

    names = [config.id2label[index] for index in range(config.num_labels)]
    # ImageNet's names come as "tench, Tinca tinca": the first is the one that label sets use.
    return _vision(request, network, [name.partition(",")[0] for name in names], logits_of)


def _transformers_recogniser(request: _Request, config: Any) -> _Answerer:
    import transformers

    sequence = type(config) in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING and not any(
        name.endswith("ForCTC") for name in config.architectures or ()
    )
    family = transformers.AutoModelForSpeechSeq2Seq if sequence else transformers.AutoModelForCTC
    network = (
        family.from_config(config)
        if request.random
        else family.from_pretrained(request.name, trust_remote_code=False)
    )
    network.eval().to(request.device)
    processor = transformers.AutoProcessor.from_pretrained(request.name, trust_remote_code=False)
    rate = processor.feature_extractor.sampling_rate
    # The words of the tasks are English, and one word is too little to guess a language from.
    multilingual = getattr(getattr(network, "generation_config", None), "is_multilingual", False)
    options = {"language": "en", "task": "transcribe"} if multilingual else {}

    def recognise(sound: Sound) -> str:
        batch = processor(_mono(sound, rate), sampling_rate=rate, return_tensors="pt").to(request.device)
        ids = network.generate(**batch, **options) if sequence else network(**batch).logits.argmax(-1)
        return str(processor.batch_decode(ids, skip_special_tokens=True)[0])

    return _Answerer(network, recognise)


def _torchaudio(request: _Request) -> _Answerer:
    from torchaudio import models as library
    from torchaudio import pipelines

    known = [name for name, bundle in vars(pipelines).items() if type(bundle) is pipelines.Wav2Vec2ASRBundle]
    if request.name not in known:
        raise UsageError(
            f"torchaudio has no Wav2Vec2ASRBundle named {request.name}: choose from {', '.join(known)}"
        )
    bundle = getattr(pipelines, request.name)
    if request.random:
        # The bundle itself only builds models with weights; what it would build says nobody else.
        network = library.wav2vec2_model(**bundle._params)
    else:
        network = bundle.get_model(dl_kwargs={"progress": False})
    network.eval().to(request.device)
    labels = bundle.get_labels()
    rate = int(bundle.sample_rate)

    def recognise(sound: Sound) -> str:
        emissions, _ = network(torch.from_numpy(_mono(sound, rate))[None].to(request.device))
        return greedy_transcript(emissions[0].argmax(-1).tolist(), labels)

    return _Answerer(network, recognise)


def _mono(sound: Sound, rate: int) -> NDArray[np.float32]:
    """Samples [N] at a rate, channels averaged, at least `_LEAST_SECONDS` long."""
    samples = resample(sound, rate).samples.mean(0, dtype=np.float32)
    return np.pad(samples, (0, max(0, round(_LEAST_SECONDS * rate) - samples.size)))


def greedy_transcript(indexes: Sequence[int], labels: Sequence[str]) -> str:
    """The transcript of the best label of every frame (Graves et al. 2006, best-path decoding).

    Repeated labels count once, label 0 is the blank between them, "|" separates words.

    >>> greedy_transcript([1, 1, 0, 1, 2, 3, 3, 4], ["-", "E", "|", "T", "A"])
    'EE TA'
    """
    changed = [index for place, index in enumerate(indexes) if place == 0 or index != indexes[place - 1]]
    return "".join(labels[index] for index in changed if index != 0).replace("|", " ").strip()


_LIBRARIES: dict[str, tuple[Callable[[_Request], _Answerer], tuple[str, ...]]] = {
    "timm": (_timm, ("image-classifier",)),
    "torchvision": (_torchvision, ("image-classifier", "segmenter")),
    "transformers": (_transformers, ("image-classifier", "segmenter", "recogniser")),
    "torchaudio": (_torchaudio, ("recogniser",)),
}
"""Prefix of a name -> its adapter, and the kinds of model that it makes."""
