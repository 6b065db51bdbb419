"""parts/towers.py: networks have the parameters, names and outputs of the originals; their files are read
strictly, in every form that is about; another file is one clear line.

frozen_towers.json holds outputs of seeded weights by an independent implementation, see make_frozen_towers.py.

    pytest -q tests/test_towers.py
"""
import contextlib
import copy
import json
import math
import pickle
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import stop_line
from safetensors.torch import save_file
from test_model import CLIP, IDS, same
from test_weights import OpenAIBlock, OpenAIText
from torch import nn

from common import check_pickle
from parts.towers import CLIPImage, ResNet, ResNetConfig, ViTConfig, build_tower, load_tower
from parts.weights import hollow

FROZEN = json.loads(Path(__file__).with_name("frozen_towers.json").read_text())
NEXT = dict(kernel=(7, 7, 7), inner=128, groups=32)
SMALL = dict(blocks=(1, 2, 1, 1), stem=8, inner=4, outer=16)
SIZES = {"2d": ResNetConfig(**SMALL), "3d": ResNetConfig((7, 7, 7), **SMALL),
         "next": ResNetConfig((7, 7, 7), (1, 2, 1, 1), stem=8, inner=8, outer=16, groups=4)}
RANKS = {"2d": 2, "3d": 3, "next": 3, "clip": 2}
PIXELS = {"2d": (3, 3, 40, 70), "3d": (3, 3, 16, 32, 32), "next": (3, 3, 16, 32, 32), "clip": (3, 3, 12, 12)}


def seeded(name, shape):
    """A tensor that follows from its name, its numbers as large as in trained networks."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("running_var"):
        return 1 + 0.1 * x.abs()
    return 0.1 * x + name.endswith("weight") if len(shape) == 1 else x / math.prod(shape[1:]) ** 0.5


def pixels_of(shape):
    return torch.randint(0, 256, tuple(shape), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


class OpenAIVisual(nn.Module):
    """The structure and the names of CLIP's ViT in OpenAI's code, from PyTorch's own modules."""

    def __init__(self, patch=4, grid=3, C=128, layers=2, projection=20):
        super().__init__()
        self.conv1 = nn.Conv2d(3, C, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.positional_embedding = nn.Parameter(torch.empty(grid ** 2 + 1, C))
        self.ln_pre, self.ln_post = nn.LayerNorm(C), nn.LayerNorm(C)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenAIBlock(C, C // 64, 4 * C) for _ in range(layers))
        self.proj = nn.Parameter(torch.empty(C, projection))

    def forward(self, image):
        x = self.conv1(image).flatten(2).permute(2, 0, 1)  # (patches, n, C)
        x = torch.cat([self.class_embedding + torch.zeros_like(x[:1]), x]) + self.positional_embedding[:, None]
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x, None)
        return self.ln_post(x[0]) @ self.proj


class OpenAIClip(OpenAIText):
    """With both towers; `forward` is OpenAIText's but for the picture's feature in the first place."""

    def __init__(self):
        super().__init__(CLIP)
        self.visual = OpenAIVisual()
        for name, p in self.named_parameters():
            p.data = seeded(name, p.shape)

    def forward(self, image, ids):
        return self.visual(image), self.token_embedding(ids)


@pytest.fixture(scope="module")
def openai():
    return OpenAIClip().eval().requires_grad_(False)


def small(kind):
    """{name: tensor} of a small tower as its file has them, with a classifier and counters or a text tower."""
    if kind == "clip":
        return dict(OpenAIClip().state_dict())
    state = {name: seeded(name, value.shape) for name, value in hollow(ResNet, SIZES[kind]).state_dict().items()}
    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(9) for name in state if "_var" in name}
    return state | counters | {"fc.weight": torch.zeros(400, 128), "fc.bias": torch.zeros(400)}


