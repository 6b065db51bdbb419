"""Models of others, in and out: Hugging Face's folders of BERT, ELECTRA and CLIP, OpenAI's CLIP files.

Tables of names come first, then reading, writing, OpenAI's archives. Reading is strict: every tensor of a
file must be known, every one of ours there in the shape by config.json; else SystemExit names file and
tensor. No code in a file is run. Models come in float32 and eval mode; torch's random state stays.
"""
import dataclasses
import io
import json
import math
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from common import atomic, check_archive, check_pickle, print0, read_json, read_settings
from model import (BERT, FIRST_LOGIT_SCALE, XDBERT, BERTConfig, CLIPConfig, CLIPText, MLMHead, TaskModel,
                   VideoEncoder, init_weights)
from parts.vocab import OPENAI_CLIP, Vocab, load_clip_vocab, load_vocab
from run import file_hash, model_folder, weight_files

AGAIN = "fetch or save the model again"
LAYERS = 1000  # no model has more, and to build them takes time before one is found to be missing

# ---------------------------------------------------------------------------- names: BERT and ELECTRA

# our tensor: Hugging Face's, several where ours joins them; without the prefix `bert.` or `electra.`;
# # is the number of a layer, * stands for weight and bias
HF_NAMES = {
    "embeddings.word.weight": "embeddings.word_embeddings.weight",
    "embeddings.position.weight": "embeddings.position_embeddings.weight",
    "embeddings.segment.weight": "embeddings.token_type_embeddings.weight",
    "embeddings.norm.*": "embeddings.LayerNorm.*",
    "embeddings.project.*": "embeddings_project.*",
    "layers.#.attention.qkv.*": "encoder.layer.#.attention.self.query.* encoder.layer.#.attention.self.key.* "
                                "encoder.layer.#.attention.self.value.*",
    "layers.#.attention.out.*": "encoder.layer.#.attention.output.dense.*",
    "layers.#.attention_norm.*": "encoder.layer.#.attention.output.LayerNorm.*",
    "layers.#.expand.*": "encoder.layer.#.intermediate.dense.*",
    "layers.#.contract.*": "encoder.layer.#.output.dense.*",
    "layers.#.output_norm.*": "encoder.layer.#.output.LayerNorm.*",
}
HEAD_NAMES = {  # of the masked-word head, which shares the word embeddings
    "bert": {"weight": "embeddings.word_embeddings.weight", "bias": "cls.predictions.bias",
             "dense.*": "cls.predictions.transform.dense.*",
             "norm.*": "cls.predictions.transform.LayerNorm.*"},
    "electra": {"weight": "embeddings.word_embeddings.weight", "bias": "generator_lm_head.bias",
                "dense.*": "generator_predictions.dense.*", "norm.*": "generator_predictions.LayerNorm.*"},
}
TIED = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",  # copies in some folders
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "generator_lm_head.weight": "embeddings.word_embeddings.weight"}
# known, but no part of the encoder: a buffer of older versions, copies of the decoder, next-sentence and
# replaced-token prediction, heads of fine-tuned models and of the released VidLanKD checkpoints
# (visual_hinge_head, kd1_student_head, kd2_teacher_head, ...)
IGNORED = re.compile(r"embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|"
                     r"generator_lm_head\.weight|discriminator_predictions\.(dense|dense_prediction)\..+|"
                     r"(cls\.seq_relationship|classifier|qa_outputs)\.(weight|bias)|"
                     r"(classifier\.(dense|out_proj)|sequence_summary\.summary)\.(weight|bias)|"
                     r"(visual_\w+|kd[12]_(student|teacher))_head\..+")
SIZES = {"vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "hidden",
         "num_attention_heads": "heads", "intermediate_size": "intermediate"}
HF_CONFIG = SIZES | {"max_position_embeddings": "max_positions", "type_vocab_size": "type_vocab",
                     "hidden_dropout_prob": "dropout", "layer_norm_eps": "layer_norm_eps",
                     "pad_token_id": "pad_id", "initializer_range": "init_std"}
# settings with one value that our models can represent; a config.json may leave them out
HF_SETTINGS = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
# what ElectraForMultipleChoice reads beside them
SUMMARY = {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu",
           "summary_proj_to_labels": False}
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

