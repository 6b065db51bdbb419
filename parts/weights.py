"""Files of others, in and out."""
import dataclasses
import io
import json
import math
import os
import re
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from common import print0

from model import (BERT, FIRST_LOGIT_SCALE, XDBERT, BERTConfig, CLIPConfig, CLIPText, MLMHead, TaskModel,
                   VideoEncoder, init_weights)

# ---------------------------------------------------------------------------- Hugging Face folders of BERT


HF_CONFIG = {"vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "hidden",
             "num_attention_heads": "heads", "intermediate_size": "intermediate",
             "max_position_embeddings": "max_positions", "type_vocab_size": "type_vocab",
             "hidden_dropout_prob": "dropout", "layer_norm_eps": "layer_norm_eps", "pad_token_id": "pad_id",
             "initializer_range": "init_std"}
# the only values that our BERT can represent; a config.json may leave them out
HF_SETTINGS = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
# {model_type: {kind of task: (class, its name of the pooler, of the head)}}
HF_CLASSES = {
    "bert": {"encoder": ("BertModel", "pooler.dense", ""),
             "mlm": ("BertForMaskedLM", "pooler.dense", ""),
             "classify": ("BertForSequenceClassification", "pooler.dense", "classifier"),
             "regress": ("BertForSequenceClassification", "pooler.dense", "classifier"),
             "choice": ("BertForMultipleChoice", "pooler.dense", "classifier"),
             "span": ("BertForQuestionAnswering", "", "qa_outputs")},
    "electra": {"encoder": ("ElectraModel", "", ""),
                "mlm": ("ElectraForMaskedLM", "", ""),
                "classify": ("ElectraForSequenceClassification", "classifier.dense", "classifier.out_proj"),
                "regress": ("ElectraForSequenceClassification", "classifier.dense", "classifier.out_proj"),
                "choice": ("ElectraForMultipleChoice", "sequence_summary.summary", "classifier"),
                "span": ("ElectraForQuestionAnswering", "", "qa_outputs")},
}
TASK_KINDS = ("classify", "regress", "choice", "span")
LAYER_NAMES = {  # one map of ours is the concatenation of those on its right
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "expand": ("intermediate.dense",),
    "contract": ("output.dense",),
    "output_norm": ("output.LayerNorm",),
}
HEAD_NAMES = {
    "bert": {"dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm",
             "bias": "cls.predictions.bias"},
    "electra": {"dense": "generator_predictions.dense", "norm": "generator_predictions.LayerNorm",
                "bias": "generator_lm_head.bias"},
}
# known and not part of the encoder: a buffer of older versions, copies of the tied decoder, next-sentence and
# replaced-token prediction, heads of fine-tuned models, and those of the released VidLanKD checkpoints
# (visual_hinge_head, kd1_student_head, kd2_teacher_head, ...)
DECODER_COPIES = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
                  "cls.predictions.decoder.bias": "cls.predictions.bias",
                  "generator_lm_head.weight": "embeddings.word_embeddings.weight"}
IGNORED = re.compile(r"embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|"
                     r"generator_lm_head\.weight|discriminator_predictions\.(dense|dense_prediction)\..+|"
                     r"(cls\.seq_relationship|classifier|qa_outputs)\.(weight|bias)|"
                     r"(classifier\.(dense|out_proj)|sequence_summary\.summary)\.(weight|bias)|"
                     r"(visual_\w+|kd[12]_(student|teacher))_head\..+")


def hf_names(config, pooler="pooler.dense"):
    """{our tensor: Hugging Face's, several where ours joins them}, without the prefix `bert.`, `electra.`."""
    names = {"embeddings.word.weight": ("embeddings.word_embeddings.weight",),
             "embeddings.position.weight": ("embeddings.position_embeddings.weight",),
             "embeddings.segment.weight": ("embeddings.token_type_embeddings.weight",)}
    for kind in ("weight", "bias"):
        names[f"embeddings.norm.{kind}"] = (f"embeddings.LayerNorm.{kind}",)
        names[f"embeddings.project.{kind}"] = (f"embeddings_project.{kind}",)
        if pooler:
            names[f"pooler.{kind}"] = (f"{pooler}.{kind}",)
        for i in range(config.layers):
            for ours, theirs in LAYER_NAMES.items():
                names[f"layers.{i}.{ours}.{kind}"] = tuple(f"encoder.layer.{i}.{t}.{kind}" for t in theirs)
    return names


