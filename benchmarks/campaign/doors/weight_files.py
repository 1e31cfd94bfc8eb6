"""Checkpoints of others: Hugging Face folders, safetensors, indexes, GGUF, Orbax, tokenizers."""

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.campaign.doors.case import DAMAGES, VALUES, Case, copied, shown, written
from benchmarks.campaign.doors.settings import FEW

TESTS = Path(__file__).parents[3] / "tests"
WEIGHTS = "model.safetensors"

HF_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {  # changes to config.json
    "another architecture": ({"model_type": "llama"}, "refused"),
    "Gemma 2": ({"model_type": "gemma2"}, "refused"),
    "multimodal without its text": ({"model_type": "gemma3"}, "refused"),
    "ten million layers": ({"num_hidden_layers": 10**7}, "refused"),
    "two layers of one": (
        {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        "refused",
    ),
    "another width": ({"hidden_size": 128}, "refused"),
    "another vocabulary": ({"vocab_size": 511}, "refused"),
    "a huge vocabulary": ({"vocab_size": 2**31}, "refused"),
    "three heads": ({"num_attention_heads": 3}, "refused"),
    "no key head": ({"num_key_value_heads": 0}, "refused"),
    "an odd head": ({"head_dim": 31}, "refused"),
    "a window of 0": ({"sliding_window": 0}, "refused"),
    "a window of -1": ({"sliding_window": -1}, "refused"),
    "an unknown kind of layer": ({"layer_types": ["sparse"]}, "refused"),
    "too many kinds of layer": ({"layer_types": ["full_attention"] * 5}, "refused"),
    "yarn": (
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
        "refused",
    ),
    "a rope base of 0": (
        {"rope_parameters": {"full_attention": {"rope_theta": 0}}, "rope_theta": 0},
        "refused",
    ),
    "soft-capping": ({"final_logit_softcapping": 30.0}, "refused"),
    "another activation": ({"hidden_activation": "relu"}, "refused"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "refused"),
    "eps nan": ({"rms_norm_eps": float("nan")}, "refused"),
    "eps 0": ({"rms_norm_eps": 0}, ""),
    "eps negative": ({"rms_norm_eps": -1e-6}, "refused"),
    "scalar 0": ({"query_pre_attn_scalar": 0}, "refused"),
    "scalar negative": ({"query_pre_attn_scalar": -32}, "refused"),
    "untied": ({"tie_word_embeddings": False}, ""),
    "more fields": ({"x": {"y": [1]}}, "accepted"),
}


def cases(material: Path) -> Iterator[Case]:
    """One file of a folder changed, then met by `train --dry-run`."""
    model = material / "model"
    run = ["train", *FEW, "--model.weights=m"]
    for file in ("config.json", WEIGHTS, "tokenizer.model"):
        for damage, change in DAMAGES.items():
            make = copied(model, "m", lambda m, c=change, f=file: c(m / f))
            yield Case("Hugging Face folder", f"{file}: {damage}", run, make)
    for name, (changes, wanted) in HF_SETTINGS.items():
        yield Case("config.json", name, run, copied(model, "m", _settings(changes)), wanted)
    for field in json.loads((model / "config.json").read_text()):
        for name, value in shown(VALUES):
            yield Case(
                "config.json", f"{field} {name}", run, copied(model, "m", _settings({field: value}))
            )
    yield from _headers(model, run)
    yield from _tensors(model, run)
    yield from _indexes(model, run)
    yield from _gguf(material)
    yield from _tokenizers(model)
    yield from _other_folders(material)


def _settings(changes: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _header(edit: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Changes the header of the weights, its length as it must be."""

    def change(folder: Path) -> None:
        path = folder / WEIGHTS
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        edited = edit(header)
        text = json.dumps(header if edited is None else edited).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return change


def _headers(model: Path, run: list[str]) -> Iterator[Case]:
    name = "model.norm.weight"
    for field in ("dtype", "shape", "data_offsets"):
        for label, value in shown(
            [*VALUES, [1.5], [-1, 3], ["0", "1"], [10**30, 10**30], "F64", "F8_E4M3", "I8"]
        ):
            edit = lambda header, f=field, v=value: header[name].__setitem__(f, v)
            yield Case(
                "safetensors", f"{field} {label}", run, copied(model, "m", _header(edit)), "refused"
            )
    edits: dict[str, tuple[Callable[[dict], Any], str]] = {
        "a tensor less": (lambda header: header.pop(name) and None, "refused"),
        "a tensor twice as long": (
            lambda header: header[name]["data_offsets"].__setitem__(1, 10**6),
            "refused",
        ),
        "two that overlap": (
            lambda header: header[name].__setitem__(
                "data_offsets", header["model.embed_tokens.weight"]["data_offsets"]
            ),
            "refused",
        ),
        "another name": (lambda header: header.__setitem__("x", header.pop(name)), "refused"),
        "a list": (lambda header: [1], "refused"),
        "no field": (lambda header: header[name].clear(), "refused"),
        "a field more": (lambda header: header[name].__setitem__("x", 1), ""),
        "metadata that is a list": (lambda header: header.__setitem__("__metadata__", [1]), ""),
        "no metadata": (lambda header: header.pop("__metadata__", None) and None, "accepted"),
        "a name of 10,000 letters": (
            lambda header: header.__setitem__("x" * 10**4, header.pop(name)),
            "refused",
        ),
        "an empty name": (lambda header: header.__setitem__("", header.pop(name)), "refused"),
        "a LoRA's name": (
            lambda header: header.__setitem__("a.lora_A.weight", header.pop(name)),
            "refused",
        ),
    }
    for label, (edit, wanted) in edits.items():
        yield Case("safetensors", label, run, copied(model, "m", _header(edit)), wanted)
    for label, length in {
        "0": 0,
        "7": 7,
        "2**31": 2**31,
        "2**63": 2**63,
        "2**64 - 1": 2**64 - 1,
    }.items():
        change = lambda m, n=length: (m / WEIGHTS).write_bytes(
            struct.pack("<Q", n) + (m / WEIGHTS).read_bytes()[8:]
        )
        yield Case(
            "safetensors", f"a header of {label} bytes", run, copied(model, "m", change), "refused"
        )


def _tensors(model: Path, run: list[str]) -> Iterator[Case]:
    """Values and types of one tensor."""
    import ml_dtypes
    import safetensors.numpy as st

    name = "model.norm.weight"
    changes: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
        "nan": (lambda t: np.full_like(t, np.nan), "refused"),
        "one infinity": (lambda t: np.concatenate([t[:-1], [np.inf]]).astype(t.dtype), "refused"),
        "float64": (lambda t: t.astype(np.float64), "refused"),
        "float16": (lambda t: t.astype(np.float16), "accepted"),
        "bfloat16": (lambda t: t.astype(ml_dtypes.bfloat16), "accepted"),
        "int8": (lambda t: t.astype(np.int8), "refused"),
        "bool": (lambda t: t.astype(bool), "refused"),
        "another shape": (lambda t: t[:-1].copy(), "refused"),
        "an axis more": (lambda t: t[None].copy(), "refused"),
        "no axis": (lambda t: np.array(1.0, np.float32), "refused"),
        "nothing": (lambda t: t[:0].copy(), "refused"),
    }
    for label, (change, wanted) in changes.items():

        def edit(folder: Path, change=change) -> None:
            tensors = st.load_file(folder / WEIGHTS)
            st.save_file(tensors | {name: change(tensors[name])}, folder / WEIGHTS)

        yield Case("safetensors", f"a tensor of {label}", run, copied(model, "m", edit), wanted)

    def one_more(folder: Path, extra: dict[str, np.ndarray]) -> None:
        st.save_file(st.load_file(folder / WEIGHTS) | extra, folder / WEIGHTS)

    embedding = st.load_file(model / WEIGHTS)["model.embed_tokens.weight"]
    for label, extra, wanted in (
        ("a tensor left over", {"x.weight": np.zeros(3, np.float32)}, "refused"),
        ("a tied head", {"lm_head.weight": embedding}, "accepted"),
        ("an untied head", {"lm_head.weight": embedding + 1}, "refused"),
        ("a bias", {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}, "refused"),
        (
            "a layer more",
            {"model.layers.1.input_layernorm.weight": np.zeros(64, np.float32)},
            "refused",
        ),
    ):
        change = lambda folder, e=extra: one_more(folder, e)
        yield Case("safetensors", label, run, copied(model, "m", change), wanted)


def _indexes(model: Path, run: list[str]) -> Iterator[Case]:
    """An index in place of one file."""
    shard = "model-00001-of-00001.safetensors"

    def index(content: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            header = (folder / WEIGHTS).read_bytes()
            names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
            names.pop("__metadata__", None)
            (folder / WEIGHTS).rename(folder / shard)
            text = json.dumps(content(dict.fromkeys(names, shard)))
            (folder / f"{WEIGHTS}.index.json").write_text(text)

        return change

    first = "model.norm.weight"
    contents: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
        "good": (lambda names: {"weight_map": names}, "accepted"),
        "no map": (lambda names: {}, "refused"),
        "an empty map": (lambda names: {"weight_map": {}}, ""),
        "a list": (lambda names: [names], "refused"),
        "a tensor less": (
            lambda names: {"weight_map": {k: v for k, v in names.items() if k != first}},
            "",
        ),
        "a tensor more": (lambda names: {"weight_map": names | {"x": shard}}, "refused"),
        "another shard": (
            lambda names: {"weight_map": names | {first: "other.safetensors"}},
            "refused",
        ),
        "a shard above": (
            lambda names: {"weight_map": names | {first: f"../m/{shard}"}},
            "refused",
        ),
        "an absolute shard": (
            lambda names: {"weight_map": names | {first: "/etc/passwd"}},
            "refused",
        ),
        "total_size wrong": (
            lambda names: {"weight_map": names, "metadata": {"total_size": "x"}},
            "",
        ),
    }
    contents |= {
        f"a shard {name}": (lambda names, v=value: {"weight_map": names | {first: v}}, "refused")
        for name, value in shown(VALUES)
    }
    contents |= {
        f"a map {name}": (lambda names, v=value: {"weight_map": v}, "")
        for name, value in shown(VALUES)
    }
    for name, (content, wanted) in contents.items():
        yield Case("index", name, run, copied(model, "m", index(content)), wanted)
    good = index(contents["good"][0])
    for damage, change in DAMAGES.items():
        make = copied(model, "m", good, lambda m, c=change: c(m / f"{WEIGHTS}.index.json"))
        yield Case("index", f"file: {damage}", run, make)


def _gguf(material: Path) -> Iterator[Case]:
    """Whole files; fields of every kind in place of each; cuts at all depths."""
    file = material / "nano.gguf"
    run = ["train", *FEW, "--model.weights=x.gguf"]
    for damage, change in DAMAGES.items():
        yield Case("GGUF", f"file: {damage}", run, copied(file, "x.gguf", change))
    size = file.stat().st_size
    for at in (0, 3, 4, 7, 8, 15, 23, 24, 30, 100, 1000, 5000, 10_000, 20_000, size - 32, size - 1):
        cut = lambda path, n=at: path.write_bytes(path.read_bytes()[:n]) and None
        yield Case("GGUF", f"cut at {at}", run, copied(file, "x.gguf", cut), "refused")
    for at, value in (
        (4, 1),
        (4, 4),
        (4, 0x03000000),
        (8, 0),
        (8, 2**63),
        (16, 0),
        (16, 2**63),
        (16, 1),
    ):

        def poke(path: Path, at=at, value=value) -> None:
            content = bytearray(path.read_bytes())
            code = "<I" if at == 4 else "<Q"
            struct.pack_into(code, content, at, value)
            path.write_bytes(content)

        yield Case("GGUF", f"{value} at byte {at}", run, copied(file, "x.gguf", poke), "refused")
    yield from _gguf_fields(run)


def write_gguf(path: Path) -> int:
    """A whole file; returns an exit status."""
    _tiny_gguf().write(path)
    return 0


def _tiny_gguf() -> Any:
    """The tests' writer of GGUF files."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import tiny_gguf

    return tiny_gguf


def _gguf_fields(run: list[str]) -> Iterator[Case]:
    """What the metadata says, changed one by one."""
    tiny_gguf = _tiny_gguf()

    def make(**options: Any) -> Callable[[Path], None]:
        return lambda folder: tiny_gguf.write(folder / "x.gguf", **options) and None

    yield Case("GGUF", "good", run, make(), "accepted")
    values = (None, True, -1, 0, 3, 1.5, float("nan"), float("inf"), "x", [1, 2], ["a"])
    keys = [*tiny_gguf.METADATA, "rope.scaling.type", "rope.scaling.factor", "rope.freq_base_swa"]
    keys += [
        "attention.sliding_window_pattern",
        "final_logit_softcapping",
        "attention.scale",
        "context_length",
    ]
    for key in keys:
        for name, value in shown(values):
            changed = {k: v for k, v in tiny_gguf.METADATA.items() if k != key}
            if value is not None:
                changed[key] = value if not (isinstance(value, int) and value < 0) else 2**31
            yield Case("GGUF", f"{key} {name}", run, make(metadata=changed))
    for key in tiny_gguf.TOKENIZER:
        for name, value in shown(values):
            changed = {k: v for k, v in tiny_gguf.TOKENIZER.items() if k != key}
            if value is not None:
                changed[key] = value if not (isinstance(value, int) and value < 0) else 2**31
            yield Case("GGUF tokenizer", f"{key} {name}", run, make(tokenizer=changed))
    for name, options in {
        "llama": dict(architecture="llama"),
        "big-endian": dict(endianess=tiny_gguf.gguf.GGUFEndian.BIG),
        "alignment 8": dict(alignment=8),
        "a tensor less": dict(changes={"output_norm.weight": None}),
        "a tensor more": dict(changes={"x.weight": np.zeros((2, 2), np.float32)}),
        "another shape": dict(changes={"output_norm.weight": np.zeros(63, np.float32)}),
        "nan": dict(changes={"output_norm.weight": np.full(64, np.nan, np.float32)}),
        "an untied head": dict(changes={"output.weight": np.ones((512, 64), np.float32)}),
    }.items():
        yield Case(
            "GGUF", name, run, make(**options), "accepted" if name == "alignment 8" else "refused"
        )


def _tokenizers(model: Path) -> Iterator[Case]:
    """--model.tokenizer, and the tokenizer of a folder."""
    run = ["train", *FEW, "--model.weights=m", "--model.tokenizer=t.model"]
    for damage, change in DAMAGES.items():
        make = copied(
            model,
            "m",
            lambda m, c=change: (
                (m / "tokenizer.model").rename(m.parent / "t.model") and c(m.parent / "t.model")
            ),
        )
        yield Case("tokenizer", f"file: {damage}", run, make)
    pieces: dict[str, Callable[[Any], None]] = {
        "no turn mark": lambda proto: _rename(proto, "<start_of_turn>", "x<s>"),
        "no end of turn": lambda proto: _rename(proto, "<end_of_turn>", "x<e>"),
        "a piece less": lambda proto: proto.pieces.__delitem__(-1),
        "a hundred more": lambda proto: (
            [proto.pieces.add(piece=f"zz{n}", score=-n) for n in range(100)] and None
        ),
        "a piece twice": lambda proto: _rename(
            proto, proto.pieces[-1].piece, proto.pieces[-2].piece
        ),
        "an empty piece": lambda proto: _rename(proto, proto.pieces[-1].piece, ""),
        "no pieces": lambda proto: proto.ClearField("pieces"),
        "no byte fallback": lambda proto: setattr(proto.trainer_spec, "byte_fallback", False),
        "unigram": lambda proto: setattr(proto.trainer_spec, "model_type", 1),
        "pad 7": lambda proto: setattr(proto.trainer_spec, "pad_id", 7),
        "no bos": lambda proto: setattr(proto.trainer_spec, "bos_id", -1),
        "scores of nan": lambda proto: (
            [setattr(piece, "score", float("nan")) for piece in proto.pieces] and None
        ),
        "a prefix of one space": lambda proto: setattr(
            proto.normalizer_spec, "add_dummy_prefix", True
        ),
    }
    for name, edit in pieces.items():

        def change(folder: Path, edit=edit) -> None:
            from sentencepiece import sentencepiece_model_pb2 as pb2

            path = folder / "tokenizer.model"
            proto = pb2.ModelProto.FromString(path.read_bytes())
            edit(proto)
            path.write_bytes(proto.SerializeToString())

        yield Case("tokenizer", name, run[:-1], copied(model, "m", change))


def _rename(proto: Any, before: str, after: str) -> None:
    for piece in proto.pieces:
        if piece.piece == before:
            piece.piece = after


def _other_folders(material: Path) -> Iterator[Case]:
    """Folders and files that are no model, and names of none."""
    nothing = lambda folder: (folder / "m").mkdir()
    run = ["train", *FEW]
    yield Case("weights", "an empty folder", [*run, "--model.weights=m"], nothing, "refused")
    for name in (
        "pytorch_model.bin",
        "x.gguf",
        "tokenizer.json",
        "model.npz",
        "adapter_model.safetensors",
        "x.task",
    ):
        make = written(f"m/{name}", b"x" * 100)
        yield Case("weights", f"a folder with {name}", [*run, "--model.weights=m"], make, "refused")
        yield Case(
            "weights", f"the file {name}", [*run, f"--model.weights=m/{name}"], make, "refused"
        )
    names = [
        "gemma3-1b",
        "gemma-3-1b-it",
        "google/gemma-3-1b-it",
        "hf://google/gemma-3-1b-it",
        "NANO",
        "gemma3-nano/",
    ]
    names += [
        "https://example.org/x.gguf",
        "kagglehub:google/gemma-3/flax/gemma3-1b-it",
        "x.gguf",
        "x.safetensors",
    ]
    for name in names:
        yield Case("weights", name, [*run, f"--model.weights={name}"], wanted="refused")
    for name in ("nested", "flat"):
        source = next((TESTS / "oracles" / "gemma_flax").glob(f"*{name}*"), None)
        if source is None or not source.is_dir():
            continue
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            for damage in ("missing", "empty", "cut in half", "zeros", "another text", "a folder"):
                place = file.relative_to(source)
                make = copied(source, "m", lambda m, p=place, d=damage: DAMAGES[d](m / p))
                yield Case("Orbax", f"{name} {place}: {damage}", [*run, "--model.weights=m"], make)