# ---------------------------------------------------------------------------- names: CLIP's text tower

CLIP_NAMES = {  # our tensor: OpenAI's; Hugging Face's without the prefix `text_model.`
    "embeddings.word.weight": ("token_embedding.weight", "embeddings.token_embedding.weight"),
    "embeddings.position.weight": ("positional_embedding", "embeddings.position_embedding.weight"),
    "norm.*": ("ln_final.*", "final_layer_norm.*"),
    "project.weight": ("text_projection", "text_projection.weight"),
    "logit_scale": ("logit_scale", "logit_scale"),
    "layers.#.attention_norm.*": ("transformer.resblocks.#.ln_1.*", "encoder.layers.#.layer_norm1.*"),
    "layers.#.attention.qkv.*": (
        "transformer.resblocks.#.attn.in_proj_*", "encoder.layers.#.self_attn.q_proj.* "
        "encoder.layers.#.self_attn.k_proj.* encoder.layers.#.self_attn.v_proj.*"),
    "layers.#.attention.out.*": ("transformer.resblocks.#.attn.out_proj.*",
                                 "encoder.layers.#.self_attn.out_proj.*"),
    "layers.#.output_norm.*": ("transformer.resblocks.#.ln_2.*", "encoder.layers.#.layer_norm2.*"),
    "layers.#.expand.*": ("transformer.resblocks.#.mlp.c_fc.*", "encoder.layers.#.mlp.fc1.*"),
    "layers.#.contract.*": ("transformer.resblocks.#.mlp.c_proj.*", "encoder.layers.#.mlp.fc2.*"),
}
# the image tower and three constants; in folders a buffer of older versions and the head of a task of ours
OPENAI_IGNORED = re.compile(r"visual\..+|input_resolution|context_length|vocab_size")
CLIP_IGNORED = re.compile(r"(vision_model|visual_projection)\..+|embeddings\.position_ids|"
                          r"classifier\.(weight|bias)")
CLIP_CONFIG = SIZES | {"max_position_embeddings": "positions", "projection_dim": "projection",
                       "dropout": "dropout", "initializer_range": "init_std"}
CLIP_SETTINGS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def tensor_names(table, layers=0):
    """{our tensor: theirs, a tuple} of a table of names."""
    names = {}
    for row in table.items():
        for layer in range(layers if "#" in row[0] else 1):
            for kind in ("weight", "bias") if "*" in row[0] else ("",):
                ours, *theirs = " ".join(row).replace("#", str(layer)).replace("*", kind).split()
                names[ours] = tuple(theirs)
    return names


def hf_names(config, pooler="pooler.dense"):
    """tensor_names of a BERT or ELECTRA whose file has this name for the pooler, "" = none."""
    return tensor_names(HF_NAMES | ({"pooler.*": f"{pooler}.*"} if pooler else {}), config.layers)


def clip_names(config, openai=False):
    """tensor_names of a text tower."""
    table = {ours: theirs[0 if openai else 1] for ours, theirs in CLIP_NAMES.items()}
    return tensor_names(table, config.layers)


# ---------------------------------------------------------------------------- reading: settings


def model_type(folder):
    """What a Hugging Face folder holds: "bert", "electra", "clip" (its text tower), or another's word."""
    name = read_json(Path(folder) / "config.json", AGAIN).get("model_type")
    return "clip" if name == "clip_text_model" else name


def load_config(folder):
    """BERTConfig of a Hugging Face folder; SystemExit where model.py has no such BERT."""
    path = Path(folder) / "config.json"
    settings, fixed = read_json(path, AGAIN), HF_SETTINGS
    if settings.get("hidden_act") == "gelu_python":  # the same in another order
        settings["hidden_act"] = "gelu"
    if settings.get("architectures") == ["ElectraForMultipleChoice"]:
        fixed = fixed | SUMMARY
    values = our_values(settings, path, tuple(HF_CLASSES), HF_CONFIG, fixed)
    if settings.get("embedding_size") != settings.get("hidden_size"):
        values["embedding"] = settings.get("embedding_size")
    return make_config(values | {"model_type": settings["model_type"]}, path)


