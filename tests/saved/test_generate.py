"""`duollm generate` on a tiny saved model, as the command line runs it."""

import copy
import io
import re
import shutil
from io import BytesIO, StringIO, TextIOWrapper

import pytest
import torch
from rich.console import Console
from tokenizers import processors
from transformers import GenerationConfig

from duollm import cli
from duollm.config import Recipe
from duollm.convert.saving import History, save_model
from duollm.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from duollm.files import write_text
from duollm.flops import head_flops, token_flops
from duollm.recipe_files import to_yaml
from duollm.routers.policies import RandomShare
from duollm.routers.registry import make_router, save_router
from duollm.saved.generate import print_legend, print_piece, print_routes
from tiny import tiny_model

PROMPT = "the owl of "
FLAGS = ["--max-new-tokens", "6", "--greedy"]
TURN = "{% for message in messages %}<{{ message.content }}>{% endfor %}"

ROUTES = torch.tensor([[2, 1, 0, 2], [1, 1, 1, 1]])
PLAIN = {"piped": {}, "NO_COLOR": {"force_terminal": True, "color_system": "truecolor", "no_color": True}}


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch):
    monkeypatch.setattr("duollm.cli.tune_memory", lambda: True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the owl of the naïve owl " * 3], 270)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=32, attention="sdpa")
    model.generation_config.eos_token_id = 10**6  # never
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, tokenizer, folder, History())
    return folder


@pytest.fixture
def run(folder, model, tmp_path):
    """A run folder with a router that takes small everywhere."""
    shutil.copytree(folder, tmp_path / "run" / "model")
    write_text(tmp_path / "run" / "config.yaml", to_yaml(Recipe()))
    router = make_router("linear", model.config, ["small", "big"])
    router.price.fill_(1.0)
    facts = {"kind": "linear", "branches": ["small", "big"]}
    save_router(router, tmp_path / "run" / "routers" / "linear_k0", facts)
    return tmp_path / "run"


