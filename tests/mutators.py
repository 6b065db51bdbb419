"""Damage for files: what tests/fuzz.py does to the bytes of a valid one, by its format.

A mutator takes (rng, bytes) and returns bytes; MUTATORS has those of each suffix. They know the inside of
JSON, tables, zip records, pickles, HDF5, safetensors, .npy and gzip, so that much of what they make is still
valid outside. What they cannot read they raise at, and the caller takes bytes_of instead.
"""
import copy
import csv
import gzip
import io
import json
import pickletools
import re
import struct
import zipfile

import h5py
import numpy as np

PLANTED = "/nonexistent"  # a file that hostile pickles would make; tests/fuzz.py sets it
TEXTS = ("", " ", "\0", "\x1b[2J", "\u2028", "\ufeff", "é", "\U0001f600", "\ud800", "x" * 200_000, "a\tb",
         '"', '"a', "\r",
         "a\nb", "nan", "-1", "1e400", "9" * 5000, "\x85", "[SEP]", "##", "-", "../../etc/passwd", "%s{0}",
         "</w>")
NUMBERS = (0, -1, 1, 2, 255, 2 ** 31, 2 ** 32 - 1, 2 ** 53 + 1, 2 ** 63, -2 ** 63, 1e308, 0.5, -1e-9,
           float("nan"), float("inf"))
# texts that become this raw JSON
RAW = {"@deep": "[" * 100_000 + "]" * 100_000, "@keys": '{"a":' * 50_000 + "1" + "}" * 50_000,
       "@digits": "9" * 5000,
       "@open": "[" * 100_000, "@huge": "1e999", "@half": r'"\ud800"', "@nul": r'"\u0000"',
       "@double": '{"a":1,"a":2}',
       "@wide": "[" + "0," * 100_000 + "0]", "@some": "[" * 900 + "]" * 900, "@more": '{"a":[' * 2000
       + "]}" * 2000,
       "@within": '{"a":[' * 45 + "]}" * 45}
# what may stand in the place of any file; None = a hostile pickle
OTHERS = (None, b"", b" ", b"\0" * 999, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
          b"PK\3\4",
          b"null", b"[]", b"3", b"<!DOCTYPE html>", b"\x89HDF\r\n\x1a\n")
VALUES = (*TEXTS, *NUMBERS, *RAW, None, True, False, [], {}, [[]], [None], {"": None}, [0, 1], ["a"])


# ---------------------------------------------------------------------------- bytes and lines


