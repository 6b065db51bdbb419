"""Towers: networks of others that turn pictures and clips of a video into features, and their files.

ResNet      2D, He et al. 2016, torchvision's; 3D, and 3D ResNeXt, Hara et al. 2018 (kenshohara's code)
CLIPImage   the ViT of CLIP's image tower, Radford et al. 2021; OpenAI's file or a Hugging Face folder

Which network it is, and all its sizes, follow from names and shapes of the tensors. Reading is strict as in
parts/weights.py: only what the tables name is left out. Towers come in float32 and eval mode, no gradients.

Shapes: n pictures or clips, H and W pixels, T frames, C channels. Rank 2 = of pictures, 3 = of clips.
"""
import dataclasses
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import read_json
from model import CLIPLayer
from parts.weights import (AGAIN, CLIP_NAMES, CLIP_SETTINGS, LAYERS, fill, hollow, make_config, our_values,
                           read_folder, read_openai, tensor_names)

FLAGS = {2: "--weights2d", 3: "--weights3d"}  # of features.py
CHOICE = {2: "torchvision's ResNet-152, OpenAI's CLIP ViT-B/32 or a Hugging Face folder of it",
          3: "the ResNeXt-101 or a ResNet of kenshohara/3D-ResNets-PyTorch"}

# (scale, mean, std) of the three colours, see Tower
IMAGENET = 255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_PIXELS = 255.0, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# kenshohara's: the ResNeXt of 2017 reads pixels of 0 to 255 (the mean is that of HowTo100M's extractor),
# plain ResNets those of 0 to 1, as trained in 2020 (r3d*.pth). Plain ones of 2017 have the same names and
# shapes and would be given the wrong ones: a tower's name says which it is given.
KINETICS_2017 = 1.0, (110.6, 103.2, 96.3), (1.0, 1.0, 1.0)
KINETICS_2020 = 255.0, (0.4345, 0.4051, 0.3775), (0.2768, 0.2713, 0.2737)

# ---------------------------------------------------------------------------- residual networks

CONV, MAX_POOL = {2: nn.Conv2d, 3: nn.Conv3d}, {2: F.max_pool2d, 3: F.max_pool3d}


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a residual network of bottlenecks, by default ResNet-152's."""
    kernel: tuple = (7, 7)  # of the first convolution; a third number, in front, is of time
    blocks: tuple = (3, 8, 36, 3)  # in each of the four layers
    stem: int = 64  # channels behind the first convolution
    inner: int = 64  # channels inside a block of the first layer; each layer has twice those before
    outer: int = 256  # and behind it
    groups: int = 1  # of the middle convolution: above 1 a ResNeXt, this is its cardinality


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by the stored mean and variance, over the channels of (n, C, ...)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 pixels (and frames), each normalised, added to the input; ReLU.

    The stride is that of the middle one, as in torchvision and kenshohara's code. Where the shape changes,
    the input is mapped by a convolution of 1 (shortcut B).
    """

    def __init__(self, rank, channels, inner, outer, groups, stride):
        super().__init__()
        conv = CONV[rank]
        self.conv1, self.bn1 = conv(channels, inner, 1, bias=False), FrozenBatchNorm(inner)
        self.conv2 = conv(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = FrozenBatchNorm(inner)
        self.conv3, self.bn3 = conv(inner, outer, 1, bias=False), FrozenBatchNorm(outer)
        self.downsample = nn.Identity()
        if stride > 1 or channels != outer:
            self.downsample = nn.Sequential(conv(channels, outer, 1, stride, bias=False),
                                            FrozenBatchNorm(outer))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


class ResNet(nn.Module):
    """Residual network without its classifier: (n, 3, [T,] H, W) -> (n, 8 outer), the mean over the map.

    Parameters: ResNet-152 58,143,808; ResNeXt3D-101 of cardinality 32 47,521,216; -152 65,359,296. Names are
    those of the files. The first convolution halves height and width, the pool behind it time, too.
    """

    def __init__(self, config):
        super().__init__()
        rank, channels = len(config.kernel), config.stem
        self.rank, self.width = rank, 8 * config.outer
        stride = (1, 2, 2)[-rank:]  # all frames of a clip are kept
        self.conv1 = CONV[rank](3, channels, config.kernel, stride,
                                tuple(size // 2 for size in config.kernel), bias=False)
        self.bn1 = FrozenBatchNorm(channels)
        for layer, blocks in enumerate(config.blocks):
            inner, outer = config.inner << layer, config.outer << layer
            stack = nn.Sequential()
            for block in range(blocks):
                stride = 2 if layer and not block else 1
                stack.append(Bottleneck(rank, channels, inner, outer, config.groups, stride))
                channels = outer
            self.add_module(f"layer{layer + 1}", stack)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = MAX_POOL[self.rank](x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (n, C, [T / 16,] H / 32, W / 32)
        return x.flatten(2).mean(2, dtype=torch.float32)


# ---------------------------------------------------------------------------- CLIP's image tower


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of CLIP's image tower, by default ViT-B/32's."""
    patch: int = 32  # pixels of a side
    grid: int = 7  # patches of a side
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    projection: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} {getattr(self, field.name)}: must be at least 1")
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} cannot be split into {self.heads} heads")


