"""The command line. Prints, never computes."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from easgd_local import __version__
from easgd_local.argument_types import whole
from easgd_local.compare import command as compare_command
from easgd_local.compare.rivals import RIVALS
from easgd_local.compare.settings import COMMON, OTHERWISE
from easgd_local.config import WORKERS, Config, refuse_change
from easgd_local.flags import PARSERS, add_config_flags, add_rule_flags, flag, names_of, rule_fields
from easgd_local.rules import RULES, rule_class
from easgd_local.rules.base import Rule
from easgd_local.simulate import command as simulate_command
from easgd_local.theory import command as theory_command
from easgd_local.unfailing import Unfailing
from easgd_local.usage import USAGE, Parser, complain
from easgd_local.workloads import tuned

if TYPE_CHECKING:
    from easgd_local.prepare import Prepared

DONE, FAILED, INTERRUPTED = 0, 1, 130
EXIT_CODES = {"done": DONE, "failed": FAILED, "interrupted": INTERRUPTED}
INTERRUPTED_EARLY = "interrupted before the training began."
DOCTOR_FLAGS: tuple[tuple[str, type, Any, str], ...] = (
    ("model", str, "mlp", "model to time (default mlp)"),
    ("data", str, "digits", "data set to time it on (default digits)"),
    ("workers", int, WORKERS, f"number of worker processes p (default {WORKERS})"),
    ("tau", int, 10, "communication period τ, in steps (default 10)"),
    ("batch_size", int, 32, "samples per step (default 32)"),
)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. A flag that is not given is absent from the result."""
    top = Parser(prog="easgd-local", description="Elastic averaging on the GPUs or the cores of one machine.")
    top.add_argument("--version", action="version", version=f"easgd_local {__version__}", help="show the version")
    commands = top.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser, title="commands",
        description="easgd-local COMMAND --help describes one of them.",
    )  # fmt: skip
    _add_train(commands)
    compare = commands.add_parser(
        "compare", help="does it pay? rules and PyTorch's own ways on this machine", argument_default=argparse.SUPPRESS,
        usage=compare_command.USAGE, description=compare_command.DESCRIPTION,
        epilog="Exit codes: 0 done (diverged runs are a result), 1 a run failed, 2 bad usage, 130 interrupted.",
    )  # fmt: skip
    compare.add_argument("entries", metavar="ENTRY", nargs="*", default=[], help="what to compare, at least two")
    compare_command.add_flags(compare.add_argument_group("the comparison"))
    add_config_flags(compare.add_argument_group("the runs"), [name for name in COMMON if name not in OTHERWISE])
    theory = commands.add_parser(
        "theory", help="draw the theory: stability and moments", usage="easgd-local theory NAME [--flag VALUE ...]",
        description="Computes what the theory of elastic averaging and ADMM says on a quadratic, and draws it.",
    )  # fmt: skip
    theory_command.add_studies(theory, Parser)
    simulate = commands.add_parser(
        "simulate", help="run a rule where the machine cannot: up to 4096 workers on a virtual clock",
        argument_default=argparse.SUPPRESS, usage="easgd-local simulate RULE [RULE ...] [--flag VALUE ...]",
        description="Runs the rules on a small problem in one process, with the times of the machine described. Writes "
        "figures (PNG) and their data (CSV), and prints the key numbers. Several numbers of workers or periods are a "
        "sweep, each of whose simulations ends at the target.",
    )  # fmt: skip
    simulate.add_argument("rules", metavar="RULE", nargs="+", help=f"the algorithms: {', '.join(RULES)}")
    simulate_command.add_flags(simulate)
    add_rule_flags(simulate.add_argument_group("the rules"), without="tau")
    export = commands.add_parser(
        "export", help="write the center of a run as a file that plain torch loads",
        usage="easgd-local export RUN [--flag VALUE ...]", argument_default=argparse.SUPPRESS,
        description="Writes the center as it was at the end of the run in the folder RUN, or in its newest checkpoint.",
    )  # fmt: skip
    export.add_argument("run", metavar="RUN", help="the run folder")
    export.add_argument(
        "--to", metavar="FILE", help="what to write: .pt or .safetensors, a state dict, or .pt2, a program of "
        "torch.export with the network in it (default center.pt in RUN)"
    )  # fmt: skip
    export.add_argument("--step", type=whole, metavar="N", help="the checkpoint of this step instead of the newest")
    doctor = commands.add_parser(
        "doctor", help="say what this machine can do", usage="easgd-local doctor [--flag VALUE ...]",
        description="Looks at processor, memory and GPUs, and times one step and one exchange of a model.",
    )  # fmt: skip
    for name, kind, default, text in DOCTOR_FLAGS:
        word = "N" if kind is int else "NAME"
        doctor.add_argument(flag(name), type=PARSERS.get(kind, str), default=default, metavar=word, help=text)
    return top


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="train a model", argument_default=argparse.SUPPRESS,
        usage="easgd-local train RULE [--flag VALUE ...], or train --resume RUN",
        description="Trains MODEL on DATA with p workers that meet in a shared center by the algorithm RULE.",
        epilog="Exit codes: 0 done, 1 the run failed, 2 bad usage, 130 interrupted.",
    )  # fmt: skip
    train.add_argument(
        "rule", metavar="RULE", nargs="?", help=f"the algorithm: {', '.join(RULES)}; with --resume it is the run's"
    )  # fmt: skip
    add_rule_flags(train.add_argument_group("the rule"))
    run = train.add_argument_group("the run")
    add_config_flags(run)
    run.add_argument("--resume", metavar="RUN", help="continue the run in this folder from its newest checkpoint")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 the run failed, 2 bad usage, 130 interrupted."""
    _open_missing()
    out = Unfailing(sys.stdout, partial(complain, "nobody takes the output any more; the command goes on without."))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(Unfailing(sys.stderr)):
        arguments = vars(parser().parse_args(argv))
        commands: dict[str, Callable[[dict[str, Any]], int]] = {
            "train": _train, "compare": _compare, "doctor": _doctor, "export": _export,
            "theory": partial(_draw, theory_command.execute), "simulate": partial(_draw, simulate_command.execute),
        }  # fmt: skip
        try:
            os.getcwd()
        except FileNotFoundError:
            complain("the current folder has been deleted; change into another one.")
            return USAGE
        return commands[arguments.pop("command")](arguments)


def _open_missing() -> None:
    """Descriptors 0 to 2 may have been closed by who called: then other files would get them, and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # which gets the lowest number that is free


