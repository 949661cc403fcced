"""Task models: stored whole, loaded strictly, found by name, never taken for codecs; adapters of other libraries."""

from __future__ import annotations

import importlib.util
import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import compand.checkpoints
from compand import checkpoint
from compand.errors import CheckpointError, UsageError
from compand.eval.perception import adapters, models, task
from compand.eval.perception.task import ClassificationTask, label_spoken
from compand.sounds import Sound


class Toy(models.TaskNetwork):
    """A network with kernels, a bias, counters and a kernel too small for half precision."""

    kind = "image-classifier"

    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.architecture = {"classes": classes, "width": width}
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(width, classes)
        self.tiny = nn.Parameter(torch.full((2, 2), 1e-7))

    def predict(self, signal):
        pixels = torch.from_numpy(signal).permute(2, 0, 1)[None].float() / 255
        return self.head(self.body(pixels))[0].numpy()


class Animals(ClassificationTask):
    name = "animals"
    medium = "image"
    kinds = ("image-classifier",)
    default_model = "animals-classifier"
    labels = ("tench", "church", "golf ball")
    foreign_classes = {1000: {0: 0, 497: 1, 574: 2}}  # noqa: RUF012

    def items(self):
        return []


class Scenes(Animals):
    name = "scenes"
    kinds = ("segmenter",)
    labels = ("road", "car", "person")
    foreign_classes = {}  # noqa: RUF012


class Words(ClassificationTask):
    name = "words"
    medium = "audio"
    kinds = ("sound-classifier", "recogniser")
    default_model = "words-classifier"
    labels = ("yes", "no")

    def items(self):
        return []


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "toy", f"{__name__}:Toy")


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy(3)


@pytest.fixture
def folder(network, tmp_path) -> Path:
    models.save_model(network, tmp_path / "animals-classifier-v2", task="animals", labels=Animals.labels)
    return tmp_path / "animals-classifier-v2"


@pytest.fixture
def shipped(folder, monkeypatch) -> Path:
    """The folder among the released checkpoints, beside an older version and a codec."""
    released = folder.parent / "released"
    for name in ("animals-classifier-v1", "animals-classifier-v2", "animals-classifier-v10"):
        shutil.copytree(folder, released / name)
    for path in compand.checkpoints.__path__:
        shutil.copytree(Path(path, "hyperprior-v1"), released / "hyperprior-v1")
    monkeypatch.setattr(compand.checkpoints, "__path__", [str(released)])
    checkpoint._shipped.cache_clear()
    yield released
    checkpoint._shipped.cache_clear()


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------- reference models


def test_what_is_loaded_is_what_was_saved(network, folder):
    loaded = models.load_model(folder)
    own, stored = network.state_dict(), loaded.network.state_dict()
    assert own.keys() == stored.keys()
    for name, value in stored.items():
        assert value.dtype == own[name].dtype, name
        assert value.numpy() == pytest.approx(own[name].numpy(), rel=2**-11, abs=1e-7), name
        if own[name].ndim < 2:
            assert torch.equal(value, own[name]), name
    assert torch.equal(stored["tiny"], own["tiny"])
    assert loaded(PIXELS) == pytest.approx(
        network.eval().requires_grad_(False).predict(PIXELS), rel=5e-3, abs=1e-3
    )
    assert (loaded.name, loaded.kind, loaded.trained_on) == (
        "animals-classifier-v2",
        "image-classifier",
        None,
    )
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())


def test_kernels_take_two_bytes_a_number(network, folder):
    stored = load_file(folder / "model.safetensors")
    assert stored["body.0.weight"].dtype == stored["head.weight"].dtype == torch.float16
    assert stored["head.bias"].dtype == stored["body.1.running_var"].dtype == torch.float32
    assert stored["tiny"].dtype == torch.float32
    assert stored["body.1.num_batches_tracked"].dtype == torch.int64
    info = models.read_info(folder)
    assert info.size == (folder / "model.safetensors").stat().st_size
    assert info.parameters == sum(value.numel() for value in stored.values())


def test_saving_what_was_loaded_changes_nothing(folder, tmp_path):
    again = models.save_model(
        models.load_model(folder).network, tmp_path / "again-v1", task="animals", labels=Animals.labels
    )
    assert again.weights == models.read_info(folder).weights