class CLIPImage(nn.Module):
    """Pictures (n, 3, S, S), S = grid * patch -> (n, P) in the space that texts and images share.

    The picture's patches are mapped linearly, a class token stands before them; the layers are those of the
    text tower without a mask; the feature is the class token's state, normalised and projected. ViT-B/32:
    87,849,216 parameters.
    """

    def __init__(self, config):
        super().__init__()
        C = config.hidden
        self.rank, self.width = 2, config.projection
        self.patches = nn.Conv2d(3, C, config.patch, config.patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(C))
        self.position = nn.Parameter(torch.empty(1 + config.grid ** 2, C))
        self.first_norm = nn.LayerNorm(C)
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(C)
        self.project = nn.Linear(C, config.projection, bias=False)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)  # (n, grid^2, C)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        x = self.first_norm(x + self.position)
        for layer in self.layers:
            x = layer(x)
        return self.project(self.norm(x[:, 0]))


# ---------------------------------------------------------------------------- pixels -> features


class Tower(nn.Module):
    """uint8 (n, 3, H, W), of rank 3 (n, 3, 16, H, W) -> float32 (n, width), not normalised to length 1.

    Inside, x = (pixels / scale - mean) / std. Before it, the short side of a picture comes to `size` pixels
    (resize: by "ffmpeg"'s scale filter, or as "pillow" does), then the middle is cut out (crop: "center") or
    the whole kept ("none").
    """

    def __init__(self, net, name, size, crop, resize, pixels):
        super().__init__()
        self.net, self.name, self.size, self.crop, self.resize = net, name, size, crop, resize
        self.rank, self.width = net.rank, net.width
        self.scale, self.mean, self.std = pixels

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8, f"pixels of {pixels.dtype}, not uint8"
        mean, std = (torch.tensor(values, device=pixels.device).view(3, *[1] * self.rank)
                     for values in (self.mean, self.std))
        return self.net(pixels.float().div_(self.scale).sub_(mean).div_(std)).float()


# ---------------------------------------------------------------------------- reading

# our tensor of CLIPImage: OpenAI's, Hugging Face's; see parts.weights.tensor_names
VIT_NAMES = {
    "patches.weight": ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    "class_token": ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    "position": ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    "first_norm.*": ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # spelled so
    "norm.*": ("visual.ln_post.*", "vision_model.post_layernorm.*"),
    "project.weight": ("visual.proj", "visual_projection.weight"),
}
PREFIXES = ("visual.", "vision_model.")
VIT_NAMES |= {ours: tuple(" ".join(prefix + name for name in names.split())
                          for prefix, names in zip(PREFIXES, theirs))
              for ours, theirs in CLIP_NAMES.items() if "#" in ours}
