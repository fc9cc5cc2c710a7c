"""The command line: `duollm VERB ...`. The work is imported only when a verb runs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from duollm.errors import UserError, did_you_mean, system_fault
from duollm.options import names, number, whole_number, whole_numbers

if TYPE_CHECKING:
    from duollm.config import Recipe

DEFAULT_RECIPE = "recipes/quick.yaml"

_SEED = whole_number(0, 2**32 - 1)

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
        from importlib.metadata import version

        print(f"duollm {version('duollm')}")
    elif given[0] not in VERBS:
        raise UserError(f"unknown verb {given[0]!r}; {did_you_mean(given[0], VERBS)}")
    else:
        _run_verb(given[0], given[1:])


def _run_verb(name: str, given: list[str]) -> None:
    verb = VERBS[name]
    parser = _Parser(prog=f"duollm {name}", description=verb.summary, formatter_class=_WideHelp, allow_abbrev=False)
    verb.add_options(parser)
    try:
        options = parser.parse(given)
    except SystemExit:  # argparse has printed the help
        return
    verb.run(options, ["duollm", name, *given])


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


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors with the nearest option."""

    def parse(self, given: Sequence[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(given)
        for argument in unknown:
            if argument.startswith("-"):
                raise UserError(f"unknown option {argument.partition('=')[0]}; {self._nearest(argument)}")
        if unknown:
            raise UserError(f"{self.prog} takes no further argument, got {unknown[0]!r}; {self._see_help()}")
        for action in self._actions:
            self._check_given(action, getattr(options, action.dest, None))
        return options

    def _check_given(self, action: argparse.Action, value: Any) -> None:
        """Refuse an empty text, as of an unset shell variable: a verb would read it as not given, or as this folder."""
        texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
        if action.dest != "prompt" and not all(text.strip() for text in texts):
            name = action.option_strings[0] if action.option_strings else action.metavar
            raise UserError(
                f"{name}: an empty value was given (an unset shell variable?); give a value, or leave it out"
            )

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse says nothing of a help that could not be printed."""
        print(message, end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self._see_help()}")

    def _nearest(self, argument: str) -> str:
        name = argument.partition("=")[0]
        options = [option for option in self._option_string_actions if option.startswith("--")]
        same_key = [option for option in options if option.rpartition(".")[2] == name.lstrip("-")]
        near = same_key or get_close_matches(name, options, n=1)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"{hint}{self._see_help()}"

    def _see_help(self) -> str:
        return f"{self.prog} --help lists all options"


class _WideHelp(argparse.HelpFormatter):
    """Help with room for the names of recipe keys."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def _add_study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FOLDER", help="run folder (default: runs/NAME, NAME from the recipe)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    _add_recipe_options(parser)


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE and an option for every key of a recipe; keys that are not given leave no trace."""
    from duollm.config import Recipe

    parser.usage = f"{parser.prog} [RECIPE] [options] [--section.key VALUE ...]"
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", default=DEFAULT_RECIPE, help="a YAML file (default: %(default)s)"
    )
    whole = parser.add_argument_group(
        "recipe", "Values are YAML: 5e5, 3e-4, true, null, [2,4]; text is taken as it is written."
    )
    for name, field in Recipe.model_fields.items():
        inner_fields = getattr(field.annotation, "model_fields", None)
        if inner_fields is None:
            _add_key(whole, name, field)
            continue
        section = parser.add_argument_group(name, field.annotation.__doc__)
        for inner_name, inner in inner_fields.items():
            _add_key(section, f"{name}.{inner_name}", inner)


def _add_key(group: Any, key: str, field: Any) -> None:
    text = field.description.replace("\n", " ").replace("%", "%%")
    default = "" if field.default is None else f" (default: {_as_yaml(field.default)})"
    group.add_argument(
        f"--{key}", metavar=_type_name(field.annotation), default=argparse.SUPPRESS, help=f"{text}{default}"
    )


def _as_yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(annotation: Any) -> str:
    """Say what a key takes: INTEGER, ffn|layer, [NUMBER,NUMBER], ..."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(inner)
    if origin in (Union, UnionType):
        return "|".join(_type_name(each) for each in inner if each is not NoneType)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is list:
        return f"[{_type_name(inner[0])},...]"
    if origin is tuple:
        return f"[{','.join(map(_type_name, inner))}]"
    return {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}[annotation]


def _resolve(options: argparse.Namespace) -> "Recipe":
    from duollm.config import Recipe, find_recipe, load_recipe

    sections = tuple(Recipe.model_fields)
    overrides = {key: text for key, text in vars(options).items() if key.partition(".")[0] in sections}
    return load_recipe(find_recipe(options.recipe), overrides)


def _study(options: argparse.Namespace, command: list[str], until: str) -> None:
    recipe = _resolve(options)
    if options.dry_run:
        from duollm.config import to_yaml

        print(to_yaml(recipe), end="")
        return
    run = Path(options.out or Path("runs", recipe.name))
    _check_run_folder(run)
    _prepare_for_torch()
    from duollm.study import run_study

    run_study(recipe, run, command, until)


def _check_run_folder(folder: Path) -> None:
    from duollm.files import check_folder

    check_folder("--out", folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.yaml").is_file():
        raise UserError(f"--out {folder} holds files but no config.yaml, so it is no run folder; give a new one")


def _prepare_for_torch() -> None:
    """Settings that count only before torch is imported. How OpenMP's threads wait is left alone (docs/LOG.md)."""
    from duollm.machine import keep_freed_memory

    keep_freed_memory()


def _plan(options: argparse.Namespace, command: list[str]) -> None:
    from duollm.plan import plan, render

    print(render(plan(_resolve(options))))


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dense", metavar="DENSE", help="a dense checkpoint: a folder with safetensors, or a hub id")
    add("--out", metavar="FOLDER", required=True, help="the duo folder to write")
    width = "inner width of the small FFNs (default: a sixteenth of the big ones)"
    add("--small-intermediate-size", type=whole_number(0), metavar="N", help=width)
    kinds = "random, the big FFN's most used neurons, or those trained to imitate it (default: %(default)s)"
    add("--small-init", choices=["random", "slice", "distilled"], default="distilled", help=kinds)
    add("--domains", type=names, default="prose,code", metavar="LIST", help="text to look at (default: %(default)s)")
    add("--sample-tokens", type=int, default=32_768, metavar="N", help="how much of it (default: %(default)s)")
    add("--sequence-length", type=int, default=256, metavar="T", help="tokens per window (default: %(default)s)")
    add("--steps", type=int, default=300, metavar="N", help="of the distillation, per layer (default: %(default)s)")
    add("--skip-scope", choices=["ffn", "layer"], default="ffn", help="what skip bypasses (default: %(default)s)")
    types = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=types, default="auto", help="of the saved weights (default: the checkpoint's)")
    add("--seed", type=_SEED, default=0, metavar="N", help="of text, random weights and batches (default: %(default)s)")


def _convert(options: argparse.Namespace, command: list[str]) -> None:
    _prepare_for_torch()
    from duollm.standalone.convert import convert_checkpoint

    convert_checkpoint(options)


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a finished run folder; only its results.json is read")
    add("--budget", type=whole_numbers, metavar="K,K", help="numbers of big layers (default: all of the run's routers)")
    add("--domain", metavar="NAME", help="one domain's text (default: all pooled)")
    form = parser.add_mutually_exclusive_group()
    for name in ("markdown", "json"):
        text = f"print {'Markdown' if name == 'markdown' else 'JSON'} instead of a table"
        form.add_argument(f"--{name}", action="store_const", const=name, dest="form", default="table", help=text)


def _compare(options: argparse.Namespace, command: list[str]) -> None:
    from duollm.report.compare import print_comparison

    print_comparison([Path(run) for run in options.runs], options.budget, options.domain, options.form)


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("which", choices=["train", "oracle", "forward"], help="what to measure")
    parser.add_argument(
        "--seconds", type=number(0.01, 3600), default=10.0, help="time per measurement (default: %(default)s)"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of the weights, for forward (default: fp32)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _bench(options: argparse.Namespace, command: list[str]) -> None:
    _prepare_for_torch()
    from duollm.bench import main as run_bench

    run_bench(options.which, options)


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    from duollm.standalone import add_options

    add_options(parser)
    _add_study_options(parser)
    parser.usage = f"{parser.prog} --model FOLDER [options]\n       {parser.usage}"


def _evaluate(options: argparse.Namespace, command: list[str]) -> None:
    from duollm import standalone

    given = [word.partition("=")[0] for word in command]
    if options.saved is None:
        for flag in given:
            if flag in standalone.FLAGS:
                raise UserError(f"{flag} needs --model FOLDER, a saved duo or a run folder")
        _study(options, command, until="evaluate")
        return
    _refuse_recipe(options, given)
    standalone.check_mix(given, options.batch_size)
    _prepare_for_torch()
    standalone.evaluate(options, command)


def _refuse_recipe(options: argparse.Namespace, given: Sequence[str]) -> None:
    """A recipe makes its own model: nothing of it goes with --model."""
    from duollm.config import Recipe

    keys = [word for word in given if word.removeprefix("--").partition(".")[0] in Recipe.model_fields]
    keys = [word for word in keys if word.startswith("--") and word != "--model"]
    for word in (*keys, "--dry-run", options.recipe):
        if word in given:
            raise UserError(f"{word} is of a recipe; leave it out, or --model, which evaluates a saved model alone")


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a saved duo, or a run folder")
    add("prompt", metavar="PROMPT", help="the text to continue; -: read it from standard input")
    add("--policy", default="all-big", metavar="SPEC", help=_POLICY_HELP)
    add("--max-new-tokens", type=int, default=64, metavar="N", help="stop after so many (default: %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="T", help="of sampling (default: %(default)s)")
    add("--top-p", type=float, default=0.95, metavar="P", help="sample from the likeliest (default: %(default)s)")
    add("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    add("--num-beams", type=int, default=1, metavar="N", help="beam search, which shows its text at the end")
    add("--seed", type=_SEED, default=0, metavar="N", help="of sampling (default: %(default)s)")
    add("--chat", action="store_true", help="the prompt is a user's turn: apply the tokenizer's chat template")
    add("--show-routes", action="store_true", help="print each token's branches, a mark per layer")
    add("--no-compare", action="store_true", help="do not measure the speed of all big")


def _generate(options: argparse.Namespace, command: list[str]) -> None:
    _prepare_for_torch()
    from duollm.standalone.generate import generate

    generate(options)


def _study_verb(summary: str, until: str) -> Verb:
    return Verb(summary, _add_study_options, partial(_study, until=until))


VERBS = {
    "study": _study_verb("the whole study: train a duo, search, train routers, compare, report", until="report"),
    "plan": Verb("print what a recipe takes: parameters, FLOPs, memory, steps", _add_recipe_options, _plan),
    "convert": Verb("make a duo folder of a dense checkpoint", _add_convert_options, _convert),
    "pretrain": _study_verb("the study up to the trained duo", until="pretrain"),
    "oracle": _study_verb("the study up to the best route of every token", until="oracle"),
    "train-router": _study_verb("the study up to the trained routers", until="train-router"),
    "evaluate": Verb(
        "losses and lm-eval tasks of a saved model under any policy; without --model: the study up to its losses",
        _add_evaluate_options,
        _evaluate,
    ),
    "generate": Verb(
        "continue a text under a policy, coloured by what each token cost", _add_generate_options, _generate
    ),
    "report": _study_verb("the study up to the report, the last stage", until="report"),
    "compare": Verb("a table of all policies at equal budgets, of one or several runs", _add_compare_options, _compare),
    "bench": Verb("measure the speed of training, search or inference", _add_bench_options, _bench),
}


if __name__ == "__main__":
    sys.exit(main())
