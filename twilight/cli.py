"""The command line: ``twilight <verb> [words]``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from twilight.errors import TwilightError, UnknownNameError, unknown_name
from twilight.registry import PluginWarning

FAILED = 1
"""Exit status of a verb that could not do what it was asked for."""
USAGE = 2
"""Exit status of a command line that asks for what is not there."""

_EXPECTED = (TwilightError, ValueError, TypeError, OSError)
"""Errors of bad input: their message is the answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb, rest = (words[0], words[1:]) if words else ("help", [])
    if verb in ("-h", "--help"):
        verb = "help"
    if verb in ("-V", "--version"):
        verb = "version"
    with warnings.catch_warnings():
        _show_plugin_warnings()
        try:
            if verb not in VERBS:
                raise unknown_name("verb", verb, list(VERBS), see="twilight --help")
            return VERBS[verb](rest)
        except _EXPECTED as error:
            return _report(error, USAGE if isinstance(error, UnknownNameError) else FAILED)
        except KeyboardInterrupt:
            return 130


def decode(argv: Sequence[str] | None = None) -> int:
    """Run ``twilight decode`` with those words (``sys.argv`` by default), and return the exit status.

    The words are Hydra overrides and flags; ``--json [PATH]`` is ``task.json=PATH``, standard output without one. They
    are checked as a whole before anything runs. A sweep's job that fails says so at once and the others go on.
    """
    return main(["decode", *(sys.argv[1:] if argv is None else argv)])


def _decode(words: list[str]) -> int:
    return _hydra("decode", words)


def _run(words: list[str]) -> int:
    return _hydra("run", words)


def _sweep(words: list[str]) -> int:
    return _hydra("sweep", [*words, "--multirun"])


def _hydra(verb: str, words: list[str]) -> int:
    from hydra._internal.utils import get_args_parser  # what hydra.main reads its own flags with

    from twilight import config, overrides, sweeper

    name = config.CONFIG_NAMES[verb]
    try:
        words = overrides.expand_budget(_expand_json(words) if verb == "decode" else _expand_out(words))
        parser = get_args_parser()
        parser.prog = f"twilight {verb}"
        args = parser.parse_intermixed_args(words)
        if args.experimental_rerun is not None:
            raise ValueError("--experimental-rerun: it unpickles a file, which twilight does not do")
        if args.config_dir and not os.path.isdir(args.config_dir):
            raise FileNotFoundError(f"--config-dir: no folder '{args.config_dir}'")
        folders = [os.path.abspath(args.config_dir)] if args.config_dir else []
        config.setup()
        sweeper.register(args.overrides)
        given = args.overrides
        if not (args.hydra_help or args.shell_completion or args.config_path):
            sweeper.check_launcher(args.overrides)
            if verb == "decode" and any(word.startswith("experiment=") for word in args.overrides):
                raise ValueError("experiment: it is for measuring, as in twilight sweep experiment=p_table_tiny")
            shown = args.cfg is not None or args.info is not None or args.help
            checked = overrides.examine(
                args.overrides,
                multirun=args.multirun,
                config_name=args.config_name or name,
                folders=folders,
                verb=verb,
                shown=shown,
            )
            _check_outputs(checked.configs)
            given = checked.settled
            if args.multirun and shown and not args.help:  # one configuration, and Hydra shows none of a sweep
                args.multirun = False
                given = [*(word for word in args.overrides if word.startswith("hydra")), *checked.jobs[0]]
                print(f"of {' '.join(checked.jobs[0]) or 'the only run'}:", file=sys.stderr)
        # Hydra wants its flags before, or behind, all overrides.
        words = [*_flags(parser, args), *given]
    except _EXPECTED as error:
        return _report(error, USAGE)
    if verb == "decode":
        return _run_decode(words)
    from twilight import running

    return _run_hydra(verb, words, running.job)