# ---------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name, network, config, count, classes, whole, tensors", [
    ("ResNet-152", ResNet, ResNetConfig(), 58_143_808, 1000, 60_192_808, 775),
    ("ResNeXt3D-101", ResNet, ResNetConfig(blocks=(3, 4, 23, 3), **NEXT), 47_521_216, 400, 48_340_816, 520),
    ("ResNeXt3D-152", ResNet, ResNetConfig(blocks=(3, 8, 36, 3), **NEXT), 65_359_296, 0, 65_359_296, 775),
    ("CLIP ViT-B/32", CLIPImage, ViTConfig(), 87_849_216, 0, 87_849_216, 8 + 12 * 12),
    ("CLIP ViT-B/32 (Hugging Face)", CLIPImage, ViTConfig(), 87_849_216, 0, 87_849_216, 8 + 12 * 12)])
def test_parameters_are_as_many_as_in_the_originals(name, network, config, count, classes, whole, tensors):
    net = hollow(network, config)
    assert sum(p.numel() for p in net.parameters()) == count == whole - (net.width + 1) * classes
    assert count == FROZEN["counts"][name]
    assert len(net.state_dict()) == tensors and net.width == (512 if network is CLIPImage else 2048)
    assert all(value.is_meta for value in net.state_dict().values())


def test_names_and_shapes_are_those_of_the_originals():
    norms, channels = ("weight", "bias", "running_mean", "running_var"), 64
    expected = {"conv1.weight": (64, 3, 7, 7)} | {f"bn1.{norm}": (64,) for norm in norms}
    for layer, blocks in enumerate((3, 8, 36, 3)):
        inner, outer = 64 * 2 ** layer, 256 * 2 ** layer
        for block in range(blocks):
            convs = {"conv1": (inner, channels, 1, 1), "conv2": (inner, inner, 3, 3), "conv3": (outer, inner, 1, 1)}
            bns = {"bn1": inner, "bn2": inner, "bn3": outer}
            if block == 0:
                convs["downsample.0"], bns["downsample.1"] = (outer, channels, 1, 1), outer
            at, channels = f"layer{layer + 1}.{block}.", outer
            expected |= {f"{at}{name}.weight": shape for name, shape in convs.items()}
            expected |= {f"{at}{name}.{norm}": (size,) for name, size in bns.items() for norm in norms}
    assert {n: tuple(value.shape) for n, value in hollow(ResNet, ResNetConfig()).state_dict().items()} == expected
    state = hollow(ResNet, ResNetConfig(blocks=(3, 4, 23, 3), **NEXT)).state_dict()
    for name, shape in {"conv1": (64, 3, 7, 7, 7), "layer1.0.conv2": (128, 4, 3, 3, 3),
                        "layer2.0.downsample.0": (512, 256, 1, 1, 1), "layer3.22.conv1": (512, 1024, 1, 1, 1),
                        "layer4.2.conv3": (2048, 1024, 1, 1, 1)}.items():
        assert state[f"{name}.weight"].shape == shape
    assert not any(name.startswith("layer3.23.") for name in state)


@pytest.mark.parametrize("case", FROZEN["cases"], ids=lambda case: case["case"])
def test_towers_equal_frozen_outputs(case):
    tensors = {name: seeded(name, shape) for name, shape in case["tensors"]}
    tower = build_tower(tensors, "file", len(case["pixels"]) - 2)
    y = tower(pixels_of(case["pixels"]))
    assert y.shape == (case["pixels"][0], tower.width) and y.dtype == torch.float32
    for row, stored, norm in zip(y.double(), torch.tensor(case["output"], dtype=torch.float64), case["norm"]):
        assert (row[:8] - stored).norm() < 1e-5 * stored.norm() and abs(row.norm() - norm) < 1e-5 * norm


