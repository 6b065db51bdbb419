"""Writes tests/frozen_towers.json: features of vision towers by an implementation that is not ours to test.

It was written from the public sources by somebody who has not seen parts/towers.py, in torch.nn.functional on a
dict of tensors, and runs in float64. Tests compare the towers with the stored numbers; they never run this file.
Layouts: torchvision's ResNet (v1.5: the stride is in the 3x3 convolution), 3D-ResNets-PyTorch's resnext.py of 2017
and resnet.py of 2020, OpenAI's CLIP, and Hugging Face's CLIPVisionModelWithProjection.

Run once, by hand, in the repository's root: python tests/make_frozen_towers.py
"""
import json
import math
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

OUT = Path(__file__).with_name("frozen_towers.json")
VALUES = 8  # stored of each row, besides its norm
# mean, std and the divisor of uint8 before them
IMAGENET = (.485, .456, .406), (.229, .224, .225), 255
CLIP = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711), 255
KINETICS_2017 = (110.6, 103.2, 96.3), (1, 1, 1), 1
KINETICS_2020 = (.4345, .4051, .3775), (.2768, .2713, .2737), 255


# ---- names and shapes

def norm_names(prefix, width, running):
    ends = ("weight", "bias", "running_mean", "running_var") if running else ("weight", "bias")
    return [(f"{prefix}.{end}", [width]) for end in ends]


def resnet_names(rank, blocks, classes, resnext=False):
    """Residual bottlenecks: inner widths 64..512 and 4 times as many out, or 128..1024 in 32 groups and 2 times."""
    names = [("conv1.weight", [64, 3] + [7] * rank), *norm_names("bn1", 64, True)]
    before = 64
    for layer, depth in enumerate(blocks):
        inner = (128 if resnext else 64) * 2 ** layer
        after = inner * (2 if resnext else 4)
        for block in range(depth):
            at = f"layer{layer + 1}.{block}"
            names += [(f"{at}.conv1.weight", [inner, before] + [1] * rank), *norm_names(f"{at}.bn1", inner, True)]
            grouped = inner // 32 if resnext else inner
            names += [(f"{at}.conv2.weight", [inner, grouped] + [3] * rank), *norm_names(f"{at}.bn2", inner, True)]
            names += [(f"{at}.conv3.weight", [after, inner] + [1] * rank), *norm_names(f"{at}.bn3", after, True)]
            if block == 0:  # the widths differ, in layers 2-4 the strides as well: shortcut B
                names += [(f"{at}.downsample.0.weight", [after, before] + [1] * rank),
                          *norm_names(f"{at}.downsample.1", after, True)]
            before = after
    return names + [("fc.weight", [classes, before]), ("fc.bias", [classes])]


def linear_names(prefix, out, width):
    return [(f"{prefix}.weight", [out, width]), (f"{prefix}.bias", [out])]