@pytest.fixture
def shown(capsys):
    """Run the verb and return what it printed."""

    def run_verb(*arguments):
        assert cli.main(["generate", *map(str, arguments)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run_verb


def test_the_text_is_that_of_generate_and_the_cost_that_of_its_routes(shown, folder, model, tokenizer):
    output = shown(folder, PROMPT, "--policy", "random:0.5:3", *FLAGS)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    whole = model.generate(ids, settings, policy=RandomShare(0.5, 3))
    text, _, numbers = output.partition("\n\nrandom:0.5:3: ")
    assert text == tokenizer.decode(whole[0], skip_special_tokens=True)
    routes_TL = model(whole[:, :-1], policy=RandomShare(0.5, 3)).routes[0]
    start = ids.shape[1] - 1
    flops, all_big = (
        sum(
            token_flops(model.config, route, t + 1) + head_flops(model.config)
            for t, route in enumerate(routes)
            if t >= start
        )
        for routes in (routes_TL.tolist(), [3] * len(routes_TL))
    )
    assert f"6 tokens, {(routes_TL[start:] == 2).double().mean():.1%} big" in numbers
    assert f"(prompt {(routes_TL[: start + 1] == 2).double().mean():.1%})" in numbers
    assert f"{flops / 6 / 1e6:,.1f} MFLOP per token ({flops / all_big:.1%} of all big)" in numbers
    assert re.search(r"\nall big: [\d.]+ tokens/s; this was [\d.]+ x as fast\n$", numbers)


@pytest.mark.parametrize(
    "flags", [["--no-compare", "--policy", "all-small"], []], ids=["asked not to", "all big itself"]
)
def test_there_is_not_always_a_comparison(shown, folder, flags):
    assert "as fast" not in shown(folder, PROMPT, *FLAGS, *flags)


def test_the_strip_has_a_line_per_token(shown, folder):
    output = shown(folder, PROMPT, *FLAGS, "--policy", "routes:012", "--show-routes")
    assert len(re.findall(r"^·▪█ 1 big  ", output, re.MULTILINE)) == 6


def test_the_prompt_may_come_from_standard_input(shown, folder, monkeypatch):
    given = shown(folder, PROMPT, *FLAGS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    text = given.partition("\n\nall-big")[0]
    assert shown(folder, "-", *FLAGS).startswith(f"{text}\n\nall-big: 6 tokens")


def test_standard_input_is_utf8_whatever_the_locale(shown, folder, monkeypatch):
    given = io.BytesIO("\ufeffthe na\u00efve owl".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(given, "ascii", errors="surrogateescape"))
    assert shown(folder, "-", *FLAGS).startswith("the na\u00efve owl")


def test_a_seed_repeats_a_sample(shown, folder):
    texts = [
        shown(folder, PROMPT, "--max-new-tokens", 8, "--seed", seed, "--temperature", 2).partition("\n\nall-big")[0]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_beams_show_their_text_too(shown, folder, model, tokenizer):
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    settings = GenerationConfig(max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(model.generate(ids, settings)[0], skip_special_tokens=True)
    assert shown(folder, PROMPT, *FLAGS, "--num-beams", 3).startswith(f"{text}\n\nall-big: 6 tokens, 100.0% big")


@pytest.mark.parametrize("policy", ["linear_k0", "router:linear_k0"])
def test_a_run_folder_knows_its_routers_by_name(shown, run, policy):
    output = shown(run, PROMPT, *FLAGS, "--policy", policy)
    assert f"{policy}: 6 tokens, 0.0% big" in output
    both = (shown(run, PROMPT, *FLAGS, "--policy", "all-small"), output)
    small, routed = (float(re.search(r"([\d.]+)% of all big", text)[1]) for text in both)
    assert routed > small, "what the router computes counts"


def test_a_router_trained_with_its_model_runs_on_that_model(shown, run, tokenizer):
    other = tiny_model(seed=1, vocab_size=len(tokenizer), max_position_embeddings=32)
    other.generation_config.eos_token_id = 10**6
    other.save_pretrained(run / "routers" / "linear_k0" / "model")
    save_model(other, tokenizer, run / "other", History())
    text = shown(run, PROMPT, *FLAGS, "--policy", "linear_k0").partition("\n\nlinear_k0:")[0]
    assert shown(run / "other", PROMPT, *FLAGS, "--policy", "all-small").startswith(f"{text}\n\nall-small")


def test_a_prompt_is_continued_not_closed(shown, folder, model, tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / "closing")
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", END_OF_TEXT], special_tokens=[(END_OF_TEXT, 0)]
    )
    closing.save_pretrained(tmp_path / "closing")
    assert load_tokenizer(tmp_path / "closing")(PROMPT).input_ids[-1] == 0
    texts = [shown(each, PROMPT, *FLAGS).partition("\n\nall-big")[0] for each in (folder, tmp_path / "closing")]
    assert texts[0] == texts[1]


def test_a_tokenizer_larger_than_the_model_is_refused(capsys, folder, tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / "grown")
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<|user|>"])
    grown.save_pretrained(tmp_path / "grown")
    assert cli.main(["generate", str(tmp_path / "grown"), "<|user|>"]) == 2
    number = len(tokenizer)
    assert f"grown: knows {number} tokens, its tokenizer has {number + 1}; resize" in capsys.readouterr().err


def test_a_chat_prompt_goes_through_the_template(shown, folder, model, tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TURN)
    chat = shown(tmp_path / "chat", "the owl", "--chat", *FLAGS)
    answer = shown(folder, "<the owl>", *FLAGS).removeprefix("<the owl>")
    assert chat == f"the owl\n{answer}".replace(answer.partition("\n\nall-big")[2], chat.partition("\n\nall-big")[2])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", PROMPT], "nowhere: neither a saved duo"),
        (["FOLDER", " \n"], "the prompt is empty"),
        (["FOLDER", "owl " * 40], r"tokens, the model takes 32 with what follows"),
        (["FOLDER", PROMPT, "--max-new-tokens", "31"], r"--max-new-tokens 31: after \d+ tokens .* room for"),
        (
            ["FOLDER", PROMPT, "--max-new-tokens", "0"],
            "--max-new-tokens: takes a whole number from 1 to 1,000,000,000, got '0'",
        ),
        (["FOLDER", PROMPT, "--num-beams", "0"], "--num-beams: takes a whole number from 1 to 1,000, got '0'"),
        (["FOLDER", PROMPT, "--temperature", "0"], "--temperature: takes a number from 0.001 to 1000, got '0'"),
        (["FOLDER", PROMPT, "--temperature", "nan"], "from 0.001 to 1000, got 'nan'"),
        (["FOLDER", PROMPT, "--temperature", "1e-50"], "from 0.001 to 1000, got '1e-50'"),
        (["FOLDER", PROMPT, "--top-p", "nan"], "--top-p: takes a number from 1e-06 to 1"),
        (["FOLDER", PROMPT, "--num-beams", "99999999999999999999"], "--num-beams: takes a whole number from 1 to"),
        (["FOLDER", PROMPT, "--seed", "99999999999999999999"], "--seed: takes a whole number from 0 to 4,294,967,295"),
        (["FOLDER", PROMPT, "--seed", "-1"], "--seed: takes a whole number from 0"),
        (["FOLDER", PROMPT, "--policy", "random:0.5:4294967296"], r"the seed must be in 0 \.\. 4294967295"),
        (["FOLDER", PROMPT, "--policy", "spread:" + "9" * 5000], "give the number of big layers"),
        (["FOLDER", PROMPT, "--policy", "x" * 300], "unknown policy"),
        (["FOLDER", "caf\udce9"], r"b'caf\\xe9' is not UTF-8"),
        (["x" * 300, PROMPT], "File name too long"),
        (["", PROMPT], "MODEL: an empty value was given"),
        (["FOLDER", PROMPT, "--policy", ""], "--policy: an empty value was given"),
        (["FOLDER", PROMPT, "--top-p", "1.5"], "--top-p: takes a number from 1e-06 to 1, got '1.5'"),
        (["FOLDER", PROMPT, "--policy", "all-bog"], "did you mean 'all-big'"),
        (["FOLDER", PROMPT, "--policy", "router:nowhere"], "not a router folder"),
        (["FOLDER", PROMPT, "--chat"], "no chat template"),
        (["FOLDER", PROMPT, "--num-beams", "1000000000"], "--num-beams: takes a whole number from 1 to 1,000"),
        (["FOLDER", PROMPT, "--policy", "all-big", "--policy", "all-small"], "--policy is given 2 times"),
        (["FOLDER"], "PROMPT"),
    ],
    ids=lambda value: " ".join(value)[:40].strip() if isinstance(value, list) else None,
)
def test_mistakes_get_one_line_with_the_way_out(capsys, folder, arguments, expected):
    assert cli.main(["generate", *(str(folder) if word == "FOLDER" else word for word in arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert re.search(expected, output.err)


def test_a_router_for_another_model_is_refused(capsys, folder, model, tmp_path):
    other = tiny_model(num_hidden_layers=5)
    facts = {"kind": "linear", "branches": ["small", "big"]}
    save_router(make_router("linear", other.config, ["small", "big"]), tmp_path / "other", facts)
    assert cli.main(["generate", str(folder), PROMPT, "--policy", f"router:{tmp_path / 'other'}"]) == 2
    assert "model of other sizes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stdin",
    [
        io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"),
        io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "ascii", errors="surrogateescape"),
        None,
    ],
    ids=["strict", "C locale", "closed"],
)
def test_standard_input_that_is_no_text_is_refused_in_a_line(capsys, monkeypatch, folder, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.main(["generate", str(folder), "-"]) == 2
    assert re.search("standard input.* (not UTF-8|closed)", capsys.readouterr().err)


def test_an_argument_in_the_bytes_of_utf8_is_read_whatever_the_locale(shown, folder):
    """Python under a locale of ASCII hands on each byte of `é` as a lone surrogate."""
    assert shown(folder, "the na\udcc3\udcafve owl", *FLAGS).startswith("the naïve owl")


def test_square_brackets_in_a_name_are_data(shown, run):
    (run / "routers" / "linear_k0").rename(run / "routers" / "[red]k0")
    assert "\n[red]k0: 6 tokens" in shown(run, PROMPT, *FLAGS, "--policy", "[red]k0", "--no-compare")


def console(**options):
    return Console(file=StringIO(), width=20, **options)


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_without_colour_text_comes_as_it_is(options):
    terminal, text = console(**options), "a [bold] line\tlonger than the terminal is wide\n\n  :smile: "
    print_piece(terminal, text, 0.5)
    print_piece(terminal, "x", 1.0)
    print_legend(terminal)
    assert terminal.file.getvalue() == text + "x"


def test_colours_say_how_much_was_spent_and_the_legend_names_them():
    terminal = console(force_terminal=True, color_system="truecolor")
    for share in (0.0, 0.1, 0.5, 1.0):
        print_piece(terminal, "x", share)
    print_legend(terminal)
    pieces, legend = terminal.file.getvalue().split("big layers per token:")
    colour_of = re.compile(r"\x1b\[38;2;([\d;]+)m([^\x1b]*)")
    none, tenth, half, whole = (colour for colour, _ in colour_of.findall(pieces))
    assert none == tenth
    assert len({none, half, whole}) == 3
    named = {label.strip(): colour for colour, label in colour_of.findall(legend)}
    assert (named["0%"], named["50%"], named["100%"]) == (none, half, whole)
    assert len(named) == 5


def test_a_strip_has_a_mark_per_layer():
    terminal = console()
    print_routes(terminal, [" the", "\n"], ROUTES)
    head, *lines = terminal.file.getvalue().splitlines()
    assert head == "routes, layer 0 first: · skip, ▪ small, █ big"
    assert lines == ["█▪·█ 2 big  ·the", "▪▪▪▪ 0 big  ↵"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_strip_has_digits_where_a_terminal_lacks_the_marks(encoding):
    file = TextIOWrapper(BytesIO(), encoding, errors="replace", newline="\n")
    print_routes(Console(file=file, width=20), [" é"], ROUTES[:1])
    file.flush()
    head, line = file.buffer.getvalue().decode(encoding).splitlines()
    assert head == "routes, layer 0 first: 0 skip, 1 small, 2 big"
    assert line.startswith("2102 2 big  ")