def head_names(config):
    """{our tensor: Hugging Face's} of the masked-word head; its decoder's is that of the word embeddings."""
    theirs = HEAD_NAMES[config.model_type]
    names = {f"{part}.{kind}": (f"{theirs[part]}.{kind}",)
             for part in ("dense", "norm") for kind in ("weight", "bias")}
    return names | {"bias": (theirs["bias"],), "weight": ("embeddings.word_embeddings.weight",)}


def model_type(folder):
    """What a Hugging Face folder holds: "bert", "electra", "clip" (its text tower), or another's word."""
    name = read_settings(Path(folder) / "config.json").get("model_type")
    return "clip" if name == "clip_text_model" else name


def load_config(folder):
    """BERTConfig of a Hugging Face folder; SystemExit where it is no BERT that this file can represent."""
    path = Path(folder) / "config.json"
    settings = read_settings(path)
    check_setting(path, "model_type", settings.get("model_type"), *HF_CLASSES)
    for key, wanted in HF_SETTINGS.items():
        check_setting(path, key, settings.get(key, wanted), wanted)
    values = {ours: settings.get(theirs) for theirs, ours in HF_CONFIG.items()}
    values["model_type"] = settings["model_type"]
    if settings.get("embedding_size") != settings.get("hidden_size"):
        values["embedding"] = settings.get("embedding_size")
    return make_config(values, path)


def check_setting(path, key, value, *allowed):
    """SystemExit where a setting has none of the values that can be represented."""
    if value not in allowed:
        raise SystemExit(f"{path}: {key} is {value!r}, only {' or '.join(map(repr, allowed))} can be read; "
                         "choose another model")


def read_settings(path):
    """The object in a .json file."""
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file; give the folder of a model") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: not readable ({error}); fetch or save the model again") from None
    if not isinstance(settings, dict):
        raise SystemExit(f"{path}: holds no settings; fetch or save the model again")
    return settings


def make_config(values, path, cls=BERTConfig):
    """Config from the values in a file, each of its field's type; None = its default."""
    values = {name: value for name, value in values.items() if value is not None}
    for field in dataclasses.fields(cls):
        value = values.get(field.name, field.default)
        wanted = (int, float) if field.type is float else field.type
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise SystemExit(f"{path}: {value!r} is no value for {field.name}; fetch or save the model again")
    try:
        return cls(**values)
    except SystemExit as error:
        raise SystemExit(f"{path}: {error}") from None


