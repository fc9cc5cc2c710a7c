import copy
import json
import shutil

import pytest
import torch
from tokenizers import processors

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
pytest.importorskip("accelerate", reason="needs the extra `eval`")

from duollm.data.tokenizer import load_tokenizer
from duollm.errors import UserError
from duollm.measure import harness
from duollm.measure.executor import policy_losses, route_digits
from duollm.measure.harness import TASKS_FOLDER, RoutedLM, run_tasks
from duollm.routers.policies import parse_policy
from tiny_saved import save_tiny

POLICIES = ["all-big", "random:0.5", "unsure"]
PROMPTS = ["the cat sat on a mat", "seven", "grey owls read aloud while the", "東京"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, _ = save_tiny(folder)
    return model, load_tokenizer(folder / "model")


def policy_of(name, model):
    """A named policy, or one that depends on the states."""
    if name != "unsure":
        return parse_policy(name, model)
    return lambda layer_idx, states_BTD, memory: (1 + (states_BTD[..., 0] > 0).long(), None)


def run(saved, name, tasks, batch_size=8, **settings):
    model, tokenizer = saved
    return run_tasks(RoutedLM(model, tokenizer, policy_of(name, model), batch_size), tasks, **settings)


def request_and_answers(results):
    """Each request with its log-likelihood and its routes."""
    for samples in results["samples"].values():
        for sample in samples:
            yield from zip(sample["arguments"], sample["filtered_resps"], sample["routes"], strict=True)


@pytest.mark.parametrize("name", POLICIES)
def test_loglikelihoods_and_routes_are_our_own_in_any_batch(saved, name):
    model, tokenizer = saved
    tasks = ["duollm_prose_continuation", "duollm_code_continuation"]
    one = list(request_and_answers(run(saved, name, tasks, batch_size=1, limit=1)))
    many = list(request_and_answers(run(saved, name, tasks, batch_size=8, limit=1)))
    assert len(one) == len(many) == 8
    for (request, (alone, _), routes), (same_request, (together, _), same_routes) in zip(one, many, strict=True):
        assert request == same_request
        assert routes == same_routes
        text, context = "".join(request), tokenizer.encode(request[0])
        ids_T = torch.tensor(tokenizer.encode(text))
        nll_WT, routes_WTL = policy_losses(model, ids_T[None], policy=policy_of(name, model))
        assert routes == route_digits(routes_WTL[0, len(context) - 1 :]).tolist()
        assert alone == pytest.approx(-nll_WT[0, len(context) - 1 :].sum().item(), abs=1e-3)
        assert together == pytest.approx(alone, abs=1e-3)


@pytest.fixture
def generation_task(tmp_path):
    """A folder with a task: continue the prompt as expected."""

    def write(expected, prompts=PROMPTS):
        shutil.copy(TASKS_FOLDER / "items.py", tmp_path)
        items = [{"prompt": prompt, "expected": text} for prompt, text in zip(prompts, expected, strict=True)]
        (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
        (tmp_path / "continue.yaml").write_text(
            "task: tiny_continue\noutput_type: generate_until\ncustom_dataset: !function items.load\n"
            "dataset_kwargs: {file: items.jsonl}\ntest_split: test\ndoc_to_text: prompt\ndoc_to_target: expected\n"
            "generation_kwargs: {until: ['<|endoftext|>'], max_gen_toks: 6, do_sample: false}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
        return tmp_path

    return write


@pytest.mark.parametrize("name", POLICIES)
def test_generation_in_a_batch_is_that_of_each_prompt_alone(saved, name, generation_task):
    model, tokenizer = saved
    generated = []
    for prompt in PROMPTS:
        ids_BT = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole_BT = model.generate(
            ids_BT, policy=policy_of(name, model), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        generated.append((ids_BT.shape[1], whole_BT))
    expected = [tokenizer.decode(whole_BT[0, start:], skip_special_tokens=True) for start, whole_BT in generated]
    folder = generation_task(expected)
    results = run(saved, name, ["tiny_continue"], batch_size=4, folders=[folder])
    assert results["results"]["tiny_continue"]["exact_match,none"] == 1
    routes = [sample["routes"][0] for sample in results["samples"]["tiny_continue"]]
    for taken, (start, whole_BT) in zip(routes, generated, strict=True):
        _, routes_WTL = policy_losses(model, whole_BT, policy=policy_of(name, model))
        assert taken == route_digits(routes_WTL[0, start - 1 :]).tolist()


def test_routes_of_a_generation_end_with_it(saved):
    lm = RoutedLM(*saved, None, 1)
    routes_BGL = torch.arange(2 * 4 * 3).view(2, 4, 3)
    end = lm.eot_token_id
    kept = lm._until_end(routes_BGL, torch.tensor([[5, end, end, end], [5, 6, 7, 8]]))
    assert [len(routes_GL) for routes_GL in kept] == [2, 4]
    assert lm._until_end(routes_BGL, torch.zeros(1, 4, dtype=torch.long)) == []


@pytest.fixture
def no_defaults(monkeypatch):
    """lm-eval's own tasks take half a minute to list."""
    whole = harness.TaskManager
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, **_: whole(include_path=include_path, include_defaults=False)
    )


def test_an_unknown_task_is_explained(saved, no_defaults):
    with pytest.raises(UserError, match="did you mean 'duollm_prose_continuation'"):
        run(saved, "all-big", ["duollm_prose"])


def test_a_missing_folder_of_tasks_is_named(saved, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        run(saved, "all-big", ["x"], folders=[tmp_path / "nowhere"])


def test_a_data_set_out_of_reach_is_explained(saved, tmp_path):
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\n")
    (tmp_path / "items.py").write_text("def load(**_):\n    raise ConnectionError('Could not reach it')\n")
    with (tmp_path / "far.yaml").open("a") as file:
        file.write("custom_dataset: !function items.load\n")
    with pytest.raises(UserError, match=r"cannot be fetched \(Could not reach it\)"):
        run(saved, "all-big", ["far"], folders=[tmp_path])


def test_few_shot_examples_enter_the_context_unless_the_task_fixes_their_number(saved, generation_task):
    folder = generation_task([""] * 4)
    with (folder / "continue.yaml").open("a") as file:
        file.write("fewshot_split: test\n")
    lengths = []
    for fewshot in (None, 2):
        results = run(saved, "all-big", ["tiny_continue"], folders=[folder], limit=1, fewshot=fewshot)
        lengths.append(len(results["samples"]["tiny_continue"][0]["arguments"][0][0]))
    assert lengths[1] > lengths[0]
    fixed = run(saved, "all-big", ["duollm_prose_continuation"], limit=1, fewshot=2)
    assert fixed["n-shot"]["duollm_prose_continuation"] == 0


def write_choices(folder, choices):
    shutil.copy(TASKS_FOLDER / "items.py", folder)
    item = {"context": "the owl " * 60, "choices": choices, "answer": 0}
    (folder / "items.jsonl").write_text(json.dumps(item))
    (folder / "choose.yaml").write_text(
        "task: tiny_choose\noutput_type: multiple_choice\ncustom_dataset: !function items.load\n"
        "dataset_kwargs: {file: items.jsonl}\ntest_split: test\ndoc_to_text: context\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )


@pytest.fixture
def short(saved):
    """The same model with 8 positions."""
    model, tokenizer = saved
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = 8
    return RoutedLM(model, tokenizer, policy_of("all-big", model), 2)


@pytest.mark.parametrize("asked", ["max_gen_toks: 8", "max_gen_toks: 999", "max_new_tokens: 999", "do_sample: false"])
def test_answers_leave_room_for_the_prompt(short, generation_task, asked):
    folder = generation_task([""] * 4)
    text = (folder / "continue.yaml").read_text()
    (folder / "continue.yaml").write_text(text.replace("max_gen_toks: 6, do_sample: false", asked))
    results = run_tasks(short, ["tiny_continue"], [folder])
    samples = results["samples"]["tiny_continue"]
    assert {sample["arguments"][0][1]["max_gen_toks"] for sample in samples} == {4}
    assert all(1 <= len(sample["routes"][0]) <= 4 for sample in samples)
    tokens = "256" if "do_sample" in asked else asked.split()[-1]
    assert short.shortened[f"answers of up to {tokens} tokens, to 4"] == 4
    assert short.shortened["prompts, at their beginning"] > 0


def test_an_empty_prompt_is_answered_as_in_any_batch(saved, generation_task):
    folder = generation_task(["owl", "owl"], ["", "the cat"])
    answers = [
        [
            sample["filtered_resps"]
            for sample in run(saved, "random:0.5", ["tiny_continue"], size, folders=[folder])["samples"][
                "tiny_continue"
            ]
        ]
        for size in (1, 2)
    ]
    assert answers[0] == answers[1]
    assert answers[0][0][0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("max_gen_toks: 0", "answers of 0 tokens; set its max_gen_toks to at least 1"),
        ("max_gen_toks: 4, do_sample: true", "generation_kwargs are refused: .temperature. .*; correct them"),
    ],
)
def test_settings_of_a_task_that_cannot_be_used_are_named(saved, generation_task, asked, message):
    folder = generation_task(["owl"], ["the cat"])
    text = (folder / "continue.yaml").read_text()
    (folder / "continue.yaml").write_text(text.replace("max_gen_toks: 6, do_sample: false", asked))
    with pytest.raises(UserError, match=message):
        run(saved, "all-big", ["tiny_continue"], folders=[folder])


def test_contexts_lose_their_beginning_and_are_counted(short, tmp_path):
    write_choices(tmp_path, [" owl", " cat"])
    results = run_tasks(short, ["tiny_choose"], [tmp_path])
    assert len(results["samples"]["tiny_choose"]) == 1
    assert dict(short.shortened) == {"contexts, at their beginning": 2}


def test_a_choice_longer_than_the_positions_is_refused(short, tmp_path):
    write_choices(tmp_path, [" owl", " cat" * 40])
    with pytest.raises(UserError, match=r"choice of \d+ tokens is longer than the model's 8 positions: 'cat cat"):
        run_tasks(short, ["tiny_choose"], [tmp_path])


def test_lm_eval_finds_a_batch_size_itself(saved):
    model, tokenizer = saved
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = 256
    found, expected = (
        list(request_and_answers(run((model, tokenizer), "random:0.5", ["duollm_code_continuation"], size, limit=1)))
        for size in ("auto", 3)
    )
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        assert one[1][0] == pytest.approx(other[1][0], abs=1e-3)
        assert one[2] == other[2]


def test_a_tokenizer_that_closes_texts_changes_no_answer(saved):
    model, tokenizer = saved
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", closing.eos_token], special_tokens=[(closing.eos_token, closing.eos_token_id)]
    )
    answers = [
        list(request_and_answers(run((model, each), "all-big", ["duollm_code_continuation"], limit=1)))
        for each in (tokenizer, closing)
    ]
    assert answers[0] == answers[1]