def test_facts_of_a_model_trained_on_decoded_items(network, tmp_path):
    trained_on = {"codec": "jpeg", "quality": 5}
    info = models.save_model(network, tmp_path / "a-v3", task="animals", trained_on=trained_on)
    assert info == models.read_info(tmp_path / "a-v3")
    assert (info.version, info.task, info.network, info.labels) == (3, "animals", "toy", ())
    assert models.load_model(info).trained_on == trained_on


def test_a_released_folder_is_never_overwritten(network, folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        models.save_model(network, folder, task="animals")
    assert (folder / "model.safetensors").read_bytes() == before


def test_nothing_is_left_of_a_save_that_fails(network, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(models, "save_file", full)
    with pytest.raises(OSError, match="full"):
        models.save_model(network, tmp_path / "a-v1", task="animals")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_a_name_is_not_saved(network, tmp_path, monkeypatch):
    monkeypatch.delitem(models.NETWORKS, "toy")
    with pytest.raises(CheckpointError, match="register_network"):
        models.save_model(network, tmp_path / "a-v1", task="animals")


def damage_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"][0] += 1
    save_file(tensors, folder / "model.safetensors")


def rename_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["surplus"] = tensors.pop("head.bias")
    save_file(tensors, folder / "model.safetensors")
    edit(folder, weights=models.weights_fingerprint(tensors))


FAULTS = {
    "another weight": (damage_weights, "is not the file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no task model"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20),
        "cannot be loaded",
    ),
    "another name": (rename_tensor, "does not fit"),
    "another width": (lambda folder: edit(folder, architecture={"classes": 3, "width": 9}), "does not fit"),
    "an unknown argument": (lambda folder: edit(folder, architecture={"clases": 3}), "does not describe"),
    "an impossible width": (
        lambda folder: edit(folder, architecture={"classes": 3, "width": -1}),
        "does not describe",
    ),
    "a module to import": (lambda folder: edit(folder, network="os:system"), "unknown here"),
    "no task": (lambda folder: (folder / "config.json").write_text('{"network": "toy"}'), "damaged"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
    "a codec": (lambda folder: edit(folder, codec="hyperprior"), "a codec, not a task model"),
    "no folder": (shutil.rmtree, "not found"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_is_wrong_is_refused_in_one_line(folder, fault):
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        models.load_model(folder)
    assert "\n" not in str(caught.value)


def test_names_of_networks_are_given_once():
    models.register_network("toy", f"{__name__}:Toy")
    with pytest.raises(UsageError, match="exists already"):
        models.register_network("toy", "elsewhere:Toy")


@pytest.mark.parametrize("name", sorted(models.NETWORKS))
def test_every_network_is_where_its_name_says(name):
    module, _, attribute = models.NETWORKS[name].partition(":")
    network = getattr(import_module(module), attribute)
    assert issubclass(network, models.TaskNetwork) and network.kind in task.KINDS


# ------------------------------------------------------------------------------------------------ by name


def test_the_newest_version_is_found(shipped):
    assert [info.name for info in models.available("animals")] == [
        f"animals-classifier-v{n}" for n in (1, 2, 10)
    ]
    assert models.available("digits") == []
    assert models.find("animals-classifier").version == 10
    assert models.find("animals-classifier-v2").version == 2
    with pytest.raises(CheckpointError, match="animals-classifier-v10"):
        models.find("nothing")


def test_task_models_are_no_codecs(shipped):
    """They lie in one folder; a list of codecs that stumbled over them would break every command."""
    assert [info.name for info in checkpoint.available()] == ["hyperprior-v1"]
    with pytest.raises(CheckpointError, match="hyperprior-v1"):
        checkpoint.find("animals-classifier")
    with pytest.raises(CheckpointError):
        checkpoint.read_info(shipped / "animals-classifier-v1")
    with pytest.raises(CheckpointError, match="codec"):
        models.read_info(shipped / "hyperprior-v1")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_a_damaged_model_among_the_shipped_ones_is_named_in_one_line(shipped, content):
    path = shipped / "animals-classifier-v1" / "config.json"
    path.write_bytes(content)
    for look in (models.available, lambda: models.find("animals-classifier")):
        with pytest.raises(CheckpointError) as caught:
            look()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_codec_beside_them_is_still_reported(shipped):
    (shipped / "hyperprior-v1" / "config.json").write_text("{")
    checkpoint._shipped.cache_clear()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.available()


@pytest.mark.parametrize("info", models.available(), ids=lambda info: info.name)
def test_shipped_models_load_and_are_small(info):
    solved = task.find(info.task)
    model = adapters.load(info.name, solved)
    assert model.identity == info.weights
    assert info.size <= 8_000_000
    assert (info.path / "CARD.md").is_file()


@pytest.mark.parametrize("name", task.names())
def test_tasks_keep_to_the_contract(name, tmp_path):
    solved = task.find(name)
    assert solved.name == name and solved.medium in ("image", "audio")
    assert set(solved.kinds) <= task.KINDS.keys() and solved.pairwise in ("mcnemar", "bootstrap")
    made = solved(tmp_path)
    totals = np.random.default_rng(0).integers(1, 9, (4, 2, len(solved.outcome_names))).astype(np.float64)
    scores = made.score(totals)
    assert scores.shape == (4, 2) and np.isfinite(scores).all()
    assert scores[3, 1] == pytest.approx(float(made.score(totals[3, 1])))
    for mapping in solved.foreign_classes.values():
        assert set(mapping.values()) <= set(range(len(solved.labels)))


def test_a_model_of_another_task_is_refused(folder):
    assert adapters.load(str(folder), Animals).kind == "image-classifier"
    with pytest.raises(CheckpointError, match="solves animals, not words"):
        adapters.load(str(folder), Words)


def test_a_model_of_other_labels_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Animals, "labels", ("church", "tench", "golf ball"))
    with pytest.raises(CheckpointError, match="other classes"):
        adapters.load(str(folder), Animals)


def test_a_model_of_another_kind_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Animals, "kinds", ("segmenter",))
    with pytest.raises(CheckpointError, match="kind image-classifier"):
        adapters.load(str(folder), Animals)


# ------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("transcript", "found"),
    [
        ("View glass!", 1),
        ("he said VIEWGLASS", 1),
        ("snow boy", 0),
        ("snowboys", None),
        ("", None),
        ("snowboy view glass", None),
        ("seven", 7),
        ("7", 7),
        ("seventeen", None),
        ("Seven, 7.", 7),
    ],
)
def test_labels_in_transcripts(transcript, found):
    spellings = {"snowboy": 0, "view glass": 1, "seven": 7, "7": 7}
    assert label_spoken(transcript, spellings) == found


@pytest.mark.parametrize(
    ("classes", "names", "expected"),
    [
        (1000, (), {0: 0, 497: 1, 574: 2}),
        (3, (), {0: 0, 1: 1, 2: 2}),
        (3, ("golf_ball", "Tench", "church"), {0: 2, 1: 0, 2: 1}),
        (5, ("cat", "church", "dog", "golf ball", "tench"), {1: 1, 3: 2, 4: 0}),
        (4, ("cat", "church", "dog", "fox"), {1: 1}),
    ],
)
def test_classes_of_other_label_sets(classes, names, expected):
    mapping = adapters.class_map(classes, names, Animals)
    assert mapping.shape == (classes,)
    assert {int(i): int(mapping[i]) for i in np.flatnonzero(mapping >= 0)} == expected


def test_label_sets_without_a_common_class():
    with pytest.raises(UsageError, match="none of the 3 of animals"):
        adapters.class_map(7, ("a",) * 7, Animals)


def test_greedy_transcripts_collapse_repeats_but_not_across_blanks():
    labels = ("-", "|", "A", "B")
    assert adapters.greedy_transcript([0, 2, 2, 0, 2, 3, 3, 1, 1, 3, 0], labels) == "AAB B"
    assert adapters.greedy_transcript([0, 0], labels) == ""


# --------------------------------------------------------------------------------------- other libraries


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


IMAGE_CLASSIFIERS = [
    pytest.param("timm:resnet10t?random", marks=needs("timm")),
    "torchvision:squeezenet1_1?random",
]


@pytest.mark.parametrize("name", IMAGE_CLASSIFIERS)
def test_classifiers_with_the_classes_of_imagenet(name):
    model = adapters.load(name, Animals)
    logits = model(PIXELS)
    assert logits.shape == (3,) and logits.dtype == np.float32 and np.isfinite(logits).all()
    assert not np.array_equal(logits, model(255 - PIXELS))
    assert np.array_equal(logits, model(PIXELS))
    assert (model.name, model.kind, model.trained_on, model.note) == (name, "image-classifier", None, "")
    # Every process of a run must have the same model.
    other = adapters.load(name, Animals)
    assert other.identity == model.identity and np.array_equal(other(PIXELS), logits)


def test_the_logits_are_those_of_the_chosen_classes():
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = squeezenet1_1().eval()
    from torchvision.models import SqueezeNet1_1_Weights

    prepared = SqueezeNet1_1_Weights.DEFAULT.transforms()(torch.from_numpy(PIXELS).permute(2, 0, 1))
    with torch.inference_mode():
        expected = network(prepared[None])[0, [0, 497, 574]].numpy()
    assert adapters.load("torchvision:squeezenet1_1?random", Animals)(PIXELS) == pytest.approx(
        expected, rel=1e-4
    )


def test_random_initialisation_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    adapters.load("torchvision:squeezenet1_1?random", Animals)
    assert torch.equal(torch.rand(2), expected)


def test_a_segmenter_answers_at_the_size_of_the_picture():
    model = adapters.load("torchvision:lraspp_mobilenet_v3_large?random", Scenes)
    answer = model(PIXELS)
    assert answer.shape == PIXELS.shape[:2] and np.issubdtype(answer.dtype, np.integer)
    # Of the 21 classes of VOC, "car" and "person" are the task's; it can answer no other.
    assert set(np.unique(answer)) <= {1, 2}
    assert "2 of the 3 classes of scenes" in model.note


@needs("transformers")
def test_image_classifiers_and_segmenters_of_transformers(tmp_path):
    import transformers

    names = {0: "tench, Tinca tinca", 1: "golf ball", 2: "church, church building", 3: "crate"}
    common = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(
        **common, image_size=32, patch_size=8, id2label=names, label2id={name: i for i, name in names.items()}
    )
    network = transformers.ViTForImageClassification(config)
    network.save_pretrained(tmp_path / "vit")
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "vit")
    model = adapters.load(f"transformers:{tmp_path / 'vit'}", Animals)
    pixels = transformers.ViTImageProcessor(size=size)(images=PIXELS, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = network.eval()(pixels).logits[0, [0, 2, 1]].numpy()
    assert model(PIXELS) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    untrained = adapters.load(f"transformers:{tmp_path / 'vit'}?random", Animals)
    assert untrained.identity != model.identity

    names = {0: "road", 1: "sky", 2: "car", 3: "person"}
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
        id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segformer")
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(
        tmp_path / "segformer"
    )
    segmenter = adapters.load(f"transformers:{tmp_path / 'segformer'}", Scenes)
    answer = segmenter(PIXELS)
    assert answer.shape == PIXELS.shape[:2] and set(np.unique(answer)) <= {0, 1, 2} and segmenter.note == ""


@needs("transformers")
def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    """Not even where somebody would say yes when asked."""
    monkeypatch.setattr("builtins.input", lambda *arguments: "yes")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.ForeignConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "foreign.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
        f"Path({str(ran)!r}).touch()\nclass ForeignConfig(PretrainedConfig):\n    model_type = 'foreign'\n"
    )
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        adapters.load(f"transformers:{folder}", Animals)
    assert not ran.exists()