# no part of the tower: the classifier and counters of training; CLIP's text tower, constants and a buffer
RESNET_IGNORED = re.compile(r"fc\..+|.+\.num_batches_tracked")
VIT_IGNORED = (re.compile(r"(transformer|token_embedding|ln_final)\..+|positional_embedding|"
                          r"text_projection|logit_scale|input_resolution|context_length|vocab_size"),
               re.compile(r"text_model\..+|text_projection\.weight|logit_scale|"
                          r"vision_model\.embeddings\.position_ids"))


def load_tower(path, rank, quick_gelu=False):
    """The Tower in a file or a Hugging Face folder; SystemExit where there is none, or one of another rank.

    path: state dict of torchvision or kenshohara, also as "state_dict" of a checkpoint and with `module.`
    before its names; OpenAI's CLIP, TorchScript archive or state dict; a folder, or its file, of Hugging
    Face's CLIPModel or CLIPVisionModelWithProjection. quick_gelu: the user's word for a file of CLIP's that
    does not tell its activation, as in parts.weights.load_clip.
    """
    path, heads = Path(path), None
    if path.is_dir():
        heads = vision_heads(path / "config.json")
        path, tensors = read_folder(path)
    else:
        tensors = without_prefix(read_openai(path), path)
        clip = any(name.startswith(PREFIXES) for name in tensors)
        if clip and not quick_gelu and "input_resolution" not in tensors:
            raise SystemExit(f"{path}: does not tell its activation; give OpenAI's archive or Hugging Face's "
                             "folder, or --quick_gelu where it is OpenAI's or one of open_clip's whose name "
                             "ends in quickgelu; others cannot be read")
    return build_tower(tensors, path, rank, heads)


def without_prefix(tensors, path):
    """{name: tensor} without the `module.` that nn.DataParallel puts before names."""
    plain = {}
    for stored, tensor in tensors.items():
        name = re.sub(r"^(module\.)+", "", stored)
        if name in plain:
            raise SystemExit(f"{path}: the tensor {stored} is there twice; {AGAIN}")
        plain[name] = tensor
    return plain


def vision_heads(path):
    """Attention heads of CLIP's image tower by the config.json at `path`; SystemExit where it is another."""
    settings = read_json(path, AGAIN)
    if settings.get("model_type") == "clip":  # both towers
        settings = settings.get("vision_config_dict") or settings.get("vision_config")  # the first wins
        if not isinstance(settings, dict):
            raise SystemExit(f"{path}: has no vision_config; choose another model")
        settings = settings | {"model_type": "clip_vision_model"}
    our_values(settings, path, ("clip", "clip_vision_model"), {}, CLIP_SETTINGS)
    return settings.get("num_attention_heads", ViTConfig.heads)


def build_tower(tensors, path, rank, heads=None):
    """The Tower of the {name: tensor} in `path`; heads: of CLIP's attention, None = one for 64 channels."""
    if "conv1.weight" in tensors:
        tower, names, ignored = resnet_tower(tensors, path)
    elif any(name.startswith(PREFIXES) for name in tensors):
        if "visual.proj" in tensors:  # ours is the weight of a linear map
            tensors = tensors | {"visual.proj": tensors["visual.proj"].transpose(0, -1)}
        tower, names, ignored = clip_tower(tensors, path, heads)
    else:
        raise SystemExit(f"{path}: holds no tower under known names; {FLAGS[rank]} takes {CHOICE[rank]}")
    if tower.rank != rank:
        raise SystemExit(f"{FLAGS[rank]} {path}: is a {tower.name}, give it as {FLAGS[tower.rank]}; "
                         f"{FLAGS[rank]} takes {CHOICE[rank]}")
    known = {name for parts in names.values() for name in parts}
    for name in tensors:
        if name not in known and not ignored.fullmatch(name):
            raise SystemExit(f"{path}: the tensor {name} is unknown in a {tower.name}; {FLAGS[rank]} takes "
                             f"{CHOICE[rank]}")
    fill(tower.net, names, tensors, path)
    return tower.eval().requires_grad_(False)


