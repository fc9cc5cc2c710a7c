"""The command line: `duollm VERB ...`. The work is imported only when a verb runs."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from duollm import __version__
from duollm.errors import UserError, did_you_mean, system_fault
from duollm.files import check_folder
from duollm.machine import faster_precision, hub_answers, matmul_peak, tune_memory
from duollm.options import Parser, WideHelp, listed, number, rows, whole_number

if TYPE_CHECKING:
    from duollm.config import ConvertConfig, DataConfig, Recipe

_POLICY_HELP = "all-big (default), all-small, random:0.25, spread:6, routes:2211..., a run's router, router:FOLDER, ..."


@dataclass(frozen=True)
class Verb:
    """A subcommand: what it does in a line, its options, and its work."""

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for the user's mistakes, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _prepare_output()
        given = [_as_utf8(argument) for argument in given]
        _dispatch(given)
        sys.stdout.flush()
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("duollm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, such as `head`, has left
        _discard_output()
        return 141
    except Exception as error:
        fault = system_fault(error)
        if fault is None:
            raise
        _discard_output()
        return _refuse(fault)
    return 0


def _refuse(fault: str) -> int:
    print(f"duollm: error: {' '.join(fault.splitlines())}", file=sys.stderr)
    return 2


def _prepare_output() -> None:
    """Print replacements for what a terminal cannot show; refuse to work for an output that is closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as we run
    if sys.stdout is None:
        raise UserError("standard output is closed; redirect it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    for name in ("torchao", "torch.utils._pytree"):  # imported by transformers, used by no verb
        logging.getLogger(name).setLevel(logging.ERROR)


def _discard_output() -> None:
    """Python would try again at exit to print what cannot be printed, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_utf8(argument: str) -> str:
    """The argument as text: Python keeps bytes that its locale does not know as lone surrogates."""
    given = os.fsencode(argument) if any("\udc80" <= character <= "\udcff" for character in argument) else b""
    try:
        return given.decode() or argument
    except UnicodeDecodeError:
        raise UserError(f"{given!r} is not UTF-8; write it in UTF-8, and rename a file of that name") from None


def _dispatch(given: list[str]) -> None:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
    elif given[0] in ("-V", "--version"):
        print(f"duollm {__version__}")
    elif given[0] not in VERBS:
        raise UserError(f"unknown verb {given[0]!r}; {did_you_mean(given[0], VERBS)}")
    else:
        _run_verb(given[0], given[1:])


def _run_verb(name: str, given: list[str]) -> None:
    verb = VERBS[name]
    parser = Parser(prog=f"duollm {name}", description=verb.summary, formatter_class=WideHelp, allow_abbrev=False)
    verb.add_options(parser)
    try:
        options = parser.parse(given)
    except SystemExit:  # argparse has printed the help
        return
    try:
        verb.run(options, ["duollm", name, *given])
    except UserError as error:
        raise UserError(parser.name_option(str(error))) from error


def _overview() -> str:
    lines = [
        "usage: duollm VERB [options]",
        "",
        "Study adaptive computation in language models: which tokens need how much compute, in which",
        "layers, and how much of that a router can capture.",
        "",
        *(f"  {name:<14}{verb.summary}" for name, verb in VERBS.items()),
        "",
        "duollm VERB --help lists a verb's options; duollm --version prints the version.",
    ]
    return "\n".join(lines)


def _add_study_options(parser: argparse.ArgumentParser) -> None:
    from duollm.recipe_files import add_recipe_options

    parser.add_argument("--out", metavar="FOLDER", help="run folder (default: runs/NAME, NAME from the recipe)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    add_recipe_options(parser)


def _resolve(options: argparse.Namespace) -> "Recipe":
    from duollm.config import Recipe
    from duollm.recipe_files import find_recipe, load_recipe

    sections = tuple(Recipe.model_fields)
    overrides = {key: text for key, text in vars(options).items() if key.partition(".")[0] in sections}
    return load_recipe(find_recipe(options.recipe), overrides)


def _study(options: argparse.Namespace, command: list[str], until: str) -> None:
    recipe = _resolve(options)
    if options.dry_run:
        from duollm.checks import check_recipe, completed
        from duollm.recipe_files import to_yaml

        if not (recipe.model.path or recipe.model.dense):  # those may have other sizes, and opening them may take long
            check_recipe(completed(recipe, recipe.model), recipe.model)
        print(to_yaml(recipe), end="")
        return
    run = Path(options.out or Path("runs", recipe.name))
    check_folder("--out", run)
    if run.is_dir() and any(run.iterdir()) and not (run / "config.yaml").is_file():
        raise UserError(f"--out {run} holds files but no config.yaml, so it is no run folder; give a new one")
    tune_memory()
    from duollm.study import run_study

    run_study(recipe, run, command, until)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    from duollm.recipe_files import add_recipe_options

    add = parser.add_argument
    add("--gpus", type=whole_number(1, 10**6), default=1, metavar="N", help="number of devices (default: %(default)s)")
    peak = "peak of one of them for matrix products, TFLOP/s (default: measured on this machine)"
    add("--peak-tflops", type=number(1e-3, 1e6), metavar="X", help=peak)
    used = "share of the peak that is used (default: %(default)s, as measured for recipes/quick.yaml)"
    add("--mfu", type=number(0.001, 1), default=0.4, metavar="SHARE", help=used)
    checked = "a finished run on this machine: also print its planned training time beside the measured one"
    add("--check", metavar="RUN", help=checked)
    add_recipe_options(parser)


def _plan(options: argparse.Namespace, command: list[str]) -> None:
    recipe = _resolve(options)
    from duollm.plan import Devices, check_against, plan, render

    peak = options.peak_tflops and options.peak_tflops * 1e12
    if peak is None:
        given = recipe.pretrain.precision
        peak = matmul_peak(faster_precision() if given == "auto" else given)
    devices = Devices(options.gpus, peak, options.mfu)
    checked = check_against(Path(options.check), devices) if options.check else []
    print(render([*plan(recipe, devices), *checked]))


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
    from duollm.config import LARGEST_SEED, SmallInit

    add = parser.add_argument
    add("dense", metavar="DENSE", help="a dense checkpoint: a folder with safetensors, or a hub id")
    add("--out", metavar="FOLDER", required=True, help="folder for the duo; it must be new or empty")
    width = "inner width of the small FFNs (default: a sixteenth of the big ones)"
    add("--small-intermediate-size", type=whole_number(0), metavar="N", help=width)
    start = "how to set the small FFNs: at random; from the most used neurons of the big FFN (slice); like slice, "
    start += "then trained to imitate the big FFN (distilled); or as linear maps of low rank (linear). "
    start += "Default: %(default)s"
    add("--small-init", choices=get_args(SmallInit), default="distilled", help=start)
    fitted = "text to fit the small FFNs to: prose, code, a file or folder, ... (default: %(default)s)"
    add("--domains", type=listed(str), default="prose,code", metavar="LIST", help=fitted)
    add("--sample-tokens", type=int, default=32_768, metavar="N", help="tokens of that text (default: %(default)s)")
    add("--sequence-length", type=int, default=256, metavar="T", help="tokens per window (default: %(default)s)")
    add("--steps", type=int, default=300, metavar="N", help="distillation steps per layer (default: %(default)s)")
    skips = "what a token that skips leaves out: the FFN, or the whole layer (default: %(default)s)"
    add("--skip-scope", choices=["ffn", "layer"], default="ffn", help=skips)
    types = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=types, default="auto", help="dtype of the saved weights (default: that of the checkpoint)")
    seed = "random seed for text, random weights and batches (default: %(default)s)"
    add("--seed", type=whole_number(0, LARGEST_SEED), default=0, metavar="N", help=seed)


def _convert(options: argparse.Namespace, command: list[str]) -> None:
    config, text = _convert_sections(options)
    out = Path(options.out)
    check_folder("--out", out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} exists already; give a new folder")
    tune_memory()
    import torch

    from duollm.convert.dense import convert_checkpoint

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    size, scope = options.small_intermediate_size, options.skip_scope
    convert_checkpoint(options.dense, out, config, text, size, scope, dtype, options.seed)


def _convert_sections(options: argparse.Namespace) -> "tuple[ConvertConfig, DataConfig]":
    """The options as sections of a recipe, which know what is allowed."""
    from pydantic import ValidationError

    from duollm.config import ConvertConfig, DataConfig
    from duollm.recipe_files import explain

    try:
        config = ConvertConfig(small_init=options.small_init, sample_tokens=options.sample_tokens, steps=options.steps)
        domains, length = options.domains, options.sequence_length
        return config, DataConfig(domains=domains, tokenizer=options.dense, sequence_length=length)
    except ValidationError as error:
        raise UserError(": ".join(filter(None, explain(error)))) from None


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a saved duo, or a run folder")
    add("--out", metavar="FOLDER", help="folder for the results (default: only print them)")
    policies = parser.add_mutually_exclusive_group()
    policies.add_argument("--policy", action="append", metavar="SPEC", help=f"{_POLICY_HELP}; may be repeated")
    sweep = "score one kind of policy at several shares of big layers: spread, random, first or last"
    policies.add_argument("--sweep", metavar="KIND", help=sweep)
    shares = "shares of big layers to sweep (default: 0,0.25,0.5,0.75,1)"
    add("--shares", type=listed(number(0, 1), brackets=True), metavar="LIST", help=shares)
    batch = "rows per forward; for tasks also auto, the largest batch that fits a GPU (default: %(default)s)"
    add("--batch-size", type=rows, default=8, metavar="N", help=batch)
    _add_text_options(parser.add_argument_group("losses", "Scores the test split of each domain. This is the default."))
    add = parser.add_argument_group("lm-eval tasks", "Run instead of losses. Needs the extra `eval`.").add_argument
    tasks = "tasks to run: duollm_prose_continuation, duollm_code_continuation, arc_easy, ..."
    add("--tasks", type=listed(str), metavar="LIST", help=tasks)
    add("--limit", type=whole_number(), metavar="N", help="documents per task, at most (default: all)")
    add("--num-fewshot", type=whole_number(0), metavar="N", help="examples in the context (default: as the task says)")
    add("--include-path", action="append", metavar="FOLDER", help="a folder with task YAML files; may be repeated")


def _add_text_options(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    texts = "prose, code, a file or folder, ... (default: the domains of the run, or prose,code)"
    add("--domains", type=listed(str), metavar="LIST", help=texts)
    add("--documents", type=whole_number(), metavar="N", help="documents per domain, at most (default: 40)")
    add("--windows", type=whole_number(), metavar="N", help="windows per document, at most (default: 4)")
    length = "tokens per window (default: that of the run, or 128)"
    add("--sequence-length", type=whole_number(2), metavar="T", help=length)


_TEXT_OPTIONS = ("domains", "documents", "windows", "sequence_length")
_TASK_OPTIONS = ("limit", "num_fewshot", "include_path")


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _score(options: argparse.Namespace, command: list[str]) -> None:
    text, tasks = _given(options, _TEXT_OPTIONS), _given(options, _TASK_OPTIONS)
    for name in text if options.tasks else ():
        raise UserError(f"{name} is about losses, and --tasks runs tasks instead; leave one of them out")
    for name in () if options.tasks else tasks:
        raise UserError(f"{name} needs --tasks")
    if options.batch_size == "auto" and not options.tasks:
        raise UserError("batch_size auto goes with --tasks; losses of text take a whole number from 1")
    if options.shares and not options.sweep:
        raise UserError("shares needs --sweep: spread, random, first or last")
    out = Path(options.out) if options.out else None
    if out:
        check_folder("--out", out)
    tune_memory()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    if options.tasks and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; without it every file is retried for half a minute
    from duollm.saved.model import Saved

    saved = Saved.at(Path(options.model))
    shares = options.shares or [0, 0.25, 0.5, 0.75, 1]
    policies = saved.swept(options.sweep, shares) if options.sweep else options.policy or ["all-big"]
    if options.tasks:
        from duollm.saved.tasks import TaskSettings, score_tasks

        task_settings = TaskSettings(options.tasks, batch_size=options.batch_size, **tasks)
        score_tasks(saved, policies, task_settings, out, command)
    else:
        from duollm.saved.text import TextSettings, score_text

        score_text(saved, policies, TextSettings(batch_size=options.batch_size, **text), out, command)


def _add_trace_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="RUN|MODEL", help="a run folder, or a saved duo")
    forms = f"{_POLICY_HELP}; oracle:K, as the run recorded it"
    add("--policy", default="all-big", metavar="SPEC", help=forms)
    text = "a UTF-8 text, or - for standard input (default: the test split)"
    add("--text", metavar="FILE", help=text)
    add("--csv", metavar="FILE", default="-", help="where the rows go; - is standard output (default: %(default)s)")
    batch = "windows per forward (default: %(default)s)"
    add("--batch-size", type=whole_number(), default=8, metavar="N", help=batch)
    _add_text_options(parser.add_argument_group("test split", "What is traced without --text."))


def _trace(options: argparse.Namespace, command: list[str]) -> None:
    text = _given(options, _TEXT_OPTIONS)
    for name in set(text) - {"sequence_length"} if options.text else ():
        raise UserError(f"{name} is about the test split, and --text names another text; leave one of them out")
    out = None if options.csv == "-" else Path(options.csv)
    if out:
        check_folder("--csv", out.parent)
        if out.is_dir():
            raise UserError(f"--csv {out}: a folder; give a file, such as {out / 'tokens.csv'}")
    tune_memory()
    from duollm.saved.model import Saved
    from duollm.saved.text import TextSettings
    from duollm.saved.trace import trace

    settings = TextSettings(batch_size=options.batch_size, **text)
    trace(Saved.at(Path(options.model)), options.policy, options.text, settings, out)


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    from duollm.config import LARGEST_SEED

    add = parser.add_argument
    add("model", metavar="MODEL", help="a saved duo, or a run folder")
    add("prompt", metavar="PROMPT", help="the text to continue; -: read it from standard input")
    add("--policy", default="all-big", metavar="SPEC", help=_POLICY_HELP)
    length = "number of tokens to generate, at most (default: %(default)s)"
    add("--max-new-tokens", type=whole_number(), default=64, metavar="N", help=length)
    heat = "temperature of sampling (default: %(default)s)"
    add("--temperature", type=number(1e-3, 1e3), default=0.8, metavar="T", help=heat)
    nucleus = "sample from the likeliest tokens, which together have this probability (default: %(default)s)"
    add("--top-p", type=number(1e-6, 1), default=0.95, metavar="P", help=nucleus)
    add("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    beams = "number of beams of a beam search, which shows its text only at the end (default: no beam search)"
    add("--num-beams", type=whole_number(1, 1000), default=1, metavar="N", help=beams)
    seed = "random seed for sampling (default: %(default)s)"
    add("--seed", type=whole_number(0, LARGEST_SEED), default=0, metavar="N", help=seed)
    add("--chat", action="store_true", help="apply the tokenizer's chat template to the prompt, as a user's turn")
    add("--show-routes", action="store_true", help="print the route of each token, a mark per layer")
    add("--no-compare", dest="compare", action="store_false", help="do not measure the speed of all big")


def _generate(options: argparse.Namespace, command: list[str]) -> None:
    tune_memory()
    from duollm.saved.generate import GenerateSettings, generate
    from duollm.saved.model import Saved

    settings = {name: value for name, value in vars(options).items() if name not in ("model", "prompt")}
    generate(Saved.at(Path(options.model), "auto"), options.prompt, GenerateSettings(**settings))


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder; several are put side by side on one page")
    add("--out", metavar="FILE", help="the page of several runs (default: comparison.html)")
    shown = "open the page in a browser; that of one run is made anew only if something was measured since"
    add("--open", action="store_true", help=shown)


def _report(options: argparse.Namespace, command: list[str]) -> None:
    from duollm.report.page import make_page, open_page

    runs, out = [Path(run) for run in options.runs], Path(options.out) if options.out else None
    page = make_page(runs, out, anew=not options.open)
    print(page)
    if options.open:
        open_page(page)


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a finished run folder; only its results.json is read")
    budget = "numbers of big layers to compare at (default: all budgets of the run's routers)"
    add("--budget", type=listed(whole_number(0), brackets=True), metavar="K,K", help=budget)
    add("--domain", metavar="NAME", help="compare on the text of one domain (default: all domains pooled)")
    _add_forms(parser, {"markdown": "Markdown", "json": "JSON"})


def _add_forms(parser: argparse.ArgumentParser, forms: Mapping[str, str]) -> None:
    group = parser.add_mutually_exclusive_group()
    for name, shown in forms.items():
        text = f"print {shown} instead of a table"
        group.add_argument(f"--{name}", action="store_const", const=name, dest="form", default="table", help=text)


def _compare(options: argparse.Namespace, command: list[str]) -> None:
    from duollm.report.compare import print_comparison

    print_comparison([Path(run) for run in options.runs], options.budget, options.domain, options.form)


def _add_claims_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="finished runs: seeds of a study, and runs beside it (docs/claims.md)")
    add("--domain", metavar="NAME", help="decide on the text of one domain (default: all domains pooled)")
    add("--out", metavar="FOLDER", help="draw dense and frozen models beside the duo there (paper, figure 8)")
    _add_forms(parser, {"json": "JSON", "csv": "CSV"})


def _claims(options: argparse.Namespace, command: list[str]) -> None:
    from duollm.report.claims import print_claims

    out = Path(options.out) if options.out else None
    if out:
        check_folder("--out", out)
    print_claims([Path(run) for run in options.runs], options.domain, options.form, out)


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("which", choices=["train", "oracle", "forward"], help="what to measure")
    seconds = "seconds per measurement (default: %(default)s)"
    add("--seconds", type=number(0.01, 3600), default=10.0, metavar="S", help=seconds)
    add("--precision", choices=["fp32", "bf16"], help="precision of the weights, only for forward (default: fp32)")
    add("--json", action="store_true", help="print JSON instead of a table")


def _bench(options: argparse.Namespace, command: list[str]) -> None:
    if options.precision and options.which != "forward":
        raise UserError(f"--precision goes with 'bench forward' only, got 'bench {options.which}'; leave it out")
    tune_memory()
    from duollm.bench import run_bench

    run_bench(options.which, options.seconds, options.precision or "fp32", options.json)


def _study_verb(summary: str, until: str) -> Verb:
    return Verb(summary, _add_study_options, partial(_study, until=until))


VERBS = {
    "study": _study_verb("run a whole study: train a duo, search, train routers, compare, report", until="report"),
    "plan": Verb("print what a recipe takes: parameters, FLOPs, memory, steps, time", _add_plan_options, _plan),
    "convert": Verb("make a duo of a dense checkpoint", _add_convert_options, _convert),
    "pretrain": _study_verb("run a study up to the trained duo", until="pretrain"),
    "oracle": _study_verb("run a study up to the best route of every token", until="oracle"),
    "train-router": _study_verb("run a study up to the trained routers", until="train-router"),
    "evaluate": _study_verb("run a study up to the losses of its routers and patterns", until="evaluate"),
    "report": Verb("make the page of a run, or of several side by side, and open it", _add_report_options, _report),
    "score": Verb("score a saved model under any policy: losses, or lm-eval tasks", _add_score_options, _score),
    "trace": Verb("write a CSV row per token: text, losses, route", _add_trace_options, _trace),
    "generate": Verb("continue a text, coloured by what each token cost", _add_generate_options, _generate),
    "compare": Verb("print all policies of one or several runs at equal budgets", _add_compare_options, _compare),
    "claims": Verb("decide the claims of the paper by one or several runs", _add_claims_options, _claims),
    "bench": Verb("measure the speed of training, search or inference", _add_bench_options, _bench),
}