def ctc_folder(folder: Path) -> Path:
    import transformers

    characters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ENOSY"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({name: place for place, name in enumerate(characters)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(characters), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8, 8), conv_stride=(80, 4), conv_kernel=(160, 4),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, pad_token_id=0, architectures=["Wav2Vec2ForCTC"],
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


SPEECH = Sound(np.random.default_rng(1).normal(0, 0.1, (2, 4000)).astype(np.float32), 8000)


@needs("transformers")
def test_speech_recognisers_of_transformers(tmp_path):
    folder = ctc_folder(tmp_path / "ctc")
    model = adapters.load(f"transformers:{folder}", Words)
    assert model.kind == "recogniser"
    transcript = model(SPEECH)
    assert isinstance(transcript, str) and set(transcript.lower()) <= set("enosy <unk>")
    assert model(SPEECH) == transcript
    assert isinstance(model(Sound(np.zeros((1, 3), np.float32), 8000)), str)
    assert adapters.load(f"transformers:{folder}?random", Words).identity != model.identity


@needs("transformers")
def test_a_recogniser_takes_whatever_rate_and_channels(tmp_path, monkeypatch):
    import transformers

    seen = []
    folder = ctc_folder(tmp_path / "ctc")
    original = transformers.Wav2Vec2Processor.__call__

    def spy(self, audio, **options):
        seen.append((audio.shape, options["sampling_rate"]))
        return original(self, audio, **options)

    monkeypatch.setattr(transformers.Wav2Vec2Processor, "__call__", spy)
    adapters.load(f"transformers:{folder}", Words)(SPEECH)
    assert seen == [((8000,), 16000)]


