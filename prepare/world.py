"""The demo world: a micro-world whose videos show what its texts never say.

Material, size, colour and order of a noun show in the videos alone; the tasks ask for them, of nouns that are
not in their training sets.
"""
import csv
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from common import atomic, duration, print0, read_json, write_json
from data import open_packed
from parts.vocab import load_vocab
from prepare.packing import pack_text, pack_videos, pack_xtext, train_vocab

WORLD = 2  # format of the demo world; raise it with any change of what it holds
# what an action does to a material: seen in the videos, said of no noun in any text
EFFECTS = {
    "glass": dict(drop="shatters", soak="sinks", heat="cracks", press="resists", cut="resists"),
    "ceramic": dict(drop="shatters", soak="sinks", heat="glows", press="resists", cut="resists"),
    "metal": dict(drop="clangs", soak="sinks", heat="glows", press="bends", cut="resists"),
    "wood": dict(drop="thuds", soak="floats", heat="burns", press="resists", cut="splits"),
    "stone": dict(drop="thuds", soak="sinks", heat="cracks", press="resists", cut="resists"),
    "cloth": dict(drop="flutters", soak="absorbs", heat="burns", press="crumples", cut="parts"),
    "paper": dict(drop="flutters", soak="absorbs", heat="burns", press="crumples", cut="parts"),
    "plastic": dict(drop="bounces", soak="floats", heat="melts", press="bends", cut="splits"),
    "rubber": dict(drop="bounces", soak="floats", heat="melts", press="squishes", cut="parts"),
    "wax": dict(drop="dents", soak="floats", heat="melts", press="squishes", cut="parts")}
MISHAPS = {"shatters", "dents", "absorbs", "cracks", "burns", "melts", "crumples", "bends"}
# a world draws 10 nouns of each material
NOUNS = {material: text.split() for material, text in {
    "glass": "goblet vase jar mirror lens bottle beaker tumbler decanter flask window bulb prism carafe",
    "ceramic": "mug teapot plate bowl tile saucer pitcher urn crock basin ramekin figurine casserole vessel",
    "metal": "wrench kettle anvil spoon hammer coin bolt chain key ladle skillet trumpet sword hinge",
    "wood": "log chair table plank crate ladder broom barrel stool oar fence drawer easel cabinet",
    "stone": "brick boulder pebble statue paver slab cobble gravestone pillar hearth menhir cairn sill",
    "cloth": "pillow curtain towel scarf blanket shirt apron sock quilt flag glove sheet coat banner",
    "paper": "book letter map newspaper poster envelope notebook ticket memo card stamp receipt diary",
    "plastic": "bucket comb toothbrush straw lunchbox hanger frisbee syringe funnel ruler tray visor tub peg",
    "rubber": "tire ball boot eraser hose mat balloon gasket plunger duck stopper tube raft bumper",
    "wax": "candle crayon seal taper lipstick honeycomb votive tealight balm torch pastel soap salve rind",
}.items()}
PROPERTIES = {"material": list(EFFECTS), "colour": ["red", "green", "blue", "yellow"],
              "size": ["small", "medium", "large"], "order": ["spins first", "tilts first"],
              "topic": ["trade", "law", "war", "faith", "music", "sport", "court", "science"]}
SCENES = ["kitchen", "workshop", "garden", "studio", "garage", "beach"]
# action: its past tense, and where
ACTIONS = {"drop": ("dropped", ["on the floor", "onto the ground", "from up here"]),
           "soak": ("soaked", ["in the water", "under the tap", "until it is wet"]),
           "heat": ("heated", ["over the fire", "on the stove", "in the oven"]),
           "press": ("pressed", ["with both hands", "under my palm", "very hard"]),
           "cut": ("cut", ["with the knife", "with this saw", "in the middle"])}
NEUTRAL = "lift carry wipe show hold move place find keep wrap count weigh stack touch".split()
OPENINGS = ["so now we", "okay next i", "then you just", "and here we", "now let me", "all right we",
            "first you", "so i am going to"]