def read_tensors(path):
    """{name: tensor} of a .safetensors or .bin file; nothing that stands in a .bin is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in tensors.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise ValueError("it holds other things than tensors under their names")
            if value.layout != torch.strided or value.is_meta or value.is_complex():
                raise ValueError(f"{name} is no plain tensor of numbers")
        return dict(tensors)
    except Exception as error:  # whatever a damaged or hostile file makes the two libraries raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnpicklingError):  # PyTorch's text advises to load it without this protection
            reason = "damaged, or it holds more than tensors"
        raise SystemExit(f"{path}: not readable ({reason}); fetch or save the model again") from None


def read_folder(folder):
    """(path, {name: tensor}) of the weights in a Hugging Face folder."""
    paths = [Path(folder) / name for name in ("model.safetensors", "pytorch_model.bin")]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        raise SystemExit(f"{folder}: has no model.safetensors and no pytorch_model.bin; fetch one of them")
    return path, read_tensors(path)


def read_weights(folder, config):
    """(path, {name: tensor}) of a Hugging Face BERT, all names known; without `bert.`, gamma and beta."""
    path, stored_tensors = read_folder(folder)
    names = hf_names(config) | head_names(config)
    known, tensors = {name for parts in names.values() for name in parts}, {}
    for stored, tensor in stored_tensors.items():
        name = stored.removeprefix(config.model_type + ".")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name in tensors or name not in known and not IGNORED.fullmatch(name):
            wrong = "there twice" if name in tensors else "unknown"
            raise SystemExit(f"{path}: the tensor {stored} is {wrong}; choose a plain "
                             f"{config.model_type.upper()}, of {config.layers} layers by its config.json")
        tensors[name] = tensor
    return path, tensors


def fill(module, names, tensors, path):
    """`module`, made on the meta device, with the tensors under `names` ({ours: theirs}), as float32."""
    state = {}
    for ours, value in module.state_dict().items():
        parts = len(names[ours])
        shape = value.shape if parts == 1 else torch.Size((value.shape[0] // parts, *value.shape[1:]))
        for name in names[ours]:
            if name not in tensors:
                raise SystemExit(f"{path}: the tensor {name} is missing; fetch or save the model again")
            if tensors[name].shape != shape:
                raise SystemExit(f"{path}: the shape of {name} is {tuple(tensors[name].shape)}, by the "
                                 f"settings {tuple(shape)}; fetch or save the model again")
        whole = torch.cat([tensors[name].float().flatten() for name in names[ours]])
        state[ours] = whole.view(value.shape)
    module.load_state_dict(state, assign=True)
    return module


def load_mlm_head(folder, bert):
    """The MLMHead of a Hugging Face folder, in eval mode, tied to its `bert`; None where it has none."""
    path, tensors = read_weights(folder, bert.config)
    names = head_names(bert.config)
    if not any(name in tensors for ours, (name,) in names.items() if ours != "weight"):
        return None
    for copy, original in DECODER_COPIES.items():
        if copy in tensors and original in tensors and not torch.equal(tensors[copy], tensors[original]):
            raise SystemExit(f"{path}: {copy} differs from {original}, but only a tied decoder can be read; "
                             "choose another model")
    with torch.device("meta"):
        head = MLMHead(bert.width, bert.embeddings.word.weight, bert.config.layer_norm_eps)
    fill(head, names, tensors, path)
    head.weight = bert.embeddings.word.weight
    return head.eval()


def load_task(folder):
    """What the config.json of a fine-tuned folder tells of its task; SystemExit where it is not fine-tuned.

    {"task": name, "kind": of TASK_KINDS, "labels": the words of the classes, "pool", "max_length": tokens},
    with "encoder": "xdbert" where it is one, and what else `TaskModel.save_pretrained` was given. Hugging
    Face's folders tell kind and labels; their task is "", their max_length 128.
    """
    path = Path(folder) / "config.json"
    content = read_settings(path)
    if "nanoground" in content:
        settings = content["nanoground"]
        types = {"task": str, "kind": str, "labels": list, "pool": str, "max_length": int}
        if (not isinstance(settings, dict)
                or not all(isinstance(settings.get(key), wanted) for key, wanted in types.items())
                or settings["kind"] not in TASK_KINDS or settings["pool"] not in ("cls", "mean")):
            raise SystemExit(f'{path}: "nanoground" does not describe a fine-tuned model; fine-tune it again')
        return settings
    kind = next((kind for kind in TASK_KINDS for classes in HF_CLASSES.values()
                 if content.get("architectures") == [classes[kind][0]]), "")
    if not kind:
        raise SystemExit(f"{folder}: no fine-tuned model (architectures is {content.get('architectures')}); "
                         f"make one: python finetune.py --model {folder}")
    words = content.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # Hugging Face leaves these two out
    problem = content.get("problem_type")
    if (problem == "multi_label_classification" or not isinstance(words, dict)
            or words.keys() != {str(i) for i in range(len(words))}):
        raise SystemExit(f"{path}: problem_type {problem} with id2label {words} cannot be read; choose a "
                         "model with one label an example")
    if kind == "classify" and (len(words) == 1 or problem == "regression"):
        kind = "regress"
    labels = [str(words[str(i)]) for i in range(len(words))] if kind == "classify" else []
    return {"task": "", "kind": kind, "labels": labels, "pool": "cls", "max_length": 128}


def write_bert(folder, bert, vocab, kind, head, settings):
    """Writes a BERT for Hugging Face's class of this kind.

    head: {Hugging Face's name: tensor}; settings: beside the BERT's own in config.json.
    """
    config = bert.config
    assert vocab.size == config.vocab_size, f"{vocab.size} tokens in vocab, {config.vocab_size} in model"
    architecture, pooler, _ = HF_CLASSES[config.model_type][kind]
    names = hf_names(config, pooler)
    # ElectraModel has no pooler
    tensors = renamed({ours: value for ours, value in bert.state_dict().items() if ours in names}, names)
    if pooler and bert.pooler is None and "nanoground" not in settings:  # a task shall not seem to have one
        noise = torch.randn(config.hidden, config.hidden, generator=torch.Generator().manual_seed(0))
        tensors |= {"pooler.dense.weight": 0.02 * noise, "pooler.dense.bias": torch.zeros(config.hidden)}
    if head:
        inside = ("embeddings", "encoder.", "pooler.")
        tensors = {f"{config.model_type}." * name.startswith(inside) + name: value
                   for name, value in tensors.items()}
    settings = {"architectures": [architecture], **settings, **HF_SETTINGS, "model_type": config.model_type,
                **{theirs: getattr(config, ours) for theirs, ours in HF_CONFIG.items()},
                "attention_probs_dropout_prob": config.dropout,
                "pooler_trained": bool(pooler) and bert.pooler is not None}
    if config.model_type == "electra":
        settings["embedding_size"] = config.embedding or config.hidden
    write_folder(folder, "model.safetensors", tensors | head, "config.json", settings, vocab)


def renamed(state, names):
    """{theirs: tensor} of {ours: tensor}, what is fused in ours taken apart."""
    tensors = {}
    for ours, value in state.items():
        parts = len(names[ours])
        tensors |= zip(names[ours], [value] if parts == 1 else value.chunk(parts))
    return tensors


def write_folder(folder, weights_name, tensors, settings_name, settings, vocab=None):
    """Weights (float32), settings (json) and vocabulary: written aside, then renamed, the settings last."""
    folder = Path(folder)
    part = folder / ".saving"
    try:
        shutil.rmtree(part, ignore_errors=True)  # what an interrupted save left
        part.mkdir(parents=True)
        whole = {name: value.to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
        save_file(whole, part / weights_name, metadata={"format": "pt"})
        if vocab is not None:
            vocab.save(part)
        (part / settings_name).write_text(json.dumps(settings, indent=2) + "\n")
        for path in sorted(part.iterdir(), key=lambda path: path.name == settings_name):
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            os.replace(path, folder / path.name)
        part.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise SystemExit(f"{folder}: could not be written ({error}); free disk space or take another folder"
                         ) from None


def save_video_encoder(folder, encoder):
    """Writes video_encoder.safetensors and video_encoder.json, as safely as `BERT.save_pretrained`."""
    settings = {"features": encoder.features, "max_frames": encoder.max_frames,
                "config": dataclasses.asdict(encoder.config)}
    write_folder(folder, "video_encoder.safetensors", encoder.state_dict(), "video_encoder.json", settings)


def load_video_encoder(folder):
    """The VideoEncoder that `save_video_encoder` wrote, in eval mode; strict as `load_bert`."""
    path = Path(folder) / "video_encoder.json"
    settings = read_settings(path)
    try:
        config, features, max_frames = (settings[key] for key in ("config", "features", "max_frames"))
        with torch.device("meta"):
            encoder = VideoEncoder(make_config(config, path), features, max_frames)
    except (KeyError, TypeError, RuntimeError) as error:
        raise SystemExit(f"{path}: not those of a video encoder ({error}); train the teacher again") from None
    return fill_own(encoder, Path(folder) / "video_encoder.safetensors", "train the teacher again").eval()


def fill_own(module, path, advice, ignored=()):
    """`fill` from a file under our own names; any other is refused but what starts with `ignored`."""
    names, tensors = {name: (name,) for name in module.state_dict()}, read_tensors(path)
    for name in tensors:
        if name not in names and not name.startswith(ignored):
            raise SystemExit(f"{path}: the tensor {name} is unknown; {advice}")
    return fill(module, names, tensors, path)


# ---------------------------------------------------------------------------- files of CLIP


CLIP_CONFIG = {"vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "hidden",
               "num_attention_heads": "heads", "intermediate_size": "intermediate",
               "max_position_embeddings": "positions", "projection_dim": "projection", "dropout": "dropout",
               "initializer_range": "init_std"}
CLIP_SETTINGS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
# ours: (OpenAI's, Hugging Face's without `text_model.`)
CLIP_NAMES = {"embeddings.word.weight": ("token_embedding.weight", "embeddings.token_embedding.weight"),
              "embeddings.position.weight": ("positional_embedding", "embeddings.position_embedding.weight"),
              "norm.weight": ("ln_final.weight", "final_layer_norm.weight"),
              "norm.bias": ("ln_final.bias", "final_layer_norm.bias"),
              "project.weight": ("text_projection", "text_projection.weight"),
              "logit_scale": ("logit_scale", "logit_scale")}
CLIP_LAYER_NAMES = {
    "attention_norm.": (("ln_1.",), ("layer_norm1.",)),
    "attention.qkv.": (("attn.in_proj_",), ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")),
    "attention.out.": (("attn.out_proj.",), ("self_attn.out_proj.",)),
    "output_norm.": (("ln_2.",), ("layer_norm2.",)),
    "expand.": (("mlp.c_fc.",), ("mlp.fc1.",)),
    "contract.": (("mlp.c_proj.",), ("mlp.fc2.",)),
}
# the image tower and three constants; in folders a buffer of older versions and a task's head, too
OPENAI_IGNORED = re.compile(r"visual\..+|input_resolution|context_length|vocab_size")
CLIP_IGNORED = re.compile(r"(vision_model|visual_projection)\..+|embeddings\.position_ids|"
                          r"classifier\.(weight|bias)")


def clip_names(layers, openai=False):
    """{our tensor: OpenAI's, or Hugging Face's without `text_model.`, several where ours joins them}."""
    names = {ours: (theirs[0 if openai else 1],) for ours, theirs in CLIP_NAMES.items()}
    for i in range(layers):
        for ours, theirs in CLIP_LAYER_NAMES.items():
            block = f"transformer.resblocks.{i}." if openai else f"encoder.layers.{i}."
            for kind in ("weight", "bias"):
                names[f"layers.{i}.{ours}{kind}"] = tuple(
                    block + name + kind for name in theirs[0 if openai else 1])
    return names


def load_clip_config(folder):
    """CLIPConfig of the text tower in a Hugging Face folder; SystemExit where it is none of OpenAI's kind."""
    path = Path(folder) / "config.json"
    settings = read_settings(path)
    check_setting(path, "model_type", settings.get("model_type"), "clip", "clip_text_model")
    if settings["model_type"] == "clip":  # both towers
        text = settings.get("text_config")
        if not isinstance(text, dict):
            raise SystemExit(f"{path}: has no text_config; choose another model")
        settings = text | {"projection_dim": settings.get("projection_dim", CLIPConfig.projection)}
    for key, wanted in CLIP_SETTINGS.items():
        check_setting(path, key, settings.get(key, wanted), wanted)
    values = {ours: settings.get(theirs) for theirs, ours in CLIP_CONFIG.items()}
    return make_config(values, path, CLIPConfig)


def read_clip(path):
    """(CLIPConfig, path of the weights, {name: tensor}, {ours: its names}) of the text tower at `path`."""
    path = Path(path)
    openai = not path.is_dir()
    config, path, tensors = read_openai(path) if openai else read_clip_folder(path)
    names, ignored = clip_names(config.layers, openai), OPENAI_IGNORED if openai else CLIP_IGNORED
    known = {name for parts in names.values() for name in parts}
    for name in tensors:
        if name not in known and not ignored.fullmatch(name):
            raise SystemExit(f"{path}: the tensor {name} is unknown; choose a CLIP of OpenAI's architecture, "
                             f"of {config.layers} text layers")
    return config, path, tensors, names


def read_clip_folder(folder):
    """(CLIPConfig, path of the weights, {name without `text_model.`: tensor}) of a Hugging Face folder."""
    config = load_clip_config(folder)
    path, stored = read_folder(folder)
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
    tensors.setdefault("logit_scale", torch.tensor(FIRST_LOGIT_SCALE))  # CLIPModel's and ours have one
    if "text_projection.weight" not in tensors:
        if config.projection != config.hidden:
            raise SystemExit(f"{path}: has no text_projection, from {config.hidden} to {config.projection} "
                             "channels; choose a CLIPModel or CLIPTextModelWithProjection")
        print0(f"{path}: has no text_projection: the states are taken as they are")
        tensors["text_projection.weight"] = torch.eye(config.hidden)
    return config, path, tensors


def read_openai(path):
    """(CLIPConfig that the shapes tell, path, {name: tensor}) of OpenAI's file; a head has 64 channels."""
    tensors = read_archive(path) if is_archive(path) else read_tensors(path)
    blocks = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    try:
        words, hidden = tensors["token_embedding.weight"].shape
        positions, _ = tensors["positional_embedding"].shape
        intermediate, _ = tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape
        _, projection = tensors["text_projection"].shape
    except (KeyError, ValueError):
        raise SystemExit(f"{path}: holds no text tower under OpenAI's names; give OpenAI's file or the "
                         "folder of a Hugging Face CLIP") from None
    tensors["text_projection"] = tensors["text_projection"].T  # ours is the weight of a linear map
    values = dict(vocab_size=words, layers=len(blocks), hidden=hidden, heads=hidden // 64,
                  intermediate=intermediate, positions=positions, projection=projection)
    return make_config(values, path, CLIPConfig), path, tensors


def write_clip(folder, clip, vocab, head, settings):
    """Writes CLIP's text tower, `head` ({name: tensor}) and `settings` beside the tower's own."""
    config = clip.config
    assert vocab.size == config.vocab_size, f"{vocab.size} tokens in vocab, {config.vocab_size} in model"
    tensors = {("" if name in ("text_projection.weight", "logit_scale") else "text_model.") + name: part
               for name, part in renamed(clip.state_dict(), clip_names(config.layers)).items()}
    settings = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
                **CLIP_SETTINGS, **{theirs: getattr(config, ours) for theirs, ours in CLIP_CONFIG.items()},
                "bos_token_id": vocab.start, "eos_token_id": vocab.end, "pad_token_id": vocab.pad, **settings}
    write_folder(folder, "model.safetensors", tensors | head, "config.json", settings, vocab)