def normalised(x, norm):
    """Batch normalisation by its definition."""
    w, b, mean, var = (value.view(-1, *[1] * (x.dim() - 2))
                       for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def convolved(x, weight, stride=1, groups=1):
    """Convolution as a product of windows, padded so that stride 1 keeps the size."""
    rank, side = x.dim() - 2, weight.shape[-1]
    x = F.pad(x, [side // 2] * 2 * rank)
    for axis in range(2, 2 + rank):
        x = x.unfold(axis, side, stride)
    x, weight = x.flatten(2 + rank).unflatten(1, (groups, -1)), weight.flatten(2).unflatten(0, (groups, -1))
    return torch.einsum("ngc...k,gdck->ngd...", x, weight).flatten(1, 2)


@pytest.mark.parametrize("kind", SIZES)
def test_residual_block_equals_its_definition(kind):
    net = copy.deepcopy(build_tower(small(kind), "file", RANKS[kind]).net).double()
    for block, stride in ((net.layer1[0], 1), (net.layer2[0], 2), (net.layer2[1], 1)):
        shape = 2, block.conv1.weight.shape[1], *(5, 6, 7)[-RANKS[kind]:]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = normalised(convolved(x, block.conv1.weight), block.bn1).relu()
        y = normalised(convolved(y, block.conv2.weight, stride, SIZES[kind].groups), block.bn2).relu()
        y = normalised(convolved(y, block.conv3.weight), block.bn3)
        ours = block(x)
        if stride == 2 or x.shape[1] != y.shape[1]:
            x = normalised(convolved(x, block.downsample[0].weight, stride), block.downsample[1])
        torch.testing.assert_close(ours, (y + x).relu())


@pytest.mark.parametrize("kind", RANKS)
def test_one_at_a_time_equals_a_batch_and_dtypes_hold(kind):
    tower, pixels = build_tower(small(kind), "file", RANKS[kind]), pixels_of(PIXELS[kind])
    kept, whole = pixels.clone(), tower(pixels)
    assert whole.shape == (3, tower.width) and torch.equal(pixels, kept) and not whole.requires_grad
    torch.testing.assert_close(torch.cat([tower(one[None]) for one in pixels]), whole, rtol=1e-5, atol=1e-5)
    assert whole.std(0).max() > 0.01  # it depends on the picture
    with torch.autocast("cpu", torch.bfloat16):
        half = tower(pixels)
    assert half.dtype == torch.float32 and F.cosine_similarity(half, whole).min() > 0.99
    with pytest.raises(AssertionError, match="torch.float32, not uint8"):
        tower(pixels.float())


@pytest.mark.parametrize("height, width", [(224, 398), (33, 47), (32, 32)])
def test_2d_feature_is_the_mean_over_the_whole_map_of_any_picture(height, width):
    tower = build_tower(small("2d"), "file", 2)
    maps = []
    tower.net.layer4.register_forward_hook(lambda module, args, out: maps.append(out))
    feature = tower(pixels_of((1, 3, height, width)))
    assert maps[0].shape == (1, 128, -(-height // 32), -(-width // 32))
    torch.testing.assert_close(feature, maps[0].sum((2, 3)) / maps[0][0, 0].numel())


def test_3d_feature_is_the_mean_over_time_and_space():
    tower, maps = build_tower(small("next"), "file", 3), []
    tower.net.layer1.register_forward_hook(lambda module, args, out: maps.append(out))
    tower.net.layer4.register_forward_hook(lambda module, args, out: maps.append(out))
    feature = tower(pixels_of((1, 3, 16, 112, 112)))
    assert maps[0].shape == (1, 16, 8, 28, 28) and maps[1].shape == (1, 128, 1, 4, 4)
    torch.testing.assert_close(feature, maps[1].sum((2, 3, 4)) / 16)


@pytest.mark.parametrize("kind, name, size, crop, resize, scale, mean, std", [
    ("2d", "ResNet-17", 224, "none", "ffmpeg", 255, (.485, .456, .406), (.229, .224, .225)),
    ("3d", "ResNet3D-17 (shortcut B, pixels as in 2020: 0 to 1)", 112, "center", "ffmpeg", 255,
     (.4345, .4051, .3775), (.2768, .2713, .2737)),
    ("next", "ResNeXt3D-17 (cardinality 4, shortcut B, pixels as in 2017: 0 to 255)", 112, "center", "ffmpeg", 1,
     (110.6, 103.2, 96.3), (1, 1, 1)),
    ("clip", "CLIP ViT/4@12px (2 layers of 128)", 12, "center", "pillow", 255,
     (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711))])
def test_tower_tells_what_it_needs_and_normalises_pixels(kind, name, size, crop, resize, scale, mean, std):
    tower = build_tower(small(kind), "file", RANKS[kind])
    assert (tower.name, tower.size, tower.crop, tower.resize) == (name, size, crop, resize)
    assert (tower.rank, tower.scale, tower.mean, tower.std) == (RANKS[kind], scale, mean, std)
    assert tower.width == tower.net.width == (20 if kind == "clip" else 128)
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    pixels = pixels_of(PIXELS[kind])
    shape = (1, 3, *[1] * RANKS[kind])
    x = (pixels / scale - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(tower(pixels), tower.net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes, rank, name", [
    ({}, 3, "ResNet-152, give it as --weights2d"), ({"groups": 32, "inner": 128}, 3, "ResNeXt-152 (cardinality 32), give"),
    ({"blocks": (3, 4, 6, 3), "kernel": (7, 7, 7)}, 2, "ResNet3D-50 (shortcut B, pixels as in 2020: 0 to 1)"),
    ({"blocks": (3, 4, 23, 3), **NEXT}, 2, "ResNeXt3D-101 (cardinality 32, shortcut B, pixels as in 2017: 0 to 255)")])
def test_residual_networks_have_their_common_names(sizes, rank, name):
    """Told by their shapes alone, here in the line that refuses the other rank."""
    state = hollow(ResNet, ResNetConfig(**sizes)).state_dict()
    assert f"is a {name}" in stop_line(build_tower, state, "file", rank)


@pytest.mark.parametrize("patch, size, C, layers, name", [
    (32, 224, 768, 12, "ViT-B/32"), (16, 224, 768, 12, "ViT-B/16"), (14, 224, 1024, 24, "ViT-L/14"),
    (14, 336, 1024, 24, "ViT-L/14@336px")])
def test_every_vit_of_openai_is_known_by_its_shapes(patch, size, C, layers, name):
    with torch.device("meta"):
        visual = OpenAIVisual(patch, size // patch, C, layers, 768 if C == 1024 else 512)
    state = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    assert f"is a CLIP {name}, give it as --weights2d" in stop_line(build_tower, state, "file", 3)


# ---------------------------------------------------------------------------- files of residual networks


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("form", ["plain", "old", "safetensors", "checkpoint", "old checkpoint"])
def test_file_of_every_form_equals_its_tensors(tmp_path, kind, form):
    tensors, path = small(kind), tmp_path / f"{form}.pth"
    expected = build_tower(tensors, "file", RANKS[kind])
    if "checkpoint" in form:  # as kenshohara's code saves them: by nn.DataParallel, with the optimizer
        tensors, address = {f"module.{name}": value for name, value in tensors.items()}, 140_000_000_000_000
        groups = [{"lr": 0.1, "momentum": 0.9, "nesterov": False, "params": [address, address + 8]}]
        state = {address: {"momentum_buffer": torch.ones(2)}, address + 8: {"momentum_buffer": torch.ones(3)}}
        tensors = {"epoch": 10, "arch": "resnext-101", "state_dict": tensors,
                   "optimizer": {"state": state, "param_groups": groups}}
    if form == "safetensors":
        save_file(tensors, path := tmp_path / "model.safetensors")
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization="old" not in form)
    tower = load_tower(path, RANKS[kind])
    assert same(tower.state_dict(), expected.state_dict()) and tower.name == expected.name
    assert not any(value.is_meta for value in tower.state_dict().values())


def test_tensors_that_wanted_gradients_want_none(tmp_path):
    """As tests/fuzz.py found it: buffers kept the wish, and the first picture ended in a traceback."""
    torch.save({name: nn.Parameter(x) if x.is_floating_point() else x for name, x in small("2d").items()}, tmp_path / "w.pth")
    tower = load_tower(tmp_path / "w.pth", 2)
    assert not any(x.requires_grad for x in tower.state_dict(keep_vars=True).values())
    assert not tower(pixels_of(PIXELS["2d"])).requires_grad


def test_half_precision_loads_as_float32(tmp_path):
    torch.save({name: value.half() for name, value in small("2d").items()}, tmp_path / "half.pth")
    assert {p.dtype for p in load_tower(tmp_path / "half.pth", 2).state_dict().values()} == {torch.float32}


BN = "layer2.1.bn2.running_var"


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop(BN), f"the tensor {BN} is missing"),
    (lambda t: t.pop("layer3.0.downsample.0.weight"), "the tensor layer3.0.downsample.0.weight is missing"),
    (lambda t: t.update({BN: torch.zeros(5)}), f"the shape of {BN} is (5,), by the settings ("),
    (lambda t: t.update({"layer2.0.conv2.weight": t["layer2.0.conv2.weight"][:, :1]}), "shape of layer2.0.conv2.weight"),
    (lambda t: t.update({"conv1.weight": t["conv1.weight"][:, :2]}), "the shape of conv1.weight is (8, 2, 7, 7"),
    (lambda t: t.update({"layer1.0.conv1.bias": torch.zeros(4)}), "the tensor layer1.0.conv1.bias is unknown in a Res"),
    (lambda t: t.update({"layer5.0.conv1.weight": torch.zeros(4)}), "the tensor layer5.0.conv1.weight is unknown"),
    (lambda t: t.update({"fc2.weight": torch.zeros(4)}), "the tensor fc2.weight is unknown"),
    (lambda t: t.update({"layer2.3.bn2.bias": torch.zeros(8)}), "the tensor layer2.3.bn2.bias is unknown"),
    (lambda t: t.update({"module.conv1.weight": torch.zeros(4)}), "the tensor module.conv1.weight is there twice"),
    (lambda t: t.pop("conv1.weight"), "holds no tower under known names"),
    (lambda t: t.update({"conv1.weight": torch.zeros(8, 3, 7)}), "its blocks are not the bottlenecks"),
    (lambda t: [t.pop(name) for name in list(t) if ".conv3." in name], "its blocks are not the bottlenecks"),
    (lambda t: [t.pop(name) for name in list(t) if "layer4." in name], "its blocks are not the bottlenecks"),
    (lambda t: t.update({"layer1.0.conv2.weight": torch.zeros(8, 0, 3, 3)}), "its blocks are not the bottlenecks"),
    (lambda t: t.update({"layer1.0.conv2.weight": torch.zeros(8, 8, 3, 3)}), "its blocks are not the bottlenecks"),
])
def test_other_tensors_are_one_clear_line(tmp_path, kind, change, said):
    tensors = small(kind)
    change(tensors)
    torch.save(tensors, tmp_path / "net.pth")
    line = stop_line(load_tower, tmp_path / "net.pth", RANKS[kind])
    assert line.startswith(f"{tmp_path}/net.pth: ") and said in line and ";" in line


@pytest.mark.parametrize("kind", RANKS)
def test_tower_of_the_other_rank_is_refused(tmp_path, kind):
    torch.save(small(kind), tmp_path / "net.pth")
    flags = ["--weights2d", "--weights3d"][::1 if RANKS[kind] == 2 else -1]
    line = stop_line(load_tower, tmp_path / "net.pth", 5 - RANKS[kind])
    assert line.startswith(f"{flags[1]} {tmp_path}/net.pth: is a ") and f"give it as {flags[0]}; {flags[1]} takes " in line
    load_tower(tmp_path / "net.pth", RANKS[kind])


def test_file_that_is_none_is_one_clear_line(tmp_path):
    path = tmp_path / "net.pth"
    assert "not readable" in stop_line(load_tower, path, 2)
    for content in ([1], {"state_dict": [1]}, {"state_dict": {"conv1.weight": 1.0}}, {"epoch": 3}):
        torch.save(content, path)
        assert f"{path}: not readable" in stop_line(load_tower, path, 2)
    torch.save({"features.0.weight": torch.zeros(2)}, path)
    assert "--weights3d takes the ResNeXt-101" in stop_line(load_tower, path, 3)
    assert "config.json" in stop_line(load_tower, tmp_path, 2)


@pytest.mark.parametrize("number, fits", [(1000, True), (1001, False), (2 ** 40 - 1, False), (2 ** 40, True)])
def test_address_of_a_parameter_is_no_claim_but_a_size_is(number, fits):
    """Of old files: optimizers have addresses, larger than any memory; a size would take memory."""
    content = pickle.dumps({"state": {number: {"step": 1}}, "params": [(number, 1)]}, protocol=2)
    check_pickle(content, 1000)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=f"it claims {number} of something, and has"):
        check_pickle(content, 1000, integers=False)


# ---------------------------------------------------------------------------- files of CLIP


def hugging_face(state):
    """OpenAI's tensors under Hugging Face's names."""
    tensors = {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 2), "logit_scale": torch.ones([]),
               "text_projection.weight": torch.zeros(2, 2), "text_model.embeddings.position_ids": torch.arange(5)[None],
               "vision_model.embeddings.position_ids": torch.arange(10)[None]}
    top = {"conv1.weight": "embeddings.patch_embedding.weight", "class_embedding": "embeddings.class_embedding",
           "positional_embedding": "embeddings.position_embedding.weight", "ln_pre.weight": "pre_layrnorm.weight",
           "ln_pre.bias": "pre_layrnorm.bias", "ln_post.weight": "post_layernorm.weight",
           "ln_post.bias": "post_layernorm.bias"}
    inside = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
              "mlp.c_proj": "mlp.fc2"}
    for name, value in state.items():
        name = name.removeprefix("visual.")
        if name == "proj":
            tensors["visual_projection.weight"] = value.T.contiguous()
        elif name in top:
            tensors[f"vision_model.{top[name]}"] = value
        else:
            _, _, layer, rest = name.split(".", 3)
            at, (part, _, end) = f"vision_model.encoder.layers.{layer}.", rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                for letter, third in zip("qkv", value.chunk(3)):
                    tensors[f"{at}self_attn.{letter}_proj.{rest.removeprefix('attn.in_proj_')}"] = third.clone()
            else:
                tensors[f"{at}{inside[part]}.{end}"] = value
    return tensors