def openai_names(width, layers, out, patch=32, size=224):
    names = [("visual.class_embedding", [width]),
             ("visual.positional_embedding", [(size // patch) ** 2 + 1, width]), ("visual.proj", [width, out]),
             ("visual.conv1.weight", [width, 3, patch, patch]), *norm_names("visual.ln_pre", width, False)]
    for layer in range(layers):
        at = f"visual.transformer.resblocks.{layer}"
        names += [(f"{at}.attn.in_proj_weight", [3 * width, width]), (f"{at}.attn.in_proj_bias", [3 * width]),
                  *linear_names(f"{at}.attn.out_proj", width, width), *norm_names(f"{at}.ln_1", width, False),
                  *linear_names(f"{at}.mlp.c_fc", 4 * width, width),
                  *linear_names(f"{at}.mlp.c_proj", width, 4 * width), *norm_names(f"{at}.ln_2", width, False)]
    return names + norm_names("visual.ln_post", width, False)


def huggingface_names(width, layers, out, patch=32, size=224):
    names = [("vision_model.embeddings.class_embedding", [width]),
             ("vision_model.embeddings.patch_embedding.weight", [width, 3, patch, patch]),
             ("vision_model.embeddings.position_embedding.weight", [(size // patch) ** 2 + 1, width]),
             *norm_names("vision_model.pre_layrnorm", width, False)]
    for layer in range(layers):
        at = f"vision_model.encoder.layers.{layer}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            names += linear_names(f"{at}.self_attn.{part}", width, width)
        names += [*norm_names(f"{at}.layer_norm1", width, False), *linear_names(f"{at}.mlp.fc1", 4 * width, width),
                  *linear_names(f"{at}.mlp.fc2", width, 4 * width), *norm_names(f"{at}.layer_norm2", width, False)]
    return names + [*norm_names("vision_model.post_layernorm", width, False),
                    ("visual_projection.weight", [out, width])]


# ---- seeded values

def seeded(name, shape):
    """float32, a function of the name and the shape alone."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("running_var"):
        return 1 + 0.1 * x.abs()
    if name.endswith("running_mean"):
        return 0.1 * x
    if len(shape) == 1:
        return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
    return x / math.sqrt(math.prod(shape[1:]))


def seeded_pixels(shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def normalised(pixels, mean, std, divisor):
    """(pixels / divisor - mean) / std in float64; channels are axis 1."""
    shape = [1, 3] + [1] * (pixels.dim() - 2)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(shape) for values in (mean, std))
    return (pixels.double() / divisor - mean) / std


# ---- forward; every tensor is taken out of the dict once, so that what is left was never used

def batch_norm(x, t, at):
    """(x - mean) / sqrt(var + 1e-5) * weight + bias, with the stored statistics."""
    weight, bias = t.pop(f"{at}.weight"), t.pop(f"{at}.bias")
    return F.batch_norm(x, t.pop(f"{at}.running_mean"), t.pop(f"{at}.running_var"), weight, bias, eps=1e-5)


def resnet(x, t, blocks, groups=1):
    """Mean over the whole map (and time) before fc: (n, 2048)."""
    rank = x.dim() - 2
    conv, max_pool = (F.conv2d, F.max_pool2d) if rank == 2 else (F.conv3d, F.max_pool3d)
    stride = (2, 2) if rank == 2 else (1, 2, 2)  # time keeps its 16 frames in the first convolution
    x = F.relu(batch_norm(conv(x, t.pop("conv1.weight"), stride=stride, padding=3), t, "bn1"))
    x = max_pool(x, 3, stride=2, padding=1)
    for layer, depth in enumerate(blocks):
        for block in range(depth):
            at = f"layer{layer + 1}.{block}"
            stride = 2 if layer > 0 and block == 0 else 1
            y = F.relu(batch_norm(conv(x, t.pop(f"{at}.conv1.weight")), t, f"{at}.bn1"))
            y = conv(y, t.pop(f"{at}.conv2.weight"), stride=stride, padding=1, groups=groups)
            y = F.relu(batch_norm(y, t, f"{at}.bn2"))
            y = batch_norm(conv(y, t.pop(f"{at}.conv3.weight")), t, f"{at}.bn3")
            if block == 0:
                x = conv(x, t.pop(f"{at}.downsample.0.weight"), stride=stride)
                x = batch_norm(x, t, f"{at}.downsample.1")
            x = F.relu(x + y)
    return x.flatten(2).mean(2)


def layer_norm(x, t, at):
    return F.layer_norm(x, x.shape[-1:], t.pop(f"{at}.weight"), t.pop(f"{at}.bias"), eps=1e-5)


def linear(x, t, at):
    return F.linear(x, t.pop(f"{at}.weight"), t.pop(f"{at}.bias"))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def attend(q, k, v, heads):
    """softmax(q k^T / sqrt(D)) v for each head, no mask: (n, T, C)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (n, H, T, D)
    weights = F.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=3)
    return (weights @ v).transpose(1, 2).flatten(2)


def openai_clip(x, t, layers, heads):
    """The class token after the last layer, normalised and projected: (n, out)."""
    kernel = t.pop("visual.conv1.weight")
    x = F.conv2d(x, kernel, stride=kernel.shape[2]).flatten(2).transpose(1, 2)  # (n, patches, C)
    token = t.pop("visual.class_embedding").expand(len(x), 1, -1)
    x = torch.cat((token, x), dim=1) + t.pop("visual.positional_embedding")
    x = layer_norm(x, t, "visual.ln_pre")
    for layer in range(layers):
        at = f"visual.transformer.resblocks.{layer}"
        y = layer_norm(x, t, f"{at}.ln_1")
        y = F.linear(y, t.pop(f"{at}.attn.in_proj_weight"), t.pop(f"{at}.attn.in_proj_bias"))
        x = x + linear(attend(*y.chunk(3, dim=2), heads), t, f"{at}.attn.out_proj")  # q, k, v in this order
        y = quick_gelu(linear(layer_norm(x, t, f"{at}.ln_2"), t, f"{at}.mlp.c_fc"))
        x = x + linear(y, t, f"{at}.mlp.c_proj")
    return layer_norm(x[:, 0], t, "visual.ln_post") @ t.pop("visual.proj")


def huggingface_clip(x, t, layers, heads):
    """The same network under Hugging Face's names: (n, out)."""
    kernel = t.pop("vision_model.embeddings.patch_embedding.weight")
    x = F.conv2d(x, kernel, stride=kernel.shape[2]).flatten(2).transpose(1, 2)  # (n, patches, C)
    token = t.pop("vision_model.embeddings.class_embedding").expand(len(x), 1, -1)
    x = torch.cat((token, x), dim=1) + t.pop("vision_model.embeddings.position_embedding.weight")
    x = layer_norm(x, t, "vision_model.pre_layrnorm")  # spelled so in the files
    for layer in range(layers):
        at = f"vision_model.encoder.layers.{layer}"
        y = layer_norm(x, t, f"{at}.layer_norm1")
        q, k, v = (linear(y, t, f"{at}.self_attn.{part}_proj") for part in "qkv")
        x = x + linear(attend(q, k, v, heads), t, f"{at}.self_attn.out_proj")
        y = quick_gelu(linear(layer_norm(x, t, f"{at}.layer_norm2"), t, f"{at}.mlp.fc1"))
        x = x + linear(y, t, f"{at}.mlp.fc2")
    return F.linear(layer_norm(x[:, 0], t, "vision_model.post_layernorm"), t.pop("visual_projection.weight"))


# ---- the file

def cases():
    """(case, layout, names, shape of the pixels, their normalisation, forward of (x, tensors))."""
    kinetics = "3D-ResNets-PyTorch"
    return [
        ("resnet2d", "torchvision", resnet_names(2, (1, 2, 1, 1), 1000), (2, 3, 64, 96), IMAGENET,
         lambda x, t: resnet(x, t, (1, 2, 1, 1))),
        ("resnext3d", f"{kinetics} 2017", resnet_names(3, (1, 1, 1, 1), 400, resnext=True), (2, 3, 16, 56, 56),
         KINETICS_2017, lambda x, t: resnet(x, t, (1, 1, 1, 1), groups=32)),
        ("resnet3d", f"{kinetics} 2020", resnet_names(3, (1, 1, 1, 1), 700), (2, 3, 16, 56, 56),
         KINETICS_2020, lambda x, t: resnet(x, t, (1, 1, 1, 1))),
        ("clip_openai", "openai", openai_names(128, 2, 64), (2, 3, 224, 224), CLIP,
         lambda x, t: openai_clip(x, t, 2, heads=2)),
        ("clip_hf", "huggingface", huggingface_names(128, 2, 64), (2, 3, 224, 224), CLIP,
         lambda x, t: huggingface_clip(x, t, 2, heads=2))]


def counts():
    """Weights and biases of the true nets, without running statistics and fc."""
    nets = {"ResNet-152": resnet_names(2, (3, 8, 36, 3), 1000),
            "ResNeXt3D-101": resnet_names(3, (3, 4, 23, 3), 400, resnext=True),
            "ResNeXt3D-152": resnet_names(3, (3, 8, 36, 3), 400, resnext=True),
            "CLIP ViT-B/32": openai_names(768, 12, 512),
            "CLIP ViT-B/32 (Hugging Face)": huggingface_names(768, 12, 512)}
    return {net: sum(math.prod(shape) for name, shape in names
                     if ".running_" not in name and not name.startswith("fc.")) for net, names in nets.items()}


def short(values):
    """Ten significant digits: far below float32's own."""
    return [float(f"{value:.10g}") for value in values.tolist()]


def main():
    rows = []
    for case, layout, names, shape, normalisation, forward in cases():
        tensors = {name: seeded(name, shape).double() for name, shape in names}
        output = forward(normalised(seeded_pixels(shape), *normalisation), tensors)
        assert set(tensors) <= {"fc.weight", "fc.bias"}, f"{case}: never used: {sorted(tensors)}"
        rows.append({"case": case, "layout": layout, "tensors": names, "pixels": shape,
                     "output": [short(row[:VALUES]) for row in output], "norm": short(output.norm(dim=1))})
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    OUT.write_text(f'{{"cases": [\n{lines}\n],\n"counts": {json.dumps(counts())}}}\n')
    print(f"{OUT}: {len(rows)} cases, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