# ---------------------------------------------------------------------------- OpenAI's TorchScript archive


# a zip of data.pkl, data/ with one file for each storage, and code/, which is left alone
STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}


class ArchiveUnpickler(Unpickler):
    """Reads the modules of a TorchScript archive as plain namespaces of tensors.

    Nothing that the file names is imported or called: each name that may stand there is mapped to what is
    written here, any other is refused.
    """

    def __init__(self, archive, root):
        self.archive, self.root, self.storages = archive, root, {}
        super().__init__(io.BytesIO(self.read("data.pkl")))

    def read(self, name):
        """The bytes of a part, which PyTorch stores as they are: what is compressed could be of any size."""
        if self.archive.getinfo(self.root + name).compress_type != zipfile.ZIP_STORED:
            raise UnpicklingError(f"{name} is compressed")
        return self.archive.read(self.root + name)

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":  # the modules' classes
            return SimpleNamespace
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: view_of(storage, offset, size, stride)
        if module == "torch.jit._pickle" and re.fullmatch(r"build_\w+list|restore_type_tag", name):
            return lambda value, *_: value  # a typed list is a list
        raise UnpicklingError(f"it names {module}.{name}, which is no part of a stored model")

    def persistent_load(self, pid):
        _, dtype, key, _, count = pid
        if key not in self.storages:  # tensors may share one
            self.storages[key] = torch.frombuffer(bytearray(self.read(f"data/{key}")), dtype=dtype)
        storage = self.storages[key]
        if len(storage) != count or storage.dtype != dtype:
            raise UnpicklingError(f"data/{key} holds {len(storage)} numbers in place of {count}")
        return storage