def load_clip_config(folder):
    """CLIPConfig of the text tower in a Hugging Face folder; SystemExit where model.py has no such tower."""
    path = Path(folder) / "config.json"
    settings = read_json(path, AGAIN)
    if settings.get("model_type") == "clip":  # both towers
        text = settings.get("text_config_dict") or settings.get("text_config")  # the first wins, as in theirs
        if not isinstance(text, dict):
            raise SystemExit(f"{path}: has no text_config; choose another model")
        width = settings.get("projection_dim", CLIPConfig.projection)
        settings = text | {"model_type": "clip", "projection_dim": width}
    types = ("clip", "clip_text_model")
    return make_config(our_values(settings, path, types, CLIP_CONFIG, CLIP_SETTINGS), path, CLIPConfig)


def our_values(settings, path, types, names, fixed):
    """{our field: value} of the settings; SystemExit where our models cannot represent one."""
    for key, allowed in {"model_type": types, **{key: (value,) for key, value in fixed.items()}}.items():
        value = (fixed | settings).get(key)
        if value not in allowed:
            raise SystemExit(f"{path}: {key} is {value!r}, only {' or '.join(map(repr, allowed))} can be "
                             "read; choose another model")
    return {ours: settings.get(theirs) for theirs, ours in names.items()}


def make_config(values, path, cls=BERTConfig):
    """Config from the values in a file, each of its field's type; None = the default."""
    values = {name: value for name, value in values.items() if value is not None}
    for field in dataclasses.fields(cls):
        value = values.get(field.name, field.default)
        wanted = (int, float) if field.type is float else field.type
        most = LAYERS if field.name == "layers" else 1 << 24
        if isinstance(value, bool) or not isinstance(value, wanted) or field.type is int and value > most:
            raise SystemExit(f"{path}: {value!r} is no value for {field.name}; {AGAIN}")
    try:
        return cls(**values)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}; {AGAIN}") from None


def config_and_vocab(folder, weights=True):
    """(config, vocabulary) of a Hugging Face folder of BERT, ELECTRA or CLIP's text tower, of one size.

    A table may have more rows than BERT's vocabulary has tokens, often a round number: those get names.
    SystemExit where it has fewer, and where config.json has another number than the weights, if those count.
    """
    if model_type(folder) == "clip":
        config, vocab = load_clip_config(folder), load_clip_vocab(folder)
    else:
        config, vocab = load_config(folder), load_vocab(folder)
    tensors = read_folder(folder)[1] if weights else {}
    rows = next((len(table) for name, table in tensors.items()
                 if name.endswith(("word_embeddings.weight", "token_embedding.weight"))), config.vocab_size)
    if isinstance(vocab, Vocab) and vocab.size < rows == config.vocab_size:
        return config, vocab.padded(rows)
    if not vocab.size == config.vocab_size == rows:
        raise SystemExit(f"{folder}: {vocab.size:,} tokens in its vocabulary, {config.vocab_size:,} in its "
                         f"config.json, {rows:,} in its weights; fetch or save the model again")
    return config, vocab


def is_clip(path, flag):
    """Whether a path is CLIP's text tower: OpenAI's file, or a model's folder."""
    return Path(path).is_file() or model_type(model_folder(path, flag)) == "clip"


def open_clip(path, flag, quick_gelu=False):
    """(CLIPText, hash of its weights, its vocabulary or None) of a folder, or of OpenAI's file without."""
    if Path(path).is_file():
        return load_clip(path, quick_gelu=quick_gelu), file_hash(path), None
    folder = model_folder(path, flag)
    return load_clip(folder), file_hash(folder), config_and_vocab(folder)[1]


def check_tower(flag, path, tower, own, text, train):
    """SystemExit where CLIP's side of packed pairs, of vocabulary `text` in `train`, is not the tower's; own:
    its vocabulary, None = OpenAI's."""
    if (own.hash if own else OPENAI_CLIP) != text.hash or not own and tower.config.vocab_size != text.size:
        raise SystemExit(f"--train {train}: packed with another tokenizer ({text.size:,} tokens) than that "
                         f"of {flag} {path} ({tower.config.vocab_size:,}); pack it again with its "
                         "--clip_vocab")