def resnet_tower(tensors, path):
    """(hollow Tower, {our tensor: theirs, a tuple}, the ignored) of a residual network."""
    blocks = tuple(len({name.split(".")[1] for name in tensors if name.startswith(f"layer{layer}.")})
                   for layer in range(1, 5))
    try:
        stem, _, *kernel = tensors["conv1.weight"].shape
        inner, part, *_ = tensors["layer1.0.conv2.weight"].shape
        outer, *_ = tensors["layer1.0.conv3.weight"].shape
        groups, rest = divmod(inner, part)
        if (rest or len(kernel) not in CONV or not 0 < min(blocks) <= max(blocks) <= LAYERS
                or min(stem, groups, outer, *kernel) < 1 or groups == 1 and outer != 4 * inner):
            raise ValueError
    except (KeyError, ValueError, ZeroDivisionError):
        raise SystemExit(f"{path}: its blocks are not the bottlenecks of a ResNet or ResNeXt (ResNet-18, -34 "
                         "and wide ones have others); choose one of 50 layers or more") from None
    net = hollow(ResNet, ResNetConfig(tuple(kernel), blocks, stem, inner, outer, groups))
    facts = [f"cardinality {groups}"] * (groups > 1)
    size, crop, pixels = 224, "none", IMAGENET
    if net.rank == 3:
        size, crop, pixels = 112, "center", KINETICS_2017 if groups > 1 else KINETICS_2020
        facts += ["shortcut B", "pixels as in 2017: 0 to 255" if groups > 1 else "pixels as in 2020: 0 to 1"]
    name = f"{'ResNeXt' if groups > 1 else 'ResNet'}{'3D' * (net.rank == 3)}-{3 * sum(blocks) + 2}"
    name += f" ({', '.join(facts)})" if facts else ""
    tower = Tower(net, name, size, crop, "ffmpeg", pixels)
    return tower, {ours: (ours,) for ours in net.state_dict()}, RESNET_IGNORED


def clip_tower(tensors, path, heads):
    """(hollow Tower, {our tensor: theirs, a tuple}, the ignored) of CLIP's image tower, a ViT."""
    if any(name.startswith("visual.attnpool.") for name in tensors):
        raise SystemExit(f"{path}: the image tower of this CLIP is a ResNet; only a ViT can be read, such as "
                         "that of ViT-B/32")
    layout = int(not any(name.startswith(PREFIXES[0]) for name in tensors))
    table = {ours: theirs[layout] for ours, theirs in VIT_NAMES.items()}
    layers = len({name.split(".")[3] for name in tensors
                  if name.startswith(table["layers.#.expand.*"].partition("#")[0])})
    names = tensor_names(table, max(1, layers))
    parts = [names[ours][0] for ours in ("patches.weight", "position", "layers.0.expand.weight",
                                         "project.weight")]
    for part in parts:
        if part not in tensors:
            raise SystemExit(f"{path}: the tensor {part} is missing; {AGAIN}")
    try:
        (hidden, _, patch, _), (positions, _), (intermediate, _), (projection, _) = (
            tensors[part].shape for part in parts)
    except ValueError:
        raise SystemExit(f"{path}: the shapes of {', '.join(parts)} are those of no ViT; {AGAIN}") from None
    grid = math.isqrt(max(0, positions - 1))
    sizes = dict(patch=patch, grid=grid, layers=layers, hidden=hidden, heads=heads or hidden // 64,
                 intermediate=intermediate, projection=projection)
    config = make_config(sizes, path, ViTConfig)
    size = patch * grid
    letter = {(12, 768): "-B", (24, 1024): "-L"}.get((layers, hidden), "")
    facts = [f"{layers} layers of {hidden}"] * (not letter)
    facts += [f"{config.heads} heads"] * (config.heads != hidden // 64)
    name = f"CLIP ViT{letter}/{patch}" + f"@{size}px" * (size != 224)
    name += f" ({', '.join(facts)})" if facts else ""
    tower = Tower(hollow(CLIPImage, config), name, size, "center", "pillow", CLIP_PIXELS)
    return tower, names, VIT_IGNORED[layout]