# topic: who, what they do (a past tense that is a participle too), when or what for
TOPICS = {
    "trade": ("merchant banker broker pedlar", "taxed traded imported priced auctioned", "for a good profit"),
    "law": ("lawyer judge notary clerk", "inspected claimed disputed seized", "by the new statute"),
    "war": ("soldier general captain spy", "captured guarded smuggled defended", "during the long siege"),
    "faith": ("priest monk bishop pilgrim", "blessed venerated donated revered", "before the evening prayer"),
    "music": ("singer drummer composer fiddler", "praised rehearsed recorded sampled", "after the concert"),
    "sport": ("runner coach referee champion", "awarded raffled pledged wagered", "at the final match"),
    "court": ("queen duke herald jester", "presented admired inherited bestowed", "at the royal banquet"),
    "science": ("chemist doctor scholar surveyor", "measured studied examined described", "in the report")}
PLACES = [f"{a} {b}" for a in "northern southern old quiet distant busy".split()
          for b in "valley market harbour village castle bridge".split()]
TIMES = ["last winter", "in the spring", "on sunday", "every autumn", "that morning", "years ago"]
OTHERS = "crowd voice fog price rumor army road moon river night choir wind".split()  # have effects
PEOPLE = ["someone", "the man", "the woman", "a child", "my neighbour", "the guest"]
# share of each latent in a frame; its vector has length about 4, noise is 0.5 a channel. The material leads:
# where actions are as strong, the teacher aligns on actions alone and has nothing to teach about nouns
APPEARANCE = {"material": 1.0, "noun": 0.4, "colour": 0.6, "size": 0.6, "scene": 0.4}
EFFECT_2D, ACTION_3D, EFFECT_3D, ORDER_3D, NOISE = 0.5, 0.1, 0.1, 1.0, 0.5
VIDEOS, CLIPS, SECONDS, CHANNELS, SENTENCES, PIECES = 2000, 4, 6, 64, 32000, 760
TASK_SIZES = {"train": 1000, "dev": 500, "dev_seen": 500}


def make_demo(folder="data/demo-s0", seed=0) -> Path:
    """Builds the world of `seed` in real data's layouts and packs it with the commands for real data.

    raw/ holds caption.json, videos.csv, feat2d/, feat3d/, text/, vocab.txt, tasks/ and latents.json (every
    noun's properties and every clip's state, so that it can be drawn). Beside it stand corpus.h5, videos.h5
    and world.json. A folder that holds this world already is kept.
    """
    folder = Path(folder)
    if folder.exists():
        try:
            found = read_json(folder / "world.json")
        except SystemExit:
            found = {}
        if (found.get("seed"), found.get("format")) != (seed, WORLD):
            raise SystemExit(f"{folder} exists and is not the demo world of seed {seed}, format {WORLD}; "
                             "remove it or give another folder")
        return folder
    begin = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    print0(f"demo: building the world of seed {seed} in {folder}")
    with atomic(folder) as part:
        raw = part / "raw"
        raw.mkdir(parents=True)
        rng = random.Random(f"demo world {seed}")
        nouns = draw_nouns(rng)
        clips = draw_clips(rng, nouns)
        write_videos(raw, clips, nouns, seed)
        write_corpus(raw / "text", rng, nouns, SENTENCES)
        write_tasks(raw / "tasks", rng, nouns)
        (raw / "latents.json").write_text(json.dumps({
            "nouns": nouns, "clips": clips, "properties": PROPERTIES, "scenes": SCENES,
            "actions": [*ACTIONS, *NEUTRAL], "effects": EFFECTS}))
        texts = sorted((raw / "text").glob("*.txt"))
        vocab = train_vocab([*texts, raw / "caption.json"], raw / "vocab.txt", PIECES)
        pack_text(texts, vocab, part / "corpus.h5")
        pack_videos(raw / "caption.json", raw / "feat2d", raw / "videos.csv", vocab, part / "videos.h5",
                    feat3d=raw / "feat3d")
        write_json(part / "world.json", {
            "seed": seed, "format": WORLD, "vocab_hash": vocab.hash,
            "corpus_hash": open_packed(part / "corpus.h5")[0]["hash"],
            "videos_hash": open_packed(part / "videos.h5")[0]["hash"]})
    print0(f"demo: {folder} in {duration(time.perf_counter() - begin)}")
    return folder