def visual_state(openai):
    return {name: value for name, value in openai.state_dict().items() if name.startswith("visual.")}


VISION = {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "quick_gelu"}


def clip_folder(folder, tensors, kind="safetensors", **settings):
    """A folder of Hugging Face's CLIPModel."""
    folder.mkdir(exist_ok=True)
    settings = {"model_type": "clip", "text_config": {}, "vision_config": VISION} | settings
    (folder / "config.json").write_text(json.dumps(settings))
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; OpenAI's files stay
def test_clip_of_an_archive_equals_pytorch_modules_and_every_other_form(tmp_path, openai):
    pixels = pixels_of(PIXELS["clip"])
    example = torch.zeros(1, 3, 12, 12), IDS
    torch.jit.save(torch.jit.trace(copy.deepcopy(openai), example), tmp_path / "clip.pt")
    tower = load_tower(tmp_path / "clip.pt", 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
    expected = openai.visual((pixels / 255 - mean) / std)
    torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)
    torch.save(openai.state_dict(), tmp_path / "state.pt")
    save_file(openai.state_dict(), tmp_path / "state.safetensors")
    tensors = hugging_face(visual_state(openai))
    vision = VISION | {"model_type": "clip_vision_model"}
    others = [load_tower(tmp_path / "state.pt", 2), load_tower(tmp_path / "state.safetensors", 2),
              load_tower(clip_folder(tmp_path / "both", tensors), 2),
              load_tower(clip_folder(tmp_path / "bin", tensors, "bin"), 2),
              load_tower(clip_folder(tmp_path / "vision", tensors, **vision), 2),
              load_tower(tmp_path / "both" / "model.safetensors", 2, quick_gelu=True)]
    for other in others:
        assert same(other.state_dict(), tower.state_dict()) and other.name == tower.name
    torch.jit.save(torch.jit.trace(copy.deepcopy(openai), example).half(), tmp_path / "half.pt")  # as OpenAI's are
    half = load_tower(tmp_path / "half.pt", 2)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert F.cosine_similarity(half(pixels), expected).min() > 0.999