def _doctor(arguments: dict[str, Any]) -> int:
    from easgd_local.doctor import examine

    try:
        for one in examine(**arguments):
            print(f"{one.subject:<11} {one.found}{f'  -> {one.remedy}' if one.remedy else ''}", flush=True)
    except (ValueError, MemoryError) as error:
        complain(str(error) or "there is not enough memory for this; choose a smaller model.")
        return USAGE
    return DONE


def _export(arguments: dict[str, Any]) -> int:
    try:
        with _leaving_at_once():
            from easgd_local.export import export
        for line in export(**arguments):
            print(line, flush=True)
    except ValueError as error:
        complain(str(error))
        return USAGE
    except OSError as error:
        complain(f"{error.filename}: cannot be written ({error.strerror}); give another --to.")
        return FAILED
    except KeyboardInterrupt:
        complain("interrupted; nothing has been written.")
        return INTERRUPTED
    return DONE


def _draw(execute: Callable[..., Iterable[str]], arguments: dict[str, Any]) -> int:
    try:
        for line in execute(**arguments):
            print(line, flush=True)
    except (ValueError, MemoryError) as error:
        complain(str(error))
        return USAGE
    except OSError as error:
        complain(f"{arguments['out']}: the folder cannot be written to ({error.strerror}); give another --out.")
        return FAILED
    except KeyboardInterrupt:
        complain("interrupted; files not named yet are as they were.")
        return INTERRUPTED
    return DONE


def _compare(arguments: dict[str, Any]) -> int:
    from rich.console import Console

    console = Console(highlight=False)
    try:
        for part in compare_command.execute(importing=_leaving_at_once(), **arguments):
            console.print(part, markup=False, soft_wrap=isinstance(part, str))
    except (ValueError, MemoryError) as error:
        complain(str(error) or "there is not enough memory for this; choose a smaller model, or fewer workers.")
        return USAGE
    except compare_command.Failed as failure:
        complain(str(failure))
        return FAILED
    except OSError as error:
        complain(f"{error.filename}: cannot be written ({error.strerror}); make room, and give the same --out.")
        return FAILED
    except compare_command.Stopped as stop:
        complain(str(stop))
        return INTERRUPTED
    except KeyboardInterrupt:
        complain(INTERRUPTED_EARLY)
        return INTERRUPTED
    return DONE