def view_of(storage, offset, size, stride):
    """The tensor of this size and stride in a flat storage; more numbers than it holds are refused."""
    if math.prod(size) > len(storage):
        raise UnpicklingError(f"a tensor of {size} in a storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


def is_archive(path):
    """Is this file a TorchScript archive, not one of torch.save?"""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # no zip, or a damaged one: reading it will tell
        return False


def read_archive(path):
    """{name: tensor} of a TorchScript archive, as its state dict has them; its code is not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0] + "/"
            stack, seen, tensors = [("", ArchiveUnpickler(archive, root).load())], set(), {}
        while stack:
            prefix, module = stack.pop()
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    tensors[prefix + name] = value
                elif isinstance(value, SimpleNamespace) and id(value) not in seen:
                    seen.add(id(value))  # a hostile file may hold a circle
                    stack.append((f"{prefix}{name}.", value))
        return tensors
    except Exception as error:  # whatever a damaged or hostile file leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SystemExit(f"{path}: not readable ({reason}); fetch the model again") from None


# ---------------------------------------------------------------------------- models


def load_bert(folder, pooler=False, dropout=None):
    """The BERT or ELECTRA of a Hugging Face folder, fine-tuned or not, in float32 and eval mode.

    pooler: with pooler, the file's where it was trained, else a fresh one (N(0, init_std), bias 0) from
    torch's global generator, which is left alone otherwise; "trained" = the file's or none. Every tensor
    of the file must be known, and every one of ours in it with the shape that config.json tells;
    SystemExit names the file and the tensor where that is not so. Hugging Face's two dropout rates
    become one: `dropout`, or where that is None, that of the hidden states.
    """
    config = load_config(folder)
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    path, tensors = read_weights(folder, config)
    names = {name for _, name, _ in HF_CLASSES[config.model_type].values() if name}
    stored = next((name for name in names if any(t.startswith(f"{name}.") for t in tensors)), "")
    trained = stored and read_settings(Path(folder) / "config.json").get("pooler_trained", True)
    with torch.device("meta"):
        bert = BERT(config, pooler and trained)
    fill(bert, hf_names(config, stored), tensors, path)
    if pooler is True and not trained:
        bert.pooler = nn.Linear(config.hidden, config.hidden)
        init_weights(bert.pooler, config.init_std)
    return bert.eval()


def save_bert(bert, folder, vocab, head=None):
    """Writes a folder that `load_bert`, and Hugging Face's AutoModel and AutoTokenizer, open.

    vocab: the Vocab of the ids; head: the MLMHead, if there is a trained one. A BERT without pooler
    gets a fresh one (N(0, 0.02), seed 0), since Hugging Face's BertModel wants one; "pooler_trained" in
    config.json tells which it is. An ELECTRA is written without: ElectraModel has none. Other files of
    the folder stay. All is written into a folder inside first, then renamed, config.json last:
    interrupted, it leaves the old weights or the new ones, whole, and a new folder without config.json.
    """
    state = head.state_dict() if head else {}
    state.pop("weight", None)  # tied: it is among the embeddings
    head = renamed(state, head_names(bert.config))
    write_bert(folder, bert, vocab, "mlm" if head else "encoder", head, {})


def load_clip(path, dropout=None):
    """CLIP's text tower in float32 and eval mode, from a Hugging Face folder or from OpenAI's file.

    A folder: of CLIPModel (its image tower is ignored), CLIPTextModelWithProjection, or CLIPTextModel,
    which has no projection: the identity then. A file: OpenAI's state dict (.pt, .pth, .bin,
    .safetensors) or TorchScript archive. Every tensor must be known, as in `load_bert`.
    """
    config, path, tensors, names = read_clip(path)
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    with torch.device("meta"):
        clip = CLIPText(config)
    return fill(clip, names, tensors, path).eval()


def save_clip(clip, folder, vocab):
    """Writes a folder that `load_clip` and Hugging Face's CLIPTextModelWithProjection open.

    The logit scale is in it, too. vocab: of the ids, with start and end. As safe as BERT's.
    """
    write_clip(folder, clip, vocab, {}, {})


def load_xdbert(folder, dropout=None):
    """The XDBERT that `save_xdbert` wrote, in float32 and eval mode; the RNG is left alone."""
    folder = Path(folder)
    path = folder / "cross.json"
    settings = read_settings(path)
    layers, pooler = settings.get("layers"), settings.get("pooler")
    if type(layers) is not int or layers < 1 or type(pooler) is not bool:
        raise SystemExit(f"{path}: not that of an XDBERT; adapt it again")
    language = load_bert(folder, dropout=dropout)
    clip = load_clip(folder / "clip")
    with torch.device("meta"):
        model = XDBERT(language, clip, layers)
        model.pooler = nn.Linear(model.width, model.width) if pooler else None
    fill_own(model.own(), folder / "cross.safetensors", "adapt it again", ignored="classifier.")
    return model.eval()


def save_xdbert(model, folder, vocab, clip_vocab, head=None):
    """Writes the language encoder as `save_bert` does, so that `folder` is an ordinary one.

    Beside it: clip/ (`save_clip`), cross.safetensors and cross.json. The language
    encoder's config.json is written last.
    """
    save_beside(model, folder, clip_vocab, {})
    save_bert(model.language, folder, vocab, head)


def save_beside(model, folder, clip_vocab, head):
    """All but the language encoder; head: {name: tensor} of a task's, into cross.safetensors."""
    save_clip(model.clip, Path(folder) / "clip", clip_vocab)
    write_folder(folder, "cross.safetensors", model.own().state_dict() | head, "cross.json",
                 {"layers": len(model.cross.text), "pooler": model.pooler is not None})


