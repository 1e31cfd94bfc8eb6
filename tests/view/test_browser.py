"""The page in a real browser: opened from disk, filtered, followed, searched, and looked at."""

import json
import subprocess
import sys
import time

import children
import pytest
from run_folders import FALSE, HOSTILE, PROSE, RIGHT, held_out, rollout, write_rows, write_run
from web_browser import Browser, chromium

from gemma_grpo.records.metric_notes import NOTES
from gemma_grpo.view import page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="chromium or chromedriver is not installed"),
]

SCRIPT = "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of a run whose third problem has hostile completions."""
    run = write_run(tmp_path_factory.mktemp("runs") / "one", steps=3, problems=4)
    texts = [FALSE, RIGHT, SCRIPT, "<reasoning>\nxy\n</reasoning>\n<answer>\n9\n</answer>"]
    write_rows(run / "evaluations" / "grpo.jsonl", held_out(texts, [RIGHT, PROSE]))
    page.write([run], run / "view.html", 8)
    return (run / "view.html").as_uri()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / name, problems=3) for name in ("first", "second")]
    page.write(runs, folder / "view.html", 8)
    return (folder / "view.html").as_uri()


VIEWS = ("overview", "problems", "steps", "list")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("view", VIEWS)
def test_each_view_opens_without_complaint_and_fits_the_screen(
    view, width, dark, browser, address, tmp_path
):
    browser.open(f"{address}#view={view}", width=width, dark=dark)
    assert browser.complaints() == []
    assert len(browser.text("#view")) > 100
    assert browser.run("return document.documentElement.scrollWidth") <= width
    ground, ink = (
        browser.run(f"return getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    brightness = lambda colour: sum(int(part) for part in colour[4:-1].split(","))
    assert (brightness(ground) < brightness(ink)) == dark
    assert abs(brightness(ground) - brightness(ink)) > 500  # of 765: legible
    size = browser.run("return parseFloat(getComputedStyle(document.body).fontSize)")
    assert size >= 14
    browser.screenshot(tmp_path / "shot.png")
    assert (tmp_path / "shot.png").stat().st_size > 5000


def test_a_problem_is_followed_through_the_stages(browser, address):
    browser.open(f"{address}#view=problems")
    assert "Gained (1)" in browser.text() and "Lost (0)" in browser.text()
    stages = "return [...document.querySelectorAll('[data-stage]')].map(c => c.dataset.stage)"
    assert browser.run(stages) == ["base", "sft", "grpo"]
    browser.click("#gained")
    assert "problem=1" in browser.run("return location.hash")
    assert "wrong" in browser.text("[data-stage=sft] header")
    assert "right" in browser.text("[data-stage=grpo] header")
    false = browser.text("[data-stage=sft] .step.f")
    assert "3 + 4 = 8" in false and "✗" in false
    assert browser.text("[data-stage=grpo] .step.e").split() == ["✓", "3", "+", "4", "=", "7"]
    marked = "return [...document.querySelectorAll('[data-stage=grpo] mark')].map(m => m.innerText)"
    assert browser.run(marked) == ["7", "Ann has 7 apples.", "7"]
    browser.click("#next")
    assert "problem=2" in browser.run("return location.hash")
    browser.click("#previous")
    assert "(1)" in browser.text(".question")


def test_samples_beside_the_greedy_completion_are_a_click_away(browser, address):
    browser.open(f"{address}#view=problems&problem=1")
    browser.click("[data-stage=sft] .pills button:nth-child(3)")
    assert PROSE in browser.text("[data-stage=sft]") and PROSE in browser.text("[data-stage=grpo]")
    assert "sample=1" in browser.run("return location.hash")


def test_the_models_text_stays_text(browser, address):
    browser.open(f"{address}#view=problems&problem=2")
    assert SCRIPT in browser.text("[data-stage=grpo]")
    assert browser.run("return document.title") == "one · gemma_grpo"
    assert browser.run("return document.querySelectorAll('img, #view b b').length") == 0


def test_whatever_a_model_writes_is_shown_on_a_phone_s_screen(browser, tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    blocks = [f"<reasoning>\n{t}\n3 + 4 = 7\n</reasoning>\n<answer>\n{t}</answer>" for t in HOSTILE]
    texts = ["", "  \n", *HOSTILE, *blocks]
    write_rows(run / "evaluations" / "grpo.jsonl", held_out(texts))
    write_rows(run / "rollouts" / "grpo-000001.jsonl", rollout(texts))
    page.write([run], run / "view.html", 8)
    views = [f"view=problems&problem={n}" for n in range(len(texts))]
    for view in (*views, "view=steps", "view=list&kind=training&sort=long", "view=list&q=😀"):
        for colour in ("none", "logp"):
            link = f"{(run / 'view.html').as_uri()}#{view}&colour={colour}"
            browser.open(link, width=400)
            assert browser.complaints() == [], link
            assert browser.run("return document.documentElement.scrollWidth") <= 400, link
            assert len(browser.text("#view")) > 100, link
    assert browser.run("return document.querySelectorAll('script').length") == 2


@pytest.mark.parametrize("view", VIEWS)
def test_a_run_that_has_only_begun_and_one_without_grpo_open(view, browser, tmp_path):
    for run in (tmp_path / "begun", write_run(tmp_path / "sft", steps=0)):
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text("seed: 0\n")
        page.write([run], run / "view.html", 8)
        browser.open((run / "view.html").as_uri() + f"#view={view}")
        assert browser.complaints() == [] and browser.text("#view").strip()


def shown_count(browser):
    return int(browser.text("#filter-summary").split(": ")[1].split(" of ")[0].replace(",", ""))


@pytest.mark.parametrize(
    "filters, count",
    [
        ("", 4 * 3 * 3 + 3 * 5),
        ("stage=base", 12),
        ("kind=training", 15),
        ("kind=greedy&right=yes", 2),
        ("stage=training&from=2&to=2", 5),
        ("difficulty=easy&kind=greedy", 6),
        ("domain=sharing&kind=greedy", 6),
        ("stage=grpo&kind=greedy&format=no", 1),
        ("stage=training&low=0.15&high=0.5", 3),
        ("arithmetic=yes&stage=sft", 4),
        ("q=ONERROR", 1),
        ("q=(3)", 9),
        ("q=nowhere", 0),
        ("ended=no", 0),
    ],
)
def test_filters_leave_what_a_hand_counts(filters, count, browser, address):
    browser.open(f"{address}#view=list&{filters}")
    assert shown_count(browser) == count
    rows = browser.run("return document.querySelectorAll('article.row').length")
    assert rows == min(count, 40)
    assert browser.complaints() == []


def test_typing_searches_and_the_link_holds_the_search(browser, address):
    browser.open(f"{address}#view=list")
    browser.run("document.getElementById('filters').open = true")
    browser.run(
        "const box = document.querySelector('[name=q]'); box.focus(); box.value = 'onerror';"
        "box.dispatchEvent(new Event('input')); return new Promise(r => setTimeout(r, 600))"
    )
    assert shown_count(browser) == 1
    link = browser.run("return location.href")
    browser.open(link)
    assert shown_count(browser) == 1
    assert browser.run("return document.querySelector('[name=q]').value") == "onerror"


def test_snapshots_stand_between_the_stages_and_gained_compares_whole_stages(browser, tmp_path):
    run = write_run(tmp_path / "run")
    for step, texts in ((50, [RIGHT, FALSE]), (100, [FALSE, FALSE])):
        path = run / "evaluations" / f"grpo-step-{step:06d}.jsonl"
        write_rows(path, held_out(texts))
        path.with_suffix(".json").write_text('{"accuracy": 0.5, "n": 2}')
    page.write([run], run / "view.html", 8)
    browser.open((run / "view.html").as_uri() + "#view=problems")
    stages = "return [...document.querySelectorAll('[data-stage]')].map(c => c.dataset.stage)"
    few = ["base", "sft", "grpo-step-000050", "grpo-step-000100", "grpo"]
    assert browser.run(stages) == few
    assert "Gained (2)" in browser.text()  # from sft to grpo
    assert "grpo step 50" in browser.text("[data-stage=grpo-step-000050] header")
    browser.open((run / "view.html").as_uri() + "#view=problems&problem=2")
    assert browser.run(stages) == ["base", "sft", "grpo"]
    browser.open((run / "view.html").as_uri())
    assert "grpo step" not in browser.text("table") and browser.complaints() == []


def test_a_curve_says_what_is_healthy_and_what_to_do(browser, address):
    browser.open(address)
    opened = "return [...document.querySelectorAll('.panel')].map(panel => panel.innerText)"
    assert not any("Healthy" in text for text in browser.run(opened))
    browser.run("document.querySelectorAll('.panel details').forEach(d => { d.open = true; })")
    loss = next(text for text in browser.run(opened) if text.startswith("GRPO loss"))
    note = NOTES["loss"]
    assert note.meaning in loss and note.healthy in loss and note.fix in loss
    browser.run("document.querySelector('details.settings').open = true")
    assert NOTES["reward/mean"].fix in browser.text("table.metrics")


def test_in_a_notebooks_frame_links_stay_within_it(browser, tmp_path):
    run = write_run(tmp_path / "run")
    pair = {"n": 3, "difference": 0.6, "ci95": [0.1, 0.9], "gained": 2, "lost": 0, "p_value": 0.5}
    summary = {"unfinished": None, "paired": {"grpo_vs_sft": pair}}
    (run / "summary.json").write_text(json.dumps(summary))
    inline = page.Inline(page.html([run], 8))._repr_html_()
    open_frame = inline.replace("sandbox='allow-scripts'", "")  # which a test may look into
    (tmp_path / "notebook.html").write_text(f"<meta charset=utf-8><p>cell</p>{open_frame}")
    browser.open((tmp_path / "notebook.html").as_uri())
    inside = "const inside = document.querySelector('iframe').contentDocument;"
    browser.run(inside + "inside.querySelector('a[href*=gained]').click()")
    text = browser.run(inside + "return inside.body.innerText")
    assert "Gained (2)" in text and "problem" in text
    assert browser.text("p") == "cell" and browser.complaints() == []
    (tmp_path / "sandboxed.html").write_text(f"<meta charset=utf-8>{inline}")
    browser.open((tmp_path / "sandboxed.html").as_uri())
    assert browser.complaints() == []


def test_a_link_of_nonsense_opens_the_page(browser, address):
    browser.open(f"{address}#view=constructor&problem=x&page=-5&run=9&sort=toString&colour=no&a=b")
    assert browser.complaints() == [] and "Before and after" in browser.text()


def test_a_steps_groups_are_sorted_by_reward_and_coloured_by_token(browser, address):
    browser.open(f"{address}#view=steps&step=2&colour=logp")
    assert "step 2" in browser.text("#view").lower()
    rewards = browser.run(
        "return [...document.querySelectorAll('.group:first-of-type .figures b')]"
        ".map(b => Number(b.innerText))"
    )
    assert rewards == [0.2, 0.1, 0.0]
    assert "2 times" in browser.text(".group:last-of-type") and "no signal" in browser.text()
    tokens = browser.run(
        "return [...document.querySelectorAll('.member .token')].map(t => t.title)"
    )
    assert "log-prob −2.0" in tokens[2] and "trainer − sampler 1e-3" in tokens[2]
    text = browser.run(
        "return [...document.querySelectorAll('.member')][0].querySelector('.text').innerText"
    )
    assert text == RIGHT
    for colour in ("gap", "advantage"):
        browser.open(f"{address}#view=steps&step=2&colour={colour}")
        backgrounds = "return document.querySelectorAll('.member .token[style*=rgba]').length"
        assert browser.run(backgrounds) > 10


def test_runs_are_compared_on_the_same_problem(browser, compared):
    browser.open(f"{compared}#view=problems&problem=1")
    assert browser.run("return document.querySelectorAll('[data-stage=grpo]').length") == 2
    assert {"first", "second"} <= set(browser.text().split())
    browser.open(f"{compared}#view=list&runs=1")
    assert shown_count(browser) == 3 * 3 * 3 + 2 * 5


# Types a word once the list is painted, and waits for its answer to be painted; then does what
# else a reader does. `times`: ms since the page was asked for, then of each action.
READER = """
const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
const summary = () => document.getElementById("filter-summary").textContent;
addEventListener("DOMContentLoaded", async () => {
  await painted();
  const times = { listed: performance.now() }, all = summary();
  const box = document.querySelector("[name=q]");
  box.value = "no. 12345 ";
  box.dispatchEvent(new Event("input"));
  while (summary() === all) await painted();
  window.times = { ...times, searched: performance.now() };
});
"""
PAINTED = "return new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
ACTIONS = {
    "filter": {"q": "", "right": "yes", "low": 0.2},
    "sort": {"sort": "false"},
    "colour": {"colour": "logp"},
    "problem": {"view": "problems"},
    "step": {"view": "steps"},
    "overview": {"view": "overview"},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of a run with 20,000 completions in training, each another text, as long as those of
    the default run."""
    run = write_run(tmp_path_factory.mktemp("runs") / "large", steps=0)
    text = lambda n: RIGHT.replace("7", str(n % 9)).replace("Ann", f"Of no. {n} {'so ' * 20}Ann")
    for step in range(50):
        rows = rollout([text(400 * step + n) for n in range(400)], step % 5)
        rows = [each | {"group": n // 8} for n, each in enumerate(rows)]
        write_rows(run / "rollouts" / f"grpo-{step + 1:06d}.jsonl", rows)
    # A process of its own does not check the types of 20,000 calls.
    command = [sys.executable, "-m", "gemma_grpo.view", str(run), "--megabytes", "40"]
    subprocess.run(command, check=True, env=children.ENVIRONMENT)
    return (run / "view.html").as_uri()


def test_twenty_thousand_completions_are_listed_and_searched_within_a_second(browser, large):
    """CPU seconds of all the browser's processes, from asking for the page to the painted answer of
    a search, and then of each action: a machine that does nothing else takes no longer."""
    took = {}

    def record(name, act):
        started = browser.cpu_seconds()
        act()
        took[name] = min(took.get(name, 9), round(browser.cpu_seconds() - started, 2))

    def read():
        browser.open(f"{large}#view=list", first=READER)
        while not browser.run("return window.times"):
            time.sleep(0.05)

    for _ in range(2):
        record("open and search", read)
        print("wall ms", browser.run("return window.times"))
        assert "1 of 20,0" in browser.text("#filter-summary") and browser.complaints() == []
        for name, change in ACTIONS.items():
            draw = f"set({json.dumps(change)}); {PAINTED}"
            record(name, lambda draw=draw: browser.run(draw))
    print(took)
    assert max(took.values()) < 1, took