def _train(arguments: dict[str, Any]) -> int:
    try:
        prepared = _prepare(arguments)
    except (ValueError, MemoryError) as error:
        complain(str(error) or "there is not enough memory for this; choose a smaller model, or fewer workers.")
        return USAGE
    except KeyboardInterrupt:
        complain(INTERRUPTED_EARLY)
        return INTERRUPTED
    from rich.console import Console

    from easgd_local import view
    from easgd_local.training import Training

    console = Console()
    with prepared:
        with view.open_view(console) as live:
            try:
                summary = Training(prepared, [live]).execute()
            except (ConnectionError, ProcessLookupError):
                complain(
                    f"{prepared.plan.folder}: a process of the run was killed while it started; see logs/ there, and "
                    f"start it again."
                )
                return FAILED
            except OSError as error:
                complain(
                    f"{prepared.plan.folder}: the run folder cannot be written to ({error.strerror}); make room, and "
                    f"go on from the last checkpoint, if there is one, with --resume."
                )
                return FAILED
        console.print(view.summary_table(summary, summary["folder"]))
    return EXIT_CODES[summary["status"]]


def _prepare(arguments: dict[str, Any]) -> Prepared:
    """The run that the flags describe, ready to start; `ValueError` or `MemoryError` for one that cannot work."""
    given = {name: value for name, value in arguments.items() if name != "resume"}
    run = Path(arguments["resume"]) if "resume" in arguments else None
    # Wrong flags are told before anything slow is imported and any process started.
    config = make_config(given) if run is None else None
    if "rule" in given:
        _hyperparameters(given)
    from easgd_local.fork_server import warm_up

    warm_up()  # the fork server imports torch while we do
    with _leaving_at_once():
        from easgd_local.prepare import prepare
        from easgd_local.runfolder import saved_config

    if run is not None:
        config = _resumed(saved_config(run), run, given)
    assert config is not None
    print(f"loading {config.data}", flush=True)
    return prepare(config, run)


def make_config(arguments: dict[str, Any]) -> Config:
    """The configuration that the given flags describe; `ValueError` for a flag that the rule does not have.

    Where the model is one that has been tuned, its hyperparameters are the defaults.
    """
    rule, hyperparameters = _hyperparameters(arguments)
    rest = _rest(arguments)
    usual = tuned(rest.get("model", ""), rule.name, hyperparameters)
    return Config(rule=rule(**(usual | hyperparameters)), **rest)


def _hyperparameters(arguments: dict[str, Any]) -> tuple[type[Rule], dict[str, Any]]:
    """The rule, and the given flags that are its own; `ValueError` for one that only other rules have."""
    if "rule" not in arguments:
        raise ValueError(f"RULE is missing: give the algorithm: {', '.join(RULES)}; see easgd-local train --help.")
    if arguments["rule"] in RIVALS:
        raise ValueError(
            f"rule={arguments['rule']}: is PyTorch's own way and no rule; compare rules with it: easgd-local compare "
            f"eamsgd {arguments['rule']}."
        )
    rule = rule_class(arguments["rule"])
    given = {name: value for name, value in arguments.items() if name in rule_fields()}
    for name, value in given.items():
        if name not in names_of(rule):
            owners = ", ".join(other for other, one in RULES.items() if name in names_of(one))
            raise ValueError(
                f"{name}={value}: the rule {rule.name} has no {name}, only {', '.join(names_of(rule))}; leave "
                f"{flag(name)} out, or use a rule that has it: {owners}."
            )
    return rule, given


def _rest(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "rule" and name not in rule_fields()}


def _resumed(saved: Config, run: Path, arguments: dict[str, Any]) -> Config:
    """The saved configuration with the flags given now on top; `prepare` refuses what makes it another run.

    The rule's are refused here: changed, they might not even make a rule.
    """
    values = saved.to_json()
    rule, hyperparameters = _hyperparameters({"rule": saved.rule.name} | arguments)
    rest = _rest(arguments)
    refuse_change("rule", saved.rule.name, rule.name, run)
    for name, value in hyperparameters.items():
        refuse_change(name, values["rule"][name], value, run)
    if "out" in rest and Path(rest["out"]).resolve() != run.resolve():
        raise ValueError(f"out={rest['out']}: a resumed run goes on in its own folder {run}; leave --out out.")
    if "steps" in rest or "epochs" in rest:
        rest = {"steps": None, "epochs": None} | rest
    return Config.from_json(values | rest | {"out": str(run)})


@contextlib.contextmanager
def _leaving_at_once() -> Iterator[None]:
    """While torch is being imported: an exception in the middle of that would end in a crash of its own."""

    def leave(number: int, frame: Any) -> NoReturn:
        os.write(2, f"easgd-local: error: {INTERRUPTED_EARLY}\n".encode())
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