def _flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Return the flags that were read, as they are written."""
    flags = []
    for action in parser._actions:
        value = getattr(args, action.dest, None) if action.option_strings else None
        if value is not None and value != action.default:
            flags.append(action.option_strings[0] + ("" if value is True else f"={value}"))
    return flags


def _run_decode(words: list[str]) -> int:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    failures: list[BaseException] = []

    def task(cfg: Any) -> Any:
        from twilight import decoding

        job = HydraConfig.get()
        if job.mode == RunMode.MULTIRUN:
            print(f"\njob {job.job.num}: {' '.join(job.overrides.task)}", file=sys.stderr)
        try:
            return decoding.run(cfg)
        except _EXPECTED as error:
            failures.append(error)
            _report(error, FAILED)
        except Exception as error:
            failures.append(error)
            traceback.print_exc()
        return None

    return _run_hydra("decode", words, task) or (FAILED if failures else 0)


def _run_hydra(verb: str, words: list[str], task: Callable[[Any], Any]) -> int:
    import hydra

    from twilight import config, resources

    name = config.CONFIG_NAMES[verb]
    app = hydra.main(version_base="1.3", config_path=str(resources.folder("conf")), config_name=name)
    outer = sys.argv
    # hydra.main takes the command line from nowhere else.
    sys.argv = [f"twilight {verb}", *words]
    try:
        with config.search_path():
            app(task)()
    except ValueError as error:  # flags that do not go together
        return _report(error, USAGE)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
    finally:
        sys.argv = outer
    return 0


def _expand_out(words: list[str]) -> list[str]:
    """Spell ``--out DIR`` and ``--rerun`` as overrides."""
    expanded: list[str] = []
    rest = iter(words)
    for word in rest:
        key, _, folder = word.partition("=")
        if word == "--rerun":
            expanded.append("hydra.sweeper.rerun=true")
        elif key == "--out":
            folder = folder or next(rest, "")
            if not folder or folder.startswith("-"):
                raise ValueError("--out: expected the folder for runs, as in --out runs")
            quoted = folder.rstrip("/").replace("'", "\\'")
            expanded += [f"hydra.sweep.dir='{quoted}'", f"hydra.run.dir='{quoted}/${{run_folder:}}'"]
        else:
            expanded.append(word)
    return expanded


def _expand_json(words: list[str]) -> list[str]:
    """Spell ``--json``, ``--json PATH`` and ``--json=PATH`` as an override."""
    expanded: list[str] = []
    rest = iter([*words, ""])
    for word in rest:
        if word != "--json" and not word.startswith("--json="):
            expanded.append(word)
            continue
        path, after = word.partition("=")[2], ""
        if not path:
            after = next(rest)
            is_path = after == "-" or (after and not after.startswith(("-", "~", "+")) and "=" not in after)
            path, after = (after, "") if is_path else ("-", after)
        quoted = path.replace("'", "\\'")
        expanded += [f"task.json='{quoted}'"] + ([after] if after else [])
    return [word for word in expanded if word]


def _check_outputs(jobs: Sequence[Any]) -> None:
    """Refuse a sweep whose jobs would write over each other's files."""
    from omegaconf import OmegaConf

    for key in ("json", "plot"):
        plain = [job.task for job in jobs if key in job.task and not OmegaConf.is_interpolation(job.task, key)]
        paths = [task.get(key) for task in plain]
        path = paths[0] if paths else None
        if len(jobs) > 1 and path not in (None, "-") and paths.count(path) > 1:
            raise ValueError(
                f"task.{key}: several jobs of the sweep would write {path}\n"
                f"  give each its own: 'task.{key}=${{hydra:runtime.output_dir}}/{os.path.basename(path)}'"
            )


def _plugins(words: list[str]) -> int:
    from twilight import listing

    warnings.simplefilter("ignore", PluginWarning)  # the output says it
    return listing.main(words)


def _doctor(words: list[str]) -> int:
    from twilight import doctor

    parser = argparse.ArgumentParser("twilight doctor", description="Check what twilight needs; say what to run.")
    parser.add_argument("--json", action="store_true", help="as data")
    args = parser.parse_args(words)
    warnings.simplefilter("ignore", PluginWarning)
    return doctor.main(as_json=args.json)


def _calibrate(words: list[str]) -> int:
    from twilight import calibration

    return calibration.main(words)


def _bench(words: list[str]) -> int:
    from twilight import resources

    return int(resources.subpackage("benchmarks").main(words))


def _report_runs(words: list[str]) -> int:
    from twilight.reporting import main as reporting

    return reporting.main(words)


def _kernels(words: list[str]) -> int:
    from twilight import kernel_verbs

    return kernel_verbs.main(words)


def _version(words: list[str]) -> int:
    from twilight import __version__

    print(__version__)
    return 0


def _help(words: list[str]) -> int:
    print(__doc__, "\n", *(f"\n  {verb:<10} {about}" for verb, about in _ABOUT.items()), "\n", sep="", end="")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "decode": _decode,
    "run": _run,
    "sweep": _sweep,
    "plugins": _plugins,
    "doctor": _doctor,
    "calibrate": _calibrate,
    "bench": _bench,
    "report": _report_runs,
    "kernels": _kernels,
    "version": _version,
    "help": _help,
}

_ABOUT = {
    "decode": "decode a long prompt:  twilight decode selector=quest p=0.9  (-m for sweeps; --help for all options)",
    "run": "measure, and keep it:  twilight run task=facts selector=quest p=0.9",
    "sweep": "measure many:          twilight sweep 'selector=glob(*)' p=0.7,0.8 task=facts",
    "plugins": "what is installed:     twilight plugins list | info NAME | new NAME | check NAME  [--json]",
    "doctor": "what works here:       twilight doctor [--json]",
    "calibrate": "prepare a model:       twilight calibrate double_sparsity … | p …",
    "bench": "time the kernels:     twilight bench | model | report FILE …  (bench --help for all options)",
    "report": "pictures of runs:      twilight report RUNS… [--out DIR]",
    "kernels": "the CUDA kernels:      twilight kernels list | compile | warmup | clear",
    "version": "print the version",
    "help": "print this",
}


def _report(error: BaseException, status: int) -> int:
    if os.environ.get("TWILIGHT_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    if status == FAILED and not isinstance(error, TwilightError):
        print("  TWILIGHT_DEBUG=1 shows where it was raised", file=sys.stderr)
    return status


def _show_plugin_warnings() -> None:
    """Print a plugin's warning as one line of ours, not as a line of source."""
    others: Any = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, PluginWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            others(message, category, *where, **more)

    warnings.showwarning = show


if __name__ == "__main__":
    sys.exit(main())