def bytes_of(rng, data):
    """Flips, cuts, doubles, splices, zeros and large numbers at random places."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        a = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 64, 1024))
        b = min(len(data), a + size)
        kind = rng.randrange(9)
        if kind < 3 and a < len(data):
            data[a] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del data[a:b]
        elif kind == 4:
            data[a:a] = data[a:b] * rng.choice((1, 1, 3, 50))
        elif kind == 5:
            c = rng.randrange(len(data) + 1)
            data[a:b] = data[c:c + size]
        elif kind == 6:
            data[a:b] = bytes(b - a)
        elif kind == 7:
            data[a:b] = struct.pack("<q", rng.choice((-1, 2 ** 31, 2 ** 40, 2 ** 62)))[:b - a]
        elif rng.random() < 0.3:
            del data[a:]
    return bytes(data)


def lines_of(rng, data):
    """Lines of a text that go, come twice, change places, or hold what no line should."""
    lines = data.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, kind = rng.randrange(len(lines)), rng.randrange(8)
        if kind == 0 and len(lines) > 1:
            del lines[i]
        elif kind == 1:
            lines[i:i] = [lines[i]] * min(rng.choice((1, 2, 300)), 1 + (1 << 22) // (len(lines[i]) + 1))
        elif kind == 2:
            j = rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
        elif kind < 6:
            at = rng.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + rng.choice(TEXTS) + lines[i][at + rng.choice((0, 0, 1, 5)):]
        else:
            lines[i] = rng.choice((*TEXTS, '<doc id="1">', "</doc>", " = Title = ", "{", '{"text": 1}'))
    text = rng.choice(("\n", "\n", "\n", "\n", "\r\n", "\r")).join(lines)
    code = rng.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin1"))
    return text.encode(code, "surrogatepass" if code != "latin1" else "replace")


def rows_of(rng, data):
    """Fields of a table that are missing, too many, quoted, empty, very long or no text."""
    text = data.decode()
    comma = "\t" if "\t" in text.split("\n")[0] else ","
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=comma,
                           quoting=csv.QUOTE_NONE if comma == "\t" else csv.QUOTE_MINIMAL))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        row = rng.choice(rows)
        i, kind = rng.randrange(len(row)) if row else 0, rng.randrange(8)
        if kind < 4 and row:
            row[i] = rng.choice((*TEXTS, *map(str, NUMBERS), row[i] + rng.choice(TEXTS)))
        elif kind == 4 and row:
            del row[i]
        elif kind == 5:
            row.insert(i, rng.choice(TEXTS))
        elif kind == 6:
            for row in rows:
                del row[i:i + 1]
        else:
            rows.insert(rng.randrange(len(rows) + 1), row[:rng.randrange(len(row) + 1)])
    quote = '"' if comma == "," and rng.random() < 0.7 else ""
    quoted = [[quote + field.replace('"', '""') + quote if quote else field for field in row] for row in rows]
    return "".join(comma.join(row) + "\n" for row in quoted).encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------- JSON


def places(value):
    """[(container, key)] of all that a parsed JSON holds."""
    found, stack = [], [value]
    while stack:
        here = stack.pop()
        for key in here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ():
            found.append((here, key))
            stack.append(here[key])
    return found


def json_of(rng, data):
    """A tree with values of other types, keys that go or are new, deep nesting, huge numbers, half pairs."""
    root = [json.loads(data)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = places(root)
        where, key = rng.choice(found if rng.random() < 0.6 else found[:8])
        kind = rng.randrange(8)
        if kind < 4:
            where[key] = copy.deepcopy(rng.choice(VALUES))  # a tree, not a ring
        elif kind == 4 and where is not root:
            del where[key]
        elif kind == 5:
            other, name = rng.choice(found)
            where[key] = json.loads(json.dumps(other[name]))
        elif kind == 6:
            where[key] = rng.choice(([where[key]], {"a": where[key]}, [where[key]] * 2))
        elif isinstance(where[key], (int, float)):
            where[key] = rng.choice((where[key] + 1, -where[key], where[key] * 1e9, str(where[key]),
                                     bool(where[key])))
        elif isinstance(where[key], str):
            where[key] += rng.choice(TEXTS)
        else:
            where[key] = type(where[key])() if where[key] is not None else 0
    text = json.dumps(root[0], ensure_ascii=rng.random() < 0.8)
    text = re.sub('"(@[a-z]+)"', lambda match: RAW.get(match[1], match[0]), text)
    return text.encode("utf-8", "surrogatepass")


def json_lines_of(rng, data):
    """The same in some of the lines."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 3))):
        i = rng.randrange(len(lines) - 1)
        lines[i] = json_of(rng, lines[i])
    return b"\n".join(lines)


# ---------------------------------------------------------------------------- zip and pickle


def hostile(rng):
    """Opcodes that would make the file PLANTED."""
    name = rng.choice(("posix\nsystem", "os\nsystem", "builtins\nexec", "__builtin__\neval",
                       "subprocess\ncall"))
    text = f"open({PLANTED!r}, 'w')" if "builtin" in name else f"touch {PLANTED}"
    return b"c" + name.encode() + b"\n(X" + struct.pack("<I", len(text)) + text.encode() + b"tR0"


GLOBALS = ("torch\nload", "torch\nempty", "torch._utils\n_rebuild_tensor_v2",
           "torch._utils\n_rebuild_parameter",
           "collections\nOrderedDict", "torch\nFloatStorage", "torch\nQInt8Storage", "torch\nSize",
           "torch._utils\n_rebuild_sparse_tensor",
           "numpy\nndarray", "builtins\nbytearray", "torch\nfloat32", "torch._tensor\n_rebuild_from_type_v2",
           "__torch__\nX")