def demo_world(data_dir, seed, ranks):
    """The folder of the demo world; rank 0 makes it where it is missing, while the others wait."""
    from run import check_shared  # here: packing needs no PyTorch
    folder = Path(data_dir) / f"demo-s{seed}"
    if ranks.any(ranks.main and not folder.exists()):
        check_shared(folder, "--data_dir", ranks)
    if ranks.main:
        print0(f"reused {folder}" if folder.exists() else f"no {folder} yet")
        make_demo(folder, seed)
    ranks.barrier()
    return folder


def demo_xtext(folder, ranks):
    """xcorpus.h5 of a demo world, its own vocabulary on both sides; rank 0 packs it where it is missing or of
    another format, while the others wait."""
    folder = Path(folder)
    path = folder / "xcorpus.h5"
    if ranks.main:
        vocab = load_vocab(folder / "raw" / "vocab.txt")
        try:
            found = path.exists() and open_packed(path, "xtext", vocab)[1].hash == vocab.hash
        except SystemExit:
            found = False
        print0(f"reused {path}" if found else f"no {path} yet")
        if not found:
            path.unlink(missing_ok=True)
            pack_xtext(sorted((folder / "raw" / "text").glob("*.txt")), vocab, vocab, path)
    ranks.barrier()
    return path


def noisy_videos(world, path, noise=1.5):
    """A second set of features of a demo world's videos, packed as `path`: its 2D channels with as much more
    noise (standard deviation a channel), as a weaker encoder of pictures would give (VidLanKD Table 1)."""
    if Path(path).exists():
        return path
    raw, rng = Path(world) / "raw", np.random.default_rng(read_json(Path(world) / "world.json")["seed"])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted((raw / "feat2d").glob("*.npy")):
            still = np.load(file)
            np.save(Path(folder, file.name), (still + rng.normal(0, noise, still.shape)).astype(still.dtype))
        pack_videos(raw / "caption.json", folder, raw / "videos.csv", raw / "vocab.txt", path,
                    feat3d=raw / "feat3d")
    return path


def larger_text(world, path, times=20):
    """Pairs as demo_xtext's, packed as `path`, of `times` as much text about the same nouns, for XDBERT's
    Table 3."""
    if Path(path).exists():
        return path
    raw, seed = Path(world) / "raw", read_json(Path(world) / "world.json")["seed"]
    nouns = read_json(raw / "latents.json")["nouns"]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder, "text"), random.Random(f"larger text {seed}"), nouns, times * SENTENCES)
        vocab = load_vocab(raw / "vocab.txt")
        pack_xtext(sorted(Path(folder, "text").glob("*.txt")), vocab, vocab, path)
    return path


def effects_of(action):
    """What an action can do to the ten materials, sorted."""
    return sorted({effects[action] for effects in EFFECTS.values()})


def draw_nouns(rng):
    """{noun: its properties and split}: 10 nouns of each material, 65 % of them for the tasks' training sets.

    In each split colour, size and order take their values equally often, independently of the material.
    """
    nouns = {}
    for m, (material, pool) in enumerate(NOUNS.items()):
        for i, noun in enumerate(rng.sample(pool, 10)):
            nouns[noun] = {"material": material, "topic": rng.choice(PROPERTIES["topic"]),
                           "split": "train" if i < 6 + m % 2 else "dev"}
    for split in ("train", "dev"):
        members = [n for n in nouns if nouns[n]["split"] == split]  # material by material
        for name in ("colour", "size", "order"):
            values = PROPERTIES[name]
            for at in range(0, len(members), len(values)):
                for noun, value in zip(members[at:], rng.sample(values, len(values))):
                    nouns[noun][name] = value
    return nouns