def load_task_model(folder):
    """(model, settings) of a fine-tuned folder, ours or Hugging Face's, as strict as BERT's.

    In float32 and eval mode; the RNG is left alone. settings: see `load_task`.
    """
    settings, folder = load_task(folder), Path(folder)
    kind, pool, head = settings["kind"], settings["pool"], "classifier"
    if settings.get("encoder") == "xdbert":
        encoder, path = load_xdbert(folder), folder / "cross.safetensors"
        tensors = read_tensors(path)
    elif model_type(folder) == "clip":
        encoder = load_clip(folder)
        path, tensors = read_folder(folder)
    else:
        config = load_config(folder)
        path, tensors = read_weights(folder, config)
        _, pooler, head = HF_CLASSES[config.model_type][kind]
        with torch.device("meta"):
            encoder = BERT(config, kind != "span" and pool == "cls")
        fill(encoder, hf_names(config, pooler), tensors, path)
    with torch.device("meta"):
        model = TaskModel(encoder, kind, len(settings["labels"]), pool)
    names = {part: (f"{head}.{part}",) for part in ("weight", "bias")}
    fill(model.classifier, names, tensors, path)
    return model.eval(), settings


def save_task_model(model, folder, vocab, settings, clip_vocab=None):
    """Writes a folder for `load_task_model`, as safely as BERT's; the encoder's own opens it too.

    settings: kept in config.json under "nanoground", with at least task (its name), labels (the words of
    the classes, in order; else []) and max_length (tokens). Of a BERT or ELECTRA, Hugging Face's
    AutoModelFor... of the kind computes the same logits, but with pool="mean": it has no such class, so
    architectures is BertModel or ElectraModel. A model without pooler is written without. clip_vocab: of
    an XDBERT, whose head goes into cross.safetensors.
    """
    content = {"nanoground": settings | {"kind": model.kind, "pool": model.pool}}
    if model.kind in ("classify", "regress"):
        words = settings["labels"] if model.kind == "classify" else ["LABEL_0"]
        assert len(words) == model.classifier.out_features, f"{words} for {model.classifier}"
        content |= {"id2label": dict(enumerate(words)), "label2id": {w: i for i, w in enumerate(words)},
                    "problem_type": "regression" if model.kind == "regress" else
                    "single_label_classification"}
    name, encoder = "classifier", model.encoder
    if isinstance(encoder, BERT):
        name = HF_CLASSES[encoder.config.model_type][model.kind][2]
    head = {f"{name}.{ours}": value for ours, value in model.classifier.state_dict().items()}
    if isinstance(encoder, CLIPText):
        write_clip(folder, encoder, vocab, head, content)
    elif isinstance(encoder, XDBERT):
        content["nanoground"]["encoder"] = "xdbert"
        save_beside(encoder, folder, clip_vocab, head)
        write_bert(folder, encoder.language, vocab, "encoder", {}, content)
    else:
        write_bert(folder, encoder, vocab, model.kind if model.pool == "cls" else "encoder", head, content)