def pickle_of(rng, data):
    """Opcodes with other arguments (memo, sizes, strides, names), missing, doubled, new or hostile ones."""
    parts, rest = [], data
    while rest:  # PyTorch's older files hold several pickles
        try:
            starts = [at for _, _, at in pickletools.genops(rest)]
        except Exception:
            break
        parts += [rest[a:b] for a, b in zip(starts, [*starts[1:], starts[-1] + 1])]
        rest = rest[starts[-1] + 1:]
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, kind = rng.randrange(len(parts)), rng.randrange(8)
        code, number = parts[i][:1], rng.choice((0, 1, 2, 255, 10 ** 6, 2 ** 28, 2 ** 31 - 1, -1))
        if kind == 0:
            parts[i:i] = [hostile(rng)]
        elif kind == 1:
            del parts[i:i + rng.choice((1, 1, 2, 5))]
            parts = parts or [b"."]
        elif kind == 2:
            parts[i:i] = parts[i:i + rng.choice((1, 2, 20))]
        elif kind == 3:
            parts[i:i] = [rng.choice((b"N", b"]", b"}", b")", b"(", b"0", b"R", b"t", b"Q", b"2" * 9, b"J"
                                      + struct.pack("<i", number),
                                      b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"r" + struct.pack("<I", 2 ** 28),
                                      b"b", b"\x81", b"a", b"s"))]
        elif code in (b"K", b"M", b"J", b"\x8a"):
            parts[i] = rng.choice((b"J" + struct.pack("<i", number), b"K" + bytes([rng.randrange(256)]),
                                   b"\x8a\x08" + b"\xff" * 7 + b"\x7f"))
        elif code in (b"q", b"r", b"h", b"j"):
            parts[i] = (b"r" if code in b"qr" else b"j") + struct.pack("<I", number % 2 ** 32)
        elif code == b"c":
            parts[i] = b"c" + rng.choice(GLOBALS).encode() + b"\n"
        elif code == b"X":
            text = rng.choice((*TEXTS, *NUMBERS, "cuda:0", "meta", "1", "weight"))
            text = str(text).encode("utf-8", "surrogatepass")
            parts[i] = b"X" + struct.pack("<I", len(text)) + text
        else:
            parts[i] = rng.choice((b"N", b"]", b"}", b")", b"\x88"))
    return b"".join(parts) + rest


BOMB = bytes(32 << 20)


def zip_of(rng, data):
    """Records that are missing, renamed, double, deflated, damaged, of a wrong size; or another pickle."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return pickle_of(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [[name, archive.read(name), zipfile.ZIP_STORED] for name in archive.namelist()]
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind, record = rng.randrange(10), rng.choice(records)
        pickles = [record for record in records if record[0].endswith(".pkl")]
        if kind < 5 and pickles:
            pickles[0][1] = pickle_of(rng, pickles[0][1])
        elif kind == 5 and len(records) > 1:
            records.remove(record)
        elif kind == 6:
            record[0] = rng.choice((record[0] + "x", "x/" + record[0], "data.pkl", "", "../x",
                                    rng.choice(records)[0], "a\0b"))
        elif kind == 7:
            record[2] = zipfile.ZIP_DEFLATED
            record[1] = BOMB if rng.random() < 0.02 else record[1]
        elif kind == 8:
            records.append(list(record))
        elif record[0].endswith(".npy"):
            record[1] = npy_of(rng, record[1])
        else:
            record[1] = bytes_of(rng, record[1])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content, method in records:
            archive.writestr(zipfile.ZipInfo(name or "0"), content, method, 1)
    data = bytearray(out.getvalue())
    if rng.random() < 0.1:  # the directory lies about sizes, places or the method
        entries = [match.start() for match in re.finditer(b"PK\x01\x02", data)]
        at = rng.choice(entries) + rng.choice((10, 20, 24, 42))
        data[at:at + 4] = struct.pack("<I", rng.choice((0, 1, 8, 2 ** 20, 2 ** 31, 2 ** 32 - 1)))
    return bytes(data)


# ---------------------------------------------------------------------------- arrays


def npy_of(rng, data):
    """A header whose shape, order or type lies; an object array with a hostile pickle; NaN for numbers."""
    size = struct.unpack("<H", data[8:10])[0]
    header, body, version = eval(data[10:10 + size]), data[10 + size:], data[6:8]
    kind = rng.randrange(9)
    if kind < 3:
        header["shape"] = rng.choice(((), (0,), (2 ** 40,), (2 ** 40, 2 ** 40), (-1, 4), (10 ** 7, 500),
                                      (1, 0), (4, 4, 1), (2.5, 1), "x",
                                      tuple(x + rng.choice((-1, 1)) for x in header["shape"]),
                                      header["shape"][::-1]))
    elif kind == 3:
        header["descr"] = rng.choice(("|O", "<f2", ">f4", "<f8", "<i4", "|S4", "<U9", "<c8", "|V8", "",
                                      "<f99", [("a", "<f4")], "<M8[s]", "<f16"))
        body = b"\x80\x02" + hostile(rng) + b"." if header["descr"] == "|O" else body
    elif kind == 4:
        header["fortran_order"] = rng.choice((True, 1, "x", None))
    elif kind == 5:
        body = np.resize(np.array([np.nan, np.inf, 1e30, -1e30, 0], header["descr"]),
                         max(1, len(body) // 4)).tobytes()
    elif kind == 6:
        body = body[:rng.randrange(len(body) + 1)] * rng.choice((1, 2))
    elif kind == 7:
        header[rng.choice(("x", "descr", "shape"))] = rng.choice((None, (), "y", {}))
    else:
        version = rng.choice((b"\2\0", b"\3\0", b"\x09\x09", b"\0\0"))
    text = repr(header) if rng.random() < 0.95 else rng.choice(("(" * 200 + ")" * 200, "-" * 5000 + "1"))
    text = text.encode("latin1", "replace") + b" " * ((-len(text) - 11) % 64) + b"\n"
    return data[:6] + version + struct.pack("<H", len(text)) + text + body


def safetensors_of(rng, data):
    """A header whose offsets, types, shapes or names lie, or whose length does."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    for _ in range(rng.choice((1, 1, 2))):
        name, kind = rng.choice(list(header)), rng.randrange(8)
        entry = header[name]
        if name == "__metadata__" or not isinstance(entry, dict):
            header[name] = rng.choice((None, {}, {"a": 1}, {"format": "tf"}, []))
        elif kind == 0:
            entry["dtype"] = rng.choice(("F16", "BF16", "F64", "I64", "BOOL", "U8", "C64", "F8_E4M3", "x", 1,
                                         "F32"))
        elif kind == 1:
            entry["shape"] = rng.choice(([], [0], entry["shape"][::-1], [*entry["shape"], 1], [2 ** 40],
                                         [2 ** 33, 2 ** 33], [-1], "x",
                                         [int(np.prod(entry["shape"]))]))
        elif kind == 2:
            entry["data_offsets"] = rng.choice(([0, 0], [0, len(body)], [len(body), 0], [0, 2 ** 60], [-1, 4],
                                                [0], list(header.values())[-1]))
        elif kind == 3:
            del header[name]
        elif kind == 4:
            header[rng.choice((name + "x", "", *TEXTS))] = header.pop(name)
        elif kind == 5:
            other = rng.choice(list(header))
            header[name], header[other] = header[other], header[name]
        elif kind == 6:
            floats = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"))
            body = floats * (len(body) // 4)
        else:
            text = json_of(rng, json.dumps(header).encode())
            return struct.pack("<Q", len(text)) + text + body
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) + 9, 2 ** 31, 2 ** 63))
    return struct.pack("<Q", size) + text + body