def test_heads_of_a_folder_are_those_of_its_settings(tmp_path, openai):
    tensors, pixels = hugging_face(visual_state(openai)), pixels_of(PIXELS["clip"])
    two = load_tower(clip_folder(tmp_path, tensors), 2)
    four = load_tower(clip_folder(tmp_path, tensors, vision_config=VISION | {"num_attention_heads": 4}), 2)
    assert two.net.layers[0].attention.heads == 2 and four.net.layers[0].attention.heads == 4
    # the tensors are the same, and settings.json must differ
    assert (two.name, four.name) == ("CLIP ViT/4@12px (2 layers of 128)", "CLIP ViT/4@12px (2 layers of 128, 4 heads)")
    assert not torch.allclose(two(pixels), four(pixels))
    line = stop_line(load_tower, clip_folder(tmp_path, tensors, vision_config={"hidden_size": 128}), 2)
    assert "hidden 128 cannot be split into 12 heads" in line  # Hugging Face's default


@pytest.mark.parametrize("settings, said", [
    ({"vision_config": VISION | {"hidden_act": "gelu"}}, "hidden_act is 'gelu', only 'quick_gelu' can be read"),
    ({"vision_config": VISION | {"layer_norm_eps": 1e-6}}, "layer_norm_eps is 1e-06"),
    ({"vision_config": None}, "has no vision_config"),
    ({"vision_config": VISION | {"num_attention_heads": "2"}}, "'2' is no value for heads"),
    ({"vision_config": VISION, "vision_config_dict": VISION | {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
    ({"model_type": "siglip"}, "model_type is 'siglip', only"),
    ({"model_type": "clip_text_model"}, "model_type is 'clip_text_model', only")])
def test_other_settings_of_a_folder_are_one_clear_line(tmp_path, openai, settings, said):
    folder = clip_folder(tmp_path / "clip", hugging_face(visual_state(openai)), **settings)
    line = stop_line(load_tower, folder, 2)
    assert said in line and line.startswith(str(folder)) and ";" in line


OPENAI, FACE = "visual.transformer.resblocks.1.", "vision_model.encoder.layers.1."


@pytest.mark.parametrize("layout, change, said", [
    (0, lambda t: t.pop(OPENAI + "ln_2.bias"), f"the tensor {OPENAI}ln_2.bias is missing"),
    (1, lambda t: t.pop(FACE + "layer_norm2.bias"), f"the tensor {FACE}layer_norm2.bias is missing"),
    (1, lambda t: t.pop(FACE + "self_attn.k_proj.weight"), f"the tensor {FACE}self_attn.k_proj.weight is missing"),
    (0, lambda t: t.pop("visual.proj"), "the tensor visual.proj is missing"),
    (1, lambda t: t.pop("visual_projection.weight"), "the tensor visual_projection.weight is missing"),
    (1, lambda t: t.pop("vision_model.pre_layrnorm.bias"), "the tensor vision_model.pre_layrnorm.bias is missing"),
    (0, lambda t: [t.pop(n) for n in list(t) if "visual.transformer" in n], "resblocks.0.mlp.c_fc.weight is missing"),
    (0, lambda t: t.update({"visual.adapter": torch.zeros(1)}), "the tensor visual.adapter is unknown in a CLIP ViT"),
    (0, lambda t: t.update({"adapter": torch.zeros(1)}), "the tensor adapter is unknown"),
    (0, lambda t: t.update({"text_model.adapter": torch.zeros(1)}), "the tensor text_model.adapter is unknown"),
    (1, lambda t: t.update({"vision_model.adapter": torch.zeros(1)}), "the tensor vision_model.adapter is unknown"),
    (1, lambda t: t.update({"transformer.adapter": torch.zeros(1)}), "the tensor transformer.adapter is unknown"),
    (0, lambda t: t.update({OPENAI + "ln_2.bias": torch.zeros(3)}), f"the shape of {OPENAI}ln_2.bias is (3,), by"),
    (1, lambda t: t.update({FACE + "self_attn.q_proj.bias": torch.zeros(384)}), "q_proj.bias is (384,), by the settings (128,"),
    (0, lambda t: t.update({"visual.proj": torch.zeros(20, 128)}), "the shape of visual.proj is (128, 20), by"),
    (0, lambda t: t.update({"visual.proj": torch.zeros(2, 2, 2)}), "those of no ViT"),
    (0, lambda t: t.update({"visual.proj": torch.zeros([])}), "those of no ViT"),
    (0, lambda t: t.update({"visual.positional_embedding": torch.zeros(12, 128)}), "positional_embedding is (12, 128), by"),
    (0, lambda t: t.update({"visual.positional_embedding": torch.zeros(1, 128)}), "grid 0: must be at least 1"),
    (0, lambda t: t.update({"visual.conv1.weight": torch.zeros(32, 3, 4, 4)}), "heads 0: must be at least 1"),
    (0, lambda t: t.update({"visual.conv1.weight": torch.zeros(96, 3, 4, 4)}), "the shape of visual.c"),
    (0, lambda t: t.update({"visual.attnpool.c_proj.weight": torch.zeros(2, 2)}), "image tower of this CLIP is a ResNet"),
])
def test_other_tensors_of_clip_are_one_clear_line(tmp_path, openai, layout, change, said):
    tensors = hugging_face(visual_state(openai)) if layout else dict(openai.state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "clip.pt")
    line = stop_line(load_tower, tmp_path / "clip.pt", 2, True)
    assert line.startswith(f"{tmp_path}/clip.pt: ") and said in line and ";" in line


def test_file_that_does_not_tell_its_activation_needs_the_users_word(tmp_path, openai):
    """open_clip's files have OpenAI's names, most of them with plain GELU; Hugging Face's tell it in config.json."""
    path = tmp_path / "clip.bin"
    for tensors in (visual_state(openai), hugging_face(visual_state(openai))):
        torch.save({f"module.{name}": value for name, value in tensors.items()}, path)
        assert f"{path}: does not tell its activation; give OpenAI's archive" in stop_line(load_tower, path, 2)
        load_tower(path, 2, quick_gelu=True)


def test_tower_of_transformers_equals_theirs(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(hidden_size=128, intermediate_size=200, num_hidden_layers=2, image_size=12,
                                           num_attention_heads=4, patch_size=4, projection_dim=20)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    for name, p in theirs.named_parameters():
        p.data = seeded(name, p.shape)
    theirs.save_pretrained(tmp_path)
    tower, pixels = load_tower(tmp_path, 2), pixels_of(PIXELS["clip"])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
    expected = theirs(pixel_values=(pixels / 255 - mean) / std).image_embeds
    torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)
