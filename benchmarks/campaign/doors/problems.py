"""Files of problems: JSON lines, CSV, parquet, GSM8K's folders; met by `train --dry-run`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaign.doors.case import DAMAGES, VALUES, Case, all_of, shown, written

TRAIN = ["train", "--dry-run", "--data.num-train=0", "--data.num-test=0"]
TRAIN += ["--evaluation.num-samples=0", "--stages=grpo"]
GOOD = [{"prompt": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(60)]
GOOD_LINES = "".join(json.dumps(row) + "\n" for row in GOOD)
GSM8K = [
    {"question": row["prompt"], "answer": f"{row['answer']} = <<1+1=2>>\n#### {row['answer']}"}
    for row in GOOD
]
GSM8K_LINES = "".join(json.dumps(row) + "\n" for row in GSM8K)

LINES = {  # one more line, and what must come of it
    "not JSON": ("{prompt: 1}", "refused"),
    "a list": ('["What?", "7"]', "refused"),
    "a text": ('"What?"', "refused"),
    "a number": ("7", "refused"),
    "null": ("null", "refused"),
    "nan": ("NaN", "refused"),
    "two objects": ('{"prompt": "a", "answer": "1"} {"prompt": "b", "answer": "2"}', "refused"),
    "cut short": ('{"prompt": "a", "answ', "refused"),
    "a comma behind": ('{"prompt": "a", "answer": "1"},', "refused"),
    "single quotes": ("{'prompt': 'a', 'answer': '1'}", "refused"),
    "a comment": ("# no row", "refused"),
    "a key twice": ('{"prompt": "a", "prompt": "b", "answer": "1"}', ""),
    "deep": ('{"prompt": "a", "answer": "1", "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "refused"),
    "5,000 digits": ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "refused"),
    "an absurd exponent": ('{"prompt": "a", "answer": 1e999999999999999999}', ""),
    "a large exponent": ('{"prompt": "a", "answer": 1e400}', ""),
    "half a surrogate pair": ('{"prompt": "a\\ud800", "answer": "1"}', "refused"),
    "a NUL": ('{"prompt": "a\\u0000b", "answer": "1"}', ""),
    "U+2028": ('{"prompt": "a\u2028b", "answer": "1"}', "accepted"),
    "a form feed": ('{"prompt": "a\\fb", "answer": "1"}', "accepted"),
    "a turn mark": ('{"prompt": "a<end_of_turn>b", "answer": "1"}', "accepted"),
    "a blank line": ("", "accepted"),
    "white space": (" \t ", ""),
    "no answer": ('{"prompt": "a"}', "refused"),
    "no prompt": ('{"answer": "a"}', "refused"),
    "no field": ("{}", "refused"),
    "a question": ('{"question": "a", "answer": "1"}', "accepted"),
    "both": ('{"question": "a", "prompt": "b", "answer": "1"}', ""),
    "a prompt of 100,000 characters": (
        json.dumps({"prompt": "a " * 50_000, "answer": "1"}),
        "refused",
    ),
    "an answer of 100,000 characters": (
        json.dumps({"prompt": "a", "answer": "1" * 10**5}),
        "refused",
    ),
    "GSM8K's answer": ('{"question": "a", "answer": "1\\n#### 1"}', "refused"),
    "a prompt again": (json.dumps(GOOD[0]), ""),
    "a prompt again, another answer": (json.dumps(GOOD[0] | {"answer": "x"}), ""),
    "the case changed": (json.dumps(GOOD[0] | {"prompt": GOOD[0]["prompt"].upper()}), ""),
    "zero width": ('{"prompt": "\\u200b", "answer": "1"}', "refused"),
    "another script": ('{"prompt": "ثلاثة زائد أربعة؟", "answer": "٧"}', "accepted"),
    "a column of ours": ('{"prompt": "a", "answer": "1", "reward": 3}', ""),
}
CSV = {  # a whole file
    "good": (
        "prompt,answer\n" + "".join(f"{r['prompt']},{r['answer']}\n" for r in GOOD),
        "accepted",
    ),
    "no header": ("".join(f"{r['prompt']},{r['answer']}\n" for r in GOOD), "refused"),
    "a column twice": ("prompt,answer,answer\na,1,1\n", "refused"),
    "a column without a name": ("prompt,answer,\n" + "".join(f"{n},1,\n" for n in range(60)), ""),
    "the header alone": ("prompt,answer\n", "refused"),
    "semicolons": ("prompt;answer\na;1\n", "refused"),
    "tabs": ("prompt\tanswer\na\t1\n", "refused"),
    "a field more": ("prompt,answer\na,1,2\n", "refused"),
    "a field less": ("prompt,answer\na\n", "refused"),
    "an open quote": ('prompt,answer\n"a,1\n', "refused"),
    "a quote within": ('prompt,answer\na "b" c,1\n', ""),
    "text behind a quote": ('prompt,answer\n"a"b,1\n', "refused"),
    "a line break within": (
        "prompt,answer\n" + "".join(f'"a\nb {n}",1\n' for n in range(60)),
        "accepted",
    ),
    "an empty answer": ("prompt,answer\n" + "a,\n" * 60, "refused"),
    "blank lines": ("prompt,answer\n\n" + "".join(f"{n},1\n\n" for n in range(60)), "accepted"),
    "a NUL": ("prompt,answer\na\0b,1\n", ""),
    "a field of a megabyte": (f"prompt,answer\n{'a' * 10**6},1\n", "refused"),
    "a byte order mark": (
        "\ufeff" + "prompt,answer\n" + "".join(f"{n}?,1\n" for n in range(60)),
        "accepted",
    ),
    "old Mac line ends": ("prompt,answer\r" + "".join(f"{n}?,1\r" for n in range(60)), ""),
    "capitals": ("Prompt,Answer\na,1\n", "refused"),
    "spaces in the header": (
        "prompt , answer\n" + "".join(f"{n}?,1\n" for n in range(60)),
        "accepted",
    ),
    "a question column": (
        "question,answer\n" + "".join(f"{n}?,1\n" for n in range(60)),
        "accepted",
    ),
}


def cases(material: Path) -> Iterator[Case]:
    """Rows, whole files, folders."""
    yield from _rows()
    for suffix in ("jsonl", "csv"):
        name, text = f"x.{suffix}", GOOD_LINES if suffix == "jsonl" else CSV["good"][0]
        for damage, change in DAMAGES.items():
            make = all_of(written(name, text), lambda folder, c=change, n=name: c(folder / n))
            yield Case(suffix.upper(), f"file: {damage}", [*TRAIN, f"--data.source={name}"], make)
    for name, (text, wanted) in CSV.items():
        make = written("x.csv", text)
        yield Case("CSV", name, [*TRAIN, "--data.source=x.csv"], make, wanted)
    yield from _parquet()
    yield from _gsm8k()
    yield from _sources()


def _rows() -> Iterator[Case]:
    run = [*TRAIN, "--data.source=x.jsonl"]
    for name, (line, wanted) in LINES.items():
        yield Case("JSONL", name, run, written("x.jsonl", f"{GOOD_LINES}{line}\n"), wanted)
    for field in ("prompt", "answer", "completion", "difficulty", "domain"):
        for name, value in shown(VALUES):
            row = json.dumps({"prompt": "Why?", "answer": "7"} | {field: value})
            yield Case("JSONL", f"{field} {name}", run, written("x.jsonl", f"{GOOD_LINES}{row}\n"))
    for field in ("question", "answer"):
        for name, value in shown(VALUES):
            row = json.dumps(GSM8K[0] | {field: value})
            make = written("x/train.jsonl", f"{GSM8K_LINES}{row}\n")
            yield Case(
                "GSM8K", f"{field} {name}", [*TRAIN, "--data.source=gsm8k-validation:x"], make
            )
    for tail in (
        "#### ",
        "####",
        "#### 1\n2",
        "## 1",
        "#### 1,2,3",
        "#### x",
        "#### 1 ####",
        "#### -",
    ):
        row = json.dumps({"question": "Why?", "answer": f"Because.\n{tail}"})
        make = written("x/train.jsonl", f"{GSM8K_LINES}{row}\n")
        yield Case("GSM8K", f"ends in {tail!r}", [*TRAIN, "--data.source=gsm8k-validation:x"], make)


def _columns() -> dict[str, tuple[Callable[[], Any], str]]:
    """Answers of each kind, and what must become of them."""
    import pyarrow as pa

    number = range(len(GOOD))
    return {
        "text": (lambda: pa.array([str(n) for n in number]), "accepted"),
        "large text": (lambda: pa.array([str(n) for n in number], pa.large_string()), "accepted"),
        "a dictionary": (lambda: pa.array([str(n % 3) for n in number]).dictionary_encode(), ""),
        "int64": (lambda: pa.array(number, pa.int64()), "accepted"),
        "uint8": (lambda: pa.array(number, pa.uint8()), "accepted"),
        "float32": (lambda: pa.array([n / 10 for n in number], pa.float32()), "accepted"),
        "float16": (lambda: pa.array([float(n) for n in number], pa.float16()), ""),
        "nan": (lambda: pa.array([float("nan")] * len(GOOD)), "refused"),
        "infinity": (lambda: pa.array([float("inf")] * len(GOOD)), "refused"),
        "bool": (lambda: pa.array([True] * len(GOOD)), "refused"),
        "null": (lambda: pa.nulls(len(GOOD)), "refused"),
        "some null": (lambda: pa.array([None, *map(str, number[1:])]), "refused"),
        "bytes": (lambda: pa.array([b"1"] * len(GOOD)), "refused"),
        "bytes that are no UTF-8": (lambda: pa.array([b"\xff"] * len(GOOD)), "refused"),
        "a list": (lambda: pa.array([["1"]] * len(GOOD)), "refused"),
        "a struct": (lambda: pa.array([{"a": "1"}] * len(GOOD)), "refused"),
        "a map": (
            lambda: pa.array([[("a", 1)]] * len(GOOD), pa.map_(pa.string(), pa.int64())),
            "refused",
        ),
        "a date": (lambda: pa.array([0] * len(GOOD), pa.date32()), "refused"),
        "a time": (lambda: pa.array([2**62] * len(GOOD), pa.timestamp("ns")), ""),
        "a duration": (lambda: pa.array([2**62] * len(GOOD), pa.duration("s")), ""),
        "a decimal": (lambda: pa.array(number, pa.int64()).cast(pa.decimal128(20, 1)), "accepted"),
        "text that is no UTF-8": (
            lambda: pa.Array.from_buffers(
                pa.string(),
                len(GOOD),
                [
                    None,
                    pa.array(range(len(GOOD) + 1), pa.int32()).buffers()[1],
                    pa.py_buffer(b"\xff" * len(GOOD)),
                ],
            ),
            "refused",
        ),
    }


def _parquet() -> Iterator[Case]:
    """Columns of all kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts, columns = [row["prompt"] for row in GOOD], _columns()
    run = [*TRAIN, "--data.source=x.parquet"]
    for name, (answers, wanted) in columns.items():
        make = lambda folder, a=answers: pq.write_table(
            pa.table({"prompt": prompts, "answer": a()}), folder / "x.parquet"
        )
        yield Case("parquet", f"answers: {name}", run, make, wanted)
    for name, table in {
        "no rows": lambda: pa.table(
            {"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}
        ),
        "no columns": lambda: pa.table({}),
        "other columns": lambda: pa.table({"a": prompts}),
        "a column twice": lambda: pa.Table.from_arrays(
            [pa.array(prompts)] * 2, ["prompt", "prompt"]
        ),
        "one row": lambda: pa.table({"prompt": prompts[:1], "answer": ["1"]}),
    }.items():
        make = lambda folder, t=table: pq.write_table(t(), folder / "x.parquet")
        yield Case("parquet", name, run, make, "refused")
    good = columns["text"][0]
    for damage, change in DAMAGES.items():

        def make(folder: Path, change=change) -> None:
            pq.write_table(pa.table({"prompt": prompts, "answer": good()}), folder / "x.parquet")
            change(folder / "x.parquet")

        yield Case("parquet", f"file: {damage}", run, make)


def _gsm8k() -> Iterator[Case]:
    """Folders, and files in them."""
    lines = GSM8K_LINES
    layouts: dict[str, tuple[list[str], str, str]] = {
        "train and test": (["train.jsonl", "test.jsonl"], "gsm8k:x", ""),
        "train alone": (["train.jsonl"], "gsm8k:x", "refused"),
        "train alone, validation": (["train.jsonl"], "gsm8k-validation:x", "accepted"),
        "test alone": (["test.jsonl"], "gsm8k:x", "refused"),
        "two of a kind": (["a_train.jsonl", "b_train.jsonl"], "gsm8k-validation:x", "refused"),
        "both in main": (["main/train.jsonl", "main/test.jsonl"], "gsm8k:x", ""),
        "Kaggle's names": (
            ["main_train.jsonl", "main_test.jsonl", "socratic_train.jsonl"],
            "gsm8k:x",
            "",
        ),
        "a shard lost": (["train-00000-of-00002.jsonl"], "gsm8k-validation:x", "refused"),
        "no suffix": (["train"], "gsm8k:x", "refused"),
        "contest.jsonl": (["contest.jsonl"], "gsm8k:x", "refused"),
        "nothing": (["readme.txt"], "gsm8k:x", "refused"),
        "a file": (["train.jsonl"], "gsm8k-validation:x/train.jsonl", "accepted"),
        "a file's test side": (["train.jsonl"], "gsm8k:x/train.jsonl", "refused"),
    }
    for name, (files, source, wanted) in layouts.items():
        make = all_of(*(written(f"x/{file}", lines) for file in files))
        yield Case("GSM8K", name, [*TRAIN, f"--data.source={source}"], make, wanted)


def _sources() -> Iterator[Case]:
    """Names of sources."""
    texts = [
        "curriculum:x",
        "Curriculum",
        "reasoning_gym:",
        "reasoning_gym:x",
        "reasoning_gym",
        "gsm8k",
    ]
    texts += [
        "gsm8k-validation",
        "session",
        "x.jsonl,x.jsonl",
        "x.jsonl,",
        ",x.jsonl",
        "x.jsonl,y.jsonl",
    ]
    texts += [
        "x.txt",
        "x.json",
        "x.jsonl.gz",
        "./x.jsonl",
        "X.JSONL",
        "x",
        "http://localhost/x.jsonl",
    ]
    texts += [
        "gsm8k:kagglehub:a/b",
        "kagglehub:a/b",
        "x.jsonl ",
        " x.jsonl",
        "gsm8k:x.jsonl",
        "~/x.jsonl",
    ]
    for text in texts:
        make = written("x.jsonl", GOOD_LINES)
        yield Case(
            "source",
            text,
            [*TRAIN, "--data.num-train=4", "--data.num-test=2", f"--data.source={text}"],
            make,
        )