def vocab_of(folder, flag, text):
    """The vocabulary of a model's folder, of its size; SystemExit names the flag where it is not that of the
    packed text, `text`."""
    _, vocab = config_and_vocab(folder)
    if vocab.hash != text.hash:
        raise SystemExit(f"{flag} {folder} reads another vocabulary ({vocab.size:,} tokens) than the packed "
                         f"text ({text.size:,}); pack it again with --vocab {folder}")
    return vocab


def load_task(folder):
    """What config.json tells of a fine-tuned folder's task; SystemExit where it is not fine-tuned.

    {"task": name, "kind": of TASK_KINDS, "labels": words of the classes, "pool": cls or mean, "max_length":
    tokens}, "encoder": "xdbert" where it is one, and what else `save_task_model` was given. Hugging Face's
    folders tell kind and labels; their task is "", their max_length 128.
    """
    path = Path(folder) / "config.json"
    content = read_json(path, AGAIN)
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


# ---------------------------------------------------------------------------- reading: tensors


def read_tensors(path):
    """{name: tensor} of a .safetensors or .bin file, of a checkpoint what is its "state_dict"."""
    try:
        with path.open("rb") as f:
            if f.read(23) == b"version https://git-lfs":
                raise ValueError("it is a git-lfs pointer: `git lfs pull` brings the file itself")
        if path.suffix == ".safetensors":
            return load_file(path)
        check_archive(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(tensors.get("state_dict"), dict):
            tensors = tensors["state_dict"]
        for name, value in tensors.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise ValueError("it holds other things than tensors under their names")
            if value.layout != torch.strided or value.is_meta or value.is_complex():
                raise ValueError(f"{name} is no plain tensor of numbers")
            if value.nbytes > value.untyped_storage().nbytes():  # a stride of 0 makes much out of little
                raise ValueError(f"{name} has more numbers than the file holds for it")
        return dict(tensors)
    except UnpicklingError:  # PyTorch's text advises to load it without this protection
        raise unreadable(path, "damaged, or it holds more than tensors") from None
    except Exception as error:  # whatever a damaged or hostile file makes the two libraries raise
        raise unreadable(path, error) from None


def unreadable(path, reason):
    """The SystemExit that says so in one line; reason: an exception or a text."""
    text = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    return SystemExit(f"{path}: not readable ({text}); {AGAIN}")


def read_folder(folder):
    """(path, {name: tensor}) of the weights in a Hugging Face folder; of shards the path of their index."""
    (path, *shards), tensors = weight_files(folder), {}
    for shard in shards or [path]:
        part = read_tensors(shard)
        if double := tensors.keys() & part.keys():
            raise SystemExit(f"{shard}: the tensor {min(double)} stands in another shard, too; {AGAIN}")
        tensors |= part
    return path, tensors


def read_bert(folder, config):
    """(path, {name: tensor}) of a BERT or ELECTRA, all names known, without prefix, gamma and beta."""
    path, stored_tensors = read_folder(folder)
    names = hf_names(config) | tensor_names(HEAD_NAMES[config.model_type])
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


def read_clip(path, quick_gelu):
    """(CLIPConfig, path of the weights, {name: tensor}, clip_names) of the text tower at `path`."""
    path = Path(path)
    openai, ignored = not path.is_dir(), CLIP_IGNORED if path.is_dir() else OPENAI_IGNORED
    if openai:
        tensors = read_openai(path)
        config = openai_config(tensors, path)
        if not quick_gelu and "input_resolution" not in tensors:
            raise SystemExit(f"{path}: does not tell its activation; give --quick_gelu where it is OpenAI's "
                             "or one of open_clip's whose name ends in quickgelu; others cannot be read")
        tensors["text_projection"] = tensors["text_projection"].T  # ours is the weight of a linear map
    else:
        config, (path, stored) = load_clip_config(path), read_folder(path)
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
        tensors.setdefault("logit_scale", torch.tensor(FIRST_LOGIT_SCALE))  # only CLIPModel and we store it
        if "text_projection.weight" not in tensors:
            if config.projection != config.hidden:
                raise SystemExit(f"{path}: has no text_projection, from {config.hidden} to "
                                 f"{config.projection} channels; choose a CLIPModel or "
                                 "CLIPTextModelWithProjection")
            print0(f"{path}: has no text_projection: the states are taken as they are")
            tensors["text_projection.weight"] = torch.eye(config.hidden)
    names = clip_names(config, openai)
    known = {name for parts in names.values() for name in parts}
    for name in tensors:
        if name not in known and not ignored.fullmatch(name):
            raise SystemExit(f"{path}: the tensor {name} is unknown; choose a CLIP of OpenAI's architecture, "
                             f"of {config.layers} text layers")
    return config, path, tensors, names


def openai_config(tensors, path):
    """CLIPConfig from the shapes in OpenAI's file; a head has 64 channels."""
    layers = len({name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")})
    try:
        words, hidden = tensors["token_embedding.weight"].shape
        positions, _ = tensors["positional_embedding"].shape
        intermediate, _ = tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape
        _, projection = tensors["text_projection"].shape
    except (KeyError, ValueError):
        raise SystemExit(f"{path}: holds no text tower under OpenAI's names; give OpenAI's file or the "
                         "folder of a Hugging Face CLIP") from None
    sizes = dict(vocab_size=words, layers=layers, hidden=hidden, heads=hidden // 64, positions=positions,
                 intermediate=intermediate, projection=projection)
    return make_config(sizes, path, CLIPConfig)


class Unfilled(TorchFunctionMode):
    """Inside, torch.nn.init leaves tensors as they are: on the meta device it would import torch._dynamo."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def hollow(module, *args):
    """A module without numbers, for `fill`: making it takes no time and no random numbers."""
    with torch.device("meta"), Unfilled():
        return module(*args)


def fill(module, names, tensors, path):
    """A hollow module with the tensors under `names` ({ours: theirs}), in float32 and eval mode."""
    state = {}
    for ours, value in module.state_dict().items():
        parts = len(names[ours])
        shape = value.shape if parts == 1 else torch.Size((value.shape[0] // parts, *value.shape[1:]))
        for name in names[ours]:
            if name not in tensors:
                raise SystemExit(f"{path}: the tensor {name} is missing; {AGAIN}")
            if tensors[name].shape != shape:
                raise SystemExit(f"{path}: the shape of {name} is {tuple(tensors[name].shape)}, by the "
                                 f"settings {tuple(shape)}; {AGAIN}")
        whole = torch.cat([tensors[name].detach().float().flatten() for name in names[ours]])
        state[ours] = whole.view(value.shape)
    module.load_state_dict(state, assign=True)
    return module.eval()


def fill_own(module, path, advice, ignored=()):
    """`fill` from a file under our own names; names that start with `ignored` are left out."""
    names, tensors = {name: (name,) for name in module.state_dict()}, read_tensors(path)
    for name in tensors:
        if name not in names and not name.startswith(ignored):
            raise SystemExit(f"{path}: the tensor {name} is unknown; {advice}")
    return fill(module, names, tensors, path)


# ---------------------------------------------------------------------------- reading: models


def load_bert(folder, pooler=False, dropout=None):
    """The BERT or ELECTRA of a Hugging Face folder, fine-tuned or not.

    pooler: True = the file's where it was trained, else a fresh one (N(0, init_std), bias 0) that draws from
    torch's global generator; "trained" = the file's or none. dropout: None = the file's for hidden states.
    """
    config = load_config(folder)
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    path, tensors = read_bert(folder, config)
    names = {name for _, name, _ in HF_CLASSES[config.model_type].values() if name}
    stored = next((name for name in names if any(t.startswith(f"{name}.") for t in tensors)), "")
    trained = stored and read_json(Path(folder) / "config.json", AGAIN).get("pooler_trained", True)
    bert = fill(hollow(BERT, config, pooler and trained), hf_names(config, stored), tensors, path)
    if pooler is True and not trained:
        bert.pooler = nn.Linear(config.hidden, config.hidden)
        init_weights(bert.pooler, config.init_std)
    return bert.eval()


def start_from(bert, head, folder, vocab):
    """Loads the BERT of `folder`, and its MLM head if it has one, into `bert` and `head` (two-stage).

    vocab: the Vocab of the words that are read; of rows beyond it both may have more or less. SystemExit
    where vocabulary or shape differ.
    """
    vocab_of(folder, "--init_from", vocab)
    source, config = load_bert(folder), bert.config
    same = dict(dropout=config.dropout, init_std=config.init_std, vocab_size=config.vocab_size)
    if dataclasses.replace(source.config, **same) != config:
        raise SystemExit(f"--init_from {folder}: its shape is not the student's ({config.layers} layers of "
                         f"{config.hidden}); give --model to match")
    own = load_mlm_head(folder, source)
    if own is None:
        print0(f"{folder}: has no masked-word head; the student's begins with random weights")
    for part, begin in ((bert, source), (head, own or head)):
        state = part.state_dict()
        for name, value in begin.state_dict().items():
            state[name][:len(value)] = value[:len(state[name])]


def load_mlm_head(folder, bert, needed=True):
    """The MLMHead of a Hugging Face folder, tied to its `bert`; None where it has none, and where it is not
    `needed` and is incomplete or untied."""
    path, tensors = read_bert(folder, bert.config)
    names = tensor_names(HEAD_NAMES[bert.config.model_type])
    own = [name in tensors for ours, (name,) in names.items() if ours != "weight"]
    untied = [names for names in TIED.items() if names[0] in tensors and names[1] in tensors
              and not torch.equal(tensors[names[0]], tensors[names[1]])]
    if not any(own) or not needed and (untied or not all(own)):
        return None
    for copy, original in untied:
        raise SystemExit(f"{path}: {copy} differs from {original}, but only a tied decoder can be read; "
                         "choose another model")
    head = hollow(MLMHead, bert.width, bert.embeddings.word.weight, bert.config.layer_norm_eps)
    fill(head, names, tensors, path)
    head.weight = bert.embeddings.word.weight
    return head


def load_clip(path, dropout=None, quick_gelu=False):
    """CLIP's text tower from a Hugging Face folder or from OpenAI's file.

    A folder: of CLIPModel (its image tower is ignored), CLIPTextModelWithProjection, or CLIPTextModel, whose
    projection is the identity. A file: state dict (.pt, .pth, .bin, .safetensors) or TorchScript archive.
    quick_gelu: the user's word for a file without the three constants of OpenAI's: open_clip's files have the
    same names, and most of them need plain GELU.
    """
    config, path, tensors, names = read_clip(path, quick_gelu)
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    return fill(hollow(CLIPText, config), names, tensors, path)


def load_xdbert(folder, dropout=None):
    """The XDBERT that `save_xdbert` wrote."""
    folder = Path(folder)
    path = folder / "cross.json"
    settings = read_settings(path, {"layers": int, "pooler": bool}, "adapt it again")
    layers, pooler = settings["layers"], settings["pooler"]
    if not 1 <= layers <= LAYERS:
        raise SystemExit(f"{path}: not that of an XDBERT; adapt it again")
    model = hollow(XDBERT, load_bert(folder, dropout=dropout), load_clip(folder / "clip"), layers)
    model.pooler = hollow(nn.Linear, model.width, model.width) if pooler else None
    fill_own(model.own(), folder / "cross.safetensors", "adapt it again", ignored="classifier.")
    return model.eval()


def load_task_model(folder):
    """(TaskModel, what `load_task` tells) of a fine-tuned folder, ours or Hugging Face's."""
    settings, folder = load_task(folder), Path(folder)
    kind, pool, head = settings["kind"], settings["pool"], "classifier"
    if settings.get("encoder") == "xdbert":
        encoder, path = load_xdbert(folder), folder / "cross.safetensors"
        tensors = read_tensors(path)
    elif model_type(folder) == "clip":
        encoder, (path, tensors) = load_clip(folder), read_folder(folder)
    else:
        config = load_config(folder)
        path, tensors = read_bert(folder, config)
        _, pooler, head = HF_CLASSES[config.model_type][kind]
        encoder = hollow(BERT, config, kind != "span" and pool == "cls")
        fill(encoder, hf_names(config, pooler), tensors, path)
    model = hollow(TaskModel, encoder, kind, len(settings["labels"]), pool)
    fill(model.classifier, {part: (f"{head}.{part}",) for part in ("weight", "bias")}, tensors, path)
    return model.eval(), settings


def load_video_encoder(folder):
    """The VideoEncoder that `save_video_encoder` wrote."""
    path = Path(folder) / "video_encoder.json"
    kinds = {"config": dict, "features": int, "max_frames": int}
    settings = read_settings(path, kinds, "train the teacher again")
    try:
        encoder = hollow(VideoEncoder, make_config(settings["config"], path), settings["features"],
                         settings["max_frames"])
    except (TypeError, RuntimeError) as error:
        raise SystemExit(f"{path}: not those of a video encoder ({error}); train the teacher again") from None
    return fill_own(encoder, Path(folder) / "video_encoder.safetensors", "train the teacher again")


# ---------------------------------------------------------------------------- writing


def save_bert(bert, folder, vocab, head=None):
    """Writes a folder that `load_bert`, and Hugging Face's AutoModel and AutoTokenizer, open.

    vocab: the Vocab of the ids; head: a trained MLMHead. BertModel has a pooler: a BERT without gets a fresh
    one (N(0, 0.02), seed 0) and "pooler_trained": false in config.json. ElectraModel has none.
    """
    state = head.state_dict() if head else {}
    state.pop("weight", None)  # tied: it is among the embeddings
    head = renamed(state, tensor_names(HEAD_NAMES[bert.config.model_type]))
    write_bert(bert, folder, vocab, "mlm" if head else "encoder", head, {})


def save_clip(clip, folder, vocab):
    """Writes a folder that `load_clip` and Hugging Face's CLIPTextModelWithProjection open."""
    write_clip(clip, folder, vocab, {}, {})


def save_xdbert(model, folder, vocab, clip_vocab, head=None):
    """Writes the language encoder as `save_bert` does; beside it clip/, cross.safetensors and cross.json."""
    write_cross(model, folder, clip_vocab, {})
    save_bert(model.language, folder, vocab, head)


def save_task_model(model, folder, vocab, settings, clip_vocab=None):
    """Writes a folder for `load_task_model`; what loads the encoder alone opens it, too.

    settings: kept in config.json as "nanoground", with at least task (its name), labels (words of the classes
    in order, else []) and max_length (tokens). Hugging Face's class for the kind of task computes the same
    logits of a BERT or ELECTRA; it has none for pool="mean": architectures is BertModel or ElectraModel then.
    clip_vocab: of an XDBERT, whose head goes into cross.safetensors.
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
        write_clip(encoder, folder, vocab, head, content)
    elif isinstance(encoder, XDBERT):
        content["nanoground"]["encoder"] = "xdbert"
        write_cross(encoder, folder, clip_vocab, head)
        write_bert(encoder.language, folder, vocab, "encoder", {}, content)
    else:
        write_bert(encoder, folder, vocab, model.kind if model.pool == "cls" else "encoder", head, content)


def save_video_encoder(folder, encoder):
    """Writes video_encoder.safetensors and video_encoder.json."""
    settings = {"features": encoder.features, "max_frames": encoder.max_frames,
                "config": dataclasses.asdict(encoder.config)}
    write_folder(folder, "video_encoder.safetensors", encoder.state_dict(), "video_encoder.json", settings)


def write_bert(bert, folder, vocab, kind, head, settings):
    """Writes a BERT for the class in HF_CLASSES. head: {theirs: tensor}; settings: more for config.json."""
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


def write_clip(clip, folder, vocab, head, settings):
    """Writes a text tower. head: {name: tensor} of a task's; settings: more for config.json."""
    config = clip.config
    assert vocab.size == config.vocab_size, f"{vocab.size} tokens in vocab, {config.vocab_size} in model"
    tensors = {("" if name in ("text_projection.weight", "logit_scale") else "text_model.") + name: value
               for name, value in renamed(clip.state_dict(), clip_names(config)).items()}
    settings = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
                **CLIP_SETTINGS, **{theirs: getattr(config, ours) for theirs, ours in CLIP_CONFIG.items()},
                "bos_token_id": vocab.start, "eos_token_id": vocab.end, "pad_token_id": vocab.pad, **settings}
    write_folder(folder, "model.safetensors", tensors | head, "config.json", settings, vocab)


def write_cross(model, folder, clip_vocab, head):
    """Writes an XDBERT without its language encoder. head: {name: tensor} of a task's."""
    save_clip(model.clip, Path(folder) / "clip", clip_vocab)
    write_folder(folder, "cross.safetensors", model.own().state_dict() | head, "cross.json",
                 {"layers": len(model.cross.text), "pooler": model.pooler is not None})


def renamed(state, names):
    """{theirs: tensor} of {ours: tensor}; what ours joins is taken apart."""
    tensors = {}
    for ours, value in state.items():
        tensors |= zip(names[ours], value.chunk(len(names[ours])) if len(names[ours]) > 1 else [value])
    return tensors


def write_tensors(tensors, path):
    """Writes {name: tensor} as float32, a .safetensors file; OSError where the disk is full."""
    whole = {name: value.to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def save_tensors(tensors, path):
    """Writes a .safetensors file of {name: tensor}, atomically."""
    with atomic(path) as part:
        write_tensors(tensors, part)


def write_folder(folder, weights_name, tensors, settings_name, settings, vocab=None):
    """Writes weights (float32), vocabulary and, last, settings (json); other files of the folder stay.

    All is written aside, then moved: interrupted, it leaves each file old or new, and a new folder without
    settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / settings_name) as part:
        part.write_text(json.dumps(settings, indent=2) + "\n")
        write_tensors(tensors, part.with_name(weights_name))
        if vocab is not None:
            vocab.save(part.parent)
        for path in part.parent.iterdir():
            if path != part:
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
                os.replace(path, folder / path.name)


# ---------------------------------------------------------------------------- OpenAI's TorchScript archive


def view_of(storage, offset, size, stride, *_):
    """The tensor of this size and stride in a flat storage; more numbers than it holds are refused."""
    if math.prod(size) > len(storage):
        raise UnpicklingError(f"a tensor of {size} in a storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


# what data.pkl may name; beside it in the zip: data/ with a file for each storage, code/, which is not read
KNOWN = {"collections.OrderedDict": OrderedDict, "torch._utils._rebuild_tensor_v2": view_of,
         "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
         "torch.DoubleStorage": torch.float64, "torch.BFloat16Storage": torch.bfloat16,
         "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32, "torch.ShortStorage": torch.int16,
         "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool}


class ArchiveUnpickler(Unpickler):
    """Reads the modules of a TorchScript archive as plain namespaces of tensors.

    Nothing that the file names is imported or called: `find_class` maps the names of a stored model to what
    stands here and refuses all others.
    """

    def __init__(self, archive):
        self.archive, self.root, self.storages = archive, archive.namelist()[0].split("/")[0] + "/", {}
        content = self.read("data.pkl")
        check_pickle(content, len(content))
        super().__init__(io.BytesIO(content))

    def read(self, name):
        """The bytes of a part. PyTorch stores them as they are: compressed ones could unfold to any size."""
        if self.archive.getinfo(self.root + name).compress_type != zipfile.ZIP_STORED:
            raise UnpicklingError(f"{name} is compressed")
        return self.archive.read(self.root + name)

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":  # the modules' classes
            return SimpleNamespace
        if f"{module}.{name}" in KNOWN:
            return KNOWN[f"{module}.{name}"]
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


def read_openai(path):
    """{name: tensor} of a TorchScript archive, as its state dict has them, or of a file of a state dict."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return state_of(ArchiveUnpickler(archive).load())
    except (OSError, zipfile.BadZipFile):
        pass  # no archive, or a damaged one: torch.load will tell
    except Exception as error:  # whatever a damaged or hostile file leads to
        raise unreadable(path, error) from None
    return read_tensors(path)


def state_of(module):
    """{name: tensor} of nested namespaces; a hostile file may hold a circle of them."""
    stack, seen, tensors = [("", module)], set(), {}
    while stack:
        prefix, module = stack.pop()
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, SimpleNamespace) and id(value) not in seen:
                seen.add(id(value))
                stack.append((f"{prefix}{name}.", value))
    return tensors
