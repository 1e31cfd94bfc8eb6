"""gemma_grpo.weights.hf_write: what is written is read back, by us and by others, or
nothing is there."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from hf_folders import all_tensors
from oracles.gemma3_recipe import CASES, draw_weights, shapes
from small_models import build, make_config, make_params
from tolerances import TRANSFORMERS_LOGITS

from gemma_grpo import model as gemma3
from gemma_grpo.errors import UserError
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import assets, hf_write, tensor_file
from gemma_grpo.weights.assemble import assemble, hf_tensors
from gemma_grpo.weights.hf_folder import open_folder
from gemma_grpo.weights.hf_write import CHAT_TEMPLATE, write_folder
from gemma_grpo.weights.names import their_shapes

SETTINGS = CASES["global_rope_scaled_by_8_window_6_in_29_layers_7_of_3"]
CONFIG = make_config(SETTINGS)
F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(assets.NANO / "tokenizer.model")


def write(out: Path, **changes) -> None:
    settings = {"dtype": F32, "tokenizer": None} | changes
    write_folder(out, hf_tensors(make_params(SETTINGS), CONFIG), CONFIG, **settings)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_safetensors_library_and_we_read_back_what_was_written(tmp_path, dtype):
    write(tmp_path / "out", dtype=np.dtype(dtype))
    drawn = draw_weights(SETTINGS)
    written = all_tensors(tmp_path / "out")
    assert written.keys() == drawn.keys()
    for name, array in drawn.items():
        assert written[name].dtype == dtype
        np.testing.assert_array_equal(written[name], array.astype(dtype))
    source = open_folder(tmp_path / "out")
    assert source.config == CONFIG
    params = assemble(source, gemma3.abstract(CONFIG)[1], dtype=jnp.float32, sharding=None)
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(dtype).astype(np.float32), make_params(SETTINGS)
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, rounded))


def test_tensors_are_split_over_files_of_a_size_and_the_index_names_each(tmp_path, monkeypatch):
    limit = 6000
    monkeypatch.setattr(hf_write, "SHARD_BYTES", limit)
    write(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    held = {file.name: safetensors.numpy.load_file(file) for file in files}
    assert all(sum(t.nbytes for t in tensors.values()) <= limit for tensors in held.values())
    assert index["weight_map"] == {name: file for file in held for name in held[file]}
    total = sum(int(np.prod(shape)) * 4 for shape in shapes(SETTINGS).values())
    assert index["metadata"]["total_size"] == total
    assert open_folder(tmp_path / "out").tensors.keys() == shapes(SETTINGS).keys()


def test_a_tensor_above_the_size_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_write, "SHARD_BYTES", 1)
    write(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(shapes(SETTINGS))


def test_tensors_begin_at_multiples_of_eight_bytes_and_the_format_is_named(tmp_path):
    write(tmp_path / "out", dtype=np.dtype(ml_dtypes.bfloat16))
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_the_tokenizer_comes_along_with_its_ids_and_further_texts(tmp_path, tokenizer):
    out = tmp_path / "out"
    write(out, tokenizer=tokenizer, texts={"README.md": "# A model\n"})
    assert (out / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    ids = {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0}  # of gemma3-nano
    assert json.loads((out / "generation_config.json").read_text()) == ids
    one_stop = ids | {"eos_token_id": 1}
    assert json.loads((out / "config.json").read_text()).items() >= one_stop.items()
    described = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    pieces = sentencepiece.SentencePieceProcessor(str(tokenizer.path))
    marks = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    assert {i: each["content"] for i, each in described.items()} == {
        str(pieces.piece_to_id(mark)): mark for mark in marks
    }
    assert all(each["special"] for each in described.values())
    assert (out / "README.md").read_text() == "# A model\n"
    assert open_folder(out).tokenizer == out / "tokenizer.model"
    write(tmp_path / "bare")
    assert names_in(tmp_path / "bare") == ["SHA256SUMS", "config.json", "model.safetensors"]


# --- complete or not at all ---


def test_what_is_there_already_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="out is there already; name another folder"):
        write(tmp_path / "out")
    assert names_in(tmp_path / "out") == ["mine"] and names_in(tmp_path) == ["out"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is there already"):
        write(tmp_path / "file")


def test_an_empty_directory_is_filled_and_a_killed_writers_leftover_cleared(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "model-00001-of-00009.safetensors").touch()
    write(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["SHA256SUMS", "config.json", "model.safetensors"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", full)
    with pytest.raises(UserError, match="cannot write .*out: No space left on device; free some"):
        write(tmp_path / "out")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("float16", 70000.0, "model.norm.weight holds 70000, more than float16 can store"),
        ("float16", np.nan, "model.norm.weight holds nan or infinite numbers"),
        ("float32", np.inf, "model.norm.weight holds nan or infinite numbers"),
    ],
)
def test_a_number_that_cannot_be_stored_is_refused_by_tensor_and_leaves_nothing(
    tmp_path, dtype, value, words
):
    tensors = draw_weights(SETTINGS)
    tensors["model.norm.weight"][-1] = value
    ordered = ((name, tensors[name]) for name in their_shapes(CONFIG))
    with pytest.raises(UserError, match=words):
        write_folder(tmp_path / "out", ordered, CONFIG, dtype=np.dtype(dtype), tokenizer=None)
    assert names_in(tmp_path) == []


def test_tensors_that_come_in_another_order_or_shape_are_an_error_and_leave_nothing(tmp_path):
    given = list(hf_tensors(make_params(SETTINGS), CONFIG))
    flipped = [(name, array.T) for name, array in given]
    for wrong in (given[::-1], flipped):
        with pytest.raises(ValueError, match="comes where model.embed_tokens.weight"):
            write_folder(tmp_path / "out", iter(wrong), CONFIG, dtype=F32, tokenizer=None)
        assert names_in(tmp_path) == []


# --- the chat template ---


def test_the_template_makes_the_prompt_that_the_tokenizer_makes(tokenizer):
    jinja2 = pytest.importorskip("jinja2", reason="transformers renders chat templates with it")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    question = " What is 12 + 7?\n"
    user = {"role": "user", "content": question}
    text = template.render(bos_token="", messages=[user], add_generation_prompt=True)
    prompt = tokenizer.encode_prompt(question)
    assert [tokenizer.bos_id, *tokenizer.encode_marked(text)] == prompt
    answered = [user, {"role": "assistant", "content": "19"}]
    text = template.render(bos_token="<bos>", messages=answered, add_generation_prompt=False)
    assert text == (
        "<bos><start_of_turn>user\nWhat is 12 + 7?<end_of_turn>\n"
        "<start_of_turn>model\n19<end_of_turn>\n"
    )


def test_the_template_refuses_a_system_turn():
    jinja2 = pytest.importorskip("jinja2", reason="transformers renders chat templates with it")

    def refuse(message: str):
        raise ValueError(message)

    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    with pytest.raises(ValueError, match="put instructions into a user turn"):
        template.render(
            bos_token="", messages=[{"role": "system", "content": "x"}], raise_exception=refuse
        )


def test_the_template_takes_a_message_in_parts_of_text_and_refuses_others():
    jinja2 = pytest.importorskip("jinja2", reason="transformers renders chat templates with it")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    parts = [{"type": "text", "text": " What is "}, {"type": "text", "text": "12 + 7?\n"}]
    rendered = [
        template.render(bos_token="<bos>", messages=[{"role": "user", "content": content}])
        for content in (parts[1:], "12 + 7?\n")
    ]
    assert rendered[0] == rendered[1] and "12 + 7?<end_of_turn>" in rendered[0]
    assert "What is12 + 7?" in template.render(
        bos_token="", messages=[{"role": "user", "content": parts}]
    )  # as Gemma's own template, which trims each part

    def refuse(message: str):
        raise ValueError(message)

    with pytest.raises(ValueError, match="this is a text model"):
        image = [{"role": "user", "content": [{"type": "image"}]}]
        template.render(bos_token="", messages=image, raise_exception=refuse)


# --- transformers itself, where it is installed ---


def test_transformers_loads_the_folder_with_our_logits_and_our_prompt(
    tmp_path, tokenizer, monkeypatch
):
    torch = pytest.importorskip("torch", reason="not in the test environment; tried by hand")
    transformers = pytest.importorskip("transformers", reason="not in the test environment")
    monkeypatch.setattr(hf_write, "SHARD_BYTES", 6000)
    write(tmp_path / "out", tokenizer=tokenizer)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(theirs).__name__ == "Gemma3ForCausalLM" and theirs.dtype == torch.float32
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.generation_config.eos_token_id == [1, 5]
    ids_BL = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 29))
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids_BL)).logits.numpy()
    model = build(CONFIG, make_params(SETTINGS))
    hidden_BLD, _ = gemma3.forward(model, jnp.asarray(ids_BL), jnp.ones(ids_BL.shape, bool))
    assert np.abs(np.asarray(model.logits(hidden_BLD)) - expected).max() <= TRANSFORMERS_LOGITS
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "What is 12 + 7?"}]
    encoded = words.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == tokenizer.encode_prompt("What is 12 + 7?")


def test_what_has_changed_since_it_was_written_is_refused_by_name_and_the_rest_may_change(tmp_path):
    out = tmp_path / "out"
    write(out, texts={"README.md": "mine"})
    sums = (out / "SHA256SUMS").read_text()
    assert [line.split("  ")[1] for line in sums.splitlines()] == [
        "config.json",
        "model.safetensors",
    ]
    like = gemma3.abstract(CONFIG)[1]
    read = lambda: assemble(open_folder(out), like, dtype=jnp.float32, sharding=None)
    (out / "README.md").write_text("edited")
    (out / "tokenizer_config.json").write_text("{}")
    read()
    for name, change in (
        ("config.json", lambda old: old.replace(b"1e-06", b"1e-07")),
        ("model.safetensors", lambda old: old[:-1] + bytes([old[-1] ^ 1])),
    ):
        old = (out / name).read_bytes()
        assert change(old) != old
        (out / name).write_bytes(change(old))
        with pytest.raises(UserError, match=f"{name} has changed since it was written"):
            read()
        (out / name).write_bytes(old)
    edited = (out / "config.json").read_bytes().replace(b"1e-06", b"1e-07")
    (out / "config.json").write_bytes(edited)
    (out / "SHA256SUMS").write_text(sums.splitlines()[1] + "\n")  # its line taken out, on purpose
    read()
    (out / "SHA256SUMS").write_text("no sums")
    with pytest.raises(UserError, match="no lines of a digest and a name"):
        read()