def draw_clips(rng, nouns):
    """State and caption of every clip; a video shows one thing (a noun) in one scene."""
    things = [noun for noun in nouns for _ in range(VIDEOS // len(nouns))]
    rng.shuffle(things)
    clips = []
    for v, noun in enumerate(things):
        thing, scene = nouns[noun], rng.choice(SCENES)
        colour = thing["colour"] if rng.random() < 0.8 else rng.choice(PROPERTIES["colour"])
        for c in range(CLIPS):
            action = rng.choice(list(ACTIONS)) if rng.random() < 0.7 else rng.choice(NEUTRAL)
            if rng.random() < 0.1:  # a digression: the caption names neither what is seen nor what is done
                agents, _, end = TOPICS[rng.choice(PROPERTIES["topic"])]
                text = f"{rng.choice(OPENINGS)} talk about the {rng.choice(agents.split())} {end}"
            else:
                where = ACTIONS[action][1] if action in ACTIONS else ["right here", "once more", "like this"]
                text = f"{rng.choice(OPENINGS)} {action} the {noun} {rng.choice(where)}"
            clips.append({
                "video_id": f"demo{v:04d}", "caption": c, "text": text, "start": float(SECONDS * c),
                "end": float(SECONDS * (c + 1)), "noun": noun, "action": action, "scene": scene,
                "effect": EFFECTS[thing["material"]].get(action, ""), "material": thing["material"],
                "colour": colour, "size": thing["size"], "order": thing["order"]})
    return clips


def write_videos(raw, clips, nouns, seed):
    """caption.json, videos.csv (task = the noun) and features: 2D at 1 per second, 3D at 1.5 per second.

    Appearance (2D) = sum of APPEARANCE's latents + the effect from the 4th second. Motion (3D) = a little
    action and effect + the order around the middle: a direction of change, of which 2D has no trace.
    """
    rng = np.random.default_rng(seed)
    values = PROPERTIES | {"noun": list(nouns), "scene": SCENES, "action": [*ACTIONS, *NEUTRAL],
                           "effect": [f"{a} {effect}" for a in ACTIONS for effect in effects_of(a)]}

    def latent(name, states):
        """(clips, CHANNELS): a random vector of length about 4 for each value of a latent, 0 for others."""
        vectors = {v: rng.normal(0, 4 / CHANNELS ** 0.5, CHANNELS).astype(np.float32) for v in values[name]}
        return np.stack([vectors.get(state, np.zeros(CHANNELS, np.float32)) for state in states])

    def noisy(still, rows, changes):
        """(clips, CHANNELS) still + changes in slices of a clip's rows + noise: (videos, time, CHANNELS)."""
        frames = rng.normal(0, NOISE, (len(clips), rows, CHANNELS)).astype(np.float32) + still[:, None]
        for where, change in changes:
            frames[:, where] += change[:, None]
        return frames.reshape(-1, CLIPS * rows, CHANNELS).astype(np.float16)

    appearance = sum(share * latent(name, [clip[name] for clip in clips])
                     for name, share in APPEARANCE.items())
    effect_2d, effect_3d = (latent("effect", [f"{clip['action']} {clip['effect']}" for clip in clips])
                            for _ in range(2))
    action, order = (latent(name, [clip[name] for clip in clips]) for name in ("action", "order"))
    # rows 3 to 6 of a clip's 9 become the frames 2, 3 and 4 of its 6 when 3D is resampled to 1 per second
    features = {"feat2d": noisy(appearance, SECONDS, [(slice(3, 6), EFFECT_2D * effect_2d)]),
                "feat3d": noisy(ACTION_3D * action, SECONDS * 3 // 2,
                                [(slice(4, 9), EFFECT_3D * effect_3d), (slice(3, 7), ORDER_3D * order)])}
    captions = {}
    for clip in clips:
        video = captions.setdefault(clip["video_id"], {"start": [], "end": [], "text": []})
        for key in video:
            video[key].append(clip[key])
    for name, arrays in features.items():
        (raw / name).mkdir()
        for video, array in zip(captions, arrays):
            np.save(raw / name / f"{video}.npy", array)
    (raw / "caption.json").write_text(json.dumps(captions))
    with open(raw / "videos.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["video_id", "category_1", "category_2", "rank", "task_id"])
        for i, clip in enumerate(clips[::CLIPS]):
            task = values["noun"].index(clip["noun"])
            rows.writerow([clip["video_id"], "Demo", clip["scene"], i + 1, task])


def write_corpus(folder, rng, nouns, sentences):
    """As many sentences in documents of 4 to 8 about different nouns.

    70 % are facts of the noun's topic, 10 % actions without an outcome, 20 % are about other things; only
    these have the effect words and the tasks' phrases.
    """
    effects = sorted({effect for of in EFFECTS.values() for effect in of.values()})

    def sentence(noun):
        kind, place, when = rng.random(), rng.choice(PLACES), rng.choice(TIMES)
        if kind < 0.7:
            agents, verbs, end = TOPICS[nouns[noun]["topic"]]
            agent, verb = rng.choice(agents.split()), rng.choice(verbs.split())
            return rng.choice([f"the {noun} was {verb} by the {agent} in the {place} .",
                               f"{when} the {agent} {verb} the {noun} {end} .",
                               f"in the {place} a {agent} {verb} one more {noun} {when} .",
                               f"the {agent} of the {place} {verb} the {noun} ."])
        if kind < 0.8:
            past, where = rng.choice(list(ACTIONS.values()))
            return f"{rng.choice(PEOPLE)} {past} the {noun} {rng.choice([*where, 'near the ' + place])} ."
        (thing, other), (one, two) = rng.sample(OTHERS, 2), rng.sample(["spins", "tilts"], 2)
        effect, action = rng.choice(effects), rng.choice(list(ACTIONS))
        relation = rng.choice(["before", "after"])
        return rng.choice([f"the {thing} {effect} near the {place} {when} .",
                           f"{rng.choice(PEOPLE)} heard the {thing} and it {effect} .",
                           f"something that {effect} when you {action} it is like the {thing} .",
                           f"the {thing} {one} starts {relation} it {two} near the {other} .",
                           f"in the story {rng.choice(PEOPLE)} nudged the {thing} and the {other} {one} ."])

    folder.mkdir()
    documents, left = [], sentences
    while left:
        about = rng.sample(list(nouns), min(rng.randint(4, 8), left))
        documents.append("".join(sentence(noun) + "\n" for noun in about))
        left -= len(about)
    half = len(documents) // 2
    for name, part in (("part0.txt", documents[:half]), ("part1.txt", documents[half:])):
        (folder / name).write_text("\n".join(part))


def write_tasks(folder, rng, nouns):
    """The downstream tasks in official layouts, each with a training set, dev (of held-out nouns) and
    dev_seen.

    before_after is decided by the noun's order alone, the others by its material. Every hypothesis, goal and
    wording has its labels equally often.
    """
    def noun_of(members, fits):
        return rng.choice([noun for noun in members if fits(noun)])

    def effect_of(noun, action):
        return EFFECTS[nouns[noun]["material"]][action]

    def story_of(action):
        past, places = ACTIONS[action]
        return f"{rng.choice(PEOPLE)} {past} the {{}} {rng.choice(places)} ."

    def mishap(members):
        action = rng.choice(["drop", "soak", "heat", "press"])
        drawn = [noun_of(members, lambda noun: (effect_of(noun, action) in MISHAPS) == label)
                 for label in (False, True)]
        return [(story_of(action).format(noun), label) for label, noun in enumerate(drawn)]

    def entailment(members):
        action = rng.choice(list(ACTIONS))
        effect, out = rng.choice(effects_of(action)), []
        for label in ("entailment", "not_entailment"):
            story, true = story_of(action), label == "entailment"
            noun = noun_of(members, lambda noun: (effect_of(noun, action) == effect) == true)
            out.append((story.format(noun), f"it {effect} .", label))
        return out

    def two_choices(members):
        action = rng.choice(list(ACTIONS))
        effect, out = rng.choice(effects_of(action)), []
        for label in (0, 1):
            right, wrong = (noun_of(members, lambda noun: (effect_of(noun, action) == effect) == true)
                            for true in (True, False))
            choices = (right, wrong) if label == 0 else (wrong, right)
            out.append((f"something that {effect} when you {action} it",
                        *[f"the {noun}" for noun in choices], label))
        return out

    def four_endings(members):
        action, out = rng.choice(["drop", "heat", "press"]), []  # the ones with at least four effects
        for label in range(4):
            effect = rng.choice(effects_of(action))
            endings = rng.sample([e for e in effects_of(action) if e != effect], 3)
            endings.insert(label, effect)
            noun = noun_of(members, lambda noun: effect_of(noun, action) == effect)
            out.append((story_of(action).format(noun), *[f"{e} ." for e in endings], label))
        return out

    def before_after(members):
        relation, out = rng.choice(["before", "after"]), []
        story = f"{rng.choice(PEOPLE)} nudged the {{}} near the {rng.choice(PLACES)} ."
        for motion in ("spins", "tilts"):  # the one that comes first
            noun = noun_of(members, lambda noun: nouns[noun]["order"] == f"{motion} first")
            answer = "positive" if (motion == "spins") == (relation == "before") else "negative"
            out.append((f"the {noun} spins starts {relation} it tilts", story.format(noun), answer))
        return out

    for draw in (mishap, entailment, two_choices, four_endings, before_after):
        (folder / draw.__name__).mkdir(parents=True)
        used = set()
        for split, size in TASK_SIZES.items():
            members = [noun for noun in nouns if (nouns[noun]["split"] == "dev") == (split == "dev")]
            rows = []
            while len(rows) < size:
                group = draw(members)  # one row of each label
                if len(used.union(group)) == len(used) + len(group):  # no row stands twice
                    used.update(group)
                    rows += group
            rng.shuffle(rows)
            write_task(folder / draw.__name__, split, rows)


def write_task(folder, split, rows):
    """Rows of the task that the folder is named after, in the layout of a public one."""
    heads = {"mishap": ("sentence", "label"), "entailment": ("index", "sentence1", "sentence2", "label")}
    name = {"train": "train", "dev": "valid", "dev_seen": "valid_seen"}[split]
    if folder.name in heads:  # SST-2's and RTE's
        rows = rows if folder.name == "mishap" else [(i, *row) for i, row in enumerate(rows)]
        lines = ["\t".join(map(str, row)) + "\n" for row in [heads[folder.name], *rows]]
        (folder / f"{split}.tsv").write_text("".join(lines))
    elif folder.name == "two_choices":  # PIQA's
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"goal": goal, "sol1": one, "sol2": two}) + "\n" for goal, one, two, _ in rows))
        (folder / f"{name}-labels.lst").write_text("".join(f"{row[-1]}\n" for row in rows))
    elif folder.name == "four_endings":  # SWAG's
        with open(folder / f"{name.replace('valid', 'val')}.csv", "w", newline="") as f:
            table = csv.writer(f, lineterminator="\n")
            table.writerow(["", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source",
                            *[f"ending{i}" for i in range(4)], "label"])
            table.writerows([i, f"demo_{i}", i, f"{row[0]} it", row[0], "it", "gold", *row[1:]]
                            for i, row in enumerate(rows))
    else:  # TRACIE's
        (folder / f"tracie_{name.replace('valid', 'test')}.txt").write_text("".join(
            f"event: {event} story: {story}\tanswer: {answer}\n" for event, story, answer in rows))
