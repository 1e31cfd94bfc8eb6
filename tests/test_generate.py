"""The generate command on the embedded model, its conversations, and text shown while drawn."""

import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from stubs import tiny_model

from gemma_grpo import cli, generate, runtime
from gemma_grpo.devices import mesh
from gemma_grpo.generation import chat, generator
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.model import NO_LORA
from gemma_grpo.runtime import Runtime
from gemma_grpo.text import padding
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import assets

TOKENIZER = Tokenizer(assets.NANO_TOKENIZER)
ASKED = ["--prompt", "What is 12 + 7?", "--max-completion-length", "32"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """This process has its devices already, and wants no cache."""
    monkeypatch.setattr(cli, "use_compilation_cache", lambda folder: None)


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# --- prompts in, completions out ---


def test_a_prompt_is_answered_and_json_says_how_likely_the_answer_was(capsys):
    assert generate.main(["gemma3-nano", *ASKED, "--json"]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert line["prompt"] == "What is 12 + 7?" and "19" in line["completion"]
    assert line["stopped"] and line["logp"] < 0 and 3 < line["num_tokens"] <= 32


def test_a_stream_prints_what_would_be_printed_at_once(capsys, one_layer):
    sampled = [one_layer, *ASKED, "--temperature", "30", "--seed", "3"]
    outputs = []
    for stream in ("yes", "no"):
        assert generate.main([*sampled, "--stream", stream]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and len(outputs[0]) > 10


@pytest.mark.parametrize("stream", ["yes", "no"])
def test_at_a_min_p_of_one_only_the_likeliest_token_is_left(capsys, one_layer, stream):
    outputs = []
    for setting in (["--temperature", "0"], ["--temperature", "30", "--min-p", "1"]):
        assert generate.main([one_layer, *ASKED, *setting, "--stream", stream]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and len(outputs[0]) > 10


def test_as_many_as_asked_are_drawn_and_another_seed_draws_others(capsys, one_layer):
    arguments = [one_layer, *ASKED, "--num", "3", "--temperature", "30", "--json"]
    outputs = []
    for seed in ("1", "2"):
        assert generate.main([*arguments, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(outputs[0].splitlines()) == 3
    assert outputs[0] != outputs[1]


QUESTIONS = ["What is 12 + 7?", "What is 9 - 4?", "What is 3 * 5?"]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_of_prompts_gives_a_line_each_in_its_order_whatever_the_batches(
    tmp_path, capsys, kind
):
    path, out = tmp_path / f"questions.{kind}", tmp_path / "answers.jsonl"
    as_json = "".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS)
    path.write_text(as_json if kind == "jsonl" else "\n\n".join(QUESTIONS))
    arguments = ["--weights", "gemma3-nano", "--prompts", str(path)]
    arguments += ["--max-completion-length", "32", "--batch-size", "2"]
    assert generate.main([*arguments, "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    lines = lines_of(out.read_text())
    assert [line["prompt"] for line in lines] == QUESTIONS
    for answer, line in zip(("19", "5", "15"), lines, strict=True):
        assert answer in line["completion"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", path.name]


def test_an_input_named_as_the_output_is_kept_and_nothing_is_loaded_before(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(runtime, "load_model", None)
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "2 + 2?"}')
    for out in (path, tmp_path):
        arguments = ["gemma3-nano", "--prompts", str(path), "--out", str(out)]
        assert generate.main(arguments) == 2
        assert str(out) in capsys.readouterr().err
    assert path.read_text() == '{"prompt": "2 + 2?"}'


def test_a_text_files_lines_end_at_line_feeds_and_carriage_returns_alone(tmp_path):
    path = tmp_path / "q.txt"
    path.write_bytes("\ufeffone\u2028still\r\ntwo\x0cstill\rthree\x85still\n\n".encode())
    assert generate._read_prompts(path) == ["one\u2028still", "two\x0cstill", "three\x85still"]


def test_a_prompt_that_is_too_long_is_found_before_any_is_answered(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generator.Generator, "complete", lambda *_: 1 / 0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1\n12345\n")
    few = ["--max-prompt-length", "3", "--batch-size", "1"]
    assert generate.main(["gemma3-nano", "--prompts", str(prompts), "--raw", *few]) == 2
    assert "prompt 2 takes 6 tokens, max_prompt_length is 3" in capsys.readouterr().err


def test_batches_have_keys_of_their_own_and_one_shape(monkeypatch, tmp_path):
    keys, sizes = [], []

    def complete(self, prompts, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        sizes.append(len(prompts))
        return [[generator.Completion("", 0.0, 1, True)] for _ in prompts]

    monkeypatch.setattr(generator.Generator, "complete", complete)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the same\n" * 5)
    assert generate.main(["gemma3-nano", "--prompts", str(prompts), "--batch-size", "2"]) == 0
    assert len(set(keys)) == 3 and sizes == [2, 2, 2]


def test_raw_text_is_gone_on_from_and_an_instruction_stands_before_the_question(monkeypatch):
    seen = []

    def complete(self, prompts, key):
        seen.extend(prompts)
        return [[generator.Completion("", 0.0, 1, True)] for _ in prompts]

    monkeypatch.setattr(generator.Generator, "complete", complete)
    assert generate.main(["gemma3-nano", "--prompt", "2 +", "--raw"]) == 0
    assert generate.main(["gemma3-nano", "--prompt", "2 + 2?", "--instruction", "Think."]) == 0
    assert seen == [TOKENIZER.encode_raw("2 +"), TOKENIZER.encode_prompt("Think.\n2 + 2?")]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--prompt", "x"], "name one model"),
        (["gemma3-nano", "--weights", "gemma3-nano", "--prompt", "x"], "name one model"),
        (["nowhere", "--prompt", "x"], "nowhere"),
        (["gemma3-nano"], "--prompt"),
        (["gemma3-nano", "--prompt", "x", "--chat"], "--prompt"),
        (["gemma3-nano", "--chat", "--raw"], "--chat"),
        (["gemma3-nano", "--chat", "--json"], "--chat"),
        (["gemma3-nano", "--prompt", "x", "--raw", "--instruction", "y"], "--raw"),
        (["gemma3-nano", "--prompt", "x", "--stream", "yes", "--num", "2"], "--stream"),
        (["gemma3-nano", "--prompt", "x " * 99, "--max-prompt-length", "48"], "max_prompt_length"),
        (["gemma3-nano", "--prompt", "x", "--num", "0"], "--num"),
        (["gemma3-nano", "--prompt", "x", "--max-completion-length", "-1"], "--max-completion"),
        (["gemma3-nano", "--prompt", "x", "--top-p", "2"], "top_p"),
        (["gemma3-nano", "--prompt", "x", "--min-p", "2"], "min_p"),
        (["gemma3-nano", "--prompts", "no such file.txt"], "no such file.txt"),
        (["gemma3-nano", "--prompts", "no such file.jsonl"], "no such file.jsonl"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, named):
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.txt", b"\n \n", "no prompt"),
        ("a.txt", b"\xff", "UTF-8"),
        ("a.jsonl", b'{"question": "x"}\n', "a.jsonl:1"),
    ],
)
def test_a_bad_file_of_prompts_is_one_line(tmp_path, capsys, name, content, named):
    (tmp_path / name).write_bytes(content)
    assert generate.main(["gemma3-nano", "--prompts", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


# --- text that shows as it comes ---


def spelled(text: str, *, budget: int, cut: int = 0):
    """A generator whose model spells `text`, a token at a time, without the last `cut` tokens."""
    ids = [*TOKENIZER.encode(text), TOKENIZER.stop_ids[1]]
    ids = ids[: len(ids) - cut]

    def so_far(shown: int) -> Rollout:
        row = np.array([*ids[:shown], *[TOKENIZER.pad_id] * (len(ids) - shown)])
        mask = np.arange(len(ids)) < shown
        stopped = np.array([shown == len(ids) and not cut])
        return Rollout(row[None], mask[None], np.where(mask, -0.5, 0.0)[None], stopped)

    runtime = Runtime(
        tiny_model()[0], {}, NO_LORA, TOKENIZER, mesh.data_mesh(), "", budget, 9, "", "none", 0
    )
    return generator.Generator(
        runtime,
        {},
        1,
        rollout=lambda *_: so_far(len(ids)),
        growing=lambda *_: map(so_far, range(1, len(ids) + 1)),
    )


@pytest.mark.parametrize("text", ["plain", "é🙂 naïve ☃", "日本語"])
def test_a_character_of_several_tokens_is_printed_whole_or_not_yet(text):
    generator = spelled(text, budget=64)
    chunks = list(generate._stream(generator, [2, 5], jax.random.key(0)))
    assert "".join(chunks) == text
    assert "\ufffd" not in "".join(chunks)
    (last,) = list(generator.stream([2, 5], jax.random.key(0)))[-1]
    assert last == generator.complete([[2, 5]], jax.random.key(0))[0][0]
    assert last.logp == -0.5 * last.num_tokens and last.stopped


def test_what_the_budget_cuts_in_a_character_is_shown_as_broken_at_the_end_only():
    generator = spelled("ab🙂", budget=64, cut=2)  # the mark and the last of four bytes
    chunks = list(generate._stream(generator, [2, 5], jax.random.key(0)))
    assert "".join(chunks[:-1]) == "ab" and set(chunks[-1]) == {"\ufffd"}


def test_prompts_are_padded_to_few_lengths(monkeypatch):
    widths = []
    generator = spelled("x", budget=300)
    real = padding.pad_left
    monkeypatch.setattr(
        padding,
        "pad_left",
        lambda rows, **kw: widths.append(kw["length"]) or real(rows, **kw),
    )
    for length in (1, 64, 65, 128, 129, 257, 300):
        generator.complete([[2] * length], jax.random.key(0))
    assert widths == [64, 64, 128, 128, 256, 512, 512]


# --- conversations ---


class Talk:
    """A conversation with a model that answers "one", "two", ...; everything it saw and said."""

    def __init__(self, *lines: str, budget: int = 1000, instruction: str = "", stop_at: int = 0):
        self.prompts, self.notes, written = [], [], io.StringIO()

        def reply(ids):
            self.prompts.append(ids)
            yield ("zero", "one", "two", "three", "four")[len(self.prompts)]
            if len(self.prompts) == stop_at:
                raise KeyboardInterrupt
            yield "!"

        chat.converse(
            lines,
            reply,
            chat.Screen(write=written.write, note=self.notes.append),
            TOKENIZER,
            instruction=instruction,
            max_prompt_length=budget,
        )
        self.text = written.getvalue()


def longest(conversations: list[list[str]]) -> int:
    return max(len(TOKENIZER.encode_turns(turns)) for turns in conversations)


def test_each_reply_answers_the_whole_conversation_in_gemmas_turns():
    talk = Talk("Hi", "", "And you?  ")
    first, second = ["Hi"], ["Hi", "one!", "And you?"]
    assert talk.prompts == [TOKENIZER.encode_turns(first), TOKENIZER.encode_turns(second)]
    assert talk.text == "one!\ntwo!\n"


def test_reset_forgets_and_exit_leaves():
    talk = Talk("Hi", "/reset", "Hello", "/exit", "unheard")
    assert talk.prompts == [TOKENIZER.encode_turns([said]) for said in ("Hi", "Hello")]


def test_an_unknown_command_is_named_and_not_sent():
    talk = Talk("/quit now", "Hi")
    assert len(talk.prompts) == 1
    assert any("/quit" in note and "/exit" in note for note in talk.notes)


def test_the_oldest_exchanges_go_when_the_budget_is_full_and_that_is_said():
    kept = [["aaaa"], ["aaaa", "one!", "bbbb"], ["bbbb", "two!", "cccc"]]
    talk = Talk("aaaa", "bbbb", "cccc", budget=longest(kept))
    assert talk.prompts == [TOKENIZER.encode_turns(turns) for turns in kept]
    assert [note for note in talk.notes if "dropped" in note] == [talk.notes[-1]]
    assert "oldest 1" in talk.notes[-1]


def test_a_line_that_is_too_long_by_itself_is_left_out_and_the_conversation_stays():
    budget = len(TOKENIZER.encode_turns(["Hi", "one!", "Ho"]))
    talk = Talk("Hi", "x" * 99, "Ho", budget=budget)
    assert talk.prompts[1] == TOKENIZER.encode_turns(["Hi", "one!", "Ho"])
    assert any("max_prompt_length" in note for note in talk.notes)


def test_the_instruction_stands_before_the_first_turn_that_is_kept():
    kept = [["I\naaaa"], ["I\naaaa", "one!", "bbbb"], ["I\nbbbb", "two!", "cccc"]]
    talk = Talk("aaaa", "bbbb", "cccc", budget=longest(kept), instruction="I")
    assert talk.prompts == [TOKENIZER.encode_turns(turns) for turns in kept]


def test_a_reply_that_is_stopped_stays_in_the_conversation_as_far_as_it_came():
    talk = Talk("Hi", "Ho", stop_at=1)
    assert talk.text == "one\ntwo!\n"
    assert talk.prompts[1] == TOKENIZER.encode_turns(["Hi", "one", "Ho"])


def test_a_typed_byte_that_is_no_text_is_one_line(monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"\xff hi\n"), "utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", typed)
    assert generate.main(["gemma3-nano", "--chat", "--max-completion-length", "32"]) == 2
    assert "the standard input is not utf-8" in capsys.readouterr().err


def test_json_on_a_terminal_of_another_encoding_stays_json(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", shown)
    generate._write_lines(generate.Options(prompt="x"), iter([{"completion": "é 🙂"}]))
    assert json.loads(shown.buffer.getvalue()) == {"completion": "é 🙂"}


def test_the_command_talks_until_the_end_of_its_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 + 4?\nWhat is 9 - 4?\n"))
    assert generate.main(["gemma3-nano", "--chat", "--max-completion-length", "32"]) == 0
    said = capsys.readouterr().out
    assert "7" in said and "5" in said


def test_each_reply_of_a_conversation_is_drawn_with_a_key_of_its_own(monkeypatch, capsys):
    key, used = jax.random.key(3), []

    def reply(generator, ids, key):
        used.append(tuple(jax.random.key_data(key).tolist()))
        yield "yes"

    monkeypatch.setattr(generate, "_stream", reply)
    monkeypatch.setattr("sys.stdin", io.StringIO("Same?\nSame?\nSame?\n"))
    talker = SimpleNamespace(tokenizer=TOKENIZER, instruction="", max_prompt_length=200)
    generate._converse(SimpleNamespace(runtime=talker), key)
    assert capsys.readouterr().out.count("yes") == 3
    assert len({*used, tuple(jax.random.key_data(key).tolist())}) == 4