@needs("transformers")
@pytest.mark.parametrize("multilingual", [False, True])
def test_recognisers_that_generate_a_sequence(tmp_path, multilingual):
    import transformers

    special = ("endoftext", "startoftranscript", "en", "translate", "transcribe", "notimestamps")
    characters = [*"abcdefghijklmnopqrstuvwxyz", "\u0120", *(f"<|{name}|>" for name in special)]
    (tmp_path / "vocab.json").write_text(json.dumps({name: place for place, name in enumerate(characters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.WhisperTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in special]})
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    end, start, english, _, transcribe, untimed = (characters.index(f"<|{name}|>") for name in special)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=32,
        decoder_start_token_id=start, eos_token_id=end, bos_token_id=end, pad_token_id=end,
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    network = transformers.WhisperForConditionalGeneration(config)
    network.generation_config.max_length = 8
    if multilingual:
        network.generation_config.update(
            is_multilingual=True, lang_to_id={"<|en|>": english}, task_to_id={"transcribe": transcribe},
            no_timestamps_token_id=untimed,
        )  # fmt: skip
    network.save_pretrained(tmp_path)
    transcript = adapters.load(f"transformers:{tmp_path}", Words)(SPEECH)
    assert isinstance(transcript, str) and "<|" not in transcript


def test_speech_recognisers_of_torchaudio(monkeypatch):
    from torchaudio import pipelines

    # The architecture of the bundle with fewer layers; the rest is as released.
    bundle = pipelines.WAV2VEC2_ASR_BASE_960H
    monkeypatch.setattr(
        bundle, "_params", bundle._params | {"encoder_num_layers": 1, "encoder_ff_interm_features": 32}
    )
    model = adapters.load("torchaudio:WAV2VEC2_ASR_BASE_960H?random", Words)
    transcript = model(SPEECH)
    assert isinstance(transcript, str) and set(transcript) <= {*bundle.get_labels(), " "}
    assert isinstance(model(Sound(np.zeros((1, 3), np.float32), 8000)), str)


@pytest.mark.parametrize(
    ("name", "solved", "message"),
    [
        pytest.param("timm:nonsense?random", Animals, "nonsense", marks=needs("timm")),
        pytest.param("timm:resnet10t?random", Scenes, "cannot solve scenes", marks=needs("timm")),
        ("torchvision:nonsense?random", Animals, "choose from alexnet"),
        ("torchvision:fcn_resnet50?random", Animals, "no image-classifier named fcn_resnet50"),
        ("torchvision:alexnet?random", Words, "cannot solve words"),
        ("torchaudio:HUBERT_BASE?random", Words, "choose from HUBERT_ASR_LARGE"),
        ("torchaudio:MMS_FA?random", Words, "no Wav2Vec2ASRBundle"),
        pytest.param(
            "transformers:/no/such/folder", Animals, "cannot be loaded", marks=needs("transformers")
        ),
    ],
)
def test_names_that_fit_nothing(name, solved, message):
    with pytest.raises((CheckpointError, UsageError), match=message) as caught:
        adapters.load(name, solved)
    assert "\n" not in str(caught.value)


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        adapters.load("timm:resnet10t?random", Animals)


def test_pickles_are_refused_while_a_library_loads(tmp_path, monkeypatch):
    """torch.hub asks for full unpickling by itself; a weight file could run any code."""
    path = tmp_path / "weights.pth"
    torch.save({"weight": Animals}, path)
    loaded = []

    def careless(request):
        loaded.append(torch.load(path, weights_only=False))
        raise AssertionError("not reached")

    monkeypatch.setitem(adapters._LIBRARIES, "timm", (careless, ("image-classifier",)))
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        adapters.load("timm:resnet10t", Animals)
    assert loaded == []
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in __import__("os").environ