def h5_of(rng, data):
    """Datasets of other types, ranks and layouts (links out of the file, virtual, compressed, never written),
    numbers that lie, attributes that are gone or no numbers."""
    with h5py.File(io.BytesIO(data), "r") as f:
        arrays, attributes = {name: f[name][()] for name in f}, dict(f.attrs)
    out = h5py.File("memory", "w", driver="core", backing_store=False)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name, kind = rng.choice(list(arrays)), rng.randrange(22)
        array = arrays.pop(name)
        where = out if name not in out else None
        if where is None or not array.size or not isinstance(array, np.ndarray):
            continue
        if kind < 8:  # numbers
            array = array.copy()
            flat, i = array.reshape(-1), rng.randrange(array.size)
            if array.dtype.kind == "S":
                flat[i] = rng.choice((b"", b"\xff\xfe", flat[0]))
            elif array.dtype.kind == "f":
                with np.errstate(over="ignore"):
                    flat[i:i + rng.choice((1, array.size))] = rng.choice((np.nan, np.inf, -1, 1e9, 1e4,
                                                                          -1e30))
            else:
                least, most = np.iinfo(array.dtype).min, np.iinfo(array.dtype).max
                near = min(most, int(flat[i]) + 1), max(least, int(flat[i]) - 1)
                flat[i:i + rng.choice((1, 1, 3))] = rng.choice((least, most, 0, 1, *near, most // 2))
            arrays[name] = array
        elif kind == 8:
            arrays[name] = array[:rng.randrange(len(array))]
        elif kind == 9:
            arrays[name] = np.concatenate([array, array])
        elif kind == 10:
            kinds = ("u1", "u2", "i4", "i8", "u8", "f2", "f8", "S3", "?", "c8", ">u2", "V4")
            try:
                arrays[name] = array.astype(rng.choice(kinds))
            except (ValueError, TypeError):
                arrays[name] = np.zeros(len(array), "u1")
        elif kind == 11:
            arrays[name] = rng.choice((array[None], array[..., None], array.reshape(-1)[0],
                                       array.reshape(-1)))
        elif kind == 12:
            out.create_dataset(name, (3,), h5py.vlen_dtype(rng.choice((np.uint8, str, np.int64))))
        elif kind == 13:
            out.create_dataset(name, (3,), h5py.ref_dtype if rng.random() < 0.5 else h5py.regionref_dtype)
        elif kind == 14:
            out[name] = rng.choice((h5py.ExternalLink("/etc/passwd", "/x"),
                                    h5py.ExternalLink("no.h5", "/" + name), h5py.SoftLink("/" + name),
                                    h5py.SoftLink("/nowhere")))
        elif kind == 15:
            layout = h5py.VirtualLayout(array.shape, array.dtype)
            layout[...] = h5py.VirtualSource(rng.choice((".", "other.h5")), "x", array.shape)
            out.create_virtual_dataset(name, layout)
        elif kind == 16:
            out.create_dataset(name, data=array, chunks=True, compression=rng.choice(("gzip", "lzf")))
        elif kind == 17:
            out.create_dataset(name, (2 ** rng.choice((20, 32, 40)), *array.shape[1:]), array.dtype,
                               chunks=True)
        elif kind == 18:
            out.create_dataset(name, array.shape, array.dtype,
                               external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
        elif kind == 19:
            out.create_group(name)
        elif kind == 20:
            out.create_dataset(name, array.shape, array.dtype)  # its space is never allocated
        else:
            arrays[name] = array
            key = rng.choice(list(attributes))
            attributes[key] = rng.choice((attributes[rng.choice(list(attributes))], 0, -1, 2 ** 62, np.nan,
                                          "x", "x" * 9000, "é", [1, 2], True,
                                          np.zeros(0), np.bytes_(b"\xff"), h5py.Empty("f"), np.int8(1)))
            if rng.random() < 0.3:
                del attributes[key]
    with out:
        for name, array in arrays.items():
            if name not in out:
                out[name] = array
        out.attrs.update(attributes)
        out.flush()
        return out.id.get_file_image()


GZIPPED_BOMB = gzip.compress(BOMB)


def gzip_of(rng, data):
    """Damage inside of what is packed, or a little that unfolds to much, or several members."""
    text = gzip.decompress(data)
    kind = rng.randrange(12)
    if kind == 0:
        return GZIPPED_BOMB
    if kind == 1:
        return data + gzip.compress(text, 1) + rng.choice((b"", b"\0\0", b"x"))
    inside = lines_of(rng, text) if kind < 9 else bytes_of(rng, text)
    return gzip.compress(inside, 1)


MUTATORS = {".json": json_of, ".jsonl": json_lines_of, ".tsv": rows_of, ".csv": rows_of, ".txt": lines_of,
            ".lst": lines_of,
            ".gz": gzip_of, ".npy": npy_of, ".npz": zip_of, ".h5": h5_of, ".safetensors": safetensors_of,
            ".bin": zip_of, ".pt": zip_of, ".pth": zip_of, ".srt": lines_of, ".vtt": lines_of, ".json3": json_of,
            **dict.fromkeys((".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts"), bytes_of)}


def valid_outside(suffix, data):
    """Whether a file's outer layer reads: zip's directory, HDF5's tree, JSON, gzip's stream, UTF-8."""
    try:
        if suffix == ".h5":
            with h5py.File(io.BytesIO(data), "r") as f:
                return len(list(f)) >= 0
        if suffix in (".bin", ".pt", ".pth", ".npz"):
            if zipfile.is_zipfile(io.BytesIO(data)):
                return bool(zipfile.ZipFile(io.BytesIO(data)).namelist())
            return any(True for _ in pickletools.genops(data))
        if suffix == ".safetensors":
            size = struct.unpack("<Q", data[:8])[0]
            return size <= len(data) - 8 and bool(json.loads(data[8:8 + size]) or True)
        if suffix == ".npy":
            header = data[10:10 + struct.unpack("<H", data[8:10])[0]]
            return data[:6] == b"\x93NUMPY" and isinstance(eval(header), dict)
        if suffix == ".gz":
            return gzip.decompress(data) is not None
        if suffix in (".json", ".json3", ".jsonl"):
            for part in data.split(b"\n") if suffix == ".jsonl" else [data]:
                json.loads(part or b"0")
        return data.decode() is not None
    except Exception:
        return False
